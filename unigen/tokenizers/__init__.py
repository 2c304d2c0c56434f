"""Image tokenizers: pixels <-> codes. The protocol, and saving and loading by kind.

The kind in a folder's config.json is the name of a module in this package ("vq" -> unigen/tokenizers/vq.py) that has
`from_config(dict)`; there is no registry. Knows nothing of vocabularies, backbones or training.

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

from unigen.config import save_json
from unigen.hub.resolve import read_json
from unigen.hub.weights import load_strict, read_tensors, write_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class StoredTokenizer(Protocol):
    """What writing a tokenizer needs of it."""

    def config(self) -> dict[str, object]: ...  # {"kind": ..., ...}: all that builds it again beside the weights

    def state_dict(self) -> dict[str, Tensor]: ...


class ImageTokenizer(StoredTokenizer, Protocol):
    """What everything above needs of an image tokenizer."""

    @property
    def image_size(self) -> int: ...  # pixels along a side of the pictures it was trained on

    @property
    def grid(self) -> tuple[int, int]: ...  # (h, w) for that size

    @property
    def codebook_size(self) -> int: ...  # codes are in [0, codebook_size)

    def encode(self, x_BCHW: Tensor) -> Tensor: ...  # float [-1, 1] -> int64 (B, h, w)

    def decode(self, codes_Bhw: Tensor) -> Tensor: ...  # -> float in [-1, 1]

    # and of torch.nn.Module
    def parameters(self) -> Iterator[Tensor]: ...

    def requires_grad_(self, requires_grad: bool = True) -> object: ...

    def eval(self) -> object: ...


class SquareGridMixin:
    """The sizes of a tokenizer whose `settings` have an image_size and a stride (pixels a code along each side)."""

    settings: Any

    @property
    def image_size(self) -> int:
        return int(self.settings.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        side = self.image_size // int(self.settings.stride)
        return side, side


def save_tokenizer(tokenizer: StoredTokenizer, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
    """Writes model.safetensors and config.json; floats cast to `dtype` (None: kept). Each file is replaced whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / (WEIGHTS + ".part")
    write_tensors(partial, tokenizer.state_dict(), dtype)
    os.replace(partial, folder / WEIGHTS)
    save_json(folder / CONFIG, tokenizer.config())
    return folder


def load_image_tokenizer(folder: str | Path) -> Any:
    """The tokenizer saved in `folder`, in eval mode, fp32, on the CPU. ValueError when the folder does not hold one."""
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
