"""A part of a picture painted anew: what of its codes stays, and how what is made is laid back into it.

    options, lay = keeping(model, picture, mask, None, {"guidance": 3.0})
    painted = lay(engine.generate("a red hat", **options))

A code is painted anew where the mask touches what it shows, or where the family's own rule says so; all other pixels
stay as they were, not as the tokenizer would say them again. The file refuses to know: how a generator keeps codes
(`takes` says whether it can), prompts.
Shapes: h x w codes of a picture of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from unigen.images import read_image, read_mask
from unigen.model import UnifiedModel
from unigen.sequence import square, to_images
from unigen.templates import MaskReader


def keeping(
    model: UnifiedModel, image: Any, mask: Any, generator: str | None, options: dict[str, Any]
) -> tuple[dict[str, Any], Callable[[Image.Image], Image.Image]]:
    """The options of a request that paints what the mask marks, and what lays the picture so made into this one.

    mask: of the image's shape, white where to paint (`unigen.images.read_mask`). generator: None takes `masked`, or
    else the first that can.
    Raises ValueError where the mask marks nothing, and for a generator that cannot keep codes."""
    able = [name for name in model.generators if "fixed" in model.generators.takes(name)]
    if not able:
        raise ValueError("this model cannot keep a part of a picture: train it with writers.masked=1")
    generator = generator or ("masked" if "masked" in able else able[0])
    if generator in model.generators and generator not in able:
        raise ValueError(f"{generator} cannot keep a part of a picture: choose {' or '.join(able)}")
    height, width = model.image_tokenizer.grid
    given, marks = read_image(image), read_mask(mask)
    if given.size != marks.size:
        raise ValueError(f"the mask is of {marks.size} pixels, the picture of {given.size}: make them alike")
    if isinstance(model.template, MaskReader):
        cells_hw = model.template.mask_cells(marks, model.image_tokenizer.image_size, (height, width))
    else:
        marked_HW = square(marks, min(marks.size)) >= 128  # all templates that can cut out the centre square
        rows, columns = (np.arange(n) * len(marked_HW) // n for n in (height, width))
        cells_hw = np.logical_or.reduceat(np.logical_or.reduceat(marked_HW, rows, 0), columns, 1)
    if not cells_hw.any():
        raise ValueError("the mask marks nothing: paint white what is to be made anew")
    pixels = model.pixels([given])
    codes_hw = model.codes(pixels)[0].cpu()
    fixed = torch.where(torch.from_numpy(cells_hw), -1, codes_hw)
    kept = np.asarray(to_images(pixels)[0])
    anew = cells_hw.repeat(len(kept) // height, 0).repeat(len(kept) // width, 1)[..., None]

    def lay(made: Image.Image) -> Image.Image:
        return Image.fromarray(np.where(anew, np.asarray(made), kept))

    return options | {"generator": generator, "fixed": fixed}, lay


def lot(model: UnifiedModel, image: Any, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The picture as the model frames it, and a mask of so large a share of its cells, drawn by lot."""
    tokenizer = model.image_tokenizer
    (height, width), size = tokenizer.grid, tokenizer.image_size
    cells = np.random.default_rng(seed).random((height, width, 1)) < share
    mask = np.where(cells, 255, 0).astype(np.uint8).repeat(size // height, 0).repeat(size // width, 1)
    return square(read_image(image), size), mask.repeat(3, 2)
