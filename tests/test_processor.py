"""In what precision a model is held and trained, by what the processor has; its flags are made up here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import unigen
from unigen.training.muon import Muon, orthogonalize
from unigen.utils import precision

PLAIN: dict[str, Any] = {"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_bf16": False}
ABLE = [PLAIN | {"avx512_bf16": True}, PLAIN | {"amx_bf16": True}, {"architecture": "aarch64", "bf16": True}]
SLOW = [PLAIN, {"architecture": "x86_64"}, {"architecture": "aarch64", "neon": True, "bf16": False}]


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the processor's flags."""
    return lambda flags: monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)


def test_training_is_in_bfloat16_where_the_processor_has_it(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for flags in ABLE:
        processor(flags)
        assert precision.train_precision("auto", "cpu") == "bf16"
        assert precision.train_precision("fp32", "cpu") == "fp32"
    for flags in SLOW:
        processor(flags)
        assert precision.train_precision("auto", torch.device("cpu")) == "fp32"
        assert precision.train_precision("bf16", "cpu") == "bf16", "what was asked for is done"
    for supported, wanted in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, s=supported: s)
        assert precision.train_precision("auto", "cuda") == wanted


def folder_of(folder: Path, dtype: torch.dtype | None, said: str | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    config: dict[str, Any] = {"model_type": "janus", "text_config": {"dtype": said}} if said else {}
    (folder / "config.json").write_text(json.dumps(config))
    if dtype is not None:
        weights = {"table": torch.zeros(64, 64, dtype=dtype), "norm": torch.ones(64), "ids": torch.arange(9)}
        save_file(weights, folder / "model.safetensors")
    return folder


def test_public_checkpoints_are_held_in_what_the_processor_is_fast_in(
    processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brain = folder_of(tmp_path / "brain", torch.bfloat16)
    pickled = folder_of(tmp_path / "pickled", None, "bfloat16")
    for flags in ABLE:
        processor(flags)
        assert precision.load_dtype(brain, "cpu") == precision.load_dtype(pickled, "cpu") == (None, "")
    processor(PLAIN)
    for folder in (brain, pickled):
        dtype, why = precision.load_dtype(folder, "cpu")
        assert dtype == "float32" and "--dtype bfloat16 keeps it" in why and "\n" not in why
        assert precision.load_dtype(folder, "cuda:0") == (None, "")
    for dtype in (torch.float32, torch.float16):  # which `load_resolved` has its own rule for
        assert precision.load_dtype(folder_of(tmp_path / f"{dtype}", dtype), "cpu") == (None, "")
    monkeypatch.setattr(precision, "available_memory", lambda: 1000)
    dtype, why = precision.load_dtype(brain, "cpu")
    assert dtype is None and "are free" in why
    (brain / "model.safetensors").write_bytes(b"\xff" * 8)
    (brain / "config.json").write_text("[")
    assert precision.load_dtype(brain, "cpu") == (None, ""), "who reads it says that it is damaged"


def test_load_says_what_it_chose(
    processor: Any, janus_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unigen.load(str(janus_folder), "cpu").model.save(tmp_path / "half", dtype=torch.bfloat16)
    capsys.readouterr()
    for flags, dtype, held in ((PLAIN, None, "float32"), (PLAIN, "bfloat16", "bfloat16"), (ABLE[0], None, "bfloat16")):
        processor(flags)
        assert unigen.load(str(tmp_path / "half"), "cpu", dtype).info()["precision"] == held
        assert ("held in float32" in capsys.readouterr().err) is (flags is PLAIN and dtype is None)
    processor(PLAIN)
    unigen.load("unigen-tiny", "cpu")
    assert not capsys.readouterr().err


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
def test_muon_is_exact_in_float32_and_the_same_step_in_bfloat16(shape: tuple[int, int], processor: Any) -> None:
    torch.manual_seed(0)
    start, grads = torch.randn(shape), torch.randn(3, *shape)
    weights = {}
    for name, flags in (("fp32", PLAIN), ("bf16", ABLE[0])):
        processor(flags)
        weight = torch.nn.Parameter(start.clone())
        optimizer = Muon([weight], lr=0.01, weight_decay=0.1)
        assert optimizer.use_bfloat16 is (name == "bf16")
        for grad in grads:
            weight.grad = grad.clone()
            optimizer.step()
        weights[name] = weight.detach() - start
    size = weights["fp32"].norm()
    assert (weights["fp32"] - weights["bf16"]).norm() < 0.05 * size, "torch's own step, up to its rounding"
    exact, near = (orthogonalize(grad, (3.4445, -4.775, 2.0315), 5, 1e-7) for grad in (grads[0].double(), grads[0]))
    assert (exact - near).norm() < 1e-4 * exact.norm()
    values = torch.linalg.svdvals(exact)
    assert 0.5 < values.min() and values.max() < 1.3
