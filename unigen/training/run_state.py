"""A run in memory and on disk: the contents of checkpoints, resuming, and the outputs of a run folder.

Keys of checkpoints: step, rows (samples seen by all processes), elapsed (seconds), model, optimizers, optimizer_names,
ema, unlogged (the sums since the last log line). Does not depend on: how a step is done.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unigen.config import RunConfig, rename_stored_keys, to_dict
from unigen.hub.weights import rename_old_keys
from unigen.training.checkpoint import (
    EMA,
    TEMP_PREFIX,
    has_model_of_step,
    has_samples_of_step,
    list_checkpoints,
    load_checkpoint,
    record_samples,
    save_checkpoint,
    save_model,
    tree_to_cpu,
)
from unigen.training.logs import MetricAccumulator
from unigen.training.train_spec import TrainSpec
from unigen.utils.files import load_json, save_json


@dataclass
class RunState:
    """The state of a run that checkpoints store."""

    model: nn.Module
    """The model that is trained."""
    optimizers: Sequence[torch.optim.Optimizer]
    """One for each objective, in order."""
    ema: EMA | None
    """The averaged weights; None without averaging."""
    metrics: MetricAccumulator
    """Sums since the last log line."""
    step: int = 0
    """Steps done."""
    samples_seen: int = 0
    """Samples of the stream that all processes have read."""
    elapsed: float = 0.0
    """Seconds of training, earlier sessions included."""
    last_log: tuple[int, float] = (0, 0.0)
    """Step and seconds of the last log line."""

    def reset_metrics(self) -> None:
        """Start new sums, after a log line."""
        self.metrics.reset()
        self.last_log = self.step, self.elapsed

    def optimizer_names(self) -> list[str]:
        """Return the class names of the optimizers, which checkpoints store."""
        return [type(optimizer).__name__ for optimizer in self.optimizers]

    def state_dict(self, unlogged: Mapping[str, list[float]]) -> dict[str, object]:
        """Return the contents of a checkpoint.

        Args:
            unlogged: sums of the steps since the last log line, from `metrics.reduce`; {} where there are none.
        """
        step, seconds = self.last_log
        return {
            "step": self.step,
            "rows": self.samples_seen,
            "elapsed": self.elapsed,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "optimizer_names": self.optimizer_names(),
            "ema": self.ema.state_dict() if self.ema else None,
            # after a stop between two log lines, the next one is what it would have been
            "unlogged": {"rows": unlogged, "step": step, "seconds": seconds} if unlogged else None,
        }

    def load_optimizers(self, states: Sequence[dict[str, Any]]) -> None:
        """Restore momentum and the like. Learning rate, weight decay and other options are kept as configured.

        Args:
            states: of the optimizers, in order.

        Raises:
            KeyError, RuntimeError, ValueError: the states are of other optimizers, or of other parameters.
        """
        for optimizer, state in zip(self.optimizers, states, strict=True):
            options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            optimizer.load_state_dict(state)
            for group, option in zip(optimizer.param_groups, options, strict=True):
                group.update(option)

    def load_progress(self, state: Mapping[str, Any], is_main: bool) -> None:
        """Restore averages, counters and the sums since the last log line.

        Args:
            state: a checkpoint.
            is_main: whether this is the main process of the run, which alone takes the sums.
        """
        if self.ema and state["ema"]:
            average = rename_old_keys(self.model, state["ema"]["average"])
            self.ema.load_state_dict(state["ema"] | {"average": average})
        self.step, self.samples_seen, self.elapsed = state["step"], state["rows"], state["elapsed"]
        self.last_log = self.step, self.elapsed
        if unlogged := state.get("unlogged"):
            self.metrics.load_sums(unlogged["rows"], is_main)
            self.last_log = unlogged["step"], unlogged["seconds"]

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Prepare the model for use inside the context: averaged weights, eval mode, no gradients."""
        self.model.eval()
        with self.ema.average_parameters() if self.ema else nullcontext(), torch.no_grad():
            yield
        self.model.train()


