"""Means over prompts and tags, and the runner, on made-up scores and a made-up engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unigen.evaluation import runner
from unigen.evaluation.task import Example, bootstrap_mean


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
    runner.write_outputs(tmp_path / "out", items, outputs, marks)
    assert (tmp_path / "out" / "single.png").exists() and not (tmp_path / "out" / "count.png").exists()
    lines = (tmp_path / "out" / "outputs.jsonl").read_text().splitlines()
    assert len(lines) == 2 and '"texts": ["two"]' in lines[1]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"):
        runner.write_outputs(tmp_path / "file" / "below", items, outputs, marks)


def test_tasks_are_found_by_module_name() -> None:
    assert {"scenes", "understanding"} <= set(runner.task_names())
    with pytest.raises(ValueError, match="unknown task 'nothing' \\(tasks: .*scenes"):
        runner.main(["nothing"])
    with pytest.raises(ValueError, match="--count"):
        runner.main(["understanding", "--count", "many"])
    assert runner.main([]) == 0
