"""Progress of long work, for people: a bar on stderr, or in a notebook.

Nothing is shown where nobody looks: where stderr is no terminal and Python runs in no notebook, or where the
environment variable TQDM_DISABLE is set. A bar appears after a second and leaves nothing behind.

    with bar(len(prompts), "image") as shown:
        for prompt in prompts:
            ...
            shown.update(1)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

DELAY = 1.0
"""Seconds after which a bar appears."""


def in_notebook() -> bool:
    """Does this run in a kernel of Jupyter's?"""
    shell = sys.modules.get("IPython")
    running = shell.get_ipython() if shell is not None else None
    return running is not None and "IPKernelApp" in running.config


_suppressed = False


@contextmanager
def suppress_bars() -> Iterator[None]:
    """Show nothing while the block runs."""
    global _suppressed
    previous, _suppressed = _suppressed, True
    try:
        yield
    finally:
        _suppressed = previous


def visible() -> bool:
    """Is there anybody to see a bar?"""
    if _suppressed or os.environ.get("TQDM_DISABLE", "0") not in ("", "0", "false", "False"):
        return False
    return in_notebook() or (sys.stderr is not None and sys.stderr.isatty())


def bar(total: int | None, unit: str, *, fractions: bool = False, silent: bool = False) -> Any:
    """A bar of tqdm's, for a terminal or a notebook; a silent one where nobody looks.

    Args:
        total: how much there is to do, by which `update` counts; None where that is not known.
        unit: what is counted, such as "image".
        fractions: `update` is given parts of a unit too, so that percent are shown and no count.
        silent: show nothing, wherever this runs.
    """
    from tqdm.auto import tqdm

    bar_format = "{l_bar}{bar}| [{elapsed}<{remaining}]" if fractions else None
    if total is None:
        bar_format = "{n} {unit}s [{elapsed}]"
    return tqdm(
        total=total, unit=unit, delay=DELAY, leave=False, disable=silent or not visible(), bar_format=bar_format
    )


@contextmanager
def status(text: str) -> Iterator[None]:
    """A line on a terminal's stderr while the block runs; it is wiped afterwards."""
    is_visible = visible() and not in_notebook()
    if is_visible:
        print(f"{text} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if is_visible:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
