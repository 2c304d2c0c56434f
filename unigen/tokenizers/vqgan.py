"""The VQGAN image tokenizers of public models: diffusers' `VQModel`, with the tensors of the public layouts.

    z = quant_conv(encoder(x)),   code = argmin_k |z - e_k|^2,   x' = decoder(post_quant_conv(e_code))
                                                                   (Esser et al. 2021, arXiv 2012.09841, section 3.1)

"taming"    Liquid, Chameleon, Lumina-mGPT: 8,192 codes of dimension 256
"llamagen"  LlamaGen, Janus: 16,384 codes of dimension 8, z and e of unit length, attention at the lowest resolution
Sizes are read off the tensors. `rename_key` gives each tensor's name in the other layout, in both directions. Does not
depend on: families, training. Codes are found in fp32 always, since rounding changes them.

Shapes: B batch, C=3 channels, H W pixels, D code dimension, h w grid of codes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from unigen.config import from_dict, to_dict
from unigen.hub.resolve import fetch_file, find_component
from unigen.hub.weights import load_strict, read_tensors
from unigen.tokenizers import SquareGridMixin
from unigen.tokenizers.quantize import check_codes, check_finite

CHAMELEON, CHAMELEON_FILE = "GAIR/Anole-7b-v0.1", "vqgan.ckpt"
"""Where the hub has Chameleon's tokenizer, which models that write by it do not bring along."""


