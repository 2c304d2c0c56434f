"""Tokens a second of our engine against transformers' generate() and a compiled static-cache loop.

    python scripts/bench.py decode [--models tiny,100M] [--batch 1,8] [--repeat 3] [--dtype float32] [--json FILE]

Same weights, dtype and prompt, one image span of tokens drawn from the whole vocabulary, all in one process; the best
of several runs, the contenders taking turns, since machines are noisy. Guided rows use scale 3: `generate()` runs two
forwards a step (`guidance_scale`), the static loop and our engine one forward of twice the rows. "limit" is what
reading the weights once a step allows, by the faster of two products on matrices too large for the caches: `linear`,
and ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from unigen.document import Document
from unigen.inference.engine import Engine
from unigen.model import assembly
from unigen.models import load
from unigen.nn.cpu.linear import pack_linears, packed_linear
from unigen.utils.argparser import OneLineParser
from unigen.utils.files import write_report
from unigen.utils.option_types import number_argument

PROMPT = "two apples on a blue background"


def load_model(name: str, dtype: torch.dtype) -> Any:
    """The shipped model, or one with random weights around it: 116M Llama, 256 tokens an image."""
    base = load("unigen-tiny")
    if name == "tiny":
        return base.to(dtype)
    from transformers import LlamaConfig

    from unigen.tokenizers.vq import VQConfig, VQTokenizer

    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    model = assembly.build_from_config(shape, base.text_tokenizer, VQTokenizer(VQConfig(image_size=128)))
    return model.to(dtype).eval()


def engine_runner(model: Any, batch: int, guided: bool) -> Callable[[], int]:
    """The engine itself, without the tokenizer's decoder, which the others do not run either."""
    pack_linears(model.backbone)
    engine = Engine(model)
    height, width = model.image_tokenizer.grid
    model.decode_images = lambda codes: [None] * len(codes)
    options = {"guidance": 3.0 if guided else 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}

    def run() -> int:
        list(engine.run_requests([engine.build_request(PROMPT, "image", seed=i, **options) for i in range(batch)]))
        return batch * height * width

    return run


def prompt_ids(model: Any, batch: int) -> tuple[Tensor, Tensor]:
    """The ids of the conditional and the unconditional branch, each ending in the begin token: (batch, L)."""
    template, document = model.template, Document.of(PROMPT)
    begin = template.begin_ids["next-token"]
    rows = [[*model.token_ids(template.prompt(document, branch=uncond)), begin] for uncond in (False, True)]
    return torch.tensor([rows[0]] * batch), torch.tensor([rows[1]] * batch)


def transformers_generate(model: Any, batch: int, guided: bool) -> Callable[[], int]:
    height, width = model.image_tokenizer.grid
    count = height * width
    cond_ids, uncond_ids = prompt_ids(model, batch)
    options: dict[str, Any] = {"guidance_scale": 3.0, "negative_prompt_ids": uncond_ids} if guided else {}

    def run() -> int:
        model.backbone.lm.generate(
            cond_ids,
            attention_mask=torch.ones_like(cond_ids),
            do_sample=True,
            top_k=0,
            min_new_tokens=count,
            max_new_tokens=count,
            pad_token_id=0,
            **options,
        )
        return batch * count

    return run


def static_loop(model: Any, batch: int, guided: bool) -> Callable[[], int]:
    """A compiled decode step over a static cache, both branches in one forward: what a careful user would write."""
    from transformers import StaticCache

    lm = model.backbone.lm
    height, width = model.image_tokenizer.grid
    count = height * width
    cond_ids, uncond_ids = prompt_ids(model, batch)
    pad = cond_ids.shape[1] - uncond_ids.shape[1]
    rows = torch.cat([cond_ids, torch.nn.functional.pad(uncond_ids, (pad, 0))]) if guided else cond_ids
    attention_mask = torch.ones(len(rows), rows.shape[1] + count, dtype=torch.bool)
    if guided:
        attention_mask[batch:, :pad] = False
    positions = attention_mask.long().cumsum(-1) - 1
    total = rows.shape[1] + count
    causal = torch.ones(total, total, dtype=torch.bool).tril()
    mask = causal & attention_mask[:, None, None, :]

    def forward(ids: Tensor, at: Tensor, mask: Tensor, cache: Any) -> Tensor:
        embeds = model.backbone.embed(ids)
        hidden = lm.model(inputs_embeds=embeds, position_ids=at, attention_mask=mask, past_key_values=cache)
        return lm.lm_head(hidden.last_hidden_state[:, -1])

    step = torch.compile(forward, dynamic=False)

    @torch.inference_mode()
    def run() -> int:
        cache = StaticCache(config=lm.config, max_cache_len=total)
        length = rows.shape[1]
        logits = forward(rows, positions[:, :length], mask[:, :, :length], cache)
        for i in range(count):
            if guided:
                c, u = logits.float().chunk(2)
                logits = u + 3.0 * (c - u)
            ids = torch.multinomial(logits.float().softmax(-1), 1)
            ids = torch.cat([ids, ids]) if guided else ids
            if i + 1 < count:
                at = length + i
                logits = step(ids, positions[:, at : at + 1], mask[:, :, at : at + 1], cache)
        return batch * count

    return run


