"""Show-o's image tokenizer, MAGVIT-v2 for pictures: diffusers' blocks around a quantizer without a table.

    code = sum_d [z_d > 0] 2^(D - 1 - d),   x' = decoder(2 [z_d > 0] - 1)   (Yu et al. 2023, arXiv 2310.05737, eq. 2-3)

16 pixels a code along each side, 13 bits, so 8,192 codes; the first channel is the highest bit. The encoder and the
decoder have channels and depths of their own at each resolution. Sizes are read off the tensors. Does not depend on:
families, training.

Shapes: B batch, C=3 channels, H W pixels, D bits, h w grid of codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unigen.config import from_dict, to_dict
from unigen.hub.weights import load_strict, rename_key
from unigen.tokenizers import SquareGridMixin
from unigen.tokenizers.quantize import LFQ, check_finite
from unigen.tokenizers.vqgan import rename_key as rename_vqgan_key


@dataclass(frozen=True)
class MAGVIT2Config:
    """Configuration of the network.

    Raises:
        ValueError: `image_size` is not a positive multiple of the stride.
    """

    image_size: int = 256
    """Pixels along a side of the pictures."""
    bits: int = 13
    """D, bits of a code."""
    encoder_channels: tuple[int, ...] = (128, 256, 256, 512, 512)
    """Channels of each resolution, the highest first; each but the first halves the map."""
    encoder_blocks: tuple[int, ...] = (4, 3, 4, 3, 4)
    """Residual blocks of each resolution."""
    decoder_channels: tuple[int, ...] = (128, 128, 256, 256, 512)
    """Channels of each resolution, the highest first."""
    decoder_blocks: tuple[int, ...] = (4, 4, 3, 4, 3)
    """Residual blocks of each resolution, the highest first."""

    def __post_init__(self) -> None:
        for name in ("encoder_channels", "encoder_blocks", "decoder_channels", "decoder_blocks"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON gives lists
        if self.image_size <= 0 or self.image_size % self.stride:
            raise ValueError(f"image_size must be a positive multiple of {self.stride}, got {self.image_size}")

    @property
    def stride(self) -> int:
        """Pixels of a code along each side."""
        return int(2 ** (len(self.encoder_channels) - 1))


class MAGVIT2(SquareGridMixin, nn.Module):
    """MAGVIT-v2 as it was published. `encode` and `decode` take no gradient."""

    def __init__(self, config: MAGVIT2Config | None = None) -> None:
        """
        Args:
            config: of the network; None: the defaults.
        """
        super().__init__()
        from diffusers.models.autoencoders.vae import Decoder, Encoder

        self.settings = c = config or MAGVIT2Config()
        levels = len(c.encoder_channels)
        down, up = ("DownEncoderBlock2D",) * levels, ("UpDecoderBlock2D",) * levels
        self.encoder = Encoder(3, c.bits, down, c.encoder_channels, 1, double_z=False)
        self.decoder = Decoder(c.bits, 3, up, c.decoder_channels, 0)
        add_resnet_blocks(self.encoder.down_blocks, c.encoder_blocks)
        add_resnet_blocks(self.decoder.up_blocks, c.decoder_blocks[::-1])
        self.quant_conv = nn.Conv2d(c.bits, c.bits, 1)
        self.post_quant_conv = nn.Conv2d(c.bits, c.bits, 1)
        self.quantizer = LFQ(c.bits)

    @property
    def codebook_size(self) -> int:
        """Number of codes; codes are in [0, codebook_size)."""
        return self.quantizer.size

    def config(self) -> dict[str, object]:
        """Return the kind and the configuration of the network."""
        return {"kind": "magvit2", **to_dict(self.settings)}

    @torch.no_grad()
    def encode(self, x_BCHW: Tensor) -> Tensor:
        """Encode pictures, with the same result under autocast.

        Args:
            x_BCHW: pixels in [-1, 1], (B, 3, H, W).

        Returns:
            Codes (B, h, w), int64.

        Raises:
            NonFiniteError: a feature is infinite or nan.
        """
        with torch.autocast(x_BCHW.device.type, enabled=False):
            z_BDhw = check_finite(self.quant_conv(self.encoder(x_BCHW.to(self.quant_conv.weight.dtype))))
            return self.quantizer.to_codes(z_BDhw.float().flip(1))

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
        q_BDhw = self.quantizer.to_vectors(codes_Bhw).flip(1).to(self.post_quant_conv.weight.dtype)
        return self.decoder(self.post_quant_conv(q_BDhw)).float().clamp(-1, 1)  # type: ignore[no-any-return]


def add_resnet_blocks(levels: nn.ModuleList, depths: tuple[int, ...]) -> None:
    """Add residual blocks to the resolutions of an encoder or a decoder, each of which has one.

    Args:
        levels: the blocks of diffusers, one for each resolution.
        depths: residual blocks that each of them is to have.
    """
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D, UpDecoderBlock2D

    for level, depth in zip(levels, depths, strict=True):
        assert isinstance(level, DownEncoderBlock2D | UpDecoderBlock2D)
        first = level.resnets[-1]
        assert isinstance(first, ResnetBlock2D)
        level.resnets.extend(
            ResnetBlock2D(in_channels=first.out_channels, temb_channels=None, eps=1e-6)  # type: ignore[arg-type]
            for _ in range(depth - 1)
        )  # without a time embedding, as in the blocks that diffusers makes


def from_config(config: Mapping[str, object]) -> MAGVIT2:
    """Build an untrained tokenizer.

    Args:
        config: of `MAGVIT2.config`, kind left out.

    Returns:
        The tokenizer.

    Raises:
        ValueError: a key is unknown, or a value cannot work.
    """
    return MAGVIT2(from_dict(MAGVIT2Config, config))


TABLE_KEYS = ("quantize.embedding", "quantize.power_vals")
"""Tensors of the quantizer in a public file: the signs of each code's bits, and the value of each bit."""


