"""The image tokenizer of Emu3: transformers' `Emu3VQVAE`, 8 pixels a code, pictures as one frame of a video.

Does not depend on: families, files, training. Shapes: B batch, C=3 channels, H W pixels, h w grid of codes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from unigen.tokenizers.quantize import check_codes, check_finite


class Emu3VQ(nn.Module):
    """encode / decode without gradient, for pictures of any size that divides by the stride."""

    def __init__(self, net: Any, image_size: int) -> None:
        super().__init__()
        self.net, self._image_size = net, image_size

    @property
    def image_size(self) -> int:
        return self._image_size

    @property
    def grid(self) -> tuple[int, int]:
        side = self._image_size // int(self.net.vision_spatial_factor)
        return side, side

    @property
    def codebook_size(self) -> int:
        return int(self.net.config.codebook_size)

    def config(self) -> dict[str, Any]:
        return {"kind": "emu3_vq", "image_size": self._image_size, "net": self.net.config.to_diff_dict()}

    @torch.no_grad()
    def encode(self, x_BCHW: Tensor) -> Tensor:
        """Pixels in [-1, 1] (B, 3, H, W) -> codes (B, h, w)."""
        sizes = [x_BCHW.shape[2:]] * len(x_BCHW)
        with torch.autocast(x_BCHW.device.type, enabled=False):
            output = self.net.encode(x_BCHW, sizes)
        check_finite(output.last_hidden_state)
        return torch.stack(output.image_tokens).long()

    @torch.no_grad()
    def decode(self, codes_Bhw: Tensor) -> Tensor:
        """Codes (B, h, w) -> pixels in [-1, 1] (B, 3, H, W), fp32. ValueError for codes out of range."""
        check_codes(codes_Bhw, self.codebook_size)
        return self.net.decode(codes_Bhw).float().clamp(-1, 1)  # type: ignore[no-any-return]


def from_config(config: dict[str, Any]) -> Emu3VQ:
    """The tokenizer described by `Emu3VQ.config()` (kind left out), untrained."""
    from transformers import Emu3VQVAE, Emu3VQVAEConfig

    return Emu3VQ(Emu3VQVAE(Emu3VQVAEConfig(**config["net"])), int(config["image_size"]))
