"""The image tokenizer of unigen-tiny: 64x64 images of the rendered world <-> 8x8 codes of 1,024.

    unigen train recipes/tiny_vq.py run_dir=runs/vq                            (needs the font fonts-noto-color-emoji)
    python recipes/tiny_vq.py --evaluate runs/vq/model [--image-source digits] [--count 1000] [--json FILE]
    python recipes/tiny_vq.py --ablate 2000 [--json FILE] [key=value ...]

25 minutes on 2 CPU cores. It says where images come from and which losses are on; the losses are
unigen/training/vq_objective.py, the network is unigen/tokenizers/vq.py. docs/training.md has figures.

- `loss.gan=0.5`, `loss.lpips=1 lpips_weights=FILE`, `loss.feature=1 feature_network=FOLDER`: more losses. The last is a
  scene detector, but not the one that evaluates: a judge that one trains against is no judge.
- `model.quantizer=fsq`, `model.image_size=96`: another network. `model.quantizer=multiscale model.code_dim=16` is the
  tokenizer of next-scale prediction, which may begin with encoder and decoder of a vq one (`init_from=FOLDER`). With
  `model.scale_dropout=0.5` its first scales say more, which a model that draws needs. --evaluate adds its health by
  scale.
- `tokenizer_kind=kl`: continuous latents, for flow.
- `init_from=FOLDER freeze_codes=true`: the decoder alone; models trained on the codes stay valid. With
  `generated_codes=FILE` (data_tools/generate_codes.py) it learns to decode codes as a model draws them.
- `image_source=digits`: for recipes/digits.py.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unigen.config import OptimConfig, RunConfig, apply_overrides
from unigen.data import digits
from unigen.media.output import check_output
from unigen.nn.conv import to_channels_last, to_uint8
from unigen.nn.perceptual import LPIPS
from unigen.tokenizers import load_image_tokenizer, save_tokenizer
from unigen.tokenizers.kl import KLConfig, KLTokenizer
from unigen.tokenizers.measure import evaluate_scales, evaluate_tokenizer
from unigen.tokenizers.multiscale_vq import MultiscaleQuantizer
from unigen.tokenizers.vq import VQConfig, VQTokenizer
from unigen.toyworld.scenes import SceneRenderer, sample_scene
from unigen.training.train_spec import TrainSpec
from unigen.training.trainer import Trainer
from unigen.training.vq_objective import VQLossConfig, VQObjective, VQTraining
from unigen.utils.argparser import OneLineParser
from unigen.utils.disk import check_input
from unigen.utils.files import write_report
from unigen.utils.option_types import number_argument

INPUTS = {
    "feature_network": "unigen train recipes/scene_detector.py run_dir=runs/judge seed=2 && "
    "python recipes/scene_detector.py runs/judge/model runs/judge/calibrated",
    "generated_codes": "python data_tools/generate_codes.py MODEL runs/drawn.npz",
}
"""Files and folders that fields name, and the commands that make them."""

HELD_OUT_SEED = 1_000_000  # training seeds are below; item i of seed s draws from default_rng([s, i])


@dataclass
class VQRunConfig(RunConfig):
    """A run of this recipe."""

    RENAMED: ClassVar[dict[str, str]] = {
        "kind": "tokenizer_kind",
        "pictures": "image_source",
        "features": "feature_network",
        "lpips": "lpips_weights",
        "drawn": "generated_codes",
        "true": "true_codes_share",
    }
    """Keys of version 0.1, and their names now."""

    tokenizer_kind: Literal["vq", "kl"] = "vq"
    """Codes, or continuous latents."""
    image_source: Literal["scenes", "digits"] = "scenes"
    """What it is trained on: the rendered world, or handwritten digits."""
    kl: KLConfig = field(default_factory=KLConfig)
    """The network with tokenizer_kind=kl."""
    model: VQConfig = field(default_factory=VQConfig)
    """The network with tokenizer_kind=vq."""
    loss: VQLossConfig = field(default_factory=VQLossConfig)
    """Which losses are on."""
    feature_network: str | None = None
    """Folder of a frozen scene detector for loss.feature."""
    freeze_codes: bool = False
    """With init_from: train the decoder alone, which may be another one; the codes stay valid."""
    lpips_weights: str | None = None
    """File with LPIPS (VGG-16) weights for loss.lpips."""
    generated_codes: str | None = None
    """With freeze_codes: files of data_tools/generate_codes.py, apart by commas: images with the codes that a model
    drew for them."""
    true_codes_share: float = 0.2
    """With generated_codes: share of the images that are decoded from their own codes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed >= HELD_OUT_SEED:
            raise ValueError(f"seed must be below {HELD_OUT_SEED}: seeds from there on are held out for evaluation")
        if self.generated_codes and not self.freeze_codes:
            raise ValueError("generated_codes is for a decoder alone: add init_from=FOLDER freeze_codes=true")
        if not 0 <= self.true_codes_share <= 1:
            raise ValueError(f"true_codes_share is from 0 to 1, not {self.true_codes_share}")


