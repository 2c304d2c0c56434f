"""Model folders: a language model of transformers with the other parts of a unified model beside it.

FOLDER/                      config.json, model.safetensors, tokenizer.json: AutoModelForCausalLM loads it
FOLDER/unigen.json           family, sizes of the vocabulary, generators, sampling
FOLDER/image_tokenizer/      encodes pictures as codes
FOLDER/backbone/             weights of the backbone beside the language model's, if any
FOLDER/vision_encoder/       the vision encoder, if any; sight/ in folders of version 0.1
FOLDER/GENERATOR/            a generator with weights, and its own image tokenizer in tokenizer/, if any
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unigen.hub.folders import replacing_folder
from unigen.hub.resolve import MANIFEST
from unigen.hub.weights import silence_transformers, write_tensors
from unigen.model.readers import VisionEncoder
from unigen.nn.backbone import Backbone
from unigen.tokenizers import ImageTokenizer, save_tokenizer, text
from unigen.utils.files import save_json

VISION_FOLDER = "vision_encoder"
OLD_VISION_FOLDER = "sight"
"""The name of `VISION_FOLDER` in folders of version 0.1."""


@dataclass(frozen=True)
class ModelParts:
    """The contents of a model folder."""

    backbone: Backbone
    """The language model, and weights beside it."""
    text_tokenizer: Any
    """The tokenizer of transformers; None for models that read no words."""
    image_tokenizer: ImageTokenizer
    """Encodes pictures as codes of the vocabulary."""
    vision_encoder: VisionEncoder | None
    """Encodes the pictures of prompts; None where their codes are read."""
    heads: Mapping[str, Any]
    """Generators with weights, by name."""
    manifest: Mapping[str, object]
    """The contents of unigen.json."""


def save_parts(folder: str | Path, parts: ModelParts, dtype: torch.dtype | None = None) -> None:
    """Write a model folder. The old one, if any, is replaced when the new one is whole.

    Args:
        folder: where to write.
        parts: its contents.
        dtype: of the weights; None: as they are.
    """
    with replacing_folder(folder) as scratch:
        lm = parts.backbone.lm
        if dtype is not None:
            lm = copy.deepcopy(lm).to(dtype)
        with silence_transformers():
            lm.save_pretrained(scratch)
        if parts.text_tokenizer is not None:
            text.save(parts.text_tokenizer, scratch)
        save_tokenizer(parts.image_tokenizer, scratch / "image_tokenizer", dtype=dtype)
        extra_state = {k: v for k, v in parts.backbone.state_dict().items() if not k.startswith("lm.")}
        if extra_state:
            (scratch / "backbone").mkdir()
            write_tensors(scratch / "backbone" / "model.safetensors", extra_state, dtype)
        if parts.vision_encoder is not None:
            (scratch / VISION_FOLDER).mkdir()
            write_tensors(scratch / VISION_FOLDER / "model.safetensors", parts.vision_encoder.state_dict(), dtype)
            save_json(scratch / VISION_FOLDER / "config.json", parts.vision_encoder.config())
        for name, head in parts.heads.items():
            (scratch / name).mkdir()
            if head.tokenizer is not None and head.tokenizer is not parts.image_tokenizer:
                save_tokenizer(head.tokenizer, scratch / name / "tokenizer", dtype=dtype)
            head_state = {k: v for k, v in head.state_dict().items() if not k.startswith("tokenizer.")}
            write_tensors(scratch / name / "model.safetensors", head_state, dtype)
            save_json(scratch / name / "config.json", head.config())
        save_json(scratch / MANIFEST, dict(parts.manifest))


def vision_folder(folder: Path) -> Path:
    """The folder of the vision encoder in a model folder, by its name of today or of version 0.1."""
    return folder / (VISION_FOLDER if (folder / VISION_FOLDER).is_dir() else OLD_VISION_FOLDER)
