"""What is far too long for a model is refused before it is split into tokens, and its pictures encoded."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from unigen.running import CHARACTERS
from unigen.sequence import Document


def test_what_is_far_too_long_is_never_read(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = engine.model, []
    whole = type(model).read

    def noted(self: Any, document: Document) -> Document:
        read.append(document)
        return whole(self, document)

    monkeypatch.setattr(type(model), "read", noted)
    picture = Image.new("RGB", (16, 16))
    codes = model.image_tokenizer.grid[0] * model.image_tokenizer.grid[1]
    for prompt in ("ab " * (CHARACTERS * model.context), [picture] * (model.context // codes + 1) + ["what is it?"]):
        with pytest.raises(ValueError, match=f"the model reads {model.context:,} positions"):
            engine.running().row(engine.request(prompt, "text"))
        assert not read
    with pytest.raises(ValueError, match="positions"):  # what is near the limit is counted as before
        engine.running().row(engine.request("ab " * model.context, "text"))
    engine.running().row(engine.request([picture, "a" + " " * CHARACTERS * model.context + "b"], "text"))
    assert len(read) == 2, "the control: blanks are one"
