"""Weights: reading safetensors and pickles, renaming tensors, strict loading, writing.

Pickles are read by torch's reader that runs no code (`weights_only`). Does not depend on what is in a model; its family
does.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from unigen.hub.resolve import CONFIG, WEIGHT_FILES, read_json, shard_files
from unigen.utils.text import first_line


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, or of a pickle of torch's.

    Args:
        path: of the file; the suffix .safetensors tells which it is.

    Returns:
        Tensors on the CPU by name, without the prefixes of wrappers.

    Raises:
        ValueError: it is missing, cut off or damaged, or the pickle holds more than tensors and plain values; in one
            line.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return strip_wrapper_prefixes(load_file(path)) if path.suffix == ".safetensors" else _load_pickle(path)
    except (FileNotFoundError, SafetensorError, OSError, RuntimeError, EOFError) as error:
        raise ValueError(f"checkpoint {path} cannot be read (missing, cut off or damaged): {error}") from error


STATE_DICT_KEYS = ("state_dict", "model", "module", "trainer", "var_wo_ddp", "ema")
"""Keys under which checkpoints hold their tensors: torch's trainers, deepspeed, VAR's."""
PICKLE_SAFE_TYPES: list[Callable[..., object] | tuple[Callable[..., object], str]] = [
    argparse.Namespace,
    np.dtype,
    cast(Callable[..., object], np.float64(0).__reduce__()[0]),
    np.dtypes.Float64DType,
    np.dtypes.Float32DType,
    np.dtypes.Int64DType,
]
"""Types that trainers keep beside tensors and that run no code: their arguments, and numbers of numpy."""
WRAPPER_PREFIXES = ("module.", "_orig_mod.")
"""Prefixes of tensors in parallel and compiled modules."""


def _load_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, wherever in it they are: in that of a trainer under `STATE_DICT_KEYS`."""
    from pickle import UnpicklingError

    try:
        with torch.serialization.safe_globals(PICKLE_SAFE_TYPES):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(f"checkpoint {path} is damaged, or holds objects that might run code") from error
    for name in STATE_DICT_KEYS:
        inner = data.get(name) if isinstance(data, dict) else None
        data = inner if isinstance(inner, dict) else data
    state = {name: value for name, value in data.items() if isinstance(value, Tensor)} if isinstance(data, dict) else {}
    return strip_wrapper_prefixes(state)


def strip_wrapper_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the prefixes that parallel and compiled modules put before all of their names."""
    while prefix := next((p for p in WRAPPER_PREFIXES if state and all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def select_checkpoint(folder: Path, pattern: str, name: str | None) -> Path:
    """The checkpoint of a folder that may hold several.

    Args:
        folder: where they are.
        pattern: of the files.
        name: the file's name without its suffix; None where there is one.

    Raises:
        ValueError: there are several, or none of this name.
    """
    found = {path.stem: path for path in sorted(folder.glob(pattern))}
    if name is None and len(found) == 1:
        return next(iter(found.values()))
    if name not in found:
        raise ValueError(f"{folder} holds {', '.join(found) or 'no model'}: name one after a colon")
    return found[name]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder, of model.safetensors or pytorch_model.bin, whole or in shards. Raises ValueError
    where there are none."""
    for name in WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return {key: tensor for file in shard_files(index) for key, tensor in read_tensors(folder / file).items()}
        if (folder / name).is_file():
            return read_tensors(folder / name)
    hint = "; ONNX, GGUF, TensorFlow and Flax are not read"
    raise ValueError(f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin{hint}")


def needs_unwrapping(folder: Path) -> bool:
    """Whether the weights of a model folder are in a pickle, which may hold more than tensors, or all under a
    prefix."""
    from safetensors import safe_open

    path = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if any((folder / f"{name}.index.json").is_file() for name in WEIGHT_FILES) or path is None:
        return False
    if path.suffix == ".bin":
        return True
    with safe_open(path, "pt") as file:
        names = list(file.keys())
    return any(names and all(name.startswith(prefix) for name in names) for prefix in WRAPPER_PREFIXES)


def load_pretrained(
    model_class: Any, folder: Path, dtype: torch.dtype | None, state: dict[str, Tensor] | None = None
) -> Any:
    """`model_class.from_pretrained` of a folder (whole or sharded), strictly.

    Args:
        model_class: a class of transformers, or one of its auto classes.
        folder: of the model.
        dtype: of the weights; None: as they are stored.
        state: the tensors, where they are not as they stand in the folder.

    Returns:
        The model.

    Raises:
        ValueError: tensors are missing, left over or of another shape, or a file is damaged; in one line.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig

    if not read_json(folder / CONFIG).get("model_type"):  # a class's defaults are a model of billions
        raise ValueError(f"{folder / CONFIG} names no type of model: it is damaged")
    try:
        if state is None and needs_unwrapping(folder):
            state = read_weights(folder)
        with silence_transformers():
            overrides: dict[str, Any] = {}
            if state is not None:
                config = getattr(model_class, "config_class", AutoConfig).from_pretrained(folder)
                if not hasattr(model_class, "config_class"):
                    model_class = model_class._model_mapping[type(config)]
                overrides = {"state_dict": state, "config": config}
            model, report = model_class.from_pretrained(
                None if overrides else folder,
                dtype=dtype or "auto",
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # which are named below
                **overrides,
            )
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"model folder {folder} cannot be loaded: {first_line(error)}") from error
    kinds = (("missing", "missing_keys"), ("unknown", "unexpected_keys"), ("of another shape", "mismatched_keys"))
    _raise_differences(folder, [(kind, sorted(map(str, report[name]))) for kind, name in kinds])
    return model


@contextmanager
def strict_from_pretrained() -> Iterator[None]:
    """Inside, a model of transformers whose folder lacks some of its weights is a ValueError in one line, also where
    another library loads it: transformers would go on with random ones."""
    from transformers import PreTrainedModel

    original = PreTrainedModel.__dict__["from_pretrained"]

    def strict(cls: Any, folder: Any, *args: Any, **options: Any) -> Any:
        model, report = original.__func__(cls, folder, *args, **options | {"output_loading_info": True})
        kinds = (("missing", "missing_keys"), ("of another shape", "mismatched_keys"))
        _raise_differences(folder, [(kind, sorted(map(str, report[name]))) for kind, name in kinds])
        return model

    setattr(PreTrainedModel, "from_pretrained", classmethod(strict))  # noqa: B010  # mypy lets no method be assigned
    try:
        yield
    finally:
        setattr(PreTrainedModel, "from_pretrained", original)  # noqa: B010


def with_architecture(lm: Any, architecture: str, **settings: Any) -> Any:
    """The same language model, to be written with another class in its config.json.

    Args:
        lm: a model of transformers; it is not changed.
        architecture: the class that config.json names.
        **settings: what config.json says beside.

    Returns:
        A copy that shares the weights.
    """
    other = copy.copy(lm)
    other.__class__ = type(architecture, (type(lm),), {})
    other.config = copy.deepcopy(lm.config)
    other.config.update(settings)
    return other


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Inside, transformers shows neither progress bars nor its table of missing tensors: errors here name them."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _raise_differences(source: str | Path, differences: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Raise ValueError in one line where there is a difference."""
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        for kind, names in differences
        if names
    ]
    if problems:
        raise ValueError(f"checkpoint {source} does not fit the model: {'; '.join(problems)}")


