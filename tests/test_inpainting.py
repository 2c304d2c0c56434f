"""What is painted anew by lot."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from unigen.inference.inpainting import prepare_inpainting, random_mask


@pytest.mark.parametrize("share", [1e-9, 0.3, 1.0])
def test_a_share_however_small_marks_a_cell(engine: Any, share: float) -> None:
    picture = Image.new("RGB", (20, 30), "red")
    size, (height, width) = engine.model.image_tokenizer.image_size, engine.model.image_tokenizer.grid
    counts = []
    for seed in range(5):
        around, mask = random_mask(engine.model, picture, share, seed)
        cells = mask[:: size // height, :: size // width, 0] > 0
        drawn = np.random.default_rng(seed).random((height, width))
        assert (cells == (drawn < share)).all() if (drawn < share).any() else cells.sum() == 1
        counts.append(int(cells.sum()))
        options, _ = prepare_inpainting(engine.model, around, mask, None, {})
        assert int((options["fixed_codes"] < 0).sum()) == cells.sum()
    if share == 1:
        assert counts == [height * width] * 5, "the control"
    if share < 0.1:
        assert counts == [1] * 5
