"""The mean of several models' weights as one model, such as those of rounds of one training.

    python scripts/average.py OUT MODEL MODEL... [--weights 0.8,0.2]

Model soups (Wortsman et al. 2022, arXiv 2203.05482, section 2, the uniform soup): models that were trained on from one
another lie in one basin, and their mean is often better than each; a little of the model that a training began from
gives back what it had lost (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903). Or beyond: `--weights=-0.5,1.5` goes half
as far again from the first to the second, which makes a round of comparisons stronger (ExPO, Zheng et al. 2024, arXiv
2404.16792). The first one's tokenizers are kept, and each of its generators with weights of their own is the mean of
the models that have it. Exit 2 with one line for bad input.
"""

from __future__ import annotations

import argparse
import math
import sys

import torch

from unigen.media.output import one_line_errors
from unigen.models import load


def average(out: str, names: list[str], shares: list[float]) -> None:
    """Write the mean of these models, weighted by shares, to the folder `out`. ValueError where their parts differ."""
    models = [load(name) for name in names]
    weights = [dict(model.named_parameters()) for model in models]
    shapes = [{name: w.shape for name, w in parameters.items()} for parameters in weights]
    for name, model, shapes_of_model, model_weights in zip(names[1:], models[1:], shapes[1:], weights[1:], strict=True):
        shared = {k: v for k, v in shapes[0].items() if not k.startswith("heads.") or k.split(".")[1] in model.heads}
        if shapes_of_model != shared:
            raise ValueError(
                f"{name} has other weights than {names[0]}: average models of one training, that of most writers first"
            )
        if not model.shares_vocabulary(models[0]):
            raise ValueError(f"{name} has another text or image tokenizer than {names[0]}: train both with one")
        frozen_names = [
            k for k, w in model_weights.items() if k.startswith("heads.") and not w.requires_grad
        ]  # heads' tokenizers
        if not all(torch.equal(model_weights[k], weights[0][k]) for k in frozen_names):
            raise ValueError(
                f"a generator of {name} has another tokenizer than in {names[0]}: train both with one "
                "scale_tokenizer and one kl_tokenizer"
            )
    for head in models[0].heads:
        if sum(share for share, model in zip(shares, models, strict=True) if head in model.heads) <= 0:
            raise ValueError(f"the weights of the models that have {head} sum to 0 or less: give them more")
    with torch.no_grad():
        for name, weight in weights[0].items():
            if weight.requires_grad:  # tokenizers are frozen
                weighted_params = [
                    (share, parameters[name])
                    for share, parameters in zip(shares, weights, strict=True)
                    if name in parameters
                ]
                total = torch.stack([share * parameters for share, parameters in weighted_params]).sum(0)
                weight.copy_(total / sum(share for share, _ in weighted_params))
    models[0].save(out)


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", help="the folder to write")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders or names of models")
    parser.add_argument(
        "--weights",
        help="of each model, apart by commas (default: all alike); if the first is negative, --weights=-0.5,1.5",
    )
    args = parser.parse_args()
    if len(args.models) < 2:
        raise ValueError("give at least two models")
    weight_texts = args.weights.split(",") if args.weights else ["1"] * len(args.models)
    try:
        shares = [float(text) for text in weight_texts]
    except ValueError:
        shares = []
    if len(shares) != len(args.models) or not all(map(math.isfinite, shares)) or sum(shares) <= 0:
        requirement_text = f"{len(args.models)} numbers whose sum is above 0"
        raise ValueError(f"--weights are {requirement_text}, apart by commas, not {args.weights}")
    average(args.out, args.models, shares)
    print(f"wrote {args.out}: the mean of {len(args.models)} models")
    return 0


if __name__ == "__main__":
    sys.exit(main())
