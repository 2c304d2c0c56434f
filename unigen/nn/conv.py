"""Convolutional parts of the image tokenizers: residual block, attention over a map, encoder, decoder, discriminator.

All parts are fully convolutional: an image works where its sides divide by 8. Convolutions at full resolution are
slow on a CPU, so the stem folds 4x4 pixels into channels (space-to-depth) and the head unfolds them again (Shi et al.
2016, "sub-pixel convolution"). Does not depend on: codes, losses, files, data.

Shapes: B batch, C channels, H W pixels, h w the map at the resolution of the codes (H/8, W/8), D code dimension.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)

STRIDE = 8  # pixels per code along each side: 4 by the stem, 2 by one strided convolution


def to_channels_last(module: ModuleT) -> ModuleT:
    """Convert the weights of a module's convolutions to channels_last, the memory format that is fast on a CPU.

    Args:
        module: changed in place.

    Returns:
        The module itself.
    """
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]  # torch's stub


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with 16 channels a group.

    Args:
        channels: number of channels, a multiple of 16.
    """
    assert channels % 16 == 0, channels
    return nn.GroupNorm(channels // 16, channels, eps=1e-6)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); the second convolution starts at zero: a new block is the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = group_norm(channels), group_norm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Features (B, C, H, W) of the input's shape."""
        hidden = self.conv1(F.silu(self.norm1(x_BCHW)))
        return x_BCHW + self.conv2(F.silu(self.norm2(hidden)))


class MapAttention(nn.Module):
    """Residual self-attention among the positions of a map. It has no position embedding: the convolutions carry
    position."""

    def __init__(self, channels: int, heads: int = 4) -> None:
        super().__init__()
        assert channels % heads == 0, (channels, heads)
        self.heads = heads
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Features (B, C, H, W) of the input's shape."""
        b, c, h, w = x_BCHW.shape
        qkv = self.qkv(self.norm(x_BCHW)).reshape(b, 3, self.heads, c // self.heads, h * w).transpose(-1, -2)
        attended = F.scaled_dot_product_attention(qkv[:, 0], qkv[:, 1], qkv[:, 2])
        return x_BCHW + self.out(attended.transpose(-1, -2).reshape(b, c, h, w))


class Encoder(nn.Module):
    """Pixels (B, 3, H, W) -> features (B, D, H/8, W/8)."""

    def __init__(
        self, channels: int, wide: int, blocks: tuple[int, int], code_dim: int, attention: bool = True
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, channels, 3, padding=1))
        self.fine = nn.Sequential(*(ResBlock(channels) for _ in range(blocks[0])))
        self.down = nn.Conv2d(channels, wide, 3, stride=2, padding=1)
        self.coarse = nn.Sequential(*(ResBlock(wide) for _ in range(blocks[1])))
        self.mix = MapAttention(wide) if attention else nn.Identity()
        self.norm = group_norm(wide)
        self.head = nn.Conv2d(wide, code_dim, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Features (B, D, H/8, W/8) of pixels (B, 3, H, W)."""
        hidden = self.mix(self.coarse(self.down(self.fine(self.stem(x_BCHW)))))
        return self.head(F.silu(self.norm(hidden)))


class Decoder(nn.Module):
    """Quantised features (B, D, h, w) -> pixels (B, 3, 8h, 8w), not clamped."""

    def __init__(
        self, channels: int, wide: int, blocks: tuple[int, int], code_dim: int, attention: bool = True
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(code_dim, wide, 3, padding=1)
        self.mix = MapAttention(wide) if attention else nn.Identity()
        self.coarse = nn.Sequential(*(ResBlock(wide) for _ in range(blocks[1])))
        self.up = nn.Sequential(nn.Conv2d(wide, 4 * channels, 1), nn.PixelShuffle(2))
        self.fine = nn.Sequential(*(ResBlock(channels) for _ in range(blocks[0])))
        self.norm = group_norm(channels)
        self.last = nn.Conv2d(channels, 48, 3, padding=1)
        self.unfold = nn.PixelShuffle(4)

    def forward(self, q_BDhw: Tensor) -> Tensor:
        """Pixels (B, 3, 8h, 8w) of quantised features (B, D, h, w)."""
        hidden = self.fine(self.up(self.coarse(self.mix(self.stem(q_BDhw)))))
        return self.unfold(self.last(F.silu(self.norm(hidden))))


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): a real-or-fake logit per overlapping patch, (B, 3, H, W) -> (B, 1, H/8, W/8)."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, channels, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(channels, channels, 4, stride=2, padding=1),
            group_norm(channels),
            nn.LeakyReLU(0.2),
            nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1),
            group_norm(2 * channels),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * channels, 1, 3, padding=1),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits (B, 1, H/8, W/8) of pixels (B, 3, H, W), high where a patch looks real."""
        return self.layers(x_BCHW)


def to_uint8(x_BCHW: Tensor) -> Tensor:
    """Float pixels in [-1, 1] (B, C, H, W) -> uint8 (B, H, W, C), rounded to nearest."""
    levels = ((x_BCHW.detach().float().clamp(-1, 1) + 1) * 127.5).round()
    return levels.to(torch.uint8).permute(0, 2, 3, 1)
