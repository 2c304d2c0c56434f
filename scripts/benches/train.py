"""Speed of a training step in float32 and bfloat16: forward and backward, Muon, AdamW; and which of them is auto.

    python scripts/bench.py train [--model unigen-tiny] [--rows 2] [--length 1024] [--repeat 3] [--json FILE]

The model's language model reads random ids (rows x length); the best of several runs. Muon's step is of its hidden
matrices, AdamW's of all weights; bf16 is autocast, and Newton-Schulz in bfloat16.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from unigen.config import OptimConfig
from unigen.models import load
from unigen.training.muon import Muon, MuonAdamW
from unigen.training.optim import adamw
from unigen.utils.argparser import OneLineParser
from unigen.utils.files import write_report
from unigen.utils.option_types import number_argument
from unigen.utils.precision import train_precision


def best_seconds(run: Callable[[], Any], repeat: int) -> float:
    """The least seconds of `repeat` runs after one that warms up."""
    run()
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main(args: list[str]) -> int:
    parser = OneLineParser(prog="bench.py train", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="unigen-tiny")
    parser.add_argument("--rows", type=number_argument(1, 100_000), default=2)
    parser.add_argument("--length", type=number_argument(1, 100_000), default=1024)
    parser.add_argument("--repeat", type=number_argument(1, 100_000), default=3)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(args)
    started = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lm: Any = load(options.model, device).backbone.lm.train()
    ids = torch.randint(lm.config.vocab_size, (options.rows, options.length), device=device)
    optim = OptimConfig(lr=1e-6)
    optimizer = MuonAdamW(lm, optim)
    muon = next(part for part in optimizer.optimizers if isinstance(part, Muon))
    adamw_optimizer = adamw(lm, optim)

    def passes(half: bool) -> None:
        lm.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=half):
            lm(input_ids=ids, labels=ids).loss.backward()

    rows: list[dict[str, Any]] = []
    auto = train_precision("auto", device)
    for precision in ("fp32", "bf16"):
        muon.use_bfloat16 = precision == "bf16"
        parts: dict[str, Callable[[], Any]] = {
            "forward and backward": partial(passes, muon.use_bfloat16),
            "Muon": muon.step,
            "AdamW": adamw_optimizer.step,
        }
        for name, run in parts.items():
            seconds = best_seconds(run, options.repeat)
            label = f"{precision}: {name}"
            print(f"{label:28} {seconds:9.3f} s{'  (precision=auto)' if precision == auto else ''}", flush=True)
            rows.append({"name": label, "value": seconds, "unit": "s", "batch": options.rows})
    if options.json:
        command = f"python scripts/bench.py train {' '.join(args)}".strip()
        seconds = time.monotonic() - started
        write_report(options.json, command=command, model=options.model, rows=rows, seconds=seconds)
    return 0
