"""One file per family of models. A folder's `unigen.json` names its file; a public folder belongs to the family that
says so of its config.json (`matches`). There is no registry to edit."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from unigen.hub.folders import replacing_folder
from unigen.hub.resolve import CONFIG, MANIFEST, read_json, resolve, wrap_load_errors
from unigen.model.unified import UnifiedModel
from unigen.models.relatives import explain_unsupported
from unigen.nn.cpu.linear import pack_linears
from unigen.utils.disk import check_folder, disk_errors


def load(name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> UnifiedModel:
    """The model of a shipped name, a folder or a name on the Hugging Face hub, in evaluation mode. dtype: None
    is float32, or as stored in a public checkpoint. Raises ValueError in one line for bad input."""
    return load_resolved(*resolve_model(name), device, dtype)


def load_resolved(
    folder: Path,
    variant: str | None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    quantization: str | None = None,
    inference: bool = False,
) -> UnifiedModel:
    """The same of what `resolve_model` gave.

    Args:
        quantization: see `UnifiedModel.quantize`.
        inference: the model is not to be trained. Where its family has a faster way to load such a model, that is
            taken, and its linear maps are packed (`unigen.nn.cpu.linear.pack_linears`).
    """
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else None
    family = find_family(folder, manifest)
    if variant is not None and (manifest is not None or not hasattr(family, "MULTI_MODEL_REPOS")):
        raise ValueError(f"{folder} holds one model: leave out {variant!r}")
    options = {} if variant is None else {"variant": variant}
    with wrap_load_errors(folder):
        if inference and quantization is None and hasattr(family, "load_for_inference"):
            model: UnifiedModel = family.load_for_inference(folder, dtype, **options)
        else:
            model = family.load(folder, dtype, **options)
    try:
        for generator, options in (manifest or {}).get("sampling", {}).items():
            model.set_default_sampling(generator, **options)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"sampling in {folder / MANIFEST}: {error}") from error
    if inference and torch.device(device).type == "cpu":
        to_float32(model, model.backbone)
    if quantization is not None:
        model.quantize(quantization, device)
    model = model.to(device).eval()
    model.vllm_support = describe_vllm_support(model)
    if inference:
        pack_linears(model.backbone)
    return model


def to_float32(model: torch.nn.Module, language: torch.nn.Module) -> None:
    """float16 weights as float32, which is what a CPU computes with: products of float16 round differently in a batch
    than alone there, and activations of many public models exceed its range. language: the part of the model that says
    in which precision it is held."""
    if any(p.dtype == torch.float16 for p in language.parameters()):
        model.float()


class UnknownModelError(ValueError):
    """A folder that is of no family here."""


def resolve_model(
    name: str | Path, allow_language_model: bool = False, check_pipeline: Callable[[Path], Any] | None = None
) -> tuple[Path, str | None]:
    """The folder of a name, and which of several models there is meant. Of a repository of the hub weights are fetched
    when its small files say that it can be loaded. reads: may it be any model of transformers that reads?
    check_pipeline: raises ValueError for a pipeline that cannot be used."""

    def judge(folder: Path) -> None:
        if (folder / "model_index.json").is_file():
            if check_pipeline is not None:
                check_pipeline(folder)
            return
        manifest = folder / MANIFEST
        try:
            find_family(folder, read_json(manifest) if manifest.is_file() else None)
        except UnknownModelError:
            if not allow_language_model:
                raise

    weight_patterns = [pattern for module in families() for pattern in getattr(module, "WEIGHT_PATTERNS", ())]
    return resolve(name, multi_model_repos(), judge, weight_patterns)


def convert(name: str | Path, folder: str | Path, layout: str = "unigen") -> None:
    """Write the model into `folder` in our layout ("unigen"), in that of its family's public checkpoints ("public"), or
    in ours with a language model that vLLM serves ("vllm"); a model that is there is replaced when the new one
    is whole. Raises ValueError."""
    folder = check_folder(folder)
    weights = any(path.suffix in (".safetensors", ".pt", ".pth") for path in folder.glob("*"))
    if folder.exists() and any(folder.iterdir()) and not (weights and (folder / CONFIG).is_file()):
        raise ValueError(f"{folder} is there and holds no model: choose another folder")
    model = load(name)
    if layout == "vllm":
        model.backbone.lm = causal_lm(model)
    if layout != "public":
        with disk_errors(f"the folder {folder}", "free some space, or choose another folder"):
            model.save(folder)
        return
    module = importlib.import_module(f"{__name__}.{model.family}")
    if not hasattr(module, "save_public"):
        raise ValueError(f"{model.family} has no public layout: its models are in ours")
    with disk_errors(f"the folder {folder}", "free some space, or choose another folder"):
        with replacing_folder(folder) as scratch:
            module.save_public(model, scratch)


def causal_lm(model: UnifiedModel) -> Any:
    """The language model as vLLM serves it: one table and one head for text and codes, of a class of transformers, or
    named as one of `unigen.backends.vllm_models`. Raises ValueError saying why a family has none."""
    if reason := vllm_unsupported_reason(model.family):
        raise ValueError(f"vLLM cannot serve {model.family}: {reason}")
    return importlib.import_module(f"{__name__}.{model.family}").causal_lm(model)


def vllm_unsupported_reason(family: str) -> str | None:
    """Why vLLM cannot serve it; None where it can. A family's module defines `causal_lm` or `VLLM_UNSUPPORTED`."""
    module = family_module(family)
    return None if hasattr(module, "causal_lm") else str(module.VLLM_UNSUPPORTED)


