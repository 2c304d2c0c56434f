"""Build or load generators by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from unigen import generators
from unigen.generators.base import BuildContext, Generator
from unigen.hub.resolve import read_json, wrap_load_errors
from unigen.hub.weights import load_strict, read_tensors
from unigen.tokenizers import load_image_tokenizer


def build_generator(name: str, context: BuildContext) -> Generator:
    """Build an untrained generator.

    Args:
        name: of the generator, such as "next-token".
        context: sizes and ids of the model, the generator's own tokenizer and settings.

    Returns:
        The generator, with random weights.

    Raises:
        ValueError: the name is unknown, or the generator needs an image tokenizer of its own and `context` has none.
    """
    generator_class = generators.find_generator(name)
    kind = generator_class.tokenizer_kind
    if kind is not None and context.tokenizer is None:
        option = "tokenizer_kind=kl" if kind == "kl" else f"model.quantizer={kind}"
        raise ValueError(
            f"{name} needs an image tokenizer of its own: unigen train recipes/tiny_vq.py {option} makes one"
        )
    generator: Generator = generator_class.from_context(context)
    return generator


def load_generator(folder: Path, context: BuildContext) -> Generator:
    """Load a generator with weights.

    Args:
        folder: as `UnifiedModel.save` wrote it; its name is the generator's.
        context: sizes and ids of the model. Tokenizer and settings come from the folder.

    Returns:
        The generator, a `unigen.generators.base.GeneratorHead`.

    Raises:
        ValueError: a file is missing, or the weights do not fit.
    """
    settings = read_json(folder / "config.json")
    tokenizer = (
        load_image_tokenizer(folder / "tokenizer") if generators.find_generator(folder.name).tokenizer_kind else None
    )
    head: Any = build_generator(folder.name, replace(context, tokenizer=tokenizer, settings=settings))
    frozen = {} if tokenizer is None else {f"tokenizer.{name}": value for name, value in tokenizer.state_dict().items()}
    load_strict(head, frozen | read_tensors(folder / "model.safetensors"), folder / "model.safetensors")
    return head


def load_generator_lazily(folder: Path, context: BuildContext) -> Generator:
    """`load_generator` for a factory that runs after the model is loaded: errors name the folder.

    Args:
        folder: as for `load_generator`.
        context: as for `load_generator`.

    Returns:
        The generator.

    Raises:
        ValueError: a file is missing, or the weights do not fit.
    """
    with wrap_load_errors(folder):
        return load_generator(folder, context)
