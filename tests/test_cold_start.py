"""What a first picture imports: torch, and neither transformers' modelling code nor diffusers nor torch's compiler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import unigen
from unigen.diffusion.options import FlowOptions
from unigen.inference.engine import Engine
from unigen.models import load
from unigen.nn.cpu.linear import PackedLinear

SLOW = ("transformers", "diffusers", "torch._dynamo", "torch._inductor", "sympy", "sklearn", "scipy", "pandas")
SCRIPT = """
import sys
from unigen.commands import main as cli
for line in {lines!r}:
    code = cli.main(line)
    print("IMPORTED", code, *[name for name in {slow!r} if name in sys.modules])
"""


def imported(root: Path, *lines: list[str]) -> list[list[str]]:
    """Of each command, run one after the other in one process: its exit code and the slow modules that are there."""
    script = SCRIPT.format(lines=list(lines), slow=SLOW)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, timeout=600)
    assert done.returncode == 0, done.stderr
    found = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("IMPORTED")]
    assert len(found) == len(lines), done.stderr
    return found


def test_a_picture_by_codes_imports_torch_alone(root: Path, tmp_path: Path) -> None:
    picture = str(tmp_path / "out.png")
    ways = [
        ["generate", "a cat", "--generator", name, "-o", picture] for name in ("next-scale", "masked", "next-token")
    ]
    commands = [*ways, ["describe", picture, "-q", "what is it?"], ["describe", picture, "--candidates", "2"]]
    assert imported(root, *commands) == [["0"]] * len(commands)


def test_a_flow_imports_what_it_needs(root: Path, tmp_path: Path) -> None:
    """The control: the same check sees what is imported."""
    command = ["generate", "a cat", "--generator", "flow", "--steps", "1", "-o", str(tmp_path / "out.png")]
    assert {"0", "diffusers"} <= set(imported(root, command)[0])


@pytest.mark.parametrize("generator", ["next-token", "next-scale", "flow"])
def test_it_is_the_model_that_is_trained(generator: str, tiny_folder: Path) -> None:
    quick, whole = unigen.load(str(tiny_folder), "cpu"), Engine(load(tiny_folder))
    for prompt in ("a red dog", "a <user> horse</s>"):
        options = {"generator": generator, "seed": 3, "temperature": 1.5} if generator != "flow" else {}
        pictures = [engine.generate(prompt, **options) for engine in (quick, whole)]
        assert np.array_equal(*map(np.asarray, pictures))
        assert quick.describe(pictures[0], "how many") == whole.describe(pictures[0], "how many")
    assert quick.info() == whole.info()
    linears = [[type(m) is PackedLinear for m in e.model.backbone.modules()] for e in (quick, whole)]
    assert any(linears[0]) and not any(linears[1])  # packed by whoever loads for inference


def test_heads_are_loaded_when_they_are_asked_for(tiny_folder: Path, tmp_path: Path) -> None:
    model = unigen.load(str(tiny_folder), "cpu", "bfloat16").model
    assert set(model.generators.factories) == {"flow"} and FlowOptions in model.generators.options("flow")
    assert set(model.state_dict()) == set(load(tiny_folder).state_dict()) and not model.generators.factories
    flow = next(model.heads["flow"].parameters())
    assert flow.dtype == torch.bfloat16 and not model.heads["flow"].training
    model = unigen.load(str(tiny_folder), "cpu").model
    model.save(tmp_path / "copy")
    again, first = load(tmp_path / "copy").state_dict(), load(tiny_folder).state_dict()
    assert again.keys() == first.keys() and all(torch.equal(again[name], first[name]) for name in first)


def test_a_damaged_head_is_one_line_when_it_is_asked_for(tiny_folder: Path, tmp_path: Path) -> None:
    load(tiny_folder).save(tmp_path / "model")
    (tmp_path / "model" / "flow" / "tokenizer" / "config.json").write_text('{"kind": "kl", "channels": 3}')
    engine = unigen.load(str(tmp_path / "model"), "cpu")
    assert engine.generate("a dog").size == (16, 16)
    with pytest.raises(ValueError) as error:
        engine.generate("a dog", generator="flow")
    assert "flow" in str(error.value) and "\n" not in str(error.value)
