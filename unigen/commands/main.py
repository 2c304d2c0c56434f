"""The command line: the commands of this folder, found by the names of their modules.

    unigen generate "two apples on a blue background" -o out.png
    unigen --help                                     (no torch is imported for this)

A command is a module with `HELP`, `add_arguments(parser)` and `run(args) -> exit code`. Without `add_arguments` it is
given the rest of the line. `STDOUT` names options that may be "-", with the kind of file that then goes to stdout.

Exit codes: 0; 2 for bad input (any ValueError: one line on stderr, no traceback); 1 for an internal error (traceback).
"""

from __future__ import annotations

import atexit
import importlib
import io
import os
import pkgutil
import shlex
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import NoReturn

import unigen.commands
from unigen.utils.argparser import OneLineParser
from unigen.utils.disk import DISK_ERRNOS
from unigen.utils.extras import missing_module_message
from unigen.utils.text import did_you_mean

HELPERS = ("arguments", "chat_session", "main")
"""Modules of this folder that are no commands."""
ORDER = (
    "generate",
    "describe",
    "edit",
    "joint",
    "inpaint",
    "story",
    "chat",
    "serve",
    "train",
    "eval",
    "convert",
    "info",
)
"""In which commands are listed; others follow by name."""
RENAMED = {"pair": "joint"}
"""Commands of version 0.1, and their names now."""


def find_commands() -> dict[str, ModuleType]:
    """Import the modules of all commands. Returns them by name, in the order of the help text."""
    names = {module.name for module in pkgutil.iter_modules(unigen.commands.__path__)} - set(HELPERS)
    ordered = [*(name for name in ORDER if name in names), *sorted(names - set(ORDER))]
    return {name: importlib.import_module(f"unigen.commands.{name}") for name in ordered}


COMMANDS = find_commands()


def usage() -> str:
    """The help text of `unigen` itself: each command with its `HELP`."""
    rows = [f"  {name:<10} {command.HELP}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: unigen COMMAND ...",
            "",
            "One model that reads and writes text and pictures.",
            "",
            "commands:",
            *rows,
            "",
            "unigen COMMAND --help says more; unigen --version prints the version.",
        ]
    )


def build_parser(name: str) -> OneLineParser:
    """The parser of one command.

    Args:
        name: of a command in `COMMANDS` that has `add_arguments`.

    Returns:
        The parser.
    """
    command = COMMANDS[name]
    parser = OneLineParser(prog=f"unigen {name}", description=f"{command.HELP[0].upper()}{command.HELP[1:]}.")
    command.add_arguments(parser)
    return parser


def dispatch(argv: list[str]) -> int:
    """Run the command that a command line names.

    Args:
        argv: the line, without the program's name.

    Returns:
        The exit code.

    Raises:
        ValueError: for an unknown command or bad input.
    """
    if argv[:1] == ["help"]:  # unigen help generate
        argv = [*argv[1:], "--help"]
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"unigen {version('unigen')}")
        return 0
    name, arguments = argv[0], argv[1:]
    if name in RENAMED:
        raise ValueError(f"the command {name} is called {RENAMED[name]} now")
    if name not in COMMANDS:
        raise ValueError(f"no command {name!r}{did_you_mean(name, COMMANDS)} (commands: {', '.join(COMMANDS)})")
    command = COMMANDS[name]
    if not hasattr(command, "add_arguments"):
        return int(command.run(arguments))
    args = build_parser(name).parse_args(arguments)
    args.line = shlex.join(["unigen", *argv])
    args.piped = False
    for option, suffix in getattr(command, "STDOUT", {}).items():
        if getattr(args, option) == "-":
            from unigen.media.output import to_stdout

            with to_stdout(suffix) as path:
                setattr(args, option, str(path))
                args.piped = True
                return int(command.run(args))
    return int(command.run(args))


def run_and_flush(run: Callable[[], int]) -> int:
    """Run a command and flush stdout, so that errors of writing are raised here and can still be reported.

    Args:
        run: runs the command.

    Returns:
        What `run` returns.
    """
    try:
        return run()
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()


def discard_stdout() -> None:
    """Point stdout to the null device. Its buffer is lost, and Python does not try to write it at exit."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):  # it is no file
        pass


def main(argv: list[str] | None = None) -> int:
    """Run a command line, and report errors on stderr in one line.

    Args:
        argv: the line, without the program's name; None is that of the process.

    Returns:
        The exit code: 0; 2 for bad input; 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):  # a letter that it cannot show must not undo what was done
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):  # where a text is used it is said to be no UTF-8
        sys.stdin.reconfigure(errors="surrogateescape")
    try:
        return run_and_flush(lambda: dispatch(sys.argv[1:] if argv is None else argv))
    except ValueError as error:
        message = " ".join(str(error).split())
    except ModuleNotFoundError as error:
        line = missing_module_message(error, (sys.argv[1:] if argv is None else argv)[0])
        if line is None:
            raise
        message = line
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has closed the pipe
        discard_stdout()
        return 0
    except OSError as error:
        if error.errno not in DISK_ERRNOS:
            raise
        message = f"cannot read or write {error.filename or 'the output'}: {error.strerror}"
        if error.filename is None:
            discard_stdout()
    print(f"unigen: error: {message}", file=sys.stderr)
    return 2


def run() -> NoReturn:
    """Run the command line of this process and end it.

    The interpreter is not torn down, which takes long with torch and transformers loaded, and longer on a busy machine.
    What is registered to be done at the end (`atexit`) is done, and output is flushed."""
    try:
        code = main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(bool(error.code))
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        sys.exit(code)  # something still works
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # closed, or without a reader: `main` has printed its error
            pass
    os._exit(code)
