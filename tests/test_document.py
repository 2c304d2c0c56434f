"""Documents, reading pictures, packing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unigen.batch import Tokens, Vocabulary, pack
from unigen.document import Condition, Document, Segment, read_image
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
    assert vocabulary.image_codes(ids).tolist() == [0, 31]
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
            joined.handlers += t.handlers
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


def test_conditions_survive_json(tmp_path: Path) -> None:
    depth, boxes = Image.new("RGB", (8, 4), "gray"), [(0, 0.25, 0.5, 1)]
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    document = Document.of("a red dog")
    document.conditions = {
        "depth": Condition("depth", depth),
        "where": Condition("boxes", boxes),
        "look": Condition("reference", tmp_path / "a.png"),
    }
    again = Document.from_json(json.loads(json.dumps(document.to_json())))
    assert {name: c.kind for name, c in again.conditions.items()} == {
        "depth": "depth",
        "where": "boxes",
        "look": "reference",
    }
    assert again.conditions["depth"].value.tobytes() == depth.tobytes()
    assert again.conditions["where"].value == [(0.0, 0.25, 0.5, 1.0)]
    assert again.conditions["look"].value == str(tmp_path / "a.png")
    assert Document.of(again).conditions == again.conditions and Document.of(again).conditions is not again.conditions
    assert "conditions" not in Document.of("a red dog").to_json()


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: Condition("pose", Image.new("L", (4, 4))), "unknown condition 'pose': one of mask, boxes"),
        (lambda: Condition("depth", 3), "condition depth is a picture, not int"),
        (lambda: Condition("boxes", "a"), "boxes are a list"),
        (lambda: Condition("boxes", [(0, 0, 1)]), "a box is four numbers"),
        (lambda: Condition("boxes", [(0, 0, True, 1)]), "a box is four numbers"),
        (lambda: Condition("boxes", [(0.5, 0, 0.25, 1)]), "left < right"),
        (lambda: Condition("boxes", [(0, 0, 2, 1)]), "shares of width and height"),
        (lambda: Condition.from_json({"kind": "boxes"}), "a kind and boxes or an image"),
        (lambda: Condition.from_json({"kind": "mask", "image": {"png": "?"}}), "not base64|cannot"),
        (lambda: Document([], conditions=["depth"]), "a dict of Condition"),
        (lambda: Document.from_json({"segments": [], "conditions": []}), "an object by name"),
    ],
)
def test_conditions_that_are_none(make: Any, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        make()


def test_conditions_are_refused_by_who_takes_none(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    document = Document.of("a dog")
    document.conditions["depth"] = Condition("depth", Image.new("L", (8, 8)))
    for name in (name for name in engine.model.generators if name != "text"):
        with pytest.raises(ValueError, match=f"{name} takes no condition depth: leave that out, it takes none"):
            engine.build_request(document, "image", generator=name)
    with pytest.raises(ValueError, match="text takes no condition depth"):
        engine.generate(document, "text")
    monkeypatch.setattr(engine.model.generators["masked"], "conditions", frozenset({"depth"}), raising=False)
    assert engine.build_request(document, "image", generator="masked").document.conditions == document.conditions
    document.conditions["where"] = Condition("boxes", [(0, 0, 1, 1)])
    with pytest.raises(ValueError, match="masked takes no condition boxes: leave that out, it takes depth"):
        engine.build_request(document, "image", generator="masked")
