"""What a launcher asks for and the Trainer does not do is refused, before anything is loaded.

Run: pytest tests/training/test_launcher.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from unigen.training import recipe
from unigen.training.launcher import check_launcher, check_precision, launch_info

PLAIN = {"ACCELERATE_USE_CPU": "False", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
"""As `accelerate launch` and torchrun have it."""


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "leave --use_fsdp out"),
        ({"ACCELERATE_USE_FSDP": "True"}, "--use_fsdp"),
        ({"ACCELERATE_USE_DEEPSPEED": "1"}, "--use_deepspeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "yes"}, "--use_megatron_lm"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "on"}, "--use_parallelism_config"),
        ({"FSDP_SHARDING_STRATEGY": "FULL_SHARD"}, "sets FSDP_SHARDING_STRATEGY: unset it"),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "ACCELERATE_DEEPSPEED_ZERO_STAGE"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "accumulation_steps=N"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "optim.grad_clip"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "--dynamo_backend"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "4 processes were launched without MASTER_ADDR.*launch by torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "2 processes were launched without MASTER_ADDR"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two', which is no whole number"),
    ],
)
def test_what_is_left_out_silently_is_refused(variables: dict[str, str], named: str) -> None:
    with pytest.raises(ValueError, match=named) as error:
        check_launcher(PLAIN | variables)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        PLAIN,
        {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_DEEPSPEED": ""},
        {"FSDP_CPU_RAM_EFFICIENT_LOADING": "False"},  # as transformers sets it
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "CROSS_RANK": "0"},
    ],
)
def test_data_parallel_launchers_are_taken(variables: dict[str, str]) -> None:
    check_launcher(variables)


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4", "PMI_RANK": "1", "PMI_SIZE": "2"}, (3, 4)),  # torchrun in each node of mpirun
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, (1, 2)),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3", "RANK": ""}, (2, 3)),
        ({"MV2_COMM_WORLD_RANK": "0", "MV2_COMM_WORLD_SIZE": "2"}, (0, 2)),
    ],
)
def test_the_place_of_a_process(variables: dict[str, str], place: tuple[int, int]) -> None:
    assert launch_info(variables) == place


def test_mixed_precision_is_the_runs_to_say() -> None:
    check_precision("fp32", PLAIN)
    check_precision("bf16", {"ACCELERATE_MIXED_PRECISION": "bf16"})
    for precision, asked in (("fp32", "bf16"), ("bf16", "fp16"), ("fp32", "fp8")):
        with pytest.raises(ValueError, match=f"mixed precision {asked}, and the run trains in {precision}"):
            check_precision(precision, {"ACCELERATE_MIXED_PRECISION": asked})


def test_a_recipe_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "recipe.py"
    file.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="--use_fsdp"):
        recipe.run_recipe(str(file))
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_accelerate_launch_is_refused_end_to_end(root: Path, tmp_path: Path) -> None:
    """As on a machine without a GPU, where accelerate itself says nothing."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", "--num_processes", "2"]
    command += ["-m", "unigen", "train", "tiny", f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)})
    assert done.returncode and "unigen: error: the Trainer runs in one process or data parallel" in done.stderr
    assert not (tmp_path / "run").exists()
