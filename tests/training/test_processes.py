"""Several processes of one run: one makes what all read, and where one ends the others end soon, with the reason.

Run: pytest tests/training/test_processes.py
"""

from __future__ import annotations

import functools
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.test_trainer import DenoisingObjective, plain, train
from unigen.training import generator_setup, peers
from unigen.training.peers import main_process_first
from unigen.training.recipe import run_recipe
from unigen.training.stream import BatchIterator


def ranks(work: Callable[[int], None], folder: Path, world: int = 2) -> list[int]:
    """Start `run_worker(rank)` in processes of one run, forked; their ids. What each prints is in folder/RANK.out."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for number in (1, 2):
                    os.dup2(os.open(folder / f"{rank}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
                sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)
                torch.set_num_threads(1)
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
                from accelerate.state import AcceleratorState

                AcceleratorState._reset_state(reset_partial_state=True)
                work(rank)
                code = 0
            except ValueError as error:
                print(f"unigen: error: {error}", file=sys.stderr)
                code = 2
            finally:
                os._exit(code)
        started.append(child)
    return started


def finished(pid: int, seconds: float = 120) -> int:
    """The exit code of a process, or less than 0 for the signal that ended it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("it hangs")


def wait_for(marks: list[Path], pids: list[int], folder: Path, seconds: float = 120) -> None:
    """Wait until all the files are there. Where a process has ended before, or time is up, all are killed and it fails
    with what they said."""
    end, running = time.monotonic() + seconds, list(pids)
    while not all(mark.exists() for mark in marks):
        running = [pid for pid in running if os.waitpid(pid, os.WNOHANG)[0] == 0]
        if len(running) == len(pids) and time.monotonic() < end:
            time.sleep(0.05)
            continue
        for pid in running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        said = "\n".join(path.read_text() for path in sorted(folder.glob("*.out")))
        raise AssertionError(f"{len(pids) - len(running)} of the processes ended early, or time is up:\n{said}")


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    """Imports that every forked process would do for itself."""
    import accelerate
    import torch.utils.tensorboard

    assert accelerate and torch.utils.tensorboard


def test_one_process_trains_the_text_tokenizer_that_all_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(lines: Any, folder: Path, pieces: int, specials: Any) -> None:
        with open(tmp_path / "trained", "a") as log:
            log.write(f"{os.environ['RANK']}\n")
        time.sleep(1)
        (folder / "tokenizer.json").write_text("whole")

    monkeypatch.setattr(generator_setup.text, "train_tokenizer", slow)
    monkeypatch.setattr(generator_setup.text, "load", lambda folder: (folder / "tokenizer.json").read_text())

    def work(rank: int) -> None:
        assert generator_setup.load_or_train_text_tokenizer(tmp_path / "words", [], 300, ()) == "whole"

    assert [finished(pid) for pid in ranks(work, tmp_path)] == [0, 0]
    assert (tmp_path / "trained").read_text() == "0\n", "the main process alone"


