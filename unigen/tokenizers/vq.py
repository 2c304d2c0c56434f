"""The VQ image tokenizer: a small convolutional autoencoder around a quantizer (VQ, FSQ, LFQ or multi-scale VQ).

Pictures (B, 3, H, W) in [-1, 1] <-> codes (B, H/8, W/8), or (B, P), all scales in a row. The network is fully
convolutional: it takes sides that divide by 8 (with multi-scale VQ, those that it was trained on); `image_size` is the
side that it was trained on. Trained by recipes/tiny_vq.py. Does not depend on: losses but the quantizer's, data, files
(`unigen.tokenizers.save_tokenizer`).

Shapes: B batch, C=3 channels, H W pixels, D code dimension, h w grid of codes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from unigen.config import from_dict, to_dict
from unigen.nn.conv import STRIDE, Decoder, Encoder
from unigen.tokenizers.multiscale_vq import MultiscaleQuantizer
from unigen.tokenizers.quantize import FSQ, LFQ, Quantizer, VectorQuantizer, check_finite


@dataclass(frozen=True)
class VQConfig:
    """Configuration of the network.

    Raises:
        ValueError: a value cannot work.
    """

    RENAMED: ClassVar[Mapping[str, str]] = {
        "codes": "codebook_size",
        "coarse": "scale_dropout",
        "wide": "wide_channels",
        "dead_below": "dead_threshold",
    }
    """Keys of version 0.1, and their names now."""

    image_size: int = 64
    """Pixels along a side of the pictures."""
    quantizer: str = "vq"
    """One of "vq", "fsq", "lfq", "multiscale"."""
    codebook_size: int = 1024
    """Size of the codebook (vq, lfq: a power of two)."""
    code_dim: int = 8
    """Channels of a code (vq)."""
    levels: tuple[int, ...] = (8, 5, 5, 5)
    """Of fsq: the number of codes is their product."""
    scales: tuple[int, ...] = (1, 2, 4, 8)
    """Of multiscale: sides of the token maps, the last that of the grid."""
    scale_dropout: float = 0.0
    """Of multiscale: the share of pictures of which training decodes the first scales only."""
    beta: float = 0.25
    """Weight of the commitment loss."""
    entropy: float = 0.0
    """Weight of the entropy term (vq, lfq)."""
    revive_every: int = 10
    """Training steps between revivals of dead codes (vq); 0 = never."""
    dead_threshold: float = 0.05
    """A code is dead below this share of the uniform usage."""
    channels: int = 64
    """Encoder width at 1/4 resolution."""
    decoder_channels: int = 128
    """Decoder width at 1/4 resolution."""
    wide_channels: int = 128
    """Width at 1/8 resolution."""
    encoder_blocks: tuple[int, int] = (2, 2)
    """Residual blocks at 1/4 and 1/8."""
    decoder_blocks: tuple[int, int] = (3, 3)
    """The same of the decoder."""
    attention: bool = True
    """One attention over the 1/8 map on each side."""

    def __post_init__(self) -> None:
        for name in ("levels", "scales", "encoder_blocks", "decoder_blocks"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON gives lists
        if self.image_size <= 0 or self.image_size % STRIDE:
            raise ValueError(f"image_size must be a positive multiple of {STRIDE}, got {self.image_size}")
        if self.quantizer not in ("vq", "fsq", "lfq", "multiscale"):
            raise ValueError(f"quantizer must be vq, fsq, lfq or multiscale, got {self.quantizer!r}")
        if self.quantizer == "multiscale" and (not self.scales or self.scales[-1] != self.image_size // STRIDE):
            raise ValueError(f"scales must end at the grid's side {self.image_size // STRIDE}, got {self.scales}")
        if self.codebook_size < 2 or self.code_dim < 1:
            sizes = f"{self.codebook_size} and {self.code_dim}"
            raise ValueError(f"codebook_size must be at least 2 and code_dim at least 1, got {sizes}")
        if self.quantizer == "lfq" and self.codebook_size & (self.codebook_size - 1):
            raise ValueError(f"codebook_size must be a power of two for lfq, got {self.codebook_size}")
        if self.quantizer == "fsq" and (not self.levels or min(self.levels) < 2):
            raise ValueError(f"levels must be integers of at least 2, got {self.levels}")
        for name in ("channels", "decoder_channels", "wide_channels"):
            if getattr(self, name) <= 0 or getattr(self, name) % 16:
                raise ValueError(f"{name} must be a positive multiple of 16, got {getattr(self, name)}")
        for name in ("encoder_blocks", "decoder_blocks"):
            if len(getattr(self, name)) != 2 or min(getattr(self, name)) < 0:
                raise ValueError(f"{name} must be two counts (at 1/4 and at 1/8), got {getattr(self, name)}")
        if not 0 <= self.scale_dropout <= 1:
            raise ValueError(f"scale_dropout is a share from 0 to 1, got {self.scale_dropout}")
        if self.scale_dropout and self.quantizer != "multiscale":
            message = "scale_dropout is for quantizer=multiscale, which has scales"
            raise ValueError(f"{message}, not for {self.quantizer}")
        for name in ("beta", "entropy", "dead_threshold", "revive_every"):
            if not math.isfinite(getattr(self, name)) or getattr(self, name) < 0:
                raise ValueError(f"{name} must be a finite number that is not negative, got {getattr(self, name)}")

    def build_quantizer(self) -> Quantizer:
        """An untrained quantizer."""
        if self.quantizer == "fsq":
            return FSQ(self.levels)
        if self.quantizer == "lfq":
            return LFQ(self.codebook_size.bit_length() - 1, self.beta, self.entropy)
        if self.quantizer == "multiscale":
            options = (self.beta, self.revive_every, self.dead_threshold)
            return MultiscaleQuantizer(
                self.codebook_size, self.code_dim, self.scales, *options, scale_dropout=self.scale_dropout
            )
        return VectorQuantizer(
            self.codebook_size, self.code_dim, self.beta, self.entropy, self.revive_every, self.dead_threshold
        )


class VQOutput(NamedTuple):
    """The result of the forward pass of a tokenizer."""

    pixels_BCHW: Tensor
    """Reconstruction (B, 3, H, W), fp32, not clamped."""
    codes_Bhw: Tensor | None
    """Codes (B, h, w); None where there are none (KL)."""
    losses: dict[str, tuple[Tensor, int]]
    """Losses of the quantizer by name: the sum and the count."""


class VQTokenizer(nn.Module):
    """The VQ tokenizer. `encode` and `decode` take no gradient, for use; `forward` takes it, for training."""

    def __init__(self, config: VQConfig | None = None) -> None:
        """
        Args:
            config: of the network; None: the defaults.
        """
        super().__init__()
        self.settings = c = config or VQConfig()
        self.quantizer = c.build_quantizer()
        self.encoder = Encoder(c.channels, c.wide_channels, c.encoder_blocks, self.quantizer.dim, c.attention)
        self.decoder = Decoder(c.decoder_channels, c.wide_channels, c.decoder_blocks, self.quantizer.dim, c.attention)
        self.codes_frozen = False

    @property
    def image_size(self) -> int:
        """Pixels along a side of the pictures that the tokenizer was trained on."""
        return self.settings.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns (h, w) of codes of a picture of that size."""
        side = self.settings.image_size // STRIDE
        return side, side

    @property
    def codebook_size(self) -> int:
        """Number of codes; codes are in [0, codebook_size)."""
        return self.quantizer.size

    @property
    def last_layer(self) -> Tensor:
        """The weight of the layer next to the pixels, for gradients of which an adaptive loss is weighted."""
        return self.decoder.last.weight

    def config(self) -> dict[str, object]:
        """Return the kind and the configuration of the network."""
        return {"kind": "vq", **to_dict(self.settings)}

    def forward(self, x_BCHW: Tensor, rng: torch.Generator | None = None, codes_Bhw: Tensor | None = None) -> VQOutput:
        """Reconstruct pictures, with a straight-through gradient.

        Args:
            x_BCHW: pixels in [-1, 1], (B, 3, H, W).
            rng: draws replacements for dead codes in training mode; None: no code is revived.
            codes_Bhw: codes that are decoded instead of those of the pictures; then, as with frozen codes, the decoder
                alone learns.

        Returns:
            The reconstruction, the codes and the quantizer's losses.
        """
        if self.codes_frozen or codes_Bhw is not None:
            codes_Bhw = self.encode(x_BCHW) if codes_Bhw is None else codes_Bhw
            return VQOutput(self.decoder(self.quantizer.to_vectors(codes_Bhw)).float(), codes_Bhw, {})
        quantized = self.quantizer(self.encoder(x_BCHW), rng)
        pixels_BCHW = self.decoder(quantized.vectors_BDhw)
        return VQOutput(pixels_BCHW.float(), quantized.codes_Bhw, quantized.losses)

    def freeze_codes(self) -> None:
        """Freeze the encoder and the quantizer: pictures keep their codes, and models trained on them stay valid."""
        self.codes_frozen = True
        self.encoder.requires_grad_(False)
        self.quantizer.requires_grad_(False)

    @torch.no_grad()
    def encode(self, x_BCHW: Tensor) -> Tensor:
        """Encode pictures, with the same result under autocast.

        Args:
            x_BCHW: pixels in [-1, 1], (B, 3, H, W).

        Returns:
            Codes (B, H/8, W/8), or with multi-scale VQ (B, P); int64.

        Raises:
            ValueError: the pictures have another shape, or sides that do not divide by 8.
            NonFiniteError: a feature is infinite or nan.
        """
        with torch.autocast(x_BCHW.device.type, enabled=False):
            return self.quantizer.to_codes(self.features(x_BCHW))

    @torch.no_grad()
    def features(self, x_BCHW: Tensor) -> Tensor:
        """Return the features that `encode` quantizes.

        Args:
            x_BCHW: pixels in [-1, 1], (B, 3, H, W).

        Returns:
            Features (B, D, H/8, W/8), fp32.

        Raises:
            ValueError: the pictures have another shape, or sides that do not divide by 8.
            NonFiniteError: a feature is infinite or nan.
        """
        if x_BCHW.ndim != 4 or x_BCHW.shape[1] != 3 or x_BCHW.shape[2] % STRIDE or x_BCHW.shape[3] % STRIDE:
            raise ValueError(
                f"pictures must be (B, 3, H, W) with H and W multiples of {STRIDE}, got {tuple(x_BCHW.shape)}"
            )
        with torch.autocast(x_BCHW.device.type, enabled=False):
            return self.quantizer.normalize(check_finite(self.encoder(x_BCHW.to(self.encoder.head.weight.dtype))))

    @torch.no_grad()
    def decode(self, codes_Bhw: Tensor) -> Tensor:
        """Decode pictures.

        Args:
            codes_Bhw: codes (B, h, w), or with multi-scale VQ (B, P).

        Returns:
            Pixels in [-1, 1], (B, 3, 8h, 8w), fp32.

        Raises:
            ValueError: a code is out of range.
        """
        q_BDhw = self.quantizer.to_vectors(codes_Bhw)
        return self.decoder(q_BDhw.to(self.decoder.last.weight.dtype)).float().clamp(-1, 1)


def from_config(config: Mapping[str, object]) -> VQTokenizer:
    """Build an untrained tokenizer.

    Args:
        config: of `VQTokenizer.config`, kind left out.

    Returns:
        The tokenizer.

    Raises:
        ValueError: a key is unknown, or a value cannot work.
    """
    return VQTokenizer(from_dict(VQConfig, config))