def bandwidth(
    product: Callable[[Tensor, Tensor], Tensor], rows: int, dtype: torch.dtype, seconds: float = 1.0
) -> float:
    """Bytes of weights a second that `product(x, weight)` reads for this many rows: 512 MB of 2048 x 2048 matrices."""
    size = 2048 * 2048 * dtype.itemsize
    weights = [torch.zeros(2048, 2048, dtype=dtype) for _ in range(max(1, (512 << 20) // size))]
    x = torch.zeros(rows, 2048, dtype=dtype)
    best, started = 0.0, time.perf_counter()
    with torch.inference_mode():
        while time.perf_counter() - started < seconds:
            begin = time.perf_counter()
            for weight in weights:
                product(x, weight)
            best = max(best, len(weights) * size / (time.perf_counter() - begin))
    return best


def main(args: list[str]) -> int:
    parser = OneLineParser(prog="bench.py decode", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default="tiny,100M", help="some of tiny,100M")
    parser.add_argument("--batch", default="1,8")
    parser.add_argument(
        "--repeat", type=number_argument(1, 100_000), default=3, help="runs of each contender; the best counts"
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled loop out")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(args)
    names = options.models.split(",")
    if set(names) - {"tiny", "100M"} or not options.batch.replace(",", "").isdigit():
        raise ValueError("--models takes some of tiny,100M; --batch whole numbers")
    dtype = getattr(torch, options.dtype)
    started = time.monotonic()
    rows = []
    print("row            batch    engine  generate  ratio    static  ratio     limit share")
    for name in names:
        reference_model = load_model(name, dtype)
        reference_model.backbone.lm.set_attn_implementation("sdpa")
        model = load_model(name, dtype)  # the engine changes how its model multiplies; the others keep theirs
        size = sum(p.numel() for p in model.backbone.parameters()) * dtype.itemsize
        for guided in (True, False):
            for batch in map(int, options.batch.split(",")):
                contenders = {
                    "engine": engine_runner(model, batch, guided),
                    "generate": transformers_generate(reference_model, batch, guided),
                }
                if not options.no_compile:
                    contenders["static"] = static_loop(reference_model, batch, guided)
                best = best_rates(contenders, options.repeat)
                bandwidths = [bandwidth(f, batch * (2 if guided else 1), dtype) for f in (linear, packed_linear)]
                limit = max(bandwidths) / size * batch
                label = f"{name} {'guided' if guided else 'unguided'}"
                for rival in ("generate", "static"):
                    if rival in best:
                        rows.append(
                            {
                                "name": label if rival == "generate" else f"{label} static",
                                "value": best["engine"],
                                "unit": "tokens/s",
                                "baseline": best[rival],
                                "ratio": best["engine"] / best[rival],
                                "batch": batch,
                                "limit": limit,
                                "limit_share": best["engine"] / limit,
                            }
                        )
                static = best.get("static", float("nan"))
                print(
                    f"{label:<14} {batch:>5} {best['engine']:>9.1f} {best['generate']:>9.1f} "
                    f"{best['engine'] / best['generate']:>6.2f} {static:>9.1f} {best['engine'] / static:>6.2f} "
                    f"{limit:>9.1f} {best['engine'] / limit:.0%}   "
                    f"(linear reads {bandwidths[0] / 1e9:.1f} GB/s, our product {bandwidths[1] / 1e9:.1f})",
                    flush=True,
                )
    if options.json:
        seconds = time.monotonic() - started
        command = f"python scripts/bench.py decode {' '.join(args)}"
        write_report(options.json, command=command, model=options.models, rows=rows, seconds=seconds)
    return 0


def best_rates(rivals: dict[str, Callable[[], int]], repeat: int) -> dict[str, float]:
    """The best tokens/s of each contender; they take turns, after a warm-up of each."""
    best = dict.fromkeys(rivals, 0.0)
    for repetition in range(repeat + 1):
        for name, run in rivals.items():
            begin = time.perf_counter()
            tokens = run()
            if repetition:
                best[name] = max(best[name], tokens / (time.perf_counter() - begin))
    return best
