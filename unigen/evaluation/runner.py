"""The runner of `unigen eval`: loads the engine, asks it for a task's examples in batches, scores and reports.

    unigen eval scenes --model unigen-tiny

A task is a module of `unigen/evaluation/tasks`, found by its name, with one subclass of `EvaluationTask` (or
`GenerationTask`, which most are). Does not depend on: any task's scoring, how an engine generates.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
import textwrap
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, Self

import numpy as np

from unigen.evaluation.report import Report, make_folder, write_outputs
from unigen.evaluation.task import Example, OutputT, Scores, Task, bootstrap_mean
from unigen.inference.protocol import InferenceEngine, OptionValue
from unigen.model.unified import UnifiedModel
from unigen.option_groups import collect
from unigen.options import add_arguments as add_option_arguments
from unigen.options import given_arguments, groups_for
from unigen.samplers.seeds import derive_seed
from unigen.utils import progress
from unigen.utils.argparser import non_empty
from unigen.utils.files import write_report
from unigen.utils.option_types import COUNT, SEED
from unigen.utils.text import did_you_mean, docstring_summary

if TYPE_CHECKING:
    from unigen.document import Prompt

RENAMED = {"writers": "generators"}
"""Tasks that had another name."""
TASK_OPTIONS = ("seed", "n", "candidates")
"""Options of the engine that tasks set themselves."""


class BatchGenerator(Protocol):
    """The interface of an engine that the runner needs."""

    def generate_batch(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], output: Literal["image", "text"], **options: OptionValue
    ) -> Sequence[Any]:
        """One output a prompt."""
        ...


class EvaluationRun:
    """One run of a task: its arguments, its engine, and where outputs go.

    Args:
        task: the class of the task.
        args: the command's arguments.
        load: loads the engine.
    """

    def __init__(
        self, task: type[EvaluationTask], args: argparse.Namespace, load: Callable[[], InferenceEngine]
    ) -> None:
        self.task, self.args, self._load = task, args, load

    @cached_property
    def engine(self) -> InferenceEngine:
        """The engine, loaded when it is first used. Raises ValueError where the task needs another."""
        engine = self._load()
        if self.task.needs_local_model and engine.local_model is None:
            raise ValueError(
                f"this task measures the parts of a model of ours, and {self.model_name} is none: give another model"
            )
        return engine

    @property
    def uses_engine(self) -> bool:
        """Whether the engine has been loaded."""
        return "engine" in vars(self)

    @property
    def local_model(self) -> UnifiedModel | None:
        """The model whose parts are here; None of a pipeline and of composed models."""
        return self.engine.local_model

    @property
    def required_model(self) -> UnifiedModel:
        """The model of a task that has `needs_local_model`."""
        model = self.local_model
        assert model is not None
        return model

    @property
    def model_name(self) -> str:
        """The examples to score."""
        return " + ".join(filter(None, [self.args.lmm, self.args.model]))

    @property
    def options(self) -> dict[str, Any]:
        """The options of the generation that were given."""
        return given_arguments(self.args, collect(), TASK_OPTIONS)

    def generate(
        self, task: Task[OutputT], examples: Sequence[Example], n: int = 1, **options: OptionValue
    ) -> list[list[OutputT]]:
        """Ask the engine for n outputs of each example, with the options that were given over `options`.

        Args:
            task: whose examples they are.
            examples: what to ask for.
            n: outputs of each.
            options: of the generation.

        Returns:
            The outputs of each example.
        """
        return generate_outputs(
            self.engine, task, examples, n, self.args.batch, self.args.seed, **{**options, **self.options}
        )

    def write_outputs(
        self, examples: Sequence[Example], outputs: Sequence[Sequence[Any]], scores: Sequence[Sequence[Scores]]
    ) -> None:
        """Write the outputs and their scores where --out says, if it does."""
        if self.args.out:
            write_outputs(self.args.out, examples, outputs, scores)


class EvaluationTask(ABC):
    """What `unigen eval NAME` measures."""

    description: ClassVar[str]
    """What it does, for --help."""
    generates: ClassVar[bool] = True
    """Whether the engine generates for it, and the command takes options of a generation."""
    needs_local_model: ClassVar[bool] = False
    """Whether it measures the parts of a model of ours, and not only outputs."""

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the task's own arguments to those of `add_arguments`."""
        return None

    @classmethod
    @abstractmethod
    def create(cls, run: EvaluationRun) -> Self:
        """The task as the arguments have it. Raises ValueError for bad input, before the engine is loaded if it can."""

    @abstractmethod
    def run(self, run: EvaluationRun) -> Report:
        """Measure, print a table, and return the figures."""


