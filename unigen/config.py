"""Configurations as plain dataclasses: to and from nested dicts, strict overrides.

It does not depend on what is configured: no torch, no models, no recipes. Importing it costs milliseconds.

    cfg = apply_overrides(RunConfig(), ["optim.lr=1e-5", "steps=100"])
    save_json("run/config.json", to_dict(cfg))         # unigen.utils.files
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, TypeVar

from unigen.utils.files import to_json_value
from unigen.utils.numbers import parse_float, parse_int, strip_digit_groups

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
TypeHint: TypeAlias = Any
"""The annotation of a field, as `typing.get_type_hints` gives it."""


# ---------------------------------------------------------------- what every run can be told


@dataclass
class OptimConfig:
    """AdamW and its schedule."""

    RENAMED: ClassVar[Mapping[str, str]] = {"warmup": "warmup_steps", "clip": "grad_clip", "min_ratio": "min_lr_ratio"}
    """Keys of version 0.1, and their names now."""

    lr: float = 3e-4
    """The highest learning rate, after the warm-up; above 0."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the averages of gradients and of their squares, each in [0, 1)."""
    eps: float = 1e-8
    """Added to the denominator of a step."""
    weight_decay: float = 0.05
    """Of matrices only; 0 or more."""
    warmup_steps: int = 100
    """Steps in which the learning rate rises linearly; 0 is none."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """The shape of the decay over the run."""
    min_lr_ratio: float = 0.1
    """The share of `lr` that is left at the end, in [0, 1]."""
    grad_clip: float = 1.0
    """The largest norm of the gradient; 0 is off."""

    def __post_init__(self) -> None:
        _check(self.lr > 0, "optim.lr must be above 0")
        _check(all(0 <= b < 1 for b in self.betas), "optim.betas must lie in [0, 1)")
        _check(self.warmup_steps >= 0, "optim.warmup_steps must be 0 or more")
        _check(0 <= self.min_lr_ratio <= 1, "optim.min_lr_ratio must lie in [0, 1]")
        _check(self.grad_clip >= 0, "optim.grad_clip must be 0 (off) or more")
        _check(self.weight_decay >= 0, "optim.weight_decay must be 0 or more")


@dataclass
class RunConfig:
    """What the Trainer reads. A recipe subclasses it to add plain fields of its own.

    A subclass or a nested configuration whose fields change name says so in a table RENAMED of its own.
    """

    RENAMED: ClassVar[Mapping[str, str]] = {
        "accumulate": "accumulation_steps",
        "keep": "keep_checkpoints",
        "workers": "num_workers",
        "ema": "ema_decay",
    }
    """Keys of version 0.1, and their names now."""

    steps: int = 1000
    """Optimizer steps of the run, 1 or more."""
    batch_size: int = 32
    """Samples of a micro-batch and process: a step reads batch_size * accumulation_steps * processes samples."""
    accumulation_steps: int = 1
    """Micro-batches of a step."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and schedule."""
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """Of the forward pass; auto is bf16 where the GPU or the processor is fast in it, else fp32."""
    ema_decay: float = 0.999
    """Of the averaged weights, in [0, 1); 0 is off."""
    seed: int = 0
    """From 0 to 2**64 - 1. Every random draw of the run is a function of it and of a position."""
    num_workers: int = 2
    """Processes that make batches; 0: the training process itself."""
    shuffle: bool = True
    """Whether each epoch of a data set with a length has another order."""
    log_every: int = 20
    """Steps between two lines of metrics."""
    save_every: int = 500
    """Steps between two checkpoints; 0 is off. The end of a run is always saved."""
    sample_every: int = 500
    """Steps between two calls of the recipe's `write_samples`; 0 is off."""
    keep_checkpoints: int = 2
    """Checkpoints that stay on disk, 1 or more."""
    run_dir: str = "runs/default"
    """The folder of the run."""
    init_from: str | None = None
    """A model to begin from, for recipes that read it."""
    time_limit: float | None = None
    """Seconds of training, over all sessions of the run: it ends at `steps` or at the limit, whichever is first, and
    the schedule follows the same clock."""

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "keep_checkpoints"):
            _check(getattr(self, name) >= 1, f"{name} must be 1 or more")
        for name in ("save_every", "sample_every"):
            _check(getattr(self, name) >= 0, f"{name} must be 0 or more")
        for name, low, high in (
            ("batch_size", 1, 1_000_000),
            ("accumulation_steps", 1, 1_000_000),
            ("num_workers", 0, 256),
            ("seed", 0, 2**64 - 1),
        ):
            _check(low <= getattr(self, name) <= high, f"{name} must be {low} or more, and at most {high}")
        _check(0 <= self.ema_decay < 1, "ema_decay must lie in [0, 1); 0 is off")
        _check(self.time_limit is None or self.time_limit > 0, "time_limit must be above 0 seconds")
        _check(bool(self.run_dir), "run_dir must name a folder")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


