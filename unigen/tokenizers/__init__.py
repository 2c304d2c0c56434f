"""Image tokenizers: pixels <-> codes. The protocol, and saving and loading by kind.

The kind in a folder's config.json is the name of a module in this package ("vq" -> unigen/tokenizers/vq.py) that has
`from_config(dict)`; there is no registry. Knows nothing of vocabularies, backbones or training.

    from unigen.tokenizers import load_tokenizer, save_tokenizer
    tokenizer = load_tokenizer("folder")
    codes_Bhw = tokenizer.encode(x_BCHW)      # pixels in [-1, 1]
    x_BCHW = tokenizer.decode(codes_Bhw)

Shapes: B batch, C=3 channels, H W pixels, h w grid of codes.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from unigen.config import save_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class ImageTokenizer(Protocol):
    """What everything above needs of an image tokenizer."""

    @property
    def image_size(self) -> int: ...  # pixels along a side of the pictures it was trained on

    @property
    def grid(self) -> tuple[int, int]: ...  # (h, w) for that size

    @property
    def codebook_size(self) -> int: ...  # codes are in [0, codebook_size)

    def encode(self, x_BCHW: Tensor) -> Tensor: ...  # float [-1, 1] -> int64 (B, h, w)

    def decode(self, codes_Bhw: Tensor) -> Tensor: ...  # -> float in [-1, 1]

    def config(self) -> dict[str, Any]: ...  # {"kind": ..., ...}: all that load_tokenizer needs beside the weights

    # and of torch.nn.Module
    def state_dict(self) -> dict[str, Any]: ...

    def parameters(self) -> Iterator[Any]: ...

    def requires_grad_(self, requires_grad: bool = True) -> Any: ...

    def eval(self) -> Any: ...


def save_tokenizer(tokenizer: ImageTokenizer, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
    """Writes model.safetensors and config.json; floats are cast to `dtype` (None: kept). Files are replaced whole."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in tokenizer.state_dict().items():
        tensor = tensor.detach().cpu()
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        tensors[name] = tensor.contiguous().clone()
    partial = folder / (WEIGHTS + ".part")
    save_file(tensors, partial)
    os.replace(partial, folder / WEIGHTS)
    save_json(folder / CONFIG, tokenizer.config())
    return folder


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer saved in `folder`, in eval mode, fp32, on the CPU. ValueError when the folder does not hold one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text())
        kind = config.pop("kind")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{folder} holds no image tokenizer: {CONFIG} is missing or unreadable ({error})") from error
    if not str(kind).isidentifier() or importlib.util.find_spec(f"{__name__}.{kind}") is None:
        raise ValueError(f"{folder / CONFIG}: unknown image tokenizer kind {kind!r}; is this unigen too old?")
    tokenizer = importlib.import_module(f"{__name__}.{kind}").from_config(config)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS} is missing or corrupt ({error}); save or download it again") from error
    wanted = tokenizer.state_dict()
    missing, surplus = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    misfit = [name for name in wanted.keys() & tensors.keys() if wanted[name].shape != tensors[name].shape]
    if missing or surplus or misfit:
        raise ValueError(
            f"{folder / WEIGHTS} does not fit {CONFIG}: missing {missing[:3]}, surplus {surplus[:3]}, "
            f"other shapes {sorted(misfit)[:3]}"
        )
    tokenizer.load_state_dict(tensors)
    return tokenizer.eval()
