"""Image readers: they encode pictures for the backbone. A model may have several.

    codes = model.readers["codes"].encode(pixels)                  # (N, h, w), ids of the vocabulary
    features = model.readers["vision"].encode(pixels)              # (N, P, D), vectors that the backbone reads

Codes are ids of the vocabulary and are embedded by the backbone's table. All other readers give vectors, which
`unigen.model.inputs.build_inputs` puts at the positions of the picture, in training and in inference alike.
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
    """An encoder of pictures for the backbone."""

    name: str
    """Its key in the model's readers, and the handler in `Tokens` of pictures that it reads."""
    trainable: bool
    """Whether gradients flow through `encode`."""

    def num_positions(self, grid: tuple[int, int]) -> int:
        """Positions of a picture with a grid of rows and columns of codes."""
        ...

    def encode(self, pixels_NCHW: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) in [-1, 1] -> codes, int64 (N, h, w), or features (N, P, D)."""
        ...

    def embed(self, encoded: Tensor) -> Tensor:
        """The output of `encode` -> embeddings (N, P, D) for the backbone."""
        ...


class CodeReader:
    """Reads pictures as codes of the model's image tokenizer, which are ids of the vocabulary. The tokenizer is
    frozen."""

    name = "codes"
    trainable = False

    def __init__(
        self, image_tokenizer: ImageTokenizer, vocabulary: Vocabulary, embed_ids: Callable[[Tensor], Tensor]
    ) -> None:
        """
        Args:
            image_tokenizer: encodes pixels as codes.
            vocabulary: gives the ids of codes.
            embed_ids: ids (N, P) -> embeddings (N, P, D), by the backbone's table.
        """
        self._image_tokenizer = image_tokenizer
        self._vocabulary, self._embed_ids = vocabulary, embed_ids

    def num_positions(self, grid: tuple[int, int]) -> int:
        """One position for each code."""
        return grid[0] * grid[1]

    @torch.no_grad()
    def encode(self, pixels_NCHW: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) in [-1, 1] -> codes, int64 (N, h, w)."""
        weight = next(self._image_tokenizer.parameters())
        return self._image_tokenizer.encode(pixels_NCHW.to(weight.device, weight.dtype))

    def embed(self, encoded: Tensor) -> Tensor:
        """Codes (N, h, w) -> embeddings (N, h w, D)."""
        return self._embed_ids(self._vocabulary.image_ids(encoded).flatten(1))


class VisionEncoder(nn.Module):
    """Reads pictures as features: vectors that the backbone reads in place of embeddings of ids."""

    name = "vision"
    trainable = True
    num_tokens: int
    """Positions of a picture."""

    def num_positions(self, grid: tuple[int, int]) -> int:
        """`num_tokens`, whatever the grid of codes."""
        return self.num_tokens

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) in [-1, 1] -> features (N, num_tokens, D)."""
        raise TypeError("a vision encoder defines forward()")

    def encode(self, pixels_NCHW: Tensor) -> Tensor:
        """`forward`, with the hooks of a module."""
        features_NPD: Tensor = self(pixels_NCHW)
        return features_NPD

    def embed(self, encoded: Tensor) -> Tensor:
        """The features themselves."""
        return encoded

    def config(self) -> dict[str, object]:
        """The settings from which it is built again, saved as its config.json."""
        return {}
