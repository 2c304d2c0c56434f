"""What is Chameleon's own: codes among the text, three branches, interleaved answers. Its folder is in test_public."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

import unigen
from tests.parity import chameleon as case
from tests.parity import common
from unigen.batch import Vocabulary
from unigen.document import Document, Segment
from unigen.generators import next_token
from unigen.models import chameleon, convert
from unigen.samplers.logits import SamplingOptions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("chameleon")
    case.checkpoint(made)
    return made


def test_codes_that_spell_themselves(folder: Path) -> None:
    assert chameleon.code_token(102) == "IMGIMGBACZ"
    model = unigen.load(str(folder), "cpu").model
    codes_hw = torch.randint(case.CODES, (8, 8), generator=torch.Generator().manual_seed(0))
    ids_hw = model.vocabulary.image_ids(codes_hw)
    names = model.text_tokenizer.convert_ids_to_tokens(ids_hw.flatten().tolist())
    assert names == [chameleon.code_token(int(code)) for code in codes_hw.flatten()]
    assert torch.equal(model.vocabulary.image_codes(ids_hw), codes_hw) and bool(model.vocabulary.is_image(ids_hw).all())


def test_a_vocabulary_with_codes_among_the_text() -> None:
    vocabulary = Vocabulary(10, 3, 4, (2, 0, 1))
    assert vocabulary.size == 10 and vocabulary.image_ids(torch.arange(3)).tolist() == [5, 6, 4]
    assert vocabulary.is_image(torch.tensor([3, 4, 6, 7])).tolist() == [False, True, True, False]


def test_three_branches(folder: Path) -> None:
    """What each branch of guidance sees, and one scale for the words alone."""
    engine = unigen.load(str(folder), "cpu")
    template = engine.model.template
    asked = Document([Segment(image=torch.zeros(8, 8, dtype=torch.int64)), Segment(text="draw it")])
    lengths = [len(template.prompt(asked, output="image", branch=branch)) for branch in range(3)]
    assert lengths[2] == 1 and lengths[1] == 1 + 66 and lengths[0] > lengths[1]
    assert engine.build_request("a", "image").guidance.scales == (3.0, 1.2)
    assert engine.build_request("a", "image", guidance=5.0).guidance.scales == (5.0, 1.2)
    assert engine.build_request("a", "image", guidance=1.0).guidance.num_branches == 1
    with pytest.raises(ValueError, match="3 branches of guidance: give 2 scales"):
        engine.build_request("a", "image", guidance=(1.0, 2.0, 3.0))


def test_text_is_drawn_as_by_anoles_scripts(folder: Path, tmp_path: Path) -> None:
    """Prompts of interleaved answers do not end the turn; temperature 1, top-p 0.9, and what was written is less
    likely to come again. All of it is kept when the model is converted."""
    convert(folder, tmp_path / "ours")
    for place in (folder, tmp_path / "ours"):
        engine = unigen.load(str(place), "cpu")
        template, known = engine.model.template, engine.model.text_tokenizer.get_vocab()
        words = engine.model.text_tokenizer(case.WORDS, add_special_tokens=False)["input_ids"]
        start, end = known["<s>"], known[chameleon.EOT]
        asked = Document.of(case.WORDS)
        assert template.prompt(asked, output="interleaved").ids == [start, *words]
        assert template.prompt(asked, output="text").ids == [start, *words, end]
        assert template.prompt(asked, output="image").ids == [start, *words, end]
        for output in ("text", "interleaved"):
            assert engine.build_request(case.WORDS, output).text_sampling == SamplingOptions(1.0, 0, 0.9, 1.2)  # type: ignore[arg-type]
        told = engine.build_request(
            case.WORDS, "text", temperature=0.0, top_p=1.0, repetition_penalty=1.0
        ).text_sampling
        assert told == SamplingOptions(0.0)
    assert engine.info()["sampling"]["text"] == chameleon.TEXT_SAMPLING
    with pytest.raises(ValueError, match="next-token does not take repetition_penalty"):
        engine.build_request("a", "image", repetition_penalty=1.2)
    with pytest.raises(ValueError, match="repetition_penalty must be a number from 1"):
        engine.build_request("a", "text", repetition_penalty=0.5)


def test_a_penalty_on_repetition_is_that_of_transformers(folder: Path) -> None:
    """Of the prompt's ids and of those written so far, step after step."""
    from transformers.generation import RepetitionPenaltyLogitsProcessor

    engine, seen = unigen.load(str(folder), "cpu"), []
    for penalty in (1.0, 1.5):
        with common.record_logits(next_token) as steps:
            request = engine.build_request(
                case.WORDS, "text", temperature=0.0, repetition_penalty=penalty, max_tokens=12
            )
            ids = engine.model.template.prompt(request.document, output="text").ids
            list(engine.run_requests([request]))
        seen.append(torch.cat(steps))
    written = [int(logits.argmax()) for logits in seen[1]]
    process, legal = RepetitionPenaltyLogitsProcessor(1.5), seen[0][0].isfinite()
    expected = process(torch.tensor([ids]), seen[0][:1].clone())
    torch.testing.assert_close(seen[1][:1, legal], expected[:, legal], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(seen[0][0, legal], seen[1][0, legal])
    assert len(set(written)) > len({int(logits.argmax()) for logits in seen[0]})


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
