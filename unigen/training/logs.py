"""The logs of a training run: a progress bar (plain lines without a terminal), metrics.jsonl, tensorboard.

`MetricAccumulator` adds sums and counts; `TrainLogger` writes means. Does not depend on: where numbers come from.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unigen.utils.progress import visible


class MetricAccumulator:
    """Sums and counts since the last log line. They stay on the device until `reduce`.

    Args:
        device: of the sums.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Forget all sums."""
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float, weight: float = 1.0) -> None:
        """Add to a metric.

        Args:
            name: of the metric; names that begin with "metric/" are no losses.
            total: sum over targets.
            count: number of targets.
            weight: factor of the mean in the loss.
        """
        total = torch.as_tensor(total, device=self.device, dtype=torch.float64).detach()
        count = torch.as_tensor(count, device=self.device, dtype=torch.float64).detach()
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._counts[name] = self._counts[name] + count if name in self._counts else count
        self._weights[name] = weight

    def reduce(self, world_size: int) -> dict[str, list[float]]:
        """Sum over all processes, each of which has to call this.

        Args:
            world_size: number of processes.

        Returns:
            Name -> [sum, count, weight].
        """
        names = sorted(self._sums)
        sums_and_counts = torch.stack([torch.stack([self._sums[name], self._counts[name]]) for name in names])
        if world_size > 1:
            torch.distributed.all_reduce(sums_and_counts)
        return {name: [*row, self._weights[name]] for name, row in zip(names, sums_and_counts.tolist(), strict=True)}

    def load_sums(self, sums: Mapping[str, list[float]], is_main: bool) -> None:
        """Replace the sums by saved ones.

        Args:
            sums: as `reduce` returned them, over all processes.
            is_main: whether this is the main process, which takes them; the others begin with zeros.
        """
        self.reset()
        for name, (total, count, weight) in sums.items():
            self.add(name, total if is_main else 0.0, count if is_main else 0.0, weight)


def compute_means(sums: Mapping[str, list[float]], seconds: float) -> dict[str, float]:
    """Compute means and the loss.

    Args:
        sums: as `MetricAccumulator.reduce` returns them.
        seconds: time in which they were added.

    Returns:
        "loss", the weighted sum of the means of losses; the mean of each name, without "metric/"; and "tokens/s" where
        "metric/tokens" is a name.
    """
    means = {name.removeprefix("metric/"): total / max(count, 1e-12) for name, (total, count, _) in sums.items()}
    loss = sum(weight * means[name] for name, (*_, weight) in sums.items() if not name.startswith("metric/"))
    if "metric/tokens" in sums:
        means["tokens/s"] = sums["metric/tokens"][0] / max(seconds, 1e-9)
    return {"loss": loss} | means


class TrainLogger:
    """Writes one line of metrics at a time. As a context it closes the files and the progress bar.

    Args:
        run_dir: folder of the run.
        steps: of the whole run.
        step: at which the run starts or goes on; lines of later steps are removed.
        progress: the share of the run that is done, in [0, 1].
        seconds: of training so far.
    """

    def __init__(self, run_dir: Path, steps: int, step: int, progress: float, seconds: float) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.steps, self.start = steps, (progress, seconds)
        path = run_dir / "metrics.jsonl"
        _truncate_after(path, step)
        self.file = open(path, "a", encoding="utf-8")
        self.tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)
        self.progress_bar: Any = None
        if visible():
            from tqdm.auto import tqdm

            bar_format = "{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}{postfix}"
            self.progress_bar = tqdm(total=steps, initial=step, dynamic_ncols=True, bar_format=bar_format)

    def advance(self) -> None:
        """Move the progress bar by one step."""
        if self.progress_bar is not None:
            self.progress_bar.update(1)

    def write(self, step: int, metrics: dict[str, float], progress: float) -> None:
        """Write the metrics of a step to the files, and to the progress bar or the terminal.

        Args:
            step: number of steps done.
            metrics: "loss", "lr", "seconds", "rows/s" and any others.
            progress: the share of the run that is done, in [0, 1].
        """
        new_progress, new_seconds = progress - self.start[0], metrics["seconds"] - self.start[1]
        time_left = format_duration(new_seconds * (1 - progress) / max(new_progress, 1e-9))
        self.file.write(
            json.dumps({"step": step} | {k: v if math.isfinite(v) else None for k, v in metrics.items()}) + "\n"
        )
        self.file.flush()
        for name, value in metrics.items():
            self.tensorboard.add_scalar(name, value, step)
        self.tensorboard.flush()
        speed = f"{metrics['tokens/s']:.0f} tokens/s" if "tokens/s" in metrics else f"{metrics['rows/s']:.1f} rows/s"
        if self.progress_bar is not None:
            self.progress_bar.set_postfix_str(f"loss {metrics['loss']:.4f}, {speed}, {time_left} left")
            return
        standard_names = {"loss", "lr", "seconds", "tokens", "tokens/s", "rows/s", "grad_norm"}
        other_names = [name for name in metrics if name not in standard_names]
        detail = "  " + " ".join(f"{name} {metrics[name]:.4g}" for name in other_names) if len(other_names) > 1 else ""
        head = f"step {step}/{self.steps}  loss {metrics['loss']:.4f}  lr {metrics['lr']:.2e}"
        print(f"{head}  {speed}  {time_left} left{detail}", flush=True)

    def __enter__(self) -> "TrainLogger":
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress_bar is not None:
            self.progress_bar.close()
        self.file.close()
        self.tensorboard.close()


def format_duration(seconds: float) -> str:
    """Return seconds as "3m07s" or "1h02m"."""
    minutes, seconds_left = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds_left:02d}s"


def _truncate_after(path: Path, step: int) -> None:
    """Remove the lines of steps after `step`, and a last line that a kill cut short.

    Where other lines cannot be read, a copy of the file is kept beside it.
    """
    if not path.exists():
        return
    lines = path.read_bytes().splitlines()
    steps = [_step_of_line(line) for line in lines]
    if None in steps[:-1]:
        copy = path.with_suffix(".damaged.jsonl")
        shutil.copyfile(path, copy)
        print(f"{path} is damaged: {steps.count(None)} lines are left out; as it was, it is {copy}", flush=True)
    temporary = path.with_suffix(".tmp")
    valid_lines = [
        line + b"\n"
        for line, line_step in zip(lines, steps, strict=True)
        if line_step is not None and line_step <= step
    ]
    temporary.write_bytes(b"".join(valid_lines))
    os.replace(temporary, path)


def _step_of_line(line: bytes) -> float | None:
    """Return the step of a line; None where it cannot be read."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
