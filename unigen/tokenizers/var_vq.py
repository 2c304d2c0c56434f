"""VAR's image tokenizer: a convolutional autoencoder (diffusers' `VQModel`) around the multi-scale residual quantizer.

Pictures (B, 3, H, W) in [-1, 1] <-> codes (B, P), all scales in a row. Does not depend on: families, training.
Shapes: B batch, D code dimension, h w grid of the last scale, P codes of all scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from unigen.config import from_dict, to_dict
from unigen.hub.weights import load_strict
from unigen.tokenizers.multiscale_vq import MultiscaleQuantizer
from unigen.tokenizers.quantize import check_finite
from unigen.tokenizers.vqgan import VQGAN, VQGANConfig, rename_key

NUM_PHIS = 4
UNUSED_KEYS = ("quantize.ema_vocab_hit_SV",)


@dataclass(frozen=True)
class VARVQConfig:
    """Configuration of the network."""

    RENAMED: ClassVar[Mapping[str, str]] = {"codes": "codebook_size"}
    """Keys of version 0.1, and their names now."""

    scales: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    """Sides of the token maps, growing; the last is the side of the grid."""
    channels: tuple[int, ...] = (160, 160, 320, 320, 640)
    """Channels of each resolution, the highest first; each but the first halves the map."""
    blocks: int = 2
    """Residual blocks of each resolution."""
    code_dim: int = 32
    """D, channels of a code."""
    codebook_size: int = 4096
    """Size of the codebook."""

    def __post_init__(self) -> None:
        for name in ("scales", "channels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON gives lists


class VARVQ(nn.Module):
    """VAR's tokenizer as it was published. `encode` and `decode` take no gradient."""

    def __init__(self, config: VARVQConfig | None = None) -> None:
        """
        Args:
            config: of the network; None: the defaults.
        """
        super().__init__()
        self.settings = c = config or VARVQConfig()
        stride = 2 ** (len(c.channels) - 1)
        size = c.scales[-1] * stride
        self.net = VQGAN(VQGANConfig(size, c.channels, c.blocks, c.code_dim, c.code_dim, 1, attention=True)).net
        self.net.quant_conv = nn.Conv2d(c.code_dim, c.code_dim, 3, padding=1)
        self.net.post_quant_conv = nn.Conv2d(c.code_dim, c.code_dim, 3, padding=1)
        self.net.quantize = nn.Identity()
        self.quantizer = MultiscaleQuantizer(c.codebook_size, c.code_dim, c.scales, phis=NUM_PHIS)
        self._image_size = size

    @property
    def image_size(self) -> int:
        """Pixels along a side of the pictures that the tokenizer was trained on."""
        return self._image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns (h, w) of the token map of the last scale."""
        return self.settings.scales[-1], self.settings.scales[-1]

    @property
    def codebook_size(self) -> int:
        """Number of codes; codes are in [0, codebook_size)."""
        return self.settings.codebook_size

    def config(self) -> dict[str, object]:
        """Return the kind and the configuration of the network."""
        return {"kind": "var_vq", **to_dict(self.settings)}

    @torch.no_grad()
    def features(self, x_BCHW: Tensor) -> Tensor:
        """Return the features that `encode` quantizes.

        Args:
            x_BCHW: pixels in [-1, 1], (B, 3, H, W).

        Returns:
            Features (B, D, h, w), fp32.

        Raises:
            NonFiniteError: a feature is infinite or nan.
        """
        with torch.autocast(x_BCHW.device.type, enabled=False):
            return check_finite(self.net.encode(x_BCHW.to(self.net.quant_conv.weight.dtype)).latents).float()

    @torch.no_grad()
    def encode(self, x_BCHW: Tensor) -> Tensor:
        """Encode pictures.

        Args:
            x_BCHW: pixels in [-1, 1], (B, 3, H, W).

        Returns:
            Codes of all scales (B, P), int64.

        Raises:
            NonFiniteError: a feature is infinite or nan.
        """
        return self.quantizer.to_codes(self.features(x_BCHW))

    @torch.no_grad()
    def decode(self, codes_BP: Tensor) -> Tensor:
        """Decode pictures.

        Args:
            codes_BP: codes of all scales, or of the first few, (B, P).

        Returns:
            Pixels in [-1, 1], (B, 3, H, W), fp32.

        Raises:
            ValueError: a code is out of range, or a scale is not complete.
        """
        f_hat_BDhw = self.quantizer.to_vectors(codes_BP).to(self.net.post_quant_conv.weight.dtype)
        return self.net.decode(f_hat_BDhw, force_not_quantize=True).sample.float().clamp(-1, 1)  # type: ignore[no-any-return]


def from_config(config: Mapping[str, object]) -> VARVQ:
    """Build an untrained tokenizer.

    Args:
        config: of `VARVQ.config`, kind left out.

    Returns:
        The tokenizer.

    Raises:
        ValueError: a key is unknown.
    """
    return VARVQ(from_dict(VARVQConfig, config))


def from_public(state: Mapping[str, Tensor], scales: tuple[int, ...]) -> VARVQ:
    """Build the tokenizer of a public file.

    Args:
        state: the tensors of the file, by name. The sizes of the network are read off them.
        scales: sides of the token maps, of the model that goes with the file.

    Returns:
        The tokenizer in eval mode.

    Raises:
        ValueError: the tensors are not those of such a network; the message lists the difference.
    """
    try:
        levels = len({name.split(".")[2] for name in state if name.startswith("encoder.down.")})
        config = VARVQConfig(
            scales=scales,
            channels=tuple(state[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in range(levels)),
            blocks=len({name.split(".")[4] for name in state if name.startswith("encoder.down.0.block.")}),
            code_dim=state["quantize.embedding.weight"].shape[1],
            codebook_size=state["quantize.embedding.weight"].shape[0],
        )
    except (KeyError, IndexError) as error:
        raise ValueError(f"these are not the tensors of VAR's tokenizer: {error} is not among them") from error
    tokenizer = VARVQ(config)
    own_state: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in UNUSED_KEYS:
            continue
        if name == "quantize.embedding.weight":
            own_state["quantizer.codebook"] = tensor
        elif name.startswith("quantize.quant_resi.qresi_ls."):
            own_state["quantizer.phis." + name.split(".", 3)[3]] = tensor
        elif ".qkv." in name:
            for part, projection in zip(
                "qkv", tensor.flatten(1).chunk(3) if tensor.ndim > 1 else tensor.chunk(3), strict=True
            ):
                own_state["net." + rename_key(name.replace(".qkv.", f".{part}."), "taming", levels)] = projection
        else:
            linear = ".attn" in name and tensor.ndim == 4
            own_state["net." + rename_key(name, "taming", levels)] = tensor.flatten(1) if linear else tensor
    buffers = {k: v for k, v in tokenizer.state_dict().items() if k in ("quantizer.usage_K", "quantizer.steps")}
    load_strict(tokenizer, buffers | own_state, "of the image tokenizer")
    return tokenizer.eval()


def to_public(tokenizer: VARVQ) -> dict[str, Tensor]:
    """Convert the tensors of a tokenizer to those of a public file, without the usage counts of its training.

    Args:
        tokenizer: the tokenizer.

    Returns:
        The tensors by their public names, as `from_public` takes them.
    """
    levels, state = len(tokenizer.settings.channels), tokenizer.state_dict()
    public_state = {"quantize.embedding.weight": state["quantizer.codebook"]}
    for name, tensor in state.items():
        if name.startswith("quantizer.phis."):
            public_state["quantize.quant_resi.qresi_ls." + name.removeprefix("quantizer.phis.")] = tensor
        if not name.startswith("net.") or ".to_k." in name or ".to_v." in name:
            continue
        public = rename_key(name.removeprefix("net."), "taming", levels, public=True)
        if ".to_q." in name:
            tensor = torch.cat([state[name.replace(".to_q.", f".to_{part}.")] for part in "qkv"])
            public = public.replace(".q.", ".qkv.")
        public_state[public] = tensor[:, :, None, None] if ".attn" in public and tensor.ndim == 2 else tensor
    return public_state
