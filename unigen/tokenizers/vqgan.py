"""The VQGAN image tokenizer of public models: diffusers' `VQModel`, with the tensors of taming-transformers' layout.

    z = quant_conv(encoder(x)),   code = argmin_k |z - e_k|^2,   x' = decoder(post_quant_conv(e_code))
                                                                   (Esser et al. 2021, arXiv 2012.09841, section 3.1)

Liquid, Chameleon and Lumina-mGPT read and write pictures by one of these (16 pixels a code, 8,192 codes of dimension
256); its size is read off the tensors. `rename` gives each tensor's name in the other layout, in both directions.
The file refuses to know: families, training. Codes are found in fp32 always, since rounding changes them.

Shapes: B batch, C=3 channels, H W pixels, D code dimension, h w grid of codes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unigen import hub
from unigen.config import from_dict, to_dict


@dataclass(frozen=True)
class VQGANConfig:
    """Everything that defines the network."""

    image_size: int = 512  # pixels along a side
    channels: tuple[int, ...] = (128, 128, 256, 256, 512)  # one number a resolution; each but the first halves the map
    blocks: int = 2  # residual blocks a resolution
    latent_channels: int = 256
    code_dim: int = 256
    codes: int = 8192
    norm_groups: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))  # JSON gives lists
        if self.image_size <= 0 or self.image_size % self.stride:
            raise ValueError(f"image_size must be a positive multiple of {self.stride}, got {self.image_size}")

    @property
    def stride(self) -> int:
        """Pixels a code along each side."""
        return int(2 ** (len(self.channels) - 1))


class VQGAN(nn.Module):
    """encode / decode without gradient: it is used as it was published."""

    def __init__(self, config: VQGANConfig | None = None) -> None:
        super().__init__()
        from diffusers import VQModel

        self.settings = c = config or VQGANConfig()
        self.net = VQModel(
            down_block_types=("DownEncoderBlock2D",) * len(c.channels),
            up_block_types=("UpDecoderBlock2D",) * len(c.channels),
            block_out_channels=c.channels,
            layers_per_block=c.blocks,
            latent_channels=c.latent_channels,
            vq_embed_dim=c.code_dim,
            num_vq_embeddings=c.codes,
            norm_num_groups=c.norm_groups,
        )

    @property
    def image_size(self) -> int:
        return self.settings.image_size

    @property
    def grid(self) -> tuple[int, int]:
        side = self.settings.image_size // self.settings.stride
        return side, side

    @property
    def codebook_size(self) -> int:
        return self.settings.codes

    def config(self) -> dict[str, Any]:
        return {"kind": "vqgan", **to_dict(self.settings)}

    @torch.no_grad()
    def encode(self, x_BCHW: Tensor) -> Tensor:
        """Pixels in [-1, 1] (B, 3, H, W) -> codes (B, h, w), the same under autocast."""
        with torch.autocast(x_BCHW.device.type, enabled=False):
            z_BDhw = self.net.encode(x_BCHW.to(self.net.quant_conv.weight.dtype)).latents.float()
            z_BND = z_BDhw.flatten(2).transpose(1, 2)
            e_KD = self.net.quantize.embedding.weight.float()
            distance_BNK = z_BND.square().sum(-1, keepdim=True) + e_KD.square().sum(-1) - 2 * z_BND @ e_KD.T
            return distance_BNK.argmin(-1).unflatten(1, z_BDhw.shape[2:])

    @torch.no_grad()
    def decode(self, codes_Bhw: Tensor) -> Tensor:
        """Codes (B, h, w) -> pixels in [-1, 1] (B, 3, H, W), fp32. ValueError for codes out of range."""
        if codes_Bhw.numel() and not 0 <= int(codes_Bhw.min()) <= int(codes_Bhw.max()) < self.codebook_size:
            raise ValueError(
                f"image codes must be in 0..{self.codebook_size - 1}: were they made by another tokenizer?"
            )
        e_BDhw = self.net.quantize.embedding(codes_Bhw).permute(0, 3, 1, 2)
        return self.net.decode(e_BDhw, force_not_quantize=True).sample.float().clamp(-1, 1)


def from_config(config: dict[str, Any]) -> VQGAN:
    """The tokenizer described by `VQGAN.config()` (kind left out), untrained. ValueError for unknown keys."""
    return VQGAN(from_dict(VQGANConfig, config))


# a tensor's name in taming's layout, and diffusers' for it; up.{i} is counted from the other end
_NAMES = (
    ("encoder.down.{i}.block.{j}.", "encoder.down_blocks.{i}.resnets.{j}."),
    ("encoder.down.{i}.downsample.", "encoder.down_blocks.{i}.downsamplers.0."),
    ("decoder.up.{i}.block.{j}.", "decoder.up_blocks.{i}.resnets.{j}."),
    ("decoder.up.{i}.upsample.", "decoder.up_blocks.{i}.upsamplers.0."),
    (".mid.block_1.", ".mid_block.resnets.0."),
    (".mid.block_2.", ".mid_block.resnets.1."),
    (".mid.attn_1.norm.", ".mid_block.attentions.0.group_norm."),
    (".mid.attn_1.q.", ".mid_block.attentions.0.to_q."),
    (".mid.attn_1.k.", ".mid_block.attentions.0.to_k."),
    (".mid.attn_1.v.", ".mid_block.attentions.0.to_v."),
    (".mid.attn_1.proj_out.", ".mid_block.attentions.0.to_out.0."),
    (".nin_shortcut.", ".conv_shortcut."),
    (".norm_out.", ".conv_norm_out."),
)


def rename(name: str, resolutions: int, public: bool = False) -> str:
    """What diffusers calls a tensor of taming's layout; with public=True what taming calls one of diffusers'.
    resolutions: how many the network has."""
    for taming, diffusers in _NAMES:
        here, there = (diffusers, taming) if public else (taming, diffusers)
        pattern = re.escape(here).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{j\}", r"(?P<j>\d+)")
        if found := re.search(pattern, name):
            numbers = {key: int(value) for key, value in found.groupdict().items()}
            if here.startswith("decoder.up"):
                numbers["i"] = resolutions - 1 - numbers["i"]
            name = name.replace(found[0], there.format(**numbers))
    return name


def from_public(state: Mapping[str, Tensor], image_size: int) -> VQGAN:
    """The tokenizer whose tensors are in taming's layout, in eval mode. Its size is read off them; what belongs to its
    training is left. Raises ValueError listing the difference where they are not those of such a network."""
    state = {name: tensor for name, tensor in state.items() if not name.startswith("loss.")}
    try:
        levels = len({name.split(".")[2] for name in state if name.startswith("encoder.down.")})
        config = VQGANConfig(
            image_size=image_size,
            channels=tuple(state[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in range(levels)),
            blocks=len({name.split(".")[4] for name in state if name.startswith("encoder.down.0.block.")}),
            latent_channels=state["encoder.conv_out.weight"].shape[0],
            code_dim=state["quantize.embedding.weight"].shape[1],
            codes=state["quantize.embedding.weight"].shape[0],
        )
    except (KeyError, IndexError) as error:
        raise ValueError(f"these are not the tensors of a VQGAN: {error} is not among them") from error
    tokenizer = VQGAN(config)
    shapes = {name: tensor.shape for name, tensor in tokenizer.net.state_dict().items()}
    renamed = {rename(name, levels): tensor for name, tensor in state.items()}
    # attention is a linear map here and a convolution of 1x1 there
    flat = {k: v.flatten(1) if k in shapes and v.ndim == 4 and len(shapes[k]) == 2 else v for k, v in renamed.items()}
    hub.load_strict(tokenizer.net, flat, "of the image tokenizer")
    return tokenizer.eval()


def load_public(path: Path, image_size: int) -> VQGAN:
    """The tokenizer in a file of taming's layout. image_size: of its pictures, where no settings (.yaml) beside the
    file say so."""
    settings = path.with_suffix(".yaml")
    size = re.search(r"^\s*resolution:\s*(\d+)", settings.read_text(), re.M) if settings.is_file() else None
    return from_public(hub.read_tensors(path), int(size[1]) if size else image_size)


def save_public(tokenizer: VQGAN, folder: Path) -> None:
    """Write vqgan.ckpt and vqgan.yaml, as Chameleon has them."""
    c = tokenizer.settings
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": to_public(tokenizer)}, folder / "vqgan.ckpt")
    lines = [
        "model:",
        "  params:",
        f"    embed_dim: {c.code_dim}",
        f"    n_embed: {c.codes}",
        "    ddconfig:",
        "      double_z: false",
        f"      z_channels: {c.latent_channels}",
        f"      resolution: {c.image_size}",
        "      in_channels: 3",
        "      out_ch: 3",
        f"      ch: {c.channels[0]}",
        f"      ch_mult: {[width // c.channels[0] for width in c.channels]}",
        f"      num_res_blocks: {c.blocks}",
        "      attn_resolutions: []",
        "      dropout: 0.0",
    ]
    (folder / "vqgan.yaml").write_text("\n".join(lines) + "\n")


def to_public(tokenizer: VQGAN) -> dict[str, Tensor]:
    """The tensors in taming's layout, as `from_public` takes them."""
    levels, state = len(tokenizer.settings.channels), tokenizer.net.state_dict()
    public = {rename(name, levels, public=True): tensor for name, tensor in state.items()}
    return {k: v[:, :, None, None] if ".attn_1." in k and v.ndim == 2 else v for k, v in public.items()}
