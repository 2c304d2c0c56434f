"""Networks that a flow may have for its velocity: they read noised latents, a time and the states of a chat.

    network = build_denoiser("dit-adaln", channels=8, side=8, context=320, layers=4, heads=4, head_dim=48)
    velocity_MZhw = network(x_MZhw, t_M, context_MND)             # t in [0, 1]; the last context state sums it up

    mm-dit       joint attention of patches and context (SD3, Esser et al. 2024, section 4): diffusers'
    dit-adaln    DiT blocks, modulated by time + the last context state, gates from zero: adaLN-Zero
    dit-cross    DiT blocks that look at time and context by cross-attention
    dit-context  DiT blocks over patches, time and context in one sequence
    unet         a U-Net with cross-attention to the context (LDM, Rombach et al. 2022, section 3.3): diffusers'

The three DiT are those of Peebles and Xie 2023 (arXiv 2212.09748), section 3.2 and figure 3. Context states that are
all zeros are padding, at which all but mm-dit do not look. Does not depend on: losses, samplers, tokenizers.

Shapes: M images, Z latent channels, h w grid of latents, P patches, N context states, D their width, E width inside.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

DenoiserKind = Literal["mm-dit", "dit-adaln", "dit-cross", "dit-context", "unet"]
DENOISERS: tuple[DenoiserKind, ...] = ("mm-dit", "dit-adaln", "dit-cross", "dit-context", "unet")


def build_denoiser(
    kind: DenoiserKind,
    *,
    channels: int,
    side: int,
    context: int,
    layers: int,
    heads: int,
    head_dim: int,
    patch: int = 1,
) -> nn.Module:
    """An untrained network of `kind` for latents (channels, side, side) and context states of width `context`.

    layers, heads, head_dim: of the transformers; a U-Net has heads * head_dim channels on its first of two levels and
    `layers` residual blocks in all on the way down. ValueError where patch does not divide the side.
    """
    if side % patch:
        raise ValueError(f"patch must divide the grid of latents {side}, got {patch}")
    if kind == "mm-dit":
        return MMDiT(channels, side, context, layers, heads, head_dim, patch)
    if kind == "unet":
        return UNet(channels, side, context, layers, heads, head_dim)
    return DiT(kind, channels, side, context, layers, heads, head_dim, patch)


class MMDiT(nn.Module):
    """diffusers' `SD3Transformer2DModel`; the last context state is its pooled condition."""

    def __init__(
        self, channels: int, side: int, context: int, layers: int, heads: int, head_dim: int, patch: int
    ) -> None:
        super().__init__()
        from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

        self.model = SD3Transformer2DModel(
            sample_size=side,
            patch_size=patch,
            in_channels=channels,
            out_channels=channels,
            num_layers=layers,
            attention_head_dim=head_dim,
            num_attention_heads=heads,
            joint_attention_dim=context,
            caption_projection_dim=heads * head_dim,
            pooled_projection_dim=context,
            pos_embed_max_size=side // patch,
            qk_norm="rms_norm",
        )
        m = self.model
        self.edges: tuple[Any, ...] = (m.context_embedder, m.time_text_embed, m.norm_out, m.proj_out)

    def forward(self, x_MZhw: Tensor, t_M: Tensor, context_MND: Tensor) -> Tensor:
        pooled_MD = context_MND[:, -1]
        return self.model(x_MZhw, context_MND, pooled_MD, timestep=t_M * 1000, return_dict=False)[0]


