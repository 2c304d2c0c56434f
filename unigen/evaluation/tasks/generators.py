"""Task `generators`: all ways in which a model writes pictures, side by side on the same prompts.

    unigen eval generators --model M [--quick] [--json FILE] [--out FOLDER]

For each: the overall score of task `scenes`; FID (Heusel et al. 2017) and KID (Binkowski et al. 2018) against true
pictures of the same prompts, on the scene detector's own features, so that they compare here only; seconds a picture
alone and in a batch of 16; and the evaluations of the backbone and of a flow's velocity for one picture. True pictures
of another seed, and those through the codes, say what FID and KID there can be. --out writes a grid, a row for each
way. Needs the emoji font. It does not depend on how anything is written."""

from __future__ import annotations

import time
import warnings
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from unigen.config import write_report
from unigen.evaluation import baselines
from unigen.evaluation.baselines import ImageGroups
from unigen.evaluation.call_counter import CallCounter
from unigen.evaluation.detector import SceneDetector
from unigen.evaluation.runner import (
    OneLineParser,
    generate_outputs,
    load_engine,
    make_folder,
    make_parser,
    parse_args,
    sampling_options,
)
from unigen.evaluation.tasks.scenes import PROMPTS_PER_TAG, ScenesTask, score_pictures, summarize_scores
from unigen.limits import limit_argument as limited
from unigen.media.output import image_grid, save_image
from unigen.media.pixels import to_pixels
from unigen.toyworld.scenes import SceneRenderer
from unigen.utils.extras import require_extra

TIMING_BATCH_SIZE = 16  # of the second timing
TIMING_REPEATS = 4  # runs of each timing; the best counts


class DetectorFeatures(nn.Module):
    """uint8 pictures (B, 3, H, W) -> (B, F): the means of the detector's coarsest maps, as torchmetrics wants them."""

    def __init__(self, detector: SceneDetector) -> None:
        super().__init__()
        self.detector = detector
        self.num_features = detector.config.widths[-1]

    @torch.no_grad()
    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.detector.features(x_BCHW.float() / 127.5 - 1)[-1].mean((2, 3)).double()


class FeatureDistances:
    """FID and KID of pictures from the true ones. ValueError without torchmetrics, or for fewer than two pictures."""

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

    def __call__(self, pictures: list[Image.Image]) -> tuple[float, float]:
        self.fid.reset()
        self.kid.reset()
        self._update(pictures, real=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # KID draws its subsets
            return float(self.fid.compute()), float(self.kid.compute()[0])

    def _update(self, pictures: list[Image.Image], real: bool) -> None:
        for i in range(0, len(pictures), 100):
            x_BCHW = ((to_pixels(pictures[i : i + 100], self.size) + 1) * 127.5).round().to(torch.uint8)
            self.fid.update(x_BCHW, real=real)
            self.kid.update(x_BCHW, real=real)


def measure_cost(engine: Any, writer: str, prompts: list[str], **options: Any) -> dict[str, float]:
    """Seconds a picture alone and in a batch, the best of several runs, and evaluations for one picture."""
    head = engine.model.heads[writer] if writer in engine.model.heads else None
    figures: dict[str, float] = {}
    with CallCounter(engine.model, "cached_hidden_states") as step, ExitStack() as stack:
        velocity = stack.enter_context(CallCounter(head, "velocity")) if hasattr(head, "velocity") else None
        engine.generate_batch(prompts[:1], [0], generator=writer, **options)
        figures |= {"backbone": step.calls, "head": velocity.calls if velocity else 0}
    for name, batch in (("seconds alone", 1), (f"seconds in {TIMING_BATCH_SIZE}", TIMING_BATCH_SIZE)):
        times = []
        for repetition in range(TIMING_REPEATS):
            batch_prompts = [prompts[(repetition + i) % len(prompts)] for i in range(batch)]
            start = time.perf_counter()
            engine.generate_batch(batch_prompts, range(batch), generator=writer, **options)
            times.append((time.perf_counter() - start) / batch)
        figures[name] = min(times)
    return figures


def arguments() -> OneLineParser:
    parser = make_parser(
        "generators",
        "Compare all of a model's generators on the same prompts: scenes score, FID and KID on the detector's "
        "features, seconds a picture.",
    )
    parser.add_argument("--quick", action="store_true", help="20 prompts a task instead of 100")
    parser.add_argument("--images", type=limited("n"), default=4, metavar="N", help="pictures a prompt (default: 4)")
    return parser


def main(args: list[str]) -> int:
    """`unigen eval generators ...`: print the table, write the report and the grid. ValueError for bad input."""
    a = parse_args(arguments(), args)
    start = time.perf_counter()
    task = ScenesTask(PROMPTS_PER_TAG[a.quick], a.seed)
    items, world, engine = task.items(), SceneRenderer(task.detector.config.image_size), load_engine(a)
    true = baselines.oracle_images(items, a.images, a.seed, world)
    distances = FeatureDistances(task.detector, [picture for row in true for picture in row])
    columns = ("scenes", "fid", "kid", "seconds alone", f"seconds in {TIMING_BATCH_SIZE}", "backbone", "head")
    units = dict(zip(columns, ("share", "", "", "s", "s", "evaluations", "evaluations"), strict=True))
    rows: list[dict[str, Any]] = []
    print(f"{'':<24}" + "".join(f"{column:>16}" for column in columns), flush=True)

    def report(name: str, pictures: ImageGroups, cost: dict[str, float]) -> float:
        overall = summarize_scores(items, score_pictures(task, items, pictures), a.seed).overall.overall
        fid, kid = distances([picture for row in pictures for picture in row])
        figures = {"scenes": overall, "fid": fid, "kid": kid} | cost
        print(
            f"{name:<24}" + "".join(f"{figures[c]:>16.4g}" if c in figures else " " * 16 for c in columns), flush=True
        )
        rows.extend({"name": f"{name}: {c}", "value": v, "unit": units[c]} for c, v in figures.items())
        return overall

    reference_images = baselines.oracle_images(items, a.images, a.seed + 1, world)
    report("true pictures", reference_images, {})
    report("through the codes", baselines.reconstruct_images(engine.model.image_tokenizer, reference_images), {})
    wanted = sampling_options(a)
    names = [wanted.pop("generator")] if "generator" in wanted else engine.info()["generators"]
    scores, sheet_rows = {}, []
    for name in names:
        options = dict(wanted)
        if len(names) > 1:  # each takes what it can
            options = {k: v for k, v in wanted.items() if k == "guidance" or k in engine.model.generators[name].takes}
        pictures = generate_outputs(engine, task, items, a.images, a.batch, a.seed, generator=name, **options)
        cost = measure_cost(engine, name, [str(item.prompt) for item in items], **options)
        scores[name] = report(name, pictures, cost)
        sheet_rows.append([pictures[i][0] for i in range(0, len(items), max(1, len(items) // 18))])
    if a.out:
        sheet = image_grid([picture for row in sheet_rows for picture in row], 0, len(sheet_rows[0]))
        save_image(make_folder(a.out) / "generators.png", sheet)
    if a.json:
        write_report(
            a.json,
            command="unigen eval generators " + " ".join(args),
            model=a.model,
            overall=float(np.max(list(scores.values()))),
            tasks=scores,
            rows=rows,
            seconds=time.perf_counter() - start,
            prompts=len(items),
            images=a.images,
            features="scene-detector, means at stride 16",
        )
    return 0
