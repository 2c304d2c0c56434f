"""A model that draws classes, on real data that needs no download: handwritten digits, by next-scale and by flow.

    DIGITS="image_source=digits model.image_size=32 kl.image_size=32 time_limit=120"
    unigen train recipes/tiny_vq.py $DIGITS run_dir=runs/digits-vq
    unigen train recipes/tiny_vq.py $DIGITS tokenizer_kind=kl run_dir=runs/digits-kl
    unigen train recipes/tiny_vq.py $DIGITS model.quantizer=multiscale model.scales=1,2,4 model.code_dim=16
        run_dir=runs/digits-scales
    unigen train recipes/digits.py run_dir=runs/digits
    unigen eval digits --model runs/digits/model --generator flow

A small Llama reads one token, the class, and writes an image of 4x4 codes, three scales, or 4x4 latents; 15 minutes on
2 CPU cores. In a tenth of the documents the class is dropped, for guidance. The model has no words: `unigen generate
--class seven --model runs/digits/model`. docs/training.md has figures.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from transformers import LlamaConfig

from unigen import generators
from unigen.batch import Tokens
from unigen.config import OptimConfig, RunConfig
from unigen.data import digits
from unigen.data.packing import PackCollator, PackedDataset
from unigen.document import Document, Segment
from unigen.generators.flow import FlowConfig
from unigen.inference.engine import Engine
from unigen.media.output import image_grid
from unigen.model import assembly, chat_template
from unigen.model.unified import Template, UnifiedModel
from unigen.models import load
from unigen.tokenizers import load_image_tokenizer
from unigen.training.generator_setup import load_or_train_text_tokenizer, new_generators, normalize_generator_weights
from unigen.training.muon import MuonAdamW
from unigen.training.objectives import MultiGeneratorLoss
from unigen.training.train_spec import TrainSpec

INPUTS = {
    "image_tokenizer": "unigen train recipes/tiny_vq.py image_source=digits model.image_size=32 time_limit=120 "
    "run_dir=runs/digits-vq",
    "scale_tokenizer": "unigen train recipes/tiny_vq.py image_source=digits model.image_size=32 time_limit=120 "
    "model.quantizer=multiscale model.scales=1,2,4 model.code_dim=16 run_dir=runs/digits-scales",
    "kl_tokenizer": "unigen train recipes/tiny_vq.py image_source=digits kl.image_size=32 time_limit=120 "
    "tokenizer_kind=kl "
    "run_dir=runs/digits-kl",
}
"""Folders that fields name, and the commands that make them."""
INPUTS_OPTIONAL_WITH = ("init_from", "generators")
"""Keys with which the defaults of INPUTS need not be there."""


@dataclass
class DigitsRunConfig(RunConfig):
    """A run of this recipe."""

    RENAMED: ClassVar[dict[str, str]] = {"writers": "generators", "blind": "uncond_prob"}
    """Keys of version 0.1, and their names now."""

    image_tokenizer: str = "runs/digits-vq/model"
    """Folder of the tokenizer whose codes next-token and masked write."""
    scale_tokenizer: str | None = "runs/digits-scales/model"
    """Folder of a multi-scale tokenizer, for next-scale."""
    kl_tokenizer: str | None = "runs/digits-kl/model"
    """Folder of a KL tokenizer, for flow, transfusion and token-flow."""
    flow: FlowConfig = field(default_factory=lambda: FlowConfig(layers=3, heads=4, head_dim=32, context_length=8))
    """The head of flow."""
    width: int = 128
    """Of the backbone."""
    layers: int = 4
    """Of the backbone."""
    generators: dict[str, float] = field(default_factory=lambda: {"next-token": 1.0, "next-scale": 1.0, "flow": 1.0})
    """Share of the documents that each generator writes."""
    uncond_prob: float = 0.1
    """Share of the documents whose class is dropped, for guidance."""


def config() -> DigitsRunConfig:
    return DigitsRunConfig(
        steps=100_000,
        time_limit=480.0,
        batch_size=4,
        optim=OptimConfig(lr=2e-3, warmup_steps=100, min_lr_ratio=0.02, schedule="linear"),
        precision="auto",
        num_workers=1,
        save_every=500,
        sample_every=500,
        run_dir="runs/digits",
    )


class DigitDocumentSampler:
    """A class and one of its pictures."""

    def __init__(self, template: Template, size: int, cfg: DigitsRunConfig) -> None:
        self.template, self.size, self.uncond_prob = template, size, cfg.uncond_prob
        self.generators, self.generator_probs = zip(*normalize_generator_weights(cfg.generators).items(), strict=True)
        self.images, self.labels = digits.load_split(held_out=False)

    def __call__(self, rng: np.random.Generator) -> Tokens:
        i = int(rng.integers(len(self.labels)))
        picture = Segment(image=digits.to_rgb_image(self.images[i], self.size), role="assistant")
        document = Document([Segment(label=int(self.labels[i])), picture])
        generator = self.generators[int(rng.choice(len(self.generator_probs), p=self.generator_probs))]
        return self.template.encode(document, uncond=bool(rng.random() < self.uncond_prob), generator=generator)


def new_model(cfg: DigitsRunConfig) -> UnifiedModel:
    image_tokenizer = load_image_tokenizer(cfg.image_tokenizer)
    classes = tuple(chat_template.class_token(i) for i in range(len(digits.NAMES)))
    lines = [chat_template.normalize_text(name) for name in digits.NAMES] * 20
    text_tokenizer = load_or_train_text_tokenizer(
        Path(cfg.run_dir) / "text_tokenizer", lines, 320, (*chat_template.SPECIAL_TOKENS, *classes)
    )
    shape = LlamaConfig(
        hidden_size=cfg.width,
        num_hidden_layers=cfg.layers,
        num_attention_heads=4,
        intermediate_size=3 * cfg.width,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    torch.manual_seed(cfg.seed)
    return assembly.build_from_config(shape, text_tokenizer, image_tokenizer, classes=digits.NAMES)


def build(cfg: DigitsRunConfig) -> TrainSpec:
    shares = normalize_generator_weights(cfg.generators)
    model = load(cfg.init_from) if cfg.init_from else new_model(cfg)
    torch.manual_seed(cfg.seed)
    tokenizer_kinds = {generators.find_generator(name).tokenizer_kind for name in shares if name not in model.heads}
    folders = {"multiscale": cfg.scale_tokenizer, "kl": cfg.kl_tokenizer}
    folders = {kind: folder for kind, folder in folders.items() if kind in tokenizer_kinds}
    model = assembly.add_generators(model, tuple(shares), new_generators(model, shares, folders, {"flow": cfg.flow}))
    size = model.image_tokenizer.image_size
    return TrainSpec(
        model=model,
        dataset=PackedDataset(DigitDocumentSampler(model.template, size, cfg), 256, cfg.seed),
        collate=PackCollator(256, size),
        objective=MultiGeneratorLoss(model.generators, shares),
        make_optimizer=lambda model, cfg: MuonAdamW(model, cfg.optim),
        write_samples=sample,
        save_model=lambda model, folder: model.save(folder),
    )


def sample(model: UnifiedModel, step: int, folder: Path) -> None:
    """All digits, a row for each way of writing."""
    engine, count = Engine(model.inference_copy()), len(digits.NAMES)
    rows = [
        engine.generate_batch(range(count), [0] * count, generator=name, guidance=2.0)
        for name in engine.info()["generators"]
    ]
    sheet = image_grid([picture for row in rows for picture in row], 0, count)
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(folder / f"{step:06d}.png")
