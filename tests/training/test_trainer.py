"""The Trainer: exact resume, sums over counts whatever the split, checkpoints that survive, clear failures.

Run: pytest tests/training/test_trainer.py [-m slow for two processes]
"""

import errno
import json
import math
import multiprocessing
import os
import queue
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from unigen.config import OptimConfig, RunConfig, apply_overrides
from unigen.tokenizers.quantize import VectorQuantizer
from unigen.training import checkpoint
from unigen.training.checkpoint import EMA, list_checkpoints, load_checkpoint, lock_run
from unigen.training.muon import MuonAdamW
from unigen.training.optim import adamw, lr_factor
from unigen.training.peers import is_alive, watch_pids
from unigen.training.recipe import run_recipe
from unigen.training.stream import feistel_permutation
from unigen.training.train_spec import TrainSpec
from unigen.training.trainer import Trainer
from unigen.utils.files import load_json


class NoisyDataset:
    """40 rows that draw from every global generator, as augmentations do."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> Tensor:
        return torch.randn(6) * 0.3 + i / 40 + random.random() * 0.1 + float(np.random.rand()) * 0.1


class DenoisingObjective:
    """A masked regression with the objective's own noise; the number of masked values differs from row to row."""

    def __init__(self, fail_at: int = -1, failure: Any = None, noise: float = 0.1) -> None:
        self.step, self.fail_at, self.failure, self.noise = 0, fail_at, failure, noise

    def __call__(self, model: nn.Module, x_BD: Tensor, rng: torch.Generator) -> dict[str, tuple[Tensor, Tensor | int]]:
        if self.step == self.fail_at:
            self.failure()
        noise_BD = torch.randn(x_BD.shape, generator=rng)
        keep_BD = (x_BD > x_BD.mean(1, keepdim=True)) & (x_BD[:, :1] > 0.4)
        gap_BD = model(x_BD + self.noise * noise_BD) - x_BD
        tokens = torch.tensor(x_BD.numel())
        return {
            "masked": (gap_BD[keep_BD].square().sum(), keep_BD.sum()),
            "all": (gap_BD.abs().sum(), x_BD.numel()),
            "metric/tokens": (tokens, 1),
        }


def network(dropout: float = 0.2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, 6))


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 6))


def settings(folder: Path, *overrides: str) -> RunConfig:
    base = RunConfig(
        steps=12, batch_size=8, log_every=1, save_every=6, sample_every=0, precision="bf16", ema_decay=0.99
    )
    base.optim = OptimConfig(lr=1e-2, warmup_steps=3)
    return apply_overrides(base, [f"run_dir={folder}", *overrides])


def train(folder: Path, *overrides: str, **job: Any) -> dict[str, Any]:
    given = {"model": network(), "dataset": NoisyDataset(), "objective": DenoisingObjective()} | job
    return Trainer(settings(folder, *overrides), TrainSpec(**given)).run()


def losses(folder: Path) -> list[tuple[Any, ...]]:
    names = ("step", "loss", "masked", "all", "grad_norm", "lr")
    return [tuple(json.loads(line)[n] for n in names) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def flat(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for key in tree for leaf in flat(tree[key])]
    return [leaf for value in tree for leaf in flat(value)] if isinstance(tree, (list, tuple)) else [tree]


def same(a: Path, b: Path) -> bool:
    """Losses, weights, buffers, optimizer, EMA of two runs, bit for bit."""
    left, right = load_checkpoint(a), load_checkpoint(b)
    assert left is not None and right is not None
    del left["elapsed"], right["elapsed"]
    pairs = zip(flat(left), flat(right), strict=True)
    equal = all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)
    return equal and losses(a) == losses(b)


