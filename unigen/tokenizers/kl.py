"""The KL image tokenizer: pictures <-> continuous latents, by diffusers' `AutoencoderKL` on folded pixels.

    L = reconstruction + beta KL(q(z|x) || N(0, I)),    latents = (z - shift) / scale       (Rombach et al. 2022, LDM)

4x4 pixels are folded into channels first, since full-resolution convolutions are what makes a tokenizer slow on a CPU;
the autoencoder then halves the map once for each block of channels but the first. shift and scale are the running mean
and standard deviation of each latent channel in training, so that latents are near N(0, 1) whatever the data.
Trained by recipes/tiny_vq.py (tokenizer_kind=kl). Does not depend on: losses but its own, data, files.

Shapes: B batch, C=3 channels, H W pixels, Z latent channels, h w grid of latents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from unigen.config import from_dict, to_dict
from unigen.tokenizers import SquareGridMixin
from unigen.tokenizers.vq import VQOutput


@dataclass(frozen=True)
class KLConfig:
    """Configuration of the network.

    Raises:
        ValueError: a value cannot work.
    """

    RENAMED: ClassVar[Mapping[str, str]] = {"fold": "patch_size", "blocks": "layers_per_block"}
    """Keys of version 0.1, and their names now."""

    image_size: int = 64
    """Pixels along a side of the pictures."""
    patch_size: int = 4
    """Pixels along a side that are folded into channels."""
    channels: tuple[int, ...] = (64, 128)
    """Channels of each resolution, the highest first; each but the first halves the map."""
    layers_per_block: int = 1
    """Residual blocks of each resolution."""
    latent_channels: int = 8
    """Z, channels of a latent."""
    beta: float = 1e-4
    """Weight of the KL term."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))  # JSON gives lists
        if min(self.patch_size, self.layers_per_block, self.latent_channels, len(self.channels)) < 1:
            names = "patch_size, layers_per_block, latent_channels and the number of channels"
            raise ValueError(f"{names} must be at least 1")
        if self.image_size <= 0 or self.image_size % self.stride:
            raise ValueError(f"image_size must be a positive multiple of {self.stride}, got {self.image_size}")
        if any(width <= 0 or width % 16 for width in self.channels):
            raise ValueError(f"channels must be positive multiples of 16, got {self.channels}")
        if not math.isfinite(self.beta) or self.beta < 0:
            raise ValueError(f"beta must be a finite number that is not negative, got {self.beta}")

    @property
    def stride(self) -> int:
        """Pixels of a latent along each side."""
        return self.patch_size * 2 ** (len(self.channels) - 1)


class KLTokenizer(SquareGridMixin, nn.Module):
    """The KL tokenizer. `encode` and `decode` take no gradient, for use; `forward` takes it, for training."""

    def __init__(self, config: KLConfig | None = None) -> None:
        """
        Args:
            config: of the network; None: the defaults.
        """
        super().__init__()
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        self.settings = c = config or KLConfig()
        pixels = 3 * c.patch_size**2
        self.vae = AutoencoderKL(
            in_channels=pixels,
            out_channels=pixels,
            down_block_types=("DownEncoderBlock2D",) * len(c.channels),
            up_block_types=("UpDecoderBlock2D",) * len(c.channels),
            block_out_channels=c.channels,
            layers_per_block=c.layers_per_block,
            latent_channels=c.latent_channels,
            norm_num_groups=16,
        )
        self.register_buffer("shift_Z", torch.zeros(c.latent_channels))
        self.register_buffer("scale_Z", torch.ones(c.latent_channels))
        self.shift_Z: Tensor
        self.scale_Z: Tensor

    @property
    def latent_channels(self) -> int:
        """Z, channels of a latent."""
        return self.settings.latent_channels

    @property
    def last_layer(self) -> Tensor:
        """The weight of the layer next to the pixels, for gradients of which an adaptive loss is weighted."""
        return self.vae.decoder.conv_out.weight

    def config(self) -> dict[str, object]:
        """Return the kind and the configuration of the network."""
        return {"kind": "kl", **to_dict(self.settings)}

    def forward(self, x_BCHW: Tensor, rng: torch.Generator | None = None) -> VQOutput:
        """Reconstruct pictures from a sample of the posterior.

        Args:
            x_BCHW: pixels in [-1, 1], (B, 3, H, W).
            rng: draws the sample, on the CPU; None: the global generator.

        Returns:
            The reconstruction, no codes, and the KL term.
        """
        posterior = self.vae.encode(pixel_unshuffle(x_BCHW, self.settings.patch_size)).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=rng).to(posterior.mean)
        if self.training:
            self._update_latent_stats(posterior.mean.detach().float())
        y_BCHW = pixel_shuffle(self.vae.decode(posterior.mean + posterior.std * noise).sample, self.settings.patch_size)
        n = posterior.mean[:, 0].numel()
        return VQOutput(y_BCHW.float(), None, {"kl": (self.settings.beta * posterior.kl().float().sum(), n)})

    @torch.no_grad()
    def _update_latent_stats(self, z_BZhw: Tensor, momentum: float = 0.99) -> None:
        self.shift_Z.lerp_(z_BZhw.mean((0, 2, 3)), 1 - momentum)
        self.scale_Z.lerp_(z_BZhw.std((0, 2, 3)), 1 - momentum)

    @torch.no_grad()
    def encode(self, x_BCHW: Tensor) -> Tensor:
        """Encode pictures as the mean of the posterior, in fp32 also under autocast.

        Args:
            x_BCHW: pixels in [-1, 1], (B, 3, H, W).

        Returns:
            Latents (B, Z, h, w), fp32, near N(0, 1).

        Raises:
            ValueError: the pictures have another shape, or sides that do not divide by the stride.
        """
        stride = self.settings.stride
        if x_BCHW.ndim != 4 or x_BCHW.shape[1] != 3 or x_BCHW.shape[2] % stride or x_BCHW.shape[3] % stride:
            raise ValueError(
                f"pictures must be (B, 3, H, W) with H and W multiples of {stride}, got {tuple(x_BCHW.shape)}"
            )
        with torch.autocast(x_BCHW.device.type, enabled=False):  # the same latents in training and in use
            pixels = pixel_unshuffle(x_BCHW, self.settings.patch_size).to(self.vae.dtype)
            z_BZhw = self.vae.encode(pixels).latent_dist.mode()
        return (z_BZhw.float() - self.shift_Z[:, None, None]) / self.scale_Z[:, None, None]

    @torch.no_grad()
    def decode(self, latents_BZhw: Tensor) -> Tensor:
        """Decode pictures.

        Args:
            latents_BZhw: latents (B, Z, h, w).

        Returns:
            Pixels in [-1, 1], (B, 3, H, W), fp32.
        """
        z_BZhw = latents_BZhw * self.scale_Z[:, None, None] + self.shift_Z[:, None, None]
        pixels = self.vae.decode(z_BZhw.to(self.vae.dtype)).sample
        return pixel_shuffle(pixels, self.settings.patch_size).float().clamp(-1, 1)


def from_config(config: Mapping[str, object]) -> KLTokenizer:
    """Build an untrained tokenizer.

    Args:
        config: of `KLTokenizer.config`, kind left out.

    Returns:
        The tokenizer.

    Raises:
        ValueError: a key is unknown, or a value cannot work.
    """
    return KLTokenizer(from_dict(KLConfig, config))
