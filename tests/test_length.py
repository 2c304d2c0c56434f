"""What is far too long for a model is refused before it is split into tokens, and its pictures encoded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from unigen.document import Document
from unigen.inference.segments import MAX_CHARS_PER_POSITION
from unigen.model.readers import VisionEncoder


def test_what_is_far_too_long_is_never_read(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = engine.model, []
    whole = type(model).encode_document

    def noted(self: Any, document: Document) -> Document:
        read.append(document)
        return whole(self, document)

    monkeypatch.setattr(type(model), "encode_document", noted)
    picture = Image.new("RGB", (16, 16))
    codes = model.image_tokenizer.grid[0] * model.image_tokenizer.grid[1]
    for prompt in (
        "ab " * (MAX_CHARS_PER_POSITION * model.max_length),
        [picture] * (model.max_length // codes + 1) + ["what is it?"],
    ):
        with pytest.raises(ValueError, match=f"the model reads {model.max_length:,} positions"):
            engine.new_scheduler().new_sequence(engine.build_request(prompt, "text"))
        assert not read
    with pytest.raises(ValueError, match="positions"):  # what is near the limit is counted as before
        engine.new_scheduler().new_sequence(engine.build_request("ab " * model.max_length, "text"))
    engine.new_scheduler().new_sequence(
        engine.build_request([picture, "a" + " " * MAX_CHARS_PER_POSITION * model.max_length + "b"], "text")
    )
    assert len(read) == 2, "the control: blanks are one"


def test_pictures_that_are_seen_as_features_are_counted_before(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As positions of the model's vision encoder, whatever codes it draws."""
    model, seen = engine.model, []

    class Eyes(VisionEncoder):
        num_tokens = 100

        def forward(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
            seen.append(len(pixels_NCHW))
            raise ValueError("seen")

    monkeypatch.setattr(model, "vision_encoder", Eyes())
    picture, most = Image.new("RGB", (16, 16)), model.max_length // 100
    assert most >= 2
    with pytest.raises(ValueError, match=f"{most + 1} pictures, the model reads {model.max_length:,} positions"):
        engine.new_scheduler().new_sequence(engine.build_request([picture] * (most + 1) + ["what is it?"], "text"))
    assert not seen
    with pytest.raises(ValueError, match="^seen$"):  # the control: as many as fit are looked at
        engine.new_scheduler().new_sequence(engine.build_request([picture] * most + ["what is it?"], "text"))
    assert seen == [most]
