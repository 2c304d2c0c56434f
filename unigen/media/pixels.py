"""Between PIL pictures and tensors of pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unigen.media.images import ImageSource, read_image
from unigen.utils.numbers import NonFiniteError

MAX_ASPECT_RATIO = 50
"""How many times as long as wide a picture may be that a model reads."""
ImagePreprocess = Callable[[Image.Image, int], np.ndarray]
"""How a picture is brought to a square of so many pixels, uint8 (size, size, 3): `center_crop_resize`, or a family's
own way."""


def center_crop_resize(image: Image.Image, size: int) -> np.ndarray:
    """The picture's centre square, resized: uint8 (size, size, 3)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    return np.asarray(image)


def to_pixels(images: Sequence[ImageSource], size: int, frame: ImagePreprocess = center_crop_resize) -> Tensor:
    """Pictures as float32 (N, 3, size, size) in [-1, 1].

    Args:
        images: all that `read_image` takes; uint8 arrays (size, size, 3) are taken as they are, without a frame.
        size: of the result, in pixels along a side.
        frame: brings an image to this size.

    Raises:
        ValueError: for what cannot be read, and for a picture that is far too long: a frame may resize the whole of it
            before it cuts.
    """
    arrays = []
    for image in images:
        if not (isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape == (size, size, 3)):
            picture = read_image(image)
            width, height = picture.size
            if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
                raise ValueError(
                    f"image of {width}x{height} pixels is too long: at most {MAX_ASPECT_RATIO} to 1, so cut it"
                )
            image = frame(picture, size)
        arrays.append(image)
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels_BCHW: Tensor) -> list[Image.Image]:
    """Pictures from float pixels in [-1, 1]. Raises NonFiniteError where one of them is no number."""
    if not bool(pixels_BCHW.isfinite().all()):
        raise NonFiniteError("pixels", pixels_BCHW.dtype)
    array = ((pixels_BCHW.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(a) for a in array]


def stack_images(images: Sequence[ImageSource], size: int, frame: ImagePreprocess = center_crop_resize) -> Tensor:
    """What is given as tensors, codes or latents, stacked (N, ...); else pixels (N, 3, size, size) in [-1, 1]."""
    tensors = [image for image in images if isinstance(image, Tensor)]
    if len(tensors) == len(images):
        return torch.stack(tensors)
    if tensors:
        raise ValueError("a batch mixes images given as codes with images given as pixels: encode all or none")
    return to_pixels(images, size, frame)