def describe_vllm_support(model: UnifiedModel) -> str:
    """Whether vLLM can serve a model, and which of its generators it runs."""
    if reason := vllm_unsupported_reason(model.family):
        return f"no, {reason}"
    beside = [name for name in model.generators if name not in ("text", "next-token")]
    return "yes, its next-token and text" + (f"; {', '.join(beside)} beside it" if beside else "")


def family_module(family: str) -> Any:
    """The module of a family. Where it does not say otherwise, its models take any dtype (`DTYPE_FIXED`), and the text
    of their checkpoints is sampled as generation_config.json says (`SAMPLING_FROM_MANIFEST`)."""
    module = importlib.import_module(f"{__name__}.{family}")
    for name in ("DTYPE_FIXED", "SAMPLING_FROM_MANIFEST"):
        vars(module).setdefault(name, False)
    return module


def find_family(folder: Path, manifest: dict[str, Any] | None) -> Any:
    """The module of the folder's family."""
    if manifest is not None:
        family = str(manifest.get("family"))
        is_valid_name = family.isidentifier() and not family.startswith("_")
        if not is_valid_name or importlib.util.find_spec(f"{__name__}.{family}") is None:
            raise ValueError(f"{folder / MANIFEST} names the family {family!r}, which this version does not have")
        return importlib.import_module(f"{__name__}.{family}")
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    for module in families():
        if module.matches(folder, config):
            if hasattr(module, "check_supported"):
                module.check_supported(folder, config)
            return module
    if reason := explain_unsupported(folder, config):
        raise ValueError(reason)
    if (folder / "model_index.json").is_file():
        raise UnknownModelError(
            f"{folder} is a diffusers pipeline: it is loaded by unigen.load, and has no other layout"
        )
    if not config:
        raise ValueError(f"folder {folder} holds neither {MANIFEST} nor {CONFIG}, so it is no model")
    kind = config.get("model_type") or config.get("_class_name") or "unknown"
    names = ", ".join(module.__name__.rpartition(".")[2] for module in families())
    hint = ": as a model that reads it can be joined to one that draws, by --lmm" if is_language_model(kind) else ""
    raise UnknownModelError(f"{folder} is a model of type {kind!r}, which is of no family known here ({names}){hint}")


def is_language_model(kind: str) -> bool:
    """Is this type one of transformers' models that write text, whether they see pictures or not?"""
    from transformers.models.auto import modeling_auto

    texts = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return kind in texts or kind in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def families() -> list[Any]:
    """The modules of all families: those of this package but `relatives`."""
    names = [module_info.name for module_info in pkgutil.iter_modules(__path__) if module_info.name != "relatives"]
    return [importlib.import_module(f"{__name__}.{name}") for name in names]


def multi_model_repos() -> dict[str, Any]:
    """Repositories of the hub that hold several models: the files of each."""
    return {
        repo: variants for module in families() for repo, variants in getattr(module, "MULTI_MODEL_REPOS", {}).items()
    }
