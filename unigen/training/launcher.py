"""The settings of a launcher, read from the environment, and checks that the Trainer can follow them.

The Trainer runs in one process or data parallel. A launcher that asks for more is refused, since accelerate would
silently ignore it where it finds no GPU. Standard library only, so that a run is refused before anything is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_UNSUPPORTED_PLUGINS = {
    "FSDP": ("--use_fsdp", "FSDP_"),
    "DEEPSPEED": ("--use_deepspeed", "ACCELERATE_DEEPSPEED_"),
    "MEGATRON_LM": ("--use_megatron_lm", "MEGATRON_LM_"),
    "PARALLELISM_CONFIG": ("--use_parallelism_config", "PARALLELISM_CONFIG_"),
}
"""Kinds of parallel training that `accelerate launch` offers: the option, and the prefix of its variables."""

_RANK_VARIABLES = "RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"
_WORLD_SIZE_VARIABLES = "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"
"""Variables of torchrun, and of the MPI launchers that accelerate supports."""

_TRUE = "y", "yes", "t", "true", "on", "1"
_SET_BY_LIBRARIES = "FSDP_CPU_RAM_EFFICIENT_LOADING"  # transformers sets it in a plain run, too


def check_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse settings of a launcher that the Trainer would ignore.

    Args:
        environment: variables by name.

    Raises:
        ValueError: the launcher asks for FSDP, DeepSpeed, Megatron-LM or another plan of parallelism, for accumulated
            or clipped gradients, or for a compiler; or it starts several processes and does not say how they find each
            other; in one line.
    """
    if launch_info(environment).world_size > 1 and not environment.get("MASTER_ADDR"):
        raise ValueError(
            f"{launch_info(environment).world_size} processes were launched without MASTER_ADDR, by which they find "
            "each other: launch by torchrun, which sets it"
        )
    for kind, (option, prefix) in _UNSUPPORTED_PLUGINS.items():
        is_requested = environment.get(f"ACCELERATE_USE_{kind}", "").lower() in _TRUE
        setting = next((name for name in sorted(environment) if name.startswith(prefix)), None)
        if is_requested:
            raise ValueError(f"the Trainer runs in one process or data parallel: leave {option} out, or use torchrun")
        if setting is not None and setting != _SET_BY_LIBRARIES:
            raise ValueError(
                f"the Trainer runs in one process or data parallel, but the environment sets {setting}: unset it"
            )
    for name, option, harmless, equivalent in (
        ("GRADIENT_ACCUMULATION_STEPS", "--gradient_accumulation_steps", ("", "1"), "accumulation_steps=N"),
        ("GRADIENT_CLIPPING", "--gradient_clipping", ("", "none"), "optim.grad_clip=NORM"),
        ("DYNAMO_BACKEND", "--dynamo_backend", ("", "no"), "compile=true, where a recipe has it"),
    ):
        if environment.get(f"ACCELERATE_{name}", "").lower() not in harmless:
            raise ValueError(f"a run takes {equivalent}: leave {option} out, or unset ACCELERATE_{name}")


class LaunchInfo(NamedTuple):
    """The place of this process in its run."""

    rank: int
    """Index of the process, from 0 on; rank 0 is the main process."""
    world_size: int
    """Number of processes of the run."""


def launch_info(environment: Mapping[str, str] = os.environ) -> LaunchInfo:
    """Read the place of this process in its run from the variables of torchrun, `accelerate launch` or mpirun.

    Args:
        environment: variables by name.

    Returns:
        Rank and number of processes; rank 0 of 1 where there is no launcher.

    Raises:
        ValueError: one of the variables is no whole number; in one line.
    """
    return LaunchInfo(
        _first_number(_RANK_VARIABLES, environment, 0), _first_number(_WORLD_SIZE_VARIABLES, environment, 1)
    )


def _first_number(names: Sequence[str], environment: Mapping[str, str], default: int) -> int:
    """Return the number of the first variable that is set and not below 0, else `default`."""
    for name in names:
        text = environment.get(name, "").strip()
        try:
            number = int(text or -1)
        except ValueError as error:
            raise ValueError(f"the environment sets {name}={text!r}, which is no whole number: unset it") from error
        if number >= 0:
            return number
    return default


def check_precision(precision: str, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse a launcher's --mixed_precision other than the run's.

    Args:
        precision: of the run, "fp32" or "bf16".
        environment: variables by name.

    Raises:
        ValueError: they differ; in one line.
    """
    launcher_precision = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launcher_precision not in ("", "no", precision):
        raise ValueError(
            f"the launcher asks for mixed precision {launcher_precision}, and the run trains in {precision}: leave "
            "--mixed_precision out, and say precision=bf16 or precision=fp32 to the run"
        )
