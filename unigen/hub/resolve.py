"""Model folders: found by a shipped name, a path or a name on the Hugging Face hub; their JSON files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from unigen.options import RENAMED
from unigen.utils.text import did_you_mean, first_line

ASSETS = Path(__file__).parents[1] / "assets"
"""The models that come with the package, a folder each."""
MANIFEST = "unigen.json"
"""The file by which a folder is a model of ours."""
MANIFEST_FORMAT = 2
"""The format of unigen.json that is written. Version 0.1 wrote format 1, which is read."""
CONFIG = "config.json"
"""Settings of a model or of a part of it."""
HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
HUB_URL = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)")
MAX_NAME_LENGTH = 1000
METADATA_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model", "*.yaml")
"""Small files, which say what a model is."""
DUPLICATE_WEIGHT_PATTERNS = tuple(
    f"*{name}*" for name in (".fp16", ".bf16", ".fp32", ".non_ema", ".int8", "flax", "openvino", "onnx")
)
"""The same weights of a pipeline's part once more, whole or in shards."""
WEIGHT_VARIANTS = ("fp16", "bf16")
"""Variants of a pipeline's weights, which are read where there are no others."""
SAFETENSORS_PATTERNS = ("*.safetensors",)
WEIGHT_FILES = ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin")
"""Names of a model's weights, of which the first that is there is read; `.index.json` after the name lists shards."""

FolderCheck = Callable[[Path], None]
"""Raises ValueError for a folder, of which only the small files are there, whose model cannot be loaded."""


def shipped_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(p.parent.name for p in ASSETS.glob(f"*/{MANIFEST}"))


def resolve(
    name: str | Path,
    multi_model_repos: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
    check: FolderCheck | None = None,
    weight_patterns: Sequence[str] = (),
) -> tuple[Path, str | None]:
    """Find the folder of a model.

    Args:
        name: a shipped model, a path, or `owner/name[@revision]` on the Hugging Face hub, which is taken from its cache
            where it is there. After a colon may follow the name of one of several models that are there.
        multi_model_repos: for repositories of the hub that hold several models, the files of each by its name.
        check: as in `fetch_snapshot`.
        weight_patterns: as in `fetch_snapshot`.

    Returns:
        The folder, and the name after the colon, None where there is none.

    Raises:
        ValueError: there is no such model; in one line that names what there is.
    """
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
    match = HUB_NAME.fullmatch(name_part)
    if name_part.startswith(("./", "../", "/", "~")) or (match is None and "/" in name_part):
        raise ValueError(f"no folder {name_part} is here, so there is no model in it: check the path")
    if match:
        variants = (multi_model_repos or {}).get(match["repo"])
        if variants is None and variant:
            raise ValueError(f"{name_part} holds one model: leave out {variant!r}")
        if variants is None:
            return fetch_snapshot(match["repo"], match["revision"], check, weight_patterns), None
        if variant not in variants:
            raise ValueError(
                f"{name_part} holds several models: name one, as in {name_part}:{next(iter(variants))} "
                f"({', '.join(variants)})"
            )
        return _from_hub(match["repo"], match["revision"], variants[variant]), variant
    shipped_names = ", ".join(shipped_models()) or "none"
    raise ValueError(
        f"unknown model {str(name)!r}: neither a folder, nor a shipped model ({shipped_names}), nor "
        f"owner/name on the hub"
        f"{did_you_mean(name_part, shipped_models())}"
    )


def fetch_snapshot(
    repo: str, revision: str | None = None, check: FolderCheck | None = None, weight_patterns: Sequence[str] = ()
) -> Path:
    """Fetch a repository of the hub with each weight once: safetensors where it has them, else pickles.

    Args:
        repo: `owner/name`.
        revision: branch, tag or commit; None: the default branch.
        check: called when the small files are there, before weights are fetched.
        weight_patterns: files by which a model is known that has no settings beside it.

    Returns:
        The folder in the hub's cache.

    Raises:
        ValueError: it cannot be fetched, or `check` says that it cannot be loaded; in one line.
    """
    folder = _from_hub(repo, revision, METADATA_PATTERNS)
    if weight_patterns and not any((folder / name).is_file() for name in (CONFIG, MANIFEST, "model_index.json")):
        folder = _from_hub(repo, revision, (*METADATA_PATTERNS, *weight_patterns))
    if check is not None:
        check(folder)
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
    """Which variant of the weights is read where a part of a pipeline has no others.

    Args:
        folder: of a pipeline.

    Returns:
        "fp16" or "bf16"; None where all parts have plain weights.
    """
    for name in WEIGHT_VARIANTS:
        for config in folder.glob(f"*/{CONFIG}"):
            files = [path.name for path in config.parent.glob("*.safetensors")]
            if any(f".{name}." in file for file in files) and not any(is_default_weights(file) for file in files):
                return name
    return None


