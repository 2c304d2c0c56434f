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
    """Everything that defines the network. Channels and residual blocks are one number a resolution, the highest
    first; each but the first halves the map."""

    image_size: int = 256
    bits: int = 13
    encoder_channels: tuple[int, ...] = (128, 256, 256, 512, 512)
    encoder_blocks: tuple[int, ...] = (4, 3, 4, 3, 4)
    decoder_channels: tuple[int, ...] = (128, 128, 256, 256, 512)
    decoder_blocks: tuple[int, ...] = (4, 4, 3, 4, 3)

    def __post_init__(self) -> None:
        for name in ("encoder_channels", "encoder_blocks", "decoder_channels", "decoder_blocks"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON gives lists
        if self.image_size <= 0 or self.image_size % self.stride:
            raise ValueError(f"image_size must be a positive multiple of {self.stride}, got {self.image_size}")

    @property
    def stride(self) -> int:
        """Pixels a code along each side."""
        return int(2 ** (len(self.encoder_channels) - 1))


class MAGVIT2(SquareGridMixin, nn.Module):
    """encode / decode without gradient: it is used as it was published."""

    def __init__(self, config: MAGVIT2Config | None = None) -> None:
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
        return self.quantizer.size

    def config(self) -> dict[str, object]:
        return {"kind": "magvit2", **to_dict(self.settings)}

    @torch.no_grad()
    def encode(self, x_BCHW: Tensor) -> Tensor:
        """Pixels in [-1, 1] (B, 3, H, W) -> codes (B, h, w), the same under autocast."""
        with torch.autocast(x_BCHW.device.type, enabled=False):
            z_BDhw = check_finite(self.quant_conv(self.encoder(x_BCHW.to(self.quant_conv.weight.dtype))))
            return self.quantizer.to_codes(z_BDhw.float().flip(1))

    @torch.no_grad()
    def decode(self, codes_Bhw: Tensor) -> Tensor:
        """Codes (B, h, w) -> pixels in [-1, 1] (B, 3, H, W), fp32. ValueError for codes out of range."""
        q_BDhw = self.quantizer.to_vectors(codes_Bhw).flip(1).to(self.post_quant_conv.weight.dtype)
        return self.decoder(self.post_quant_conv(q_BDhw)).float().clamp(-1, 1)  # type: ignore[no-any-return]


def add_resnet_blocks(levels: nn.ModuleList, depths: tuple[int, ...]) -> None:
    """Give each resolution, which has one residual block, so many."""
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D, UpDecoderBlock2D

    for level, depth in zip(levels, depths, strict=True):
        assert isinstance(level, DownEncoderBlock2D | UpDecoderBlock2D)
        first = level.resnets[-1]
        assert isinstance(first, ResnetBlock2D)
        level.resnets.extend(
            ResnetBlock2D(in_channels=first.out_channels, temb_channels=None, eps=1e-6)  # type: ignore[arg-type]
            for _ in range(depth - 1)
        )  # without an embedding of time, as diffusers' own blocks are made


def from_config(config: Mapping[str, object]) -> MAGVIT2:
    """The tokenizer described by `MAGVIT2.config()` (kind left out), untrained. ValueError for unknown keys."""
    return MAGVIT2(from_dict(MAGVIT2Config, config))


TABLE_KEYS = ("quantize.embedding", "quantize.power_vals")
"""What a public file has of the quantizer: the signs of each code's bits, and what each bit counts."""


def from_public(state: Mapping[str, Tensor], side: int) -> MAGVIT2:
    """The tokenizer of a public file, in eval mode. side: codes along each side of its pictures, which no file says.
    Raises ValueError listing the difference where its tensors are not those of such a network."""
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
        not torch.equal(public_state, own_table.to(public_state))
        for public_state, own_table in zip(table, sign_table(bits), strict=True)
    ):
        raise ValueError(f"{' or '.join(TABLE_KEYS)} of the image tokenizer is not that of {bits} bits")
    shapes = {name: tensor.shape for name, tensor in tokenizer.state_dict().items()}
    renamed = {_rename_key(name, tokenizer): tensor for name, tensor in state.items()}
    # attention is a linear map here and a convolution of 1x1 there
    flattened_state = {
        k: v.flatten(1) if k in shapes and v.ndim == 4 and len(shapes[k]) == 2 else v for k, v in renamed.items()
    }
    load_strict(tokenizer, flattened_state, "of the image tokenizer")
    return tokenizer.eval()


def to_public(tokenizer: MAGVIT2) -> dict[str, Tensor]:
    """The tensors of the public file."""
    public_state = {
        _rename_key(k, tokenizer, public=True): v[:, :, None, None] if ".attentions." in k and v.ndim == 2 else v
        for k, v in tokenizer.state_dict().items()
    }
    return public_state | dict(zip(TABLE_KEYS, sign_table(tokenizer.settings.bits), strict=True))


def sign_table(bits: int) -> tuple[Tensor, Tensor]:
    """The signs (K, D) of each code's bits, and what each of them counts (D,)."""
    signs_KD = LFQ(bits).to_vectors(torch.arange(2**bits)[None, None])[0, :, 0].flip(0).T
    return signs_KD, 2 ** torch.arange(bits - 1, -1, -1)


_OUTER_KEYS = (("encoder.quant_conv.", "quant_conv."), ("decoder.post_quant_conv.", "post_quant_conv."))


def _rename_key(name: str, tokenizer: MAGVIT2, public: bool = False) -> str:
    """A tensor's name here, of its public one; with public=True the other way."""
    levels = len(tokenizer.settings.encoder_channels)
    return rename_vqgan_key(rename_key(name, _OUTER_KEYS, inverse=public), "taming", levels, public)
