"""Command line arguments whose errors are one line, and suggestions for misspelt names.

Standard library only: importing it costs milliseconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from unigen.utils.text import did_you_mean


def non_empty(value: str) -> str:
    """The type of an argument that names a model, a file, a folder or a way to do something: all but nothing."""
    if not value.strip():
        raise argparse.ArgumentTypeError("it is empty; give a name, or leave it out")
    return value


class OneLineParser(argparse.ArgumentParser):
    """argparse that raises ValueError for bad arguments, in one line, and suggests the option that was meant."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse; ValueError in one line for words that are left over."""
        parsed, unrecognized = self.parse_known_args(args, namespace)
        if unrecognized:
            option = next((word.partition("=")[0] for word in unrecognized if word.startswith("-")), None)
            if option is None:
                hint = "; put a sentence in quotes"
            else:
                hint = did_you_mean(option, self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unrecognized)}{hint}")
        for action in self._actions:
            value = getattr(parsed, action.dest, None)
            if action.nargs is None and value is not action.default and isinstance(value, list):
                if not value or [] in value:  # Python 3.11 reads --name=-- as an empty list
                    self.error(f"argument {'/'.join(action.option_strings)}: expected one argument")
        return parsed

    def print_help(self, file: Any = None) -> None:
        """Print the help, and let errors of the output through."""
        print(self.format_help(), end="", file=file)  # argparse hides what goes wrong while it writes

    def error(self, message: str) -> NoReturn:
        """Raise ValueError in one line instead of leaving the program."""
        raise ValueError(f"{message}; see {self.prog} --help")