def is_default_weights(file: str) -> bool:
    """Whether a file holds weights that are no variant, by its name."""
    return file.endswith(".safetensors") and not any(fnmatch(file, pattern) for pattern in DUPLICATE_WEIGHT_PATTERNS)


def shard_files(index: Path) -> list[str]:
    """Files of sharded weights.

    Args:
        index: the JSON file that lists them.

    Returns:
        Names relative to its folder, sorted.

    Raises:
        ValueError: it is no such index, or names a file outside its folder.
    """
    try:
        files = sorted(set(read_json(index)["weight_map"].values()))
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is no index of weights: it has no weight_map") from error
    if outside_files := [file for file in files if Path(file).is_absolute() or ".." in Path(file).parts]:
        raise ValueError(f"{index} names {outside_files[0]}, which is not in its folder")
    return files


def fetch_metadata(repo: str) -> Path:
    """Fetch a repository of the hub without its weights, and return its folder. Raises ValueError as
    `fetch_snapshot`."""
    return _from_hub(repo, None, METADATA_PATTERNS)


def fetch_file(repo: str, file: str) -> Path:
    """Fetch one file of a repository of the hub, with the settings that stand beside it (.yaml).

    Args:
        repo: `owner/name`.
        file: its path in the repository.

    Returns:
        Where it is.

    Raises:
        ValueError: it is not there, or cannot be fetched; in one line.
    """
    path = _from_hub(repo, None, [file, str(Path(file).with_suffix(".yaml"))]) / file
    if not path.is_file():
        raise ValueError(f"{repo} on the Hugging Face hub has no {file}")
    return path


def find_component(folder: Path, name: str, description: str, fetch: Callable[[], Path]) -> Path:
    """Find a part that a model's repository may not bring along.

    Args:
        folder: of the model.
        name: of the file, or of the folder with a slash at the end.
        description: what it is, in words.
        fetch: gets it from elsewhere where the folder has none.

    Returns:
        The file or folder.

    Raises:
        ValueError: there is neither; in one line.
    """
    candidates = sorted(folder.rglob(name.rstrip("/")))
    try:
        return candidates[0] if candidates else fetch()
    except ValueError as error:
        raise ValueError(f"{folder} has no {name} ({description}), and {error}") from error


def _from_hub(repo: str, revision: str | None, patterns: Sequence[str], ignore_patterns: Sequence[str] = ()) -> Path:
    """The cached folder with the files of these patterns. ValueError in one line for what the hub answers."""
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE

    name = repo if revision is None else f"{repo}@{revision}"
    try:
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(ignore_patterns)
            )
        )
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
    """Inside, the errors that libraries raise for damaged files become a ValueError in one line that names the folder.

    Args:
        folder: of the model that is loaded.

    Raises:
        ValueError: in the place of a KeyError, RuntimeError and the like.
    """
    from huggingface_hub.errors import StrictDataclassError

    kinds = (KeyError, IndexError, TypeError, AttributeError, ArithmeticError, OSError, RuntimeError)
    try:
        yield
    except (*kinds, StrictDataclassError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"model folder {folder} is damaged, or not as its family's are ({reason})") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a model folder. Raises ValueError in one line where it is missing, damaged or no object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: the model folder is not whole") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds no JSON object")
    return data


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read unigen.json, of this or an earlier format.

    Args:
        folder: of a model of ours.

    Returns:
        Its contents by the keys of today.

    Raises:
        ValueError: in one line, where it is missing, damaged, or of a later format.
    """
    manifest = read_json(folder / MANIFEST)
    version = manifest.get("format", 1)
    if version not in range(1, MANIFEST_FORMAT + 1):
        reason = f"is of format {version!r}, which this version of unigen does not read"
        raise ValueError(f"{folder / MANIFEST} {reason}: install a later one")
    if "begins" in manifest:
        manifest["begin_tokens"] = manifest.pop("begins")
    if isinstance(sampling := manifest.get("sampling"), dict):
        for generator, options in sampling.items():
            if isinstance(options, dict):
                sampling[generator] = {RENAMED.get(name, name): value for name, value in options.items()}
    return manifest


def image_processor_config(folder: Path) -> dict[str, Any]:
    """How a public model's images are read: preprocessor_config.json, or what transformers 5 writes in its place, the
    image processor's part of processor_config.json.

    Args:
        folder: of the model.

    Returns:
        The settings.

    Raises:
        ValueError: both are missing.
    """
    path = folder / "processor_config.json"
    config = read_json(path).get("image_processor") if path.is_file() else None
    if isinstance(config, dict) and not (folder / "preprocessor_config.json").is_file():
        return config
    return read_json(folder / "preprocessor_config.json")
