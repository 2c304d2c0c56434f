"""The Trainer: steps optimizers over a stream of samples; saves, samples, logs, stops, resumes.

An Objective returns sums and counts; a recipe's TrainSpec supplies the rest. Every random draw is a function of (seed,
position): samples are seeded by their position in the stream and forward passes by (seed, step, slot), so that no
random state has to be saved, any number of workers gives the same run, and a resumed run equals an uninterrupted one
bit for bit. Does not depend on: losses, models, data formats.

    Trainer(cfg, spec).run()                                torchrun --nproc_per_node 2 -m unigen train recipes/tiny.py
"""

from __future__ import annotations

import dataclasses
import math
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from unigen.config import RunConfig
from unigen.training.checkpoint import EMA, lock_run
from unigen.training.launcher import check_launcher, check_precision, launch_info
from unigen.training.logs import MetricAccumulator, TrainLogger, compute_means, format_duration
from unigen.training.optim import adamw, lr_factor
from unigen.training.peers import is_lost_peer, watch_peers
from unigen.training.run_state import RunFolder, RunState, is_due
from unigen.training.stop_signal import StopSignal
from unigen.training.stream import BatchIterator, WorkerError, hash_seed, make_loader, seed_all
from unigen.training.train_spec import CollatedBatch, LossSums, Objective, TrainSpec, to_device
from unigen.utils.disk import disk_errors
from unigen.utils.extras import require_extra
from unigen.utils.precision import train_precision

if TYPE_CHECKING:
    from accelerate import Accelerator


class OptimizerGroup(NamedTuple):
    """An objective and the parameters that it trains. Several groups step in turn on the same batch."""

    objective: Objective
    """The loss."""
    optimizer: torch.optim.Optimizer
    """The optimizer of `parameters`; `initial_lr` of its groups is the learning rate at a factor of 1."""
    parameters: list[nn.Parameter]
    """All parameters that the optimizer steps."""


