"""What is Emu3's own: sizes, pictures read in their own shape. How its folder behaves is in test_public."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import unigen
from tests.parity import emu3 as case
from unigen.commands import main as cli
from unigen.document import Document, Segment
from unigen.hub.resolve import read_json
from unigen.inference.scoring import _unpacked_log_likelihood
from unigen.utils.files import save_json


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("emu3")
    case.checkpoint(made)
    return made


def test_pictures_of_several_sizes_in_one_batch(folder: Path) -> None:
    engine = unigen.load(str(folder), "cpu")
    sizes = [(16, 8), (8, 16), (16, 8)]
    requests = [engine.build_request("a red apple", "image", seed=n, size=size) for n, size in enumerate(sizes)]
    drawn = dict(engine.run_requests(requests))
    assert [drawn[n].size for n in range(3)] == sizes
    for n, size in enumerate(sizes):
        assert engine.generate("a red apple", seed=n, size=size).tobytes() == drawn[n].tobytes()


def test_a_document_says_the_size_it_asks_for(folder: Path) -> None:
    engine = unigen.load(str(folder), "cpu")
    asked = Document([Segment(text="a red apple")], (16, 8))
    assert engine.generate(asked).tobytes() == engine.generate("a red apple", size=(16, 8)).tobytes()
    assert engine.generate(asked, size=(8, 16)).size == (8, 16) and asked.size == (16, 8)
    with pytest.raises(ValueError, match="multiples of 4"):
        engine.build_request(Document([Segment(text="a red apple")], (30, 32)), "image")


def test_captions_of_pictures_of_several_shapes(folder: Path) -> None:
    engine = unigen.load(str(folder), "cpu")
    asked = [[Image.new("RGB", size, "red"), "what is it"] for size in ((16, 8), (8, 16), (16, 8))]
    options: dict[str, Any] = {"candidates": 3, "max_tokens": 4}
    told = engine.generate_batch(asked, [1, 2, 3], "text", **options)
    assert told == [engine.generate_batch([one], [n + 1], "text", **options)[0] for n, one in enumerate(asked)]
    documents = [Document([*Document.of(one).segments, Segment(text="a", role="assistant")]) for one in asked]
    read = [engine.model.encode_document(document) for document in documents]
    with torch.inference_mode():
        alone = torch.cat([_unpacked_log_likelihood(engine.model, [document]) for document in read])
        torch.testing.assert_close(_unpacked_log_likelihood(engine.model, read), alone, rtol=1e-4, atol=1e-4)


def test_a_picture_is_read_in_its_own_shape(folder: Path) -> None:
    model = unigen.load(str(folder), "cpu").model
    read = model.encode_document(
        Document([Segment(image=Image.new("RGB", (44, 20))), Segment(image=Image.new("RGB", (8, 8)))])
    )
    assert [tuple(segment.image.shape) for segment in read.segments] == [(5, 11), (6, 6)]  # type: ignore[union-attr]


def test_a_folder_as_transformers_5_saves_it(folder: Path, tmp_path: Path) -> None:
    """The settings of the image processor stand in processor_config.json alone."""
    shutil.copytree(folder, tmp_path / "saved")
    settings = read_json(tmp_path / "saved" / "preprocessor_config.json")
    (tmp_path / "saved" / "preprocessor_config.json").unlink()
    save_json(tmp_path / "saved" / "processor_config.json", {"image_processor": settings})
    first, second = (unigen.load(str(place), "cpu") for place in (folder, tmp_path / "saved"))
    assert second.model.template.settings == first.model.template.settings
    one, other = (engine.generate("a red apple", size=(16, 8)).tobytes() for engine in (first, second))
    assert one == other
    (tmp_path / "saved" / "processor_config.json").unlink()
    with pytest.raises(ValueError, match="preprocessor_config.json is missing"):
        unigen.load(str(tmp_path / "saved"), "cpu")


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
