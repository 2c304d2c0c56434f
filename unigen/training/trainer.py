"""The Trainer: steps an optimizer over a stream of rows; saves, samples, logs, stops, resumes.

It does not depend on any loss, model or data format: an Objective returns sums and counts, a recipe's Job supplies the
rest. Every random draw is a function of (seed, position): items are seeded by their place in the stream and forward
passes by (seed, step, slot), so that nothing random has to be saved, any number of workers gives the same run, and a
resumed run equals an uninterrupted one bit for bit.

    Trainer(cfg, job).run()                                 torchrun --nproc_per_node 2 -m unigen train recipes/tiny.py
"""

import dataclasses
import math
import os
import signal
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unigen.config import OptimConfig, RunConfig, load_json, save_json, to_dict
from unigen.training.checkpoint import (
    TEMP_PREFIX,
    Ema,
    has_model_of_step,
    has_samples_of_step,
    list_checkpoints,
    load_checkpoint,
    lock_run,
    record_samples,
    save_checkpoint,
    save_model,
    tree_to_cpu,
)
from unigen.training.launcher import check_launcher, check_precision, launch_info
from unigen.training.logs import MetricAccumulator, TrainLogger, compute_means, format_duration
from unigen.training.peers import watch_peers
from unigen.training.stream import BatchIterator, WorkerError, hash_seed, load, seed_all
from unigen.utils.disk import disk_errors
from unigen.utils.extras import require_extra
from unigen.utils.precision import train_precision

Objective = Callable[[nn.Module, Any, torch.Generator], dict[str, tuple[Tensor, Tensor | int]]]
"""(model, batch, rng) -> {name: (sum, count)}; the loss is the sum over names of sum / count, times
`objective.weights[name]` where the objective has weights. "metric/..." names are logged only; "metric/tokens" gives
tokens/s. `rng` is on the CPU. Optional: `counts(batch, rng)` -> {name: count} without running the model, which saves a
forward pass when accumulate > 1; an int attribute `step`, set before every step. An objective that is an nn.Module is
moved to the device."""


@dataclass
class TrainSpec:
    """What a recipe builds. `dataset` is map-style, a pure function of the index; without `__len__` it is endless and
    in order.

    `sample(model, step, folder)` writes pictures, `save(model, folder)` the usable artefact: both get the averaged
    weights in eval mode. `optimizer(model, cfg)` replaces AdamW. `objectives`, where given, replaces `objective`:
    pairs stepped in turn on the same batch, each with the parameters of the model it may change (or its own optimizer
    over them), e.g. a generator and a critic."""

    model: nn.Module
    dataset: Any
    collate: Callable[[list[Any]], Any] | None = None
    objective: Objective | None = None
    sample: Callable[[nn.Module, int, Path], None] | None = None
    save: Callable[[nn.Module, Path], None] | None = None
    optimizer: Callable[[nn.Module, Any], torch.optim.Optimizer] | None = None
    objectives: Sequence[tuple[Objective, Iterable[nn.Parameter] | torch.optim.Optimizer]] = ()


# ---------------------------------------------------------------- pure parts


def lr_factor(optim: OptimConfig, step: int, progress: float) -> float:
    """The factor on lr at `step` (0-based): a linear warm-up times a decay over `progress` in [0, 1] from 1 to
    min_ratio."""
    warm = min(1.0, (step + 1) / optim.warmup) if optim.warmup else 1.0
    progress = min(max(progress, 0.0), 1.0)
    if optim.schedule == "constant":
        return warm
    decay = 1 - progress if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return warm * (optim.min_ratio + (1 - optim.min_ratio) * decay)


