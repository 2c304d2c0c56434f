"""The image tokenizer of Emu3: transformers' `Emu3VQVAE`, 8 pixels a code, pictures as one frame of a video.

Does not depend on: families, files, training. Shapes: B batch, C=3 channels, H W pixels, h w grid of codes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unigen.tokenizers.quantize import check_codes, check_finite

if TYPE_CHECKING:
    from transformers import Emu3VQVAE


class Emu3VQ(nn.Module):
    """Emu3's tokenizer. `encode` and `decode` take no gradient, and pictures of any size that divides by the stride."""

    def __init__(self, net: Emu3VQVAE, image_size: int) -> None:
        """
        Args:
            net: the network of transformers.
            image_size: pixels along a side of the pictures of the model.
        """
        super().__init__()
        self.net, self._image_size = net, image_size

    @property
    def image_size(self) -> int:
        """Pixels along a side of the pictures of the model."""
        return self._image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns (h, w) of codes of a picture of that size."""
        side = self._image_size // int(self.net.vision_spatial_factor)
        return side, side

    @property
    def codebook_size(self) -> int:
        """Number of codes; codes are in [0, codebook_size)."""
        return int(self.net.config.codebook_size)

    def config(self) -> dict[str, object]:
        """Return the kind, the image size and the configuration of the network."""
        return {"kind": "emu3_vq", "image_size": self._image_size, "net": self.net.config.to_diff_dict()}

    @torch.no_grad()
    def encode(self, x_BCHW: Tensor) -> Tensor:
        """Encode pictures, in fp32 also under autocast.

        Args:
            x_BCHW: pixels in [-1, 1], (B, 3, H, W).

        Returns:
            Codes (B, h, w), int64.

        Raises:
            NonFiniteError: a feature is infinite or nan.
        """
        sizes = [x_BCHW.shape[2:]] * len(x_BCHW)
        with torch.autocast(x_BCHW.device.type, enabled=False):
            output = self.net.encode(x_BCHW, sizes)
        check_finite(output.last_hidden_state)
        return torch.stack(output.image_tokens).long()

    @torch.no_grad()
    def decode(self, codes_Bhw: Tensor) -> Tensor:
        """Decode pictures.

        Args:
            codes_Bhw: codes (B, h, w), int64.

        Returns:
            Pixels in [-1, 1], (B, 3, H, W), fp32.

        Raises:
            ValueError: a code is out of range.
        """
        check_codes(codes_Bhw, self.codebook_size)
        return self.net.decode(codes_Bhw).float().clamp(-1, 1)  # type: ignore[no-any-return]


def from_config(config: dict[str, Any]) -> Emu3VQ:
    """Build an untrained tokenizer.

    Args:
        config: of `Emu3VQ.config`, kind left out.

    Returns:
        The tokenizer.
    """
    from transformers import Emu3VQVAE, Emu3VQVAEConfig

    return Emu3VQ(Emu3VQVAE(Emu3VQVAEConfig(**config["net"])), int(config["image_size"]))
