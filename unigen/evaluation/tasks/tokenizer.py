"""Task `tokenizer`: what a model's image tokenizer keeps of true pictures that training never saw.

    unigen eval tokenizer --model unigen-tiny [--count 1000] [--json FILE]

PSNR over all pixels and inside object masks, the share of the codebook in use, its perplexity. Needs the emoji font.
"""

from __future__ import annotations

import argparse
from typing import Self

import numpy as np
import torch

from unigen.evaluation.report import Report
from unigen.evaluation.runner import EvaluationRun, EvaluationTask, report_rows
from unigen.tokenizers.measure import evaluate_tokenizer
from unigen.toyworld.scenes import SceneRenderer, sample_scene
from unigen.utils.option_types import number_argument

UNITS = {"psnr": "dB", "psnr_objects": "dB", "usage": "share", "perplexity": "codes", "dead": "codes"}
_SEED_OFFSET = 7_800_000  # keeps these scenes apart from those of any training seed


def render_images(renderer: SceneRenderer, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of scenes that no training has seen.

    Args:
        renderer: draws them.
        count: how many.
        seed: of the scenes.

    Returns:
        x (count, 3, H, W) in [-1, 1] and masks (count, 1, H, W), 1 where any object is.
    """
    rng = np.random.default_rng((seed, _SEED_OFFSET))
    rendered_scenes = [renderer.render(sample_scene(rng, renderer.size)) for _ in range(count)]
    x_BHWC = torch.from_numpy(np.stack([picture.image for picture in rendered_scenes]))
    masks_BHW = torch.from_numpy(np.stack([picture.masks.any(0) for picture in rendered_scenes]))
    return x_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1, masks_BHW[:, None].float()


class TokenizerTask(EvaluationTask):
    """Rendered images, encoded and decoded again.

    Args:
        renderer: draws images of the tokenizer's size.
        count: of the images.
    """

    description = (
        "Encode and decode rendered pictures with the image tokenizer: PSNR, and how much of the codebook is used."
    )
    generates = False
    needs_local_model = True

    def __init__(self, renderer: SceneRenderer, count: int) -> None:
        self.renderer, self.count = renderer, count

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """See `EvaluationTask.add_arguments`: how many images."""
        parser.add_argument("--count", type=number_argument(1, 100_000), default=1000, help="pictures (default: 1000)")

    @classmethod
    def create(cls, run: EvaluationRun) -> Self:
        """See `EvaluationTask.create`."""
        return cls(SceneRenderer(run.required_model.image_tokenizer.image_size), run.args.count)

    def run(self, run: EvaluationRun) -> Report:
        """See `EvaluationTask.run`."""
        model = run.required_model
        x_BCHW, masks_B1HW = render_images(self.renderer, self.count, run.args.seed)
        figures = evaluate_tokenizer(
            model.image_tokenizer, x_BCHW.to(model.device), masks_B1HW.to(model.device), run.args.batch
        )
        figures = {name: figures[name] for name in UNITS}
        for name, unit in UNITS.items():
            print(f"{name:<14} {figures[name]:9.3f} {unit}")
        rows = report_rows(figures, UNITS, run.args.batch)
        return Report(figures["psnr_objects"], figures, rows, {"pictures": self.count})
