"""Finding and reading model folders: a shipped one, a folder, or a name on the Hugging Face hub. Readable errors.

Tensors are read from safetensors, and from pickles by torch's reader that runs no code (`weights_only`). The file
does not depend on what is in a model; its family does.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unigen.utils.text import did_you_mean

ASSETS = Path(__file__).parent / "assets"
MANIFEST, CONFIG = "unigen.json", "config.json"
HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
HUB_URL = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)")
MAX_NAME_LENGTH = 1000
METADATA_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model", "*.yaml")
DUPLICATE_WEIGHT_PATTERNS = tuple(
    f"*{name}*" for name in (".fp16", ".bf16", ".fp32", ".non_ema", ".int8", "flax", "openvino", "onnx")
)
"""The same weights of a pipeline's part once more, whole or in shards."""
WEIGHT_VARIANTS = ("fp16", "bf16")
"""Of weights of pipelines, which are read where there are no others."""
SAFETENSORS_PATTERNS = ("*.safetensors",)
WEIGHT_FILES = ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin")
"""A model's weights, the first that is there; `.index.json` after the name lists the shards."""


def shipped_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(p.parent.name for p in ASSETS.glob(f"*/{MANIFEST}"))


FolderCheck = Callable[[Path], None]
"""Raises ValueError for a folder, of which only the small files are there, whose model is not to be had."""


def resolve(
    name: str | Path,
    holdings: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
    judge: FolderCheck | None = None,
    loose: Sequence[str] = (),
) -> tuple[Path, str | None]:
    """The folder of a model, and which of several it is: by the name of a shipped one, by its path, or by
    `owner/name[@revision]` on the Hugging Face hub, from whose cache it is taken where it is there. After a colon may
    follow the name of one of several models that are there. holdings: the files of each, by repository, for those of
    the hub that hold several. judge, loose: see `fetch_snapshot`. Raises ValueError naming what there is."""
    name_part, _, variant = str(name).partition(":")
    if len(str(name)) > MAX_NAME_LENGTH:
        raise ValueError(f"a model's name of {len(str(name))} letters is too long")
    if "://" in str(name) or HUB_URL.match(str(name)):
        page = HUB_URL.match(str(name))
        give = f"give {page[1]}" if page else "give owner/name on the Hugging Face hub, or the folder of a download"
        raise ValueError(f"{name} is a URL, and models are not read from URLs: {give}")
    for folder, variant_name in ((Path(name), None), (ASSETS / str(name), None), (Path(name_part), variant or None)):
        if os.path.isdir(folder) and folder != ASSETS:  # of a name that is too long it says no
            return folder, variant_name
    if os.path.isfile(name):
        raise ValueError(f"{name} is a file: give the folder of a model, with its config.json")
    named = HUB_NAME.fullmatch(name_part)
    if name_part.startswith(("./", "../", "/", "~")) or (named is None and "/" in name_part):
        raise ValueError(f"no folder {name_part} is here, so there is no model in it: check the path")
    if named:
        variants = (holdings or {}).get(named["repo"])
        if variants is None and variant:
            raise ValueError(f"{name_part} holds one model: leave out {variant!r}")
        if variants is None:
            return fetch_snapshot(named["repo"], named["revision"], judge, loose), None
        if variant not in variants:
            raise ValueError(
                f"{name_part} holds several models: name one, as in {name_part}:{next(iter(variants))} "
                f"({', '.join(variants)})"
            )
        return _from_hub(named["repo"], named["revision"], variants[variant]), variant
    shipped_names = ", ".join(shipped_models()) or "none"
    raise ValueError(
        f"unknown model {str(name)!r}: neither a folder, nor a shipped model ({shipped_names}), nor "
        f"owner/name on the hub"
        f"{did_you_mean(name_part, shipped_models())}"
    )