def test_a_failure_of_the_first_process_does_not_hold_the_others(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with main_process_first():
            if rank == 0:
                raise ValueError("no space")

    assert [finished(pid) for pid in ranks(work, tmp_path)] == [2, 2]
    waited = "the main process of the run failed, on which this one waited: no space"
    for rank, said in enumerate(("no space", waited)):
        assert (tmp_path / f"{rank}.out").read_text() == f"unigen: error: {said}\n"


def test_an_end_of_the_first_process_is_told_by_the_others(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        from accelerate import PartialState

        PartialState(cpu=True)
        if rank:
            (tmp_path / "joined").touch()
        while not (tmp_path / "joined").exists():
            time.sleep(0.01)
        with main_process_first():
            os._exit(3)

    assert [finished(pid) for pid in ranks(work, tmp_path)] == [3, 2]
    said = (tmp_path / "1.out").read_text()
    assert said.startswith("unigen: error: another process of the run ended") and said.count("\n") == 1


def test_a_process_that_closes_its_loader_late_ends_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one is gone by then."""
    monkeypatch.setattr(peers, "watch_pids", functools.partial(peers.watch_pids, interval=0.05, grace=0.1))
    real = BatchIterator.close

    def close(batches: BatchIterator) -> None:
        real(batches)
        time.sleep(2 * int(os.environ["RANK"]))

    monkeypatch.setattr(BatchIterator, "close", close)

    def work(rank: int) -> None:
        train(tmp_path / "run", "steps=2", "batch_size=4", "num_workers=0", "precision=fp32", model=plain())

    assert [finished(pid) for pid in ranks(work, tmp_path)] == [0, 0], (tmp_path / "1.out").read_text()


def test_a_recipe_by_a_launcher_of_mpi(tmp_path: Path) -> None:
    """One of its processes is the main one; all train together."""
    (tmp_path / "recipe.py").write_text(
        "from unigen.config import RunConfig\n"
        "from tests.training.test_trainer import DenoisingObjective, NoisyDataset, plain\n"
        "from unigen.training.train_spec import TrainSpec\n"
        f"def config(): return RunConfig(run_dir={str(tmp_path / 'run')!r}, steps=2, batch_size=4, num_workers=0)\n"
        "def build(cfg): return TrainSpec(plain(), NoisyDataset(), objective=DenoisingObjective())\n"
    )

    def work(rank: int) -> None:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            del os.environ[name]
        for name, value in (("RANK", rank), ("SIZE", 2), ("LOCAL_RANK", rank), ("LOCAL_SIZE", 2)):
            os.environ[f"OMPI_COMM_WORLD_{name}"] = str(value)
        run_recipe(str(tmp_path / "recipe.py"))

    assert [finished(pid) for pid in ranks(work, tmp_path)] == [0, 0], (tmp_path / "1.out").read_text()
    assert "2 x cpu" in (tmp_path / "0.out").read_text(), "as the main process alone says"


def test_waiting_for_processes_that_end_early_fails(tmp_path: Path) -> None:
    pids = ranks(lambda rank: time.sleep(600) if rank else print("no memory"), tmp_path)
    with pytest.raises(AssertionError, match="1 of the processes ended early, or time is up:\nno memory"):
        wait_for([tmp_path / "there"], pids, tmp_path)
    with pytest.raises(ChildProcessError):
        os.waitpid(pids[1], 0)


def test_two_processes_train_one_model(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        model = plain()
        train(tmp_path / "run", "steps=3", "batch_size=4", "num_workers=0", "precision=fp32", model=model)
        torch.save(model.state_dict(), tmp_path / f"{rank}.pt")

    assert [finished(pid) for pid in ranks(work, tmp_path)] == [0, 0], (tmp_path / "1.out").read_text()
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("busy", [True, False])
def test_where_one_process_is_killed_the_other_says_so_and_ends(victim: int, busy: bool, tmp_path: Path) -> None:
    """In the middle of a long step as between two short ones; its loader worker has ended with it."""

    def step() -> None:
        (tmp_path / f"there-{os.environ['RANK']}").touch()
        time.sleep(600 if busy else 0.01)

    class Reporting(DenoisingObjective):
        def __call__(self, *given: Any) -> Any:
            if self.step >= 2:
                step()
            return super().__call__(*given)

    def work(rank: int) -> None:
        train(tmp_path / "run", "steps=100000", "num_workers=1", "batch_size=4", "log_every=1000", model=plain(),
              objective=Reporting())  # fmt: skip

    pids = ranks(work, tmp_path)
    wait_for([tmp_path / f"there-{rank}" for rank in range(2)], pids, tmp_path)
    os.kill(pids[victim], signal.SIGKILL)
    assert finished(pids[victim]) == -signal.SIGKILL
    assert finished(pids[1 - victim]) in (1, 2)
    said = (tmp_path / f"{1 - victim}.out").read_text()
    assert f"process {victim} of the run ended" in said or "since another one of the run did" in said
    assert "the same command goes on" in said and "Traceback" not in said


def test_processes_that_would_not_train_together_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a launcher says 2 and accelerate finds 1, each would train alone into one folder."""
    train(tmp_path / "one", "steps=1", "num_workers=0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched, which would not train together"):
        train(tmp_path / "two", "steps=1", "num_workers=0")
