"""Steps and seconds a picture of decoding several codes a step, against one a step, in the same run.

    python scripts/bench.py sjd [--models tiny,llamagen-b] [--count 8] [--repeat 3] [--json FILE]

Pictures one at a time, guided, as each model draws by default; both ways of `--accelerate` on the same prompts and
seeds, the contenders taking turns, the best of several runs. A step is one pass of the backbone. "tiny" is the shipped
model; "llamagen-b" has random weights in the shape of LlamaGen-B, whose codes no draft foretells: it shows what a
window costs.
"""

from __future__ import annotations

import time
from typing import Any

from scripts.benches.batch import make_prompts
from scripts.benches.families import llamagen_b
from unigen.generators.options.acceleration import SPECULATIVE_METHODS
from unigen.inference.engine import Engine
from unigen.models import load
from unigen.nn.cpu.linear import pack_linears
from unigen.utils.argparser import OneLineParser
from unigen.utils.files import write_report
from unigen.utils.option_types import number_argument


def count_steps(engine: Engine, request: Any) -> int:
    """Draw a picture; how many steps it took."""
    running, steps = engine.new_scheduler(), 0
    running.add_request(request)
    while running:
        running.step()
        steps += 1
    return steps


def main(args: list[str]) -> int:
    parser = OneLineParser(prog="bench.py sjd", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default="tiny,llamagen-b", help="some of tiny,llamagen-b")
    parser.add_argument(
        "--count", type=number_argument(1, 100_000), default=8, help="pictures of the shipped model; one of the other"
    )
    parser.add_argument(
        "--repeat", type=number_argument(1, 100_000), default=3, help="runs of each contender; the best counts"
    )
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(args)
    names = options.models.split(",")
    if set(names) - {"tiny", "llamagen-b"}:
        raise ValueError("--models takes some of tiny,llamagen-b")
    started, rows = time.monotonic(), []
    print("row                     one a step    several  ratio")
    for name in names:
        model = load("unigen-tiny") if name == "tiny" else llamagen_b("float32")
        pack_linears(model.backbone)
        engine = Engine(model)
        # the image tokenizer's decoder is not timed
        engine.model.decode_images = lambda codes: [None] * len(codes)  # type: ignore[assignment,list-item,return-value]
        prompts: list[Any] = make_prompts(options.count) if name == "tiny" else [207]
        steps, seconds = {}, dict.fromkeys((None, *SPECULATIVE_METHODS), float("inf"))
        for _ in range(options.repeat):
            for kind in seconds:
                begin = time.perf_counter()
                requests = [
                    engine.build_request(prompt, "image", seed=n, accelerate=kind) for n, prompt in enumerate(prompts)
                ]
                steps[kind] = sum(count_steps(engine, request) for request in requests) / len(prompts)
                seconds[kind] = min(seconds[kind], (time.perf_counter() - begin) / len(prompts))
        for kind in SPECULATIVE_METHODS:
            for metric, unit, values in (("steps", "steps", steps), ("seconds", "s", seconds)):
                label = f"{name} {metric}" + (" jacobi" if kind == "jacobi" else "")
                ratio = values[None] / values[kind]
                print(f"{label:<23} {values[None]:>10.3f} {values[kind]:>10.3f} {ratio:>6.2f}", flush=True)
                row = {"name": label, "value": values[kind], "unit": unit, "baseline": values[None], "ratio": ratio}
                rows.append(row)
    if options.json:
        seconds_all = time.monotonic() - started
        command = f"python scripts/bench.py sjd {' '.join(args)}".strip()
        write_report(options.json, command=command, model=options.models, rows=rows, seconds=seconds_all)
    return 0
