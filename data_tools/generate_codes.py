"""Rendered pictures, and the codes that a model would draw for them from some scale on: what the decoder of its
multi-scale tokenizer is to make pictures of.

    python data_tools/generate_codes.py MODEL OUT.npz [--minutes 8] [--fixed-scales 3,4,4] [--seed 1] [--dtype bfloat16]
    unigen train recipes/tiny_vq.py init_from=MODEL/next-scale/tokenizer freeze_codes=true generated_codes=OUT.npz ..

A tokenizer learns to decode codes that it made itself, of which the last scale says what the others leave out; those
that a model draws say less, and pictures of them are blurred. Learnt from pairs of both, the decoder does better with
what it is given (post-training of Qiu et al. 2025, arXiv 2509.12474, which likewise keeps a part of the true codes).
Of each picture the first scales stay, as many as one of `--fixed-scales` says; later ones are drawn with the guidance
and temperature that the model draws with by default, from what is left and the picture's caption. No scene holds a
held-out combination. Exit 2 with one line for bad input. Does not depend on how a decoder learns.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unigen.batch import Tokens, pack
from unigen.document import Document, Segment
from unigen.loading import load_local
from unigen.media.output import check_output, one_line_errors, write_atomically
from unigen.media.pixels import to_pixels
from unigen.samplers.guidance import Guidance
from unigen.samplers.logits import SamplingOptions, sample_shared_rng
from unigen.toyworld.captions import short_caption
from unigen.toyworld.scenes import sample_scene
from unigen.toyworld.world import SceneRenderer, find_font
from unigen.utils import precision
from unigen.utils.argparser import OneLineParser
from unigen.utils.numbers import parse_int
from unigen.utils.option_types import number_argument

GENERATOR = "next-scale"
minutes_argument = number_argument(0, 100_000, is_integer=False, above=True)


@torch.inference_mode()
def resample_scales(
    model: Any,
    prompts: list[str],
    codes_NP: Tensor,
    num_fixed_scales_N: Tensor,
    guidance: Guidance,
    sampling: SamplingOptions,
    rng: torch.Generator,
) -> Tensor:
    """Codes of all scales (N, P), the first num_fixed_scales_N of each picture as they are given, the others drawn in
    turn."""
    head = model.heads[GENERATOR]
    parts = list(codes_NP.split(head.lengths, 1))
    for k in range(int(num_fixed_scales_N.min()), len(parts)):
        branches = [
            scale_hidden_states(model, prompts, torch.cat(parts, 1), uncond)
            for uncond in (False, True)[: guidance.num_branches]
        ]
        logits_NnV = head.guided_logits(branches, guidance)[k]
        sampled_Nn = sample_shared_rng(logits_NnV.flatten(0, 1), sampling, rng).view_as(parts[k])
        parts[k] = torch.where(num_fixed_scales_N[:, None] > k, parts[k], sampled_Nn)
    return torch.cat(parts, 1)


def scale_hidden_states(model: Any, prompts: list[str], codes_NP: Tensor, uncond: bool) -> tuple[Tensor, Any]:
    """What the backbone makes of each picture's scales: its states, and where they stand in them."""
    rows: list[list[Tokens]] = []
    for prompt, codes_P in zip(prompts, codes_NP, strict=True):
        chat = Document([Segment(text=prompt), Segment(image=codes_P, role="assistant")])
        rows.append([model.template.encode(chat, uncond=uncond, generator=GENERATOR)])
    batch = model.insert_image_ids(pack(rows, max(len(tokens) for (tokens,) in rows), model.image_tokenizer.image_size))
    spans, targets = model.heads[GENERATOR].prepare(model, batch, torch.Generator())
    return model.hidden_states(batch, spans), targets


@one_line_errors
def main() -> int:
    parser = OneLineParser(description="Codes that a model draws for rendered pictures, scale by scale.")
    parser.add_argument("model")
    parser.add_argument("out", help="a .npz file: pixels, objects, true and generated codes")
    parser.add_argument("--minutes", type=minutes_argument, default=8.0, help="stop after so long (default: 8)")
    parser.add_argument("--count", type=number_argument(1, 10_000_000), default=1_000_000, help="the most pictures")
    parser.add_argument("--fixed-scales", default="3,4,4", help="how many scales stay: one of these a picture (3,4,4)")
    parser.add_argument("--seed", type=number_argument(1, 2**64 - 1), default=1)
    parser.add_argument(
        "--batch", type=number_argument(1, 10_000), default=64, help="pictures drawn at once (default: 64)"
    )
    parser.add_argument("--dtype", choices=precision.DTYPES, help="default: bfloat16 where it is fast, else float32")
    args = parser.parse_args()
    out = check_output(args.out, {".npz": "arrays"})
    find_font()
    engine = load_local(args.model, dtype=args.dtype or precision.fast_dtype())
    model = engine.model
    if GENERATOR not in model.heads:
        raise ValueError(f"{args.model} has no scales: give a model that draws by {GENERATOR}")
    tokenizer = load_local(args.model, dtype="float32").model.heads[GENERATOR].tokenizer  # codes as training has them
    scales = len(model.heads[GENERATOR].lengths)
    try:
        fixed_counts = [parse_int(part.strip()) for part in args.fixed_scales.split(",")]
    except ValueError:
        fixed_counts = [-1]
    if not all(0 <= k < scales for k in fixed_counts):
        raise ValueError(
            f"--fixed-scales is of counts from 0 to {scales - 1}, apart by commas, not {args.fixed_scales}"
        )
    request = engine.build_request("a picture", "image", generator=GENERATOR)
    rng, noise = np.random.default_rng([args.seed, 1]), torch.Generator().manual_seed(args.seed)
    world = SceneRenderer(model.image_tokenizer.image_size)
    chunks: list[dict[str, Any]] = []
    end, count = time.monotonic() + 60 * args.minutes, 0
    with suppress(KeyboardInterrupt):  # what has been drawn is kept
        while time.monotonic() < end and count < args.count:
            scenes = [sample_scene(rng, size=world.size) for _ in range(min(args.batch, args.count - count))]
            pictures = [world.render(scene) for scene in scenes]
            images = [picture.image for picture in pictures]
            true_NP = tokenizer.encode(to_pixels(images, world.size))
            prompts = [short_caption(scene, rng) for scene in scenes]
            num_fixed_scales_N = torch.from_numpy(rng.choice(fixed_counts, len(scenes)))
            generated_NP = resample_scales(
                model, prompts, true_NP, num_fixed_scales_N, request.guidance, request.image_sampling, noise
            )
            objects_NHW = np.stack([picture.masks.any(0) for picture in pictures])
            codes = {"true": true_NP.numpy(), "generated": generated_NP.numpy()}
            chunks.append({"pixels": np.stack(images), "objects": objects_NHW} | codes)
            count += len(scenes)
            print(f"\r{count} pictures", end="", flush=True)
    print()
    if not chunks:
        raise ValueError("nothing was drawn: give more minutes")
    arrays = {name: np.concatenate([part[name] for part in chunks]) for name in chunks[0]}
    write_atomically(out, lambda file: np.savez_compressed(file, **arrays))
    print(f"wrote {out}: {count} pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
