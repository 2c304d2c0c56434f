"""The Trainer: steps an optimizer over a dataset until the clock or the step count says stop; saves, samples, logs, resumes.

It refuses to know any loss, model or data format: an Objective returns sums and counts, a recipe's Job supplies the rest.
Every random draw is a function of (seed, position): items are seeded by their place in the stream and forward passes by
(seed, step, slot), so that nothing random has to be saved, any number of workers gives the same run, and a resumed run equals
an uninterrupted one bit for bit.

    Trainer(cfg, job).run()                                 torchrun --nproc_per_node 2 -m unigen train recipes/tiny.py
"""

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unigen.config import OptimConfig, RunConfig, apply_overrides, load_json, save_json, to_dict
from unigen.training.checkpoint import Ema, cpu_tree, load_checkpoint, replace_folder, save_checkpoint

Objective = Callable[[nn.Module, Any, torch.Generator], dict[str, tuple[Tensor, Tensor | int]]]
"""(model, batch, rng) -> {name: (sum, count)}; the loss is the sum over names of sum / count, times `objective.weights[name]`
where the objective has weights. "metric/..." names are logged only. `rng` is on the CPU. Optional: `counts(batch, rng)` ->
{name: count} without running the model, which saves a forward pass when accumulate > 1; an int attribute `step`, set before
every step. An objective that is an nn.Module is moved to the device."""


@dataclass
class Job:
    """What a recipe builds. `dataset` is map-style, a pure function of the index; without `__len__` it is endless and in order.

    `sample(model, step, folder)` writes pictures, `save(model, folder)` the usable artefact: both get the averaged weights in
    eval mode. `optimizer(model, cfg)` replaces AdamW. `objectives`, where given, replaces `objective`: pairs stepped in turn on
    the same batch, each with the parameters it may change (or its own optimizer over them), e.g. a generator and a critic.
    """

    model: nn.Module
    dataset: Any
    collate: Callable[[list[Any]], Any] | None = None
    objective: Objective | None = None
    sample: Callable[[nn.Module, int, Path], None] | None = None
    save: Callable[[nn.Module, Path], None] | None = None
    optimizer: Callable[[nn.Module, Any], torch.optim.Optimizer] | None = None
    objectives: Sequence[tuple[Objective, Iterable[nn.Parameter] | torch.optim.Optimizer]] = ()


