"""Share of pictures that come out the same alone and in a batch, in float32 and bfloat16.

    python scripts/bench.py batch [--model unigen-tiny] [--count 64] [--batch 16] [--json FILE]

Each picture has a prompt and a seed of its own. Sums in another order round differently; a picture changes only where
that turns the draw of a code. float32 should give 1.
"""

from __future__ import annotations

import time

import torch

import unigen
from unigen.loading import load_local
from unigen.toyworld.scenes import BACKGROUNDS, COLORS, OBJECT_EMOJI
from unigen.utils.argparser import OneLineParser
from unigen.utils.files import write_report
from unigen.utils.option_types import number_argument


def make_prompts(count: int) -> list[str]:
    """Different sentences of different lengths."""
    objects, colors, grounds = list(OBJECT_EMOJI), list(COLORS), list(BACKGROUNDS)
    prompts = []
    for i in range(count):
        phrase = f"a {colors[i % 6]} {objects[i % len(objects)]}"
        second_object = f" and a {objects[(7 * i + 3) % len(objects)]}" if i % 2 else ""
        prompts.append(phrase + second_object + (f" on a {grounds[i % 8]} background" if i % 3 else ""))
    return prompts


def generate_codes(engine: unigen.Engine, prompts: list[str], seeds: list[int]) -> list[torch.Tensor]:
    requests = [engine.build_request(p, "image", seed=s) for p, s in zip(prompts, seeds, strict=True)]
    list(engine.run_requests(requests))
    return [request.document.segments[-1].image for request in requests]  # type: ignore[misc]


def main(args: list[str]) -> int:
    parser = OneLineParser(prog="bench.py batch", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="unigen-tiny")
    parser.add_argument("--count", type=number_argument(1, 100_000), default=64)
    parser.add_argument("--batch", type=number_argument(1, 100_000), default=16)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(args)
    started = time.monotonic()
    prompts, seeds = make_prompts(options.count), list(range(options.count))
    rows = []
    for dtype in ("float32", "bfloat16"):
        engine = load_local(options.model, dtype=dtype)
        single_codes = [generate_codes(engine, [p], [s])[0] for p, s in zip(prompts, seeds, strict=True)]
        batched_codes: list[torch.Tensor] = []
        for offset in range(0, options.count, options.batch):
            batched_codes += generate_codes(
                engine, prompts[offset : offset + options.batch], seeds[offset : offset + options.batch]
            )
        equal_share = sum(torch.equal(a, b) for a, b in zip(single_codes, batched_codes, strict=True)) / options.count
        print(
            f"{dtype:<9} {equal_share:.3f} of {options.count} pictures are the same alone and in batches of "
            f"{options.batch}"
        )
        rows.append({"name": f"same in {dtype}", "value": equal_share, "unit": "share", "batch": options.batch})
    if options.json:
        command = f"python scripts/bench.py batch {' '.join(args)}".strip()
        seconds = time.monotonic() - started
        write_report(options.json, command=command, model=options.model, rows=rows, seconds=seconds)
    return 0
