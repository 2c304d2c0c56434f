"""Loads models as engines: one model, ours or public, a pipeline, two models composed, or a model on vLLM."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from unigen.utils.keyword_renames import keyword_renames
from unigen.utils.text import shorten

if TYPE_CHECKING:
    import torch

    from unigen.backends.composed import ComposedEngine
    from unigen.inference.engine import Engine
    from unigen.inference.protocol import InferenceEngine

BACKENDS = ("local", "vllm")
DEFAULT_MODEL = "unigen-tiny"
"""The shipped model."""


@keyword_renames(adapter="connector", generator="image_model")
def load(
    name: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    *,
    quantization: str | None = None,
    lmm: str | None = None,
    image_model: str | None = None,
    connector: str | None = None,
    engine: str = "local",
    vllm: dict[str, object] | None = None,
) -> InferenceEngine:
    """Load a model, and return an engine that generates with it.

    Args:
        name: a shipped model ("unigen-tiny" where nothing is given), a folder, or `owner/name[@revision]` on the hub: a
            model of ours, a public checkpoint, or a diffusers pipeline.
        device: "cpu", "cuda", ...; None is a GPU where there is one.
        dtype: "float32", "bfloat16" or "float16". None is float32 for our own models and for pipelines, and as stored
            for other public models, but float32 on a CPU that is slow in that (`unigen.utils.precision.load_dtype`).
        quantization: "8bit" or "4bit", for the weights of the language model, or of both composed ones; all else is as
            dtype says.
        lmm: instead of `name`, a model that reads and answers in text; it writes the prompts for `image_model`
            (`unigen.backends.composed`).
        image_model: the model that generates images for `lmm`.
        connector: a folder of a connector, by which the pipeline `image_model` is conditioned on the hidden states of
            `lmm` (`unigen.backends.connector`).
        engine: "local", or "vllm" to run the language model of `name` on vLLM (`unigen.backends.vllm_engine`).
        vllm: arguments of vLLM's engine, such as {"max_model_len": 4096}.

    Returns:
        An engine: `unigen.Engine` for one model of ours or a public family, or another that keeps the same contract.

    Raises:
        ValueError: in one line, for an unknown model, a damaged folder, or a device or package that is not there.
    """
    check_dtype(dtype)
    check_names(name=name, lmm=lmm, image_model=image_model, connector=connector)
    if vllm is not None and not isinstance(vllm, dict):
        raise ValueError(f"vllm must be a dict of arguments of vLLM's engine, not {shorten(vllm)}")
    placement = resolve_placement(device, dtype, quantization)
    if not isinstance(engine, str) or engine not in BACKENDS:
        raise ValueError(f"unknown engine {shorten(engine)}: one of {', '.join(BACKENDS)}")
    if engine == "vllm":
        if lmm or image_model or connector or quantization:
            raise ValueError("vLLM serves one model as it is: leave lmm, image_model, connector and quantization out")
        from unigen.backends import vllm_engine

        return vllm_engine.load(name or DEFAULT_MODEL, placement.device, placement.dtype, vllm)
    if vllm:
        raise ValueError("arguments of vLLM's engine are for engine vllm: leave them out")
    placement.check_quantization()
    if lmm is None and image_model is None and connector is None:
        return load_one(name or DEFAULT_MODEL, placement)
    if lmm is None or image_model is None or name is not None:
        raise ValueError("give one name, or both lmm, which reads, and image_model, which draws")
    return _load_composed(lmm, image_model, connector, placement)


def load_local(
    name: str = DEFAULT_MODEL, device: str | None = None, dtype: str | None = None, *, quantization: str | None = None
) -> Engine:
    """Load one model of ours or of a public family as `unigen.Engine`, for what works on the model itself.

    Args:
        name: a shipped model, a folder, or `owner/name[@revision]` on the hub.
        device: as of `load`.
        dtype: as of `load`.
        quantization: as of `load`.

    Returns:
        The engine, whose `model` is the loaded one.

    Raises:
        ValueError: in one line, for an unknown model or a pipeline, a damaged folder, or a device that is not there.
    """
    from unigen.backends.diffusers_loading import check_pipeline_class, is_pipeline
    from unigen.models import resolve_model

    check_dtype(dtype)
    check_names(name=name)
    placement = resolve_placement(device, dtype, quantization)
    placement.check_quantization()
    folder, variant = resolve_model(name, False, check_pipeline_class)
    if is_pipeline(folder):
        raise ValueError(f"{name} is a diffusers pipeline: give a model that writes codes or latents itself")
    return _load_engine(folder, variant, placement)


@keyword_renames(adapter="connector", generator="image_model")
def load_composed(
    lmm: str, image_model: str, connector: str | None = None, device: str | None = None, dtype: str | None = None
) -> ComposedEngine:
    """Load two models composed into one engine, for what works on its parts.

    Args:
        lmm: as of `load`.
        image_model: as of `load`.
        connector: as of `load`.
        device: as of `load`.
        dtype: as of `load`.

    Returns:
        The engine, with its `text_engine` and its `image_engine`.

    Raises:
        ValueError: as `load`.
    """
    check_dtype(dtype)
    check_names(lmm=lmm, image_model=image_model, connector=connector)
    return _load_composed(lmm, image_model, connector, resolve_placement(device, dtype, None))


@dataclass(frozen=True)
class Placement:
    """The device, dtype and quantization of a model's weights."""

    device: str
    """"cpu", "cuda", ..."""
    dtype: torch.dtype | None
    """None is the model's default."""
    quantization: str | None = None
    """"8bit" or "4bit", of the language model's weights."""

    def check_quantization(self) -> None:
        """Check the quantization against the device.

        Raises:
            ValueError: in one line, where it is unknown or the device cannot use it.
        """
        from unigen.nn.quantized import check_quantization

        if self.quantization is not None:
            check_quantization(self.quantization, self.device)


