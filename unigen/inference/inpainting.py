"""Inpainting: which codes of an image stay, and how the generated image is pasted into the original.

    options, composite = prepare_inpainting(model, image, mask, None, {"guidance": 3.0})
    inpainted = composite(engine.generate("a red hat", **options))

A code is regenerated where the mask touches its pixels, or where the family's own rule says so. The generated image
is scaled to the original's size. Pixels that are not marked stay those of the original, without a reconstruction by
the tokenizer.
Does not depend on: how a generator keeps codes (`Generator.options` says whether it can), prompts.
Shapes: h x w codes of an image of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from unigen.generators.options.inpainting import Inpainting
from unigen.media.images import ImageSource, read_image, read_mask
from unigen.media.pixels import center_crop_resize
from unigen.model.unified import UnifiedModel


def prepare_inpainting(
    model: UnifiedModel, image: ImageSource, mask: ImageSource, generator: str | None, options: dict[str, object]
) -> tuple[dict[str, object], Callable[[Image.Image], Image.Image]]:
    """Prepare a request that generates the masked part of an image.

    Args:
        model: generates.
        image: the original, as `unigen.media.images.read_image` takes it.
        mask: of the image's size, white where to generate (`unigen.media.images.read_mask`).
        generator: name of the generator; None is `masked`, or else the first that can keep codes.
        options: other options of the request.

    Returns:
        The options of the request, and a function that pastes the generated image into the original.

    Raises:
        ValueError: the mask marks nothing, its size differs from the image's, or the generator cannot keep codes.
    """
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
        raise ValueError("the mask marks nothing: paint white the region to regenerate")
    codes_hw = model.encode_images(model.preprocess_images([crop]))[0].cpu()
    fixed_codes = torch.where(torch.from_numpy(cells_hw), -1, codes_hw)
    pixel = np.arange(len(mask_HW))
    cell_rows, cell_columns = (np.searchsorted(start, pixel, "right") - 1 for start in (rows, columns))
    paste_mask = Image.fromarray(mask_HW & cells_hw[cell_rows][:, cell_columns])

    def composite(generated: Image.Image) -> Image.Image:
        result = original.copy()
        result.paste(generated.resize(crop.size, Image.Resampling.LANCZOS), crop_box, paste_mask)
        return result

    return options | {"generator": generator, "fixed_codes": fixed_codes}, composite


def square_crop_box(mask: Image.Image) -> tuple[int, int, int, int]:
    """The square of an image that is the model's input while it inpaints.

    It is as large as fits into the image, and as near to the middle of the marks as possible. Marks outside it have no
    effect.

    Args:
        mask: of the image's size, white where to generate.

    Returns:
        Left, top, right and bottom, in pixels.
    """
    side = min(mask.size)
    left, top, right, bottom = mask.getbbox() or (0, 0, *mask.size)
    x, y = (
        min(max((start + stop - side) // 2, 0), length - side)
        for start, stop, length in ((left, right, mask.width), (top, bottom, mask.height))
    )
    return x, y, x + side, y + side


def limiting_window(mask: ImageSource) -> tuple[int, int, int, int] | None:
    """The window to which inpainting is limited.

    Args:
        mask: white where to generate.

    Returns:
        Left, top, right and bottom in pixels, where the mask also marks pixels outside, which stay as they are; else
        None.
    """
    mask_image = read_mask(mask)
    crop_box = square_crop_box(mask_image)
    mask_image.paste(0, crop_box)
    return crop_box if mask_image.getbbox() else None


def random_mask(model: UnifiedModel, image: ImageSource, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A random mask of an image.

    Args:
        model: defines the size and the grid of codes.
        image: as `unigen.media.images.read_image` takes it.
        share: fraction in (0, 1] of the codes to mark; at least one is marked.
        seed: seed of the choice.

    Returns:
        The image, cropped and resized as the model reads it, and the mask: uint8 (H, W, 3) each.
    """
    tokenizer = model.image_tokenizer
    (height, width), size = tokenizer.grid, tokenizer.image_size
    noise = np.random.default_rng(seed).random((height, width, 1))
    cells = noise < max(share, np.nextafter(noise.min(), 1))  # at least one
    mask = np.where(cells, 255, 0).astype(np.uint8).repeat(size // height, 0).repeat(size // width, 1)
    return center_crop_resize(read_image(image), size), mask.repeat(3, 2)
