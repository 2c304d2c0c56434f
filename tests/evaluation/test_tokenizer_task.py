"""The tokenizer task on tokenizers whose figures are known."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from unigen.commands.main import main
from unigen.toyworld.scenes import SceneRenderer


class ConstantTokenizer:
    """Sixteen codes: the mean brightness of the picture in 16 steps, which is all that is left of it."""

    image_size, codebook_size = 64, 16

    def encode(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return ((x_BCHW.mean((1, 2, 3)) + 1) * 7.99).long()[:, None, None].expand(-1, 2, 2)

    def decode(self, codes_Bhw: torch.Tensor) -> torch.Tensor:
        return (codes_Bhw[:, :1, :1, None] / 7.99 - 1).permute(0, 3, 1, 2).expand(-1, 3, 64, 64)


def test_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    try:
        SceneRenderer(64)
    except ValueError as error:
        pytest.skip(str(error))
    engine = SimpleNamespace(local_model=SimpleNamespace(image_tokenizer=ConstantTokenizer(), device="cpu"))
    monkeypatch.setattr("unigen.commands.eval.load", lambda args: engine)
    report = tmp_path / "r.json"
    assert main(["eval", "tokenizer", "--count", "60", "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    assert 5 < found["tasks"]["psnr_objects"] < found["tasks"]["psnr"] < 25
    assert 3 <= found["tasks"]["perplexity"] <= 16 and found["tasks"]["usage"] * 16 == 16 - found["tasks"]["dead"]
    assert "psnr_objects" in capsys.readouterr().out
    for bad in (["--count", "0"], ["--batch", "x"], ["--json", str(tmp_path / "no" / "r.json")], ["--nonsense"]):
        assert main(["eval", "tokenizer", *bad]) == 2
        error = capsys.readouterr().err
        assert "--" in error or "r.json" in error
