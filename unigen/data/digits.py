"""Handwritten digits that need no download: scikit-learn's `load_digits`, 1,797 pictures of 8x8 grey levels.

    images, labels = digits.load_split(held_out=False)            # uint8 (N, 8, 8) of 0..16, int64 (N,)
    picture = digits.picture(images[0], 32)                 # uint8 (32, 32, 3)

A real-data anchor for class-conditional models (Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits).
It does not depend on models and training."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unigen.utils.extras import require_extra

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MAX_GRAY_LEVEL = 16  # the brightest
NUM_HELD_OUT = 360


@cache
def _load_all() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    require_extra("eval", "sklearn")
    from sklearn.datasets import load_digits

    dataset = load_digits()
    order = np.random.default_rng(0).permutation(len(dataset.target))
    return dataset.images[order].astype(np.uint8), dataset.target[order].astype(np.int64)


def load_split(held_out: bool) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The training part, or the 360 digits that it never shows: pictures (N, 8, 8) and what they are (N,)."""
    images, labels = _load_all()
    part = slice(None, NUM_HELD_OUT) if held_out else slice(NUM_HELD_OUT, None)
    return images[part], labels[part]


def to_rgb_image(digit: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """A digit as an RGB picture (size, size, 3), white on black."""
    grey = Image.fromarray((digit.astype(np.float32) * (255 / MAX_GRAY_LEVEL)).round().astype(np.uint8))
    return np.array(grey.resize((size, size), Image.Resampling.BICUBIC).convert("RGB"))


def to_digit(picture: Image.Image) -> NDArray[np.float32]:
    """A picture as a digit again: grey levels (8, 8) of 0..16."""
    grey = picture.convert("L").resize((8, 8), Image.Resampling.BOX)
    return np.asarray(grey).astype(np.float32) * (MAX_GRAY_LEVEL / 255)