def config() -> VQRunConfig:
    return VQRunConfig(
        steps=1_000_000,
        time_limit=1500.0,
        batch_size=32,
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0, warmup_steps=100, min_lr_ratio=0.02),
        precision="auto",
        num_workers=1,
        log_every=100,
        save_every=1000,
        sample_every=1000,
        run_dir="runs/vq",
    )


class SceneImages:
    """Endless pictures; item i, a function of (seed, i), is pixels (3, S, S) uint8 and objects (1, S, S) bool."""

    def __init__(self, seed: int, size: int = 64) -> None:
        self.seed, self.size = seed, size
        self.world: SceneRenderer | None = None  # made where it is used: one a worker
        SceneRenderer(size)  # a missing font is said at once

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        self.world = self.world or SceneRenderer(self.size)
        picture = self.world.render(sample_scene(np.random.default_rng([self.seed, i]), size=self.size))
        return torch.from_numpy(picture.image).permute(2, 0, 1), torch.from_numpy(picture.masks.any(0))[None]


class DigitImages:
    """Endless handwritten digits of the training part; item i, a function of (seed, i), is as in `ImageGroups`."""

    def __init__(self, seed: int, size: int = 32, held_out: bool = False) -> None:
        self.seed, self.size = seed, size
        self.images = digits.load_split(held_out)[0]

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        digit = self.images[np.random.default_rng([self.seed, i]).integers(len(self.images))]
        image = torch.from_numpy(digits.to_rgb_image(digit, self.size)).permute(2, 0, 1)
        return image, image[:1] > 64


def make_image_dataset(kind: str, seed: int, size: int, held_out: bool = False) -> Any:
    """Endless pictures of a kind; of the rendered world the seed alone says what is held out."""
    if kind == "digits":
        return DigitImages(seed, size, held_out)
    return SceneImages(seed + HELD_OUT_SEED * held_out, size)


class GeneratedCodesDataset:
    """Endless pictures of files of `data_tools/generate_codes.py`; item i is as in `ImageGroups`, and codes (P,) that a
    model drew for it, or in a share `true_codes_share` of the items its own."""

    def __init__(self, files: Sequence[str], seed: int, true_codes_share: float, tokenizer: Any) -> None:
        self.seed, self.true_codes_share = seed, true_codes_share
        size, length = tokenizer.image_size, sum(getattr(tokenizer.quantizer, "lengths", []))
        parts = [self._load_arrays(file) for file in files]
        for file, (pixels_NHWC, _, *codes) in zip(files, parts, strict=True):
            if pixels_NHWC.shape[1:] != (size, size, 3) or any(c_NP.shape[1:] != (length,) for c_NP in codes):
                raise ValueError(f"{file} has codes of another tokenizer than init_from: draw by the model it is of")
        self.pixels_N3HW, self.objects_N1HW, *codes = (torch.cat(arrays) for arrays in zip(*parts, strict=True))
        self.pixels_N3HW, self.objects_N1HW = self.pixels_N3HW.permute(0, 3, 1, 2), self.objects_N1HW[:, None]
        self.generated_codes_NP, self.true_codes_NP = codes

    @staticmethod
    def _load_arrays(file: str) -> list[Tensor]:
        try:
            with np.load(file) as arrays:
                codes = "generated" if "generated" in arrays else "drawn"  # as version 0.1 called it
                return [torch.from_numpy(arrays[name]) for name in ("pixels", "objects", codes, "true")]
        except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
            raise ValueError(f"{file} cannot be read ({error}): make one by data_tools/generate_codes.py") from error

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        rng = np.random.default_rng([self.seed, i])
        n, use_true_codes = int(rng.integers(len(self.pixels_N3HW))), rng.random() < self.true_codes_share
        return (
            self.pixels_N3HW[n],
            self.objects_N1HW[n],
            (self.true_codes_NP if use_true_codes else self.generated_codes_NP)[n],
        )


