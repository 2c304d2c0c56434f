"""Which Python `scripts/lib.sh` makes the environment with."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder of programs that stands for PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "dirname", "uname"):
        (folder / name).symlink_to(f"/bin/{name}" if Path(f"/bin/{name}").exists() else f"/usr/bin/{name}")
    return folder


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def run(root: Path, programs: Path, line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    script = f"set -euo pipefail; . scripts/lib.sh; {line}"
    environment = {"PATH": str(programs), "venv": str(programs / "venv"), **environment}
    return subprocess.run(["/bin/bash", "-c", script], cwd=root, env=environment, capture_output=True, text=True)


def test_the_newest_accepted_python_is_taken(root: Path, programs: Path) -> None:
    for version in ("3.11", "3.14"):  # each says that it is accepted
        program(programs / f"python{version}", "exit 0")
    program(programs / "python3.13", "exit 1")  # there, and not to be started
    assert run(root, programs, "find_python").stdout.strip() == str(programs / "python3.14")
    assert run(root, programs, "find_python", PYTHON="python3.11").stdout.strip() == str(programs / "python3.11")
    assert run(root, programs, "find_python", PYTHON="python3.13").returncode == 1


def test_an_old_python_is_not_accepted(root: Path, programs: Path) -> None:
    program(programs / "python3", f'exec {sys.executable} "$@"')
    assert run(root, programs, "find_python").stdout.strip() == str(programs / "python3")
    assert run(root, programs, "PYTHONS=(3.99); find_python").returncode == 1


def test_uv_fetches_one_where_none_is_there(root: Path, programs: Path) -> None:
    refused = run(root, programs, "make_venv")
    assert refused.returncode == 1 and "unigen needs Python 3.11 to 3.14" in refused.stderr
    program(programs / "uv", 'echo "uv $*"')
    made = run(root, programs, "make_venv")
    assert made.returncode == 0 and f"uv venv --quiet --seed --python 3.13 {programs / 'venv'}" in made.stdout
    assert run(root, programs, "make_venv", PYTHON="/no/python").returncode == 1


def test_all_say_the_same(root: Path, programs: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    versions = run(root, programs, 'echo "${PYTHONS[@]}"').stdout.split()
    assert project["requires-python"] == ">=3.11,<3.15" and versions == ["3.14", "3.13", "3.12", "3.11"]
    assert [line.rpartition(" ")[2] for line in project["classifiers"]] == versions[::-1]
    workflow = (root / ".github" / "workflows" / "ci.yml").read_text()
    assert all(f'"{version}"' in workflow for version in versions)
