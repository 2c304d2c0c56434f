"""A model that reads joined to a pipeline by hidden states: trained on small parts made here, an adapter draws what the
pipeline's own text encoder does; what does not fit is one clear line."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import unigen
from unigen import cli
from unigen.adapters import AdaptedPipeline, Adapter, AdapterConfig, embed, load_adapter
from unigen.config import apply_overrides
from unigen.pipelines import PipelineEngine
from unigen.sequence import Document
from unigen.training.trainer import Trainer

RED, BLUE = (Image.new("RGB", (32, 32), color) for color in ("red", "blue"))
ASKED: list[tuple[Any, str]] = [
    ("a red dog", "a red dog"),
    ("a blue hill", "a blue hill"),
    ([RED, "a dog"], "a red dog on a hill"),
    ([BLUE, "a dog"], "a blue dog on a hill"),
]
"""What is read, and the words of which the pipeline's own embeddings are to come out."""
SMALL: dict[str, Any] = {"steps": 3, "size": (32, 32), "guidance": 4.0}
BRIEF = ["width=64", "layers=2", "heads=4", "optim.lr=3e-3", "optim.warmup=10", "optim.weight_decay=0", "ema=0"]
BRIEF += ["sample_every=0", "save_every=0", "workers=0", "batch_size=4", "log_every=100"]


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("adapter_recipe", "recipes/adapter.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def train(recipe: ModuleType) -> Callable[..., dict[str, Any]]:
    """The recipe on a few documents; gives the last metrics."""

    def run(lmm: Path, generator: Path, run_dir: Path, *more: str, asked: Any = ASKED) -> dict[str, Any]:
        given = [*BRIEF, f"lmm={lmm}", f"generator={generator}", f"run_dir={run_dir}", *more]
        cfg = apply_overrides(recipe.config(), given)
        rows = [(Document.of(read), words) for read, words in asked]
        return Trainer(cfg, replace(recipe.build(cfg), dataset=rows)).run()

    return run


@pytest.fixture(scope="module")
def joined(janus_folder: Path, words_folder: Path, tmp_path_factory: Any, train: Any) -> Path:
    """An adapter of Janus and Stable Diffusion that knows what is asked here."""
    folder = tmp_path_factory.mktemp("joined")
    metrics = train(janus_folder, words_folder, folder, "steps=400")
    print(metrics)
    return folder / "model"


def apart(one: Image.Image, other: Image.Image) -> float:
    """The mean difference of two pictures, of 255."""
    return float(np.abs(np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).mean())


def test_an_adapter_draws_what_the_text_encoder_does(janus_folder: Path, words_folder: Path, joined: Path) -> None:
    """And an untrained one does not."""
    pair = unigen.load(device="cpu", lmm=str(janus_folder), generator=str(words_folder), adapter=str(joined))
    torch.manual_seed(0)
    other = AdaptedPipeline(pair.painter.pipe, pair.lmm, Adapter(load_adapter(joined).config))
    own = PipelineEngine(pair.painter.pipe)
    for read, words in ASKED:
        true = own.generate(words, seed=3, **SMALL)
        print(apart(pair.generate(read, seed=3, **SMALL), true), apart(other.generate(read, seed=3, **SMALL), true))
