"""Options of a generation: each is declared once, as a field of a group, in the room that uses it.

    @dataclass(frozen=True)
    class FlowOptions(OptionGroup):
        steps: int = option(20, "in how many steps", IntRange(1, 250))
        "Evaluations of the network."

    FlowOptions(steps=0)                                 # ValueError: steps must be a whole number from 1 to 250, not 0
    resolve(FlowOptions, {"steps": 8}, {"steps": 12})    # steps 8, all other fields as declared
    add_arguments(parser, [FlowOptions])                 # --steps STEPS

The command line, keywords of Python, checks, the HTTP schema and reported settings follow from the groups, which
`unigen.option_groups` collects. Does not depend on any group, nor on torch: `unigen --help` reads them.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from unigen.utils.option_types import FloatRange, IntRange, Name, OptionType
from unigen.utils.text import did_you_mean, join_names

RENAMED = {
    "fixed": "fixed_codes",
    "guidance_kind": "guider",
    "negative": "negative_prompt",
    "sampler": "solver",
    "vary": "variation",
}
"""New names of options by their names in version 0.1. A server still reads the old ones."""

DEFAULT_GENERATOR = "next-token"
"""Name of the image generator where none is named. Finished images stand in a document in its layout: codes in raster
order."""
DRAWING = frozenset({"image", "joint", "interleaved"})
"""Outputs that contain images."""
WRITING = frozenset({"text", "interleaved"})
"""Outputs that contain text."""


# ---------------------------------------------------------------- groups


@dataclass(frozen=True)
class Option:
    """One option, as its group declares it."""

    default: object
    "The value where neither the call nor the model sets one."
    help: str
    "One line for `--help`; `{choices}` is replaced by the names of the choices."
    type: OptionType
    cli: str | None = None
    "The flag; None derives it from the name, an empty string means no flag."
    http: str | None = None
    "The field of an HTTP request; None is the name, an empty string means no field."
    served: OptionType | None = None
    "The range that a server accepts, where it is narrower than `type`."
    metavar: str | None = None
    "The placeholder of the value in `--help`."
    reported: bool = True
    "Whether the settings of an answer report it."
    off: object = None
    "The value that switches the option off; it is accepted by generators without the option."

    def describe(self) -> str:
        """The help, with the choices that there are."""
        choices = self.type.choices if isinstance(self.type, Name) else None
        return self.help if choices is None else self.help.replace("{choices}", join_names(list(choices())))

    def flag(self, name: str) -> str:
        """The flag of the command line, for an option of this name; empty where it has none."""
        return f"--{name.replace('_', '-')}" if self.cli is None else self.cli

    def field_name(self, name: str) -> str:
        """The field of a request, for an option of this name; empty where it has none."""
        return name if self.http is None else self.http


def option(
    default: object,
    help: str,
    type: OptionType,
    *,
    cli: str | None = None,
    http: str | None = None,
    served: OptionType | None = None,
    metavar: str | None = None,
    reported: bool = True,
    off: object = None,
) -> Any:
    """A field of an `OptionGroup`, to be annotated with its type. Args: those of `Option`."""
    declared = Option(default, help, type, cli, http, served, metavar, reported, off)
    return dataclasses.field(default=None, metadata={"option": declared})


class OptionGroup:
    """Base of groups: frozen dataclasses whose fields are all made by `option`.

    A field that is left out is None, the model's default; `resolve` fills it. Given values are checked."""

    title: ClassVar[str] = "sampling"
    """Title of the group in `--help`."""
    outputs: ClassVar[frozenset[str]] = DRAWING
    """Where the options apply: outputs of an engine, or "edit" and "inpaint"."""

    def __post_init__(self) -> None:
        for name, declared in self.options().items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, declared.type.check(name, value))

    @classmethod
    def options(cls) -> dict[str, Option]:
        """The options by name, in order."""
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        return {one.name: one.metadata["option"] for one in fields}

    @classmethod
    def argument(cls, name: str) -> Callable[[str], object]:
        """The function that parses this option, as a `type` of argparse."""
        return cls.options()[name].type.parse

    def to_dict(self) -> dict[str, object]:
        """The options that have a value, by name."""
        return {name: value for name in self.options() if (value := getattr(self, name)) is not None}

    def to_settings(self) -> dict[str, object]:
        """The values that the settings of an answer report, as JSON holds them."""
        declared = self.options()
        return {n: declared[n].type.to_json(value) for n, value in self.to_dict().items() if declared[n].reported}


