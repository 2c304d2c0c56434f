"""A run that is killed, wherever that is: the same command goes on and ends as if nothing had happened.

Run: pytest tests/training/test_interruptions.py
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.test_trainer import losses, same, train
from unigen.training.checkpoint import has_model_of_step

WRITES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.rmtree", "tempfile.mkdtemp"}
"""Events of Python's audit hooks that come before something is done to a file."""


def save(model: Any, folder: Path) -> None:
    torch.save(model.state_dict(), folder / "weights.pt")
    (folder / "config.json").write_text("{}")


def sample(model: Any, step: int, folder: Path) -> None:
    (folder / f"{step:06d}.txt").write_text("a picture")


def short_run(folder: Path) -> None:
    """6 steps, saved every other, with a model and samples."""
    train(
        folder,
        "steps=6",
        "save_every=2",
        "sample_every=3",
        "log_every=1",
        "num_workers=0",
        save_model=save,
        write_samples=sample,
    )


def run_killed_at(folder: Path, event: int) -> bool:
    """Whether a run in a process of its own is killed before its `event`-th access to a file of its folder; False: it
    ended before that."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "it failed"
        return os.WIFSIGNALED(status)
    left = event

    def count(name: str, given: tuple[Any, ...]) -> None:
        nonlocal left
        if name in WRITES and any(isinstance(one, (str, os.PathLike)) and str(folder) in str(one) for one in given):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    code = 1
    try:
        torch.set_num_threads(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.addaudithook(count)
        short_run(folder)
        code = 0
    finally:
        os._exit(code)


def names(folder: Path) -> set[str]:
    paths = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return {name for name in paths if not name.startswith("tensorboard/")}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    short_run(folder)
    return folder


def check(folder: Path, uninterrupted: Path) -> None:
    """That a run has ended as `uninterrupted` did: weights, curves, model and files."""
    assert same(folder, uninterrupted) and losses(folder) == losses(uninterrupted)
    assert has_model_of_step(folder, 6) and names(folder) == names(uninterrupted)
    both = [torch.load(one / "model" / "weights.pt") for one in (folder, uninterrupted)]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[1])


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_run_killed_again_and_again_ends_as_one_that_was_not(
    stride: int, uninterrupted: Path, tmp_path: Path
) -> None:
    kills = 0
    for event in range(0, 1000, stride):  # always later than before, so that it gets further and ends at last
        if not run_killed_at(tmp_path, event):
            break
        kills += 1
    assert kills > 20 / stride
    check(tmp_path, uninterrupted)
