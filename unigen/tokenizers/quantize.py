"""From a feature map to codes and back: VQ with an l2-normalised codebook, FSQ and LFQ, behind one interface.

A quantizer takes features of `dim` channels and picks one of `size` codes a position. `forward` gives the
straight-through vectors, the codes, and its own losses as `{name: (sum, count)}`. Does not depend on: pictures,
networks, optimizers, files.

  VectorQuantizer   nearest unit vector in a learned table (van den Oord et al. 2017; l2-normalised as in ViT-VQGAN,
                    Yu et al. 2022, and LlamaGen, Sun et al. 2024), with dead codes revived from the batch
  FSQ      a rounded tanh per channel (Mentzer et al. 2023, "FSQ: VQ-VAE made simple")
  LFQ        the sign per channel with an entropy loss (Yu et al. 2023, "Language model beats diffusion")

Shapes: B batch, D code dimension, h w grid, N = B h w positions, K codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from unigen.utils.numbers import NonFiniteError


class QuantizerOutput(NamedTuple):
    """What a quantizer makes of features."""

    vectors_BDhw: Tensor
    """The codes' vectors; their gradient passes to the features unchanged."""
    codes_Bhw: Tensor
    """int64 in [0, size)."""
    losses: dict[str, tuple[Tensor, int]]
    """By name the sum over positions, and the number of positions."""


class Quantizer(nn.Module):
    """Base of quantizers."""

    size: int
    """K, how many codes there are."""
    dim: int
    """D, channels of the features."""

    def to_codes(self, z_BDhw: Tensor) -> Tensor:
        """Codes (B, h, w), int64, of features (B, D, h, w) as `normalize` gives them."""
        raise TypeError("a quantizer defines to_codes()")

    def to_vectors(self, codes_Bhw: Tensor) -> Tensor:
        """Vectors (B, D, h, w), fp32, of codes (B, h, w). Raises ValueError for codes out of range."""
        raise TypeError("a quantizer defines to_vectors()")

    def losses(self, z_BDhw: Tensor, q_BDhw: Tensor) -> dict[str, tuple[Tensor, int]]:
        """Losses of features and the vectors that took their place."""
        return {}

    def normalize(self, z_BDhw: Tensor) -> Tensor:
        """Features as they are compared with codes (fp32)."""
        return z_BDhw.float()

    def on_training_step(self, z_BDhw: Tensor, rng: torch.Generator | None) -> None:
        """Called once a training step with the features that are quantised; rng: as of `forward`."""

    def update_usage(self, codes_Bhw: Tensor) -> None:
        """Called once a training step with the codes picked."""

    def forward(self, z_BDhw: Tensor, rng: torch.Generator | None = None) -> QuantizerOutput:
        """Quantise features.

        Args:
            z_BDhw: the features.
            rng: picks replacements for dead codes; without it, or in eval mode, nothing is revived.

        Returns:
            The vectors, the codes and the losses.
        """
        with torch.autocast(z_BDhw.device.type, enabled=False):
            z_BDhw = self.normalize(z_BDhw)
            learning = self.training and torch.is_grad_enabled()
            if learning:
                self.on_training_step(z_BDhw.detach(), rng)
            codes_Bhw = self.to_codes(z_BDhw.detach())
            q_BDhw = self.to_vectors(codes_Bhw)
            losses = self.losses(z_BDhw, q_BDhw)
            if learning:
                self.update_usage(codes_Bhw)
            return QuantizerOutput(straight_through(z_BDhw, q_BDhw), codes_Bhw, losses)

    def check_codes(self, codes_Bhw: Tensor) -> None:
        """Raises ValueError for codes out of range."""
        check_codes(codes_Bhw, self.size)


def check_codes(codes_Bhw: Tensor, size: int) -> None:
    """Raises ValueError for codes that are not in 0..size - 1."""
    if codes_Bhw.numel() and (int(codes_Bhw.min()) < 0 or int(codes_Bhw.max()) >= size):
        code_range = f"{int(codes_Bhw.min())}..{int(codes_Bhw.max())}"
        raise ValueError(
            f"image codes must be in 0..{size - 1}, got {code_range}; were they made by another tokenizer?"
        )


def check_finite(features: Tensor) -> Tensor:
    """The features of pictures. Raises NonFiniteError where one of them is infinite or nan: the code nearest to it
    would be an accident."""
    if not bool(features.isfinite().all()):
        raise NonFiniteError("features of pictures", features.dtype)
    return features


