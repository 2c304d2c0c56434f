"""What is installed: recipes and data tools inside the package, weights and web files beside the code.

Run: pytest tests/test_packaging.py            (-m slow builds the wheel itself and runs it, in a minute)
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from unigen.commands.main import main
from unigen.training import recipe_files


def test_every_package_is_listed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("setuptools")  # brings distutils where Python has none
    core = pytest.importorskip("distutils.core")
    monkeypatch.chdir(root)
    found = core.run_setup("setup.py", stop_after="init")
    ours = {".".join(path.parent.relative_to(root).parts) for path in (root / "unigen").rglob("__init__.py")}
    assert set(found.packages) == ours | {"unigen.recipes", "unigen.data_tools"}
    assert found.package_dir == {"unigen.recipes": "recipes", "unigen.data_tools": "data_tools"}


def test_shipped_recipes_are_found_by_name(root: Path) -> None:
    assert set(recipe_files.shipped_recipes()) == {path.stem for path in (root / "recipes").glob("*.py")}
    for name in ("tiny", "tiny.py", "recipes/tiny.py", str(root / "recipes" / "tiny.py")):
        assert recipe_files.find_recipe(name).samefile(root / "recipes" / "tiny.py")


def test_a_file_of_ones_own_comes_before_a_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipe_files.find_recipe("recipes/tiny.py").is_absolute()
    Path("tiny.py").touch()
    assert recipe_files.find_recipe("tiny.py") == Path("tiny.py")
    with pytest.raises(ValueError, match="no recipe own/tiny.py"):
        recipe_files.find_recipe("own/tiny.py")


def test_recipes_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They lie inside the package; a folder `recipes` beside it is somebody else's."""
    for folder in (tmp_path / "unigen" / "recipes", tmp_path / "recipes"):
        folder.mkdir(parents=True)
    recipe = "def config(): ...\ndef build(cfg): ...\n"
    (tmp_path / "unigen" / "recipes" / "one.py").write_text(recipe)
    (tmp_path / "unigen" / "recipes" / "helpers.py").write_text("def config(): ...\n")
    (tmp_path / "recipes" / "two.py").write_text(recipe)
    monkeypatch.setattr(recipe_files, "PACKAGE_ROOT", tmp_path / "unigen")
    assert list(recipe_files.shipped_recipes()) == ["one"]


def test_help_and_errors_list_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    assert "tiny_vq" in shown and "scene_detector" in shown
    assert main(["train", "tinny"]) == 2
    assert "did you mean 'tiny'? (shipped recipes: connector, " in capsys.readouterr().err


@pytest.mark.slow
def test_the_wheel_runs_outside_of_the_checkout(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    source, wheels, place = tmp_path / "source", tmp_path / "wheels", tmp_path / "place"
    source.mkdir()
    for name in ("unigen", "recipes", "data_tools"):
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(root / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "-q", str(source), "--no-deps", "--no-build-isolation", "-w"]
    subprocess.run([*build, str(wheels)], check=True, timeout=250)
    [wheel] = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert "unigen/py.typed" in names
        archive.extractall(place)
    for top in ("unigen/assets", "unigen/serving/web", "recipes", "data_tools"):
        files = [path for path in (root / top).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        inside = {f"{top if top.startswith('unigen') else f'unigen/{top}'}/{p.relative_to(root / top)}" for p in files}
        assert inside and inside <= names
    environment = {**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
    small = ["model.image_size=16", "model.codebook_size=32", "model.channels=16", "model.decoder_channels=16"]
    brief = ["image_source=digits", "steps=1", "time_limit=none", "batch_size=2", "num_workers=0", "precision=fp32"]
    lines = (
        ["-c", f"import unigen; assert unigen.__file__.startswith({str(place)!r}), unigen.__file__"],
        ["-m", "unigen", "train", "tiny_vq", "model.wide_channels=16", *small, *brief, "run_dir=run"],
        ["-m", "unigen.data_tools.make_scenes", "--help"],
    )
    for line in lines:
        subprocess.run([sys.executable, *line], cwd=tmp_path, env=environment, check=True, timeout=120)
    assert (tmp_path / "run" / "model").is_dir()