def fetch_snapshot(
    repo: str, revision: str | None = None, judge: FolderCheck | None = None, loose: Sequence[str] = ()
) -> Path:
    """The folder of a repository of the hub with each weight once: safetensors where it has them, else pickles. judge:
    asked when the small files are there, before weights are fetched. loose: files by which a model is known that has no
    settings beside it."""
    folder = _from_hub(repo, revision, METADATA_PATTERNS)
    if loose and not any((folder / name).is_file() for name in (CONFIG, MANIFEST, "model_index.json")):
        folder = _from_hub(repo, revision, (*METADATA_PATTERNS, *loose))
    if judge is not None:
        judge(folder)
    if (folder / "model_index.json").is_file():  # a pipeline: its parts' folders, and not what stands beside them
        folder = _from_hub(
            repo,
            revision,
            (*METADATA_PATTERNS, *(f"*/{kind}" for kind in SAFETENSORS_PATTERNS)),
            DUPLICATE_WEIGHT_PATTERNS,
        )
        folders_without_weights = [
            config.parent for config in folder.glob(f"*/{CONFIG}") if not any(config.parent.glob("*.safetensors"))
        ]
        for name in WEIGHT_VARIANTS if folders_without_weights else ():  # some have no others
            kinds = ("safetensors", "json")  # an index is of the variant, too
            folder = _from_hub(
                repo, revision, [f"{part.name}/*.{name}*.{kind}" for part in folders_without_weights for kind in kinds]
            )
            if any(part.glob("*.safetensors") for part in folders_without_weights):
                break
        return folder
    if (folder / MANIFEST).is_file():  # ours: the parts have folders, too
        return _from_hub(repo, revision, (*METADATA_PATTERNS, *SAFETENSORS_PATTERNS))
    for name in WEIGHT_FILES:
        if (folder / f"{name}.index.json").is_file():
            return _from_hub(repo, revision, (*METADATA_PATTERNS, *shard_files(folder / f"{name}.index.json")))
    for name in WEIGHT_FILES:
        folder = _from_hub(repo, revision, (*METADATA_PATTERNS, name))
        if (folder / name).is_file():
            break
    return folder


def weights_variant(folder: Path) -> str | None:
    """Which of the weights of a pipeline's parts are read where a part has no others than those of a variant: "fp16" or
    "bf16"; None where all have plain ones."""
    for name in WEIGHT_VARIANTS:
        for config in folder.glob(f"*/{CONFIG}"):
            files = [path.name for path in config.parent.glob("*.safetensors")]
            if any(f".{name}." in file for file in files) and not any(is_default_weights(file) for file in files):
                return name
    return None


def is_default_weights(file: str) -> bool:
    """Is it a file of weights, and of no variant?"""
    return file.endswith(".safetensors") and not any(fnmatch(file, pattern) for pattern in DUPLICATE_WEIGHT_PATTERNS)


def shard_files(index: Path) -> list[str]:
    """The files that an index of weights names. Raises ValueError for what is no such index."""
    try:
        files = sorted(set(read_json(index)["weight_map"].values()))
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is no index of weights: it has no weight_map") from error
    if outside_files := [file for file in files if Path(file).is_absolute() or ".." in Path(file).parts]:
        raise ValueError(f"{index} names {outside_files[0]}, which is not in its folder")
    return files


def fetch_metadata(repo: str) -> Path:
    """The folder of a repository of the hub, without its weights."""
    return _from_hub(repo, None, METADATA_PATTERNS)


def fetch_file(repo: str, file: str) -> Path:
    """One file of a repository of the hub, with the settings that stand beside it."""
    path = _from_hub(repo, None, [file, str(Path(file).with_suffix(".yaml"))]) / file
    if not path.is_file():
        raise ValueError(f"{repo} on the Hugging Face hub has no {file}")
    return path


def find_component(folder: Path, name: str, what: str, fetch: Callable[[], Path]) -> Path:
    """What a model's repository does not bring along: the file or folder (name/) of this name in the model's folder,
    else what is fetched. what: it is, as people read it. Raises ValueError in one line where there is neither."""
    here = sorted(folder.rglob(name.rstrip("/")))
    try:
        return here[0] if here else fetch()
    except ValueError as error:
        raise ValueError(f"{folder} has no {name} ({what}), and {error}") from error


def _from_hub(repo: str, revision: str | None, patterns: Sequence[str], left: Sequence[str] = ()) -> Path:
    """The cached folder with the files of these patterns. ValueError in one line for what the hub answers."""
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE

    name = repo if revision is None else f"{repo}@{revision}"
    try:
        found = snapshot_download(repo, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(left))
        return Path(found)
    except errors.GatedRepoError as error:
        raise ValueError(f"{name} is gated: accept its licence on huggingface.co, then run `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{repo} on the Hugging Face hub has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"{name}: no such folder, and no such model on the Hugging Face hub (or it is private)"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "the Hugging Face hub cannot be reached"
        raise ValueError(f"{name}: no such folder, it is not in the hub's cache, and {reason}") from error
    except (OSError, errors.HFValidationError) as error:
        raise ValueError(
            f"{name} cannot be had from the Hugging Face hub: {str(error).strip().splitlines()[0]}"
        ) from error


@contextmanager
def wrap_load_errors(folder: Path) -> Iterator[None]:
    """Inside, what files with the wrong things in them make libraries raise, each its own way, is a ValueError in one
    line that names the folder."""
    from huggingface_hub.errors import StrictDataclassError

    kinds = (KeyError, IndexError, TypeError, AttributeError, ArithmeticError, OSError, RuntimeError)
    try:
        yield
    except (*kinds, StrictDataclassError) as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"model folder {folder} is damaged, or not as its family's are ({what})") from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: the model folder is not whole") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds no JSON object")
    return data


