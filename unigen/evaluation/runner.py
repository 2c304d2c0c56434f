"""The runner: asks an engine a task's items in batches, shows progress, and writes what came out.

    unigen eval scenes --model unigen-tiny            # a task is a module of unigen/evaluation/tasks, found by its
    name

It does not depend on any task's scoring and how an engine generates: it needs `generate_batch(prompts, seeds,
output=...)`."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys
import textwrap
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from unigen.evaluation.task import Example, Task
from unigen.limits import limit_argument as limited
from unigen.samplers.seeds import derive_seed
from unigen.utils import precision, progress
from unigen.utils.argparser import OneLineParser, non_empty
from unigen.utils.text import did_you_mean, docstring_summary


def make_parser(task: str, description: str, sampled: bool = True) -> OneLineParser:
    """What every task understands; `sampled`: the engine draws pictures or texts for it."""
    parser = OneLineParser(prog=f"unigen eval {task}", description=description)
    parser.add_argument(
        "--model", type=non_empty, default="unigen-tiny", help="a name or a folder (default: %(default)s)"
    )
    precision.add_arguments(parser)
    parser.add_argument("--seed", type=limited("seed"), default=0, help="of prompts and pictures (default: 0)")
    parser.add_argument("--batch", type=limited("n"), default=32, help="how many at a time (default: 32)")
    parser.add_argument(
        "--json", type=non_empty, metavar="FILE", help="write the figures as one JSON object; - is stdout"
    )
    if sampled:
        parser.add_argument("--generator", type=non_empty, help="how pictures are written (default: the engine's)")
        parser.add_argument(
            "--guidance", type=limited("guidance"), help="scale of guidance, 1 is off (default: the engine's)"
        )
        parser.add_argument("--temperature", type=limited("temperature"), help="default: the engine's")
        parser.add_argument("--top-k", type=limited("top_k"), help="default: the engine's")
        parser.add_argument("--top-p", type=limited("top_p"), help="default: the engine's")
        parser.add_argument("--steps", type=limited("steps"), help="of a generator that can choose how many")
        parser.add_argument("--sampler", type=non_empty, help="of a flow")
        parser.add_argument("--guidance-kind", type=non_empty, help="of a flow")
        parser.add_argument(
            "--out", type=non_empty, metavar="FOLDER", help="write a contact sheet a group and outputs.jsonl"
        )
    return parser


def parse_args(parser: OneLineParser, args: list[str]) -> argparse.Namespace:
    """The arguments; ValueError before any work where what is asked for cannot be written."""
    from unigen.media.output import check_output

    found = parser.parse_args(args)
    if found.json and found.json != "-":
        check_output(found.json, {".json": "JSON"})
    if getattr(found, "out", None):
        make_folder(found.out)
    return found


def make_folder(folder: str | Path) -> Path:
    """The folder, made where it is not there yet; ValueError where that cannot be."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write into {folder}: {error}") from error
    return Path(folder)


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The engine's options that were given."""
    names = ("generator", "guidance", "temperature", "top_k", "top_p", "steps", "sampler", "guidance_kind")
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def load_engine(args: argparse.Namespace) -> Any:
    from unigen import loading

    return loading.load(args.model, **precision.load_options(args))


def generate_outputs(
    engine: Any, task: Task, items: Sequence[Example], n: int, batch: int, seed: int, **options: Any
) -> list[list[Any]]:
    """n outputs for each item, in order. Output j of item i has the seed `seed * 1,000,000 + i * n + j` whatever the
    batch is."""
    if n < 1 or batch < 1:
        raise ValueError("outputs a prompt and the batch size must be at least 1")
    flat = [(i, derive_seed(seed, i * n + j, factor=1_000_000)) for i in range(len(items)) for j in range(n)]
    outputs: list[list[Any]] = [[] for _ in items]
    with progress.bar(len(flat), task.output) as bar:
        for start in range(0, len(flat), batch):
            part = flat[start : start + batch]
            prompts = [items[i].prompt for i, _ in part]
            batch_outputs = engine.generate_batch(prompts, [s for _, s in part], output=task.output, **options)
            for (i, _), output in zip(part, batch_outputs, strict=True):
                outputs[i].append(output)
            bar.update(len(part))
    return outputs


