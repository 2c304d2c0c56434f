"""The generators of a model by name. Some are built only when they are first used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from unigen.generators import find_generator
from unigen.generators.base import Generator
from unigen.options import GroupType


class GeneratorDict(dict[str, Any]):
    """Generators by name, in order.

    Those with a factory are built when they are first used, so that a model that never uses them does not import what
    they need. The names include generators that are not built yet.
    """

    def __init__(
        self,
        generators: Mapping[str, Generator | None],
        factories: Mapping[str, Callable[[], Generator]] | None = None,
    ) -> None:
        """
        Args:
            generators: by name; None for one that a factory builds.
            factories: by name, functions that build the others.
        """
        super().__init__(generators)
        self.factories = dict(factories or {})
        """Factories of the generators that are not built yet, by name."""
        self.on_build: Callable[[str, Generator], None] = lambda name, generator: None
        """Called with the name and each generator that a factory has built."""

    def __getitem__(self, name: str) -> Any:
        if name in self.factories:
            generator = self.factories.pop(name)()
            self[name] = generator
            self.on_build(name, generator)
        return super().__getitem__(name)

    def options(self, name: str) -> tuple[GroupType, ...]:
        """The groups of options that a generator takes, without building it."""
        groups: tuple[GroupType, ...] = (find_generator(name) if name in self.factories else self[name]).options
        return groups

    def conditions(self, name: str) -> frozenset[str]:
        """The kinds of conditions that a generator takes, without building it."""
        kinds: frozenset[str] = (find_generator(name) if name in self.factories else self[name]).conditions
        return kinds

    def build_all(self) -> None:
        """Build all generators that are not built yet."""
        for name in list(self.factories):
            self[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The generator of this name, built where necessary, or the default."""
        return self[name] if name in self else default

    def values(self) -> Any:
        """All generators, built where necessary."""
        return [self[name] for name in self]

    def items(self) -> Any:
        """All names and generators, built where necessary."""
        return [(name, self[name]) for name in self]