def crash() -> None:
    raise RuntimeError("the power went out")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 steps in one go: dropout, shuffling, 2 loader workers, bf16 autocast, EMA; 40 rows, so 3 epochs."""
    folder = tmp_path_factory.mktemp("straight")
    train(folder)
    return folder


def interrupted(folder: Path) -> None:
    """Saved at step 6, lost at step 8."""
    with pytest.raises(RuntimeError, match="the power went out"):
        train(folder, objective=DenoisingObjective(8, crash))
    assert [line[0] for line in losses(folder)] == list(range(1, 9))


def test_resume_is_exact(straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    interrupted(tmp_path)
    capsys.readouterr()
    result = train(tmp_path)
    assert "resuming at step 6" in capsys.readouterr().out
    assert same(straight, tmp_path)
    assert result["step"] == 12 and result["rows"] == 96 and result["finished"]


@pytest.mark.parametrize("lost", ["rows", "dropout", "optimizers", "ema", "buffers"])
def test_resume_would_differ_without(
    lost: str, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lost == "dropout":  # dropout's generator runs on instead of being a function of the step
        monkeypatch.setattr(Trainer, "_seed_objective", lambda self, *_: torch.Generator().manual_seed(self.state.step))
        straight = tmp_path / "straight"
        train(straight)
    interrupted(tmp_path)
    whole = load_checkpoint

    def forgetful(run_dir: Path) -> dict[str, Any] | None:
        state = whole(run_dir)
        assert state is not None
        if lost == "rows":
            state["rows"] = 0
        elif lost == "optimizers":
            state["optimizers"][0]["state"] = {}
        elif lost == "ema":
            state["ema"] = None
        elif lost == "buffers":
            state["model"]["1.running_mean"].zero_()
        return state

    monkeypatch.setattr("unigen.training.run_state.load_checkpoint", forgetful)
    train(tmp_path)
    assert losses(straight)[:6] == losses(tmp_path)[:6] and not same(straight, tmp_path)


def test_the_number_of_workers_changes_nothing(straight: Path, tmp_path: Path) -> None:
    train(tmp_path, "num_workers=0")
    assert same(straight, tmp_path)


def test_another_seed_changes_the_run(straight: Path, tmp_path: Path) -> None:
    train(tmp_path, "seed=1")
    assert not same(straight, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(number: int, straight: Path, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    result = train(tmp_path, objective=DenoisingObjective(4, lambda: os.kill(os.getpid(), number)))
    assert result["finished"] is False and result["step"] == 5
    assert signal.getsignal(number) is before, "handlers are put back"
    assert train(tmp_path)["finished"] is True
    assert same(straight, tmp_path)


@pytest.mark.parametrize("stops", [[3], [2, 9]])
def test_a_stop_between_two_log_lines_leaves_the_same_curve(stops: list[int], tmp_path: Path) -> None:
    sparse = "log_every=5", "save_every=0"
    train(tmp_path / "straight", *sparse)
    for at in stops:
        stopped = DenoisingObjective(at, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(tmp_path / "stopped", *sparse, objective=stopped)["step"] == at + 1
    train(tmp_path / "stopped", *sparse)
    assert [line[0] for line in losses(tmp_path / "straight")] == [5, 10, 12]
    assert same(tmp_path / "straight", tmp_path / "stopped")


def test_more_signals_do_not_lose_the_checkpoint(tmp_path: Path) -> None:
    """A launcher forwards what its group has had already, also while the run saves."""

    def save(model: nn.Module, folder: Path) -> None:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.02)
        (folder / "weights").write_text("whole")

    stopped = DenoisingObjective(
        4, lambda: [os.kill(os.getpid(), number) for number in (signal.SIGTERM, signal.SIGINT)]
    )
    assert train(tmp_path, objective=stopped, save_model=save)["step"] == 5
    assert (tmp_path / "model" / "weights").read_text() == "whole"
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000005.pt"]


def test_ctrl_c_pressed_again_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 2))
    stopped = DenoisingObjective(4, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    monkeypatch.setattr("unigen.training.trainer.time.monotonic", lambda: next(clock))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, "num_workers=0", objective=stopped)
    assert not list_checkpoints(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.slow
def test_a_signal_to_the_whole_group_stops_cleanly(number: int, tmp_path: Path, root: Path) -> None:
    code = f"import sys; sys.path[:0] = [{str(root)!r}, {str(Path(__file__).parent)!r}]; import test_trainer as t\n"
    code += f"from pathlib import Path; print(t.train(Path({str(tmp_path)!r}), 'steps=1000000', 'save_every=0'))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if line.startswith("step 3/"):
                break
        os.killpg(process.pid, number)
        assert "stopped by a signal" in process.stdout.read(), process.stderr.read()
    assert process.returncode == 0 and len(list_checkpoints(tmp_path)) == 1


# ---------------------------------------------------------------- sums over counts


def weights_after(folder: Path, *overrides: str, **job: Any) -> Tensor:
    model = job.pop("model", None) or plain()
    options = ["precision=fp32", "steps=4", "ema_decay=0", "save_every=0", "shuffle=false", *overrides]
    train(folder, *options, model=model, **job)
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


class CountedObjective(DenoisingObjective):
    """Denoise that knows its counts without running the model."""

    asked = 0

    def counts(self, x_BD: Tensor, rng: torch.Generator) -> dict[str, Tensor | int]:
        self.asked += 1
        keep_BD = (x_BD > x_BD.mean(1, keepdim=True)) & (x_BD[:, :1] > 0.4)
        return {"masked": keep_BD.sum(), "all": x_BD.numel()}


class MeanOfMeans(DenoisingObjective):
    def __call__(self, *args: Any) -> dict[str, tuple[Tensor, Tensor | int]]:
        parts = super().__call__(*args).items()
        return {name: (total / max(int(count), 1), 1) for name, (total, count) in parts}


def test_accumulation_gives_the_same_number(tmp_path: Path) -> None:
    whole = weights_after(tmp_path / "a", "batch_size=8", objective=DenoisingObjective(noise=0))
    split = weights_after(tmp_path / "b", "batch_size=2", "accumulation_steps=4", objective=DenoisingObjective(noise=0))
    counted = CountedObjective(noise=0)
    known = weights_after(tmp_path / "c", "batch_size=2", "accumulation_steps=4", objective=counted)
    wrong = weights_after(tmp_path / "d", "batch_size=2", "accumulation_steps=4", objective=MeanOfMeans(noise=0))
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-6)
    assert torch.equal(split, known) and counted.asked == 16
    assert (wrong - whole).abs().max() > 1e-3, "the mean of means is another number"
    for a, b in zip(losses(tmp_path / "a"), losses(tmp_path / "b"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_counting_leaves_no_trace_in_buffers(tmp_path: Path) -> None:
    model, known = network(), network()
    weights_after(tmp_path / "a", "batch_size=4", "accumulation_steps=2", model=model, objective=DenoisingObjective())
    weights_after(tmp_path / "b", "batch_size=4", "accumulation_steps=2", model=known, objective=CountedObjective())
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), known.buffers(), strict=True))
    assert model[1].num_batches_tracked == 8


class RevivingModel(nn.Module):
    """Changes its own weights in a forward pass, as a quantizer does that revives dead codes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.quantizer = nn.Linear(6, 4), VectorQuantizer(64, 4, revive_every=1, dead_below=1.0)

    def forward(self, x_BD: Tensor, rng: torch.Generator) -> Any:
        with torch.no_grad():
            self.inner.weight.mul_(1.01)
        return self.quantizer(self.inner(x_BD)[:, :, None, None], rng)


