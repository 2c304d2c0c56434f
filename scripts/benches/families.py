"""Seconds a picture of public families, against their official code and its compiled form, with the same weights.

    UNIGEN_REFERENCE_LLAMAGEN=<LlamaGen> python scripts/bench.py families [--rows llamagen-b] [--repeat 4] [--json FILE]

One picture, guided, codes only, all in one process; the contenders take turns, and the best of several runs counts. The
official code is the one in the folder that the environment variable names; without it the row says "absent". "limit" is
what reading the weights once a step allows, at the rate at which a product of two rows (which is what guidance is)
reads matrices too large for the caches. Greedy codes of both are compared where the dtype is float32.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.functional import linear

from scripts.benches.decode import bandwidth, measure
from unigen.config import write_report
from unigen.engine import Engine
from unigen.generators.next_token import NextToken
from unigen.model import UnifiedModel
from unigen.models import llamagen
from unigen.nn.few_rows import few_rows_linear
from unigen.sequence import Segment, Vocabulary
from unigen.templates import ClassTemplate

CODES, CLASSES, SIDE, LABEL, SCALE = 16384, 1001, 16, 207, 4.0


class NoPictures(torch.nn.Module):
    """Stands where an image tokenizer would: the codes are what is measured."""

    image_size, grid, codebook_size = SIDE * 16, (SIDE, SIDE), CODES

    def __init__(self) -> None:
        super().__init__()
        self.none = torch.nn.Parameter(torch.zeros(0))


def llamagen_b(dtype: str) -> UnifiedModel:
    """The shape of LlamaGen-B, 256 codes, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=CODES,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        rms_norm_eps=1e-5,
        max_position_embeddings=1 + SIDE * SIDE,
        initializer_range=0.05,
    )
    lm = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    backbone = llamagen.ClassBackbone(lm, CLASSES, SIDE).to(getattr(torch, dtype))
    template, no_pictures = ClassTemplate(CLASSES - 1, SIDE * SIDE), NoPictures()
    writers: dict[str, Any] = {"next-token": NextToken((SIDE, SIDE))}
    model = UnifiedModel("llamagen", backbone, Vocabulary(CLASSES, CODES), None, no_pictures, template, writers)  # type: ignore[arg-type]
    model.sample_by("next-token", **llamagen.SAMPLING["c2i"])
    model.pictures = lambda codes: [None] * len(codes)  # type: ignore[method-assign]
    return model.eval()


def ours(model: UnifiedModel, found: dict[str, list[int]], **options: Any) -> Callable[[], int]:
    engine = Engine(model)

    def run() -> int:
        request = engine.request(Segment(label=LABEL), "image", guidance=SCALE, **options)
        list(engine.run([request]))
        found["ours"] = request.document.segments[-1].image.flatten().tolist()  # type: ignore[union-attr]
        return SIDE * SIDE

    return run


def official(model: UnifiedModel, folder: str, found: dict[str, list[int]], compiled: bool, **options: Any) -> Any:
    """The official `generate`, whose step is compiled where asked for."""
    sys.path.insert(0, folder)
    from autoregressive.models import generate as sampler  # type: ignore[import-not-found]
    from autoregressive.models import gpt

    torch.backends.cuda.sdp_kernel = lambda **_: nullcontext()  # the script sets CUDA's kernels
    lm = model.backbone.lm
    state = llamagen.to_public(model.backbone.state_dict(), lm.config.head_dim)
    net = gpt.GPT_B(vocab_size=CODES, block_size=SIDE * SIDE, num_classes=CLASSES - 1)
    net = net.to(lm.lm_head.weight.dtype).eval()
    net.load_state_dict(state)
    if compiled:
        net.forward = torch.compile(net.forward, dynamic=False)

    def run() -> int:
        codes = sampler.generate(net, torch.tensor([LABEL]), SIDE * SIDE, cfg_scale=SCALE, **options)
        found["compiled" if compiled else "official"] = codes[0].tolist()
        return SIDE * SIDE

    return run


def main(args: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench.py families", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", default="llamagen-b float32,llamagen-b bfloat16")
    parser.add_argument("--repeat", type=int, default=4, help="runs of each contender; the best counts")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled form out")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(args)
    known = ("llamagen-b float32", "llamagen-b bfloat16")
    if set(options.rows.split(",")) - set(known) or options.repeat < 1:
        raise ValueError(f"--rows takes some of {', '.join(known)}; --repeat at least 1")
    folder, started, rows = os.environ.get("UNIGEN_REFERENCE_LLAMAGEN"), time.monotonic(), []
    print("row                      ours s  official s  ratio  compiled s  ratio   limit s  share  greedy codes")
    for name in options.rows.split(","):
        dtype = name.split()[1]
        model, plain = llamagen_b(dtype), llamagen_b(dtype)  # the engine changes how its model multiplies
        found: dict[str, list[int]] = {}
        rivals = {"ours": ours(model, found)}
        if folder:
            sampled = {"top_k": 2000}
            rivals["official"] = official(plain, folder, found, False, **sampled)
            if not options.no_compile:
                rivals["compiled"] = official(plain, folder, found, True, **sampled)
        best = {rival: SIDE * SIDE / speed for rival, speed in measure(rivals, options.repeat).items()}
        same = "-"
        if folder and dtype == "float32":
            ours(model, found, temperature=0.0)()
            official(plain, folder, found, False, sample_logits=False)()
            same = "equal" if found["ours"] == found["official"] else "DIFFERENT"
        weights = sum(p.numel() for p in model.backbone.lm.parameters()) - CODES * model.backbone.width  # no table
        rate = max(bandwidth(product, 2, getattr(torch, dtype)) for product in (linear, few_rows_linear))
        limit = weights * getattr(torch, dtype).itemsize / rate * SIDE * SIDE
        nan = float("nan")
        one, two = best.get("official", nan), best.get("compiled", nan)
        print(
            f"{name:<23} {best['ours']:>7.2f} {one:>11.2f} {one / best['ours']:>6.2f} {two:>11.2f} "
            f"{two / best['ours']:>6.2f} {limit:>9.2f} {limit / best['ours']:>6.0%}  "
            f"{same if folder else 'official code absent'}",
            flush=True,
        )
        row: dict[str, Any] = {"name": name, "value": best["ours"], "unit": "s", "limit": limit}
        for rival in ("official", "compiled"):
            if rival in best:
                row |= {rival: best[rival], f"ratio {rival}": best[rival] / best["ours"]}
        rows.append(row | {"ratio": one / best["ours"] if folder else None, "greedy": same})
    if options.json:
        command = f"python scripts/bench.py families {' '.join(args)}".strip()
        seconds = time.monotonic() - started
        write_report(options.json, command=command, model=options.rows, rows=rows, seconds=seconds)
    return 0