class RunFolder:
    """The folder of a run: config.json, checkpoints/, samples/, model/. Only the main process writes."""

    def __init__(self, cfg: RunConfig, spec: TrainSpec, state: RunState, is_main: bool) -> None:
        """
        Args:
            cfg: of the run, with the folder; it is written to config.json.
            spec: its functions write samples and the model.
            state: is saved and restored.
            is_main: whether this is the main process of the run.
        """
        self.cfg, self.spec, self.state, self.is_main = cfg, spec, state, is_main
        self.path = Path(cfg.run_dir)

    def resume(self, machine: str) -> None:
        """Resume the run that the folder holds, or start one, and print which.

        Args:
            machine: processes, device and precision, in words.

        Raises:
            ValueError: the checkpoint is damaged, or of another model or optimizer; in one line.
        """
        checkpoint = load_checkpoint(self.path)
        saved = self._saved_config() if checkpoint is not None else {}
        changes = list(_config_diff(saved, to_dict(self.cfg))) if saved else []
        if checkpoint is not None:
            self._load(checkpoint, changes)
        if self.is_main:
            millions = sum(p.numel() for p in self.state.model.parameters()) / 1e6
            verb = f"resuming at step {self.state.step}" if checkpoint else "a fresh run"
            source = f", from {self.cfg.init_from}" if self.cfg.init_from and not checkpoint else ""
            print(f"{self.path}: {verb}, {millions:.2f}M parameters, {machine}{source}", flush=True)
            for line in changes:
                print(f"  changed since the run began: {line}", flush=True)
            save_json(self.path / "config.json", to_dict(self.cfg))

    def resume_hint(self) -> str:
        """Return the end of a message about the end of a run: where the same command goes on."""
        good = list_checkpoints(self.path)
        place = f"from {good[-1].name}" if good else "afresh"
        return f"what it said last says why; the same command goes on {place}"

    def save(self, unlogged: Mapping[str, list[float]]) -> None:
        """Write a checkpoint and the model, in the main process.

        Args:
            unlogged: as in `RunState.state_dict`.
        """
        if self.is_main:
            save_checkpoint(self.path, tree_to_cpu(self.state.state_dict(unlogged)), self.cfg.keep_checkpoints)
            self._save_model()

    def write_samples(self) -> None:
        """Let the recipe write its samples, in the main process. Each file appears when it is complete."""
        write = self.spec.write_samples
        if write is None or not self.is_main:
            return
        folder = self.path / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        with self.state.ema_weights(), tempfile.TemporaryDirectory(prefix=TEMP_PREFIX, dir=folder) as scratch:
            write(self.state.model, self.state.step, Path(scratch))
            for path in sorted(Path(scratch).iterdir()):
                os.replace(path, folder / path.name)
        record_samples(self.path, self.state.step)

    def write_missing_outputs(self, finished: bool) -> None:
        """Write the model and the samples of the checkpoint's step, where a killed process has not.

        Args:
            finished: whether the run has reached its end, where both are due.
        """
        step = self.state.step
        if not self.is_main:
            return
        if finished and self.spec.save_model is not None and not has_model_of_step(self.path, step):
            self._save_model()
            print(f"{self.path}: wrote the model of step {step}, which was missing", flush=True)
        if (finished or is_due(self.cfg.sample_every, step)) and not has_samples_of_step(self.path, step):
            self.write_samples()

    def _save_model(self) -> None:
        if self.spec.save_model is not None:
            write = self.spec.save_model
            with self.state.ema_weights():
                save_model(self.path, self.state.step, lambda folder: write(self.state.model, folder))

    def _saved_config(self) -> dict[str, Any]:
        """Return the stored configuration; {} where it is missing or damaged, since the checkpoint suffices."""
        path = self.path / "config.json"
        if not path.exists():
            return {}
        try:
            saved = load_json(path)
            if isinstance(saved, dict):
                return rename_stored_keys(type(self.cfg), saved)
            reason = f"{path} holds no table of keys"
        except ValueError as error:
            reason = str(error)
        if self.is_main:
            print(f"{reason}; it is written again, and the run continues from its checkpoint", flush=True)
        return {}

    def _load(self, checkpoint: dict[str, Any], changes: Sequence[str]) -> None:
        """Restore a checkpoint. ValueError, with the `changes` of the configuration, for another model or optimizer."""
        change_text = f" ({'; '.join(changes)})" if changes else ""
        advice = "choose another run_dir, or give what the run had"
        try:
            self.state.model.load_state_dict(rename_old_keys(self.state.model, checkpoint["model"]))
        except (KeyError, RuntimeError) as error:
            raise ValueError(
                f"{self.path} holds a run of another model{change_text}: {advice} ({_shorten(error)})"
            ) from error
        current = self.state.optimizer_names()
        saved = checkpoint.get("optimizer_names", current)
        if saved != current:
            names = f"{' and '.join(saved)}, not {' and '.join(current)}"
            raise ValueError(f"{self.path} holds a run by the optimizer {names}{change_text}: {advice}")
        try:
            self.state.load_optimizers(checkpoint["optimizers"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{self.path} holds a run by another optimizer{change_text}: {advice} ({_shorten(error)})"
            ) from error
        self.state.load_progress(checkpoint, self.is_main)


def is_due(interval: int, step: int) -> bool:
    """Check whether something is due after a step.

    Args:
        interval: in steps; 0: never.
        step: number of steps done.
    """
    return bool(interval) and step % interval == 0


def _shorten(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _config_diff(old: Mapping[str, object], new: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    """Yield a line for each key that differs."""
    for key in [*new, *(k for k in old if k not in new)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _config_diff(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key}: {before} -> {after}"
