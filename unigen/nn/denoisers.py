"""Denoisers (`unigen.diffusion.denoiser`): networks that predict the velocity of a flow from noised latents, a time and
the hidden states of a prompt.

    network = build_denoiser("dit-adaln", channels=8, sample_size=8, context_dim=320, layers=4, heads=4, head_dim=48)
    velocity_MZhw = network(x_MZhw, t_M, PromptEmbeds(states_MND, mask_MN))    # t in [0, 1]; the last state is pooled

    mm-dit       joint attention of patches and context (SD3, Esser et al. 2024, section 4): diffusers'
    dit-adaln    DiT blocks, modulated by time + the last context state, gates from zero: adaLN-Zero
    dit-cross    DiT blocks with cross-attention to time and context
    dit-context  DiT blocks over patches, time and context in one sequence
    unet         a U-Net with cross-attention to the context (LDM, Rombach et al. 2022, section 3.3): diffusers'

The three DiT are those of Peebles and Xie 2023 (arXiv 2212.09748), section 3.2 and figure 3. All but mm-dit ignore
context states that the mask marks as padding. Does not depend on: losses, solvers, tokenizers.

Shapes: M images, Z latent channels, h w grid of latents, P patches, N context states, D their width, E width inside.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from unigen.diffusion.denoiser import PromptEmbeds
from unigen.diffusion.path import PredictionType

DenoiserKind = Literal["mm-dit", "dit-adaln", "dit-cross", "dit-context", "unet"]
DENOISERS: tuple[DenoiserKind, ...] = ("mm-dit", "dit-adaln", "dit-cross", "dit-context", "unet")


def build_denoiser(
    kind: DenoiserKind,
    *,
    channels: int,
    sample_size: int,
    context_dim: int,
    layers: int,
    heads: int,
    head_dim: int,
    patch_size: int = 1,
) -> DenoiserNetwork:
    """An untrained network.

    Args:
        kind: one of `DENOISERS`.
        channels: channels Z of the latents.
        sample_size: sides h = w of the latents.
        context_dim: width D of the context states.
        layers: blocks of a transformer; a U-Net has `layers` residual blocks in all on the way down.
        heads: attention heads.
        head_dim: width of a head; a U-Net has heads * head_dim channels on the first of its two levels.
        patch_size: side of a patch in latents; a U-Net has none.

    Returns:
        The network, with random weights.

    Raises:
        ValueError: the patch size does not divide the sample size.
    """
    if sample_size % patch_size:
        raise ValueError(f"patch must divide the grid of latents {sample_size}, got {patch_size}")
    if kind == "mm-dit":
        return MMDiT(channels, sample_size, context_dim, layers, heads, head_dim, patch_size)
    if kind == "unet":
        return UNet(channels, sample_size, context_dim, layers, heads, head_dim)
    return DiT(kind, channels, sample_size, context_dim, layers, heads, head_dim, patch_size)


class DenoiserNetwork(nn.Module, ABC):
    """A network that satisfies `unigen.diffusion.denoiser.Denoiser`."""

    prediction_type: PredictionType = "velocity"
    io_layers: tuple[nn.Module, ...]
    """Input and output layers, which optimizers for hidden matrices (Muon) leave to another."""

    def forward(
        self,
        x_MZhw: Tensor,
        t_M: Tensor,
        condition: PromptEmbeds,
        mask: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """The velocity (M, Z, h, w).

        Args:
            x_MZhw: noised latents.
            t_M: times in [0, 1].
            condition: context states; the last of each sample is its pooled condition.
            mask: None: these networks read no mask of a region.
            guidance: None: these networks read no guidance scale.

        Raises:
            ValueError: for a mask or a guidance scale.
        """
        if mask is not None or guidance is not None:
            raise ValueError(f"{type(self).__name__} reads no {'guidance' if mask is None else 'mask of a region'}")
        return self.predict(x_MZhw, t_M, condition)

    @abstractmethod
    def predict(self, x_MZhw: Tensor, t_M: Tensor, condition: PromptEmbeds) -> Tensor:
        """The velocity.

        Args:
            x_MZhw: noised latents.
            t_M: times in [0, 1].
            condition: context states.

        Returns:
            The velocity (M, Z, h, w).
        """


class MMDiT(DenoiserNetwork):
    """diffusers' `SD3Transformer2DModel`; the last context state is its pooled condition."""

    def __init__(
        self,
        channels: int,
        sample_size: int,
        context_dim: int,
        layers: int,
        heads: int,
        head_dim: int,
        patch_size: int,
    ) -> None:
        super().__init__()
        from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

        self.model = SD3Transformer2DModel(
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=channels,
            out_channels=channels,
            num_layers=layers,
            attention_head_dim=head_dim,
            num_attention_heads=heads,
            joint_attention_dim=context_dim,
            caption_projection_dim=heads * head_dim,
            pooled_projection_dim=context_dim,
            pos_embed_max_size=sample_size // patch_size,
            qk_norm="rms_norm",
        )
        m = self.model
        self.io_layers = (m.context_embedder, m.time_text_embed, m.norm_out, m.proj_out)

    def predict(self, x_MZhw: Tensor, t_M: Tensor, condition: PromptEmbeds) -> Tensor:
        """See `DenoiserNetwork.predict`."""
        context_MND = condition.embeds_MND
        return self.model(x_MZhw, context_MND, context_MND[:, -1], timestep=t_M * 1000, return_dict=False)[0]