class GenerationTask(EvaluationTask, Generic[OutputT]):
    """A task (`unigen.evaluation.task.Task`) of which each example is generated and each output scored."""

    output: ClassVar[Literal["image", "text"]]
    """What the engine generates for an example."""

    @abstractmethod
    def examples(self) -> list[Example]:
        """What to ask for; the same each time."""

    @abstractmethod
    def score_batch(self, examples: Sequence[Example], outputs: Sequence[OutputT]) -> list[Scores]:
        """The scores of one output for each example."""

    def summarize(
        self, run: EvaluationRun, examples: Sequence[Example], outputs: list[list[OutputT]], scores: list[list[Scores]]
    ) -> Report:
        """Print a table of the scores, and return the figures: the last part of `run`.

        These are the mean of "correct", with its bootstrap interval, and the mean of each tag. A task that has other
        figures overrides this method.

        Args:
            run: the arguments and the engine.
            examples: the prompts.
            outputs: those of each example.
            scores: those of each output.

        Returns:
            The figures.
        """
        correct = [[score["correct"] for score in row] for row in scores]
        summary = bootstrap_mean([e.tag for e in examples], correct, np.random.default_rng(run.args.seed))
        print(f"{'correct':<24} {summary.overall:.3f} [{summary.low:.3f}, {summary.high:.3f}]")
        for tag, mean in summary.tags.items():
            print(f"{tag:<24} {mean:.3f}")
        rows = report_rows({"correct": summary.overall, **summary.tags}, "share", run.args.batch)
        details = {"interval": [summary.low, summary.high], "prompts": summary.num_prompts}
        return Report(summary.overall, summary.tags, rows, details)

    def score(self, example: Example, output: OutputT) -> Scores:
        """The scores of one output."""
        return self.score_batch([example], [output])[0]

    def reward(self, example: Example, output: OutputT) -> float:
        """One number for an output; larger is better."""
        return self.score(example, output)["correct"]

    def num_outputs(self, run: EvaluationRun) -> int:
        """Outputs of each example."""
        return 1

    def generation_options(self, run: EvaluationRun, example: Example) -> dict[str, OptionValue]:
        """Options of the generation for an example, where no others are given."""
        return {}

    def run(self, run: EvaluationRun) -> Report:
        """Generate, score, write the outputs where --out says, and summarize."""
        examples = self.examples()
        outputs = self.control_outputs(run, examples) or self.generate_all(run, examples)
        scores = score_all(self, examples, outputs)
        run.write_outputs(examples, outputs, scores)
        return self.summarize(run, examples, outputs, scores)

    def control_outputs(self, run: EvaluationRun, examples: Sequence[Example]) -> list[list[OutputT]] | None:
        """The outputs of a control, such as true images, where a flag of the task asks for one; None: the engine's."""
        return None

    def generate_all(self, run: EvaluationRun, examples: Sequence[Example]) -> list[list[OutputT]]:
        """The outputs of all examples; those with the same options are generated together."""
        groups: list[tuple[dict[str, OptionValue], list[int]]] = []
        for index, example in enumerate(examples):
            options = self.generation_options(run, example)
            group = next((indices for known, indices in groups if known == options), None)
            if group is None:
                groups.append((options, group := []))
            group.append(index)
        outputs: list[list[OutputT]] = [[] for _ in examples]
        for options, indices in groups:
            rows = run.generate(self, [examples[index] for index in indices], self.num_outputs(run), **options)
            for index, row in zip(indices, rows, strict=True):
                outputs[index] = row
        return outputs


def score_all(
    task: Task[OutputT], examples: Sequence[Example], outputs: Sequence[Sequence[OutputT]]
) -> list[list[Scores]]:
    """Scores grouped as the outputs are."""
    flat = [(example, output) for example, row in zip(examples, outputs, strict=True) for output in row]
    scores = iter(task.score_batch([example for example, _ in flat], [output for _, output in flat]))
    return [[next(scores) for _ in row] for row in outputs]


def generate_outputs(
    engine: BatchGenerator,
    task: Task[OutputT],
    examples: Sequence[Example],
    n: int,
    batch: int,
    seed: int,
    **options: OptionValue,
) -> list[list[OutputT]]:
    """Ask an engine for n outputs of each example.

    Args:
        engine: generates.
        task: says what.
        examples: what to ask for.
        n: outputs of each.
        batch: how many at a time.
        seed: output j of example i has the seed `seed * 1,000,000 + i * n + j`, whatever the batch is.
        options: of the generation.

    Returns:
        The outputs of each example.

    Raises:
        ValueError: for an n or a batch below 1, and what the engine raises.
    """
    if n < 1 or batch < 1:
        raise ValueError("outputs a prompt and the batch size must be at least 1")
    flat = [(i, derive_seed(seed, i * n + j, factor=1_000_000)) for i in range(len(examples)) for j in range(n)]
    outputs: list[list[OutputT]] = [[] for _ in examples]
    with progress.bar(len(flat), task.output) as bar:
        for start in range(0, len(flat), batch):
            part = flat[start : start + batch]
            prompts = [examples[i].prompt for i, _ in part]
            batch_outputs = engine.generate_batch(prompts, [s for _, s in part], output=task.output, **options)
            for (i, _), output in zip(part, batch_outputs, strict=True):
                outputs[i].append(output)
            bar.update(len(part))
    return outputs


