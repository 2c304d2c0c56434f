"""The multi-scale residual quantizer of next-scale prediction: a picture as token maps of growing side.

    for scale k of side n_k:   z_k = nearest code of area_down(f - f_hat, n_k)
                               f_hat += phi_k(bicubic_up(e[z_k], h))         phi(x) = (x + conv3x3(x)) / 2
    loss = mean over k of |sg(f_hat_k) - f|^2 beta + |f_hat_k - sg(f)|^2

Tian et al. 2024 (VAR, arXiv 2404.02905), algorithms 1 and 2, with one codebook shared by all scales and a few phi
shared by neighbouring scales; dead codes are revived as in `VectorQuantizer`, which VAR leaves out. What scale k+1
reads is the whole picture so far, area_down(f_hat_k, n_(k+1)), never the last map alone.

In training a share `scale_dropout` of the pictures is decoded from their first k < K scales, as SoundStream drops
quantizers (Zeghidour et al. 2021, arXiv 2107.03312, section III-C): else the last scale holds nearly all that there is
to see, and its codes, drawn all at once, do not agree with each other. `encode_with_corruption` is for models that
learn from the codes: later scales then correct mistakes made in earlier ones (Infinity, Han et al. 2024, arXiv
2412.04431, section 3.4).
It stands in `VQTokenizer` like the other quantizers. Does not depend on: pictures, networks, optimizers, files.

Shapes: B batch, D code dimension, h w grid, K scales, n_k side of scale k, P = sum of n_k^2 positions, V codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unigen.tokenizers.quantize import QuantizerOutput, VectorQuantizer, channels_last, straight_through

NUM_NEAREST = 16
"""Number of next nearest codes that a wrong code is sampled from."""


class Phi(nn.Conv2d):
    """(1 - r) x + r conv3x3(x), r = `residual_ratio`: restores detail lost in bicubic upsampling (VAR, section 3.2)."""

    def __init__(self, dim: int, residual_ratio: float = 0.5) -> None:
        super().__init__(dim, dim, 3, padding=1)
        self.residual_ratio = residual_ratio

    def forward(self, input: Tensor) -> Tensor:
        """Apply phi to a map (B, D, h, w); the result has its shape and its dtype."""
        bias = None if self.bias is None else self.bias.to(input.dtype)  # maps are always fp32
        convolved = self._conv_forward(input, self.weight.to(input.dtype), bias)
        return input * (1 - self.residual_ratio) + convolved * self.residual_ratio


class MultiscaleQuantizer(VectorQuantizer):
    """The multi-scale residual quantizer. Its codes (B, P) are those of all scales, one after the other.

    Args:
        size: V, number of codes.
        dim: D, channels of the features.
        scales: sides of the token maps, growing; the last is the side of the grid.
        beta: weight of the commitment loss.
        revive_every: as in `VectorQuantizer`.
        dead_below: as in `VectorQuantizer`.
        momentum: as in `VectorQuantizer`.
        phis: number of different phi, which the scales share.
        scale_dropout: share of the pictures of which training decodes the first scales only, in [0, 1].

    Raises:
        ValueError: the scales do not grow.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        scales: Sequence[int],
        beta: float = 0.25,
        revive_every: int = 10,
        dead_below: float = 0.05,
        momentum: float = 0.99,
        phis: int = 4,
        scale_dropout: float = 0.0,
    ) -> None:
        if not scales or min(scales) < 1 or any(a >= b for a, b in zip(scales, scales[1:], strict=False)):
            raise ValueError(f"scales must be growing sides of at least 1, got {tuple(scales)}")
        super().__init__(size, dim, beta, 0.0, revive_every, dead_below, momentum)
        self.scales = tuple(scales)
        self.lengths = [side * side for side in self.scales]
        self.scale_dropout = scale_dropout
        self.phis = nn.ModuleList(Phi(dim) for _ in range(phis))

    # ---------------------------------------------------------------- one scale

    def phi(self, k: int) -> nn.Module:
        """Return the phi of a scale: the one whose tick is nearest to k / (K - 1), the first of two equally near.

        VAR's ticks for n phi are linspace(a, 1 - a, n) with a = 1/(3n) for n = 4, which VAR has, else 1/(2n).

        Args:
            k: index of the scale, from 0 on.
        """
        count = len(self.phis)
        margin = 1 / (3 * count) if count == 4 else 1 / (2 * count)
        ticks = torch.linspace(margin, 1 - margin, count, dtype=torch.float64)
        return self.phis[int((ticks - k / max(len(self.scales) - 1, 1)).abs().argmin())]

    def add_scale(self, f_hat_BDhw: Tensor, codes_Bn: Tensor, k: int) -> Tensor:
        """Add a scale to f_hat.

        Args:
            f_hat_BDhw: f_hat before the scale, (B, D, h, w).
            codes_Bn: codes of the scale, (B, n_k^2).
            k: index of the scale, from 0 on.

        Returns:
            f_hat after the scale, (B, D, h, w).
        """
        side = self.scales[k]
        map_BDnn = F.embedding(codes_Bn, self.codebook_vectors()).transpose(1, 2).unflatten(2, (side, side))
        if side != f_hat_BDhw.shape[-1]:
            map_BDnn = F.interpolate(map_BDnn, size=f_hat_BDhw.shape[-2:], mode="bicubic")
        return f_hat_BDhw + self.phi(k)(map_BDnn)

    def downsample(self, f_BDhw: Tensor, k: int) -> Tensor:
        """Resize a map (B, D, h, w) to (B, D, n_k, n_k), the side of scale k."""
        side = self.scales[k]
        return f_BDhw if side == f_BDhw.shape[-1] else F.interpolate(f_BDhw, size=(side, side), mode="area")

    def initial_f_hat(self, batch: int) -> Tensor:
        """Return f_hat before the first scale: zeros (B, D, h, w), fp32."""
        side = self.scales[-1]
        return self.codebook.new_zeros(batch, self.dim, side, side, dtype=torch.float32)

    # ---------------------------------------------------------------- the interface

    def normalize(self, z_BDhw: Tensor) -> Tensor:
        """Convert features to fp32; their length is kept."""
        return z_BDhw.float()

    def codebook_vectors(self) -> Tensor:
        """Return the codebook (V, D), fp32. Its vectors have any length, since residuals shrink."""
        return self.codebook.float()

    def nearest(self, z_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Find the nearest codes.

        Args:
            z_ND: vectors (N, D).

        Returns:
            The squared distance of each vector to its nearest code (N,), and that code (N,), int64.
        """
        table_VD = self.codebook_vectors().detach()
        minimum = (table_VD.square().sum(-1) - 2 * z_ND @ table_VD.T).min(-1)
        return z_ND.square().sum(-1) + minimum.values, minimum.indices

    def squared_distances(self, z_ND: Tensor) -> Tensor:
        """Return the squared distance (N,) of features (N, D) to the nearest code."""
        return self.nearest(z_ND)[0]

    def encode_scales(
        self, f_BDhw: Tensor, substitute: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Encode features scale by scale.

        Args:
            f_BDhw: the features, (B, D, h, w).
            substitute: maps the residuals of a scale (B n_k^2, D) and their codes (B, n_k^2) to the codes that are
                added to f_hat; None: the codes themselves.

        Returns:
            For each scale the codes (B, n_k^2), the residuals that they quantize (B n_k^2, D), and f_hat after it.
        """
        f_hat_BDhw = torch.zeros_like(f_BDhw)
        codes, scale_features, f_hats = [], [], []
        for k in range(len(self.scales)):
            z_ND = channels_last(self.downsample(f_BDhw - f_hat_BDhw.detach(), k)).reshape(-1, self.dim)
            codes_Bn = self.nearest(z_ND)[1].unflatten(0, (len(f_BDhw), -1))
            f_hat_BDhw = self.add_scale(f_hat_BDhw, substitute(z_ND, codes_Bn) if substitute else codes_Bn, k)
            codes.append(codes_Bn)
            scale_features.append(z_ND)
            f_hats.append(f_hat_BDhw)
        return codes, scale_features, f_hats

    def to_codes(self, z_BDhw: Tensor) -> Tensor:
        """Encode features (B, D, h, w) as codes of all scales (B, P), int64."""
        return torch.cat(self.encode_scales(z_BDhw)[0], 1)

    def encode_with_corruption(self, f_BDhw: Tensor, max_ratio: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Encode features with mistakes, which later scales correct.

        Args:
            f_BDhw: the features, (B, D, h, w).
            max_ratio: upper end of the share of a picture's codes that are replaced, each by one of the
                `NUM_NEAREST` next nearest codes; the share of each picture is uniform in [0, max_ratio).
            rng: draws the shares, the positions and the mistakes, on the CPU.

        Returns:
            The codes that a model is to predict (B, P), and those that it reads (B, P).
        """
        corruption_rate_B1 = torch.rand(len(f_BDhw), 1, generator=rng) * max_ratio
        table_VD = self.codebook_vectors().detach()
        corrupted_codes: list[Tensor] = []

        def corrupt(z_ND: Tensor, codes_Bn: Tensor) -> Tensor:
            nearest = (table_VD.square().sum(-1) - 2 * z_ND @ table_VD.T).topk(
                min(NUM_NEAREST + 1, self.size), largest=False
            )
            pick_N1 = torch.randint(1, nearest.indices.shape[1], (len(z_ND), 1), generator=rng).to(z_ND.device)
            is_corrupted_Bn = (torch.rand(codes_Bn.shape, generator=rng) < corruption_rate_B1).to(z_ND.device)
            corrupted_codes.append(
                torch.where(is_corrupted_Bn, nearest.indices.gather(1, pick_N1).view_as(codes_Bn), codes_Bn)
            )
            return corrupted_codes[-1]

        return torch.cat(self.encode_scales(f_BDhw, corrupt)[0], 1), torch.cat(corrupted_codes, 1)

    def to_vectors(self, codes_BP: Tensor) -> Tensor:
        """Decode codes to features.

        Args:
            codes_BP: codes of all scales, or of the first few, (B, P).

        Returns:
            f_hat after these scales, (B, D, h, w), fp32.

        Raises:
            ValueError: a code is out of range, or a scale is not complete.
        """
        self.check_codes(codes_BP)
        f_hat_BDhw = self.initial_f_hat(len(codes_BP))
        for k, codes_Bn in enumerate(self.split_scales(codes_BP)):
            f_hat_BDhw = self.add_scale(f_hat_BDhw, codes_Bn, k)
        return f_hat_BDhw

    def split_scales(self, codes_BP: Tensor) -> list[Tensor]:
        """Split codes by scale.

        Args:
            codes_BP: codes of all scales, or of the first few, (B, P).

        Returns:
            The codes of each of these scales, (B, n_k^2).

        Raises:
            ValueError: a scale is not complete.
        """
        total, lengths = 0, []
        for length in self.lengths:
            if total == codes_BP.shape[1]:
                break
            lengths.append(length)
            total += length
        if total != codes_BP.shape[1]:
            raise ValueError(f"{codes_BP.shape[1]} codes do not make whole scales of {self.lengths}")
        return list(codes_BP.split(lengths, 1))

    def scale_inputs(self, codes_BP: Tensor) -> Tensor:
        """Return the inputs of scales 2..K in teacher forcing: f_hat before each scale, at its side.

        Args:
            codes_BP: codes of all scales, (B, P).

        Returns:
            Features (B, P - n_1^2, D), fp32.
        """
        f_hat_BDhw = self.initial_f_hat(len(codes_BP))
        maps = []
        for k, codes_Bn in enumerate(self.split_scales(codes_BP)[:-1]):
            f_hat_BDhw = self.add_scale(f_hat_BDhw, codes_Bn, k)
            maps.append(self.downsample(f_hat_BDhw, k + 1).flatten(2).transpose(1, 2))
        return torch.cat(maps, 1) if maps else f_hat_BDhw.new_zeros(len(codes_BP), 0, self.dim)

    def forward(self, z_BDhw: Tensor, rng: torch.Generator | None = None) -> QuantizerOutput:
        """Quantize features, with a straight-through gradient.

        Args:
            z_BDhw: the features, (B, D, h, w).
            rng: draws replacements for dead codes and the pictures whose last scales are left out. None, and eval
                mode: neither is done.

        Returns:
            f_hat (B, D, h, w), the codes (B, P) and the losses.
        """
        with torch.autocast(z_BDhw.device.type, enabled=False):
            f_BDhw = self.normalize(z_BDhw)
            codes, scale_features, f_hats = self.encode_scales(f_BDhw.detach())
            is_training = self.training and torch.is_grad_enabled()
            n = f_BDhw.numel() // self.dim
            share = 1 / len(self.scales)
            codebook = sum(((s - f_BDhw.detach()).square().sum() for s in f_hats), start=f_BDhw.new_zeros(())) * share
            commit = sum(((s.detach() - f_BDhw).square().sum() for s in f_hats), start=f_BDhw.new_zeros(())) * share
            codes_BP = torch.cat(codes, 1)
            if is_training:
                self.on_training_step(torch.cat(scale_features)[:, :, None, None], rng)
                self.update_usage(codes_BP)
            losses = {"codebook": (codebook, n), "commit": (self.beta * commit, n)}
            if is_training and self.scale_dropout and rng is not None:
                return QuantizerOutput(self.drop_scales(f_BDhw, f_hats, rng), codes_BP, losses)
            return QuantizerOutput(straight_through(f_BDhw, f_hats[-1]), codes_BP, losses)

    def drop_scales(self, f_BDhw: Tensor, f_hats: list[Tensor], rng: torch.Generator) -> Tensor:
        """Leave out the last scales of a share `scale_dropout` of the pictures.

        Args:
            f_BDhw: the features, (B, D, h, w).
            f_hats: f_hat after each scale, each (B, D, h, w).
            rng: draws the pictures, and for each the number of scales that stay, uniform over k < K; on the CPU.

        Returns:
            f_hat of the scales that stay (B, D, h, w). The gradient passes straight through to f, resampled at the
            side of the last of them.
        """
        last_scale, count = len(f_hats) - 1, len(f_BDhw)
        is_dropped_B = torch.rand(count, generator=rng) < self.scale_dropout
        k_B = torch.where(is_dropped_B, torch.randint(max(last_scale, 1), (count,), generator=rng), last_scale)
        truncated_BDhw = straight_through(f_BDhw, f_hats[-1])
        for k in range(last_scale):
            indices = (k_B == k).nonzero()[:, 0].to(f_BDhw.device)
            if len(indices):
                low = F.interpolate(self.downsample(f_BDhw[indices], k), size=f_BDhw.shape[-2:], mode="bicubic")
                truncated_BDhw = truncated_BDhw.index_copy(0, indices, straight_through(low, f_hats[k][indices]))
        return truncated_BDhw
