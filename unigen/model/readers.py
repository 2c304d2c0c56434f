"""Image readers: how a model reads pictures. A model may have several of them.

    codes = model.readers["codes"].encode(pixels)                  # (N, h, w), ids of the vocabulary
    features = model.readers["vision"].encode(pixels)              # (N, P, D), vectors that the backbone reads

A reader whose pictures are ids of the vocabulary is read through the backbone's table of embeddings. All others give
vectors, which `unigen.model.inputs.build_inputs` puts where the picture stands, in training and in inference alike.
Shapes: N pictures, P positions of a picture, h x w codes, D width of the backbone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from unigen.batch import Vocabulary
from unigen.tokenizers import ImageTokenizer


class ImageReader(Protocol):
    """One way of reading pictures."""

    name: str
    """Its name among the model's readers; also the layout of pictures in `Tokens` that are read by it."""
    trainable: bool
    """Do gradients flow through `encode`?"""

    def num_positions(self, grid: tuple[int, int]) -> int:
        """Positions of a picture that has so many rows and columns of codes."""
        ...

    def encode(self, pixels_NCHW: Tensor) -> Tensor:
        """Pixels in [-1, 1] as codes, int64 (N, h, w), or as features (N, P, D)."""
        ...

    def embed(self, encoded: Tensor) -> Tensor:
        """What the backbone reads (N, P, D) for what `encode` gave."""
        ...


class CodeReader:
    """Reads pictures as codes of the model's image tokenizer: ids of the vocabulary. The image tokenizer is frozen."""

    name = "codes"
    trainable = False

    def __init__(
        self, image_tokenizer: ImageTokenizer, vocabulary: Vocabulary, embed_ids: Callable[[Tensor], Tensor]
    ) -> None:
        """
        Args:
            image_tokenizer: gives the codes.
            vocabulary: which id a code has.
            embed_ids: the backbone's table of embeddings.
        """
        self._image_tokenizer = image_tokenizer
        self._vocabulary, self._embed_ids = vocabulary, embed_ids

    def num_positions(self, grid: tuple[int, int]) -> int:
        return grid[0] * grid[1]

    @torch.no_grad()
    def encode(self, pixels_NCHW: Tensor) -> Tensor:
        weight = next(self._image_tokenizer.parameters())
        return self._image_tokenizer.encode(pixels_NCHW.to(weight.device, weight.dtype))

    def embed(self, encoded: Tensor) -> Tensor:
        return self._embed_ids(self._vocabulary.image_ids(encoded).flatten(1))


class VisionEncoder(nn.Module):
    """Reads pictures as features: vectors that the backbone reads in place of embeddings of ids."""

    name = "vision"
    trainable = True
    num_tokens: int
    """Positions of a picture."""

    def num_positions(self, grid: tuple[int, int]) -> int:
        return self.num_tokens

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        """Pixels in [-1, 1] (N, 3, H, W) -> features (N, num_tokens, D)."""
        raise TypeError("a vision encoder defines forward()")

    def encode(self, pixels_NCHW: Tensor) -> Tensor:
        features_NPD: Tensor = self(pixels_NCHW)
        return features_NPD

    def embed(self, encoded: Tensor) -> Tensor:
        return encoded

    def config(self) -> dict[str, object]:
        """The settings that build it again, saved as its config.json."""
        return {}
