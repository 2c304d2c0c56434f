"""Task `generators`: all generators of a model, side by side on the same prompts.

    unigen eval generators --model M [--quick] [--json FILE] [--out FOLDER]

For each: the overall score of task `scenes`; FID (Heusel et al. 2017) and KID (Binkowski et al. 2018) against true
pictures of the same prompts, on the scene detector's own features, so that they compare here only; seconds a picture
alone and in a batch of 16; and the evaluations of the backbone and of a flow's velocity for one picture. True pictures
of another seed, and those through the codes, say what FID and KID there can be. --out writes a grid, a row for each
generator. Needs the emoji font. Does not depend on: how anything is generated."""

from __future__ import annotations

import argparse
import time
import warnings
from contextlib import ExitStack
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from unigen.evaluation import baselines
from unigen.evaluation.baselines import ImageGroups
from unigen.evaluation.call_counter import CallCounter
from unigen.evaluation.detector import SceneDetector
from unigen.evaluation.report import Report, make_folder
from unigen.evaluation.runner import EvaluationRun, EvaluationTask, generate_outputs, score_all
from unigen.evaluation.tasks.scenes import ScenesTask, add_size_arguments, summarize_scores
from unigen.inference.protocol import InferenceEngine
from unigen.media.output import image_grid, save_image
from unigen.media.pixels import to_pixels
from unigen.options import option_names
from unigen.toyworld.scenes import SceneRenderer
from unigen.utils.extras import require_extra

TIMING_BATCH_SIZE = 16
"""Of the second timing."""
TIMING_REPEATS = 4
"""Runs of each timing, of which the best counts."""
UNITS = {
    "scenes": "share",
    "fid": "",
    "kid": "",
    "seconds alone": "s",
    f"seconds in {TIMING_BATCH_SIZE}": "s",
    "backbone": "evaluations",
    "head": "evaluations",
}
"""Of each column."""