@dataclass(frozen=True)
class VQGANConfig:
    """Everything that defines the network."""

    image_size: int = 512
    """Pixels along a side."""
    channels: tuple[int, ...] = (128, 128, 256, 256, 512)
    """One number a resolution; each but the first halves the map."""
    blocks: int = 2
    """Residual blocks a resolution."""
    latent_channels: int = 256
    code_dim: int = 256
    codes: int = 8192
    norm_groups: int = 32
    attention: bool = False
    """After each residual block of the lowest resolution."""
    unit: bool = False
    """Features and codes are compared, and codes decoded, at unit length."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))  # JSON gives lists
        if self.image_size <= 0 or self.image_size % self.stride:
            raise ValueError(f"image_size must be a positive multiple of {self.stride}, got {self.image_size}")

    @property
    def stride(self) -> int:
        """Pixels a code along each side."""
        return int(2 ** (len(self.channels) - 1))


class VQGAN(SquareGridMixin, nn.Module):
    """encode / decode without gradient: it is used as it was published."""

    def __init__(self, config: VQGANConfig | None = None) -> None:
        super().__init__()
        from diffusers.models.autoencoders.vq_model import VQModel

        self.settings = c = config or VQGANConfig()
        num_higher, kind = len(c.channels) - 1, "Attn" if c.attention else ""
        self.net = VQModel(
            down_block_types=("DownEncoderBlock2D",) * num_higher + (f"{kind}DownEncoderBlock2D",),
            up_block_types=(f"{kind}UpDecoderBlock2D",) + ("UpDecoderBlock2D",) * num_higher,
            block_out_channels=c.channels,
            layers_per_block=c.blocks,
            latent_channels=c.latent_channels,
            vq_embed_dim=c.code_dim,
            num_vq_embeddings=c.codes,
            norm_num_groups=c.norm_groups,
        )

    @property
    def codebook_size(self) -> int:
        return self.settings.codes

    def config(self) -> dict[str, object]:
        return {"kind": "vqgan", **to_dict(self.settings)}

    @torch.no_grad()
    def encode(self, x_BCHW: Tensor) -> Tensor:
        """Pixels in [-1, 1] (B, 3, H, W) -> codes (B, h, w), the same under autocast."""
        with torch.autocast(x_BCHW.device.type, enabled=False):
            latents_BDhw = self.net.encode(x_BCHW.to(self.net.quant_conv.weight.dtype)).latents
            z_BDhw = check_finite(latents_BDhw).float()
            z_BND = z_BDhw.flatten(2).transpose(1, 2)
            e_KD = self.net.quantize.embedding.weight.float()
            if self.settings.unit:
                z_BND, e_KD = normalize(z_BND, dim=-1), normalize(e_KD, dim=-1)
            distance_BNK = z_BND.square().sum(-1, keepdim=True) + e_KD.square().sum(-1) - 2 * z_BND @ e_KD.T
            return distance_BNK.argmin(-1).unflatten(1, z_BDhw.shape[2:])

    @torch.no_grad()
    def decode(self, codes_Bhw: Tensor) -> Tensor:
        """Codes (B, h, w) -> pixels in [-1, 1] (B, 3, H, W), fp32. ValueError for codes out of range."""
        check_codes(codes_Bhw, self.codebook_size)
        e_BhwD = self.net.quantize.embedding(codes_Bhw)
        e_BDhw = (normalize(e_BhwD, dim=-1) if self.settings.unit else e_BhwD).permute(0, 3, 1, 2)
        return self.net.decode(e_BDhw, force_not_quantize=True).sample.float().clamp(-1, 1)


def from_config(config: Mapping[str, object]) -> VQGAN:
    """The tokenizer described by `VQGAN.config()` (kind left out), untrained. ValueError for unknown keys."""
    return VQGAN(from_dict(VQGANConfig, config))


_ATTENTION_KEYS = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_KEY_RENAMES = {
    "taming": (
        ("encoder.down.{i}.block.{j}.", "encoder.down_blocks.{i}.resnets.{j}."),
        ("encoder.down.{i}.downsample.", "encoder.down_blocks.{i}.downsamplers.0."),
        ("decoder.up.{i}.block.{j}.", "decoder.up_blocks.{i}.resnets.{j}."),
        ("decoder.up.{i}.upsample.", "decoder.up_blocks.{i}.upsamplers.0."),
        *(
            (f"{here}.{{i}}.attn.{{j}}.{k}.", f"{there}.{{i}}.attentions.{{j}}.{v}.")
            for here, there in (("encoder.down", "encoder.down_blocks"), ("decoder.up", "decoder.up_blocks"))
            for k, v in _ATTENTION_KEYS.items()
        ),
        (".mid.block_1.", ".mid_block.resnets.0."),
        (".mid.block_2.", ".mid_block.resnets.1."),
        *((f".mid.attn_1.{k}.", f".mid_block.attentions.0.{v}.") for k, v in _ATTENTION_KEYS.items()),
        (".nin_shortcut.", ".conv_shortcut."),
        (".norm_out.", ".conv_norm_out."),
    ),
    "llamagen": (
        ("encoder.conv_blocks.{i}.res.{j}.", "encoder.down_blocks.{i}.resnets.{j}."),
        ("encoder.conv_blocks.{i}.downsample.", "encoder.down_blocks.{i}.downsamplers.0."),
        ("decoder.conv_blocks.{i}.res.{j}.", "decoder.up_blocks.{i}.resnets.{j}."),
        ("decoder.conv_blocks.{i}.upsample.", "decoder.up_blocks.{i}.upsamplers.0."),
        *(
            (f"{coder}.conv_blocks.{{i}}.attn.{{j}}.{k}.", f"{coder}.{blocks}.{{i}}.attentions.{{j}}.{v}.")
            for coder, blocks in (("encoder", "down_blocks"), ("decoder", "up_blocks"))
            for k, v in _ATTENTION_KEYS.items()
        ),
        (".mid.0.", ".mid_block.resnets.0."),
        (".mid.2.", ".mid_block.resnets.1."),
        *((f".mid.1.{k}.", f".mid_block.attentions.0.{v}.") for k, v in _ATTENTION_KEYS.items()),
        (".nin_shortcut.", ".conv_shortcut."),
        (".norm_out.", ".conv_norm_out."),
    ),
}
"""Of each layout: what a tensor is called there, and by diffusers."""


def rename_key(name: str, layout: str, resolutions: int, public: bool = False) -> str:
    """What diffusers calls a tensor of a public layout; with public=True what that calls one of diffusers'.
    resolutions: how many the network has; taming counts the decoder's from the other end."""
    for public_key, diffusers in _KEY_RENAMES[layout]:
        source_key, target_key = (diffusers, public_key) if public else (public_key, diffusers)
        pattern = re.escape(source_key).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{j\}", r"(?P<j>\d+)")
        if match := re.search(pattern, name):
            numbers = {key: int(value) for key, value in match.groupdict().items()}
            if public_key.startswith("decoder.up"):
                numbers["i"] = resolutions - 1 - numbers["i"]
            name = name.replace(match[0], target_key.format(**numbers))
    return name


