"""Loads diffusers pipelines from folders, strictly and from safetensors alone.

    if is_pipeline(folder):
        engine = load(folder, "cuda", torch.bfloat16)

Does not depend on: how a pipeline generates.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from unigen.backends.diffusers_engine import DiffusersEngine
from unigen.backends.diffusers_support import (
    pipeline_class,
    unsupported_reason,
)
from unigen.backends.glm_image import GlmImageEngine
from unigen.hub.resolve import CONFIG, SAFETENSORS_PATTERNS, read_json, weights_variant
from unigen.hub.weights import silence_transformers, strict_from_pretrained
from unigen.utils.text import first_line

if TYPE_CHECKING:
    from unigen.backends.diffusers_support import Pipeline

MODEL_INDEX = "model_index.json"


def is_pipeline(folder: Path) -> bool:
    """Whether the folder holds a diffusers pipeline."""
    return (folder / MODEL_INDEX).is_file()


def check_pipeline_class(folder: Path) -> type[Pipeline]:
    """The class of the pipeline in a folder, read from its index alone, without its weights.

    Args:
        folder: of the pipeline.

    Returns:
        A class of diffusers.

    Raises:
        ValueError: where diffusers has no such class, or pipelines of this class cannot draw here.
    """
    kind = pipeline_class(read_json(folder / MODEL_INDEX))
    if reason := unsupported_reason(kind):
        raise ValueError(f"{kind.__name__} cannot be used here: {reason}")
    return kind


def check_components(folder: Path, kind: type[Pipeline]) -> None:
    """Check that each component of the index has a folder (diffusers would make some of them up) with safetensors.

    Args:
        folder: of the pipeline.
        kind: the pipeline's class.

    Raises:
        ValueError: in one line, for a component without a folder or without weights in safetensors.
    """
    for name, part in read_json(folder / MODEL_INDEX).items():
        if name.startswith("_") or not isinstance(part, list) or len(part) != 2 or not isinstance(part[1], str):
            continue
        if not (folder / name).is_dir():
            is_optional = name in kind._optional_components
            hint = f", or write [null, null] for {name} in {MODEL_INDEX} to do without" if is_optional else ""
            raise ValueError(f"{folder} has no folder {name}/ with its {part[1]}: fetch it{hint}")
        if (folder / name / CONFIG).is_file() and not any((folder / name).glob(SAFETENSORS_PATTERNS[0])):
            raise ValueError(f"{folder / name} has no weights in safetensors, and no pickles are read for pipelines")


def disabled_components(folder: Path) -> dict[str, None]:
    """The components for which the index says [null, null], such as the T5 of Stable Diffusion 3, as keywords of
    `from_pretrained`."""
    return {name: None for name, part in read_json(folder / MODEL_INDEX).items() if part == [None, None]}


def check_all_loaded(pipe: Pipeline) -> None:
    """Check that all weights were in the folder: diffusers leaves others on the meta device.

    Args:
        pipe: the loaded pipeline.

    Raises:
        ValueError: in one line, with the first of the missing weights.
    """
    for name, part in pipe.components.items():
        weights = part.named_parameters() if isinstance(part, torch.nn.Module) else ()
        if missing_weights := [weight for weight, value in weights if value.is_meta]:
            raise ValueError(
                f"its {name} lacks {len(missing_weights)} tensors ({', '.join(missing_weights[:4])}): download it again"
            )


def load(folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> DiffusersEngine:
    """Load a pipeline, from safetensors alone. No code of the folder is run.

    Args:
        folder: of the pipeline.
        device: where its weights lie.
        dtype: of its weights; None is float32.

    Returns:
        An engine.

    Raises:
        ValueError: in one line, for a pipeline that is damaged or cannot draw here.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    check_components(folder, check_pipeline_class(folder))
    level = logging.get_verbosity()
    try:
        with silence_transformers(), strict_from_pretrained():
            logging.disable_progress_bar()
            logging.set_verbosity(logging.CRITICAL)
            pipe = DiffusionPipeline.from_pretrained(
                folder,
                dtype=dtype or torch.float32,
                local_files_only=True,
                use_safetensors=True,
                variant=weights_variant(folder),
                **disabled_components(folder),
            )
            check_all_loaded(pipe)
    except Exception as error:  # a damaged component can raise any error of its library
        raise ValueError(f"pipeline {folder} cannot be loaded: {first_line(error)}") from error
    finally:
        logging.set_verbosity(level)
    kind = GlmImageEngine if type(pipe).__name__ == "GlmImagePipeline" else DiffusersEngine
    return kind(pipe.to(device))