# ---------------------------------------------------------------- the command


def task_names() -> list[str]:
    """The names of the tasks: the modules of `unigen/evaluation/tasks`."""
    import unigen.evaluation.tasks as package

    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def find_task(name: str) -> type[EvaluationTask]:
    """The class of a task.

    Args:
        name: of its module.

    Returns:
        The class of `EvaluationTask` that the module defines.

    Raises:
        ValueError: for an unknown name.
    """
    names = task_names()
    if name in RENAMED:
        raise ValueError(f"the task {name} is called {RENAMED[name]} now")
    if name not in names:
        raise ValueError(f"unknown task {name!r}{did_you_mean(name, names)} (tasks: {', '.join(names)})")
    module = importlib.import_module(f"unigen.evaluation.tasks.{name}")
    defined = [value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__]
    (task,) = (value for value in defined if inspect.isclass(value) and issubclass(value, EvaluationTask))
    return task


def help_text() -> str:
    """The help of `unigen eval`: each task with the first sentences of its docstring, without importing it."""
    import unigen.evaluation.tasks as package

    lines = ["usage: unigen eval TASK ...", "", "Score a model.", "", "tasks:"]
    for task in task_names():
        description = docstring_summary(Path(package.__path__[0], f"{task}.py")).partition(": ")[2]
        lines += textwrap.wrap(description, 100, initial_indent=f"  {task:<14} ", subsequent_indent=" " * 17)
    return "\n".join([*lines, "", "unigen eval TASK --help lists a task's options."])


def add_arguments(parser: argparse.ArgumentParser, task: type[EvaluationTask]) -> None:
    """Add what every task takes, and the task's own arguments.

    Args:
        parser: of the command.
        task: the class of the task.
    """
    parser.add_argument("--seed", type=SEED.parse, default=0, help="of prompts and pictures (default: 0)")
    parser.add_argument("--batch", type=COUNT.parse, default=32, help="how many at a time (default: 32)")
    parser.add_argument(
        "--json", type=non_empty, metavar="FILE", help="write the figures as one JSON object; - is stdout"
    )
    if task.generates:
        parser.add_argument(
            "--out", type=non_empty, metavar="FOLDER", help="write a contact sheet a group and outputs.jsonl"
        )
        output = task.output if issubclass(task, GenerationTask) else "image"
        add_option_arguments(parser, groups_for(collect(), output), skip=TASK_OPTIONS)
    task.add_arguments(parser)


def check_arguments(args: argparse.Namespace) -> None:
    """Raises ValueError, before any work, where what the arguments ask for cannot be written."""
    from unigen.media.output import check_output

    if args.json and args.json != "-":
        check_output(args.json, {".json": "JSON"})
    if getattr(args, "out", None):
        make_folder(args.out)


def run_task(
    task: type[EvaluationTask], args: argparse.Namespace, load: Callable[[], InferenceEngine], command: str
) -> Report:
    """Run a task, and write its report where --json says.

    Args:
        task: the class of the task.
        args: the command's arguments.
        load: loads the engine.
        command: the line that repeats the run.

    Returns:
        The figures.

    Raises:
        ValueError: in one line, for bad input.
    """
    start = time.perf_counter()
    run = EvaluationRun(task, args, load)
    report = task.create(run).run(run)
    if args.json:
        write_report(
            args.json,
            command=command,
            model=report.model or (run.model_name if run.uses_engine else "none"),
            overall=report.overall,
            tasks=report.tasks,
            rows=report.rows,
            seconds=time.perf_counter() - start,
            **report.details,
        )
    return report


def report_rows(
    figures: Mapping[str, float], units: Mapping[str, str] | str, batch: int | None = None
) -> list[dict[str, object]]:
    """The rows of a report.

    Args:
        figures: by name.
        units: of all of them, or by name.
        batch: how many were generated at a time.

    Returns:
        One row a figure.
    """
    unit_of = units.get if isinstance(units, Mapping) else lambda name: units
    return [{"name": name, "value": value, "unit": unit_of(name), "batch": batch} for name, value in figures.items()]