def collate(items: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    pixels_BCHW = torch.stack([item[0] for item in items]).float() / 127.5 - 1
    masks_B1HW = torch.stack([item[1] for item in items]).float()
    batch = {"pixels": pixels_BCHW.contiguous(memory_format=torch.channels_last), "masks": masks_B1HW}
    return batch | ({"codes": torch.stack([item[2] for item in items])} if len(items[0]) > 2 else {})


def load_feature_network(folder: str | None) -> Callable[[Tensor], list[Tensor]] | None:
    if folder is None:
        return None
    from unigen.evaluation.detector import load_detector

    return load_detector(folder).features


def new_or_loaded_tokenizer(cfg: VQRunConfig) -> VQTokenizer | KLTokenizer:
    """A new tokenizer, or the one of init_from to go on from."""
    if cfg.tokenizer_kind == "kl":
        if cfg.freeze_codes:
            raise ValueError("a kl tokenizer has no codes to freeze")
        if not cfg.init_from:
            return KLTokenizer(cfg.kl)
        loaded_tokenizer = load_image_tokenizer(cfg.init_from)
        if not isinstance(loaded_tokenizer, KLTokenizer) or loaded_tokenizer.settings != cfg.kl:
            raise ValueError(
                f"init_from={cfg.init_from} is another network than kl.*: give its kl.*, or leave init_from out"
            )
        return loaded_tokenizer
    if cfg.freeze_codes and not cfg.init_from:
        raise ValueError("freeze_codes needs init_from=FOLDER, the tokenizer whose codes are kept")
    if not cfg.init_from:
        return VQTokenizer(cfg.model)
    tokenizer = load_image_tokenizer(cfg.init_from)
    if not isinstance(tokenizer, VQTokenizer):
        raise ValueError(f"init_from={cfg.init_from} is no vq tokenizer: add tokenizer_kind=kl")
    if tokenizer.settings != cfg.model:
        loaded_tokenizer, tokenizer = tokenizer, VQTokenizer(cfg.model)
        if not copy_matching_weights(loaded_tokenizer, tokenizer, cfg.freeze_codes):
            may = "only model.decoder_* may differ" if cfg.freeze_codes else "only the quantizer may be another"
            raise ValueError(f"init_from={cfg.init_from} is another network than model.*; {may}")
    if cfg.freeze_codes:
        tokenizer.freeze_codes()
    return tokenizer


def copy_matching_weights(source: VQTokenizer, tokenizer: VQTokenizer, freeze_codes: bool) -> bool:
    """Give the tokenizer the weights of a known one; False where they do not fit. With frozen codes those are all but
    the decoder's; where the quantizer is another one, all but its own and those of the two layers beside it."""
    old, new = source.settings, tokenizer.settings
    no_code = (
        "decoder_channels",
        "decoder_blocks",
        "beta",
        "entropy",
        "scale_dropout",
        "revive_every",
        "dead_threshold",
    )
    if freeze_codes and old != replace(new, **{name: getattr(old, name) for name in no_code}):
        return False  # as many weights, and yet other codes
    another = old.quantizer != new.quantizer
    left_out = "decoder." if freeze_codes else "quantizer." if another else ()
    new_state, old_state = (
        {name: tensor for name, tensor in module.state_dict().items() if not name.startswith(left_out)}
        for module in (tokenizer, source)
    )
    fits = {
        name: tensor
        for name, tensor in old_state.items()
        if name in new_state and new_state[name].shape == tensor.shape
    }
    quantizer_neighbors = (
        {"encoder.head.weight", "encoder.head.bias", "decoder.stem.weight"} if left_out == "quantizer." else set()
    )
    if new_state.keys() != old_state.keys() or not new_state.keys() - fits.keys() <= quantizer_neighbors:
        return False
    tokenizer.load_state_dict(fits, strict=False)
    return True


def build(cfg: VQRunConfig) -> TrainSpec:
    torch.manual_seed(cfg.seed)
    tokenizer = new_or_loaded_tokenizer(cfg)
    lpips = LPIPS.from_file(cfg.lpips_weights) if cfg.lpips_weights else None
    size = tokenizer.image_size
    generated_dataset = (
        GeneratedCodesDataset(cfg.generated_codes.split(","), cfg.seed, cfg.true_codes_share, tokenizer)
        if cfg.generated_codes
        else None
    )
    held_out = make_image_dataset(cfg.image_source, 0, size, held_out=True)
    sample_pixels = collate([held_out[i] for i in range(24)])["pixels"]

    def sample(model: VQTraining, step: int, folder: Path) -> None:
        device = next(model.parameters()).device
        save_grid(model.tokenizer, sample_pixels.to(device), folder / f"{step:06d}.png")

    def save(model: VQTraining, folder: Path) -> None:
        save_tokenizer(model.tokenizer, folder)

    return TrainSpec(
        model=to_channels_last(VQTraining(tokenizer, gan=cfg.loss.gan > 0)),
        dataset=generated_dataset or make_image_dataset(cfg.image_source, cfg.seed, size),
        collate=collate,
        objective=VQObjective(cfg.loss, load_feature_network(cfg.feature_network), lpips),
        write_samples=sample,
        save_model=save,
    )


def save_grid(tokenizer: Any, x_BCHW: Tensor, path: Path, columns: int = 8, scale: int = 2) -> None:
    """PNG of rows of pictures, each above a row of their reconstructions."""
    images_and_reconstructions = (
        torch.cat([to_uint8(x_BCHW), to_uint8(tokenizer.decode(tokenizer.encode(x_BCHW)))], dim=1).cpu().numpy()
    )
    rows = [
        np.concatenate(list(images_and_reconstructions[i : i + columns]), axis=1)
        for i in range(0, len(images_and_reconstructions), columns)
    ]
    rows = [np.pad(row, ((0, 0), (0, rows[0].shape[1] - row.shape[1]), (0, 0))) for row in rows]
    grid = Image.fromarray(np.concatenate(rows))
    grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST).save(path)