class DetectorFeatures(nn.Module):
    """Image features for torchmetrics: the channel means of the detector's coarsest maps.

    Args:
        detector: gives the maps.
    """

    def __init__(self, detector: SceneDetector) -> None:
        super().__init__()
        self.detector = detector
        self.num_features = detector.config.widths[-1]

    @torch.no_grad()
    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Features (B, F) float64 of uint8 images (B, 3, H, W)."""
        return self.detector.features(x_BCHW.float() / 127.5 - 1)[-1].mean((2, 3)).double()


class FeatureDistances:
    """FID and KID of images from true ones.

    Args:
        detector: gives the features.
        true: the true images.

    Raises:
        ValueError: without torchmetrics, or for fewer than two images.
    """

    def __init__(self, detector: SceneDetector, true: list[Image.Image]) -> None:
        require_extra("eval", "torchmetrics", "scipy")
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance

        if len(true) < 2:
            raise ValueError("FID and KID need at least two pictures")
        self.size, features = detector.config.image_size, DetectorFeatures(detector)
        shape = (3, self.size, self.size)
        self.fid = FrechetInceptionDistance(features, reset_real_features=False, input_img_size=shape)
        with warnings.catch_warnings(action="ignore"):  # that it keeps all features in memory
            self.kid = KernelInceptionDistance(
                features, subsets=50, subset_size=min(100, len(true)), reset_real_features=False
            )
        self._update(true, real=True)

    def __call__(self, images: list[Image.Image]) -> tuple[float, float]:
        """FID and KID of these images."""
        self.fid.reset()
        self.kid.reset()
        self._update(images, real=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # KID draws its subsets
            return float(self.fid.compute()), float(self.kid.compute()[0])

    def _update(self, images: list[Image.Image], real: bool) -> None:
        for i in range(0, len(images), 100):
            x_BCHW = ((to_pixels(images[i : i + 100], self.size) + 1) * 127.5).round().to(torch.uint8)
            self.fid.update(x_BCHW, real=real)
            self.kid.update(x_BCHW, real=real)


def measure_cost(engine: InferenceEngine, generator: str, prompts: list[str], **options: Any) -> dict[str, float]:
    """What one image costs.

    Args:
        engine: of a local model.
        generator: by its name.
        prompts: to be drawn in turn.
        options: of the generation.

    Returns:
        Seconds an image alone and in a batch, the best of several runs, and evaluations of the backbone and of a flow's
        velocity for one image.
    """
    model = engine.local_model
    assert model is not None
    head = model.heads[generator] if generator in model.heads else None
    figures: dict[str, float] = {}
    with CallCounter(model, "cached_hidden_states") as step, ExitStack() as stack:
        velocity = stack.enter_context(CallCounter(head, "velocity")) if hasattr(head, "velocity") else None
        engine.generate_batch(prompts[:1], [0], generator=generator, **options)
        figures |= {"backbone": step.calls, "head": velocity.calls if velocity else 0}
    for name, batch in (("seconds alone", 1), (f"seconds in {TIMING_BATCH_SIZE}", TIMING_BATCH_SIZE)):
        times = []
        for repetition in range(TIMING_REPEATS):
            batch_prompts = [prompts[(repetition + i) % len(prompts)] for i in range(batch)]
            start = time.perf_counter()
            engine.generate_batch(batch_prompts, range(batch), generator=generator, **options)
            times.append((time.perf_counter() - start) / batch)
        figures[name] = min(times)
    return figures


class GeneratorsTask(EvaluationTask):
    """The task `scenes` for each generator of a model, with distances and costs.

    Args:
        scenes: prompts and their score.
        renderer: draws true images.
        n: images of each prompt.
        seed: of the true images.
    """

    description = (
        "Compare all of a model's generators on the same prompts: scenes score, FID and KID on the detector's "
        "features, seconds a picture."
    )
    needs_local_model = True

    def __init__(self, scenes: ScenesTask, renderer: SceneRenderer, n: int, seed: int) -> None:
        self.scenes, self.renderer, self.n, self.seed = scenes, renderer, n, seed
        self.examples = scenes.examples()
        self.rows: list[dict[str, object]] = []

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """See `EvaluationTask.add_arguments`: how many prompts and images."""
        add_size_arguments(parser)

    @classmethod
    def create(cls, run: EvaluationRun) -> Self:
        """See `EvaluationTask.create`."""
        scenes = ScenesTask.create(run)
        return cls(scenes, SceneRenderer(scenes.detector.config.image_size), run.args.images, run.args.seed)

    def run(self, run: EvaluationRun) -> Report:
        """See `EvaluationTask.run`."""
        engine, examples = run.engine, self.examples
        true = baselines.oracle_images(examples, self.n, self.seed, self.renderer)
        distances = FeatureDistances(self.scenes.detector, [image for row in true for image in row])
        print(f"{'':<24}" + "".join(f"{column:>16}" for column in UNITS), flush=True)
        references = baselines.oracle_images(examples, self.n, self.seed + 1, self.renderer)
        self._report("true pictures", references, distances)
        reconstructions = baselines.reconstruct_images(run.required_model.image_tokenizer, references)
        self._report("through the codes", reconstructions, distances)
        overall, sheet_rows = {}, []
        for name, options in self._generators(run):
            batch, sampling = run.args.batch, {"generator": name, **options}
            images = generate_outputs(engine, self.scenes, examples, self.n, batch, self.seed, **sampling)
            cost = measure_cost(engine, name, [str(example.prompt) for example in examples], **options)
            overall[name] = self._report(name, images, distances, cost)
            sheet_rows.append([images[i][0] for i in range(0, len(examples), max(1, len(examples) // 18))])
        if run.args.out:
            sheet = image_grid([image for row in sheet_rows for image in row], 0, len(sheet_rows[0]))
            save_image(make_folder(run.args.out) / "generators.png", sheet)
        details = {
            "prompts": len(examples),
            "images": self.n,
            "features": "scene-detector, means at stride 16",
        }
        return Report(float(np.max(list(overall.values()))), overall, self.rows, details)

    def _generators(self, run: EvaluationRun) -> list[tuple[str, dict[str, Any]]]:
        """The generators to be compared, each with those of the given options that it takes."""
        options = run.options
        if "generator" in options:
            return [(options.pop("generator"), options)]
        names = run.engine.info()["generators"]
        if len(names) == 1:
            return [(names[0], options)]
        takes = {name: {"size", *option_names(run.required_model.generators.options(name))} for name in names}
        return [(name, {key: value for key, value in options.items() if key in takes[name]}) for name in names]

    def _report(
        self, name: str, images: ImageGroups, distances: FeatureDistances, cost: dict[str, float] | None = None
    ) -> float:
        """Print and keep the figures of some images; their scenes score."""
        scores = score_all(self.scenes, self.examples, images)
        overall = summarize_scores(self.examples, scores, self.seed).overall.overall
        fid, kid = distances([image for row in images for image in row])
        figures = {"scenes": overall, "fid": fid, "kid": kid} | (cost or {})
        cells = (f"{figures[column]:>16.4g}" if column in figures else " " * 16 for column in UNITS)
        print(f"{name:<24}" + "".join(cells), flush=True)
        self.rows += [{"name": f"{name}: {c}", "value": value, "unit": UNITS[c]} for c, value in figures.items()]
        return overall
