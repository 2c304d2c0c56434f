"""From a feature map to codes and back: VQ with an l2-normalised codebook, FSQ and LFQ, behind one interface.

A quantizer takes features of `dim` channels and picks one of `size` codes a position. `forward` gives the
straight-through vectors, the codes, and its own losses as `{name: (sum, count)}`. Does not depend on: pictures,
networks, optimizers, files.

  VectorQuantizer   nearest unit vector in a learned table (van den Oord et al. 2017; l2-normalised as in ViT-VQGAN,
                    Yu et al. 2022, and LlamaGen, Sun et al. 2024), with dead codes revived from the batch
  FSQ               a rounded tanh per channel (Mentzer et al. 2023, "FSQ: VQ-VAE made simple")
  LFQ               the sign per channel with an entropy loss (Yu et al. 2023, "Language model beats diffusion")

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
    """The result of quantizing features."""

    vectors_BDhw: Tensor
    """The codes' vectors (B, D, h, w); their gradient passes to the features unchanged."""
    codes_Bhw: Tensor
    """The codes (B, h, w), int64 in [0, size)."""
    losses: dict[str, tuple[Tensor, int]]
    """Losses by name: the sum over positions, and the number of positions."""


class Quantizer(nn.Module):
    """Base of quantizers."""

    size: int
    """K, number of codes."""
    dim: int
    """D, channels of the features."""

    def to_codes(self, z_BDhw: Tensor) -> Tensor:
        """Find the code of each feature.

        Args:
            z_BDhw: features as `normalize` returns them, (B, D, h, w).

        Returns:
            Codes (B, h, w), int64.
        """
        raise TypeError("a quantizer defines to_codes()")

    def to_vectors(self, codes_Bhw: Tensor) -> Tensor:
        """Look up the vectors of codes.

        Args:
            codes_Bhw: codes (B, h, w).

        Returns:
            Vectors (B, D, h, w), fp32.

        Raises:
            ValueError: a code is out of range.
        """
        raise TypeError("a quantizer defines to_vectors()")

    def losses(self, z_BDhw: Tensor, q_BDhw: Tensor) -> dict[str, tuple[Tensor, int]]:
        """Compute the losses of a batch.

        Args:
            z_BDhw: features as `normalize` returns them, (B, D, h, w).
            q_BDhw: vectors of their codes, (B, D, h, w).

        Returns:
            Losses by name: the sum over positions, and the number of positions.
        """
        return {}

    def normalize(self, z_BDhw: Tensor) -> Tensor:
        """Convert features (B, D, h, w) to the form in which they are compared with codes, fp32."""
        return z_BDhw.float()

    def on_training_step(self, z_BDhw: Tensor, rng: torch.Generator | None) -> None:
        """Hook that is called once in a training step, before quantization.

        Args:
            z_BDhw: the features, detached, (B, D, h, w).
            rng: as in `forward`.
        """

    def update_usage(self, codes_Bhw: Tensor) -> None:
        """Hook that is called once in a training step with the codes (B, h, w) of the batch."""

    def forward(self, z_BDhw: Tensor, rng: torch.Generator | None = None) -> QuantizerOutput:
        """Quantize features, with a straight-through gradient.

        Args:
            z_BDhw: the features, (B, D, h, w).
            rng: draws replacements for dead codes. None, and eval mode: no code is revived.

        Returns:
            The vectors, the codes and the losses.
        """
        with torch.autocast(z_BDhw.device.type, enabled=False):
            z_BDhw = self.normalize(z_BDhw)
            is_training = self.training and torch.is_grad_enabled()
            if is_training:
                self.on_training_step(z_BDhw.detach(), rng)
            codes_Bhw = self.to_codes(z_BDhw.detach())
            q_BDhw = self.to_vectors(codes_Bhw)
            losses = self.losses(z_BDhw, q_BDhw)
            if is_training:
                self.update_usage(codes_Bhw)
            return QuantizerOutput(straight_through(z_BDhw, q_BDhw), codes_Bhw, losses)

    def check_codes(self, codes_Bhw: Tensor) -> None:
        """Raise ValueError for codes that are out of range."""
        check_codes(codes_Bhw, self.size)


