"""Documents, reading pictures, packing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unigen.batch import Tokens, Vocabulary, pack
from unigen.document import Document, Segment, read_image
from unigen.media.pixels import to_images, to_pixels
from unigen.models import load
from unigen.training.objectives import MultiGeneratorLoss


def picture(shade: int = 90, size: int = 16) -> Image.Image:
    return Image.new("RGB", (size, size), (shade, 255 - shade, 40))


def test_documents_survive_json(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    document = Document(
        [
            Segment(text="two apples"),
            Segment(image=tmp_path / "a.png"),
            Segment(image=picture(), role="assistant"),
            Segment(image=torch.arange(4).reshape(2, 2), role="assistant"),
        ],
        (32, 16),
    )
    again = Document.from_json(json.loads(json.dumps(document.to_json())))
    assert again.size == (32, 16) and Document.from_json({"segments": []}).size is None
    assert [s.role for s in again.segments] == ["user", "user", "assistant", "assistant"]
    assert again.segments[0].text == "two apples" and str(again.segments[1].image) == str(tmp_path / "a.png")
    assert np.array_equal(np.asarray(again.segments[2].image), np.asarray(picture()))
    assert torch.equal(again.segments[3].image, torch.arange(4).reshape(2, 2))


def test_a_segment_holds_one_thing() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        Segment(text="a", image=picture())
    with pytest.raises(ValueError, match="exactly one"):
        Segment()
    with pytest.raises(ValueError, match="unknown role"):
        Segment(text="a", role="narrator")  # type: ignore[arg-type]


@pytest.mark.parametrize("prompt", ["", "   ", [], ["", " "]])
def test_an_empty_prompt_is_refused(prompt: object) -> None:
    with pytest.raises(ValueError, match="empty"):
        Document.of(prompt)


def test_pictures_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        read_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ValueError, match="cannot be read"):
        read_image(tmp_path / "text.png")
    picture(size=64).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:90])
    with pytest.raises(ValueError, match="cannot be read"):
        read_image(tmp_path / "cut.png")
    Image.new("1", (9000, 9000)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match="too large"):
        read_image(tmp_path / "bomb.png")


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(read_image(tmp_path / "clear.png")).min() == 255


def test_pixels_and_back() -> None:
    array = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    pixels = to_pixels([array, Image.fromarray(array)], 16)
    assert pixels.shape == (2, 3, 16, 16) and pixels.min() >= -1 and pixels.max() <= 1
    assert all(np.array_equal(np.asarray(image), array) for image in to_images(pixels))
    assert to_pixels([picture(size=40)], 16).shape == (1, 3, 16, 16)


def test_liquids_layout() -> None:
    vocabulary = Vocabulary(100, 32)
    ids = vocabulary.image_ids(torch.tensor([0, 31]))
    assert ids.tolist() == [100, 131] and vocabulary.size == 132
    assert vocabulary.codes(ids).tolist() == [0, 31]
    assert vocabulary.is_image(torch.tensor([99, 100])).tolist() == [False, True]


def documents() -> list[Document]:
    return [
        Document([Segment(text="two apples"), Segment(image=picture(10), role="assistant")]),
        Document([Segment(image=picture(200)), Segment(text="how many"), Segment(text="two dog", role="assistant")]),
        Document(
            [
                Segment(text="story about a witch"),
                Segment(text="a witch and raven", role="assistant"),
                Segment(image=picture(60), role="assistant"),
                Segment(text="red dog", role="assistant"),
                Segment(image=picture(120), role="assistant"),
            ]
        ),
    ]


def losses(folder: Path, rows: list[list[Tokens]], length: int = 160) -> dict[str, float]:
    model = load(folder)
    result = MultiGeneratorLoss(model.generators)(
        model, pack(rows, length, model.image_tokenizer.image_size), torch.Generator()
    )
    return {name: float(total) for name, (total, _) in result.items()}


@torch.no_grad()
def test_packed_loss_is_the_sum_of_the_unpacked(tiny_folder: Path) -> None:
    template = load(tiny_folder).template
    tokens = [template.encode(d) for d in documents()]
    packed = losses(tiny_folder, [tokens, [tokens[2], tokens[0]]])
    for name in ("text", "next-token"):
        alone = sum(losses(tiny_folder, [[t]])[name] for t in (*tokens, tokens[2], tokens[0]))
        assert packed[name] == pytest.approx(alone, rel=1e-5)
        # the control: documents that see each other, as one of their concatenation would, have another loss
        joined = Tokens()
        for t in tokens:
            at = len(joined)
            joined.ids += t.ids
            joined.loss += t.loss
            joined.spans += [(at + a, at + b) for a, b in t.spans]
            joined.images += t.images
            joined.writers += t.writers
        assert losses(tiny_folder, [[joined]])[name] != pytest.approx(losses(tiny_folder, [tokens])[name], rel=1e-5)


def test_counts_are_known_before_the_images(tiny_folder: Path) -> None:
    model = load(tiny_folder)
    batch = pack([[model.template.encode(d) for d in documents()]], 160, 16)
    objective = MultiGeneratorLoss(model.generators)
    counted = objective.counts(batch, torch.Generator())
    found = objective(model, batch, torch.Generator())
    assert {name: int(count) for name, (_, count) in found.items()} == {k: int(v) for k, v in counted.items()}
    assert counted["next-token"] == 3 * 4


def test_a_row_that_is_too_short_is_refused() -> None:
    tokens = Tokens(ids=[1] * 10, loss=[False] * 10)
    with pytest.raises(ValueError, match="do not fit"):
        pack([[tokens, tokens]], 16, 16)


def test_codes_and_pixels_do_not_mix() -> None:
    tokens = Tokens()
    tokens.add_image(picture(), 4)
    tokens.add_image(torch.zeros(2, 2, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="mixes"):
        pack([[tokens]], 16, 16)
