"""The files for those who join: they agree with what the project is.

Run: pytest tests/test_project_files.py
"""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import unigen
from unigen.utils.extras import EXTRA_MODULES
from unigen.utils.module_renames import MODULE_RENAMES

INDIRECT = {"python_multipart": "starlette reads forms with it"}
"""Packages of an extra that another package imports."""


def commands_of_ci(root: Path) -> set[str]:
    """The scripts that `.ci/run` calls, with their fixed options."""
    lines = (root / ".ci" / "run").read_text().splitlines()
    return {re.split(r' "\$@"| \|', line)[0] for line in lines if line.startswith("scripts/")}


def missing_hooks(ci: set[str], config: str) -> set[str]:
    """Commands of CI that no hook of pre-commit's configuration runs."""
    return ci - set(re.findall(r"^\s+entry: (.+)$", config, re.MULTILINE))


def test_every_step_of_ci_is_a_hook(root: Path) -> None:
    ci, config = commands_of_ci(root), (root / ".pre-commit-config.yaml").read_text()
    assert {"scripts/test.sh", "scripts/lint.sh"} < ci
    assert not missing_hooks(ci, config)
    assert missing_hooks(ci, config.replace("entry: scripts/lint.sh", "entry: true")) == {"scripts/lint.sh"}


def test_the_workflow_runs_what_is_run_here(root: Path) -> None:
    assert "- run: .ci/run" in (root / ".github" / "workflows" / "ci.yml").read_text()


def test_make_calls_what_exists(root: Path) -> None:
    makefile = (root / "Makefile").read_text()
    assert all((root / path).exists() for path in re.findall(r"(?:scripts|\.ci)/[\w./]+", makefile))
    [phony] = re.findall(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)
    assert set(phony.split()) == set(re.findall(r"^([\w-]+):  ## ", makefile, re.MULTILINE))


def test_the_version_is_said_once(root: Path) -> None:
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    assert unigen.__version__ == version
    assert re.findall(r"^## \[(.+?)\]", (root / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == version


def test_the_changelog_has_all_old_modules(root: Path) -> None:
    rows = dict(re.findall(r"^\| `unigen\.([\w.]+)` \| `unigen\.([\w.]+)`", (root / "CHANGELOG.md").read_text(), re.M))
    assert rows == {old: new.split()[0] for old, new in MODULE_RENAMES.items()}


def imported_modules(source: str) -> set[str]:
    """Top-level modules that a source imports, also below another one (torch.utils.tensorboard)."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= set(node.module.split("."))
    return found


def test_every_package_of_an_extra_is_imported(root: Path) -> None:
    folders = ("unigen", "recipes", "data_tools", "scripts", "tests")
    sources = [path.read_text() for folder in folders for path in (root / folder).rglob("*.py")]
    used = set().union(*map(imported_modules, sources))
    modules = {module for modules in EXTRA_MODULES.values() for module in modules}
    assert modules - used == set(INDIRECT)
    assert "tensorboard" in imported_modules("import torch.utils.tensorboard") - imported_modules("import torch")