class UNet(nn.Module):
    """diffusers' `UNet2DConditionModel` of two levels, the first of which looks at the context."""

    def __init__(self, channels: int, side: int, context: int, layers: int, heads: int, head_dim: int) -> None:
        super().__init__()
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        width = heads * head_dim
        self.model = UNet2DConditionModel(
            sample_size=side,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(width, 2 * width),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=max(1, layers // 2),
            cross_attention_dim=context,
            attention_head_dim=heads,  # diffusers' name for the number of heads
            norm_num_groups=16,
        )
        m = self.model
        self.edges: tuple[Any, ...] = (m.time_embedding,)

    def forward(self, x_MZhw: Tensor, t_M: Tensor, context_MND: Tensor) -> Tensor:
        mask_MN = (context_MND != 0).any(-1)
        return self.model(x_MZhw, t_M * 1000, context_MND, encoder_attention_mask=mask_MN, return_dict=False)[0]


def to_patches(x_MZhw: Tensor, patch: int) -> Tensor:
    """Latents as patches, row by row: (M, P, Z patch^2)."""
    return nn.functional.unfold(x_MZhw, patch, stride=patch).transpose(1, 2)


def from_patches(patches_MPF: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Latents (M, Z, h, w) of patches, the inverse of `to_patches`."""
    return nn.functional.fold(patches_MPF.transpose(1, 2), grid, patch, stride=patch)


class TimestepEmbedder(nn.Module):
    """Times (M,) in [0, 1] as vectors (M, width): diffusers' waves and MLP, on a thousand times the time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        from diffusers.models.embeddings import TimestepEmbedding, Timesteps

        self.waves = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.mlp = TimestepEmbedding(256, width)

    def forward(self, t_M: Tensor) -> Tensor:
        return self.mlp(self.waves(t_M * 1000).to(self.mlp.linear_1.weight.dtype))


class DiTBlock(nn.Module):
    """x + attention, + cross-attention, + mlp, each of the normed x; modulated and gated where kind is dit-adaln.
    Attention and mlp are diffusers'."""

    def __init__(self, kind: DenoiserKind, width: int, heads: int) -> None:
        super().__init__()
        from diffusers.models.attention import FeedForward
        from diffusers.models.attention_processor import Attention

        is_unmodulated, has_cross_attention = kind != "dit-adaln", kind == "dit-cross"
        self.norms = nn.ModuleList(
            nn.LayerNorm(width, eps=1e-6, elementwise_affine=is_unmodulated)
            for _ in range(3 if has_cross_attention else 2)
        )
        shape: dict[str, Any] = {"heads": heads, "dim_head": width // heads, "bias": True}
        self.attention = Attention(width, **shape)
        self.cross = Attention(width, cross_attention_dim=width, **shape) if has_cross_attention else None
        self.mlp = FeedForward(width, activation_fn="gelu-approximate")
        self.modulation = None if is_unmodulated else nn.Linear(width, 6 * width)
        if self.modulation is not None:
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def forward(self, x_MPE: Tensor, condition_ME: Tensor, context_MNE: Tensor, mask_M1N: Tensor | None) -> Tensor:
        """mask_M1N: of the context with dit-cross, of the whole sequence with dit-context."""
        if self.modulation is not None:
            parts = self.modulation(nn.functional.silu(condition_ME))[:, None].chunk(6, -1)
            shift, scale, gate = parts[:3]
            x_MPE = x_MPE + gate * self.attention(self.norms[0](x_MPE) * (1 + scale) + shift)
            shift, scale, gate = parts[3:]
            return x_MPE + gate * self.mlp(self.norms[1](x_MPE) * (1 + scale) + shift)
        if self.cross is not None:
            x_MPE = x_MPE + self.attention(self.norms[0](x_MPE))
            x_MPE = x_MPE + self.cross(self.norms[2](x_MPE), context_MNE, attention_mask=mask_M1N)
        else:
            x_MPE = x_MPE + self.attention(self.norms[0](x_MPE), attention_mask=mask_M1N)
        return x_MPE + self.mlp(self.norms[1](x_MPE))


class DiT(nn.Module):
    """Patches of latents through blocks of one of three ways of conditioning."""

    def __init__(
        self,
        kind: DenoiserKind,
        channels: int,
        side: int,
        context: int,
        layers: int,
        heads: int,
        head_dim: int,
        patch: int,
    ) -> None:
        super().__init__()
        from diffusers.models.embeddings import get_2d_sincos_pos_embed

        self.kind, self.patch, width = kind, patch, heads * head_dim
        self.enter = nn.Linear(channels * patch**2, width)
        self.time = TimestepEmbedder(width)
        self.context = nn.Linear(context, width)
        self.blocks = nn.ModuleList(DiTBlock(kind, width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=kind != "dit-adaln")
        self.modulation = nn.Linear(width, 2 * width) if kind == "dit-adaln" else None
        self.leave = nn.Linear(width, channels * patch**2)
        places = get_2d_sincos_pos_embed(width, side // patch, output_type="pt")
        self.register_buffer("places_PE", places.float(), persistent=False)
        self.places_PE: Tensor
        zeros = [self.leave] if self.modulation is None else [self.leave, self.modulation]
        for layer in zeros:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.edges: tuple[Any, ...] = (self.enter, self.time, self.context, self.leave)

    def forward(self, x_MZhw: Tensor, t_M: Tensor, context_MND: Tensor) -> Tensor:
        h_MPE = self.enter(to_patches(x_MZhw, self.patch))
        h_MPE, time_ME = h_MPE + self.places_PE.to(h_MPE.dtype), self.time(t_M)
        context_MNE = torch.cat((time_ME[:, None], self.context(context_MND)), 1)
        valid_MN = nn.functional.pad((context_MND != 0).any(-1), (1, 0), value=True)
        condition_ME, count, mask = time_ME + context_MNE[:, -1], h_MPE.shape[1], valid_MN
        if self.kind == "dit-context":
            h_MPE = torch.cat((h_MPE, context_MNE), 1)
            mask = nn.functional.pad(valid_MN, (count, 0), value=True)
        for block in self.blocks:
            h_MPE = block(h_MPE, condition_ME, context_MNE, mask[:, None])
        h_MPE = self.norm(h_MPE[:, :count])
        if self.modulation is not None:
            shift, scale = self.modulation(nn.functional.silu(condition_ME))[:, None].chunk(2, -1)
            h_MPE = h_MPE * (1 + scale) + shift
        height, columns = x_MZhw.shape[-2:]
        return from_patches(self.leave(h_MPE), (height, columns), self.patch)