G = TypeVar("G", bound=OptionGroup)
F = TypeVar("F", bound=Callable[..., object])
GroupType = type[OptionGroup]


def resolve(group: type[G], *sources: Mapping[str, object]) -> G:
    """A group with a value for each option.

    Args:
        group: type of the group.
        sources: values by the names of options; the first source that has a value wins. Other names and None are
            ignored.

    Returns:
        The group; options that no source has get their declared default.

    Raises:
        ValueError: in one line, for a value that an option cannot have.
    """
    values = {}
    for name, declared in group.options().items():
        found = (source[name] for source in sources if source.get(name) is not None)
        values[name] = next(found, declared.default)
    return group(**values)


class OptionSet:
    """Groups with a value for each option, by type. A missing group has the declared defaults."""

    def __init__(self, groups: Iterable[OptionGroup] = ()) -> None:
        self._groups = {type(group): group for group in groups}

    def __getitem__(self, group: type[G]) -> G:
        group_options = self._groups.get(group)
        return group_options if isinstance(group_options, group) else resolve(group)

    def __contains__(self, group: GroupType) -> bool:
        return group in self._groups

    def __iter__(self) -> Iterator[OptionGroup]:
        return iter(self._groups.values())


def find_groups(name: str) -> tuple[GroupType, ...]:
    """Find the groups that a module defines, or those of each module of a package, in order.

    Args:
        name: the module's full name.
    """
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):
        names = sorted(found.name for found in pkgutil.iter_modules(module.__path__))
        return tuple(group for found in names for group in find_groups(f"{name}.{found}"))
    defined = [value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == name]
    return tuple(value for value in defined if issubclass(value, OptionGroup))


def option_names(groups: Iterable[GroupType]) -> tuple[str, ...]:
    """The names of all options of the groups, each once, in order."""
    return tuple(dict.fromkeys(name for group in groups for name in group.options()))


def groups_for(groups: Iterable[GroupType], *outputs: str) -> tuple[GroupType, ...]:
    """The groups that apply to at least one of these outputs."""
    return tuple(group for group in groups if group.outputs & set(outputs))


def merge_declared(groups: Iterable[GroupType]) -> dict[str, tuple[GroupType, Option]]:
    """Each option by its name, with the first of the groups that have it, and the widest of their ranges."""
    merged: dict[str, tuple[GroupType, Option]] = {}
    for group in groups:
        for name, declared in group.options().items():
            first_group, first = merged.get(name, (group, declared))
            merged[name] = (first_group, dataclasses.replace(first, type=_widest(first.type, declared.type)))
    return merged


def _widest(first: OptionType, second: OptionType) -> OptionType:
    if isinstance(first, IntRange) and isinstance(second, IntRange):
        return dataclasses.replace(first, low=min(first.low, second.low), high=max(first.high, second.high))
    if isinstance(first, FloatRange) and isinstance(second, FloatRange):
        return dataclasses.replace(first, low=min(first.low, second.low), high=max(first.high, second.high))
    return first


# ---------------------------------------------------------------- what is given by name