def revived(model: Any, x_BD: Tensor, rng: torch.Generator) -> dict[str, tuple[Tensor, Tensor | int]]:
    return model(x_BD, rng).losses


class RevivedCounted:
    def __call__(self, *args: Any) -> dict[str, tuple[Tensor, Tensor | int]]:
        return revived(*args)

    def counts(self, x_BD: Tensor, rng: torch.Generator) -> dict[str, int]:
        return {"codebook": len(x_BD), "commit": len(x_BD)}


def test_counting_leaves_no_trace_in_weights(tmp_path: Path) -> None:
    options = "batch_size=4", "accumulation_steps=2"
    one = weights_after(tmp_path / "a", *options, model=RevivingModel(), objective=revived)
    known = weights_after(tmp_path / "b", *options, model=RevivingModel(), objective=RevivedCounted())
    assert torch.equal(one, known) and losses_of(tmp_path / "a") == losses_of(tmp_path / "b")


def losses_of(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_weights_scale_a_loss(tmp_path: Path) -> None:
    objective: Any = DenoisingObjective()
    objective.weights = {"masked": 0.0}
    result = train(tmp_path, "steps=1", objective=objective)
    assert result["loss"] == result["all"] and result["masked"] > 0


WORKER = """
import sys
sys.path[:0] = [{root!r}, {here!r}]
import test_trainer as t, torch
from pathlib import Path
from unigen.training.trainer import Trainer
w = t.weights_after(Path({folder!r}), "batch_size=4", "num_workers=1", model=t.dropping())
torch.save(w, {folder!r} + f"/weights-{{torch.distributed.get_rank()}}.pt")
"""


def dropping() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Dropout(0.2), nn.Linear(32, 6))