# ---------------------------------------------------------------- dataclass <-> dict, overrides


def to_dict(cfg: "DataclassInstance") -> dict[str, Any]:
    """A dataclass as nested plain dicts; tuples become lists, paths text, as JSON has it."""
    assert dataclasses.is_dataclass(cfg) and not isinstance(cfg, type)
    return {f.name: to_json_value(getattr(cfg, f.name)) for f in dataclasses.fields(cfg)}


def from_dict(cls: type[T], values: Mapping[str, object]) -> T:
    """The dataclass `cls` from nested dicts. Missing keys take the default, keys that have changed name are read;
    ValueError for an unknown key or a wrong type."""
    return _build_dataclass(cls, values, "")


def apply_overrides(cfg: T, overrides: Iterable[str]) -> T:
    """A copy of `cfg` with `dotted.key=value` texts applied, of two for one key the later.

    Texts are read by the field's type: int, float, bool (true/false), str, none where the type allows it, tuples as
    `1,2` or `(1,2)`, one of the choices; of a table one entry, as `name.entry=value`. ValueError names the unknown key
    and the nearest valid ones, or the type that was expected, or the key that has no value."""
    changes: dict[str, Any] = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        _check(bool(equals) and bool(key.strip()), f"override {item!r} is not of the form key=value")
        _collect_override(changes, cfg, key.strip().split("."), text.strip(), key.strip())
    return _replace_nested(cfg, changes)


def _collect_override(changes: dict[str, Any], cfg: object, path: list[str], text: str, full_key: str) -> None:
    """Note one override of `cfg` in `changes`, field -> value, nested where the field is a dataclass."""
    hints, names = typing.get_type_hints(type(cfg)), _field_names(cfg)
    head, tail = path[0], path[1:]
    if head not in names:
        if head in (renamed := renamed_keys(type(cfg))):
            new = ".".join([full_key.removesuffix(".".join(path)) + renamed[head], *tail])
            raise ValueError(f"unknown key {full_key!r}; it is called {new} now")
        prefix = full_key[: len(full_key) - len(".".join(path))]
        groups = [name for name in names if dataclasses.is_dataclass(getattr(cfg, name))]
        inside = [f"{group}.{head}" for group in groups if head in _field_names(getattr(cfg, group))]
        raise ValueError(_unknown_key_message(full_key, prefix, head, names, inside))
    current = getattr(cfg, head)
    if dataclasses.is_dataclass(current):
        _check(bool(tail), f"{full_key} is a group: set one of {_join_names(full_key + '.', _field_names(current))}")
        _collect_override(changes.setdefault(head, {}), current, tail, text, full_key)
    elif isinstance(current, dict):
        _check(len(tail) == 1, f"{full_key} is a table: set an entry, as {head}.NAME=value")
        value = _parse(typing.get_args(hints[head])[1], text, full_key)
        changes[head] = changes.get(head, current) | {tail[0]: value}
    else:
        _check(not tail, f"unknown key {full_key!r}: {head!r} has no parts")
        changes[head] = _parse(hints[head], text, full_key)


def _replace_nested(cfg: T, changes: dict[str, Any]) -> T:
    """A copy with all changes made at once, so that only the whole has to be valid."""
    values = {
        name: _replace_nested(getattr(cfg, name), value) if dataclasses.is_dataclass(getattr(cfg, name)) else value
        for name, value in changes.items()
    }
    return dataclasses.replace(cfg, **values)  # type: ignore[type-var]  # a dataclass, which T does not say


def renamed_keys(cls: type) -> dict[str, str]:
    """The keys of a configuration that have changed name, old -> new: those of its RENAMED and of its bases'."""
    return {old: new for base in reversed(cls.__mro__) for old, new in base.__dict__.get("RENAMED", {}).items()}


