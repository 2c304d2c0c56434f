"""The scene detector that reads generated pictures back (`unigen/evaluation/detector.py`), trained on rendered scenes
only.

    unigen train recipes/scene_detector.py run_dir=runs/detector seed=1 time_limit=1200
    python recipes/scene_detector.py runs/detector/model unigen/assets/scene-detector

20 minutes on one thread of a CPU; docs/training.md has figures.
The second command calibrates the thresholds on rendered scenes, never on a model's pictures. The image tokenizer's
feature loss (recipes/tiny_vq.py) uses a network of this recipe too, but one of another seed, which is not shipped and
scores nothing: a tokenizer that has learnt to please a network must not be judged by it.

A picture is degraded at random, so that a blurred tokenizer reconstruction is read as a clean picture is; and some
pictures hold nothing to be found: empty backgrounds, noise, shuffled patches, even blends of two scenes.
Shapes: B batch, N objects a picture (padded with class -1), H W pixels.
"""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unigen.config import OptimConfig, RunConfig
from unigen.evaluation.detector import (
    DetectorConfig,
    DetectorTargets,
    SceneDetector,
    detector_losses,
    load_detector,
    save_detector,
)
from unigen.media.output import one_line_errors
from unigen.toyworld import scenes
from unigen.toyworld.world import find_font
from unigen.training.train_spec import TrainSpec
from unigen.utils.argparser import OneLineParser
from unigen.utils.disk import check_folder, check_input

OBJECTS = tuple(scenes.OBJECT_EMOJI)
COLORS = ("natural", *scenes.COLORS)
BACKGROUNDS = tuple(scenes.BACKGROUNDS)
MAX_OBJECTS = 6


@dataclass
class DetectorRunConfig(RunConfig):
    """A run of this recipe. The schedule follows `time_limit` where that is shorter than `steps`."""

    steps: int = 4000
    batch_size: int = 64
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=2e-3, warmup_steps=200, min_lr_ratio=0.01, weight_decay=0.02)
    )
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    num_workers: int = 1
    save_every: int = 1000
    sample_every: int = 0
    run_dir: str = "runs/detector"
    image_size: int = 64
    """Pixels along a side."""


def crowded_scene(rng: np.random.Generator, size: int) -> scenes.Scene:
    """0-6 objects anywhere, covering each other as they fall: what a model may draw and the world never does."""
    names = list(OBJECTS)
    num_small = list(rng.choice(len(names), size=2))
    items: list[scenes.SceneObject] = []
    for _ in range(int(rng.integers(0, MAX_OBJECTS + 1))):
        name = names[num_small[int(rng.integers(2))]] if rng.random() < 0.5 else names[int(rng.integers(len(names)))]
        tints = scenes.allowed_colors(name)
        color = tints[int(rng.integers(len(tints)))] if rng.random() < 0.5 else None
        side, margin = rng.uniform(16, 40) * size / 64, 8 * size / 64
        x, y = rng.uniform(margin, size - margin, 2)
        item = scenes.SceneObject(name, color, float(x), float(y), float(side), float(rng.uniform(-14, 14)))
        if all(max(abs(item.x - o.x), abs(item.y - o.y)) > 0.45 * max(side, o.size) for o in items):
            items.append(item)
    background = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    return scenes.Scene(tuple(items), background, size, bool(rng.random() < 0.3))


class SceneDataset:
    """Endless; item i of a seed is always the same picture with its objects; 20% of the scenes are crowded or
    empty."""

    def __init__(self, seed: int, size: int) -> None:
        self.seed, self.size = seed, size
        self.world: scenes.SceneRenderer | None = None

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.world is None:
            self.world = scenes.SceneRenderer(self.size)
        rng = np.random.default_rng((self.seed, index))
        scene = (
            crowded_scene(rng, self.size) if rng.random() < 0.2 else scenes.sample_scene(rng, self.size, held_out=None)
        )
        picture = self.world.render(scene)
        area = (picture.boxes[:, 2:] - picture.boxes[:, :2]).prod(1) if len(scene.objects) else np.zeros(0)
        classes, colors = np.full(MAX_OBJECTS, -1), np.zeros(MAX_OBJECTS, int)
        boxes = np.zeros((MAX_OBJECTS, 4), np.float32)
        for i, item in enumerate(scene.objects):
            if area[i] and picture.masks[i].sum() > 0.2 * area[i]:
                classes[i], colors[i] = OBJECTS.index(item.name), COLORS.index(item.color or "natural")
                boxes[i] = picture.boxes[i]
        background = BACKGROUNDS.index(scene.background)
        return {"image": picture.image, "classes": classes, "colors": colors, "boxes": boxes, "background": background}


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """-> pixels_BCHW float in [-1, 1], classes and colors (B, N), boxes (B, N, 4), background (B,)."""
    pixels = torch.from_numpy(np.stack([r["image"] for r in rows])).permute(0, 3, 1, 2).float() / 127.5 - 1
    batch = {k: torch.from_numpy(np.stack([r[k] for r in rows])) for k in ("classes", "colors", "boxes")}
    return {"pixels": pixels, **batch, "background": torch.tensor([r["background"] for r in rows])}