def straight_through(z: Tensor, q: Tensor) -> Tensor:
    """Value of q, gradient of z (Bengio et al. 2013)."""
    return z + (q - z).detach()


def entropy_terms(logits_NK: Tensor) -> tuple[Tensor, Tensor]:
    """The mean entropy of each row's softmax and the entropy of the mean softmax, in nats; LFQ's eq. 5 takes the
    difference."""
    log_p_NK = logits_NK.log_softmax(-1)
    p_NK = log_p_NK.exp()
    mean_K = p_NK.mean(0)
    return -(p_NK * log_p_NK).sum(-1).mean(), -(mean_K * mean_K.clamp_min(1e-9).log()).sum()


def channels_last(z_BDhw: Tensor) -> Tensor:
    return z_BDhw.permute(0, 2, 3, 1)


def channels_first(z_BhwD: Tensor) -> Tensor:
    return z_BhwD.permute(0, 3, 1, 2)


class VectorQuantizer(Quantizer):
    """argmin_k |z/|z| - e_k/|e_k||; loss |sg(z) - e|^2 + beta |z - sg(e)|^2 (van den Oord et al. 2017, eq. 3).

    Dead codes: `usage_K` is a running share of picks per code (1/K each when uniform). Every `revive_every` training
    steps the codes whose usage is under `dead_below` / K take the place of features of the batch, drawn with
    probability proportional to their squared distance from the codebook (the seeding of k-means++, Arthur &
    Vassilvitskii 2007), so that what is represented worst gets a code first. A revived code starts with usage 1/K.
    `revive_every=0` is off.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        beta: float = 0.25,
        entropy: float = 0.0,
        revive_every: int = 10,
        dead_below: float = 0.05,
        momentum: float = 0.99,
    ) -> None:
        super().__init__()
        self.size, self.dim, self.beta, self.entropy = size, dim, beta, entropy
        self.revive_every, self.dead_below, self.momentum = revive_every, dead_below, momentum
        self.codebook = nn.Parameter(F.normalize(torch.randn(size, dim), dim=-1))
        self.register_buffer("usage_K", torch.full((size,), 1.0 / size))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.usage_K: Tensor
        self.steps: Tensor

    def normalize(self, z_BDhw: Tensor) -> Tensor:
        return F.normalize(z_BDhw.float(), dim=1)

    def codebook_vectors(self) -> Tensor:
        """The codebook (K, D) with unit rows, fp32."""
        return F.normalize(self.codebook.float(), dim=-1)

    def to_codes(self, z_BDhw: Tensor) -> Tensor:
        # all unit vectors: the largest dot product is the smallest distance
        return (channels_last(z_BDhw) @ self.codebook_vectors().detach().T).argmax(-1)

    def to_vectors(self, codes_Bhw: Tensor) -> Tensor:
        self.check_codes(codes_Bhw)
        return channels_first(F.embedding(codes_Bhw, self.codebook_vectors()))

    def losses(self, z_BDhw: Tensor, q_BDhw: Tensor) -> dict[str, tuple[Tensor, int]]:
        n = z_BDhw.numel() // self.dim
        codebook = (z_BDhw.detach() - q_BDhw).square().sum()
        commit = (z_BDhw - q_BDhw.detach()).square().sum()
        losses = {"codebook": (codebook, n), "commit": (self.beta * commit, n)}
        if self.entropy:
            row_entropy, mean_entropy = entropy_terms(
                channels_last(z_BDhw).reshape(n, self.dim) @ self.codebook_vectors().T / 0.05
            )
            losses["entropy"] = (self.entropy * (row_entropy - mean_entropy) * n, n)
        return losses

    @torch.no_grad()
    def on_training_step(self, z_BDhw: Tensor, rng: torch.Generator | None) -> None:
        self.steps += 1
        if self.revive_every and rng is not None and int(self.steps) % self.revive_every == 0:
            self.revive_dead_codes(channels_last(z_BDhw).reshape(-1, self.dim), rng)

    def squared_distances(self, z_ND: Tensor) -> Tensor:
        """Squared distance of features (N, D) from the codebook."""
        return 2 - 2 * (z_ND @ self.codebook_vectors().T).amax(-1)

    @torch.no_grad()
    def revive_dead_codes(self, z_ND: Tensor, rng: torch.Generator) -> int:
        """Give the dead codes new places among the features (N, D), and return how many were dead."""
        dead_K = self.usage_K < self.dead_below / self.size
        count = min(int(dead_K.sum()), len(z_ND))
        if count == 0:
            return 0
        error_N = self.squared_distances(z_ND).clamp_min(0) + 1e-6
        feature_indices = torch.multinomial(error_N.cpu(), count, generator=rng).to(z_ND.device)
        rows_nD = z_ND[feature_indices].to(self.codebook.dtype)
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(rows_nD, 0)
        dead_indices = dead_K.nonzero()[:count, 0]
        self.codebook[dead_indices] = rows_nD
        self.usage_K[dead_indices] = 1.0 / self.size
        return count

    @torch.no_grad()
    def update_usage(self, codes_Bhw: Tensor) -> None:
        share_K = torch.bincount(codes_Bhw.reshape(-1), minlength=self.size).to(self.usage_K)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(share_K)
        self.usage_K.lerp_(share_K / share_K.sum(), 1 - self.momentum)


class FSQ(Quantizer):
    """Each channel is squashed to (-L/2, L/2) and rounded to one of L levels; a code is their mixed-radix number."""

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.levels, self.dim = tuple(levels), len(levels)
        basis, size = [], 1
        for level in self.levels:
            basis.append(size)
            size *= level
        self.size = size
        self.register_buffer("levels_D", torch.tensor(self.levels), persistent=False)
        self.register_buffer("basis_D", torch.tensor(basis), persistent=False)
        self.levels_D: Tensor
        self.basis_D: Tensor

    def normalize(self, z_BDhw: Tensor) -> Tensor:
        """tanh(z + shift) * half - offset: rounds to exactly L values, odd or even (Mentzer et al. 2023)."""
        half_range = (self.levels_D - 1) * (1 + 1e-3) / 2
        offset = torch.where(self.levels_D % 2 == 0, 0.5, 0.0)
        shift = torch.atanh(offset / half_range)
        bounded = torch.tanh(channels_last(z_BDhw.float()) + shift) * half_range - offset
        return channels_first(bounded / (self.levels_D // 2))

    def to_codes(self, z_BDhw: Tensor) -> Tensor:
        width = self.levels_D // 2
        digits = (channels_last(z_BDhw) * width).round().long() + width
        return (digits * self.basis_D).sum(-1)

    def to_vectors(self, codes_Bhw: Tensor) -> Tensor:
        self.check_codes(codes_Bhw)
        width = self.levels_D // 2
        digits = codes_Bhw[..., None] // self.basis_D % self.levels_D
        return channels_first((digits - width) / width)


class LFQ(Quantizer):
    """The sign of each channel; code = the bits as a number. Loss: commitment + entropy (Yu et al. 2023, eq. 5)."""

    def __init__(self, bits: int, beta: float = 0.25, entropy: float = 0.1) -> None:
        super().__init__()
        self.dim, self.size, self.beta, self.entropy = bits, 2**bits, beta, entropy
        self.register_buffer("basis_D", 2 ** torch.arange(bits), persistent=False)
        self.basis_D: Tensor

    def to_codes(self, z_BDhw: Tensor) -> Tensor:
        return ((channels_last(z_BDhw) > 0).long() * self.basis_D).sum(-1)

    def to_vectors(self, codes_Bhw: Tensor) -> Tensor:
        self.check_codes(codes_Bhw)
        return channels_first((codes_Bhw[..., None] // self.basis_D % 2).float() * 2 - 1)

    def losses(self, z_BDhw: Tensor, q_BDhw: Tensor) -> dict[str, tuple[Tensor, int]]:
        n = z_BDhw.numel() // self.dim
        commit = (z_BDhw - q_BDhw.detach()).square().mean(1).sum()
        losses = {"commit": (self.beta * commit, n)}
        if self.entropy:
            # logits -|z - c|^2 over all codes c in {-1, 1}^D, up to a constant: 2 z.c
            all_codes = torch.arange(self.size, device=z_BDhw.device)[None, None]
            table_KD = channels_last(self.to_vectors(all_codes)).reshape(self.size, self.dim)
            row_entropy, mean_entropy = entropy_terms(2 * channels_last(z_BDhw).reshape(n, self.dim) @ table_KD.T)
            losses["entropy"] = (self.entropy * (row_entropy - mean_entropy) * n, n)
        return losses