def rename_stored_keys(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """A stored configuration with today's keys.

    Args:
        cls: the dataclass whose keys they are.
        values: nested dicts, as an earlier version may have written them.

    Returns:
        The same values under today's keys; keys that are not known stay.
    """
    renamed, hints = renamed_keys(cls), typing.get_type_hints(cls)
    result = {}
    for old, value in values.items():
        name = renamed.get(old, old)
        nested = dataclasses.is_dataclass(hints.get(name)) and isinstance(value, Mapping)
        result[name] = rename_stored_keys(hints[name], value) if nested else value
    return result


def _field_names(cfg: object) -> list[str]:
    assert dataclasses.is_dataclass(cfg)
    return [f.name for f in dataclasses.fields(cfg)]


def _join_names(prefix: str, names: Iterable[str]) -> str:
    return ", ".join(prefix + name for name in names)


def _unknown_key_message(full_key: str, prefix: str, name: str, names: list[str], inside: Iterable[str] = ()) -> str:
    """The message of an unknown key. inside: keys of groups that are called so."""
    matches = [*inside] or difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {_join_names(prefix, matches)}?" if matches else f"valid keys: {_join_names(prefix, names)}"
    return f"unknown key {full_key!r}; {hint}"


def _type_name(hint: TypeHint) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(a) for a in args)
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in args)
    if hint is type(None):
        return "none"
    return getattr(hint, "__name__", str(hint)) if not args else str(hint)


def _parse(hint: TypeHint, text: str, key: str) -> object:
    """`text` as a value of the type `hint`; ValueError naming `key` and the type."""
    if not text:
        none = type(None) in typing.get_args(hint)
        raise ValueError(f"{key} has no value: give one ({_type_name(hint)}){', such as none' if none else ''}")
    type_error = ValueError(f"{key} expects {_type_name(hint)}, not {text!r}")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if type(None) in args and text.lower() in ("none", "null"):
            return None
        for option in sorted((a for a in args if a is not type(None)), key=lambda a: a is str):  # text fits a str last
            try:
                return _parse(option, text, key)
            except ValueError:
                continue
        raise type_error
    if origin is Literal:
        for choice in args:
            if text == str(choice):
                return choice
        raise type_error
    if origin in (tuple, list) or hint in (tuple, list):
        inner = text[1:-1] if text[:1] + text[-1:] in ("()", "[]") else text
        parts = [p.strip() for p in inner.split(",") if p.strip()]
        hints = _item_hints(origin or hint, args, len(parts))
        if hints is None:
            raise type_error
        values = [_parse(h, p, key) for h, p in zip(hints, parts, strict=True)]
        return values if list in (origin, hint) else tuple(values)
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise type_error
        return text.lower() == "true"
    if hint in (int, float):
        try:
            number = parse_int(strip_digit_groups(text)) if hint is int else parse_float(strip_digit_groups(text))
        except ValueError:
            raise type_error from None
        if not math.isfinite(number):
            raise type_error
        return number
    if hint is str:
        return text
    if hint is Path:
        return Path(text)
    raise ValueError(f"{key} cannot be set by text (its type is {_type_name(hint)})")


def _item_hints(origin: TypeHint, args: tuple[TypeHint, ...], count: int) -> list[TypeHint] | None:
    """The type of each of `count` items of tuple[...] or list[...]; None where the number does not fit."""
    if not args:
        return [str] * count
    if origin is list or (len(args) == 2 and args[1] is Ellipsis):
        return [args[0]] * count
    return list(args) if len(args) == count else None


def _build_dataclass(cls: TypeHint, values: object, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix.rstrip('.') or 'the configuration'} must be a table of keys")
    renamed = renamed_keys(cls)
    renamed_values: dict[str, object] = {renamed.get(str(name), str(name)): value for name, value in values.items()}
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for name in renamed_values:
        if name not in names:
            raise ValueError(_unknown_key_message(prefix + name, prefix, name, names))
    values_by_name = {name: _coerce(hints[name], value, prefix + name) for name, value in renamed_values.items()}
    missing_keys = [
        f.name
        for f in dataclasses.fields(cls)
        if f.name not in values_by_name
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    _check(not missing_keys, f"missing keys: {_join_names(prefix, missing_keys)}")
    return cls(**values_by_name)


def _coerce(hint: TypeHint, value: object, key: str) -> object:
    """`value` as JSON has it, as a value of the type `hint`."""
    type_error = ValueError(f"{key} expects {_type_name(hint)}, not {value!r}")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, typing.cast("type", hint)) else _build_dataclass(hint, value, key + ".")
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return _coerce(option, value, key)
            except ValueError:
                continue
        raise type_error
    if origin is Literal:
        if value not in args:
            raise type_error
        return value
    if origin in (tuple, list) or hint in (tuple, list):
        items = value if isinstance(value, (list, tuple)) else ()
        hints = _item_hints(origin or hint, args, len(items)) if items is value else None
        if hints is None:
            raise type_error
        values = [_coerce(h if args else Any, v, key) for h, v in zip(hints, items, strict=True)]
        return values if list in (origin, hint) else tuple(values)
    if origin is dict or hint is dict:
        if not isinstance(value, Mapping):
            raise type_error
        return {k: _coerce(args[1] if args else Any, v, f"{key}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise type_error
    return value