# ---------------------------------------------------------------- degradations and negatives


def _dct8() -> Tensor:
    n = torch.arange(8)
    basis = torch.cos(math.pi / 8 * (n[None] + 0.5) * n[:, None]) * math.sqrt(2 / 8)
    basis[0] /= math.sqrt(2)
    return basis


def quantize_dct(x_BCHW: Tensor, strength: Tensor) -> Tensor:
    """8x8 cosine coefficients rounded to multiples of strength (B, 1, ...), coarser at high frequencies, as JPEG
    does."""
    b, c, h, w = x_BCHW.shape
    basis = _dct8().to(x_BCHW)
    blocks = x_BCHW.view(b, c, h // 8, 8, w // 8, 8).permute(0, 1, 2, 4, 3, 5)
    frequency = torch.arange(8, device=x_BCHW.device)
    step = strength.view(b, 1, 1, 1, 1, 1) * (1 + (frequency[:, None] + frequency) / 2)
    rounded = ((basis @ blocks @ basis.T) / step).round() * step
    return (basis.T @ rounded @ basis).permute(0, 1, 2, 4, 3, 5).reshape(b, c, h, w)


def degrade(x_BCHW: Tensor, rng: torch.Generator) -> Tensor:
    """Each picture independently: brightness and colour a little, maybe blur, halving of the resolution, JPEG,
    noise."""
    b = x_BCHW.shape[0]

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=rng).to(x_BCHW)

    def apply_to_share(share: float, y_BCHW: Tensor) -> Tensor:
        return torch.where(draw(b, 1, 1, 1) < share, y_BCHW, x_BCHW)

    x_BCHW = x_BCHW * (0.92 + 0.16 * draw(b, 3, 1, 1)) + 0.12 * (draw(b, 3, 1, 1) - 0.5)
    edge = F.pad(x_BCHW, (1, 1, 1, 1), mode="replicate")
    blurred = F.avg_pool2d(edge, 3, 1)
    x_BCHW = apply_to_share(0.35, x_BCHW + (0.4 + 0.8 * draw(b, 1, 1, 1)) * (blurred - x_BCHW))
    size = x_BCHW.shape[-1]
    side = int(size * (0.45 + 0.4 * float(draw(1))))
    small = F.interpolate(x_BCHW, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    x_BCHW = apply_to_share(0.25, F.interpolate(small, size=(size, size), mode="bicubic", align_corners=False))
    x_BCHW = apply_to_share(0.3, quantize_dct(x_BCHW, 0.05 + 0.35 * draw(b)))
    noise = torch.randn(x_BCHW.shape, generator=rng).to(x_BCHW)
    return apply_to_share(0.4, x_BCHW + 0.12 * draw(b, 1, 1, 1) * noise).clamp(-1, 1)


def shuffle_patches(x_BCHW: Tensor, rng: torch.Generator, patch: int = 8) -> Tensor:
    """The patches of each picture in a random order."""
    b, c, h, w = x_BCHW.shape
    parts = F.unfold(x_BCHW, patch, stride=patch)
    order = torch.rand(b, 1, parts.shape[2], generator=rng).argsort(-1).to(x_BCHW.device)
    return F.fold(parts.gather(2, order.expand_as(parts)), (h, w), patch, stride=patch)


def random_noise(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Uniform noise, each picture at its own coarseness between one pixel and an eighth of the side; (B, 3, H, W)."""
    rows = []
    for _ in range(shape[0]):
        side = max(shape[-1] >> int(torch.randint(0, 4, (1,), generator=rng)), 8)
        grid = torch.rand(1, 3, side, side, generator=rng) * 2 - 1
        rows.append(F.interpolate(grid, size=shape[-2:], mode="bilinear", align_corners=False))
    return torch.cat(rows)


class DetectorLoss:
    """Degrades the batch, turns 3 of 16 into pictures in which nothing is to be found, and returns the sums."""

    weights = {"heat": 1.0, "shape": 0.4, "color": 0.5, "background": 0.3}

    def __call__(
        self, model: nn.Module, batch: dict[str, Tensor], rng: torch.Generator
    ) -> dict[str, tuple[Tensor, Any]]:
        x, classes, background = batch["pixels"].clone(), batch["classes"].clone(), batch["background"].clone()
        num_small = max(1, len(x) // 32)
        num_blends = 4 * num_small
        blend_weight = 0.35 + 0.3 * torch.rand(num_blends, 1, 1, 1, generator=rng).to(x)
        x[:num_blends] = blend_weight * x[:num_blends] + (1 - blend_weight) * x[num_blends : 2 * num_blends]
        x[num_blends : num_blends + num_small] = shuffle_patches(x[num_blends : num_blends + num_small], rng)
        x[num_blends + num_small : num_blends + 2 * num_small] = random_noise((num_small, *x.shape[1:]), rng).to(x)
        num_negatives = num_blends + 2 * num_small
        classes[:num_negatives], background[:num_negatives] = -1, -1
        out = model(degrade(x, rng))
        return dict(detector_losses(out, DetectorTargets(classes, batch["colors"], batch["boxes"], background)))


def config() -> DetectorRunConfig:
    return DetectorRunConfig()


def build(cfg: DetectorRunConfig) -> TrainSpec:
    torch.manual_seed(cfg.seed)
    if cfg.init_from is not None:
        model = copy.deepcopy(load_detector(cfg.init_from)).requires_grad_(True).train()
    else:
        model = SceneDetector(DetectorConfig(OBJECTS, COLORS, BACKGROUNDS, image_size=cfg.image_size))
    data = SceneDataset(cfg.seed, cfg.image_size)
    return TrainSpec(model=model, dataset=data, collate=collate, objective=DetectorLoss(), save_model=save_detector)


# ---------------------------------------------------------------- calibration


@torch.no_grad()
def calibrate(model: SceneDetector, seed: int = 1, pictures: int = 3000) -> None:
    """Set the thresholds: of 0.1 .. 0.8 those that read most degraded scenes exactly (the middle of the best ones); for
    counting, most scenes with several objects of a kind, and never less than the other."""
    data, rng = SceneDataset(seed, model.config.image_size), torch.Generator().manual_seed(seed)
    grid = torch.arange(0.1, 0.81, 0.02)
    num_correct, correct_with_repeats = torch.zeros(len(grid)), torch.zeros(len(grid))
    for start in range(0, pictures, 100):
        batch = collate([data[i] for i in range(start, start + 100)])
        readings = model.detect(degrade(batch["pixels"], rng), float(grid[0]))
        for reading, row in zip(readings, batch["classes"], strict=True):
            truth = sorted(OBJECTS[int(k)] for k in row if k >= 0)
            for j, threshold in enumerate(grid):
                exact = sorted(o.name for o in reading.objects if o.score > threshold) == truth
                num_correct[j] += exact
                correct_with_repeats[j] += exact and len(set(truth)) < len(truth)

    def middle(score: Tensor) -> float:
        return round(float(grid[score >= 0.998 * score.max()].mean()), 2)

    model.config.threshold, model.config.count_threshold = (
        middle(num_correct),
        max(middle(num_correct), middle(correct_with_repeats)),
    )


@one_line_errors
def main() -> int:
    parser = OneLineParser(description="Calibrate a trained detector's thresholds on rendered scenes.")
    parser.add_argument("detector", help="the folder that a training run wrote, such as runs/judge/model")
    parser.add_argument("out", help="the folder to write the calibrated detector to")
    args = parser.parse_args()
    check_input(args.detector, "unigen train recipes/scene_detector.py run_dir=runs/detector")
    out = check_folder(args.out)
    find_font()
    detector = load_detector(args.detector)
    calibrate(detector)
    save_detector(detector, out)
    thresholds = detector.config.threshold, detector.config.count_threshold
    print(f"thresholds {thresholds[0]}, counting {thresholds[1]}: written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
