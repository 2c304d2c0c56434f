"""Loads what `unigen.load` is asked for: one model, ours or public, a pipeline, two models composed, or vLLM."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from unigen.utils.text import shorten

BACKENDS = ("local", "vllm")


def load(
    name: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    *,
    quantization: str | None = None,
    lmm: str | None = None,
    generator: str | None = None,
    adapter: str | None = None,
    engine: str = "local",
    vllm: dict[str, Any] | None = None,
) -> Any:
    """Load a model, and return an engine that generates with it.

    Args:
        name: a shipped model ("unigen-tiny" where nothing is given), a folder, or `owner/name[@revision]` on the hub: a
            model of ours, a public checkpoint, or a diffusers pipeline.
        device: "cpu", "cuda", ...; None is a GPU where there is one.
        dtype: "float32", "bfloat16" or "float16". None is float32 for our own models and for pipelines, and as stored
            for other public models, but float32 on a CPU that is slow in that (`unigen.utils.precision.load_dtype`).
        quantization: "8bit" or "4bit", for the weights of the language model, or of both composed ones; all else is as
            dtype says.
        lmm: instead of `name`, a model that reads and answers in text; it writes the prompts for `generator`
            (`unigen.backends.composed`).
        generator: the model that draws for `lmm`.
        adapter: a folder of a connector, by which a pipeline is conditioned on the hidden states of `lmm`
            (`unigen.backends.connector`).
        engine: "local", or "vllm" to run the language model of `name` on vLLM (`unigen.backends.vllm_engine`).
        vllm: arguments of vLLM's engine, such as {"max_model_len": 4096}.

    Returns:
        `unigen.Engine`, or for pipelines, composed models and vLLM an engine with the same methods.
    Raises:
        ValueError: in one line, for an unknown model, a damaged folder, or a device or package that is not there.
    """
    import torch

    from unigen.nn import quantized
    from unigen.utils.precision import DTYPES

    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype is not None and not (isinstance(dtype, str) and dtype in DTYPES):
        raise ValueError(f"unknown dtype {shorten(dtype)}: one of {', '.join(DTYPES)}")
    for parameter_name, value in (("name", name), ("lmm", lmm), ("generator", generator), ("adapter", adapter)):
        if value is not None and (not isinstance(value, (str, Path)) or not str(value).strip()):
            raise ValueError(f"{parameter_name} must name a model or a folder, not {shorten(value)}")
    for parameter_name, value in (("device", device), ("quantization", quantization)):
        if value is not None and not isinstance(value, (str, torch.device)):
            raise ValueError(f"{parameter_name} must be a name (str), not {shorten(value)}")
    if vllm is not None and not isinstance(vllm, dict):
        raise ValueError(f"vllm must be a dict of arguments of vLLM's engine, not {shorten(vllm)}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = shorten(str(error).splitlines()[0], 200)
        raise ValueError(f"device {shorten(str(device))} is not available here: {reason}") from error
    torch_dtype = getattr(torch, dtype) if dtype else None
    if not isinstance(engine, str) or engine not in BACKENDS:
        raise ValueError(f"unknown engine {shorten(engine)}: one of {', '.join(BACKENDS)}")
    if engine == "vllm":
        if lmm or generator or adapter or quantization:
            raise ValueError("vLLM serves one model as it is: leave lmm, generator, adapter and quantization out")
        from unigen.backends import vllm_engine

        return vllm_engine.load(name or "unigen-tiny", device, torch_dtype, vllm)
    if vllm:
        raise ValueError("arguments of vLLM's engine are for engine vllm: leave them out")
    if quantization is not None:
        quantized.check_quantization(quantization, device)

    if lmm is None and generator is None and adapter is None:
        return load_one(name or "unigen-tiny", device, torch_dtype, quantization)
    if lmm is None or generator is None or name is not None:
        raise ValueError("give one name, or both an lmm that reads and a generator that draws")
    from unigen.backends.composed import ComposedEngine
    from unigen.backends.connector import load_connector
    from unigen.hub.resolve import resolve

    connector = (
        None if adapter is None else load_connector(resolve(adapter)[0])
    )  # the smallest of them before the others
    reader = load_one(lmm, device, torch_dtype, quantization, reads=True, composed=True)
    return ComposedEngine(reader, load_one(generator, device, torch_dtype, quantization, composed=True), connector)


def load_one(
    name: str, device: str, dtype: Any, quantization: str | None, *, reads: bool = False, composed: bool = False
) -> Any:
    """Load one model.

    Args:
        name: a shipped model, a folder, or `owner/name[@revision]` on the hub.
        device, dtype: where the weights lie; dtype None is the model's default.
        quantization: "8bit" or "4bit", of the language model's weights.
        reads: the model answers in text for another that draws; transformers loads it where no family of ours does.
        composed: it is one of two models. A pipeline then takes a quantization, which is meant for the other.

    Returns:
        An engine.
    Raises:
        ValueError: in one line, for a model that is unknown, damaged or cannot be quantised.
    """
    import torch

    from unigen.backends import diffusers_engine
    from unigen.inference.engine import Engine
    from unigen.models import UnknownModelError, load_resolved, resolve_model
    from unigen.utils.precision import load_dtype

    folder, variant = resolve_model(name, reads, diffusers_engine.check_pipeline_class)
    if diffusers_engine.is_pipeline(folder):
        if quantization is not None and not composed:
            raise ValueError(f"{name} is a diffusers pipeline, which has no language model to quantise: leave it out")
        return diffusers_engine.load(folder, device, dtype)
    usual, why = load_dtype(folder, device) if dtype is None else (None, "")
    own = getattr(torch, usual) if usual else dtype
    try:
        engine: Any = Engine(load_resolved(folder, variant, device, own, quantization, inference=True))
        if reads and engine.model.family != "tiny":  # which says in its manifest how it writes
            from unigen.backends.composed import text_sampling_from

            engine.text_sampling = text_sampling_from(folder, {})
    except UnknownModelError:
        if not reads:
            raise
        from unigen.backends.composed import load_transformers

        engine = load_transformers(folder, device, own, quantization)
    ours = isinstance(engine, Engine) and engine.model.family == "tiny"  # held in float32 wherever it is
    if why and not ours:
        print(why, file=sys.stderr)
    return engine