class UNet(DenoiserNetwork):
    """diffusers' `UNet2DConditionModel` of two levels, with cross-attention to the context in the first."""

    def __init__(
        self, channels: int, sample_size: int, context_dim: int, layers: int, heads: int, head_dim: int
    ) -> None:
        super().__init__()
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        width = heads * head_dim
        self.model = UNet2DConditionModel(
            sample_size=sample_size,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(width, 2 * width),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=max(1, layers // 2),
            cross_attention_dim=context_dim,
            attention_head_dim=heads,  # diffusers' name for the number of heads
            norm_num_groups=16,
        )
        self.io_layers = (self.model.time_embedding,)

    def predict(self, x_MZhw: Tensor, t_M: Tensor, condition: PromptEmbeds) -> Tensor:
        """See `DenoiserNetwork.predict`."""
        mask_MN = condition.mask_MN
        return self.model(x_MZhw, t_M * 1000, condition.embeds_MND, encoder_attention_mask=mask_MN, return_dict=False)[
            0
        ]


def to_patches(x_MZhw: Tensor, patch_size: int) -> Tensor:
    """Split latents into patches.

    Args:
        x_MZhw: latents; `patch_size` divides h and w.
        patch_size: side of a patch in latents.

    Returns:
        Patches (M, P, Z patch_size^2), row by row.
    """
    return nn.functional.unfold(x_MZhw, patch_size, stride=patch_size).transpose(1, 2)


def from_patches(patches_MPF: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Latents of patches: the inverse of `to_patches`.

    Args:
        patches_MPF: patches, row by row.
        grid: rows h and columns w of the latents.
        patch_size: side of a patch in latents.

    Returns:
        Latents (M, Z, h, w).
    """
    return nn.functional.fold(patches_MPF.transpose(1, 2), grid, patch_size, stride=patch_size)


class TimestepEmbedder(nn.Module):
    """Times (M,) in [0, 1] as vectors (M, width): diffusers' sines, cosines and MLP, on a thousand times the time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        from diffusers.models.embeddings import TimestepEmbedding, Timesteps

        self.frequencies = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.mlp = TimestepEmbedding(256, width)

    def forward(self, t_M: Tensor) -> Tensor:
        """Vectors (M, width) of times (M,)."""
        return self.mlp(self.frequencies(t_M * 1000).to(self.mlp.linear_1.weight.dtype))


class DiTBlock(nn.Module):
    """x + attention, + cross-attention, + mlp, each of the normed x; modulated and gated where kind is dit-adaln.
    Attention and mlp are diffusers'."""

    OLD_KEYS: ClassVar[Mapping[str, str]] = {"cross": "cross_attention"}
    """Names of layers in version 0.1, and their names now."""

    def __init__(self, kind: DenoiserKind, width: int, heads: int) -> None:
        super().__init__()
        from diffusers.models.attention import FeedForward
        from diffusers.models.attention_processor import Attention

        is_unmodulated, has_cross_attention = kind != "dit-adaln", kind == "dit-cross"
        self.norms = nn.ModuleList(
            nn.LayerNorm(width, eps=1e-6, elementwise_affine=is_unmodulated)
            for _ in range(3 if has_cross_attention else 2)
        )
        head_dim = width // heads
        self.attention = Attention(width, heads=heads, dim_head=head_dim, bias=True)
        self.cross_attention = (
            Attention(width, cross_attention_dim=width, heads=heads, dim_head=head_dim, bias=True)
            if has_cross_attention
            else None
        )
        self.mlp = FeedForward(width, activation_fn="gelu-approximate")
        self.modulation = None if is_unmodulated else nn.Linear(width, 6 * width)
        if self.modulation is not None:
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def forward(self, x_MPE: Tensor, summary_ME: Tensor, context_MNE: Tensor, mask_M1N: Tensor | None) -> Tensor:
        """One block.

        Args:
            x_MPE: patches; with dit-context the whole sequence.
            summary_ME: time and last context state in one vector, which modulates with dit-adaln.
            context_MNE: time and context, read with dit-cross.
            mask_M1N: True where a position counts: of the context with dit-cross, of the whole sequence with
                dit-context; None where all count.

        Returns:
            Of x's shape.
        """
        if self.modulation is not None:
            parts = self.modulation(nn.functional.silu(summary_ME))[:, None].chunk(6, -1)
            shift, scale, gate = parts[:3]
            x_MPE = x_MPE + gate * self.attention(self.norms[0](x_MPE) * (1 + scale) + shift)
            shift, scale, gate = parts[3:]
            return x_MPE + gate * self.mlp(self.norms[1](x_MPE) * (1 + scale) + shift)
        if self.cross_attention is not None:
            x_MPE = x_MPE + self.attention(self.norms[0](x_MPE))
            x_MPE = x_MPE + self.cross_attention(self.norms[2](x_MPE), context_MNE, attention_mask=mask_M1N)
        else:
            x_MPE = x_MPE + self.attention(self.norms[0](x_MPE), attention_mask=mask_M1N)
        return x_MPE + self.mlp(self.norms[1](x_MPE))


class DiT(DenoiserNetwork):
    """A transformer over patches of latents, with one of three kinds of conditioning."""

    OLD_KEYS: ClassVar[Mapping[str, str]] = {
        "enter": "proj_in",
        "time": "time_embed",
        "context": "context_proj",
        "leave": "proj_out",
    }
    """Names of layers in version 0.1, and their names now."""

    def __init__(
        self,
        kind: DenoiserKind,
        channels: int,
        sample_size: int,
        context_dim: int,
        layers: int,
        heads: int,
        head_dim: int,
        patch_size: int,
    ) -> None:
        super().__init__()
        from diffusers.models.embeddings import get_2d_sincos_pos_embed

        self.kind, self.patch_size, width = kind, patch_size, heads * head_dim
        self.proj_in = nn.Linear(channels * patch_size**2, width)
        self.time_embed = TimestepEmbedder(width)
        self.context_proj = nn.Linear(context_dim, width)
        self.blocks = nn.ModuleList(DiTBlock(kind, width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=kind != "dit-adaln")
        self.modulation = nn.Linear(width, 2 * width) if kind == "dit-adaln" else None
        self.proj_out = nn.Linear(width, channels * patch_size**2)
        pos_embed = get_2d_sincos_pos_embed(width, sample_size // patch_size, output_type="pt")
        self.register_buffer("pos_embed_PE", pos_embed.float(), persistent=False)
        self.pos_embed_PE: Tensor
        zeros = [self.proj_out] if self.modulation is None else [self.proj_out, self.modulation]
        for layer in zeros:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.io_layers = (self.proj_in, self.time_embed, self.context_proj, self.proj_out)

    def predict(self, x_MZhw: Tensor, t_M: Tensor, condition: PromptEmbeds) -> Tensor:
        """See `DenoiserNetwork.predict`."""
        h_MPE = self.proj_in(to_patches(x_MZhw, self.patch_size))
        h_MPE, time_ME = h_MPE + self.pos_embed_PE.to(h_MPE.dtype), self.time_embed(t_M)
        context_MNE = torch.cat((time_ME[:, None], self.context_proj(condition.embeds_MND)), 1)
        summary_ME, count = time_ME + context_MNE[:, -1], h_MPE.shape[1]
        mask_MN = condition.mask_MN
        if mask_MN is not None:
            mask_MN = nn.functional.pad(mask_MN, (1, 0), value=True)  # the time is not masked
        if self.kind == "dit-context":
            h_MPE = torch.cat((h_MPE, context_MNE), 1)
            if mask_MN is not None:
                mask_MN = nn.functional.pad(mask_MN, (count, 0), value=True)
        mask_M1N = None if mask_MN is None else mask_MN[:, None]
        for block in self.blocks:
            h_MPE = block(h_MPE, summary_ME, context_MNE, mask_M1N)
        h_MPE = self.norm(h_MPE[:, :count])
        if self.modulation is not None:
            shift, scale = self.modulation(nn.functional.silu(summary_ME))[:, None].chunk(2, -1)
            h_MPE = h_MPE * (1 + scale) + shift
        height, columns = x_MZhw.shape[-2:]
        return from_patches(self.proj_out(h_MPE), (height, columns), self.patch_size)
