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
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from unigen.config import from_dict, to_dict
from unigen.hub.resolve import fetch_file, find_component
from unigen.hub.weights import load_strict, read_tensors
from unigen.tokenizers import SquareGridMixin, load_image_tokenizer
from unigen.tokenizers.quantize import check_codes, check_finite

CHAMELEON, CHAMELEON_FILE = "GAIR/Anole-7b-v0.1", "vqgan.ckpt"
"""Repository and file of Chameleon's tokenizer on the hub; models that use it do not ship it."""


@dataclass(frozen=True)
class VQGANConfig:
    """Configuration of the network.

    Raises:
        ValueError: `image_size` is not a positive multiple of the stride.
    """

    RENAMED: ClassVar[Mapping[str, str]] = {"codes": "codebook_size", "unit": "l2_normalize"}
    """Keys of version 0.1, and their names now."""

    image_size: int = 512
    """Pixels along a side of the pictures."""
    channels: tuple[int, ...] = (128, 128, 256, 256, 512)
    """Channels of each resolution, the highest first; each but the first halves the map."""
    blocks: int = 2
    """Residual blocks of each resolution."""
    latent_channels: int = 256
    """Channels between the encoder and `quant_conv`."""
    code_dim: int = 256
    """D, channels of a code."""
    codebook_size: int = 8192
    """Size of the codebook."""
    norm_groups: int = 32
    """Groups of each group normalization."""
    attention: bool = False
    """Whether an attention follows each residual block of the lowest resolution."""
    l2_normalize: bool = False
    """Whether features and codes are compared, and codes decoded, at unit length."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))  # JSON gives lists
        if self.image_size <= 0 or self.image_size % self.stride:
            raise ValueError(f"image_size must be a positive multiple of {self.stride}, got {self.image_size}")

    @property
    def stride(self) -> int:
        """Pixels of a code along each side."""
        return int(2 ** (len(self.channels) - 1))


class VQGAN(SquareGridMixin, nn.Module):
    """A VQGAN as it was published. `encode` and `decode` take no gradient."""

    def __init__(self, config: VQGANConfig | None = None) -> None:
        """
        Args:
            config: of the network; None: the defaults.
        """
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
            num_vq_embeddings=c.codebook_size,
            norm_num_groups=c.norm_groups,
        )

    @property
    def codebook_size(self) -> int:
        """Number of codes; codes are in [0, codebook_size)."""
        return self.settings.codebook_size

    def config(self) -> dict[str, object]:
        """Return the kind and the configuration of the network."""
        return {"kind": "vqgan", **to_dict(self.settings)}

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
            latents_BDhw = self.net.encode(x_BCHW.to(self.net.quant_conv.weight.dtype)).latents
            z_BDhw = check_finite(latents_BDhw).float()
            z_BND = z_BDhw.flatten(2).transpose(1, 2)
            e_KD = self.net.quantize.embedding.weight.float()
            if self.settings.l2_normalize:
                z_BND, e_KD = normalize(z_BND, dim=-1), normalize(e_KD, dim=-1)
            distance_BNK = z_BND.square().sum(-1, keepdim=True) + e_KD.square().sum(-1) - 2 * z_BND @ e_KD.T
            return distance_BNK.argmin(-1).unflatten(1, z_BDhw.shape[2:])

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
        e_BhwD = self.net.quantize.embedding(codes_Bhw)
        e_BDhw = (normalize(e_BhwD, dim=-1) if self.settings.l2_normalize else e_BhwD).permute(0, 3, 1, 2)
        return self.net.decode(e_BDhw, force_not_quantize=True).sample.float().clamp(-1, 1)


def from_config(config: Mapping[str, object]) -> VQGAN:
    """Build an untrained tokenizer.

    Args:
        config: of `VQGAN.config`, kind left out.

    Returns:
        The tokenizer.

    Raises:
        ValueError: a key is unknown, or a value cannot work.
    """
    return VQGAN(from_dict(VQGANConfig, config))


_ATTENTION_KEYS = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_KEY_RENAMES = {
    "taming": (
        ("encoder.down.{i}.block.{j}.", "encoder.down_blocks.{i}.resnets.{j}."),
        ("encoder.down.{i}.downsample.", "encoder.down_blocks.{i}.downsamplers.0."),
        ("decoder.up.{i}.block.{j}.", "decoder.up_blocks.{i}.resnets.{j}."),
        ("decoder.up.{i}.upsample.", "decoder.up_blocks.{i}.upsamplers.0."),
        *(
            (f"{public}.{{i}}.attn.{{j}}.{k}.", f"{diffusers}.{{i}}.attentions.{{j}}.{v}.")
            for public, diffusers in (("encoder.down", "encoder.down_blocks"), ("decoder.up", "decoder.up_blocks"))
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
"""For each layout pairs of key parts: the public name, and that of diffusers."""


def rename_key(name: str, layout: str, resolutions: int, public: bool = False) -> str:
    """Map the name of a tensor in a public layout to its name in diffusers.

    Args:
        name: of the tensor.
        layout: "taming" or "llamagen".
        resolutions: number of resolutions of the network; taming numbers those of the decoder from the other end.
        public: map the other way, from diffusers to the public layout.

    Returns:
        The name in the other layout.
    """
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
    """Build the tokenizer of a public file.

    Args:
        state: the tensors of the file, by name. The sizes of the network are read off them; those of the training
            alone are ignored.
        image_size: pixels along a side of the pictures.
        layout: "taming" or "llamagen".

    Returns:
        The tokenizer in eval mode.

    Raises:
        ValueError: the tensors are not those of such a network; the message lists the difference.
    """
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
            codebook_size=state["quantize.embedding.weight"].shape[0],
            attention=layout == "llamagen",
            l2_normalize=layout == "llamagen",
        )
    except (KeyError, IndexError) as error:
        raise ValueError(f"these are not the tensors of a VQGAN: {error} is not among them") from error
    tokenizer = VQGAN(config)
    shapes = {name: tensor.shape for name, tensor in tokenizer.net.state_dict().items()}
    renamed = {rename_key(name, layout, levels): tensor for name, tensor in state.items()}
    # an attention projection is a linear layer in diffusers and a 1x1 convolution in the public file
    flattened_state = {
        k: v.flatten(1) if k in shapes and v.ndim == 4 and len(shapes[k]) == 2 else v for k, v in renamed.items()
    }
    load_strict(tokenizer.net, flattened_state, "of the image tokenizer")
    return tokenizer.eval()


def load_chameleon(folder: Path, image_size: int) -> VQGAN:
    """Load Chameleon's tokenizer for a model: its folder in our layout, else its public file, else that of the hub.

    Args:
        folder: of the model.
        image_size: pixels along a side of the pictures, where no settings say so.

    Returns:
        The tokenizer in eval mode.

    Raises:
        ValueError: the tokenizer is not there, or damaged; in one line.
    """
    if (folder / "image_tokenizer").is_dir():
        return load_image_tokenizer(folder / "image_tokenizer")
    hub_path = f"tokenizer/{CHAMELEON_FILE}"
    path = find_component(
        folder, CHAMELEON_FILE, "Chameleon's image tokenizer", lambda: fetch_file(CHAMELEON, hub_path)
    )
    return load_public(path, image_size)


def load_public(path: Path, image_size: int) -> VQGAN:
    """Load a tokenizer from a file of taming's layout.

    Args:
        path: of the file.
        image_size: pixels along a side of the pictures, where no settings (.yaml) beside the file say so.

    Returns:
        The tokenizer in eval mode.

    Raises:
        ValueError: the tensors are not those of such a network; the message lists the difference.
    """
    settings = path.with_suffix(".yaml")
    size = re.search(r"^\s*resolution:\s*(\d+)", settings.read_text(), re.M) if settings.is_file() else None
    return from_public(read_tensors(path), int(size[1]) if size else image_size)


def save_public(tokenizer: VQGAN, folder: Path) -> None:
    """Write vqgan.ckpt and vqgan.yaml, the files of Chameleon's tokenizer.

    Args:
        tokenizer: the tokenizer.
        folder: where the files go; it is made where it is missing.
    """
    c = tokenizer.settings
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": to_public(tokenizer)}, folder / "vqgan.ckpt")
    lines = [
        "model:",
        "  params:",
        f"    embed_dim: {c.code_dim}",
        f"    n_embed: {c.codebook_size}",
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
    """Convert the tensors of a tokenizer to a public layout.

    Args:
        tokenizer: the tokenizer.
        layout: "taming" or "llamagen".

    Returns:
        The tensors by their public names, as `from_public` takes them.
    """
    levels, state = len(tokenizer.settings.channels), tokenizer.net.state_dict()
    return {
        rename_key(k, layout, levels, public=True): v[:, :, None, None] if ".attentions." in k and v.ndim == 2 else v
        for k, v in state.items()
    }
