"""Rendering with the system's emoji font, and the parquet that make_scenes writes; left out where the font is
missing.
"""

from __future__ import annotations

import errno

import numpy as np
import pytest

from unigen.toyworld.scenes import (
    BACKGROUNDS,
    COLORS,
    OBJECT_EMOJI,
    Scene,
    SceneObject,
    SceneRenderer,
    find_font,
    sample_scene,
)


@pytest.fixture(scope="module")
def world(emoji_font) -> SceneRenderer:
    return SceneRenderer(font=str(emoji_font))


def test_missing_font_says_how_to_mend_it(monkeypatch):
    monkeypatch.setenv("UNIGEN_EMOJI_FONT", "/nowhere/emoji.ttf")
    with pytest.raises(ValueError, match="apt-get install fonts-noto-color-emoji.*UNIGEN_EMOJI_FONT=") as caught:
        SceneRenderer()
    assert "\n" not in str(caught.value)


def test_another_font_is_refused(tmp_path):
    path = tmp_path / "font.ttf"
    path.write_bytes(b"not a font")
    with pytest.raises(ValueError, match="cannot read the emoji font"):
        SceneRenderer(font=str(path))


def test_fallback_font_of_fontconfig_is_not_taken(monkeypatch):
    import subprocess

    from unigen.toyworld import world as module

    answer = subprocess.CompletedProcess([], 0, stdout="DejaVu Sans\n/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf")
    monkeypatch.delenv("UNIGEN_EMOJI_FONT", raising=False)
    monkeypatch.setattr(module.subprocess, "run", lambda *args, **options: answer)
    monkeypatch.setattr(module, "_FONT_PATHS", ())
    with pytest.raises(ValueError, match="is missing"):
        find_font()


def test_every_glyph_is_its_own(world):
    """Each object draws in colour, and no two look alike, also when tinted (a raven is not a black bird)."""
    looks = {}
    for name in OBJECT_EMOJI:
        picture = world.render(Scene((SceneObject(name, "blue", 32, 32, 46, 0.0),), "white"))
        assert 250 < picture.masks[0].sum() < 2300, name
        looks[name] = picture.image.astype(np.float32)[::4, ::4]
    names = list(looks)
    for i, a in enumerate(names):
        for b in names[:i]:
            assert np.abs(looks[a] - looks[b]).mean() > 8, (a, b)


def test_tints_keep_the_shape_and_are_apart(world):
    means = {}
    natural = world.render(Scene((SceneObject("horse", None, 32, 32, 46, 0.0),), "grey"))
    for color in COLORS:
        picture = world.render(Scene((SceneObject("horse", color, 32, 32, 46, 0.0),), "grey"))
        assert (picture.masks == natural.masks).all()
        means[color] = picture.image[picture.masks[0]].astype(float).mean(0)
    assert min(np.linalg.norm(means[a] - means[b]) for a in COLORS for b in COLORS if a < b) > 60


def test_picture_layout(world):
    scene = Scene((SceneObject("cat", None, 20, 20, 24, 5.0), SceneObject("dog", "red", 44, 44, 24, -5.0)), "green")
    picture = world.render(scene)
    assert picture.image.shape == (64, 64, 3) and picture.image.dtype == np.uint8
    assert picture.masks.shape == (2, 64, 64) and picture.boxes.shape == (2, 4) and picture.depth.shape == (64, 64)
    assert not (picture.masks[0] & picture.masks[1]).any()
    for item, box in zip(scene.objects, picture.boxes, strict=True):
        expected = np.array(item.box())
        assert np.abs(box - expected).max() < 5
    empty = world.render(Scene((), "green"))
    behind = ~picture.masks.any(0)
    assert (picture.image[behind] != empty.image[behind]).any(-1).mean() < 0.1
    assert (picture.image[~behind] != empty.image[~behind]).any(-1).mean() > 0.9
    assert (world.render(scene).image == picture.image).all()


def test_boxes_follow_position_and_angle(world):
    here = world.render(Scene((SceneObject("key", None, 24.0, 30, 30, 0.0),), "white"))
    there = world.render(Scene((SceneObject("key", None, 32.0, 30, 30, 0.0),), "white"))
    assert (np.roll(here.image, 8, axis=1) == there.image).all()
    half = world.render(Scene((SceneObject("key", None, 24.5, 30, 30, 0.0),), "white"))
    assert (half.image != here.image).any()
    car = SceneObject("car", None, 32, 32, 40, 10.0)
    turned = world.render(Scene((car,), "white")).masks[0]
    x, y = np.nonzero(turned.T)
    slope = np.polyfit(x, y, 1)[0]
    assert slope < -0.05  # counter-clockwise: the right end goes up, y points down


