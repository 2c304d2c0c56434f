"""The family of models that are assembled here (`unigen.model.assembly`) and trained by our own recipes.

The backbone is any decoder-only language model of transformers. Its vocabulary is extended by special tokens and image
codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from unigen import generators
from unigen.generators.build import load_generator, load_generator_lazily
from unigen.generators.next_token import Text
from unigen.hub.resolve import CONFIG, read_json, read_manifest
from unigen.hub.weights import load_strict, read_tensors
from unigen.model.assembly import build_context, build_model
from unigen.model.unified import UnifiedModel
from unigen.nn.cpu.llama import InferenceLlama
from unigen.tokenizers import load_image_tokenizer
from unigen.tokenizers import text as text_tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPE_FIXED = True
"""Whether weights stay in float32, whichever precision the machine is fast in."""
SAMPLING_FROM_MANIFEST = True
"""Whether defaults for sampling text come from unigen.json, and not from generation_config.json."""


def causal_lm(model: UnifiedModel) -> PreTrainedModel:
    """The language model itself: codes are further rows of its table."""
    return model.backbone.lm


def matches(folder: Path, config: Mapping[str, object]) -> bool:
    """False: folders of this family have a unigen.json, which names it."""
    return False


def load(folder: Path, dtype: torch.dtype | None = None, inference: bool = False) -> UnifiedModel:
    """Load the model saved in a folder. No tensor may be missing or left over.

    Args:
        folder: as `UnifiedModel.save` writes it.
        dtype: of the weights; None: float32.
        inference: allow a model that is not trained. A Llama then runs without importing transformers, and generators
            with weights are loaded when they are first used.
    """
    manifest = read_manifest(folder)
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
    weighted_names = [name for name, kind in generator_classes.items() if issubclass(kind, nn.Module)]
    factories = {
        name: partial(load_generator_lazily, folder / name, context)
        for name in weighted_names
        if inference and not generator_classes[name].uses_positions and (folder / name).is_dir()
    }
    heads = [load_generator(folder / name, context) for name in weighted_names if name not in factories]
    begin_tokens, classes = manifest.get("begin_tokens"), manifest.get("classes", ())
    parts = lm.float(), tokenizer, image_tokenizer, int(manifest["text_size"])
    model = build_model(*parts, names, heads, begin_tokens, classes, factories)
    return model.to(dtype or torch.float32)


load_for_inference = partial(load, inference=True)
