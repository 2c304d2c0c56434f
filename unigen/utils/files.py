"""JSON files and reports: written whole or not at all.

Nothing heavy is imported here: the command line reads it.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def to_json_value(value: object) -> object:
    """A value in JSON's own types.

    Args:
        value: of plain types, dataclasses, paths, arrays and scalars of numpy or torch, nested.

    Returns:
        The value; NaN and infinities are None, tuples and sets lists.

    Raises:
        ValueError: JSON has no such type.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): to_json_value(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_json_value(v) for v in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json_value(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if hasattr(value, "tolist"):
        return to_json_value(value.tolist())
    raise ValueError(f"cannot write a {type(value).__name__} as JSON")


def save_json(path: str | os.PathLike[str], obj: object) -> None:
    """Write strict JSON, whole or not at all. The folder is made.

    Args:
        path: of the file; "-" is the process's stdout, whatever `sys.stdout` is.
        obj: as of `to_json_value`.

    Raises:
        ValueError: in one line, where it cannot be written.
    """
    path = Path(path)
    text = json.dumps(to_json_value(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if str(path) == "-":
        print(text, end="", file=sys.__stdout__, flush=True)
        return
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=".unigen-", suffix=".tmp", delete=False
        ) as file:
            temporary = file.name
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from error


def load_json(path: str | os.PathLike[str]) -> Any:
    """Read JSON.

    Args:
        path: of the file.

    Returns:
        What it holds.

    Raises:
        ValueError: in one line, where the file is missing or damaged.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error


def hardware_summary() -> str:
    """The machine in words: the name of the GPU where torch is loaded and sees one, else that of the CPU, with its
    usable cores."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("model name", "hardware")):
                name = line.partition(":")[2].strip() or name
                break
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{name}, {cores} cores"


def write_report(
    path: str | os.PathLike[str],
    *,
    command: str,
    model: str,
    overall: float | None = None,
    tasks: Mapping[str, float] | None = None,
    rows: Iterable[Mapping[str, object]] = (),
    seconds: float | None = None,
    **extra: object,
) -> dict[str, Any]:
    """Write the figures of an evaluation or a benchmark as one JSON object, with the hardware and the date (UTC, ISO).

    Args:
        path: of the file.
        command: the full line that repeats the measurement.
        model: what was measured.
        overall: one figure for all.
        tasks: a figure for each task, by name.
        rows: each with name, value, unit, baseline, ratio, batch and others; of these six, what is left out is null.
        seconds: that the measurement took.
        **extra: further fields.

    Returns:
        The object.

    Raises:
        ValueError: in one line, where the file cannot be written.
    """
    keys = ("name", "value", "unit", "baseline", "ratio", "batch")
    report = {
        "command": command,
        "model": model,
        "hardware": hardware_summary(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": seconds,
        "overall": overall,
        "tasks": dict(tasks or {}),
        "rows": [dict.fromkeys(keys) | dict(row) for row in rows],
    } | extra
    save_json(path, report)
    return report