METRIC_UNITS = {"psnr": "dB", "psnr_objects": "dB", "usage": "share", "perplexity": "codes", "dead": "codes"}


def evaluate(folder: str | Path, count: int, grid: str | None = None, kind: str = "scenes") -> dict[str, float]:
    """The figures of the tokenizer saved in `folder` on `count` held-out pictures."""
    tokenizer = load_image_tokenizer(folder)
    pictures = make_image_dataset(kind, 1, tokenizer.image_size, held_out=True)
    batch = collate([pictures[i] for i in range(count)])
    if grid:
        save_grid(tokenizer, batch["pixels"][:32], Path(grid))
    figures = evaluate_tokenizer(tokenizer, batch["pixels"], batch["masks"])
    if isinstance(getattr(tokenizer, "quantizer", None), MultiscaleQuantizer):
        for scale in evaluate_scales(tokenizer, batch["pixels"]):
            side = int(scale.pop("side"))
            figures |= {f"{side}x{side} {name}": value for name, value in scale.items()}
    return figures


def run_ablation(steps: int, count: int, overrides: list[str]) -> list[dict[str, Any]]:
    """Trains the recipe `steps` steps in each variant; one row a figure, `baseline` being the plain recipe's."""
    variants = {
        "vq": [],
        "fsq": ["model.quantizer=fsq"],
        "lfq": ["model.quantizer=lfq", "model.entropy=0.1"],
        "vq + gan": ["loss.gan=0.5", f"loss.gan_start={steps // 3}"],
        "vq without revival": ["model.revive_every=0"],
        "multi-scale": ["model.quantizer=multiscale", "model.code_dim=16"],
    }
    if any(override.startswith("feature_network=") for override in overrides):
        variants["vq + feature loss"] = ["loss.feature=1"]
    else:
        print("the feature loss is left out: name a scene detector by feature_network=FOLDER to compare it too")
    shared = [f"steps={steps}", "time_limit=none", "save_every=0", "sample_every=0", f"log_every={max(steps // 4, 1)}"]
    rows: list[dict[str, Any]] = []
    baseline: dict[str, float] = {}
    for name, changes in variants.items():
        with tempfile.TemporaryDirectory() as folder:
            cfg = apply_overrides(config(), [*shared, *overrides, *changes, f"run_dir={folder}/run"])
            if not Trainer(cfg, build(cfg)).run()["finished"]:
                raise ValueError("stopped by a signal: trainings that are cut short do not make a table")
            figures = evaluate(Path(folder) / "run" / "model", count)
        baseline = baseline or figures
        print(f"{name:20}" + "".join(f"  {key} {figures[key]:.3f}" for key in METRIC_UNITS), flush=True)
        for key, unit in METRIC_UNITS.items():
            rows.append({"name": f"{name}: {key}", "value": figures[key], "unit": unit, "baseline": baseline[key]})
    return rows


