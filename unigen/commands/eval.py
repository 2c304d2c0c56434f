"""The command `eval`: `unigen eval scenes --quick`. Each task is a module of `unigen/evaluation/tasks`."""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stdout
from typing import TYPE_CHECKING

from unigen.commands.arguments import load, model_arguments
from unigen.utils.argparser import OneLineParser

if TYPE_CHECKING:
    from unigen.evaluation.runner import EvaluationTask

HELP = "score a model"


def run(arguments: list[str]) -> int:
    """Run an evaluation task.

    Args:
        arguments: the line after `unigen eval`: the task, then its arguments.

    Returns:
        The exit code.

    Raises:
        ValueError: for an unknown task or bad input.
    """
    from unigen.evaluation import runner

    if not arguments or arguments[0] in ("-h", "--help"):
        print(runner.help_text())
        return 0
    task = runner.find_task(arguments[0])
    args = build_parser(arguments[0], task).parse_args(arguments[1:])
    runner.check_arguments(args)
    # with --json - nothing else goes to stdout
    with redirect_stdout(sys.stderr) if args.json == "-" else nullcontext():
        runner.run_task(task, args, lambda: load(args), " ".join(["unigen eval", *arguments]))
    return 0


def build_parser(name: str, task: type[EvaluationTask]) -> OneLineParser:
    """The parser of one task.

    Args:
        name: of the task.
        task: its class.

    Returns:
        The parser, with the task's own arguments, options of the generation and those of the model.
    """
    from unigen.evaluation import runner

    parser = OneLineParser(prog=f"unigen eval {name}", description=task.description)
    runner.add_arguments(parser, task)
    model_arguments(parser)
    return parser