def check_codes(codes_Bhw: Tensor, size: int) -> None:
    """Check that codes are in range.

    Args:
        codes_Bhw: codes of any shape.
        size: number of codes.

    Raises:
        ValueError: a code is not in 0..size - 1.
    """
    if codes_Bhw.numel() and (int(codes_Bhw.min()) < 0 or int(codes_Bhw.max()) >= size):
        code_range = f"{int(codes_Bhw.min())}..{int(codes_Bhw.max())}"
        raise ValueError(
            f"image codes must be in 0..{size - 1}, got {code_range}; were they made by another tokenizer?"
        )


def check_finite(features: Tensor) -> Tensor:
    """Check that the features of pictures are numbers: the nearest code of another value would be arbitrary.

    Args:
        features: of any shape.

    Returns:
        The features.

    Raises:
        NonFiniteError: a feature is infinite or nan.
    """
    if not bool(features.isfinite().all()):
        raise NonFiniteError("features of pictures", features.dtype)
    return features


def straight_through(z: Tensor, q: Tensor) -> Tensor:
    """Return q with the gradient of z, the straight-through estimator (Bengio et al. 2013). Both have one shape."""
    return z + (q - z).detach()


def entropy_terms(logits_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the entropies whose difference is LFQ's entropy loss (Yu et al. 2023, eq. 5).

    Args:
        logits_NK: logits of each position over the codes, (N, K).

    Returns:
        The mean over positions of the entropy of the softmax, and the entropy of the mean softmax; scalars, in nats.
    """
    log_p_NK = logits_NK.log_softmax(-1)
    p_NK = log_p_NK.exp()
    mean_K = p_NK.mean(0)
    return -(p_NK * log_p_NK).sum(-1).mean(), -(mean_K * mean_K.clamp_min(1e-9).log()).sum()


def channels_last(z_BDhw: Tensor) -> Tensor:
    """Permute (B, D, h, w) to (B, h, w, D)."""
    return z_BDhw.permute(0, 2, 3, 1)


def channels_first(z_BhwD: Tensor) -> Tensor:
    """Permute (B, h, w, D) to (B, D, h, w)."""
    return z_BhwD.permute(0, 3, 1, 2)


class VectorQuantizer(Quantizer):
    """argmin_k |z/|z| - e_k/|e_k||; loss |sg(z) - e|^2 + beta |z - sg(e)|^2 (van den Oord et al. 2017, eq. 3).

    Dead codes: `usage_K` is a running share of picks per code (1/K each when uniform). Every `revive_every` training
    steps the codes whose usage is under `dead_below` / K are set to features of the batch, drawn with probability
    proportional to their squared distance from the codebook (the seeding of k-means++, Arthur & Vassilvitskii 2007),
    so that what is represented worst gets a code first. A revived code starts with usage 1/K.

    Args:
        size: K, number of codes.
        dim: D, channels of the features.
        beta: weight of the commitment loss.
        entropy: weight of the entropy loss; 0 leaves it out.
        revive_every: training steps between revivals of dead codes; 0: never.
        dead_below: a code is dead below this share of the uniform usage 1/K.
        momentum: of the running usage, in [0, 1].
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
        """Scale features (B, D, h, w) to unit length, fp32."""
        return F.normalize(z_BDhw.float(), dim=1)

    def codebook_vectors(self) -> Tensor:
        """Return the codebook (K, D) with rows of unit length, fp32."""
        return F.normalize(self.codebook.float(), dim=-1)

    def to_codes(self, z_BDhw: Tensor) -> Tensor:
        """Find the nearest code (B, h, w) of each feature of unit length (B, D, h, w)."""
        # of unit vectors the largest dot product is the smallest distance
        return (channels_last(z_BDhw) @ self.codebook_vectors().detach().T).argmax(-1)

    def to_vectors(self, codes_Bhw: Tensor) -> Tensor:
        """Look up the unit vectors (B, D, h, w) of codes (B, h, w). Raises ValueError for codes out of range."""
        self.check_codes(codes_Bhw)
        return channels_first(F.embedding(codes_Bhw, self.codebook_vectors()))

    def losses(self, z_BDhw: Tensor, q_BDhw: Tensor) -> dict[str, tuple[Tensor, int]]:
        """Compute the codebook, commitment and entropy losses, as in `Quantizer.losses`."""
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
        """Count the step, and revive dead codes where they are due and `rng` is given."""
        self.steps += 1
        if self.revive_every and rng is not None and int(self.steps) % self.revive_every == 0:
            self.revive_dead_codes(channels_last(z_BDhw).reshape(-1, self.dim), rng)

    def squared_distances(self, z_ND: Tensor) -> Tensor:
        """Return the squared distance (N,) of features (N, D) to the nearest code."""
        return 2 - 2 * (z_ND @ self.codebook_vectors().T).amax(-1)

    @torch.no_grad()
    def revive_dead_codes(self, z_ND: Tensor, rng: torch.Generator) -> int:
        """Set dead codes to features of the batch, in all processes to the same.

        Args:
            z_ND: the features, (N, D).
            rng: draws the features, on the CPU.

        Returns:
            The number of codes that were revived, at most N.
        """
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
        """Update the running usage with the codes of the batch, over all processes."""
        share_K = torch.bincount(codes_Bhw.reshape(-1), minlength=self.size).to(self.usage_K)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(share_K)
        self.usage_K.lerp_(share_K / share_K.sum(), 1 - self.momentum)


class FSQ(Quantizer):
    """Each channel is squashed to (-L/2, L/2) and rounded to one of L levels; a code is their mixed-radix number.

    Args:
        levels: L of each channel, at least 2.
    """

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
        """Round features (B, D, h, w), and return their mixed-radix numbers (B, h, w), int64."""
        width = self.levels_D // 2
        digits = (channels_last(z_BDhw) * width).round().long() + width
        return (digits * self.basis_D).sum(-1)

    def to_vectors(self, codes_Bhw: Tensor) -> Tensor:
        """Return the levels (B, D, h, w) of codes, scaled to [-1, 1]. Raises ValueError for codes out of range."""
        self.check_codes(codes_Bhw)
        width = self.levels_D // 2
        digits = codes_Bhw[..., None] // self.basis_D % self.levels_D
        return channels_first((digits - width) / width)


class LFQ(Quantizer):
    """The sign of each channel; code = the bits as a number. Loss: commitment + entropy (Yu et al. 2023, eq. 5).

    Args:
        bits: D, channels of the features; there are K = 2^D codes.
        beta: weight of the commitment loss.
        entropy: weight of the entropy loss; 0 leaves it out.
    """

    def __init__(self, bits: int, beta: float = 0.25, entropy: float = 0.1) -> None:
        super().__init__()
        self.dim, self.size, self.beta, self.entropy = bits, 2**bits, beta, entropy
        self.register_buffer("basis_D", 2 ** torch.arange(bits), persistent=False)
        self.basis_D: Tensor

    def to_codes(self, z_BDhw: Tensor) -> Tensor:
        """Return the signs of features (B, D, h, w) as numbers (B, h, w), int64; the first channel is bit 0."""
        return ((channels_last(z_BDhw) > 0).long() * self.basis_D).sum(-1)

    def to_vectors(self, codes_Bhw: Tensor) -> Tensor:
        """Return the signs (B, D, h, w) of codes, -1 or 1. Raises ValueError for codes out of range."""
        self.check_codes(codes_Bhw)
        return channels_first((codes_Bhw[..., None] // self.basis_D % 2).float() * 2 - 1)

    def losses(self, z_BDhw: Tensor, q_BDhw: Tensor) -> dict[str, tuple[Tensor, int]]:
        """Compute the commitment and entropy losses, as in `Quantizer.losses`."""
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