def write_outputs(
    folder: str | Path,
    items: Sequence[Example],
    outputs: Sequence[Sequence[Any]],
    scores: Sequence[Sequence[dict[str, float]]],
) -> None:
    """outputs.jsonl (prompt, tag, scores, text outputs) and, for pictures, a contact sheet for each tag. ValueError
    where the folder cannot be written."""
    from PIL import Image

    from unigen.media.output import save_image, write_text

    folder = make_folder(folder)
    lines = []
    for item, row, item_scores in zip(items, outputs, scores, strict=True):
        texts = [output for output in row if isinstance(output, str)]
        prompt_texts = [p for p in item.prompt if isinstance(p, str)] if isinstance(item.prompt, list) else item.prompt
        lines.append(
            json.dumps(
                {"prompt": prompt_texts, "tag": item.tag, "scores": list(item_scores), "texts": texts} | item.meta
            )
        )
    write_text(folder / "outputs.jsonl", "\n".join(lines) + "\n")
    for tag in dict.fromkeys(item.tag for item in items):
        group = [(i, o, s) for i, o, s in zip(items, outputs, scores, strict=True) if i.tag == tag]
        if all(isinstance(picture, Image.Image) for _, row, _ in group for picture in row):
            save_image(folder / f"{tag}.png", contact_sheet(group))


def contact_sheet(rows: Sequence[tuple[Example, Sequence[Any], Sequence[dict[str, float]]]], columns: int = 3) -> Any:
    """Each prompt above its pictures; a green frame where the picture is correct, else a red one."""
    from PIL import Image, ImageDraw

    side, line, border = max(p.width for _, row, _ in rows for p in row), 14, 2
    cell = side + 2 * border
    width, height = max(200, max(len(row) for _, row, _ in rows) * cell + 8), cell + line
    sheet = Image.new("RGB", (columns * width, -(-len(rows) // columns) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for k, (item, row, marks) in enumerate(rows):
        left, top = k % columns * width, k // columns * height
        for j, (picture, mark) in enumerate(zip(row, marks, strict=True)):
            x, color = left + j * cell, "#2a9d4e" if mark["correct"] else "#d43a2f"
            pen.rectangle((x, top + line, x + cell - 1, top + line + cell - 1), fill=color)
            sheet.paste(picture, (x + border, top + line + border))
        label = str(item.prompt)
        while label and pen.textlength(label) > width - 8:
            label = label[:-1]
        pen.text((left + 2, top + 1), label, fill="black")
    return sheet


RENAMED = {"writers": "generators"}
"""Tasks that had another name."""


def task_names() -> list[str]:
    """The names of the tasks: the modules in `unigen/evaluation/tasks`."""
    import unigen.evaluation.tasks as package

    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def help_text() -> str:
    """The help of `unigen eval`: each task with the first sentences of its docstring, without importing it."""
    import unigen.evaluation.tasks as package

    lines = ["usage: unigen eval TASK ...", "", "Score a model.", "", "tasks:"]
    for task in task_names():
        description = docstring_summary(Path(package.__path__[0], f"{task}.py")).partition(": ")[2]
        lines += textwrap.wrap(description, 100, initial_indent=f"  {task:<14} ", subsequent_indent=" " * 17)
    return "\n".join([*lines, "", "unigen eval TASK --help lists a task's options."])


def main(args: list[str]) -> int:
    """`unigen eval TASK ...`. ValueError for bad input."""
    names = task_names()
    if not args or args[0] in ("-h", "--help"):
        print(help_text())
        return 0
    if args[0] in RENAMED:
        raise ValueError(f"the task {args[0]} is called {RENAMED[args[0]]} now")
    if args[0] not in names:
        raise ValueError(f"unknown task {args[0]!r}{did_you_mean(args[0], names)} (tasks: {', '.join(names)})")
    task = importlib.import_module(f"unigen.evaluation.tasks.{args[0]}")
    json_only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    json_only.add_argument("--json", nargs="?")
    if json_only.parse_known_args(args[1:])[0].json == "-":  # nothing else goes to stdout then
        with redirect_stdout(sys.stderr):
            return int(task.main(args[1:]))
    return int(task.main(args[1:]))
