"""What is Emu3's own: sizes, pictures read in their own shape. How its folder behaves is in test_public."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

import unigen
from tests.parity import emu3 as case
from unigen import cli
from unigen.sequence import Document, Segment


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("emu3")
    case.checkpoint(made)
    return made


def test_pictures_of_several_sizes_in_one_batch(folder: Path) -> None:
    engine = unigen.load(str(folder), "cpu")
    sizes = [(16, 8), (8, 16), (16, 8)]
    requests = [engine.request("a red apple", "image", seed=n, size=size) for n, size in enumerate(sizes)]
    drawn = dict(engine.run(requests))
    assert [drawn[n].size for n in range(3)] == sizes
    for n, size in enumerate(sizes):
        assert engine.generate("a red apple", seed=n, size=size).tobytes() == drawn[n].tobytes()


def test_a_picture_is_read_in_its_own_shape(folder: Path) -> None:
    model = unigen.load(str(folder), "cpu").model
    read = model.read(Document([Segment(image=Image.new("RGB", (44, 20))), Segment(image=Image.new("RGB", (8, 8)))]))
    assert [tuple(segment.image.shape) for segment in read.segments] == [(5, 11), (6, 6)]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("size", "reason"),
    [("30x32", "multiples of 4"), ("0x4", "not a size"), ("32", "not a size"), ("4000x4000", "needs")],
)
def test_sizes_that_cannot_be(
    size: str, reason: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.png"
    where = ["--model", str(folder), "--device", "cpu", "-o", str(out)]
    assert cli.main(["generate", "a red apple", "--size", size, *where]) == 2
    assert reason in capsys.readouterr().err and not out.exists()
