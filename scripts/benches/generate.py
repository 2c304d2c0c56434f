"""Images per second of every generator, and how time grows with the number of image tokens.

    python scripts/bench.py generate [--tokens 64,256,1024] [--batch 1,16] [--generators a,b] [--repeat 3]
        [--dtype float32] [--json FILE]

A model of the shipped one's shape with random weights (time does not depend on what was learnt) for pictures of 8x8,
16x16 and 32x32 tokens, guidance 4, default steps. All contenders take turns in one process; the best of several runs.
The image tokenizer's decoder is timed apart. ratio: against next-token at the same tokens and batch. calls: of the
backbone, and of a flow's velocity, for one picture.
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from typing import Any

import torch

from unigen import generators
from unigen.evaluation.call_counter import CallCounter
from unigen.generators import build
from unigen.inference.engine import Engine
from unigen.model import assembly
from unigen.models import load
from unigen.nn.cpu.linear import pack_linears
from unigen.options import RenamedAction
from unigen.tokenizers.kl import KLConfig, KLTokenizer
from unigen.tokenizers.vq import VQConfig, VQTokenizer
from unigen.utils.argparser import OneLineParser
from unigen.utils.files import write_report
from unigen.utils.option_types import number_argument

GENERATORS = ("next-token", "masked", "next-scale", "flow", "transfusion", "token-flow")
SCALES = {8: (1, 2, 4, 6, 8), 16: (1, 2, 4, 6, 8, 12, 16), 32: (1, 2, 4, 6, 8, 12, 16, 24, 32)}
"""Sides of the token maps by that of the grid, those of 8 being the shipped tokenizer's."""


def make_model(side: int, names: list[str], dtype: torch.dtype) -> Any:
    """Random weights in the shipped model's shape, for pictures of side x side tokens."""
    base = load("unigen-tiny")
    torch.manual_seed(0)
    pixels = 8 * side
    shape = copy.deepcopy(base.backbone.lm.config)
    shape.max_position_embeddings = 4096
    image_tokenizer = VQTokenizer(VQConfig(image_size=pixels))
    tokenizers: dict[str, Any] = {
        "multiscale": VQTokenizer(VQConfig(image_size=pixels, quantizer="multiscale", scales=SCALES[side])),
        "kl": KLTokenizer(KLConfig(image_size=pixels)),
    }
    frame = assembly.build_context(base.backbone.lm, base.text_tokenizer, image_tokenizer)
    kinds = {name: generators.find_generator(name).tokenizer_kind for name in names}
    heads = [
        build.build_generator(name, replace(frame, tokenizer=tokenizers[kind])) for name, kind in kinds.items() if kind
    ]
    model = assembly.build_from_config(shape, base.text_tokenizer, image_tokenizer, names, heads)
    return model.to(dtype).eval()


def main(args: list[str]) -> int:
    parser = OneLineParser(prog="bench.py generate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", default="64,256,1024", help="some of 64,256,1024")
    parser.add_argument("--batch", default="1,16")
    parser.add_argument("--generators", default=",".join(GENERATORS), help="default: %(default)s")
    parser.add_argument("--writers", action=RenamedAction, const="--generators")
    parser.add_argument(
        "--repeat", type=number_argument(1, 100_000), default=3, help="runs of each contender; the best counts"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(args)
    side_by_tokens = {side * side: side for side in SCALES}
    batches = options.batch.split(",")
    if not {*options.tokens.split(",")} <= {*map(str, side_by_tokens)}:
        raise ValueError(f"--tokens takes some of {','.join(map(str, side_by_tokens))}")
    if not all(batch.isdigit() and int(batch) for batch in batches):
        raise ValueError("--batch takes whole numbers of at least 1")
    names = list(dict.fromkeys(["next-token", *options.generators.split(",")]))
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    print("generator   tokens  batch  pictures/s  ratio   decode/s  backbone  head")
    for tokens in map(int, options.tokens.split(",")):
        model = make_model(side_by_tokens[tokens], names, getattr(torch, options.dtype))
        pack_linears(model.backbone)
        engine = Engine(model)
        step, heads = CallCounter(engine.model, "cached_hidden_states"), engine.model.heads.values()
        velocities = [CallCounter(head, "velocity") for head in heads if hasattr(head, "velocity")]
        decoders = [CallCounter(engine.model, "decode_images")]
        tokenizers = {id(head.tokenizer): head.tokenizer for head in heads if head.tokenizer is not None}
        decoders += [CallCounter(tokenizer, "decode") for tokenizer in tokenizers.values()]
        for batch in map(int, batches):
            best: dict[str, tuple[float, float, int, int]] = {}
            for repetition in range(options.repeat + 1):
                for name in names:
                    for watch in (step, *velocities):
                        watch.calls = 0
                    before = sum(d.seconds for d in decoders)
                    start = time.perf_counter()
                    engine.generate_batch(["two apples on a blue background"] * batch, generator=name)
                    seconds = time.perf_counter() - start
                    decoding = sum(d.seconds for d in decoders) - before
                    if repetition and (name not in best or seconds - decoding < best[name][0]):
                        best[name] = (seconds - decoding, decoding, step.calls, sum(v.calls for v in velocities))
            for name in names:
                seconds, decoding, steps, evaluations = best[name]
                baseline = batch / best["next-token"][0]
                rows.append(
                    {
                        "name": f"{name} {tokens}",
                        "value": batch / seconds,
                        "unit": "pictures/s",
                        "baseline": baseline,
                        "ratio": batch / seconds / baseline,
                        "batch": batch,
                        "decode": batch / decoding,
                        "backbone_calls": steps,
                        "head_calls": evaluations,
                    }
                )
                print(
                    f"{name:<11} {tokens:>6} {batch:>6} {batch / seconds:>11.2f} {batch / seconds / baseline:>6.2f} "
                    f"{batch / decoding:>10.1f} {steps:>9} {evaluations:>5}",
                    flush=True,
                )
    if options.json:
        command = f"python scripts/bench.py generate {' '.join(args)}".strip()
        seconds_total = time.monotonic() - started
        shape = f"unigen-tiny shape, {options.dtype}"
        write_report(options.json, command=command, model=shape, rows=rows, seconds=seconds_total)
    return 0
