"""What recipes that train several generators share: weights by name, and generators that the model does not have yet.

    shares = normalize_generator_weights({"next-token": 1.0, "flow": 1.0})                  # each 0.5
    heads = new_generators(model, shares, {"kl": "runs/kl/model"}, {"flow": FlowConfig(layers=2)})

Does not depend on: which generators there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from unigen import generators
from unigen.config import to_dict
from unigen.generators import build
from unigen.hub.folders import replacing_folder
from unigen.model import assembly
from unigen.model.unified import UnifiedModel
from unigen.options import DEFAULT_GENERATOR
from unigen.tokenizers import load_image_tokenizer, text
from unigen.training.peers import main_process_first

if TYPE_CHECKING:
    from unigen.generators.base import Generator


def normalize_generator_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """Normalize the shares of generators in a mixture.

    Args:
        weights: share of each generator by name, at least 0; that of next-token, as which pictures are read, above 0.

    Returns:
        Shares with a sum of 1, next-token first; generators with a share of 0 are left out.

    Raises:
        ValueError: a name is unknown, a share is below 0, or next-token has none.
    """
    for name in weights:
        generators.find_generator(name)
    if min(weights.values(), default=0) < 0 or weights.get(DEFAULT_GENERATOR, 0) <= 0:
        raise ValueError("generators are shares of at least 0, and that of next-token, as which all are read, above 0")
    # the order does not depend on that of `weights`
    ordered = sorted(weights.items(), key=lambda item: (item[0] != DEFAULT_GENERATOR, item[0]))
    return {name: share / sum(weights.values()) for name, share in ordered if share > 0}


def load_or_train_text_tokenizer(folder: Path, lines: Iterable[str], vocab_size: int, specials: tuple[str, ...]) -> Any:
    """Load the Hugging Face tokenizer of a folder. Where there is none, the main process of the run trains it first.

    Args:
        folder: of the tokenizer.
        lines: text that it is trained on.
        vocab_size: the most tokens of text.
        specials: symbols that are never split.

    Returns:
        The tokenizer.

    Raises:
        ValueError: the tokenizer cannot be trained or loaded; in one line.
    """
    with main_process_first():
        if not (folder / "tokenizer.json").exists():
            print(f"{folder}: training a text tokenizer", flush=True)
            with replacing_folder(folder) as scratch:
                text.train_tokenizer(lines, scratch, vocab_size, specials)
        return text.load(folder)


def new_generators(
    model: UnifiedModel,
    generator_weights: Mapping[str, float],
    tokenizer_folders: Mapping[str, str | None],
    generator_configs: Mapping[str, Any],
) -> list[Generator]:
    """Build the generators of a mixture that have weights of their own and are not in the model yet.

    Args:
        model: the model to be trained.
        generator_weights: share of each generator by name, as `normalize_generator_weights` returns them.
        tokenizer_folders: folders of image tokenizers by kind; None for those that are not needed.
        generator_configs: configurations (dataclasses) by generator; None or missing: the default.

    Returns:
        The generators, untrained.

    Raises:
        ValueError: a folder is missing or not used, or a configuration differs from that of a generator that the model
            already has.
    """
    context = assembly.build_context(model.backbone.lm, model.text_tokenizer, model.image_tokenizer)
    heads: list[Generator] = []
    for name in generator_weights:
        generator, config = generators.find_generator(name), generator_configs.get(name)
        if name in model.heads:
            if config is not None and config not in (type(config)(), model.heads[name].settings):
                raise ValueError(f"the {name} of this model has another shape: leave its settings out")
        elif issubclass(generator, nn.Module):
            folder = tokenizer_folders.get(generator.tokenizer_kind)
            tokenizer = load_image_tokenizer(folder) if folder else None
            own_context = replace(context, tokenizer=tokenizer, settings={} if config is None else to_dict(config))
            heads.append(build.build_generator(name, own_context))
    used_kinds = {head.tokenizer_kind for head in heads}
    if unused_kinds := [kind for kind, folder in tokenizer_folders.items() if folder and kind not in used_kinds]:
        raise ValueError(
            f"no new generator takes a tokenizer of kind {', '.join(unused_kinds)}: set its folder to none"
        )
    return heads