def reject_unknown(owner: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Reject unknown names of options.

    Args:
        owner: what takes the options, as the error names it.
        given: names of options.
        known: the names that it takes.

    Raises:
        ValueError: a name is unknown; the error has its new name, or a similar one.
    """
    for name in given:
        if name not in known:
            if RENAMED.get(name) in known:
                reject_renamed([name])
            suggestion = did_you_mean(name, known) or f": it takes {', '.join(known)}"
            raise ValueError(f"{owner} has no option {name!r}{suggestion}")


def reject_renamed(given: Iterable[str]) -> None:
    """Reject old names of options. Raises ValueError with the new name."""
    for name in given:
        if name in RENAMED:
            raise ValueError(f"the option {name!r} is called {RENAMED[name]!r} now")


def check_values(groups: Iterable[GroupType], given: Mapping[str, object]) -> dict[str, object]:
    """The values that are not None, each as one of the groups takes it. Raises ValueError in one line."""
    declared = merge_declared(groups)
    return {name: declared[name][1].type.check(name, value) for name, value in given.items() if value is not None}


def name_keywords(groups: Iterable[GroupType]) -> Callable[[F], F]:
    """A decorator for methods that take options as `**keywords`: their signature, as help, notebooks and the reference
    show it, lists each option with its type, and `options` for groups of them.

    Args:
        groups: of the options that the method takes.
    """

    def decorate(method: F) -> F:
        signature = inspect.signature(method)
        parameters = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        taken = {one.name for one in parameters}
        for name, (group, _) in merge_declared(groups).items():
            if name not in taken:
                annotation_text = group.__annotations__[name]
                kind = (
                    annotation_text if isinstance(annotation_text, str) else inspect.formatannotation(annotation_text)
                )
                annotation = f"{kind.removesuffix(' | None')} | None"
                parameters.append(
                    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
                )
        groups_annotation = "OptionGroup | Sequence[OptionGroup]"
        parameters.append(
            inspect.Parameter("options", inspect.Parameter.KEYWORD_ONLY, default=(), annotation=groups_annotation)
        )
        method.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return method

    return decorate


# ---------------------------------------------------------------- command lines


class RenamedAction(argparse.Action):
    """A flag that has another name now; the error names it."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        self.new_name = options["const"]

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Raises the parser's error with the new name."""
        parser.error(f"{self.option_strings[0]} is called {self.new_name} now")


def add_arguments(
    parser: argparse.ArgumentParser,
    groups: Iterable[GroupType],
    *,
    skip: Iterable[str] = (),
    defaults: Mapping[str, object] | None = None,
) -> None:
    """Add the flags of the groups' options, each None where it is not given, and those of their old names.

    Args:
        parser: of the command.
        groups: whose options it takes.
        skip: names of options that it does not take.
        defaults: what help names as the default of an option, where that is not the declared one.
    """
    titled: dict[str, Any] = {}
    for name, (group, declared) in merge_declared(groups).items():
        if name in set(skip) or not declared.flag(name):
            continue
        section = titled.get(group.title) or titled.setdefault(group.title, parser.add_argument_group(group.title))
        add_argument(section, name, declared, (defaults or {}).get(name))
    for old, new in RENAMED.items():
        flag, new_flag = f"--{old.replace('_', '-')}", f"--{new.replace('_', '-')}"
        if new_flag in parser._option_string_actions and flag not in parser._option_string_actions:
            parser.add_argument(flag, action=RenamedAction, const=new_flag)


def add_argument(section: Any, name: str, declared: Option, default: object = None) -> None:
    """Add the flag of one option to a parser or a group of its arguments."""
    help_text = declared.describe() + ("" if default is None else f" (default: {default})")
    names = {"dest": name} if declared.flag(name) != f"--{name.replace('_', '-')}" else {}
    form: dict[str, Any] = {"type": declared.type.parse, "metavar": declared.metavar}
    section.add_argument(declared.flag(name), help=help_text.replace("%", "%%"), **names, **form)


def given_arguments(args: argparse.Namespace, groups: Iterable[GroupType], skip: Iterable[str] = ()) -> dict[str, Any]:
    """The options that a command line gives, those of `skip` apart."""
    names = [name for name in option_names(groups) if name not in set(skip)]
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}
