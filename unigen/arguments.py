"""Command line arguments whose errors are one line, and suggestions for misspelt names.

Standard library only: importing it costs milliseconds.
"""

from __future__ import annotations

import argparse
import ast
import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """The end of an error message that names the known word most like this one: '; did you mean ...?', or ''."""
    near = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def summary(file: Path) -> str:
    """The first paragraph of a Python file's docstring, in one line, read without running it; '' if there is none."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def name(value: str) -> str:
    """The type of an argument that names a model, a file, a folder or a way to do something: all but nothing."""
    if not value.strip():
        raise argparse.ArgumentTypeError("it is empty; give a name, or leave it out")
    return value


class Parser(argparse.ArgumentParser):
    """argparse that raises ValueError for bad arguments, in one line, and suggests the option that was meant."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            option = next((word.partition("=")[0] for word in rest if word.startswith("-")), None)
            if option is None:
                hint = "; put a sentence in quotes"
            else:
                hint = did_you_mean(option, self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
        for action in self._actions:
            given = getattr(found, action.dest, None)
            if action.nargs is None and given is not action.default and isinstance(given, list):
                if not given or [] in given:  # Python 3.11 reads --name=-- as an empty list
                    self.error(f"argument {'/'.join(action.option_strings)}: expected one argument")
        return found

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file)  # argparse hides what goes wrong while it writes

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")
