"""Finding and reading model folders: a shipped model by name, or a folder. Safetensors only, strict, readable errors.

The file refuses to know what is in a model; `unigen.json` in its folder names the family that does.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ASSETS = Path(__file__).parent / "assets"
MANIFEST = "unigen.json"


def shipped() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(p.parent.name for p in ASSETS.glob(f"*/{MANIFEST}"))


def resolve(name: str | Path) -> Path:
    """The folder of a model, by the name of a shipped one or by its path. Raises ValueError naming what there is."""
    for folder in (Path(name), ASSETS / str(name)):
        if (folder / MANIFEST).is_file():
            return folder
    if Path(name).is_dir():
        raise ValueError(f"folder {name} holds no {MANIFEST}, so it is not a unigen model")
    known = ", ".join(shipped()) or "none"
    raise ValueError(f"unknown model {str(name)!r}: neither a folder nor a shipped model ({known})")


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: the model folder is not whole") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds no JSON object")
    return data


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ValueError in one line where it is missing, cut off or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint {path} cannot be read (missing, cut off or damaged): {error}") from error


def load_strict(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Load every tensor of `state` into `module`, none missing, none left. Raises ValueError listing the difference."""
    wanted = module.state_dict()
    missing = [k for k in wanted if k not in state]
    unknown = [k for k in state if k not in wanted]
    shapes = [
        f"{k} {tuple(state[k].shape)} for {tuple(v.shape)}"
        for k, v in wanted.items()
        if k in state and state[k].shape != v.shape
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        for kind, names in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise ValueError(f"checkpoint {source} does not fit the model: {'; '.join(problems)}")
    module.load_state_dict(state, strict=True)


@contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends well; else nothing is changed."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        old = folder.with_name(f".{folder.name}.old{os.getpid()}")
        if folder.exists():
            os.replace(folder, old)
        os.replace(scratch, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_tensors(path: Path, state: dict[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Write tensors as safetensors, floats cast to `dtype` (None: kept)."""
    from safetensors.torch import save_file

    ready = {k: v.detach().to("cpu", dtype if v.is_floating_point() else None).contiguous() for k, v in state.items()}
    save_file(ready, path)
    path.chmod(0o644)  # safetensors makes files that only their owner can read
