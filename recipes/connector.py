"""A small network that joins a model that reads to a diffusers pipeline by hidden states; both are frozen.

    unigen train recipes/connector.py lmm=Qwen/Qwen3-VL-2B-Instruct
        image_model=stable-diffusion-v1-5/stable-diffusion-v1-5 run_dir=runs/connector
    unigen generate "two apples" --lmm Qwen/Qwen3-VL-2B-Instruct
        --model stable-diffusion-v1-5/stable-diffusion-v1-5 --connector runs/connector/model

It needs one GPU that holds the language model and the whole pipeline, which draws the samples. The losses fall towards
0, where the pipeline draws what it would by its own text encoder. Only small models with random weights have been
trained (tests/test_connector.py).

The loss is GILL's (Koh et al. 2023, arXiv 2305.17216): what the connector makes of a caption of the rendered world, as
the language model reads it, is to be what the pipeline's own text encoder makes of the caption. Each loss is a relative
squared error, sum (y - y*)^2 / sum y*^2, so that encoders of any scale learn alike. No image is drawn and no gradient
goes through either model, so it is cheap. With `image_share` above 0 a share of the captions is read as the images that
they describe.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy
from torch.nn.utils.rnn import pad_sequence

from unigen.backends.connector import (
    ConnectedDiffusersEngine,
    Connector,
    connector_config,
    encode_prompt,
    load_connector,
    require_pipeline,
)
from unigen.backends.diffusers_engine import DiffusersEngine
from unigen.config import OptimConfig, RunConfig
from unigen.document import Document
from unigen.loading import load_composed
from unigen.media.output import image_grid
from unigen.toyworld import captions, scenes
from unigen.training.train_spec import TrainSpec

SIZE = 256
"""Of the rendered pictures in pixels."""


@dataclass
class ConnectorRunConfig(RunConfig):
    """A run of this recipe. With `init_from`, `width`, `layers` and `heads` have to be that connector's."""

    RENAMED: ClassVar[dict[str, str]] = {
        "generator": "image_model",
        "pictures": "image_share",
        "length": "max_prompt_length",
    }
    """Keys of version 0.1, and their names now."""

    lmm: str = ""
    """Name or folder of the model that reads."""
    image_model: str = ""
    """Name or folder of the diffusers pipeline."""
    image_share: float = 0.0
    """Share of the captions that are read as images, in [0, 1]."""
    max_prompt_length: int = 128
    """Embeddings of a prompt, for pipelines that take any number."""
    width: int = 512
    """Of the connector."""
    layers: int = 4
    """Of the connector."""
    heads: int = 8
    """Of the connector."""


def config() -> ConnectorRunConfig:
    return ConnectorRunConfig(
        steps=20_000,
        batch_size=16,
        optim=OptimConfig(lr=3e-4, warmup_steps=200, min_lr_ratio=0.05),
        precision="fp32",
        num_workers=1,
        save_every=1000,
        sample_every=1000,
        run_dir="runs/connector",
    )


class CaptionDataset:
    """What is read, and in which words it is told; endless, a function of the seed and the index."""

    def __init__(self, seed: int, image_share: float) -> None:
        self.seed, self.image_share = seed, image_share
        self.world: scenes.SceneRenderer | None = None

    def __getitem__(self, index: int) -> tuple[Document, str]:
        rng = np.random.default_rng((self.seed, index))
        scene = scenes.sample_scene(rng, SIZE)
        write_caption = captions.short_caption if rng.random() < 0.5 else captions.descriptive_caption
        words = write_caption(scene, rng)
        if rng.random() >= self.image_share:
            return Document.of(words), words
        self.world = self.world or scenes.SceneRenderer(SIZE)
        return Document.of(Image.fromarray(self.world.render(scene).image)), words