def test_the_end_of_another_process_is_noticed() -> None:
    """Also of one that nobody has waited for."""
    gone: queue.Queue[int] = queue.Queue()
    child = os.fork()
    if child == 0:
        time.sleep(600)
    with watch_pids([child], gone.put, interval=0.05, grace=0.1):
        time.sleep(0.5)
        assert is_alive(child) and gone.empty()
        os.kill(child, signal.SIGKILL)
        assert gone.get(timeout=60) == child
    os.waitpid(child, 0)
    assert not is_alive(child)
    with watch_pids([child], gone.put, interval=0.05, grace=60):
        time.sleep(0.5)
    assert gone.empty(), "where the run ends meanwhile, all is well"


LONG_STEP = """
import sys, time
sys.path[:0] = [{root!r}, {here!r}]
import test_trainer as t, torch
from pathlib import Path

def slow():
    print("slow", flush=True)
    time.sleep(100)

t.weights_after(Path({folder!r}), "batch_size=4", "num_workers=1", objective=t.DenoisingObjective(2, slow))
"""


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_process_is_killed_and_the_other_ends_soon(victim: int, tmp_path: Path, root: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(LONG_STEP.format(root=str(root), here=str(Path(__file__).parent), folder=str(tmp_path / "run")))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    other = ranks[1 - victim]
    assert other.stdout is not None
    assert any("slow" in line for line in other.stdout)
    ranks[victim].kill()
    began = time.monotonic()
    told = other.communicate(timeout=90)[1]
    ranks[victim].communicate()
    assert other.returncode == 1 and f"process {victim} of the run ended" in told
    assert time.monotonic() - began < 60, "far less than its step takes"


@pytest.mark.slow
def test_two_processes_equal_one_with_accumulation(tmp_path: Path, root: Path) -> None:
    one = weights_after(tmp_path / "one", "batch_size=4", "accumulation_steps=2", model=dropping())
    wrong = weights_after(tmp_path / "wrong", "batch_size=4", model=dropping())
    folder = tmp_path / "two"
    folder.mkdir()
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(root), here=str(Path(__file__).parent), folder=str(folder)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    two = [torch.load(folder / f"weights-{rank}.pt") for rank in range(2)]
    assert torch.equal(*two)
    torch.testing.assert_close(two[0], one, rtol=1e-5, atol=1e-6)
    assert (two[0] - wrong).abs().max() > 1e-3, "one process alone sees half the rows"
    for a, b in zip(losses(tmp_path / "one"), losses(folder), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


# ---------------------------------------------------------------- several objectives


def test_each_objective_changes_its_own_parameters(tmp_path: Path) -> None:
    model = nn.ModuleDict({"maker": nn.Linear(6, 6), "critic": nn.Linear(6, 1)})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def fool(model: Any, x_BD: Tensor, rng: torch.Generator) -> dict[str, tuple[Tensor, int]]:
        return {"fool": (-model["critic"](model["maker"](x_BD)).sum(), len(x_BD))}

    def idle(model: Any, x_BD: Tensor, rng: torch.Generator) -> dict[str, tuple[Tensor, int]]:
        assert not model["maker"].weight.requires_grad
        return {"idle": (0 * model["critic"](x_BD).sum(), len(x_BD))}

    pairs = [(fool, model["maker"].parameters()), (idle, model["critic"].parameters())]
    train(tmp_path, "optim.weight_decay=0", model=model, objectives=pairs)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) is name.startswith("critic")
        assert p.requires_grad


# ---------------------------------------------------------------- the clock, logs, artefacts


def test_time_limit_ends_the_run_and_anneals(tmp_path: Path) -> None:
    result = train(tmp_path, "steps=1000000", "time_limit=1.5", "save_every=0", "optim.min_lr_ratio=0", "num_workers=0")
    assert result["finished"] and 1.5 <= result["seconds"] < 9 and 3 < result["step"] < 1000000
    assert result["lr"] < 3e-3, "the schedule follows the clock"
    again = train(tmp_path, "steps=1000000", "time_limit=1.5", "save_every=0", "num_workers=0")
    assert again["step"] == result["step"], "the time of earlier sessions counts"


def test_schedule() -> None:
    optim = OptimConfig(warmup_steps=4, min_lr_ratio=0.1)
    assert [lr_factor(optim, s, 0.0) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert lr_factor(optim, 99, 1.0) == pytest.approx(0.1) and lr_factor(optim, 99, 0.5) == pytest.approx(0.55)
    optim.schedule = "constant"
    assert lr_factor(optim, 99, 1.0) == 1.0


def test_what_a_run_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    seen: list[Tensor] = []

    def sample(model: Any, step: int, folder: Path) -> None:
        assert not model.training and not torch.is_grad_enabled()
        seen.append(model[0].weight.clone())
        torch.randn(3)  # must not disturb the run
        (folder / f"{step:08d}.png").write_bytes(b"")

    def save(model: Any, folder: Path) -> None:
        torch.save(model.state_dict(), folder / "weights.pt")

    model = network()
    train(
        tmp_path,
        "sample_every=5",
        "save_every=4",
        "keep_checkpoints=1",
        model=model,
        write_samples=sample,
        save_model=save,
    )
    assert [p.name for p in sorted((tmp_path / "samples").iterdir())] == [f"{s:08d}.png" for s in (5, 10, 12)]
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000012.pt"]
    state = load_checkpoint(tmp_path)
    assert state is not None and torch.equal(seen[-1], state["ema"]["average"]["0.weight"])
    assert torch.equal(model[0].weight, state["model"]["0.weight"]) and not torch.equal(seen[-1], model[0].weight)
    assert torch.equal(torch.load(tmp_path / "model" / "weights.pt")["0.weight"], seen[-1])
    assert load_json(tmp_path / "config.json")["optim"]["lr"] == 1e-2
    assert list((tmp_path / "tensorboard").iterdir())
    names = {"config.json", "metrics.jsonl", "tensorboard", "samples", "model", "checkpoints"}
    assert {p.name for p in tmp_path.iterdir()} == names
    bar = capsys.readouterr().err
    assert "12/12" in bar and "tokens/s" in bar and "left" in bar and "loss" in bar


def test_lines_without_a_terminal(straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, "steps=2")
    out = capsys.readouterr().out
    assert "a fresh run" in out and "step 2/2  loss" in out and "tokens/s" in out and "left" in out
    train(tmp_path, "steps=3", "optim.lr=0.5")
    out = capsys.readouterr().out
    assert "changed since the run began: optim.lr: 0.01 -> 0.5" in out
    assert losses(tmp_path)[-1][-1] == pytest.approx(0.5 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 2 / 3))))


