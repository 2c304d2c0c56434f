"""What weights in 8 and 4 bits save in memory, and how far they move what a model draws.

    python scripts/bench.py quantization [--model unigen-tiny] [--device cpu] [--dtype float32]
        [--count 32] [--json FILE]

The model as it is draws pictures of different prompts greedily. Every contender reads these, the same codes for all,
and says each next code: "moved" is the root mean square by which logits of codes differ, in standard deviations of the
model's own, "same" the share of codes that stay the likeliest. "drawn" is the share of codes that are equal where the
contender draws by itself, so that one other code changes all that follow. MB are of the weights with their scales.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

import unigen
from scripts.benches.batch import make_prompts
from unigen.batch import pack
from unigen.document import Document, Segment
from unigen.loading import load_local
from unigen.model.unified import UnifiedModel
from unigen.nn.quantized import count_parameters
from unigen.utils import precision
from unigen.utils.argparser import OneLineParser
from unigen.utils.files import write_report
from unigen.utils.option_types import number_argument

BATCH = 16


def generate_codes(engine: unigen.Engine, segments: list[Segment]) -> list[Tensor]:
    """The codes (h, w) of greedy pictures."""
    codes: list[Any] = []
    for start in range(0, len(segments), BATCH):
        documents = [Document([segment]) for segment in segments[start : start + BATCH]]
        requests = [engine.build_request(d, "image", generator="next-token", temperature=0.0) for d in documents]
        list(engine.run_requests(requests))
        codes += [request.document.segments[-1].image for request in requests]
    return codes


@torch.inference_mode()
def code_logits(model: UnifiedModel, segment: Segment, codes_hw: Tensor) -> Tensor:
    """Logits (h w, codes) of a picture's codes, each after those before it, without guidance."""
    tokens = model.template.encode(Document([segment, Segment(image=codes_hw, role="assistant")]))
    batch = model.insert_image_ids(pack([[tokens]], len(tokens), model.image_tokenizer.image_size).to(model.device))
    row, at_1P = batch.span_positions(torch.tensor([0]))
    at_P = at_1P[0, model.vocabulary.is_image(batch.ids_BL[0, at_1P[0]])]  # and not what ends a row
    hidden_PD = model.hidden_states(batch)[0, at_P - 1]
    return model.logits(hidden_PD, model.vocabulary.image_start, model.vocabulary.image_stop).float()


def main(args: list[str]) -> int:
    parser = OneLineParser(prog="bench.py quantization", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="unigen-tiny")
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=precision.DTYPES, default="float32", help="of the model as it is")
    parser.add_argument("--count", type=number_argument(1, 100_000), default=32, help="pictures")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(args)
    started, rows = time.monotonic(), []
    reference = load_local(options.model, options.device, options.dtype)
    if "next-token" not in getattr(getattr(reference, "model", None), "generators", ()):
        raise ValueError(f"{options.model} does not draw by next-token")
    if reference.model.text_tokenizer is None:
        segments = [Segment(label=str(n)) for n in range(options.count)]
    else:
        segments = [Segment(text=text) for text in make_prompts(options.count)]
    reference_codes = generate_codes(reference, segments)
    true = torch.cat([code_logits(reference.model, *pair) for pair in zip(segments, reference_codes, strict=True)])
    print(f"{'weights':<16} blocks MB  model MB    moved   same  drawn")
    for dtype, kind in (
        (options.dtype, None),
        ("bfloat16", None),
        *((options.dtype, kind) for kind in precision.QUANTIZATIONS),
    ):
        engine = load_local(options.model, options.device, dtype, quantization=kind)
        parts = engine.model.backbone.lm.get_decoder(), engine.model
        blocks, model_mb = (count_parameters(part)[1] / 1e6 for part in parts)
        logits = torch.cat([code_logits(engine.model, *pair) for pair in zip(segments, reference_codes, strict=True)])
        logit_rms = float((logits - true).square().mean().sqrt() / true.std())
        argmax_share = float((logits.argmax(-1) == true.argmax(-1)).float().mean())
        generated_share = float(
            (torch.cat(generate_codes(engine, segments)) == torch.cat(reference_codes)).float().mean()
        )
        name = f"{dtype} {kind}" if kind else dtype
        print(
            f"{name:<16} {blocks:>9.1f} {model_mb:>9.1f} {logit_rms:>8.4f} {argmax_share:>6.3f} "
            f"{generated_share:>6.3f}",
            flush=True,
        )
        row = {"name": name, "value": logit_rms, "unit": "std", "same": argmax_share, "drawn": generated_share}
        rows.append(row | {"blocks MB": round(blocks, 1), "model MB": round(model_mb, 1)})
    if options.json:
        command = f"python scripts/bench.py quantization {' '.join(args)}".strip()
        seconds = time.monotonic() - started
        write_report(options.json, command=command, model=options.model, rows=rows, seconds=seconds)
    return 0
