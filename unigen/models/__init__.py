"""Families of models, one module each.

The `unigen.json` of a folder names its module. A public folder belongs to the family whose `matches` is true of its
config.json. There is no registry to edit. A family module defines

    matches(folder, config)                 does this public folder belong to the family?
    load(folder, dtype)                     the model, from the public layout or from ours
    causal_lm(model)                        the language model for vLLM; else VLLM_UNSUPPORTED, the reason
    save_public(model, folder)              optional: write the public layout
    check_supported(folder, config)         optional: raise ValueError for a variant that is not supported
    load_for_inference(folder, dtype)       optional: a faster way to load a model that is not trained

and optionally the constants MULTI_MODEL_REPOS, WEIGHT_PATTERNS, DTYPE_FIXED and SAMPLING_FROM_MANIFEST.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from unigen.hub.folders import replacing_folder
from unigen.hub.resolve import CONFIG, MANIFEST, read_json, read_manifest, resolve, wrap_load_errors
from unigen.model.unified import UnifiedModel
from unigen.models.relatives import explain_unsupported
from unigen.nn.cpu.linear import pack_linears
from unigen.utils.disk import check_folder, disk_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> UnifiedModel:
    """Load a model in evaluation mode.

    Args:
        name: a shipped name, a folder, or a name on the Hugging Face hub.
        device: where the model is put.
        dtype: of the weights; None: float32, or as stored in a public checkpoint.

    Raises:
        ValueError: in one line, for bad input.
    """
    return load_resolved(*resolve_model(name), device, dtype)


def load_resolved(
    folder: Path,
    variant: str | None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    quantization: str | None = None,
    inference: bool = False,
) -> UnifiedModel:
    """Load the model of a folder that `resolve_model` returned.

    Args:
        folder: the model folder.
        variant: which of several models in the folder; None where it holds one.
        device: where the model is put.
        dtype: of the weights; None: float32, or as stored in a public checkpoint.
        quantization: see `UnifiedModel.quantize`.
        inference: the model is not trained. Where its family has a faster way to load such a model, that is taken, and
            its linear maps are packed (`unigen.nn.cpu.linear.pack_linears`).

    Raises:
        ValueError: in one line, for a folder of no family, damaged weights or a wrong variant.
    """
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else None
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
    """Convert a model with float16 weights to float32, which is what a CPU computes with.

    Products in float16 round differently in a batch than alone there, and activations of many public models exceed its
    range.

    Args:
        model: converted in place.
        language: the part of the model whose precision decides.
    """
    if any(p.dtype == torch.float16 for p in language.parameters()):
        model.float()


class UnknownModelError(ValueError):
    """The folder belongs to no family."""


def resolve_model(
    name: str | Path, allow_language_model: bool = False, check_pipeline: Callable[[Path], object] | None = None
) -> tuple[Path, str | None]:
    """Find the folder of a model, and which of several models in it is meant.

    Weights of a repository on the hub are fetched only when its small files say that it can be loaded.

    Args:
        name: a shipped name, a folder, or a name on the hub, with ":variant" where a repository holds several models.
        allow_language_model: accept any model of transformers that writes text, too.
        check_pipeline: raises ValueError for a diffusers pipeline that cannot be used.

    Returns:
        The folder, and the variant or None.

    Raises:
        ValueError: the name leads to no model that can be loaded.
    """

    def judge(folder: Path) -> None:
        """Raise ValueError where the folder, whose weights may still be missing, cannot be loaded."""
        if (folder / "model_index.json").is_file():
            if check_pipeline is not None:
                check_pipeline(folder)
            return
        try:
            find_family(folder, read_manifest(folder) if (folder / MANIFEST).is_file() else None)
        except UnknownModelError:
            if not allow_language_model:
                raise

    weight_patterns = [pattern for module in families() for pattern in getattr(module, "WEIGHT_PATTERNS", ())]
    return resolve(name, multi_model_repos(), judge, weight_patterns)


def convert(name: str | Path, folder: str | Path, layout: str = "unigen") -> None:
    """Write a model into another folder. A model that is there is replaced when the new one is whole.

    Args:
        name: see `load`.
        folder: where to write; new, empty, or a model folder.
        layout: "unigen" is ours, "public" that of the family's public checkpoints, "vllm" ours with a language model
            that vLLM serves.

    Raises:
        ValueError: the folder holds something else, or the family has no such layout.
    """
    folder = check_folder(folder)
    has_weights = any(path.suffix in (".safetensors", ".pt", ".pth") for path in folder.glob("*"))
    if folder.exists() and any(folder.iterdir()) and not (has_weights and (folder / CONFIG).is_file()):
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


def causal_lm(model: UnifiedModel) -> PreTrainedModel:
    """The language model as vLLM serves it: one table and one head for text and codes.

    Args:
        model: of any family.

    Returns:
        A model of a class of transformers, or one whose config names a class of `unigen.backends.vllm_models`.

    Raises:
        ValueError: vLLM cannot serve the family; the message says why.
    """
    if reason := vllm_unsupported_reason(model.family):
        raise ValueError(f"vLLM cannot serve {model.family}: {reason}")
    return importlib.import_module(f"{__name__}.{model.family}").causal_lm(model)


def vllm_unsupported_reason(family: str) -> str | None:
    """Why vLLM cannot serve a family; None where it can. Its module defines `causal_lm` or `VLLM_UNSUPPORTED`."""
    module = family_module(family)
    return None if hasattr(module, "causal_lm") else str(module.VLLM_UNSUPPORTED)


def describe_vllm_support(model: UnifiedModel) -> str:
    """A sentence on whether vLLM can serve a model, and which of its generators it runs."""
    if reason := vllm_unsupported_reason(model.family):
        return f"no, {reason}"
    other_generators = [name for name in model.generators if name not in ("text", "next-token")]
    return "yes, its next-token and text" + (f"; {', '.join(other_generators)} beside it" if other_generators else "")


def family_module(family: str) -> ModuleType:
    """The module of a family, with defaults for the constants that it may leave out.

    Unless it says otherwise, its models take any dtype (`DTYPE_FIXED`), and text is sampled as the checkpoint's
    generation_config.json says (`SAMPLING_FROM_MANIFEST`).
    """
    module = importlib.import_module(f"{__name__}.{family}")
    for name in ("DTYPE_FIXED", "SAMPLING_FROM_MANIFEST"):
        vars(module).setdefault(name, False)
    return module


def find_family(folder: Path, manifest: Mapping[str, object] | None) -> ModuleType:
    """The module of the family that a folder belongs to.

    Args:
        folder: the model folder.
        manifest: the contents of its unigen.json; None for a public folder.

    Raises:
        UnknownModelError: the folder holds a model of no family.
        ValueError: the folder holds no model, or one that is known and not supported.
    """
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
    """Whether a model type of transformers writes text, with or without pictures as input."""
    from transformers.models.auto import modeling_auto

    texts = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return kind in texts or kind in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def families() -> list[ModuleType]:
    """The modules of all families: the modules of this package except `relatives`."""
    names = [module_info.name for module_info in pkgutil.iter_modules(__path__) if module_info.name != "relatives"]
    return [importlib.import_module(f"{__name__}.{name}") for name in names]


def multi_model_repos() -> dict[str, Mapping[str, Sequence[str]]]:
    """Repositories of the hub that hold several models: by repository and variant, the names of files."""
    return {
        repo: variants for module in families() for repo, variants in getattr(module, "MULTI_MODEL_REPOS", {}).items()
    }
