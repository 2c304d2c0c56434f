"""A package that is missing is one line that names the extra that brings it, whatever needs it."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from unigen.commands.main import main
from unigen.utils.extras import EXTRA_MODULES, missing_module_message, require_extra

NAMES = {"sklearn": "scikit-learn"}  # of the package, where the module is called otherwise


def test_every_package_of_an_extra_is_known(root: Path) -> None:
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, modules in EXTRA_MODULES.items():
        packages = {NAMES.get(module, module).replace("_", "-") for module in modules}
        wanted = {re.split(r"[\[<>=!~; ]", line)[0] for line in extras[extra]}
        assert wanted <= packages, extra


@pytest.mark.parametrize("extra", EXTRA_MODULES)
def test_a_hidden_module_is_named_with_its_extra(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in EXTRA_MODULES[extra]:
        with monkeypatch.context() as hidden:
            hidden.setitem(sys.modules, module, None)
            with pytest.raises(ValueError) as error:
                require_extra(extra)
            assert f"pip install 'unigen[{extra}]'" in str(error.value) and "\n" not in str(error.value)
            with pytest.raises(ValueError, match=module):
                require_extra(extra, module)


def test_what_another_package_needs_is_of_the_commands_extra() -> None:
    def line(name: str, command: str) -> str | None:
        return missing_module_message(ModuleNotFoundError(f"No module named {name!r}", name=name), command)

    assert "unigen[serve]" in str(line("anyio.abc", "serve")) and "unigen[serve]" in str(line("starlette", "info"))
    assert "unigen[train]" in str(line("datasets", "eval")) and "unigen[train]" in str(line("datasets", "train"))
    assert "'unigen'" in str(line("torch", "generate")) and line("unigen.nothing", "serve") is None


@pytest.mark.parametrize(
    ("names", "arguments", "extra"),
    [
        (["fastapi"], ["serve"], "serve"),
        (["starlette"], ["serve"], "serve"),
        (["httpx", "uvicorn"], ["serve", "--port", "1"], "serve"),
        (["accelerate"], ["train", "RECIPE"], "train"),
        (["tensorboard"], ["train", "RECIPE"], "train"),
        (["sklearn"], ["eval", "digits", "--model", "unigen-tiny"], "eval"),
    ],
)
def test_a_command_without_its_extra_is_one_line(
    names: list[str],
    arguments: list[str],
    extra: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from unigen.config import RunConfig\n\n\ndef config():\n    return RunConfig(steps=1)\n\n\n"
        "def build(cfg):\n    raise RuntimeError('built')\n"
    )
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)
    assert main([str(recipe) if word == "RECIPE" else word for word in arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("unigen: error: ") and said.count("\n") == 1 and f"pip install 'unigen[{extra}]'" in said
