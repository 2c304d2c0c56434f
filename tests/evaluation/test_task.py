"""Means over prompts and tags, and the runner, on made-up scores and a made-up engine."""

from __future__ import annotations

import argparse
import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unigen.commands.main import main
from unigen.evaluation import report, runner
from unigen.evaluation.runner import EvaluationRun, GenerationTask
from unigen.evaluation.task import Example, Scores, bootstrap_mean


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_overall_is_the_unweighted_mean_of_tags() -> None:
    tags = ["a", "a", "a", "b"]
    mean = bootstrap_mean(tags, [[1.0], [1.0], [1.0], [0.0]], rng())
    assert mean.tags == {"a": 1.0, "b": 0.0}
    assert mean.overall == 0.5  # weighted by prompts it would be 0.75
    assert (mean.low, mean.high) == (0.5, 0.5)  # nothing varies inside a tag


def test_a_tag_is_the_mean_over_its_outputs() -> None:
    mean = bootstrap_mean(["a", "a"], [[1.0, 1.0, 1.0], [0.0]], rng())
    assert mean.overall == 0.75  # a mean of means would be 0.5


def test_interval_covers_the_truth_and_shrinks() -> None:
    draw = np.random.default_rng(1)
    widths = []
    for n in (50, 800):
        values = [[float(v)] for v in draw.random(n) < 0.7]
        mean = bootstrap_mean(["a"] * n, values, rng())
        assert mean.low < mean.overall < mean.high
        assert mean.low < 0.7 < mean.high
        widths.append(mean.high - mean.low)
    assert 3 < widths[0] / widths[1] < 5.5  # sqrt(16) = 4


def test_interval_resamples_prompts_and_not_outputs() -> None:
    one = bootstrap_mean(["a"] * 40, [[float(i % 2)] for i in range(40)], rng())
    four = bootstrap_mean(["a"] * 40, [[float(i % 2)] * 4 for i in range(40)], rng())
    assert (one.low, one.high) == (four.low, four.high)  # copies of an output add no certainty


def test_nothing_to_average() -> None:
    with pytest.raises(ValueError, match="nothing to average"):
        bootstrap_mean([], [], rng())
    with pytest.raises(ValueError, match="nothing to average"):
        bootstrap_mean(["a"], [[]], rng())


class EchoEngine:
    """Answers "prompt seed"; remembers the batches."""

    local_model = None

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def generate_batch(self, prompts: list, seeds: list, output: str, **options: object) -> list[str]:
        self.sizes.append(len(prompts))
        return [f"{p} {s} {output} {options}" for p, s in zip(prompts, seeds, strict=True)]


class TextTask:
    output = "text"


def test_outputs_do_not_depend_on_the_batch() -> None:
    items = [Example(f"p{i}", "a") for i in range(5)]
    one, many = EchoEngine(), EchoEngine()
    a = runner.generate_outputs(one, TextTask(), items, 2, 1, 3, guidance=2.0)  # type: ignore[arg-type]
    b = runner.generate_outputs(many, TextTask(), items, 2, 4, 3, guidance=2.0)  # type: ignore[arg-type]
    assert a == b and one.sizes == [1] * 10 and many.sizes == [4, 4, 2]
    assert a[1][0].startswith("p1 3000002 text {'guidance': 2.0}")
    assert len({text for row in a for text in row}) == 10
    with pytest.raises(ValueError, match="at least 1"):
        runner.generate_outputs(one, TextTask(), items, 0, 4, 0)  # type: ignore[arg-type]


def test_written_outputs(tmp_path: Path) -> None:
    picture = Image.new("RGB", (64, 64))
    items = [
        Example("a horse", "single", {"background": None}),
        Example([picture, "how many?"], "count", {"answer": "one"}),
    ]
    outputs = [[picture, picture], ["two"]]
    marks = [[{"correct": 1.0}, {"correct": 0.0}], [{"correct": 0.0}]]
    report.write_outputs(tmp_path / "out", items, outputs, marks)
    assert (tmp_path / "out" / "single.png").exists() and not (tmp_path / "out" / "count.png").exists()
    lines = (tmp_path / "out" / "outputs.jsonl").read_text().splitlines()
    assert len(lines) == 2 and '"texts": ["two"]' in lines[1]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"):
        report.write_outputs(tmp_path / "file" / "below", items, outputs, marks)


def test_large_images_are_reduced_on_the_sheet() -> None:
    wide, marks = Image.new("RGB", (512, 256)), [{"correct": 1.0}]
    small = report.contact_sheet([(Example("a horse", "a"), [Image.new("RGB", (64, 64))], marks)])
    large = report.contact_sheet([(Example("a horse", "a"), [wide], marks)])
    assert small.size == (3 * 200, 64 + 4 + 14) and large.size == (3 * 200, report.MAX_SHEET_SIDE + 4 + 14)
    assert wide.size == (512, 256)


