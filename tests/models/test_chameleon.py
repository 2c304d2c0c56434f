"""What is Chameleon's own: codes among the text, three branches, interleaved answers. Its folder is in test_public."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

import unigen
from tests.parity import chameleon as case
from unigen.models import chameleon
from unigen.sequence import Document, Segment, Vocabulary


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("chameleon")
    case.checkpoint(made)
    return made


def test_codes_that_spell_themselves(folder: Path) -> None:
    assert chameleon.spelt(102) == "IMGIMGBACZ"
    model = unigen.load(str(folder), "cpu").model
    codes_hw = torch.randint(case.CODES, (8, 8), generator=torch.Generator().manual_seed(0))
    ids_hw = model.vocabulary.image_ids(codes_hw)
    names = model.text_tokenizer.convert_ids_to_tokens(ids_hw.flatten().tolist())
    assert names == [chameleon.spelt(int(code)) for code in codes_hw.flatten()]
    assert torch.equal(model.vocabulary.codes(ids_hw), codes_hw) and bool(model.vocabulary.is_image(ids_hw).all())


def test_a_vocabulary_with_codes_among_the_text() -> None:
    vocabulary = Vocabulary(10, 3, 4, (2, 0, 1))
    assert vocabulary.size == 10 and vocabulary.image_ids(torch.arange(3)).tolist() == [5, 6, 4]
    assert vocabulary.is_image(torch.tensor([3, 4, 6, 7])).tolist() == [False, True, True, False]


def test_three_branches(folder: Path) -> None:
    """What each branch of guidance sees, and one scale for the words alone."""
    engine = unigen.load(str(folder), "cpu")
    template = engine.model.template
    asked = Document([Segment(image=torch.zeros(8, 8, dtype=torch.int64)), Segment(text="draw it")])
    lengths = [len(template.prompt(asked, output="image", blind=branch)) for branch in range(3)]
    assert lengths[2] == 1 and lengths[1] == 1 + 66 and lengths[0] > lengths[1]
    assert engine.request("a", "image").guidance.scales == (3.0, 1.2)
    assert engine.request("a", "image", guidance=5.0).guidance.scales == (5.0, 1.2)
    assert engine.request("a", "image", guidance=1.0).guidance.branches == 1
    with pytest.raises(ValueError, match="3 branches of guidance: give 2 scales"):
        engine.request("a", "image", guidance=(1.0, 2.0, 3.0))


def test_an_answer_of_text_and_pictures(folder: Path) -> None:
    """The stream is what the batch gives; no code is in a text, and an edit reads the picture."""
    engine = unigen.load(str(folder), "cpu")
    options = {"seed": 1, "max_tokens": 30, "max_images": 2, "temperature": 1.0}
    parts = list(engine.stream("draw a story", **options))
    assert all(isinstance(part, str | Image.Image) for part in parts)
    assert "IMGIMG" not in "".join(part for part in parts if isinstance(part, str))
    whole = engine.generate("draw a story", "interleaved", **options)
    assert [p for p in whole if not isinstance(p, str)] == [p for p in parts if not isinstance(p, str)]
    one, other = (engine.edit(Image.new("RGB", (40, 32), color), "draw it") for color in ("red", "blue"))
    assert one.size == (32, 32) and one.tobytes() != other.tobytes()