def from_public(state: Mapping[str, Tensor], side: int) -> MAGVIT2:
    """Build the tokenizer of a public file.

    Args:
        state: the tensors of the file, by name. The sizes of the network are read off them.
        side: codes along each side of the pictures, which the file does not say.

    Returns:
        The tokenizer in eval mode.

    Raises:
        ValueError: the tensors are not those of such a network; the message lists the difference.
    """
    state = dict(state)
    sizes: dict[str, Any] = {}
    try:
        for coder, path in (("encoder", "encoder.down"), ("decoder", "decoder.up")):
            levels = range(len({name.split(".")[2] for name in state if name.startswith(f"{path}.")}))
            blocks = [{name.split(".")[4] for name in state if name.startswith(f"{path}.{i}.block.")} for i in levels]
            sizes[f"{coder}_blocks"] = [len(block_indices) for block_indices in blocks]
            sizes[f"{coder}_channels"] = [state[f"{path}.{i}.block.0.conv2.weight"].shape[0] for i in levels]
        bits = state["encoder.conv_out.weight"].shape[0]
        table = [state.pop(name) for name in TABLE_KEYS]
    except (KeyError, IndexError) as error:
        raise ValueError(f"these are not the tensors of MAGVIT-v2: {error} is missing") from error
    size = side * 2 ** (len(sizes["encoder_blocks"]) - 1)
    tokenizer = MAGVIT2(MAGVIT2Config(size, bits, **sizes))
    if any(
        not torch.equal(public_tensor, expected.to(public_tensor))
        for public_tensor, expected in zip(table, sign_table(bits), strict=True)
    ):
        raise ValueError(f"{' or '.join(TABLE_KEYS)} of the image tokenizer is not that of {bits} bits")
    shapes = {name: tensor.shape for name, tensor in tokenizer.state_dict().items()}
    renamed = {_rename_key(name, tokenizer): tensor for name, tensor in state.items()}
    # an attention projection is a linear layer here and a 1x1 convolution in the public file
    flattened_state = {
        k: v.flatten(1) if k in shapes and v.ndim == 4 and len(shapes[k]) == 2 else v for k, v in renamed.items()
    }
    load_strict(tokenizer, flattened_state, "of the image tokenizer")
    return tokenizer.eval()


def to_public(tokenizer: MAGVIT2) -> dict[str, Tensor]:
    """Convert the tensors of a tokenizer to those of a public file.

    Args:
        tokenizer: the tokenizer.

    Returns:
        The tensors by their public names, as `from_public` takes them.
    """
    public_state = {
        _rename_key(k, tokenizer, public=True): v[:, :, None, None] if ".attentions." in k and v.ndim == 2 else v
        for k, v in tokenizer.state_dict().items()
    }
    return public_state | dict(zip(TABLE_KEYS, sign_table(tokenizer.settings.bits), strict=True))


def sign_table(bits: int) -> tuple[Tensor, Tensor]:
    """Return the tensors of a quantizer in a public file.

    Args:
        bits: D, bits of a code; there are K = 2^D codes.

    Returns:
        The signs of each code's bits (K, D), and the value of each bit (D,).
    """
    signs_KD = LFQ(bits).to_vectors(torch.arange(2**bits)[None, None])[0, :, 0].flip(0).T
    return signs_KD, 2 ** torch.arange(bits - 1, -1, -1)


_OUTER_KEYS = (("encoder.quant_conv.", "quant_conv."), ("decoder.post_quant_conv.", "post_quant_conv."))


def _rename_key(name: str, tokenizer: MAGVIT2, public: bool = False) -> str:
    """Map the public name of a tensor to its name here; with public=True the other way."""
    levels = len(tokenizer.settings.encoder_channels)
    return rename_vqgan_key(rename_key(name, _OUTER_KEYS, inverse=public), "taming", levels, public)