def check_dtype(dtype: str | torch.dtype | None) -> None:
    """Check that a model can be loaded as a dtype.

    Args:
        dtype: its name, or the dtype of torch; None is the model's default.

    Raises:
        ValueError: in one line, for anything else.
    """
    from unigen.utils.precision import DTYPES

    name = str(dtype).removeprefix("torch.")
    if dtype is not None and name not in DTYPES:
        raise ValueError(f"unknown dtype {shorten(dtype)}: one of {', '.join(DTYPES)}")


def check_names(**names: str | None) -> None:
    """Check names of models and folders.

    Args:
        names: by the parameter's name; None is not given.

    Raises:
        ValueError: in one line, for what is no name.
    """
    for parameter_name, value in names.items():
        if value is not None and (not isinstance(value, (str, Path)) or not str(value).strip()):
            raise ValueError(f"{parameter_name} must name a model or a folder, not {shorten(value)}")


def resolve_placement(device: str | None, dtype: str | torch.dtype | None, quantization: str | None) -> Placement:
    """Decide where the weights of a model lie.

    Args:
        device: None is a GPU where there is one.
        dtype: None is the model's default.
        quantization: "8bit", "4bit" or None.

    Returns:
        The placement.

    Raises:
        ValueError: in one line, for a device that is not available.
    """
    import torch

    for parameter_name, value in (("device", device), ("quantization", quantization)):
        if value is not None and not isinstance(value, (str, torch.device)):
            raise ValueError(f"{parameter_name} must be a name (str), not {shorten(value)}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = shorten(str(error).splitlines()[0], 200)
        raise ValueError(f"device {shorten(str(device))} is not available here: {reason}") from error
    name = str(dtype).removeprefix("torch.")
    return Placement(device, None if dtype is None else getattr(torch, name), quantization)


def load_one(name: str, placement: Placement, *, reads: bool = False, composed: bool = False) -> InferenceEngine:
    """Load one model.

    Args:
        name: a shipped model, a folder, or `owner/name[@revision]` on the hub.
        placement: where its weights lie.
        reads: the model answers in text, and another generates images; transformers loads it where no family of ours
            does.
        composed: it is one of two models. A pipeline then takes a quantization, which is meant for the other.

    Returns:
        An engine.

    Raises:
        ValueError: in one line, for a model that is unknown, damaged or cannot be quantised.
    """
    from unigen.backends import diffusers_loading
    from unigen.backends.transformers_engine import load_transformers
    from unigen.models import UnknownModelError, resolve_model

    folder, variant = resolve_model(name, reads, diffusers_loading.check_pipeline_class)
    if diffusers_loading.is_pipeline(folder):
        if placement.quantization is not None and not composed:
            raise ValueError(f"{name} is a diffusers pipeline, which has no language model to quantise: leave it out")
        return diffusers_loading.load(folder, placement.device, placement.dtype)
    try:
        return _load_engine(folder, variant, placement, reads=reads)
    except UnknownModelError:
        if not reads:
            raise
    dtype, note = _load_dtype(folder, placement)
    engine = load_transformers(folder, placement.device, dtype, placement.quantization)
    if note:
        print(note, file=sys.stderr)
    return engine


def _load_engine(folder: Path, variant: str | None, placement: Placement, *, reads: bool = False) -> Engine:
    """The local engine of a model of ours or of a public family."""
    from unigen.backends.transformers_engine import text_sampling_from
    from unigen.inference.engine import Engine
    from unigen.models import family_module, load_resolved

    dtype, note = _load_dtype(folder, placement)
    model = load_resolved(folder, variant, placement.device, dtype, placement.quantization, inference=True)
    family = family_module(model.family)
    text_sampling = text_sampling_from(folder, {}) if reads and not family.SAMPLING_FROM_MANIFEST else {}
    if note and not family.DTYPE_FIXED:
        print(note, file=sys.stderr)
    return Engine(model, text_sampling)


def _load_dtype(folder: Path, placement: Placement) -> tuple[torch.dtype | None, str]:
    """The dtype in which a folder's weights are loaded, and a note where it is not the stored one."""
    import torch

    from unigen.utils.precision import load_dtype

    if placement.dtype is not None:
        return placement.dtype, ""
    name, note = load_dtype(folder, placement.device)
    return getattr(torch, name) if name else None, note


def _load_composed(lmm: str, image_model: str, connector: str | None, placement: Placement) -> ComposedEngine:
    from unigen.backends.composed import ComposedEngine
    from unigen.backends.connector import load_connector
    from unigen.hub.resolve import resolve

    # the smallest of them first
    connector_module = None if connector is None else load_connector(resolve(connector)[0])
    text_engine = load_one(lmm, placement, reads=True, composed=True)
    return ComposedEngine(text_engine, load_one(image_model, placement, composed=True), connector_module)
