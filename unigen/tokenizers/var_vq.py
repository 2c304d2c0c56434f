"""VAR's image tokenizer: a convolutional autoencoder (diffusers' `VQModel`) around the multi-scale residual quantizer.

Pictures (B, 3, H, W) in [-1, 1] <-> codes (B, P), all scales in a row. Does not depend on: families, training.
Shapes: B batch, D code dimension, h w grid of the last scale, P codes of all scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
    """Everything that defines the network."""

    scales: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    channels: tuple[int, ...] = (160, 160, 320, 320, 640)
    blocks: int = 2
    code_dim: int = 32
    codes: int = 4096

    def __post_init__(self) -> None:
        for name in ("scales", "channels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON gives lists


class VARVQ(nn.Module):
    """encode / decode without gradient: it is used as it was published."""

    def __init__(self, config: VARVQConfig | None = None) -> None:
        super().__init__()
        self.settings = c = config or VARVQConfig()
        stride = 2 ** (len(c.channels) - 1)
        size = c.scales[-1] * stride
        self.net = VQGAN(VQGANConfig(size, c.channels, c.blocks, c.code_dim, c.code_dim, 1, attention=True)).net
        self.net.quant_conv = nn.Conv2d(c.code_dim, c.code_dim, 3, padding=1)
        self.net.post_quant_conv = nn.Conv2d(c.code_dim, c.code_dim, 3, padding=1)
        self.net.quantize = nn.Identity()
        self.quantizer = MultiscaleQuantizer(c.codes, c.code_dim, c.scales, phis=NUM_PHIS)
        self._image_size = size

    @property
    def image_size(self) -> int:
        return self._image_size

    @property
    def grid(self) -> tuple[int, int]:
        return self.settings.scales[-1], self.settings.scales[-1]

    @property
    def codebook_size(self) -> int:
        return self.settings.codes

    def config(self) -> dict[str, object]:
        return {"kind": "var_vq", **to_dict(self.settings)}

    @torch.no_grad()
    def features(self, x_BCHW: Tensor) -> Tensor:
        """What `encode` quantizes, (B, D, h, w), fp32."""
        with torch.autocast(x_BCHW.device.type, enabled=False):
            return check_finite(self.net.encode(x_BCHW.to(self.net.quant_conv.weight.dtype)).latents).float()

    @torch.no_grad()
    def encode(self, x_BCHW: Tensor) -> Tensor:
        """Pixels in [-1, 1] (B, 3, H, W) -> codes (B, P)."""
        return self.quantizer.to_codes(self.features(x_BCHW))

    @torch.no_grad()
    def decode(self, codes_BP: Tensor) -> Tensor:
        """Codes (B, P), of all scales or of the first few -> pixels in [-1, 1] (B, 3, H, W), fp32."""
        f_hat_BDhw = self.quantizer.to_vectors(codes_BP).to(self.net.post_quant_conv.weight.dtype)
        return self.net.decode(f_hat_BDhw, force_not_quantize=True).sample.float().clamp(-1, 1)  # type: ignore[no-any-return]


def from_config(config: Mapping[str, object]) -> VARVQ:
    """The tokenizer described by `VARVQ.config()` (kind left out), untrained. ValueError for unknown keys."""
    return VARVQ(from_dict(VARVQConfig, config))


def from_public(state: Mapping[str, Tensor], scales: tuple[int, ...]) -> VARVQ:
    """The tokenizer of a public file, in eval mode: sizes are read off the tensors, the scales are of the model that
    goes with it. Raises ValueError listing the difference where they are not those of such a network."""
    try:
        levels = len({name.split(".")[2] for name in state if name.startswith("encoder.down.")})
        config = VARVQConfig(
            scales=scales,
            channels=tuple(state[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in range(levels)),
            blocks=len({name.split(".")[4] for name in state if name.startswith("encoder.down.0.block.")}),
            code_dim=state["quantize.embedding.weight"].shape[1],
            codes=state["quantize.embedding.weight"].shape[0],
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
    """The tensors of the public file, without what counts usage in its training."""
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
