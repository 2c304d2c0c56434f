"""Share of pictures that come out the same alone and in a batch, in float32 and bfloat16.

    python scripts/bench.py batch [--model unigen-tiny] [--count 64] [--batch 16] [--json FILE]

Each picture has a prompt and a seed of its own. Sums in another order round differently; a picture changes only where
that turns the draw of a code. float32 should give 1.
"""

from __future__ import annotations

import time

import torch

import unigen
from unigen.config import write_report
from unigen.limits import number_argument
from unigen.toyworld.scenes import BACKGROUNDS, COLORS, OBJECT_EMOJI
from unigen.utils.argparser import OneLineParser


def make_prompts(count: int) -> list[str]:
    """Different sentences of different lengths."""
    objects, colors, grounds = list(OBJECT_EMOJI), list(COLORS), list(BACKGROUNDS)
    made = []
    for i in range(count):
        thing = f"a {colors[i % 6]} {objects[i % len(objects)]}"
        other = f" and a {objects[(7 * i + 3) % len(objects)]}" if i % 2 else ""
        made.append(thing + other + (f" on a {grounds[i % 8]} background" if i % 3 else ""))
    return made


def generate_codes(engine: unigen.Engine, asked: list[str], seeds: list[int]) -> list[torch.Tensor]:
    requests = [engine.request(p, "image", seed=s) for p, s in zip(asked, seeds, strict=True)]
    list(engine.run(requests))
    return [request.document.segments[-1].image for request in requests]  # type: ignore[misc]


def main(args: list[str]) -> int:
    parser = OneLineParser(prog="bench.py batch", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="unigen-tiny")
    parser.add_argument("--count", type=number_argument(1, 100_000), default=64)
    parser.add_argument("--batch", type=number_argument(1, 100_000), default=16)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(args)
    started = time.monotonic()
    asked, seeds = make_prompts(options.count), list(range(options.count))
    rows = []
    for dtype in ("float32", "bfloat16"):
        engine = unigen.load(options.model, dtype=dtype)
        alone = [generate_codes(engine, [p], [s])[0] for p, s in zip(asked, seeds, strict=True)]
        together: list[torch.Tensor] = []
        for at in range(0, options.count, options.batch):
            together += generate_codes(engine, asked[at : at + options.batch], seeds[at : at + options.batch])
        same = sum(torch.equal(a, b) for a, b in zip(alone, together, strict=True)) / options.count
        print(f"{dtype:<9} {same:.3f} of {options.count} pictures are the same alone and in batches of {options.batch}")
        rows.append({"name": f"same in {dtype}", "value": same, "unit": "share", "batch": options.batch})
    if options.json:
        command = f"python scripts/bench.py batch {' '.join(args)}".strip()
        seconds = time.monotonic() - started
        write_report(options.json, command=command, model=options.model, rows=rows, seconds=seconds)
    return 0
