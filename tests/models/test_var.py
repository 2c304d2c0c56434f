"""What is VAR's own: the class stays with its row, pictures alone and in a batch. Its folder is in test_public."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import unigen
from tests.parity import var as case
from unigen.models import convert, var


@pytest.fixture(scope="module", params=[False, True], ids=["own", "shared"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("var")
    case.checkpoint(made, shared=request.param)
    return made


def test_pictures_alone_and_in_a_batch(folder: Path, tmp_path: Path) -> None:
    """Classes do not leak from row to row, whatever runs beside; and our layout draws the same."""
    convert(folder, tmp_path / "ours")
    engine, ours = (unigen.load(str(place), "cpu") for place in (folder, tmp_path / "ours"))
    together = engine.generate_batch([1, 2, 1], [5, 6, 5], guidance=2.0)
    assert together[0].tobytes() == together[2].tobytes() != together[1].tobytes()
    for label, seed, picture in zip([1, 2], [5, 6], together, strict=False):
        alone = np.asarray(engine.generate(label, seed=seed, guidance=2.0), dtype=int)
        assert np.abs(alone - np.asarray(picture)).max() <= 1  # convolutions round otherwise in a batch
        assert ours.generate(label, seed=seed, guidance=2.0).tobytes() == alone.astype(np.uint8).tobytes()


def test_what_it_draws_by(folder: Path) -> None:
    engine = unigen.load(str(folder), "cpu")
    assert engine.info()["generators"] == ["next-scale"] and engine.outputs == ("image",)
    with pytest.raises(ValueError, match="no generator 'next-token'"):
        engine.generate(1, generator="next-token")


def test_scales_by_their_positions() -> None:
    assert var.SCALES[680][-1] == 16 and var.SCALES[2240][-1] == 32
    assert all(sum(side * side for side in scales) == count for count, scales in var.SCALES.items())
    with pytest.raises(ValueError, match="7 positions are of no scales known here"):
        var.small_scales(7)
