"""The mean of several models' weights as one model, such as those of rounds of one training.

    python scripts/average.py OUT MODEL MODEL...

Model soups (Wortsman et al. 2022, arXiv 2203.05482, section 2, the uniform soup): models that were trained on from one
another lie in one basin, and their mean is often better than each. They must have the same parts; the first one's
tokenizers are kept, and generators with weights of their own are averaged too. Exit 2 with one line for bad input.
"""

from __future__ import annotations

import argparse
import sys

import torch

from unigen.models import load
from unigen.output import one_line_errors


def average(out: str, names: list[str]) -> None:
    """Write the mean of these models to the folder `out`. ValueError where their parts differ."""
    models = [load(name) for name in names]
    weights = [dict(model.named_parameters()) for model in models]
    shapes = [{name: w.shape for name, w in each.items()} for each in weights]
    for name, other in zip(names[1:], shapes[1:], strict=True):
        if other != shapes[0]:
            raise ValueError(f"{name} has other weights than {names[0]}: average models of one training")
    with torch.no_grad():
        for name, weight in weights[0].items():
            if weight.requires_grad:  # image tokenizers are frozen, and the first one's
                weight.copy_(torch.stack([each[name] for each in weights]).mean(0))
    models[0].save(out)


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", help="the folder to write")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders or names of models")
    args = parser.parse_args()
    if len(args.models) < 2:
        raise ValueError("give at least two models")
    average(args.out, args.models)
    print(f"wrote {args.out}: the mean of {len(args.models)} models")
    return 0


if __name__ == "__main__":
    sys.exit(main())