KeyRenames = Sequence[tuple[str, str]]
"""Pairs of a name in a public file and the name here."""


def rename_key(name: str, prefixes: KeyRenames, substitutions: KeyRenames = (), inverse: bool = False) -> str:
    """Translate a tensor's public name to the name here, or back.

    Args:
        name: of the tensor.
        prefixes: the first one that fits is exchanged.
        substitutions: parts of the name, each of which is exchanged in turn.
        inverse: from the name here to the public one.

    Returns:
        The other name; a prefix that is not in the table stays.
    """
    pairs = [(b, a) if inverse else (a, b) for a, b in prefixes]
    old, new = next((pair for pair in pairs if name.startswith(pair[0])), ("", ""))
    for public_part, own_part in reversed(substitutions) if inverse else substitutions:
        name = name.replace(own_part, public_part) if inverse else name.replace(public_part, own_part)
    return new + name[len(old) :]


def rename_old_keys(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names that the layers of a module have now.

    Args:
        module: whose weights they are. A class whose layers have changed name has a table `OLD_KEYS` of their names in
            version 0.1 and those now; children of any depth are looked at.
        state: tensors by name.

    Returns:
        The same tensors by their names of today. Names that are not old stay.
    """
    renamed = dict(state)
    for path, submodule in module.named_modules():  # parents first, whose new names are part of the path
        prefix = f"{path}." if path else ""
        for old, new in getattr(submodule, "OLD_KEYS", {}).items():
            old_path = prefix + old
            for key in [key for key in renamed if key == old_path or key.startswith(f"{old_path}.")]:
                new_key = prefix + new + key[len(old_path) :]
                if new_key not in renamed:  # of a state with both, the old name stays, and is one too many
                    renamed[new_key] = renamed.pop(key)
    return renamed


def load_strict(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Load tensors into a module, none missing, none left over.

    Args:
        module: whose `state_dict` names them.
        state: tensors by name; names of version 0.1 are read, too.
        source: where they come from, for the message.

    Raises:
        ValueError: they differ in names or shapes; in one line that lists the first differences.
    """
    state = rename_old_keys(module, state)
    expected = module.state_dict()
    missing_keys = [k for k in expected if k not in state]
    unknown_keys = [k for k in state if k not in expected]
    shapes = [
        f"{k} {tuple(state[k].shape)} for {tuple(v.shape)}"
        for k, v in expected.items()
        if k in state and state[k].shape != v.shape
    ]
    _raise_differences(source, (("missing", missing_keys), ("unknown", unknown_keys), ("of another shape", shapes)))
    module.load_state_dict(state, strict=True)


def write_tensors(path: Path, state: dict[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Write tensors as safetensors, readable for all.

    Args:
        path: of the file.
        state: tensors by name, on any device.
        dtype: to which floats are cast; None: as they are.
    """
    from safetensors.torch import save_file

    tensors = {k: v.detach().to("cpu", dtype if v.is_floating_point() else None).contiguous() for k, v in state.items()}
    save_file(tensors, path)
    path.chmod(0o644)  # safetensors makes files that only their owner can read
