"""Text for people: short forms of values, near misses of names, the first sentences of a file."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path


def shorten(value: object, most: int = 60) -> str:
    """The repr of a value in one line of at most `most` letters."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a number of more digits than Python writes out, an object whose repr is broken
        text = f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """The end of an error message that names the known word most like this one: '; did you mean ...?', or ''."""
    near = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def join_names(names: Sequence[str]) -> str:
    """Names as a sentence has them: "a, b or c"."""
    return " or ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def check_text(name: str, text: object) -> str:
    """The text. Raises ValueError for what is none, and for one that UTF-8 cannot hold: half of a character, as a cut
    in JSON's \\u notation leaves it, or bytes of another encoding on a command line."""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a text (str), not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X} at position {error.start}"
        raise ValueError(f"{name} is not valid Unicode ({half} is half a character): write it as UTF-8") from error
    return text


def docstring_summary(file: Path) -> str:
    """The first paragraph of a Python file's docstring, in one line, read without running it; '' if there is none."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def first_line(error: Exception) -> str:
    """The first line of an error's text, the name of its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
