"""A part of a picture painted anew: what of its codes stays, and how what is made is laid back into it.

    options, composite = prepare_inpainting(model, picture, mask, None, {"guidance": 3.0})
    painted = composite(engine.generate("a red hat", **options))

A code is painted anew where the mask touches what it shows, or where the family's own rule says so. What is painted is
scaled to the picture's size; pixels that are not marked stay as they were, not as the tokenizer would say them again.
Does not depend on: how a generator keeps codes (`Generator.options` says whether it can), prompts.
Shapes: h x w codes of a picture of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from unigen.generators.options.inpainting import Inpainting
from unigen.media.images import read_image, read_mask
from unigen.media.pixels import center_crop_resize
from unigen.model.unified import UnifiedModel


def prepare_inpainting(
    model: UnifiedModel, image: Any, mask: Any, generator: str | None, options: dict[str, Any]
) -> tuple[dict[str, Any], Callable[[Image.Image], Image.Image]]:
    """The options of a request that paints what the mask marks, and what lays the picture so made into this one.

    mask: of the image's shape, white where to paint (`unigen.media.images.read_mask`). generator: None takes `masked`,
    or else the first that can. Raises ValueError where the mask marks nothing, and for a generator that cannot keep
    codes."""
    capable_generators = [name for name in model.generators if Inpainting in model.generators.options(name)]
    if not capable_generators:
        raise ValueError("this model cannot keep a part of a picture: train it with generators.masked=1")
    generator = generator or ("masked" if "masked" in capable_generators else capable_generators[0])
    if generator in model.generators and generator not in capable_generators:
        raise ValueError(f"{generator} cannot keep a part of a picture: choose {' or '.join(capable_generators)}")
    grid = model.image_tokenizer.grid
    original, mask_image = read_image(image), read_mask(mask)
    if original.size != mask_image.size:
        raise ValueError(f"the mask is of {mask_image.size} pixels, the picture of {original.size}: make them alike")
    crop_box = square_crop_box(mask_image)
    crop, crop_mask = original.crop(crop_box), mask_image.crop(crop_box)
    mask_HW = np.asarray(crop_mask) >= 128
    rows, columns = (np.arange(n) * len(mask_HW) // n for n in grid)
    cells_hw = model.template.mask_to_cells(crop_mask, model.image_tokenizer.image_size, grid)
    if not cells_hw.any():
        raise ValueError("the mask marks nothing: paint white what is to be made anew")
    codes_hw = model.encode_images(model.preprocess_images([crop]))[0].cpu()
    fixed_codes = torch.where(torch.from_numpy(cells_hw), -1, codes_hw)
    pixel = np.arange(len(mask_HW))
    cell_rows, cell_columns = (np.searchsorted(start, pixel, "right") - 1 for start in (rows, columns))
    paste_mask = Image.fromarray(mask_HW & cells_hw[cell_rows][:, cell_columns])

    def composite(made: Image.Image) -> Image.Image:
        result = original.copy()
        result.paste(made.resize(crop.size, Image.Resampling.LANCZOS), crop_box, paste_mask)
        return result

    return options | {"generator": generator, "fixed_codes": fixed_codes}, composite


def square_crop_box(mask: Image.Image) -> tuple[int, int, int, int]:
    """The square of a picture that a model sees while it paints: left, top, right, bottom. It is as large as fits, and
    lies as near the middle of what the mask marks as it can; marks beyond it change nothing."""
    side = min(mask.size)
    left, top, right, bottom = mask.getbbox() or (0, 0, *mask.size)
    x, y = (
        min(max((start + stop - side) // 2, 0), length - side)
        for start, stop, length in ((left, right, mask.width), (top, bottom, mask.height))
    )
    return x, y, x + side, y + side


def limiting_window(mask: Any) -> tuple[int, int, int, int] | None:
    """The window of a mask, where the mask also marks pixels outside it, which stay as they are; else None."""
    mask_image = read_mask(mask)
    crop_box = square_crop_box(mask_image)
    mask_image.paste(0, crop_box)
    return crop_box if mask_image.getbbox() else None


def random_mask(model: UnifiedModel, image: Any, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The picture as the model frames it, and a mask of so large a share of its cells, at least one, drawn by lot."""
    tokenizer = model.image_tokenizer
    (height, width), size = tokenizer.grid, tokenizer.image_size
    noise = np.random.default_rng(seed).random((height, width, 1))
    cells = noise < max(share, np.nextafter(noise.min(), 1))  # one at least
    mask = np.where(cells, 255, 0).astype(np.uint8).repeat(size // height, 0).repeat(size // width, 1)
    return center_crop_resize(read_image(image), size), mask.repeat(3, 2)