def image_processor_config(folder: Path) -> dict[str, Any]:
    """How a public model's pictures are read: preprocessor_config.json, or what transformers 5 writes in its place, the
    image processor's part of processor_config.json. Raises ValueError where both are missing."""
    path = folder / "processor_config.json"
    config = read_json(path).get("image_processor") if path.is_file() else None
    if isinstance(config, dict) and not (folder / "preprocessor_config.json").is_file():
        return config
    return read_json(folder / "preprocessor_config.json")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a pickle of torch's. Raises ValueError in one line where it is missing,
    cut off or damaged, or where the pickle holds more than tensors and plain values."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return strip_wrapper_prefixes(load_file(path)) if path.suffix == ".safetensors" else _load_pickle(path)
    except (FileNotFoundError, SafetensorError, OSError, RuntimeError, EOFError) as error:
        raise ValueError(f"checkpoint {path} cannot be read (missing, cut off or damaged): {error}") from error


STATE_DICT_KEYS = ("state_dict", "model", "module", "trainer", "var_wo_ddp", "ema")
"""What checkpoints hold their tensors under: torch's trainers, deepspeed, VAR's."""
PICKLE_SAFE_TYPES: list[Any] = [argparse.Namespace, np.dtype, np.float64(0).__reduce__()[0], np.dtypes.Float64DType]
PICKLE_SAFE_TYPES += [np.dtypes.Float32DType, np.dtypes.Int64DType]
"""What trainers keep beside tensors, and what runs no code: their arguments, and numbers of numpy."""
WRAPPER_PREFIXES = ("module.", "_orig_mod.")
"""What parallel and compiled modules put before the names of their tensors."""


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
    """The file of this pattern, the one of this name where there are several."""
    found = {path.stem: path for path in sorted(folder.glob(pattern))}
    if name is None and len(found) == 1:
        return next(iter(found.values()))
    if name not in found:
        raise ValueError(f"{folder} holds {', '.join(found) or 'no model'}: name one after a colon")
    return found[name]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder: of model.safetensors or pytorch_model.bin, whole or in shards."""
    for name in WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return {key: tensor for file in shard_files(index) for key, tensor in read_tensors(folder / file).items()}
        if (folder / name).is_file():
            return read_tensors(folder / name)
    hint = "; ONNX, GGUF, TensorFlow and Flax are not read"
    raise ValueError(f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin{hint}")


def needs_unwrapping(folder: Path) -> bool:
    """Are the weights of a model folder in a pickle, which may hold more than tensors, or all under a prefix?"""
    from safetensors import safe_open

    path = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if any((folder / f"{name}.index.json").is_file() for name in WEIGHT_FILES) or path is None:
        return False
    if path.suffix == ".bin":
        return True
    with safe_open(path, "pt") as file:
        names = list(file.keys())
    return any(names and all(name.startswith(prefix) for name in names) for prefix in WRAPPER_PREFIXES)


def load_pretrained(kind: Any, folder: Path, dtype: torch.dtype | None, state: dict[str, Tensor] | None = None) -> Any:
    """`kind.from_pretrained` of a folder (whole or sharded), strictly; dtype: None is as it is stored; state: the
    tensors, where they are not as they stand there. Raises ValueError in one line where tensors are missing, left over
    or of another shape, and where a file is damaged."""
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
                config = getattr(kind, "config_class", AutoConfig).from_pretrained(folder)
                kind = kind if hasattr(kind, "config_class") else kind._model_mapping[type(config)]
                overrides = {"state_dict": state, "config": config}
            model, report = kind.from_pretrained(
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

    PreTrainedModel.from_pretrained = classmethod(strict)  # type: ignore[assignment]
    try:
        yield
    finally:
        PreTrainedModel.from_pretrained = original


def with_architecture(lm: Any, architecture: str, **settings: Any) -> Any:
    """The same language model, to be written: its config.json names another class, and says more."""
    other = copy.copy(lm)
    other.__class__ = type(architecture, (type(lm),), {})
    other.config = copy.deepcopy(lm.config)
    other.config.update(settings)
    return other


@contextmanager
def silence_transformers() -> Iterator[None]:
    """transformers without its bars and its table of what a checkpoint lacks: we say that ourselves, in one line."""
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


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


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
"""What tensors are called in a public file, and here."""


def rename_key(name: str, prefixes: KeyRenames, inside: KeyRenames = (), back: bool = False) -> str:
    """A tensor's name here, of its public one: the first prefix that fits is exchanged, and of `inside` each in turn;
    with back=True the public one. A name that no prefix fits stays."""
    pairs = [(b, a) if back else (a, b) for a, b in prefixes]
    old, new = next((pair for pair in pairs if name.startswith(pair[0])), ("", ""))
    for public_part, own_part in reversed(inside) if back else inside:
        name = name.replace(own_part, public_part) if back else name.replace(public_part, own_part)
    return new + name[len(old) :]


def load_strict(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Load every tensor of `state` into `module`, none missing, none left. Raises ValueError listing the difference."""
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


