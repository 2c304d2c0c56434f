"""What is LlamaGen's own: classes, several models in one place. How its folder behaves is in test_public."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import unigen
from tests.parity import llamagen as case
from unigen import cli
from unigen.models import llamagen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llamagen")
    case.checkpoint(made)
    return made


@pytest.mark.parametrize("asked", [["a dog"], ["--class", "10"], ["--class", "dog"]])
def test_what_is_no_class(asked: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.png"
    assert cli.main(["generate", *asked, "-o", str(out), "--model", str(folder), "--device", "cpu"]) == 2
    assert "from 0 to 9" in capsys.readouterr().err and not out.exists()


def test_one_of_several(folder: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    shutil.copytree(folder, both)
    shutil.copy(both / "c2i_T_32.pt", both / "c2i_U_32.pt")
    with pytest.raises(ValueError, match=r"c2i_T_32, c2i_U_32: name one after a colon"):
        unigen.load(str(both), "cpu")
    assert unigen.load(f"{both}:c2i_U_32", "cpu").info()["family"] == "llamagen"
    with pytest.raises(ValueError, match="holds several models: name one"):
        unigen.load("FoundationVision/LlamaGen", "cpu")


def test_pictures_alone_and_in_a_batch(folder: Path) -> None:
    engine = unigen.load(str(folder), "cpu")
    together = engine.generate_batch([1, 2, 1], [5, 6, 7], temperature=1.0)
    for label, seed, picture in zip([1, 2, 1], [5, 6, 7], together, strict=True):
        alone = np.asarray(engine.generate(label, seed=seed, temperature=1.0), dtype=int)
        assert np.abs(alone - np.asarray(picture)).max() <= 1  # convolutions round otherwise in a batch


def test_pairs_half_a_head_apart_and_back() -> None:
    import torch

    weight = torch.arange(16.0)[:, None]
    apart = llamagen.halves(weight, 8)
    assert apart[:8, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert torch.equal(llamagen.halves(apart, 8, back=True), weight)