def run_recipe(path: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Load the recipe file at `path`, apply `key=value` overrides strictly, build and train. Returns the final metrics."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"no recipe at {path}: give the path of a Python file with config() and build(cfg)")
    name = f"unigen_recipe_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that the recipe's dataclasses and classes resolve, also in workers
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ValueError(f"the recipe {path} is not valid Python: {error}") from error
    for needed in ("config", "build"):
        if not callable(getattr(module, needed, None)):
            raise ValueError(f"the recipe {path} has no function {needed}(); it needs config() and build(cfg)")
    cfg = apply_overrides(module.config(), overrides)
    return Trainer(cfg, module.build(cfg)).run()


# ---------------------------------------------------------------- pure parts


def lr_scale(optim: OptimConfig, step: int, progress: float) -> float:
    """The factor on lr at `step` (0-based): a linear warm-up times a decay over `progress` in [0, 1] from 1 to min_ratio."""
    warm = min(1.0, (step + 1) / optim.warmup) if optim.warmup else 1.0
    progress = min(max(progress, 0.0), 1.0)
    if optim.schedule == "constant":
        return warm
    left = 1 - progress if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return warm * (optim.min_ratio + (1 - optim.min_ratio) * left)


def adamw(model: nn.Module, optim: OptimConfig, parameters: Iterable[nn.Parameter] | None = None) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only: not on embeddings, norms, biases or other vectors."""
    wanted = {id(p) for p in (model.parameters() if parameters is None else parameters) if p.requires_grad}
    decay: dict[int, nn.Parameter] = {}
    plain: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            if id(p) in wanted:
                vector = p.ndim < 2 or isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower()
                (plain if vector else decay)[id(p)] = p
    for shared in plain.keys() & decay.keys():  # tied weights count as embeddings
        del decay[shared]
    assert wanted == plain.keys() | decay.keys(), "an objective's parameters must belong to the model"
    groups = [
        {"params": list(decay.values()), "weight_decay": optim.weight_decay},
        {"params": list(plain.values()), "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def mix(*keys: int) -> int:
    """63 well-mixed bits from integers (splitmix64's finalizer, folded over the keys)."""
    state = 0
    for key in keys:
        state = (state + key + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def permuted(index: int, length: int, seed: int) -> int:
    """Where `index` goes in a seeded permutation of range(length): six Feistel rounds, walked until inside; no memory."""
    half = max((length - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(6):
            left, right = right, left ^ (mix(seed, turn, right) & mask)
        index = left << half | right
        if index < length:
            return index


def seed_all(seed: int) -> None:
    """Seed python, numpy and torch (every device), so that what follows is a function of `seed`."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on `device`, through dicts, lists, tuples, dataclasses and whatever has `.to`."""
    if hasattr(batch, "to"):
        return batch.to(device, non_blocking=True) if isinstance(batch, Tensor) else batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        moved = {f.name: to_device(getattr(batch, f.name), device) for f in dataclasses.fields(batch) if f.init}
        return dataclasses.replace(batch, **moved)
    return batch


# ---------------------------------------------------------------- data


@dataclass
class _Failed:
    """An exception on its way out of a worker. A ValueError is the user's to mend: its line; else our fault: its traceback."""

    error: Exception
    index: int
    text: str

    def throw(self) -> None:
        where = f"item {self.index} of the dataset" if self.index >= 0 else "putting a batch together"
        if isinstance(self.error, ValueError):
            raise ValueError(f"{self.error} ({where})")
        raise RuntimeError(f"{where} failed:\n{self.text}")


class _Stream(torch.utils.data.Dataset[Any]):
    """The dataset as an endless stream: position -> item, shuffled anew each epoch, everything seeded by the position."""

    def __init__(self, dataset: Any, cfg: RunConfig) -> None:
        self.dataset, self.seed = dataset, cfg.seed
        self.length = len(dataset) if hasattr(dataset, "__len__") else None
        self.shuffle = cfg.shuffle and self.length is not None
        if self.length == 0:
            raise ValueError("the dataset is empty")

    def __getitem__(self, position: int) -> Any:
        index = position
        if self.length is not None:
            epoch, index = divmod(position, self.length)
            if self.shuffle:
                index = permuted(index, self.length, mix(self.seed, epoch))
        seed_all(mix(self.seed, position, 1))  # for datasets that draw from the global generators
        try:
            return self.dataset[index]
        except Exception as error:
            return _Failed(error, index, traceback.format_exc())


@dataclass
class _Collate:
    """The job's collate, passing a failed item on."""

    collate: Callable[[list[Any]], Any]

    def __call__(self, items: list[Any]) -> Any:
        failed = next((item for item in items if isinstance(item, _Failed)), None)
        if failed is None:
            try:
                return self.collate(items)
            except Exception as error:
                failed = _Failed(error, -1, traceback.format_exc())
        try:  # an exception that cannot be pickled would hang the worker
            import pickle

            pickle.loads(pickle.dumps(failed.error))
        except Exception:
            failed = _Failed(RuntimeError(str(failed.error)), failed.index, failed.text)
        return failed


def _worker_signals(_: int) -> None:
    """Ctrl-C reaches every process of the terminal: the trainer decides, its workers go on until they are told."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Step(nn.Module):
    """Runs an objective inside one forward call, which is what DDP and autocast wrap."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, objective: Objective, batch: Any, rng: torch.Generator) -> dict[str, tuple[Tensor, Tensor | int]]:
        return objective(self.model, batch, rng)


# ---------------------------------------------------------------- the trainer


class Trainer:
    """`Trainer(cfg, job).run()` trains, resuming where `cfg.run_dir` holds a run, and returns the final metrics.

    In run_dir: config.json (resolved), metrics.jsonl, tensorboard/, checkpoints/, samples/, model/ (what job.save wrote).
    SIGTERM and SIGINT end the run after the current step with a checkpoint.
    """

    def __init__(self, cfg: RunConfig, job: Job) -> None:
        try:
            from accelerate import Accelerator, DistributedDataParallelKwargs
        except ImportError as error:
            raise ValueError('training needs the train extra: pip install "unigen[train]"') from error
        self.cfg, self.job, self.run_dir = cfg, job, Path(cfg.run_dir)
        self.accelerator = Accelerator(
            mixed_precision="bf16" if cfg.precision == "bf16" else "no",
            cpu=not torch.cuda.is_available(),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process
        self.device = self.accelerator.device
        self.step = 0  # steps done
        self.rows = 0  # rows of the stream consumed by all processes
        self.elapsed = 0.0  # seconds of training in earlier sessions
        self.signal: int | None = None
        self.model = job.model.to(self.device)
        self.players = self._make_players()
        self.ema = Ema(self.model, cfg.ema) if cfg.ema else None

    def _make_players(self) -> list[tuple[Objective, torch.optim.Optimizer, list[nn.Parameter]]]:
        """(objective, optimizer, the parameters it may change) for each player."""
        pairs: Sequence[tuple[Objective, Any]]
        if self.job.objectives:
            pairs = self.job.objectives
        else:
            assert self.job.objective is not None, "a Job needs an objective"
            build = self.job.optimizer
            pairs = [(self.job.objective, build(self.model, self.cfg) if build else list(self.model.parameters()))]
        players = []
        for objective, owned in pairs:
            if isinstance(objective, nn.Module):
                objective.to(self.device)
            optimizer = owned if isinstance(owned, torch.optim.Optimizer) else adamw(self.model, self.cfg.optim, owned)
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
            players.append((objective, optimizer, [p for g in optimizer.param_groups for p in g["params"]]))
        return players

    # ------------------------------------------------ the loop

    def run(self) -> dict[str, Any]:
        self._resume()
        self._forward = self.accelerator.prepare(_Step(self.model))
        self.model.train()
        start, started_at = self.step, time.monotonic()
        logs = _Logs(self) if self.main else None
        totals = _Totals()
        last: dict[str, Any] = {}

        def elapsed() -> float:
            return self.elapsed + time.monotonic() - started_at

        with self._signals(), logs or nullcontext():
            batches = self._batches()
            while True:
                seconds, stop = self._agree(elapsed())
                progress = self._progress(seconds)
                ended = progress >= 1 or stop
                due = self.step > start
                if due and (ended or self.step % self.cfg.log_every == 0):
                    last = totals.mean(self.accelerator) | {"lr": self._lr(), "seconds": seconds}
                    if logs:
                        logs.write(self.step, last, progress, seconds)
                    bad = [name for name in last if not math.isfinite(last[name])]
                    if bad:
                        raise ValueError(
                            f"{', '.join(bad)} is not finite at step {self.step}: lower optim.lr, or use precision=fp32; "
                            "the last checkpoint is from before"
                        )
                if due and (ended or _every(self.cfg.save_every, self.step)):
                    self._save(seconds, totals)
                if due and (ended or _every(self.cfg.sample_every, self.step)) and not stop:
                    self._sample()
                if ended:
                    break
                self._train_step(batches, progress, totals)
                if logs:
                    logs.tick(progress)
            del batches
        if self.main:
            word = "stopped by a signal: the same command goes on" if stop else "finished"
            print(f"{self.run_dir}: {word} at step {self.step} after {_clock(elapsed())}", flush=True)
        return last | {"step": self.step, "rows": self.rows, "seconds": elapsed(), "finished": not stop}

    def _progress(self, seconds: float) -> float:
        """The share of the run that is done, in [0, 1], by steps or by the clock, whichever is further."""
        clock = seconds / self.cfg.time_limit if self.cfg.time_limit else 0.0
        return min(1.0, max(self.step / self.cfg.steps, clock))

    def _agree(self, seconds: float) -> tuple[float, bool]:
        """All processes go by the latest clock, and stop when any was told to."""
        stop = float(self.signal is not None)
        if self.world > 1:
            both = torch.tensor([seconds, stop], dtype=torch.float64, device=self.device)
            torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX)
            seconds, stop = both.tolist()
        return seconds, bool(stop)

    def _train_step(self, batches: Iterator[Any], progress: float, totals: "_Totals") -> None:
        cfg = self.cfg
        micro = [to_device(self._next(batches), self.device) for _ in range(cfg.accumulate)]
        scale = lr_scale(cfg.optim, self.step, progress)
        for player, (objective, optimizer, parameters) in enumerate(self.players):
            if hasattr(objective, "step"):
                objective.step = self.step
            with self._only(player):
                self._backward(player, objective, micro, totals)
            if cfg.optim.clip:
                norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.optim.clip)
                totals.add("metric/grad_norm" + (str(player) if player else ""), norm, 1, shared=True)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * scale
            optimizer.step()
            self.model.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update()
        self.step += 1
        self.rows += cfg.batch_size * cfg.accumulate * self.world

    def _backward(self, player: int, objective: Objective, micro: list[Any], totals: "_Totals") -> None:
        """Gradients of sum(sums) / sum(counts) over the step's micro-batches and processes, name by name."""
        counts = self._counts(player, objective, micro) if len(micro) > 1 else None
        weights: Mapping[str, float] = getattr(objective, "weights", {})
        for index, batch in enumerate(micro):
            quiet = index + 1 < len(micro)
            with self.accelerator.no_sync(self._forward) if quiet else nullcontext():
                rng = self._seed(player, index)
                result = self._forward(objective, batch, rng)
                if counts is None:
                    counts = self._sum_over_processes({name: count for name, (_, count) in result.items()})
                parts = [
                    total * (weights.get(name, 1.0) * self.world / counts[name].clamp(min=1e-12))  # DDP takes the mean
                    for name, (total, _) in result.items()
                    if not name.startswith("metric/")
                ]
                for name, (total, count) in result.items():
                    totals.add(name, total, count, weights.get(name, 1.0))
                self.accelerator.backward(torch.stack([part.float() for part in parts]).sum())

    def _counts(self, player: int, objective: Any, micro: list[Any]) -> dict[str, Tensor]:
        """The counts of the whole step, known before its first backward pass.

        Without `objective.counts` they come from a forward pass without gradients; the model's buffers are put back after it.
        """
        total: dict[str, Any] = {}
        buffers = [(b, b.clone()) for b in self.model.buffers()]
        for index, batch in enumerate(micro):
            rng = self._seed(player, index)
            if hasattr(objective, "counts"):
                counts = objective.counts(batch, rng)
            else:
                with torch.no_grad(), self.accelerator.autocast():
                    counts = {name: count for name, (_, count) in objective(self.model, batch, rng).items()}
            for name, count in counts.items():
                total[name] = total.get(name, 0) + count
        for buffer, value in buffers:
            buffer.copy_(value)
        return self._sum_over_processes(total)

    def _sum_over_processes(self, counts: Mapping[str, Tensor | int]) -> dict[str, Tensor]:
        flat = torch.stack([torch.as_tensor(c, device=self.device).detach().double() for c in counts.values()])
        if self.world > 1:
            torch.distributed.all_reduce(flat)
        return dict(zip(counts, flat.float(), strict=True))

    def _seed(self, player: int, index: int) -> torch.Generator:
        """Seed the global generators and return the objective's own, by (seed, step, slot, player); slots number the
        micro-batches of all processes, so that 2 processes draw what one with accumulate=2 draws."""
        seed = mix(self.cfg.seed, self.step, index * self.world + self.rank, player, 2)
        seed_all(seed)
        return torch.Generator().manual_seed(mix(seed, 3))

    @contextmanager
    def _only(self, player: int) -> Iterator[None]:
        """Inside, only this player's parameters take gradients."""
        own = {id(p) for p in self.players[player][2]}
        others = [p for _, _, ps in self.players for p in ps if id(p) not in own and p.requires_grad]
        for p in others:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in others:
                p.requires_grad_(True)

    def _lr(self) -> float:
        return self.players[0][1].param_groups[0]["lr"]

    # ------------------------------------------------ data

    def _batches(self) -> Iterator[Any]:
        """This process's micro-batches, endless, from the saved position on."""
        size, span = self.cfg.batch_size, self.cfg.batch_size * self.world

        def positions() -> Iterator[range]:
            for first in itertools.count(self.rows + self.rank * size, span):
                yield range(first, first + size)

        loader = torch.utils.data.DataLoader(
            _Stream(self.job.dataset, self.cfg),
            batch_sampler=positions(),  # type: ignore[arg-type]
            collate_fn=_Collate(self.job.collate or torch.utils.data.default_collate),
            num_workers=self.cfg.workers,
            worker_init_fn=_worker_signals,
            pin_memory=self.device.type == "cuda",
            prefetch_factor=4 if self.cfg.workers else None,
        )
        return iter(loader)

    def _next(self, batches: Iterator[Any]) -> Any:
        batch = next(batches)
        if isinstance(batch, _Failed):
            batch.throw()
        return batch

    # ------------------------------------------------ saving

    def _save(self, seconds: float, totals: "_Totals") -> None:
        if self.main:
            totals.check(self.step)
            state = {
                "step": self.step,
                "rows": self.rows,
                "elapsed": seconds,
                "model": self.model.state_dict(),
                "optimizers": [optimizer.state_dict() for _, optimizer, _ in self.players],
                "ema": self.ema.state_dict() if self.ema else None,
            }
            save_checkpoint(self.run_dir, cpu_tree(state), self.cfg.keep)
            if self.job.save is not None:
                save = self.job.save
                with self._averaged():
                    replace_folder(self.run_dir / "model", lambda folder: save(self.model, folder))
        self.accelerator.wait_for_everyone()

    def _sample(self) -> None:
        if self.main and self.job.sample is not None:
            folder = self.run_dir / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            with self._averaged():
                self.job.sample(self.model, self.step, folder)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The model as it would be used: averaged weights, eval mode, no gradients."""
        self.model.eval()
        with self.ema.applied() if self.ema else nullcontext(), torch.no_grad():
            yield
        self.model.train()

    def _resume(self) -> None:
        """Take up the run that run_dir holds, or start one; says which."""
        state = load_checkpoint(self.run_dir)
        saved = load_json(self.run_dir / "config.json") if state and (self.run_dir / "config.json").exists() else {}
        if state is not None:
            try:
                self.model.load_state_dict(state["model"])
                for (_, optimizer, _), saved_optimizer in zip(self.players, state["optimizers"], strict=True):
                    optimizer.load_state_dict(saved_optimizer)
                    for group in optimizer.param_groups:
                        group["betas"] = tuple(group["betas"]) if "betas" in group else ()
                if self.ema and state["ema"]:
                    self.ema.load_state_dict(state["ema"])
                self.step, self.rows, self.elapsed = state["step"], state["rows"], state["elapsed"]
            except (KeyError, RuntimeError, ValueError) as error:
                reason = " ".join(str(error).split())[:300]
                raise ValueError(f"{self.run_dir} holds a run of another model ({reason}); choose another run_dir") from error
        if self.main:
            parameters = sum(p.numel() for p in self.model.parameters())
            verb = f"resuming at step {self.step}" if state else "a fresh run"
            print(
                f"{self.run_dir}: {verb}, {parameters / 1e6:.2f}M parameters, {self.world} x {self.device.type} "
                f"{self.cfg.precision}" + (f", from {self.cfg.init_from}" if self.cfg.init_from and not state else ""),
                flush=True,
            )
            for line in _changes(saved, to_dict(self.cfg)) if saved else ():
                print(f"  changed since the run began: {line}", flush=True)
            save_json(self.run_dir / "config.json", to_dict(self.cfg))

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT set a flag; a second one acts as usual."""
        old: dict[int, Any] = {}

        def handle(number: int, _: Any) -> None:
            self.signal = number
            for which, handler in old.items():
                signal.signal(which, handler)

        try:
            for which in (signal.SIGTERM, signal.SIGINT):
                old[which] = signal.signal(which, handle)
        except ValueError:  # not the main thread: signals are somebody else's
            pass
        try:
            yield
        finally:
            for which, handler in old.items():
                signal.signal(which, handler)


def _every(interval: int, step: int) -> bool:
    return bool(interval) and step % interval == 0


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in [*new, *(k for k in old if k not in new)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _changes(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key}: {before} -> {after}"


# ---------------------------------------------------------------- metrics


class _Totals:
    """Sums and counts since the last log line, kept on the device until they are asked for."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.weights: dict[str, float] = {}
        self.shared: set[str] = set()
        self.since = time.monotonic()

    def add(self, name: str, total: Tensor, count: Tensor | int, weight: float = 1.0, shared: bool = False) -> None:
        """`shared`: every process holds the same value."""
        total = torch.as_tensor(total).detach().double()
        count = torch.as_tensor(count, device=total.device).detach().double()
        self.sums[name] = self.sums.get(name, torch.zeros_like(total)) + total
        self.counts[name] = self.counts.get(name, torch.zeros_like(count)) + count
        self.weights[name] = weight

    def check(self, step: int) -> None:
        """A checkpoint with broken weights must not replace a good one."""
        bad = [name for name, total in self.sums.items() if not bool(torch.isfinite(total))]
        if bad:
            raise ValueError(f"{', '.join(bad)} is not finite at step {step}: lower optim.lr, or use precision=fp32")

    def mean(self, accelerator: Any) -> dict[str, float]:
        """{"loss", each name, "tokens/s" or nothing}: sums over counts of all processes since the last call."""
        names = sorted(self.sums)
        device = accelerator.device
        both = torch.stack([torch.stack([self.sums[n].to(device), self.counts[n].to(device)]) for n in names])
        if accelerator.num_processes > 1:
            torch.distributed.all_reduce(both)
        rows = dict(zip(names, both.tolist(), strict=True))
        seconds = max(time.monotonic() - self.since, 1e-9)
        means = {n.removeprefix("metric/"): total / max(count, 1e-12) for n, (total, count) in rows.items()}
        loss = sum(self.weights[n] * means[n] for n in names if not n.startswith("metric/"))
        if "metric/tokens" in rows:
            means["tokens/s"] = rows["metric/tokens"][0] / seconds
        self._clear()
        return {"loss": loss} | means


class _Logs:
    """Progress bar (or plain lines where there is no terminal), metrics.jsonl and tensorboard."""

    def __init__(self, trainer: Trainer) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.trainer = trainer
        cfg, run_dir, step = trainer.cfg, trainer.run_dir, trainer.step
        self.start_progress = trainer._progress(trainer.elapsed)
        self.path = run_dir / "metrics.jsonl"
        self._drop_after(step)
        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)
        self.file = open(self.path, "a", encoding="utf-8")
        self.bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=cfg.steps, initial=step, dynamic_ncols=True, unit="step")
        self.last = (step, trainer.elapsed)

    def _drop_after(self, step: int) -> None:
        """Forget the lines of steps that are about to be done again."""
        if self.path.exists():
            lines = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _line_step(line) <= step]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
            os.replace(temporary, self.path)

    def tick(self, progress: float) -> None:
        if self.bar is not None:
            self.bar.update(1)

    def write(self, step: int, metrics: dict[str, Any], progress: float, seconds: float) -> None:
        cfg = self.trainer.cfg
        steps, passed = step - self.last[0], max(seconds - self.last[1], 1e-9)
        metrics["rows/s"] = steps * cfg.batch_size * cfg.accumulate * self.trainer.world / passed
        self.last = (step, seconds)
        left = _clock((seconds - self.trainer.elapsed) * (1 - progress) / max(progress - self.start_progress, 1e-9))
        speed = f"{metrics['tokens/s']:.0f} tokens/s" if "tokens/s" in metrics else f"{metrics['rows/s']:.1f} rows/s"
        self.file.write(json.dumps({"step": step} | {k: v if math.isfinite(v) else None for k, v in metrics.items()}) + "\n")
        self.file.flush()
        for name, value in metrics.items():
            self.board.add_scalar(name, value, step)
        self.board.flush()
        others = [k for k in metrics if k not in ("loss", "lr", "seconds", "tokens", "tokens/s", "rows/s", "grad_norm")]
        detail = " ".join(f"{name} {metrics[name]:.4g}" for name in others) if len(others) > 1 else ""
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {metrics['loss']:.4f}, {speed}, {left} left")
        else:
            text = f"step {step}/{cfg.steps}  loss {metrics['loss']:.4f}  lr {metrics['lr']:.2e}  {speed}  {left} left  {detail}"
            print(text.rstrip(), flush=True)

    def __enter__(self) -> "_Logs":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.close()
        self.file.close()
        self.board.close()


def _line_step(line: str) -> float:
    """The step of a line of metrics.jsonl; endless for a line cut short by a kill."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