class CountTask(GenerationTask[str]):
    """Asks for words; an answer is correct where it is long enough."""

    description = "Count letters."
    output = "text"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--letters", type=int, default=3)

    @classmethod
    def create(cls, run: EvaluationRun) -> CountTask:
        return cls()

    def examples(self) -> list[Example]:
        return [Example("a", "short"), Example("b", "long"), Example("c", "short")]

    def generation_options(self, run: EvaluationRun, example: Example) -> dict[str, Any]:
        return {"max_tokens": 9} if example.tag == "long" else {}

    def score_batch(self, examples: Sequence[Example], outputs: Sequence[str]) -> list[Scores]:
        return [{"correct": float(len(output) > 3)} for output in outputs]

    def summarize(
        self, run: EvaluationRun, examples: Sequence[Example], outputs: list[list[str]], scores: list[list[Scores]]
    ) -> report.Report:
        print(outputs)
        mean = float(np.mean([mark["correct"] for row in scores for mark in row]))
        return report.Report(
            mean, {"all": mean}, [{"name": "letters", "value": run.args.letters, "unit": ""}], {"k": 1}
        )


@pytest.fixture
def count_task(monkeypatch: pytest.MonkeyPatch) -> EchoEngine:
    """The task above as a module beside the others, and the engine that it gets."""
    module = types.ModuleType("unigen.evaluation.tasks.count")
    task = type("CountTask", (CountTask,), {"__module__": module.__name__})
    module.CountTask = task  # type: ignore[attr-defined]
    module.Other = CountTask  # type: ignore[attr-defined]  # imported: it is not the module's own
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(runner, "task_names", lambda: ["count"])
    engine = EchoEngine()
    monkeypatch.setattr("unigen.commands.eval.load", lambda args: engine)
    return engine


def test_a_task_declares_and_the_runner_does_the_rest(
    count_task: EchoEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["eval", "count", "--letters", "5", "--seed", "2", "--temperature", "0.5", "--batch", "2"]
    assert main([*line, "--json", str(tmp_path / "r.json"), "--out", str(tmp_path / "out")]) == 0
    given = "text {'temperature': 0.5}"  # examples with the same options are asked for together, each with its number
    assert capsys.readouterr().out == f"{[[f'a 2000000 {given}'], [LONG], [f'c 2000001 {given}']]}\n"
    assert count_task.sizes == [2, 1]
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["overall"] == 1 and found["tasks"] == {"all": 1} and found["rows"][0]["value"] == 5 and found["k"] == 1
    assert found["model"] == "unigen-tiny" and found["command"].startswith("unigen eval count --letters 5")
    assert len((tmp_path / "out" / "outputs.jsonl").read_text().splitlines()) == 3
    with pytest.raises(SystemExit):
        main(["eval", "count", "--help"])
    shown = capsys.readouterr().out
    assert "Count letters." in shown and "--letters" in shown and "--temperature" in shown and "--lmm" in shown


LONG = "b 2000000 text {'max_tokens': 9, 'temperature': 0.5}"


def test_a_task_without_a_summary_has_the_mean_of_each_tag(
    count_task: EchoEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = sys.modules["unigen.evaluation.tasks.count"].CountTask

    def score_batch(self: CountTask, examples: Sequence[Example], outputs: Sequence[str]) -> list[Scores]:
        return [{"correct": float(example.prompt != "a")} for example in examples]

    monkeypatch.setattr(task, "score_batch", score_batch)
    monkeypatch.setattr(task, "summarize", GenerationTask.summarize)
    assert main(["eval", "count", "--json", str(tmp_path / "r.json")]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["overall"] == 0.75 and report["tasks"] == {"short": 0.5, "long": 1.0}, "tags count alike"
    assert report["interval"] == [0.5, 1.0] and report["prompts"] == 3
    assert "correct                  0.750 [0.500, 1.000]" in capsys.readouterr().out


def test_a_control_needs_no_engine(
    count_task: EchoEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = sys.modules["unigen.evaluation.tasks.count"].CountTask
    monkeypatch.setattr(task, "control_outputs", lambda self, run, examples: [["true"] for _ in examples])
    assert main(["eval", "count", "--json", str(tmp_path / "r.json")]) == 0
    assert capsys.readouterr().out == "[['true'], ['true'], ['true']]\n" and count_task.sizes == []
    assert json.loads((tmp_path / "r.json").read_text())["model"] == "none"


def test_a_task_that_measures_a_model_refuses_other_engines(
    count_task: EchoEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.modules["unigen.evaluation.tasks.count"].CountTask, "needs_local_model", True)
    assert main(["eval", "count", "--model", "some-pipeline"]) == 2
    assert "parts of a model of ours, and some-pipeline is none" in capsys.readouterr().err


def test_tasks_are_found_by_module_name() -> None:
    assert {"scenes", "understanding"} <= set(runner.task_names())
    assert all(runner.find_task(name).description for name in runner.task_names())
    with pytest.raises(ValueError, match="unknown task 'nothing' \\(tasks: .*scenes"):
        runner.find_task("nothing")
    with pytest.raises(ValueError, match="the task writers is called generators now"):
        runner.find_task("writers")
