"""The family of models assembled here (`unigen.model.assembly`) and trained by our own recipes: any decoder-only
language model of transformers, whose vocabulary has grown by special tokens and image codes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unigen import generators
from unigen.generators.build import load_generator, load_generator_lazily
from unigen.generators.next_token import Text
from unigen.hub.resolve import CONFIG, MANIFEST, read_json
from unigen.hub.weights import load_strict, read_tensors
from unigen.model.assembly import build_context, build_model
from unigen.model.unified import UnifiedModel
from unigen.nn.cpu.llama import InferenceLlama
from unigen.tokenizers import load_image_tokenizer
from unigen.tokenizers import text as text_tokenizers

DTYPE_FIXED = True
"""Whether models are held in float32 whatever the machine is fast in."""
SAMPLING_FROM_MANIFEST = True
"""Whether unigen.json says how text is sampled, and not generation_config.json."""


def causal_lm(model: UnifiedModel) -> Any:
    """It is one: codes are further rows of its table."""
    return model.backbone.lm


def matches(folder: Path, config: Mapping[str, Any]) -> bool:
    """Its folders say so in their unigen.json."""
    return False


def load(folder: Path, dtype: torch.dtype | None = None, inference: bool = False) -> UnifiedModel:
    """The model saved in `folder`, strictly: no tensor missing, none left over.

    Args:
        dtype: None is float32.
        inference: may it be a model that only reads and answers? transformers is then not imported where its language
            model is a Llama, and generators with weights are loaded when they are first asked for.
    """
    manifest = read_json(folder / MANIFEST)
    image_tokenizer = load_image_tokenizer(folder / "image_tokenizer")
    state = read_tensors(folder / "model.safetensors")
    config = read_json(folder / CONFIG)
    lm: Any
    if inference and InferenceLlama.readable(config):
        tokenizer: Any = text_tokenizers.InferenceTokenizer(folder)
        lm = InferenceLlama(config)
    else:
        from transformers import AutoConfig, AutoModelForCausalLM

        tokenizer = text_tokenizers.load_from_model(folder)
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        lm = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    if lm.config.tie_word_embeddings:
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    load_strict(lm, state, folder / "model.safetensors")
    names = [name for name in manifest["generators"] if name != Text.name]
    context = build_context(lm, tokenizer, image_tokenizer)
    generator_classes = {name: generators.find_generator(name) for name in names}
    with_weights = [name for name, kind in generator_classes.items() if issubclass(kind, nn.Module)]
    factories = {
        name: partial(load_generator_lazily, folder / name, context)
        for name in with_weights
        if inference and not generator_classes[name].uses_positions and (folder / name).is_dir()
    }
    heads = [load_generator(folder / name, context) for name in with_weights if name not in factories]
    begin_tokens, classes = manifest.get("begins"), manifest.get("classes", ())
    parts = lm.float(), tokenizer, image_tokenizer, int(manifest["text_size"])
    model = build_model(*parts, names, heads, begin_tokens, classes, factories)
    return model.to(dtype or torch.float32)


load_for_inference = partial(load, inference=True)