def adamw(
    model: nn.Module, optim: OptimConfig, parameters: Iterable[nn.Parameter] | None = None
) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only: not on embeddings, norms, biases or other vectors."""
    trainable_ids = {id(p) for p in (model.parameters() if parameters is None else parameters) if p.requires_grad}
    decay: dict[int, nn.Parameter] = {}
    no_decay: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            if id(p) in trainable_ids:
                vector = p.ndim < 2 or isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower()
                (no_decay if vector else decay)[id(p)] = p
    for shared in no_decay.keys() & decay.keys():  # tied weights count as embeddings
        del decay[shared]
    assert trainable_ids == no_decay.keys() | decay.keys(), "an objective's parameters must belong to the model"
    groups = [
        {"params": list(decay.values()), "weight_decay": optim.weight_decay},
        {"params": list(no_decay.values()), "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True
    )


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
        fields = {f.name: to_device(getattr(batch, f.name), device) for f in dataclasses.fields(batch) if f.init}
        return dataclasses.replace(batch, **fields)
    return batch


class _ObjectiveModule(nn.Module):
    """Runs an objective inside one forward call, which is what DDP and autocast wrap."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, objective: Objective, batch: Any, rng: torch.Generator) -> dict[str, tuple[Tensor, Tensor | int]]:
        return objective(self.model, batch, rng)


# ---------------------------------------------------------------- the trainer


