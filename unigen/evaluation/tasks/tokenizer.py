"""Task `tokenizer`: what a model's image tokenizer keeps of true pictures that training never saw.

    unigen eval tokenizer --model unigen-tiny [--count 1000] [--json FILE]

PSNR over all pixels and inside object masks, the share of the codebook in use, its perplexity. Needs the emoji font.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from unigen.config import write_report
from unigen.evaluation.runner import OneLineParser, load_engine, make_parser, parse_args
from unigen.limits import limit_argument as limited
from unigen.tokenizers.measure import evaluate_tokenizer
from unigen.toyworld.scenes import SceneRenderer, sample_scene

UNITS = {"psnr": "dB", "psnr_objects": "dB", "usage": "share", "perplexity": "codes", "dead": "codes"}
_SEED_OFFSET = 7_800_000  # keeps these scenes apart from those of any training seed


def render_images(world: SceneRenderer, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x (count, 3, H, W) in [-1, 1] and masks (count, 1, H, W), 1 where any object is."""
    rng = np.random.default_rng((seed, _SEED_OFFSET))
    rendered_scenes = [world.render(sample_scene(rng, world.size)) for _ in range(count)]
    x_BHWC = torch.from_numpy(np.stack([picture.image for picture in rendered_scenes]))
    masks_BHW = torch.from_numpy(np.stack([picture.masks.any(0) for picture in rendered_scenes]))
    return x_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1, masks_BHW[:, None].float()


def arguments() -> OneLineParser:
    parser = make_parser(
        "tokenizer",
        "Encode and decode rendered pictures with the image tokenizer: PSNR, and how much of the codebook is used.",
        sampled=False,
    )
    parser.add_argument("--count", type=limited("count"), default=1000, help="pictures (default: 1000)")
    return parser


def main(args: list[str]) -> int:
    """`unigen eval tokenizer ...`. ValueError for bad input."""
    a = parse_args(arguments(), args)
    start = time.perf_counter()
    engine = load_engine(a)
    tokenizer = engine.model.image_tokenizer
    x_BCHW, masks_B1HW = render_images(SceneRenderer(tokenizer.image_size), a.count, a.seed)
    device = engine.model.device
    figures = evaluate_tokenizer(tokenizer, x_BCHW.to(device), masks_B1HW.to(device), a.batch)
    for name, unit in UNITS.items():
        print(f"{name:<14} {figures[name]:9.3f} {unit}")
    if a.json:
        write_report(
            a.json,
            command="unigen eval tokenizer " + " ".join(args),
            model=a.model,
            overall=figures["psnr_objects"],
            tasks={name: figures[name] for name in UNITS},
            rows=[{"name": n, "value": figures[n], "unit": unit, "batch": a.batch} for n, unit in UNITS.items()],
            seconds=time.perf_counter() - start,
            pictures=a.count,
        )
    return 0