class _ObjectiveModule(nn.Module):
    """Runs an objective inside one forward call, which is what DDP and autocast wrap."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, objective: Objective, batch: CollatedBatch, rng: torch.Generator) -> LossSums:
        return objective(self.model, batch, rng)


class Trainer:
    """`Trainer(cfg, spec).run()` trains, resuming where `cfg.run_dir` holds a run, and returns the final metrics.

    In run_dir: config.json (resolved), metrics.jsonl, tensorboard/, checkpoints/, samples/, model/ (what
    `spec.save_model` wrote). SIGTERM and SIGINT end the run after the current step with a checkpoint; a second Ctrl-C
    ends it at once.
    """

    def __init__(self, cfg: RunConfig, spec: TrainSpec) -> None:
        """
        Args:
            cfg: of the run; precision "auto" is resolved for this machine.
            spec: built by the recipe. Its model is moved to the device.

        Raises:
            ValueError: the launcher asks for what the Trainer does not do, or the machine does not support the
                precision.
        """
        check_launcher()
        require_extra("train", "accelerate", "tensorboard")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.cfg = dataclasses.replace(cfg, precision=train_precision(cfg.precision, device))
        check_precision(self.cfg.precision)
        self.spec, self.run_dir = spec, Path(cfg.run_dir)
        self.accelerator = _make_accelerator(self.cfg.precision)
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        _check_world_size(self.world_size)
        self.is_main = self.accelerator.is_main_process
        self.device = self.accelerator.device
        self._samples_per_step = cfg.batch_size * cfg.accumulation_steps * self.world_size
        self.model = spec.model.to(self.device)
        self.optimizer_groups = self._make_optimizer_groups()
        self.state = RunState(
            self.model,
            [group.optimizer for group in self.optimizer_groups],
            EMA(self.model, cfg.ema_decay) if cfg.ema_decay else None,
            MetricAccumulator(self.device),
        )
        self.folder = RunFolder(self.cfg, spec, self.state, self.is_main)
        self.precision = self.cfg.precision + (" (precision=auto)" if cfg.precision == "auto" else "")

    def _make_optimizer_groups(self) -> list[OptimizerGroup]:
        pairs: Sequence[tuple[Objective, Iterable[nn.Parameter] | torch.optim.Optimizer]]
        if self.spec.objectives:
            pairs = self.spec.objectives
        else:
            assert self.spec.objective is not None, "a TrainSpec needs an objective"
            make = self.spec.make_optimizer
            pairs = [(self.spec.objective, make(self.model, self.cfg) if make else list(self.model.parameters()))]
        groups = []
        for objective, target in pairs:
            if isinstance(objective, nn.Module):
                objective.to(self.device)
            optimizer = (
                target if isinstance(target, torch.optim.Optimizer) else adamw(self.model, self.cfg.optim, target)
            )
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            groups.append(OptimizerGroup(objective, optimizer, parameters))
        return groups

    # ------------------------------------------------ the loop

    def run(self) -> dict[str, float]:
        """Train to the end of `steps` or `time_limit`, or until a signal.

        Returns:
            The last metrics with step, rows (samples read by all processes), seconds, and finished (False after a
            signal).

        Raises:
            ValueError: what the user can mend, in one line: a run folder that another process trains in, a damaged
                checkpoint, a run folder of another model, a full disk, a loss that is not finite, a data set's own
                ValueError, a process of the run that ended.
        """
        advice = "free some space and run the same command again; it goes on where it was saved"
        with lock_run(self.run_dir, self.is_main), disk_errors(f"the files of the run {self.run_dir}", advice):
            try:
                return self._run()
            except RuntimeError as error:
                if self.world_size == 1 or not is_lost_peer(error):
                    raise
                raise ValueError(
                    f"process {self.rank} ends since another one of the run did: {self.folder.resume_hint()}"
                ) from error

    def _run(self) -> dict[str, float]:
        state = self.state
        self.folder.resume(f"{self.world_size} x {self.device.type} {self.precision}")
        self._forward = self.accelerator.prepare(_ObjectiveModule(self.model))
        self.model.train()
        start, before, first = time.monotonic(), state.elapsed, state.step
        last: dict[str, float] = {}
        batches: BatchIterator | None = None
        progress = self._progress()
        logger = TrainLogger(self.run_dir, self.cfg.steps, first, progress, before) if self.is_main else None
        signals = StopSignal(announce=self.is_main)
        # The watch ends before the loader does: joining workers takes longer in one process than in another.
        with signals.handle(), logger or nullcontext(), ExitStack() as opened, watch_peers(self.folder.resume_hint):
            if first:
                self.folder.write_missing_outputs(progress >= 1)
                self.accelerator.wait_for_everyone()
            while True:
                state.elapsed, stop = self._sync_clock_and_stop(
                    before + time.monotonic() - start, signals.received is not None
                )
                progress = self._progress()
                finished = progress >= 1
                if state.step > first:
                    last = self._after_step(logger, last, progress, stop)
                if finished or stop:
                    break
                if batches is None:
                    batches = opened.enter_context(closing(self._make_loader()))
                self._train_step(batches, progress)
                if logger:
                    logger.advance()
        if self.is_main:
            verb = "stopped by a signal (the same command goes on)" if stop else "finished"
            print(f"{self.run_dir}: {verb} at step {state.step} after {format_duration(state.elapsed)}", flush=True)
        return last | {"step": state.step, "rows": state.samples_seen, "seconds": state.elapsed, "finished": not stop}

    def _after_step(
        self, logger: TrainLogger | None, last: dict[str, float], progress: float, stop: bool
    ) -> dict[str, float]:
        """Log, save and sample where a step makes it due.

        Returns:
            The metrics of this step where they were computed, else `last`.
        """
        state, finished = self.state, progress >= 1
        saving = finished or is_due(self.cfg.save_every, state.step)
        logging = saving or is_due(self.cfg.log_every, state.step)
        if logging or stop:
            last = self._metrics()
            if logging and logger:
                logger.write(state.step, last, progress)
            self._check_metrics(last)  # before saving: broken weights must not replace good ones
            if logging:
                state.reset_metrics()
        if saving or stop:
            self.folder.save(state.metrics.reduce(self.world_size) if state.last_log[0] < state.step else {})
            self.accelerator.wait_for_everyone()
        if (finished or is_due(self.cfg.sample_every, state.step)) and not stop:
            self.folder.write_samples()
            self.accelerator.wait_for_everyone()
        return last

    def _metrics(self) -> dict[str, float]:
        """Return the means since the last log line. All processes have to call this."""
        step, seconds = self.state.last_log
        steps, seconds = self.state.step - step, max(self.state.elapsed - seconds, 1e-9)
        speed = steps * self._samples_per_step / seconds
        run_metrics = {"lr": self._lr(), "seconds": self.state.elapsed, "rows/s": speed}
        return compute_means(self.state.metrics.reduce(self.world_size), seconds) | run_metrics

    def _progress(self) -> float:
        """Return the share of the run that is done, in [0, 1]: by steps or by the clock, whichever is larger."""
        by_clock = self.state.elapsed / self.cfg.time_limit if self.cfg.time_limit else 0.0
        return min(1.0, max(self.state.step / self.cfg.steps, by_clock))

    def _check_metrics(self, metrics: Mapping[str, float]) -> None:
        """Check that every metric is finite, and that all processes have the same weights."""
        non_finite_names = [name for name, value in metrics.items() if not math.isfinite(value)]
        if non_finite_names:
            raise ValueError(
                f"{', '.join(non_finite_names)} is not finite at step {self.state.step}: lower optim.lr, or use "
                f"precision=fp32"
            )
        if self.world_size > 1:
            total = torch.stack([p.detach().double().abs().sum() for p in self.model.parameters()]).sum()
            ends = torch.stack([total, -total])
            torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX)
            assert ends[0] == -ends[1], "the processes' weights differ: something changes weights outside the optimizer"

    def _sync_clock_and_stop(self, seconds: float, stop: bool) -> tuple[float, bool]:
        """Return the latest clock of all processes, and whether any of them was asked to stop."""
        if self.world_size > 1:
            values = torch.tensor([seconds, float(stop)], dtype=torch.float64, device=self.device)
            torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
            seconds, stop = values.tolist()
        return seconds, bool(stop)

    def _lr(self) -> float:
        return float(self.optimizer_groups[0].optimizer.param_groups[0]["lr"])

    # ------------------------------------------------ batches

    def _make_loader(self) -> BatchIterator:
        """Make the endless micro-batches of this process, from the saved sample on."""
        cfg = self.cfg
        return make_loader(
            self.spec.dataset,
            self.spec.collate,
            first_sample=self.state.samples_seen,
            batch_size=cfg.batch_size,
            rank=self.rank,
            world_size=self.world_size,
            seed=cfg.seed,
            shuffle=cfg.shuffle,
            num_workers=cfg.num_workers,
            pin_memory=self.device.type == "cuda",
        )

    def _next_batch(self, batches: Iterator[CollatedBatch]) -> CollatedBatch:
        batch = next(batches)
        if isinstance(batch, WorkerError):
            batch.reraise()
        return to_device(batch, self.device)

    # ------------------------------------------------ one step

    def _train_step(self, batches: Iterator[CollatedBatch], progress: float) -> None:
        cfg, state = self.cfg, self.state
        micro_batches = [self._next_batch(batches) for _ in range(cfg.accumulation_steps)]
        factor = lr_factor(cfg.optim, state.step, progress)
        for group_index, (objective, optimizer, parameters) in enumerate(self.optimizer_groups):
            if hasattr(objective, "step"):
                objective.step = state.step
            with self._only_group(group_index):
                self._backward(group_index, objective, micro_batches)
            norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.optim.grad_clip or math.inf)
            state.metrics.add(f"metric/grad_norm{group_index or ''}", norm, 1)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            optimizer.step()
            self.model.zero_grad(set_to_none=True)
        if state.ema:
            state.ema.update()
        state.step += 1
        state.samples_seen += self._samples_per_step

    def _backward(self, group_index: int, objective: Objective, micro_batches: list[CollatedBatch]) -> None:
        """Compute gradients of sum(sums) / sum(counts) of each name, over the step's micro-batches and processes."""
        counts = self._step_counts(group_index, objective, micro_batches) if len(micro_batches) > 1 else None
        weights: Mapping[str, float] = getattr(objective, "weights", {})
        for index, batch in enumerate(micro_batches):
            skip_sync = index + 1 < len(micro_batches)
            with self.accelerator.no_sync(self._forward) if skip_sync else nullcontext():
                rng = self._seed_objective(group_index, index)
                result: LossSums = self._forward(objective, batch, rng)
                if counts is None:
                    counts = self._sum_over_processes({name: count for name, (_, count) in result.items()})
                parts = [
                    # times world_size, since DDP takes the mean over processes
                    total * (weights.get(name, 1.0) * self.world_size / counts[name].clamp(min=1e-12))
                    for name, (total, _) in result.items()
                    if not name.startswith("metric/")
                ]
                for name, (total, count) in result.items():
                    self.state.metrics.add(name, total, count, weights.get(name, 1.0))
                self.accelerator.backward(torch.stack([part.float() for part in parts]).sum())

    def _step_counts(
        self, group_index: int, objective: Objective, micro_batches: list[CollatedBatch]
    ) -> dict[str, Tensor]:
        """Return the counts of the whole step, before its first backward pass.

        Without `objective.counts` they come from one more forward pass, after which weights and buffers are restored:
        a pass in training mode may change both, as the revival of dead codes does.
        """
        if hasattr(objective, "counts"):
            return self._sum_over_processes(self._count_targets(group_index, objective, micro_batches))
        parts = [self.model, *([objective] if isinstance(objective, nn.Module) else [])]
        tensors = [tensor for part in parts for tensor in [*part.parameters(), *part.buffers()]]
        before = [tensor.detach().clone() for tensor in tensors]
        counts = self._count_targets(group_index, objective, micro_batches)
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        return self._sum_over_processes(counts)

    def _count_targets(
        self, group_index: int, objective: Objective, micro_batches: list[CollatedBatch]
    ) -> dict[str, Tensor | int]:
        total: dict[str, Tensor | int] = {}
        for index, batch in enumerate(micro_batches):
            rng = self._seed_objective(group_index, index)
            counts: Mapping[str, Tensor | int]
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
        if self.world_size > 1:
            # The size is fixed, so that processes with different names are detected instead of waiting for each other.
            buffer = torch.zeros(64, dtype=torch.float64, device=self.device)
            buffer[0], buffer[1 : 1 + len(names)] = zlib.crc32(" ".join(names).encode()), flat
            local_checksum = buffer[0].clone()
            torch.distributed.all_reduce(buffer)
            assert buffer[0] == local_checksum * self.world_size, (
                f"processes return different losses; this one: {', '.join(names)}"
            )
            flat = buffer[1 : 1 + len(names)]
        return dict(zip(names, flat.float(), strict=True))

    def _seed_objective(self, group_index: int, index: int) -> torch.Generator:
        """Seed the global generators, and return the objective's generator, by (seed, step, slot, group).

        Slots number the micro-batches of all processes, so that 2 processes draw the same as one process with 2
        accumulated batches.
        """
        slot = index * self.world_size + self.rank
        seed = hash_seed(self.cfg.seed, self.state.step, slot, group_index, 2)
        seed_all(seed)
        return torch.Generator().manual_seed(hash_seed(seed, 3))

    @contextmanager
    def _only_group(self, group_index: int) -> Iterator[None]:
        """Let only the parameters of a group take gradients inside the context."""
        group_ids = {id(p) for p in self.optimizer_groups[group_index].parameters}
        other_params = [
            p for group in self.optimizer_groups for p in group.parameters if id(p) not in group_ids and p.requires_grad
        ]
        for p in other_params:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in other_params:
                p.requires_grad_(True)


def _make_accelerator(precision: str) -> Accelerator:
    """Set up accelerate in this process. ValueError where it would train in another way than data parallel."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # another Trainer of this process may have had another precision
    accelerator = Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if accelerator.distributed_type.value not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise ValueError(
            f"the Trainer runs in one process or data parallel (torchrun), not {accelerator.distributed_type}"
        )
    return accelerator


def _check_world_size(world_size: int) -> None:
    """Raise ValueError where the launcher has started another number of processes than torch knows of."""
    launched = launch_info().world_size
    if launched > world_size:
        raise ValueError(f"{launched} processes were launched, which would not train together: launch by torchrun")
    if launched < world_size:
        raise ValueError(
            f"the launcher says that this process is one of {launched}, and torch that it is one of {world_size}: "
            "launch by torchrun, which tells both the same"
        )
