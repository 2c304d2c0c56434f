"""The generators task: distances tell true images from others; the command on a model with all generators."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import unigen
from unigen import generators
from unigen.commands.main import main
from unigen.evaluation import baselines
from unigen.evaluation.detector import load_detector
from unigen.evaluation.tasks import generators as generators_task
from unigen.evaluation.tasks import scenes as scenes_task
from unigen.toyworld.scenes import SceneRenderer, sample_scene


def test_distances_grow_with_what_is_wrong(emoji_font: Path) -> None:
    world, detector = SceneRenderer(64), load_detector()

    def scenes(seed: int) -> list[Image.Image]:
        rng = np.random.default_rng(seed)
        return [Image.fromarray(world.render(sample_scene(rng)).image) for _ in range(200)]

    distances = generators_task.FeatureDistances(detector, scenes(0))
    true, blends = distances(scenes(1)), distances(baselines.blend_images(scenes(1)))
    noise = distances(baselines.noise_images(200, 64, np.random.default_rng(0)))
    for kind in (0, 1):  # FID, KID
        assert true[kind] < 0.5 * blends[kind] < blends[kind] < noise[kind]
    assert distances(scenes(1)) == true
    assert abs(distances(scenes(0))[0]) < 1e-3


def test_costs_are_counted(tiny_folder: Path) -> None:
    engine = unigen.load(str(tiny_folder), device="cpu")
    found = {
        name: generators_task.measure_cost(engine, name, ["a", "a dog"])
        for name in ("next-token", "next-scale", "flow")
    }
    assert [found[name]["backbone"] for name in found] == [4, 2, 1]
    assert [found[name]["head"] for name in found] == [0, 0, 20]
    assert generators_task.measure_cost(engine, "transfusion", ["a"], steps=5)["backbone"] == 5
    assert generators_task.measure_cost(engine, "token-flow", ["a"], steps=5)["head"] == 4 * 5
    assert all(found[name]["seconds alone"] > 0 for name in found)


def test_command(
    tiny_folder: Path, emoji_font: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(scenes_task, "PROMPTS_PER_TAG", {True: 2})
    monkeypatch.setattr(generators_task, "TIMING_REPEATS", 1)
    line = f"eval generators --model {tiny_folder} --quick --images 1 --steps 2 --out {tmp_path}"
    arguments = line.split()
    assert main([*arguments, "--json", str(tmp_path / "r.json")]) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert sorted(found["tasks"]) == generators.generator_names() and found["overall"] == max(found["tasks"].values())
    names = {row["name"] for row in found["rows"]}
    assert {"flow: fid", "masked: kid", "true pictures: scenes", "next-scale: backbone"} <= names
    assert Image.open(tmp_path / "generators.png").size == (12 * 16, len(generators.generator_names()) * 16)
    assert "through the codes" in capsys.readouterr().out
    assert main([*arguments, "--generator", "x"]) == 2
    assert "this model has no generator 'x'" in capsys.readouterr().err
