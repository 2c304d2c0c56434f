"""Put a trained model into the package as bfloat16, beside its model card.

    python scripts/ship.py runs/tiny/model unigen-tiny [--without flow]

Left out may be generators with weights of their own that are not good enough yet. The folder unigen/assets/NAME is
replaced only when the new one is whole; its README.md, the model card, is kept.
"""

from __future__ import annotations

import argparse
import sys

import torch

from unigen.hub.resolve import ASSETS
from unigen.media.output import one_line_errors
from unigen.models import load

MAX_ASSET_BYTES = 40_000_000
"""Bytes that all shipped weights together may have."""


def asset_bytes(folder: str) -> int:
    return sum(file.stat().st_size for file in (ASSETS / folder).rglob("*.safetensors"))


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", help="what a training run wrote, such as runs/tiny/model")
    parser.add_argument("name", help="the name it is loaded by, such as unigen-tiny")
    parser.add_argument("--without", metavar="NAME", action="append", default=[], help="a generator to leave out")
    args = parser.parse_args()
    target = ASSETS / args.name
    model = load(args.folder)
    for name in args.without:
        if name not in model.heads:
            available = ", ".join(model.heads) or "none"
            raise ValueError(f"--without {name}: {args.folder} has no such generator with weights; it has {available}")
        del model.heads[name], model.generators[name], model.template.begin_ids[name]
        model.default_sampling.pop(name, None)
    other_bytes = sum(asset_bytes(folder.name) for folder in ASSETS.iterdir() if folder.is_dir() and folder != target)
    total = other_bytes + 2 * sum(p.numel() for p in model.parameters())
    if total > MAX_ASSET_BYTES:
        raise ValueError(f"the shipped weights would have {total / 1e6:.1f} MB, more than {MAX_ASSET_BYTES / 1e6:.0f}")
    card = (target / "README.md").read_text() if (target / "README.md").exists() else None
    model.save(target, dtype=torch.bfloat16)
    if card is not None:
        (target / "README.md").write_text(card)
    print(f"{target}: {asset_bytes(args.name) / 1e6:.1f} MB of weights, {total / 1e6:.1f} MB with all that is shipped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