_held_locks: set[int] = set()
"""Descriptors of the locks that this process holds."""


def lock(path: str | Path) -> int | None:
    """Take the lock of a file or folder that exists, without waiting. It ends with this process, however that ends;
    processes that are forked do not have it.

    Returns: what `unlock` takes; None where the file system has no locks. Raises BlockingIOError where another process
    has it, and OSError where there is no such file."""
    import fcntl

    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise
        return None
    _held_locks.add(handle)
    return handle


def unlock(handle: int | None) -> None:
    if handle is not None:
        _held_locks.discard(handle)
        os.close(handle)


def _close_locks() -> None:
    for handle in _held_locks:
        os.close(handle)
    _held_locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_locks)  # a child that outlives a killed process would keep its locks


def clear_scratch(folder: Path) -> None:
    """Remove the scratch folders that killed processes left beside `folder`, links followed. Where one was killed while
    `folder` had no name, its old contents come back."""
    folder = Path(os.path.realpath(folder))
    named = re.compile(rf"\.{re.escape(_scratch_name(folder))}\.(\w{{8}}\.scratch|\w{{8}}\.old|old\d+)")
    for scratch_folder in sorted(folder.parent.iterdir()):
        if not named.fullmatch(scratch_folder.name) or not scratch_folder.is_dir():
            continue
        try:
            handle = lock(scratch_folder)
        except OSError:
            continue
        if handle is None:  # nobody can say whether it is still written
            continue
        if not scratch_folder.name.endswith(".scratch") and not folder.exists():
            os.replace(scratch_folder, folder)
        else:
            shutil.rmtree(scratch_folder, ignore_errors=True)
        unlock(handle)


def _scratch_name(folder: Path) -> str:
    """With what the names of a folder's scratch folders begin: its own name, or a digest of a long one, since theirs
    are longer and names have at most 255 bytes."""
    name = os.fsencode(folder.name)
    return folder.name if len(name) <= 200 else hashlib.blake2b(name, digest_size=16).hexdigest()


@contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends well; else nothing is changed. Where
    `folder` is a symbolic link, what it names is replaced and the link stays.

    A process that is killed leaves a whole `folder`, the old or the new one, and beside it a scratch folder that the
    next call removes. Raises ValueError where the folder cannot be written."""
    folder = Path(os.path.realpath(folder))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        clear_scratch(folder)
        scratch = Path(tempfile.mkdtemp(prefix=f".{_scratch_name(folder)}.", suffix=".scratch", dir=folder.parent))
    except OSError as error:
        raise ValueError(f"cannot write the folder {folder}: {error.strerror}") from error
    handle = lock(scratch)
    try:
        yield scratch
        scratch.chmod(0o755)
        if folder.exists() and not _swap_paths(scratch, folder):
            old = scratch.with_suffix(".old")
            os.replace(folder, old)
            os.replace(scratch, folder)
            shutil.rmtree(old, ignore_errors=True)
        elif not folder.exists():
            os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        unlock(handle)


def _swap_paths(one: Path, other: Path) -> bool:
    """Let two paths swap what they name, in one step. False where the system cannot; Linux can."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return swap is not None and swap(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def write_tensors(path: Path, state: dict[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Write tensors as safetensors, floats cast to `dtype` (None: kept)."""
    from safetensors.torch import save_file

    tensors = {k: v.detach().to("cpu", dtype if v.is_floating_point() else None).contiguous() for k, v in state.items()}
    save_file(tensors, path)
    path.chmod(0o644)  # safetensors makes files that only their owner can read
