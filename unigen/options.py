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
"""Options of version 0.1 by the names that they have now. A server still reads the old ones."""

DRAWING = frozenset({"image", "joint", "interleaved"})
"""What asks for pictures."""
WRITING = frozenset({"text", "interleaved"})
"""What asks for text."""


# ---------------------------------------------------------------- groups


@dataclass(frozen=True)
class Option:
    """One option, as its group declares it."""

    default: object
    "What holds where nobody says anything else."
    help: str
    "One line; {choices} in it is replaced."
    type: OptionType
    cli: str | None = None
    "The flag; None is made of the name, an empty one is none."
    http: str | None = None
    "The field of a request; None is the name, an empty one is none."
    served: OptionType | None = None
    "What one request to a server may say, where that is less."
    metavar: str | None = None
    "How help calls the value."
    reported: bool = True
    "Is it among the settings of an answer?"
    off: object = None
    "The value by which nothing is asked for."

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
    """Base of groups, which are frozen dataclasses whose fields are all made by `option`.

    A field that is left out is None, "as the model says"; `resolve` fills it. What is given is checked."""

    title: ClassVar[str] = "sampling"
    """Under which the command line lists them."""
    outputs: ClassVar[frozenset[str]] = DRAWING
    """What is asked for where they count: outputs of an engine, or "edit" and "inpaint"."""

    def __post_init__(self) -> None:
        for name, declared in self.options().items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, declared.type.check(name, value))

    @classmethod
    def options(cls) -> dict[str, Option]:
        """By name, in order."""
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        return {one.name: one.metadata["option"] for one in fields}

    @classmethod
    def argument(cls, name: str) -> Callable[[str], object]:
        """What parses this option, as a type of argparse."""
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
    """A group without gaps.

    Args:
        group: its type.
        sources: values by the names of options, first comes first. Other names and None are passed over.

    Returns:
        The group; options that no source has are as declared.

    Raises:
        ValueError: in one line, for a value that an option cannot have.
    """
    values = {}
    for name, declared in group.options().items():
        found = (source[name] for source in sources if source.get(name) is not None)
        values[name] = next(found, declared.default)
    return group(**values)


class OptionSet:
    """Groups without gaps, by their type; one that is not there is as declared."""

    def __init__(self, groups: Iterable[OptionGroup] = ()) -> None:
        self._groups = {type(group): group for group in groups}

    def __getitem__(self, group: type[G]) -> G:
        found = self._groups.get(group)
        return found if isinstance(found, group) else resolve(group)

    def __contains__(self, group: GroupType) -> bool:
        return group in self._groups

    def __iter__(self) -> Iterator[OptionGroup]:
        return iter(self._groups.values())


def find_groups(name: str) -> tuple[GroupType, ...]:
    """The groups that a module defines, or each module of a package, in order.

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
    """The names of all their options, each once, in order."""
    return tuple(dict.fromkeys(name for group in groups for name in group.options()))


def groups_for(groups: Iterable[GroupType], *outputs: str) -> tuple[GroupType, ...]:
    """Those of the groups that count where one of these outputs is asked for."""
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


def reject_unknown(what: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raises ValueError for a name that is not known, with the one that it has now or that may have been meant.

    Args:
        what: was asked, as the error says it.
        given: names of options.
        known: those there are.
    """
    for name in given:
        if name not in known:
            if RENAMED.get(name) in known:
                reject_renamed([name])
            suggestion = did_you_mean(name, known) or f": it takes {', '.join(known)}"
            raise ValueError(f"{what} has no option {name!r}{suggestion}")


def reject_renamed(given: Iterable[str]) -> None:
    """Raises ValueError for a name that an option no longer has, with its name now."""
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
                written = group.__annotations__[name]
                kind = written if isinstance(written, str) else inspect.formatannotation(written)
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
    """A flag that has another name now; who gives it is told."""

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
