"""The scenes task: prompts, verdicts on made-up readings, and the ladder on rendered pictures (where the font is)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unigen.commands.main import main
from unigen.evaluation import baselines, geneval
from unigen.evaluation.detector import Detection, SceneDetections
from unigen.evaluation.runner import score_all
from unigen.evaluation.task import Example
from unigen.evaluation.tasks import scenes
from unigen.evaluation.tasks.scenes import ScenesTask, make_prompts, summarize_scores
from unigen.toyworld.captions import Facts, parse_caption, scene_from_facts
from unigen.toyworld.scenes import SceneRenderer, held_out_combinations, is_held_out


@pytest.fixture(scope="module")
def task() -> ScenesTask:
    return ScenesTask(prompts_per_tag=8)


@pytest.fixture(scope="module")
def world() -> SceneRenderer:
    try:
        return SceneRenderer(64)
    except ValueError as error:
        pytest.skip(str(error))


def true_reading(item: Example) -> SceneDetections:
    """What a perfect detector reads in a true picture of the prompt."""
    said = Facts(item.metadata["groups"], item.metadata["background"], item.metadata["relation"])
    scene = scene_from_facts(said, np.random.default_rng(0))
    things = [Detection(thing.name, thing.color or "natural", 0.9, thing.box()) for thing in scene.objects]
    return SceneDetections(things, scene.background, 1.0)


@pytest.mark.parametrize("tag", geneval.TAGS)
def test_prompts(tag: str) -> None:
    items = make_prompts(tag, 100, 0)
    assert [i.prompt for i in items] == [i.prompt for i in make_prompts(tag, 100, 0)]
    assert [i.prompt for i in items] != [i.prompt for i in make_prompts(tag, 100, 1)]
    assert len({i.prompt for i in items}) == 100
    assert sum(i.metadata["heldout"] for i in items) == (0 if tag == "single_object" else 30)
    assert 25 <= sum(i.metadata["background"] is not None for i in items) <= 50
    for item in items:
        assert bool(held_out_combinations(item.metadata["groups"])) == item.metadata["heldout"]
        said = parse_caption(str(item.prompt))  # the words say what is scored, no more and no less
        assert said.groups == item.metadata["groups"]
        assert (said.background, said.relation) == (item.metadata["background"], item.metadata["relation"])
    assert json.loads(json.dumps(items[0].metadata))["spec"] == items[0].metadata["spec"]


def test_true_scenes_pass_and_wrong_ones_fail(task: ScenesTask) -> None:
    items = task.examples()
    assert len(items) == 48
    readings = [true_reading(item) for item in items]
    for item, reading in zip(items, readings, strict=True):
        scores = task.score_detections(item, reading)
        assert all(value == 1.0 for value in scores.values()), (item.prompt, scores)
        assert ("background" in scores) == (item.metadata["background"] is not None)
    for item, reading in zip(items, readings[8:] + readings[:8], strict=True):  # the pictures of another task
        assert task.score_detections(item, reading)["correct"] == 0 or item.tag == "single_object"
    empty = [task.score_detections(item, SceneDetections())["correct"] for item in items]
    assert sum(empty) == 0


def test_surplus_fails_only_the_strict_score(task: ScenesTask) -> None:
    item = make_prompts("two_object", 3, 0)[0]
    reading = true_reading(item)
    reading.objects.append(Detection("cactus", "natural", 0.9, (0, 0, 9, 9)))
    scores = task.score_detections(item, reading)
    assert scores["correct"] == 1 and scores["strict"] == 0


def test_wrong_color_relation_and_background_fail(task: ScenesTask) -> None:
    item = make_prompts("color_attr", 8, 0)[0]
    a, b = true_reading(item).objects
    swapped = [Detection(a.name, b.color, 0.9, a.box), Detection(b.name, a.color, 0.9, b.box)]
    assert task.score_detections(item, SceneDetections(swapped))["correct"] == 0
    item = make_prompts("position", 8, 0)[0]
    a, b = true_reading(item).objects
    moved = [Detection(a.name, a.color, 0.9, b.box), Detection(b.name, b.color, 0.9, a.box)]
    assert task.score_detections(item, SceneDetections(moved))["correct"] == 0
    assert task.score_detections(item, SceneDetections(moved))["share"] == 0.5
    item = next(i for i in make_prompts("colors", 8, 0) if i.metadata["background"])
    reading = SceneDetections(true_reading(item).objects, "nowhere")
    assert task.score_detections(item, reading)["background"] == 0


def test_summary(task: ScenesTask) -> None:
    items = task.examples()
    wrong_when_held = [[{"correct": float(not i.metadata["heldout"]), "strict": 0.0}] for i in items]
    result = summarize_scores(items, wrong_when_held)
    assert result.in_distribution is not None and result.in_distribution.overall == 1
    assert result.held_out is not None and result.held_out.overall == 0
    assert result.overall.tags["single_object"] == 1 and result.overall.overall < 1
    assert result.strict.overall == 0 and result.background is None
    half = [[{"correct": 1.0, "strict": 1.0}, {"correct": 0.0, "strict": 0.0}] for _ in items]
    assert summarize_scores(items, half).best_of_n_correct == 1 and summarize_scores(items, half).overall.overall == 0.5


def test_shuffled_gives_everyone_anothers() -> None:
    items = [Example(str(i), "a") for i in range(7)]
    pictures = [[Image.new("L", (1, 1), i)] for i in range(7)]
    mixed = [row[0].getpixel((0, 0)) for row in baselines.shuffle_images(items, pictures, 0)]
    assert sorted(mixed) == list(range(7)) and all(m != i for i, m in enumerate(mixed))
    with pytest.raises(ValueError, match="two prompts"):
        baselines.shuffle_images(items[:1], pictures[:1], 0)


def test_nearest_training_pictures_hold_no_held_out_combination(
    world: SceneRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []
    render = world.render
    monkeypatch.setattr(world, "render", lambda scene: shown.append(scene) or render(scene))
    items = [Example("three sunflowers on a blue background", "a"), Example("a horse to the left of a dog", "a")]
    baselines.nearest_training_images(items, 3, 0, world, pool=3000)
    assert len(shown) == 6 and not any(is_held_out(scene) for scene in shown)
    assert {thing.name for thing in shown[0].objects} == {"sunflower"}


class TrueEngine:
    """Draws true pictures: a model without fault, or with one (no colours)."""

    def __init__(self, world: SceneRenderer, colors: bool = True) -> None:
        self.world, self.colors = world, colors

    def generate_batch(self, prompts: list[str], seeds: list[int], output: str, **options: Any) -> list[Image.Image]:
        made = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            said = parse_caption(prompt)
            if not self.colors:
                said = Facts(tuple((n, None, k) for n, _, k in said.groups), said.background, said.relation)
            made.append(Image.fromarray(self.world.render(scene_from_facts(said, np.random.default_rng(seed))).image))
        return made


def test_the_shipped_detector_reads_true_pictures(task: ScenesTask, world: SceneRenderer) -> None:
    items = task.examples()
    true = baselines.oracle_images(items, 2, 0, world)
    result = summarize_scores(items, score_all(task, items, true))
    assert result.overall.overall >= 0.95
    assert result.background is not None and result.background >= 0.95
    mixed = summarize_scores(items, score_all(task, items, baselines.shuffle_images(items, true, 0)))
    assert mixed.overall.overall <= 0.15  # the same pictures under other prompts
    noise = baselines.noise_images(40, 64, np.random.default_rng(0))
    assert task.false_positive_rate(noise) <= 0.1
    assert task.false_positive_rate([row[0] for row in true]) > 0.9  # the same measure sees objects where they are
    reward = task.reward(items[0], true[0][0])
    assert reward > task.reward(items[0], noise[0]) and 0 <= reward <= 1


def test_command(
    world: SceneRenderer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    class Tokenizer:
        image_size = 64
        parameters = staticmethod(lambda: iter(()))
        encode = decode = staticmethod(lambda x: x)

    engine = TrueEngine(world, colors=False)
    engine.local_model = type("Model", (), {"image_tokenizer": Tokenizer()})()  # type: ignore[attr-defined]
    monkeypatch.setattr("unigen.commands.eval.load", lambda args: engine)
    monkeypatch.setattr(scenes, "PROMPTS_PER_TAG", {True: 5, False: 5})
    report, out = tmp_path / "r.json", tmp_path / "out"
    assert main(["eval", "scenes", "--images", "1", "--quick", "--json", str(report), "--out", str(out)]) == 0
    found = json.loads(report.read_text())
    values = {row["name"]: row["value"] for row in found["rows"]}
    assert found["tasks"]["colors"] < 0.3 and found["tasks"]["two_object"] > 0.7  # the fault of this engine shows
    assert found["overall"] < values["oracle"] and values["reconstructions"] == values["oracle"]
    assert values["shuffled"] < 0.2 and values["nearest"] < values["oracle"]
    assert {"objects found in noise", "objects found in blends"} <= set(values)
    assert (out / "position.png").exists() and len((out / "outputs.jsonl").read_text().splitlines()) == 30
    assert main(["eval", "scenes", "--images", "1", "--oracle"]) == 0
    assert "oracle" in capsys.readouterr().out.splitlines()[-5]
    assert main(["eval", "scenes", "--images", "0"]) == 2 and "--images" in capsys.readouterr().err


def test_the_command_on_pipelines_and_composed_models(
    stable_diffusion_folder: Path,
    causal_lm_folder: Path,
    emoji_font: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Their images are scored as a model's are; they have no image tokenizer, and no parts that tasks could measure."""
    monkeypatch.setattr(scenes, "PROMPTS_PER_TAG", {True: 1})
    pipeline = ["--model", str(stable_diffusion_folder), "--device", "cpu"]
    composed = [*pipeline, "--lmm", str(causal_lm_folder)]
    out = tmp_path / "out"
    outputs = ["--steps", "1", "--json", str(tmp_path / "r.json"), "--out", str(out)]
    for model in (pipeline, composed):
        shared = ["eval", "scenes", *model, "--quick", "--images", "1"]
        assert main([*shared, "--shuffled", *outputs]) == 0
        found = json.loads((tmp_path / "r.json").read_text())
        assert {"model strict", "shuffled"} <= {row["name"] for row in found["rows"]} and found["prompts"] == 6
        assert found["model"] == " + ".join(reversed(model[1::2][::2]))
        assert Image.open(out / "colors.png").size == (3 * 200, 32 + 4 + 14)
        capsys.readouterr()
        assert main([*shared, "--reconstructions"]) == 2
        assert "has no image tokenizer here: leave --reconstructions out" in capsys.readouterr().err
        assert main(["eval", "tokenizer", *model, "--count", "1"]) == 2
        assert "this task measures the parts of a model of ours" in capsys.readouterr().err