def main() -> int:
    parser = OneLineParser(description="Measure image tokenizers on held-out pictures of the rendered world.")
    mode_group = parser.add_mutually_exclusive_group(required=True)
    mode_group.add_argument("--evaluate", metavar="FOLDER", help="a saved tokenizer")
    mode_group.add_argument(
        "--ablate",
        type=number_argument(1, 100_000_000),
        metavar="STEPS",
        help="train every variant that long and compare",
    )
    parser.add_argument("--count", type=number_argument(1, 100_000), default=1000, help="pictures (1000)")
    parser.add_argument("--image-source", choices=["scenes", "digits"], default="scenes", help="with --evaluate")
    parser.add_argument(
        "--grid", metavar="PNG", help="with --evaluate: also write pictures above their reconstructions"
    )
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument(
        "override", nargs="*", metavar="key=value", help="with --ablate: of the recipe, for all variants"
    )
    started = time.monotonic()
    try:
        options = parser.parse_args()
        if options.json:
            check_output(options.json, {".json": "JSON"})
        if options.grid:
            check_output(options.grid, {".png": "PNG"})
        if options.evaluate is not None:
            if options.override:
                raise ValueError(f"{options.override[0]} is of a training: give it with --ablate")
            check_input(options.evaluate, "unigen train recipes/tiny_vq.py run_dir=runs/vq", "--evaluate")
            figures = evaluate(options.evaluate, options.count, options.grid, options.image_source)
            rows: list[dict[str, Any]] = [
                {"name": name, "value": value, "unit": METRIC_UNITS.get(name.split()[-1], "")}
                for name, value in figures.items()
            ]
            for row in rows:
                print(f"{row['name']:16} {row['value']:9.3f} {row['unit']}")
        else:
            for key, _, value in (override.partition("=") for override in options.override):
                if key in INPUTS:
                    check_input(value, INPUTS[key], f"{key}=")
            rows = run_ablation(options.ablate, options.count, options.override)
        if options.json:
            write_report(
                options.json,
                command=shlex.join(["python", *sys.argv]),
                model=options.evaluate or "recipes/tiny_vq.py",
                seconds=time.monotonic() - started,
                tasks={row["name"]: row["value"] for row in rows},
                rows=rows,
            )
    except ValueError as error:
        print(f"unigen: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