def test_ema_closed_form() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema, expected = EMA(model, 0.3), 0.0
    for n in range(8):
        nn.init.constant_(model.weight, n + 1.0)
        ema.update()
        decay = min(0.3, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * (n + 1.0)
    with ema.average_parameters():
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 8.0


def test_weight_decay_spares_vectors_norms_and_tied_embeddings() -> None:
    model = nn.Module()
    model.table, model.norm, model.linear = nn.Embedding(5, 4), nn.LayerNorm((2, 4)), nn.Linear(4, 4)
    model.head = nn.Linear(4, 5, bias=False)
    model.head.weight = model.table.weight
    decay, none = adamw(model, OptimConfig()).param_groups
    assert [id(p) for p in decay["params"]] == [id(model.linear.weight)] and decay["weight_decay"] > 0
    assert len(none["params"]) == 4 and none["weight_decay"] == 0


@pytest.mark.parametrize("length", [1, 2, 3, 17, 64, 1000])
def test_permuted_is_a_permutation(length: int) -> None:
    orders = [[feistel_permutation(i, length, seed) for i in range(length)] for seed in range(2)]
    assert all(sorted(order) == list(range(length)) for order in orders)
    if length > 16:
        assert orders[0] != orders[1] != list(range(length))


# ---------------------------------------------------------------- what goes wrong


def one_line(error: pytest.ExceptionInfo[ValueError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, "steps=6")
    with monkeypatch.context() as patch:

        def full(*_: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(checkpoint._HashingWriter, "write", full)
        with pytest.raises(ValueError) as error:
            train(tmp_path)
    assert "No space left on device; the last good checkpoint is" in one_line(error)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000006.pt"]
    assert train(tmp_path)["step"] == 12


def test_a_full_disk_keeps_the_last_model(tmp_path: Path) -> None:
    def save(model: nn.Module, folder: Path) -> None:
        (folder / "weights").write_text("whole")

    def full(model: nn.Module, folder: Path) -> None:
        (folder / "weights").write_text("ha")
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    train(tmp_path, "steps=2", save_model=save)
    with pytest.raises(ValueError) as error:
        train(tmp_path, "steps=3", save_model=full)
    assert f"cannot write {tmp_path / 'model'}: No space left on device; what was saved before" in one_line(error)
    assert (tmp_path / "model" / "weights").read_text() == "whole" and not (tmp_path / "model.tmp").exists()


@pytest.mark.parametrize("part", ["metrics", "samples", "tensorboard"])
def test_a_full_disk_anywhere_is_one_line(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    train(tmp_path, "steps=2")
    if part == "metrics":
        monkeypatch.setattr("unigen.training.logs._truncate_after", full)
    elif part == "tensorboard":
        monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    with pytest.raises(ValueError, match=f"files of the run {tmp_path}: No space left on device; free some") as error:
        train(tmp_path, "steps=4", "num_workers=0", write_samples=full)
    one_line(error)
    monkeypatch.undo()
    assert train(tmp_path, "steps=4", "num_workers=0")["step"] == 4


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "text"])
def test_a_damaged_checkpoint_is_one_clear_line(damage: str, tmp_path: Path) -> None:
    train(tmp_path, "steps=4", "save_every=2")
    newest = list_checkpoints(tmp_path)[-1]
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes({"flipped": bytes(data), "cut": bytes(data[:-100]), "empty": b"", "text": b"hello" * 20}[damage])
    with pytest.raises(ValueError) as error:
        train(tmp_path, "steps=4")
    assert "damaged" in one_line(error) and newest.name in str(error.value) and "step-00000002" in str(error.value)
    newest.unlink()
    assert train(tmp_path, "steps=4")["step"] == 4


class Interrupted(BaseException):
    """As a kill would: no handler of ours takes it."""


def test_a_finished_run_that_was_killed_before_its_model_writes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = False

    def save(model: Any, folder: Path) -> None:
        if killed:
            raise Interrupted
        torch.save(model.state_dict(), folder / "weights.pt")

    train(tmp_path, "steps=2", save_model=save)
    old = torch.load(tmp_path / "model" / "weights.pt")["0.weight"]
    killed = True
    with pytest.raises(Interrupted):
        train(tmp_path, "steps=4", save_model=save)
    assert torch.equal(torch.load(tmp_path / "model" / "weights.pt")["0.weight"], old)
    killed = False
    assert train(tmp_path, "steps=4", save_model=save)["finished"]
    state = load_checkpoint(tmp_path)
    assert state is not None and state["step"] == 4
    found = torch.load(tmp_path / "model" / "weights.pt")["0.weight"]
    assert torch.equal(found, state["ema"]["average"]["0.weight"]) and not torch.equal(found, old)
    assert "wrote the model of step 4" in capsys.readouterr().out
    train(tmp_path, "steps=4", save_model=save)
    assert "wrote the model" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "model")  # killed between two renames, by a system that cannot exchange folders
    train(tmp_path, "steps=4", save_model=save)
    assert torch.equal(torch.load(tmp_path / "model" / "weights.pt")["0.weight"], found)


def test_what_a_kill_left_is_gone_at_the_next_start(tmp_path: Path) -> None:
    train(tmp_path, "steps=2")
    (tmp_path / "samples").mkdir()
    names = {p.name for p in tmp_path.rglob("*")}
    for folder in (".model.ab12cd_9.scratch", ".model.old77", "model.tmp", "samples/.unigen-ab12cd_9"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "weights").write_text("half")
    for file in ("checkpoints/step-00000003.tmp", "metrics.tmp", ".config.json.abcd.tmp"):
        (tmp_path / file).write_text("half")
    train(tmp_path, "steps=2")
    events = {name for name in (p.name for p in tmp_path.rglob("*")) if not name.startswith("events.")}
    assert events == {name for name in names if not name.startswith("events.")} | {"model", "weights"}, (
        "the older model came back, the rest is gone"
    )


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    train(tmp_path, "steps=2")
    before = losses(tmp_path)
    ready, tell = os.pipe()
    other = os.fork()
    if other == 0:
        with lock_run(tmp_path):
            os.write(tell, b"locked")
            time.sleep(600)
    try:
        os.read(ready, 6)
        with pytest.raises(ValueError, match=f"is in use by process {other} on ") as error:
            train(tmp_path, "steps=4")
        one_line(error)
        assert losses(tmp_path) == before
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
    assert train(tmp_path, "steps=4")["step"] == 4, "a killed run does not keep its folder"
    assert not (tmp_path / ".running").exists()


def test_damaged_files_beside_a_whole_checkpoint(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted(tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([*lines[:3], b'{"step": 2, "note": "caf\xe9"}\n', *lines[3:]]))
    for damage in (b"{\xff\xfe", b"[1, 2]", b""):
        (tmp_path / "config.json").write_bytes(damage)
        capsys.readouterr()
        with pytest.raises(RuntimeError, match="the power went out"):
            train(tmp_path, objective=DenoisingObjective(6, crash))
        out = capsys.readouterr().out
        assert f"{tmp_path / 'config.json'}" in out and "resuming at step 6" in out
        assert load_json(tmp_path / "config.json")["steps"] == 12
    assert b"caf\xe9" in (tmp_path / "metrics.damaged.jsonl").read_bytes()
    train(tmp_path)
    assert same(straight, tmp_path)


def test_another_optimizer_is_called_so(tmp_path: Path) -> None:
    def plain_sgd(model: nn.Module, cfg: RunConfig) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=cfg.optim.lr)

    train(tmp_path, "steps=1")
    with pytest.raises(ValueError, match="holds a run by the optimizer AdamW, not SGD") as error:
        train(tmp_path, "steps=2", "keep_checkpoints=3", make_optimizer=plain_sgd)
    assert "keep_checkpoints: 2 -> 3" in one_line(error)
    state = load_checkpoint(tmp_path)
    assert state is not None
    del state["optimizer_names"]  # as earlier versions wrote it
    checkpoint.save_checkpoint(tmp_path, state, 1)
    with pytest.raises(ValueError, match="by another optimizer") as error:
        train(tmp_path, "steps=2", make_optimizer=lambda model, cfg: MuonAdamW(model, cfg.optim))
    one_line(error)


class Slow:
    """Rows of which one keeps its worker busy for minutes, deaf to all but a kill."""

    def __init__(self) -> None:
        self.parent = os.getpid()

    def __getitem__(self, i: int) -> Tensor:
        if i == 60 and os.getpid() != self.parent:
            end = time.monotonic() + 100
            while time.monotonic() < end:
                time.sleep(1)
        return torch.zeros(6) + i


def test_a_fault_ends_the_workers_at_once(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="the power went out"):
        train(tmp_path, "num_workers=2", dataset=Slow(), objective=DenoisingObjective(2, crash))
    assert time.monotonic() - began < 30
    assert not multiprocessing.active_children()


class Deadly:
    """Rows of which one kills its worker, as a system does that is short of memory."""

    def __init__(self) -> None:
        self.parent = os.getpid()

    def __getitem__(self, i: int) -> Tensor:
        if i == 20 and os.getpid() != self.parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(6) + i


def test_a_worker_that_is_killed_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a process that loads data was killed, .* fewer num_workers") as error:
        train(tmp_path, "num_workers=2", dataset=Deadly())
    one_line(error)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("variable", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_what_the_trainer_cannot_do_is_refused(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    with pytest.raises(ValueError, match="data parallel") as error:
        train(tmp_path)
    one_line(error)
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "false")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match="accumulation_steps=N"):
        train(tmp_path)


def test_a_run_of_another_model_is_not_overwritten(tmp_path: Path) -> None:
    train(tmp_path, "steps=1")
    with pytest.raises(ValueError, match="holds a run of another model") as error:
        train(tmp_path, "steps=2", model=plain())
    one_line(error)


def test_a_loss_that_is_not_finite_does_not_reach_a_checkpoint(tmp_path: Path) -> None:
    class Broken(DenoisingObjective):
        def __call__(self, *args: Any) -> dict[str, tuple[Tensor, Tensor | int]]:
            result = super().__call__(*args)
            return result | {"all": (result["all"][0] * math.inf, 1)} if self.step >= 4 else result

    with pytest.raises(ValueError, match="not finite at step 6") as error:
        train(tmp_path, "save_every=3", "log_every=100", objective=Broken())
    one_line(error)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000003.pt"]


class Failing:
    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def __getitem__(self, i: int) -> Tensor:
        if i == 13:
            raise self.error("no emoji font is installed")
        return torch.zeros(6)


class Unpicklable(Exception):
    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message, lambda: code)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failure_in_a_worker_is_told(workers: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        train(tmp_path, f"num_workers={workers}", dataset=Failing(ValueError))
    assert one_line(error) == "no emoji font is installed (item 13 of the dataset)"
    for kind in (KeyError, Unpicklable):
        with pytest.raises(RuntimeError, match="item 13 of the dataset failed") as fault:
            train(tmp_path, f"num_workers={workers}", dataset=Failing(kind))
        assert "in __getitem__" in str(fault.value), "our own faults come with their traceback"


RECIPE = """
from dataclasses import dataclass
from torch import nn
import torch
from unigen.training import RunConfig, TrainSpec

@dataclass
class Config(RunConfig):
    width: int = 4

def config():
    return Config(steps=2, batch_size=2, num_workers=0)

def objective(model, batch, rng):
    return {"loss": (model(batch).square().sum(), batch.numel())}

def build(cfg):
    return TrainSpec(nn.Linear(cfg.width, 1), torch.ones(8, cfg.width), None, objective)
"""


def test_run_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "tiny.py"
    recipe.write_text(RECIPE)
    first = run_recipe(str(recipe), ["width=3", f"run_dir={tmp_path / 'a'}"])
    second = run_recipe(str(recipe), ["width=3", f"run_dir={tmp_path / 'b'}"])
    assert first["step"] == 2 and first["loss"] == second["loss"], "first weights follow the seed"
    assert load_json(tmp_path / "a" / "config.json")["width"] == 3
    assert "a fresh run" in capsys.readouterr().out
    for path, overrides, message in [
        (tmp_path / "none.py", [], "no recipe at"),
        (recipe, ["widht=3"], "did you mean width"),
        (recipe, ["width=x"], "width expects int"),
    ]:
        with pytest.raises(ValueError, match=message):
            run_recipe(str(path), overrides)
    recipe.write_text("def config(): ...")
    with pytest.raises(ValueError, match="no function build"):
        run_recipe(str(recipe))
    recipe.write_text("def config(:")
    with pytest.raises(ValueError, match="not valid Python"):
        run_recipe(str(recipe))


INPUTS = """
import torch, unigen.nowhere
INPUTS = {"codes": "make codes", "words": "make words"}

@dataclass
class Config(RunConfig):
    codes: str = "runs/nowhere/codes"
    words: str | None = None
"""


def test_missing_inputs_are_told_before_anything_is_imported(tmp_path: Path) -> None:
    recipe, there = tmp_path / "recipe.py", str(tmp_path)
    recipe.write_text(INPUTS)
    for overrides, missing in (
        ([], "codes=runs/nowhere/codes is not there: make it by `make codes`"),
        ([f"codes={there}", f"words={there},nowhere"], "words=nowhere is not there: make it by `make words`"),
        (["init_from=model", "words=nowhere"], "words=nowhere"),
    ):
        with pytest.raises(ValueError) as error:
            run_recipe(str(recipe), overrides)
        assert missing in one_line(error)
    for overrides in ([f"codes={there}"], ["init_from=model"], ["codes=none"]):
        with pytest.raises(ModuleNotFoundError, match="unigen.nowhere"):
            run_recipe(str(recipe), overrides)


@pytest.mark.parametrize(
    "inputs",
    [
        "INPUTS = dict(codes=COMMAND)",
        "INPUTS: dict[str, str] = {'codes': f'make {codes}'}",
        "INPUTS = ['codes']",
        "INPUTS = {'codes': None}",
        "INPUTS = {[]: 'make codes'}",
    ],
)
def test_inputs_that_are_no_plain_table(inputs: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.py").write_text(f"{inputs}\nimport unigen.nowhere")
    with pytest.raises(ValueError, match="recipe.py, in line 1, must be a dict of plain texts") as error:
        run_recipe(str(tmp_path / "recipe.py"))
    assert one_line(error).startswith("INPUTS of the recipe ")


@pytest.mark.parametrize("name", ["tiny", "digits", "flow_networks"])
def test_recipes_name_the_command_that_makes_their_inputs(name: str, root: Path, tmp_path: Path) -> None:
    code = f"""if True:
        import sys
        from unigen.commands.main import main
        code = main(["train", {str(root / "recipes" / f"{name}.py")!r}])
        assert "torch" not in sys.modules, "it is told before anything heavy is imported"
        sys.exit(code)"""
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2 and "/model is not there: make it by `unigen train recipes/tiny_vq.py" in done.stderr
