"""The command `eval`: `unigen eval scenes --quick`."""

from __future__ import annotations

HELP = "score a model"


def run(arguments: list[str]) -> int:
    from unigen.evaluation.runner import main

    return main(arguments) or 0