class Trainer:
    """`Trainer(cfg, job).run()` trains, resuming where `cfg.run_dir` holds a run, and returns the final metrics.

    In run_dir: config.json (resolved), metrics.jsonl, tensorboard/, checkpoints/, samples/, model/ (what job.save
    wrote). SIGTERM and SIGINT end the run after the current step with a checkpoint; a second Ctrl-C ends it at once."""

    def __init__(self, cfg: RunConfig, job: TrainSpec) -> None:
        check_launcher()
        require_extra("train", "accelerate", "tensorboard")
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.state import AcceleratorState

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.cfg = dataclasses.replace(cfg, precision=train_precision(cfg.precision, device))
        check_precision(self.cfg.precision)
        self.precision = self.cfg.precision + (" (precision=auto)" if cfg.precision == "auto" else "")
        self.job, self.run_dir = job, Path(cfg.run_dir)
        AcceleratorState._reset_state()  # another Trainer of this process may have had another precision
        self.accelerator = Accelerator(
            mixed_precision="bf16" if self.cfg.precision == "bf16" else "no",
            cpu=not torch.cuda.is_available(),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        if self.accelerator.distributed_type.value not in ("NO", "MULTI_CPU", "MULTI_GPU"):
            raise ValueError(
                f"the Trainer runs in one process or data parallel (torchrun), not {self.accelerator.distributed_type}"
            )
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        if (launched := launch_info().world) != self.world:
            raise ValueError(
                f"{launched} processes were launched, which would not train together: launch by torchrun"
                if launched > self.world
                else f"the launcher says that this process is one of {launched}, and torch that it is one of "
                f"{self.world}: launch by torchrun, which tells both the same"
            )
        self.main = self.accelerator.is_main_process
        self.device = self.accelerator.device
        self.step = 0  # steps done
        self.rows = 0  # rows of the stream read by all processes
        self.elapsed = 0.0  # seconds of training, earlier sessions included
        self._samples_per_step = cfg.batch_size * cfg.accumulate * self.world
        self.signal: int | None = None
        self.totals = MetricAccumulator(self.device)  # since the last log line,
        self.logged = 0, 0.0  # which was at this step and time
        self.model = job.model.to(self.device)
        self.players = self._make_optimizer_groups()
        self.ema = Ema(self.model, cfg.ema) if cfg.ema else None

    def _make_optimizer_groups(self) -> list[tuple[Objective, torch.optim.Optimizer, list[nn.Parameter]]]:
        """(objective, optimizer, the parameters it may change) for each player."""
        pairs: Sequence[tuple[Objective, Any]]
        if self.job.objectives:
            pairs = self.job.objectives
        else:
            assert self.job.objective is not None, "a TrainSpec needs an objective"
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
        """Train to the end of `steps` or `time_limit`, or until a signal. Returns the last metrics with step, rows
        (read by all processes), seconds and finished (False after a signal). ValueError for what the user can mend: a
        run folder that another process trains in, a damaged checkpoint, a run folder of another model, a full disk, a
        loss that is not finite, a dataset's own ValueError, a process of the run that ended."""
        with lock_run(self.run_dir, self.main):
            with disk_errors(
                f"the files of the run {self.run_dir}",
                "free some space and run the same command again; it goes on where it was saved",
            ):
                try:
                    return self._run()
                except RuntimeError as error:
                    if self.world == 1 or not _is_lost_peer(error):
                        raise
                    raise ValueError(
                        f"process {self.rank} ends since another one of the run did: {self._resume_hint()}"
                    ) from error

    def _run(self) -> dict[str, Any]:
        self._resume()
        self._forward = self.accelerator.prepare(_ObjectiveModule(self.model))
        self.model.train()
        began, before, first = time.monotonic(), self.elapsed, self.step
        last: dict[str, Any] = {}
        batches: BatchIterator | None = None
        start = self._progress()
        logs = TrainLogger(self.run_dir, self.cfg.steps, first, start, before) if self.main else None
        # The watch ends before the loader does: joining workers takes longer in one process than in another.
        with self._handle_signals(), logs or nullcontext(), ExitStack() as opened, watch_peers(self._resume_hint):
            if first:
                self._write_missing_outputs(start >= 1)
            while True:
                self.elapsed, stop = self._sync_clock_and_stop(before + time.monotonic() - began)
                progress = self._progress()
                finished = progress >= 1
                if self.step > first:
                    saving = finished or _is_due(self.cfg.save_every, self.step)
                    logging = saving or _is_due(self.cfg.log_every, self.step)
                    if logging or stop:
                        last = self._metrics()
                        if logging and logs:
                            logs.write(self.step, last, progress)
                        self._check(last)  # before saving: broken weights must not replace good ones
                        if logging:
                            self.totals.reset()
                            self.logged = self.step, self.elapsed
                    if saving or stop:
                        self._save()
                    if (finished or _is_due(self.cfg.sample_every, self.step)) and not stop:
                        self._sample()
                if finished or stop:
                    break
                if batches is None:
                    batches = opened.enter_context(closing(self._batches()))
                self._train_step(batches, progress)
                if logs:
                    logs.tick()
        if self.main:
            word = "stopped by a signal (the same command goes on)" if stop else "finished"
            print(f"{self.run_dir}: {word} at step {self.step} after {format_duration(self.elapsed)}", flush=True)
        return last | {"step": self.step, "rows": self.rows, "seconds": self.elapsed, "finished": not stop}

    def _metrics(self) -> dict[str, float]:
        """The means since the last log line. All processes have to ask."""
        steps, seconds = self.step - self.logged[0], max(self.elapsed - self.logged[1], 1e-9)
        own = {"lr": self._lr(), "seconds": self.elapsed, "rows/s": steps * self._samples_per_step / seconds}
        return compute_means(self.totals.rows(self.world), seconds) | own

    def _progress(self) -> float:
        """The share of the run that is done, in [0, 1], by steps or by the clock, whichever is further."""
        by_clock = self.elapsed / self.cfg.time_limit if self.cfg.time_limit else 0.0
        return min(1.0, max(self.step / self.cfg.steps, by_clock))

    def _check(self, metrics: Mapping[str, float]) -> None:
        """Every loss is a number, and data parallel copies of the weights are still the same."""
        non_finite_names = [name for name, value in metrics.items() if not math.isfinite(value)]
        if non_finite_names:
            raise ValueError(
                f"{', '.join(non_finite_names)} is not finite at step {self.step}: lower optim.lr, or use "
                f"precision=fp32"
            )
        if self.world > 1:
            total = torch.stack([p.detach().double().abs().sum() for p in self.model.parameters()]).sum()
            ends = torch.stack([total, -total])
            torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX)
            assert ends[0] == -ends[1], "the processes' weights differ: something changes weights outside the optimizer"

    def _sync_clock_and_stop(self, seconds: float) -> tuple[float, bool]:
        """All processes go by the latest clock, and stop when any was told to."""
        stop = float(self.signal is not None)
        if self.world > 1:
            values = torch.tensor([seconds, stop], dtype=torch.float64, device=self.device)
            torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
            seconds, stop = values.tolist()
        return seconds, bool(stop)

    def _train_step(self, batches: Iterator[Any], progress: float) -> None:
        cfg = self.cfg
        micro = [self._next(batches) for _ in range(cfg.accumulate)]
        scale = lr_factor(cfg.optim, self.step, progress)
        for player, (objective, optimizer, parameters) in enumerate(self.players):
            if hasattr(objective, "step"):
                objective.step = self.step
            with self._only_group(player):
                self._backward(player, objective, micro)
            norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.optim.clip or math.inf)
            self.totals.add(f"metric/grad_norm{player or ''}", norm, 1)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * scale
            optimizer.step()
            self.model.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update()
        self.step += 1
        self.rows += self._samples_per_step

    def _backward(self, player: int, objective: Objective, micro: list[Any]) -> None:
        """Gradients of sum(sums) / sum(counts) over the step's micro-batches and processes, name by name."""
        counts = self._counts(player, objective, micro) if len(micro) > 1 else None
        weights: Mapping[str, float] = getattr(objective, "weights", {})
        for index, batch in enumerate(micro):
            skip_sync = index + 1 < len(micro)
            with self.accelerator.no_sync(self._forward) if skip_sync else nullcontext():
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
                    self.totals.add(name, total, count, weights.get(name, 1.0))
                self.accelerator.backward(torch.stack([part.float() for part in parts]).sum())

    def _counts(self, player: int, objective: Any, micro: list[Any]) -> dict[str, Tensor]:
        """The counts of the whole step, known before its first backward pass.

        Without `objective.counts` they come from one more forward pass, after which weights and buffers are put back:
        a pass in training mode may change both, as dead codes that are revived do.
        """
        if hasattr(objective, "counts"):
            return self._sum_over_processes(self._count_targets(player, objective, micro))
        parts = [self.model, *([objective] if isinstance(objective, nn.Module) else [])]
        tensors = [tensor for part in parts for tensor in [*part.parameters(), *part.buffers()]]
        before = [tensor.detach().clone() for tensor in tensors]
        counts = self._count_targets(player, objective, micro)
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        return self._sum_over_processes(counts)

    def _count_targets(self, player: int, objective: Any, micro: list[Any]) -> dict[str, Any]:
        total: dict[str, Any] = {}
        for index, batch in enumerate(micro):
            rng = self._seed(player, index)
            if hasattr(objective, "counts"):
                counts = objective.counts(batch, rng)
            else:
                with self.accelerator.autocast():
                    counts = {name: count for name, (_, count) in objective(self.model, batch, rng).items()}
            for name, count in counts.items():
                total[name] = total.get(name, 0) + count
        return total

    def _sum_over_processes(self, counts: Mapping[str, Tensor | int]) -> dict[str, Tensor]:
        names = sorted(name for name in counts if not name.startswith("metric/"))
        assert names, "an objective needs a loss: a name that does not start with metric/"
        flat = torch.stack([torch.as_tensor(counts[name], device=self.device).detach().double() for name in names])
        if self.world > 1:
            # A fixed size, so that processes that disagree about the names are noticed instead of waiting for each
            # other.
            buffer = torch.zeros(64, dtype=torch.float64, device=self.device)
            buffer[0], buffer[1 : 1 + len(names)] = zlib.crc32(" ".join(names).encode()), flat
            local_checksum = buffer[0].clone()
            torch.distributed.all_reduce(buffer)
            assert buffer[0] == local_checksum * self.world, (
                f"processes return different losses; this one: {', '.join(names)}"
            )
            flat = buffer[1 : 1 + len(names)]
        return dict(zip(names, flat.float(), strict=True))

    def _seed(self, player: int, index: int) -> torch.Generator:
        """Seed the global generators and return the objective's own, by (seed, step, slot, player); slots number the
        micro-batches of all processes, so that 2 processes draw what one with accumulate=2 draws."""
        seed = hash_seed(self.cfg.seed, self.step, index * self.world + self.rank, player, 2)
        seed_all(seed)
        return torch.Generator().manual_seed(hash_seed(seed, 3))

    @contextmanager
    def _only_group(self, player: int) -> Iterator[None]:
        """Inside, only this player's parameters take gradients."""
        own = {id(p) for p in self.players[player][2]}
        other_params = [p for _, _, ps in self.players for p in ps if id(p) not in own and p.requires_grad]
        for p in other_params:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in other_params:
                p.requires_grad_(True)

    def _lr(self) -> float:
        return self.players[0][1].param_groups[0]["lr"]

    def _batches(self) -> BatchIterator:
        """This process's micro-batches, endless, from the saved row on."""
        cfg = self.cfg
        return load(
            self.job.dataset,
            self.job.collate,
            first=self.rows,
            size=cfg.batch_size,
            rank=self.rank,
            world=self.world,
            seed=cfg.seed,
            shuffle=cfg.shuffle,
            workers=cfg.workers,
            pin=self.device.type == "cuda",
        )

    def _next(self, batches: Iterator[Any]) -> Any:
        batch = next(batches)
        if isinstance(batch, WorkerError):
            batch.reraise()
        return to_device(batch, self.device)

    # ------------------------------------------------ saving

    def _save(self) -> None:
        rows = self.totals.rows(self.world) if self.logged[0] < self.step else {}
        if self.main:
            state = {
                "step": self.step,
                "rows": self.rows,
                "elapsed": self.elapsed,
                "model": self.model.state_dict(),
                "optimizers": [optimizer.state_dict() for _, optimizer, _ in self.players],
                "optimizer_names": self._optimizer_names(),
                "ema": self.ema.state_dict() if self.ema else None,
                # stopped between two log lines: the next one is to be what it would have been
                "unlogged": {"rows": rows, "step": self.logged[0], "seconds": self.logged[1]} if rows else None,
            }
            save_checkpoint(self.run_dir, tree_to_cpu(state), self.cfg.keep)
            self._save_model()
        self.accelerator.wait_for_everyone()

    def _save_model(self) -> None:
        if self.job.save is not None:
            save = self.job.save
            with self._ema_weights():
                save_model(self.run_dir, self.step, lambda folder: save(self.model, folder))

    def _write_missing_outputs(self, finished: bool) -> None:
        """Do what a process that was killed or stopped at the step of the checkpoint had still to do: write the model
        of a finished run, and samples."""
        if self.main:
            if finished and self.job.save is not None and not has_model_of_step(self.run_dir, self.step):
                self._save_model()
                print(f"{self.run_dir}: wrote the model of step {self.step}, which was missing", flush=True)
            if (finished or _is_due(self.cfg.sample_every, self.step)) and not has_samples_of_step(
                self.run_dir, self.step
            ):
                self._write_samples()
        self.accelerator.wait_for_everyone()

    def _resume_hint(self) -> str:
        good = list_checkpoints(self.run_dir)
        checkpoint_text = f"from {good[-1].name}" if good else "afresh"
        return f"what it said last says why; the same command goes on {checkpoint_text}"

    def _optimizer_names(self) -> list[str]:
        return [type(optimizer).__name__ for _, optimizer, _ in self.players]

    def _sample(self) -> None:
        if self.main:
            self._write_samples()
        self.accelerator.wait_for_everyone()

    def _write_samples(self) -> None:
        if self.job.sample is None:
            return
        folder = self.run_dir / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        with self._ema_weights(), tempfile.TemporaryDirectory(prefix=TEMP_PREFIX, dir=folder) as scratch:
            self.job.sample(self.model, self.step, Path(scratch))
            for path in sorted(Path(scratch).iterdir()):  # none is there in part
                os.replace(path, folder / path.name)
        record_samples(self.run_dir, self.step)

    @contextmanager
    def _ema_weights(self) -> Iterator[None]:
        """The model as it would be used: averaged weights, eval mode, no gradients."""
        self.model.eval()
        with self.ema.average_parameters() if self.ema else nullcontext(), torch.no_grad():
            yield
        self.model.train()

    def _resume(self) -> None:
        """Take up the run that run_dir holds, or start one; says which."""
        state = load_checkpoint(self.run_dir)
        saved = self._saved_config() if state is not None else {}
        changes = list(_config_diff(saved, to_dict(self.cfg))) if saved else []
        if state is not None:
            self._load_state(state, changes)
        if self.main:
            parameters = sum(p.numel() for p in self.model.parameters())
            verb = f"resuming at step {self.step}" if state else "a fresh run"
            print(
                f"{self.run_dir}: {verb}, {parameters / 1e6:.2f}M parameters, {self.world} x {self.device.type} "
                f"{self.precision}" + (f", from {self.cfg.init_from}" if self.cfg.init_from and not state else ""),
                flush=True,
            )
            for line in changes:
                print(f"  changed since the run began: {line}", flush=True)
            save_json(self.run_dir / "config.json", to_dict(self.cfg))

    def _saved_config(self) -> dict[str, Any]:
        """The configuration that the run had; without one, or with a damaged one, the checkpoint says all it needs."""
        path = self.run_dir / "config.json"
        if not path.exists():
            return {}
        try:
            saved = load_json(path)
            if isinstance(saved, dict):
                return saved
            reason = f"{path} holds no table of keys"
        except ValueError as error:
            reason = str(error)
        if self.main:
            print(f"{reason}; it is written anew, and the run goes on from its checkpoint", flush=True)
        return {}

    def _load_state(self, state: dict[str, Any], changes: Sequence[str]) -> None:
        """Take over what a checkpoint holds. ValueError where it is of another model or optimizer."""
        change_text = f" ({'; '.join(changes)})" if changes else ""
        advice = "choose another run_dir, or give what the run had"
        try:
            self.model.load_state_dict(state["model"])
        except (KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{self.run_dir} holds a run of another model{change_text}: {advice} ({reason})"
            ) from error
        saved_optimizers, current_optimizers = (
            state.get("optimizer_names", self._optimizer_names()),
            self._optimizer_names(),
        )
        if saved_optimizers != current_optimizers:
            values = f"{' and '.join(saved_optimizers)}, not {' and '.join(current_optimizers)}"
            raise ValueError(f"{self.run_dir} holds a run by the optimizer {values}{change_text}: {advice}")
        try:
            for (_, optimizer, _), saved_optimizer in zip(self.players, state["optimizers"], strict=True):
                options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
                optimizer.load_state_dict(saved_optimizer)
                for group, option in zip(optimizer.param_groups, options, strict=True):
                    group.update(option)  # lr and the like are the configuration's to say, also when it changed
        except (KeyError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{self.run_dir} holds a run by another optimizer{change_text}: {advice} ({reason})"
            ) from error
        if self.ema and state["ema"]:
            self.ema.load_state_dict(state["ema"])
        self.step, self.rows, self.elapsed = state["step"], state["rows"], state["elapsed"]
        self.logged = self.step, self.elapsed
        if unlogged := state.get("unlogged"):
            self.totals.load(unlogged["rows"], self.main)
            self.logged = unlogged["step"], unlogged["seconds"]

    @contextmanager
    def _handle_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT set a flag, and the run stops after its step. More of them, as launchers send, change
        nothing; but Ctrl-C pressed again after a second ends the process at once."""
        old: dict[int, Any] = {}
        first = math.inf

        def handle(number: int, _: Any) -> None:
            nonlocal first
            self.signal = number
            if number == signal.SIGINT and time.monotonic() > first + 1:
                raise KeyboardInterrupt
            if first == math.inf:
                first = time.monotonic()
                if self.main:
                    os.write(2, b"stopping after this step, with a checkpoint (Ctrl-C again: at once, without)\n")

        try:
            for which in (int(signal.SIGTERM), int(signal.SIGINT)):
                old[which] = signal.signal(which, handle)
        except ValueError:  # not the main thread: signals are somebody else's
            pass
        try:
            yield
        finally:
            for which, handler in old.items():
                signal.signal(which, handler)


@contextmanager
def main_process_first() -> Iterator[None]:
    """Inside, the main process of a run goes first and the others wait for it: for a file that all of them read and one
    of them makes.

    Raises:
        ValueError: in the others, where the main process failed inside, with what it said, or has ended; in one line.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    main = PartialState(cpu=not torch.cuda.is_available()).is_main_process
    error_message: list[str | None] = [None]
    if main:
        try:
            yield
        except Exception as error:
            error_message = [" ".join(f"{error}".split()) or type(error).__name__]
            with suppress(RuntimeError):  # a process that has ended need not be told
                broadcast_object_list(error_message)
            raise
    try:
        broadcast_object_list(error_message)
    except RuntimeError as error:
        if not _is_lost_peer(error):
            raise
        raise ValueError(
            "another process of the run ended while this one waited for it: what it said last says why"
        ) from error
    if error_message[0] is not None:
        raise ValueError(f"the main process of the run failed, on which this one waited: {error_message[0]}")
    if not main:
        yield


def _is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed since another process is gone, as gloo and NCCL tell it."""
    signs = "connection closed by peer", "connection reset", "broken pipe", "remote process"
    return any(sign in str(error).lower() for sign in signs)


def _is_due(interval: int, step: int) -> bool:
    return bool(interval) and step % interval == 0


def _config_diff(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in [*new, *(k for k in old if k not in new)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _config_diff(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key}: {before} -> {after}"
