"""One file per family of models; a folder's `unigen.json` names its file, so there is no registry to edit."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import torch

from unigen import hub
from unigen.model import UnifiedModel


def load(name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> UnifiedModel:
    """The model of a shipped name or a folder, in evaluation mode. Raises ValueError in one line for bad input."""
    folder = hub.resolve(name)
    manifest = hub.read_json(folder / hub.MANIFEST)
    family = str(manifest.get("family"))
    if not family.isidentifier() or importlib.util.find_spec(f"{__name__}.{family}") is None:
        raise ValueError(f"{folder / hub.MANIFEST} names the family {family!r}, which this version does not have")
    module = importlib.import_module(f"{__name__}.{family}")
    model: UnifiedModel = module.load(folder)
    try:
        for generator, options in manifest.get("sampling", {}).items():
            model.sample_by(generator, **options)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"sampling in {folder / hub.MANIFEST}: {error}") from error
    return model.to(device, dtype).eval()