class ConnectorObjective(nn.Module):
    """Relative squared error of the connector's embeddings, and of the pooled ones, where the pipeline's own count, and
    the cross entropy (nats) of which count, where that is not all of them."""

    def __init__(self, lmm: Any, pipe: Any) -> None:
        super().__init__()
        self.lmm, self.pipe = lmm, pipe
        parts = [lmm.model, *pipe.components.values()]
        self.frozen_modules = (
            nn.ModuleList(part for part in parts if isinstance(part, nn.Module)).requires_grad_(False).eval()
        )

    def forward(
        self, connector: Any, batch: list[tuple[Document, str]], rng: torch.Generator
    ) -> dict[str, tuple[Tensor, Tensor | int]]:
        variable_length, length = connector.config.variable_length, connector.config.max_length
        states = [self.lmm.hidden_states(document).float() for document, _ in batch]
        targets = [encode_prompt(self.pipe, words) for _, words in batch]
        if not variable_length and any(target.embeds_MND.shape[1] != length for target in targets):
            raise ValueError(
                f"this pipeline's prompts are not all of {length} embeddings: a connector cannot predict them"
            )
        embeds = [target.embeds_MND[0, :length] for target in targets]
        mask_BL = padding_mask(embeds, length)
        prediction_BLW, pooled_BP, counts_BL = connector(pad_sequence(states, batch_first=True), padding_mask(states))
        losses: dict[str, tuple[Tensor, Tensor | int]] = {
            "embeds": relative_squared_error(prediction_BLW[mask_BL], torch.cat(embeds))
        }
        if pooled_BP is not None:
            pooled = [target.pooled_MP for target in targets if target.pooled_MP is not None]
            losses["pooled"] = relative_squared_error(pooled_BP, torch.cat(pooled))
        if counts_BL is not None:
            losses["counts"] = cross_entropy(counts_BL, mask_BL.float(), reduction="sum"), counts_BL.numel()
        return losses


def padding_mask(parts: list[Tensor], length: int | None = None) -> Tensor:
    """Where parts of several lengths (B, length) are not padding; length: None is the longest."""
    counts_B1 = torch.tensor([[len(part)] for part in parts], device=parts[0].device)
    return torch.arange(length or int(counts_B1.max()), device=parts[0].device) < counts_B1


def relative_squared_error(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return (prediction.float() - target.float()).square().sum(), target.float().square().sum()


def new_or_loaded_connector(cfg: ConnectorRunConfig, lmm: Any, pipe: Any) -> Connector:
    """The connector that `init_from` names, or a new one of the models' widths."""
    if not cfg.init_from:
        return Connector(
            replace(
                connector_config(lmm, pipe, cfg.max_prompt_length), width=cfg.width, layers=cfg.layers, heads=cfg.heads
            )
        )
    connector = load_connector(cfg.init_from)
    config = connector.config
    keys = {"width": "width", "layers": "layers", "heads": "heads"}
    keys |= {"max_length": "max_prompt_length"} if config.variable_length else {}
    if mismatches := [
        f"{key}={getattr(config, name)}" for name, key in keys.items() if getattr(config, name) != getattr(cfg, key)
    ]:
        raise ValueError(f"the connector {cfg.init_from} is of another size: give {' '.join(mismatches)}")
    return connector


def build(cfg: ConnectorRunConfig) -> TrainSpec:
    if not cfg.lmm or not cfg.image_model:
        raise ValueError("name both models: lmm=, one that reads, and image_model=, a diffusers pipeline")
    if not 0 <= cfg.image_share <= 1:
        raise ValueError(f"image_share is from 0 to 1, not {cfg.image_share}")
    engine = load_composed(cfg.lmm, cfg.image_model, device="cpu")  # the trainer takes them to its device
    pipe, lmm = require_pipeline(engine.image_engine), engine.text_engine
    torch.manual_seed(cfg.seed)
    connector = new_or_loaded_connector(cfg, lmm, pipe)
    ConnectedDiffusersEngine(pipe, lmm, connector)  # does it fit?

    def sample(model: Connector, step: int, folder: Path) -> None:
        """Held-out captions: above by the pipeline's own text encoder, below by the connector."""
        words = [CaptionDataset(cfg.seed + 1, 0.0)[i][1] for i in range(4)]
        engines = DiffusersEngine(pipe), ConnectedDiffusersEngine(pipe, lmm, model)
        images = [painter.generate(target, steps=20, seed=0) for painter in engines for target in words]
        image_grid(images, 0, len(words)).save(folder / f"{step:06d}.png")

    return TrainSpec(
        model=connector,
        dataset=CaptionDataset(cfg.seed, cfg.image_share),
        collate=list,
        objective=ConnectorObjective(lmm, pipe),
        write_samples=sample,
        save_model=lambda model, folder: model.save(folder),  # type: ignore[operator]
    )
