"""The understanding task: captions and answers of engines that know, guess or stay silent."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from unigen.commands.main import main
from unigen.evaluation.tasks.understanding import UnderstandingTask, relation_table, score_caption, summarize_scores
from unigen.toyworld.captions import Facts, caption
from unigen.toyworld.scenes import Scene, SceneRenderer
from unigen.toyworld.scenes import SceneObject as Thing

TRUE = Facts((("horse", "blue", 1), ("dog", None, 1)), "green", "left of")
BESIDE = {"horse|dog": ["left of", "above"], "dog|horse": ["right of", "below"]}


@pytest.mark.parametrize(
    "text, wrong",
    [
        ("a blue horse to the left of a dog on a green background", ()),
        ("a dog to the right of a blue horse on a green background", ()),  # the same, told from the other side
        ("a blue horse above a dog on a green background", ()),  # also true of this picture
        ("a dog and a blue horse on a green background", ()),  # a relation need not be stated
        ("a blue horse to the right of a dog on a green background", ("relation",)),
        ("a blue horse to the left of a dog on a red background", ("background",)),
        ("a blue horse and a dog", ("background",)),  # captions state it
        ("a red horse to the left of a dog on a green background", ("colors",)),
        ("two blue horses and a dog on a green background", ("counts",)),
        ("a blue horse on a green background", ("objects", "counts", "colors")),
        ("a blue horse, a dog and a cat on a green background", ("objects", "counts", "colors")),
        ("", ("objects", "counts", "colors", "background")),
    ],
)
def test_score_of_a_caption(text: str, wrong: tuple[str, ...]) -> None:
    scores = score_caption(text, TRUE, BESIDE)
    assert scores["correct"] == float(not wrong)
    assert {name for name, value in scores.items() if not value} - {"correct"} == set(wrong)


def test_true_relations_of_a_diagonal() -> None:
    scene = Scene((Thing("horse", None, 15, 15, 20, 0), Thing("dog", None, 48, 48, 20, 0)), "green")
    assert relation_table(scene) == {"horse|dog": ["left of", "above"], "dog|horse": ["right of", "below"]}


@pytest.fixture(scope="module")
def world() -> SceneRenderer:
    try:
        return SceneRenderer(64)
    except ValueError as error:
        pytest.skip(str(error))


class OracleEngine:
    """Answers from the items themselves; or always the same, or nothing."""

    def __init__(self, task: UnderstandingTask, always: str | None = None) -> None:
        self.answers = {}
        for item in task.examples():
            meta, key = item.metadata, (item.prompt[0].tobytes(), item.prompt[1])
            said = Facts(meta["groups"], meta["background"], meta["relation"]) if item.tag == "caption" else None
            self.answers[key] = (
                (caption(said) if said else f" {meta['answer'].upper()}. ") if always is None else always
            )

    def generate_batch(self, prompts: list, seeds: list, output: str, **options: Any) -> list[str]:
        assert output == "text"
        return [self.answers[p[0].tobytes(), p[1]] for p in prompts]


def test_items_are_the_same_for_a_seed_and_half_held_out(world: SceneRenderer) -> None:
    items = UnderstandingTask(world, 20).examples()
    again = UnderstandingTask(world, 20).examples()
    assert [i.prompt[1] for i in items] == [i.prompt[1] for i in again]
    captions = [i for i in items if i.tag == "caption"]
    assert len(captions) == 20 and sum(i.metadata["heldout"] for i in captions) == 10
    assert {"presence", "count", "colour"} <= {i.tag for i in items}
    for held_out in (True, False):
        assert all(i.metadata["heldout"] == held_out for i in UnderstandingTask(world, 6, held_out=held_out).examples())


def test_scores_of_engines_that_know_and_guess(world: SceneRenderer) -> None:
    task = UnderstandingTask(world, 20)
    items = task.examples()

    def figures(always: str | None) -> dict[str, float]:
        answers = OracleEngine(task, always).generate_batch([i.prompt for i in items], [0] * len(items), "text")
        marks = task.score_batch(items, answers)
        return {name: mean for name, (mean, _, _) in summarize_scores(items, marks).items()}

    knows, says_yes = figures(None), figures("yes")
    assert knows["captions"] == knows["questions"] == knows["captions heldout"] == 1
    assert says_yes["captions"] == 0 and 0 < says_yes["questions"] < 0.6
    assert says_yes["questions: count"] == 0
    assert task.reward(items[0], "nothing") < task.reward(items[0], "a cat on a white background") + 0.6


def test_command(
    world: SceneRenderer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = OracleEngine(UnderstandingTask(world, 6))
    parts = {"image_tokenizer": SimpleNamespace(image_size=64), "template": SimpleNamespace(num_candidates=8)}
    engine.local_model = SimpleNamespace(**parts)  # type: ignore[attr-defined]
    monkeypatch.setattr("unigen.commands.eval.load", lambda args: engine)
    report = tmp_path / "r.json"
    line = ["eval", "understanding", "--count", "6"]
    assert main([*line, "--json", str(report), "--out", str(tmp_path / "o")]) == 0
    found = json.loads(report.read_text())
    assert found["overall"] == 1 and found["tasks"]["captions heldout"] == 1
    assert (tmp_path / "o" / "outputs.jsonl").exists()
    engine.local_model = None  # type: ignore[attr-defined]  # an engine that reads images of any size
    assert main(line) == 0
    assert main(["eval", "understanding", "--count", "0"]) == 2 and "--count" in capsys.readouterr().err