def test_occlusion_and_edges_of_sampled_scenes(world):
    rng = np.random.default_rng(2)
    hidden = []
    for _ in range(500):
        scene = sample_scene(rng, held_out=None)
        picture = world.render(scene)
        for i, item in enumerate(scene.objects):
            alone = world.render(Scene((item,), scene.background)).masks[0]
            hidden.append(1 - picture.masks[i].sum() / alone.sum())
            x0, y0, x1, y1 = picture.boxes[i]
            assert 0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 64
    assert max(hidden) <= 0.2
    assert np.mean(np.array(hidden) > 0.01) > 0.02  # objects do hide each other


def test_depth(world):
    flat = world.render(
        Scene((SceneObject("cat", None, 24, 32, 24, 0.0), SceneObject("dog", None, 36, 32, 24, 0.0)), "white")
    )
    assert flat.depth.min() >= 0 and flat.depth.max() == 1
    assert flat.depth[flat.masks[0]].mean() > flat.depth[flat.masks[1]].mean()
    rng = np.random.default_rng(4)
    seen = 0
    while seen < 20:
        scene = sample_scene(rng)
        if scene.ground and len(scene.objects) > 1:
            picture = world.render(scene)
            depths = [float(picture.depth[mask].mean()) for mask in picture.masks]
            assert depths == sorted(depths, reverse=True)
            assert picture.depth[-1, 0] < picture.depth[40, 0] <= 0.9 < picture.depth[0, 0]
            seen += 1


def test_backgrounds_are_apart(world):
    shades = [world.render(Scene((), name)).image.reshape(-1, 3).mean(0) for name in BACKGROUNDS]
    assert min(np.linalg.norm(a - b) for i, a in enumerate(shades) for b in shades[:i]) > 40


def test_larger_pictures(world):
    scene = sample_scene(np.random.default_rng(0), size=96)
    picture = world.render(scene)
    assert picture.image.shape == (96, 96, 3) and picture.masks.any((1, 2)).all()


# --- make_scenes ----------------------------------------------------------------------------------


def test_parquet_opens_in_datasets(emoji_font, tmp_path):
    datasets = pytest.importorskip("datasets")
    from data_tools.make_scenes import main

    assert main([str(tmp_path / "a"), "--count", "6", "--shards", "2", "--seed", "3"]) == 0
    assert main([str(tmp_path / "b"), "--count", "3", "--start", "3", "--seed", "3"]) == 0
    load = dict(split="train", cache_dir=str(tmp_path / "cache"))
    rows = datasets.load_dataset("parquet", data_files=str(tmp_path / "a" / "*.parquet"), **load)
    rest = datasets.load_dataset("parquet", data_files=str(tmp_path / "b" / "*.parquet"), **load)
    assert rows["index"] == list(range(6)) and rest["index"] == [3, 4, 5]
    for row, again in zip(list(rows)[3:], rest, strict=True):
        assert (np.asarray(row["image"]) == np.asarray(again["image"])).all() and row["short"] == again["short"]
    row = rows[0]
    assert row["image"].size == (64, 64) and row["image"].mode == "RGB" and not row["heldout"]
    assert len(row["masks"]) == len(row["boxes"]) == len(row["items"])
    assert np.asarray(row["depth"]).max() == 65535 and set(np.unique(row["masks"][0])) == {0, 255}
    assert row["edit"]["image"].size == (64, 64) and 3 <= len(row["story"]["frames"]) <= 5
    assert row["story"]["frames"][0]["image"].size == (64, 64)
    assert not [path for path in (tmp_path / "a").iterdir() if path.suffix != ".parquet"]


def test_heldout_parquet(emoji_font, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    from data_tools.make_scenes import main

    assert main([str(tmp_path), "--count", "3", "--kind", "heldout"]) == 0
    (path,) = tmp_path.iterdir()
    assert pq.read_table(path, columns=["heldout"]).column(0).to_pylist() == [True] * 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-n", "0"], "--count: '0' is not a whole number from 1"),
        (["--shards", "0"], "--shards: '0' is not a whole number from 1"),
        (["-n", "2", "--shards", "3"], "every shard needs a row"),
        (["--size", "100000"], "--size: '100000' is not a whole number from 32 to 512"),
        (["--seed", "-1"], "--seed: '-1' is not a whole number from 0"),
        (["--kind", "odd"], "invalid choice"),
        (["--count", "many"], "--count: 'many' is not a whole number"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(options, words, tmp_path, capsys):
    from data_tools.make_scenes import main

    assert main([str(tmp_path / "out"), *options]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1 and not (tmp_path / "out").exists()


def test_unwritable_folder_and_full_disk(emoji_font, tmp_path, capsys, monkeypatch):
    pytest.importorskip("datasets")
    import pyarrow.parquet as pq

    from data_tools.make_scenes import main

    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "file"), "-n", "1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    assert main([str(tmp_path / "out"), "-n", "1"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_missing_font_exit_2(tmp_path, capsys, monkeypatch):
    pytest.importorskip("datasets")
    from data_tools.make_scenes import main

    monkeypatch.setenv("UNIGEN_EMOJI_FONT", "/nowhere/emoji.ttf")
    assert main([str(tmp_path / "out"), "-n", "1"]) == 2
    assert "fonts-noto-color-emoji" in capsys.readouterr().err
