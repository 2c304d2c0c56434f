"""Image tokenizers: pixels <-> codes. The protocol, and saving and loading by kind.

The kind in a folder's config.json is the name of a module in this package ("vq" -> unigen/tokenizers/vq.py) that has
`from_config(dict)`; there is no registry. Does not depend on: vocabularies, backbones, training.

    from unigen.tokenizers import load_image_tokenizer, save_tokenizer
    tokenizer = load_image_tokenizer("folder")
    codes_Bhw = tokenizer.encode(x_BCHW)      # pixels in [-1, 1]
    x_BCHW = tokenizer.decode(codes_Bhw)

Shapes: B batch, C=3 channels, H W pixels, h w grid of codes.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from unigen.hub.resolve import read_json
from unigen.hub.weights import load_strict, read_tensors, write_tensors
from unigen.utils.files import save_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class StoredTokenizer(Protocol):
    """A tokenizer that `save_tokenizer` can write."""

    def config(self) -> dict[str, object]:
        """Return {"kind": ..., ...}: all that rebuilds the tokenizer, beside its weights."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights by name."""


class ImageTokenizer(StoredTokenizer, Protocol):
    """The interface of image tokenizers that models, generators and evaluation use."""

    @property
    def image_size(self) -> int:
        """Pixels along a side of the pictures that the tokenizer was trained on."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns (h, w) of codes of a picture of that size."""

    @property
    def codebook_size(self) -> int:
        """Number of codes; codes are in [0, codebook_size)."""

    def encode(self, x_BCHW: Tensor) -> Tensor:
        """Encode pictures.

        Args:
            x_BCHW: pixels in [-1, 1], (B, 3, H, W).

        Returns:
            Codes (B, h, w), int64.
        """

    def decode(self, codes_Bhw: Tensor) -> Tensor:
        """Decode pictures.

        Args:
            codes_Bhw: codes (B, h, w), int64.

        Returns:
            Pixels in [-1, 1], (B, 3, H, W), floating point.
        """

    def parameters(self) -> Iterator[Tensor]:
        """As `torch.nn.Module.parameters`."""

    def requires_grad_(self, requires_grad: bool = True) -> object:
        """As `torch.nn.Module.requires_grad_`."""

    def eval(self) -> object:
        """As `torch.nn.Module.eval`."""


class SquareGridMixin:
    """The sizes of a tokenizer whose `settings` have an image_size and a stride."""

    settings: Any
    """The configuration, with `image_size` in pixels and `stride`, the pixels of a code along each side."""

    @property
    def image_size(self) -> int:
        """Pixels along a side of the pictures that the tokenizer was trained on."""
        return int(self.settings.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns (h, w) of codes of a picture of that size."""
        side = self.image_size // int(self.settings.stride)
        return side, side


def save_tokenizer(tokenizer: StoredTokenizer, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
    """Write model.safetensors and config.json. Each file is replaced whole.

    Args:
        tokenizer: the tokenizer to be saved.
        folder: where the files go; it is made where it is missing.
        dtype: to which floating-point weights are cast; None keeps theirs.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / (WEIGHTS + ".part")
    write_tensors(partial, tokenizer.state_dict(), dtype)
    os.replace(partial, folder / WEIGHTS)
    save_json(folder / CONFIG, tokenizer.config())
    return folder


def load_image_tokenizer(folder: str | Path) -> Any:
    """Load a tokenizer.

    Args:
        folder: written by `save_tokenizer`.

    Returns:
        The tokenizer in eval mode, in fp32, on the CPU.

    Raises:
        ValueError: the folder does not hold an image tokenizer; in one line.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    kind = str(config.pop("kind", None))
    if not kind.isidentifier() or importlib.util.find_spec(f"{__name__}.{kind}") is None:
        raise ValueError(f"{folder / CONFIG}: no image tokenizer of kind {kind!r}; is this version of unigen too old?")
    try:
        tokenizer = importlib.import_module(f"{__name__}.{kind}").from_config(config)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    load_strict(tokenizer, read_tensors(folder / WEIGHTS), folder / WEIGHTS)
    return tokenizer.eval()