def from_public(state: Mapping[str, Tensor], image_size: int, layout: str = "taming") -> VQGAN:
    """The tokenizer whose tensors are in a public layout, in eval mode. Its size is read off them; what belongs to its
    training is left. Raises ValueError listing the difference where they are not those of such a network."""
    dropped_keys = ("loss.", "quantize.codebook_used")
    state = {name: tensor for name, tensor in state.items() if not name.startswith(dropped_keys)}
    first_block_key = {"taming": "encoder.down.{i}.block.", "llamagen": "encoder.conv_blocks.{i}.res."}[layout]
    try:
        levels = len({name.split(".")[2] for name in state if name.startswith(first_block_key.split("{")[0])})
        config = VQGANConfig(
            image_size=image_size,
            channels=tuple(state[f"{first_block_key.format(i=i)}0.conv2.weight"].shape[0] for i in range(levels)),
            blocks=len({name.split(".")[4] for name in state if name.startswith(first_block_key.format(i=0))}),
            latent_channels=state["encoder.conv_out.weight"].shape[0],
            code_dim=state["quantize.embedding.weight"].shape[1],
            codes=state["quantize.embedding.weight"].shape[0],
            attention=layout == "llamagen",
            unit=layout == "llamagen",
        )
    except (KeyError, IndexError) as error:
        raise ValueError(f"these are not the tensors of a VQGAN: {error} is not among them") from error
    tokenizer = VQGAN(config)
    shapes = {name: tensor.shape for name, tensor in tokenizer.net.state_dict().items()}
    renamed = {rename_key(name, layout, levels): tensor for name, tensor in state.items()}
    # attention is a linear map here and a convolution of 1x1 there
    flattened_state = {
        k: v.flatten(1) if k in shapes and v.ndim == 4 and len(shapes[k]) == 2 else v for k, v in renamed.items()
    }
    load_strict(tokenizer.net, flattened_state, "of the image tokenizer")
    return tokenizer.eval()


def load_chameleon(folder: Path, image_size: int) -> VQGAN:
    """Chameleon's tokenizer for the model in `folder`: in our layout there, in its file there, or else of the hub.
    image_size: of its pictures, where nothing says so."""
    from unigen.tokenizers import load_image_tokenizer

    if (folder / "image_tokenizer").is_dir():
        return load_image_tokenizer(folder / "image_tokenizer")
    hub_path = f"tokenizer/{CHAMELEON_FILE}"
    path = find_component(
        folder, CHAMELEON_FILE, "Chameleon's image tokenizer", lambda: fetch_file(CHAMELEON, hub_path)
    )
    return load_public(path, image_size)


def load_public(path: Path, image_size: int) -> VQGAN:
    """The tokenizer in a file of taming's layout. image_size: of its pictures, where no settings (.yaml) beside the
    file say so."""
    settings = path.with_suffix(".yaml")
    size = re.search(r"^\s*resolution:\s*(\d+)", settings.read_text(), re.M) if settings.is_file() else None
    return from_public(read_tensors(path), int(size[1]) if size else image_size)


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


def to_public(tokenizer: VQGAN, layout: str = "taming") -> dict[str, Tensor]:
    """The tensors in a public layout, as `from_public` takes them."""
    levels, state = len(tokenizer.settings.channels), tokenizer.net.state_dict()
    return {
        rename_key(k, layout, levels, public=True): v[:, :, None, None] if ".attentions." in k and v.ndim == 2 else v
        for k, v in state.items()
    }
