"""The objective of image tokenizers.

Its terms are L1 + L2 on pixels (more inside object masks), the quantizer's own losses, and optionally a feature loss,
LPIPS and a hinge PatchGAN with adaptive weight. Does not depend on: data, optimizers, files.

One backward pass trains generator and discriminator: the generator's term uses the discriminator with its parameters
detached, and the discriminator's term the detached reconstruction, so neither gradient leaks into the other.

Shapes: B batch, C=3 channels, H W pixels in [-1, 1], masks (B, 1, H, W) with 1 inside objects, h w grid, K codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from unigen.nn.conv import PatchDiscriminator
from unigen.nn.perceptual import unit_normalize
from unigen.tokenizers.kl import KLTokenizer
from unigen.tokenizers.measure import perplexity
from unigen.tokenizers.vq import VQOutput, VQTokenizer

Losses = dict[str, tuple[Tensor, Tensor | int]]


@dataclass
class VQLossConfig:
    """Weights of the losses; 0 switches one off. The quantizer's (commitment, entropy) are in VQConfig.

    Raises:
        ValueError: a value is negative or not finite.
    """

    l1: float = 1.0
    """Weight of |y - x|."""
    l2: float = 1.0
    """Weight of (y - x)^2."""
    object_weight: float = 4.0
    """Weight of a pixel inside an object, against 1 outside."""
    feature: float = 0.0
    """Weight of the distance in a frozen network, `features` of the objective."""
    lpips: float = 0.0
    """Weight of LPIPS."""
    gan: float = 0.0
    """Scale of the adaptive weight of the adversarial term (LlamaGen: 0.5)."""
    gan_start: int = 2000
    """Training step from which on the adversarial term trains the tokenizer."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"loss.{name} must be a finite number that is not negative, got {value}")


class VQTraining(nn.Module):
    """The tokenizer and its discriminator as one model, which the Trainer optimizes and checkpoints.

    Args:
        tokenizer: the tokenizer to be trained.
        gan: whether there is a discriminator.
    """

    def __init__(self, tokenizer: VQTokenizer | KLTokenizer, gan: bool = False) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.discriminator = PatchDiscriminator() if gan else None

    def forward(self, x_BCHW: Tensor, rng: torch.Generator | None = None, *codes_Bhw: Tensor) -> VQOutput:
        """Reconstruct pictures, as the tokenizer's forward pass."""
        return self.tokenizer(x_BCHW, rng, *codes_Bhw)


class VQObjective:
    """The losses of an image tokenizer on a batch.

    Args:
        config: weights of the losses; None: the defaults.
        features: returns a list of maps (B, C, H, W) of a frozen network, for pictures (B, 3, H, W).
        lpips: returns the distance of each pair of pictures (B,), for two batches of pictures.

    Raises:
        ValueError: a loss is switched on whose network is not given.
    """

    step = 0
    """Index of the training step, set by the Trainer."""

    def __init__(
        self,
        config: VQLossConfig | None = None,
        features: Callable[[Tensor], list[Tensor]] | None = None,
        lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.config = config or VQLossConfig()
        self.features, self.lpips = features, lpips
        if self.config.feature and features is None:
            raise ValueError("loss.feature needs a frozen feature network; give its folder or set loss.feature=0")
        if self.config.lpips and lpips is None:
            raise ValueError("loss.lpips needs LPIPS weights; give their file or set loss.lpips=0")

    def __call__(self, model: Any, batch: Mapping[str, Tensor], rng: torch.Generator) -> Losses:
        """Compute the losses of a batch.

        Args:
            model: a `VQTraining`.
            batch: "pixels" (B, 3, H, W), "masks" (B, 1, H, W), and optionally "codes" (B, h, w), from which pictures
                are decoded then.
            rng: of the tokenizer's forward pass, on the CPU.

        Returns:
            Name -> (sum, count).
        """
        config, x_BCHW, masks_B1HW = self.config, batch["pixels"], batch["masks"]
        out: VQOutput = model(x_BCHW, rng, *([batch["codes"]] if "codes" in batch else []))
        y_BCHW, b = out.pixels_BCHW, len(x_BCHW)
        losses: Losses = {"pixels": pixel_loss(y_BCHW, x_BCHW, masks_B1HW, config)}
        if config.feature and self.features is not None:
            losses["feature"] = (config.feature * feature_distance(self.features, y_BCHW, x_BCHW).sum(), b)
        if config.lpips and self.lpips is not None:
            losses["lpips"] = (config.lpips * self.lpips(y_BCHW, x_BCHW).sum(), b)
        if config.gan:
            reconstruction = sum(total / count for total, count in losses.values())
            losses |= self._gan(model, x_BCHW, y_BCHW, reconstruction)
        losses |= out.losses
        with torch.no_grad():
            squared = (y_BCHW.clamp(-1, 1) - x_BCHW).square() / 4  # pixels in [0, 1], as PSNR counts
            losses["metric/mse"] = (squared.sum(), squared.numel())
            losses["metric/mse_objects"] = ((squared * masks_B1HW).sum(), 3 * masks_B1HW.sum().clamp_min(1))
            if out.codes_Bhw is not None:
                k = model.tokenizer.codebook_size
                share_K = torch.bincount(out.codes_Bhw.reshape(-1), minlength=k).float() / out.codes_Bhw.numel()
                losses["metric/batch_perplexity"] = (perplexity(share_K), 1)
        return losses

    def _gan(self, model: VQTraining, x_BCHW: Tensor, y_BCHW: Tensor, reconstruction: Any) -> Losses:
        discriminator = model.discriminator
        assert discriminator is not None, "VQTraining(gan=True) is needed for loss.gan"
        n = len(x_BCHW)
        losses: Losses = {}
        if self.step >= self.config.gan_start and torch.is_grad_enabled():
            frozen = {name: tensor.detach() for name, tensor in discriminator.named_parameters()}
            generator = -functional_call(discriminator, frozen, (y_BCHW,)).float().mean()
            weight = adaptive_weight(reconstruction, generator, model.tokenizer.last_layer)
            losses["gan"] = (self.config.gan * weight * generator * n, n)
            losses["metric/gan_weight"] = (weight, 1)
        real, fake = discriminator(x_BCHW).float(), discriminator(y_BCHW.detach()).float()
        losses["discriminator"] = (discriminator_hinge_loss(real, fake) * n, n)
        return losses


def pixel_loss(y_BCHW: Tensor, x_BCHW: Tensor, masks_B1HW: Tensor, c: VQLossConfig) -> tuple[Tensor, Tensor]:
    """Compute the weighted loss l1 |y - x| + l2 (y - x)^2 of pixels.

    Args:
        y_BCHW: reconstruction (B, 3, H, W).
        x_BCHW: pictures (B, 3, H, W).
        masks_B1HW: 1 inside objects (B, 1, H, W).
        c: l1, l2 and the weight of pixels inside objects.

    Returns:
        The sum over pixels and channels, and the sum of their weights.
    """
    gap = y_BCHW.float() - x_BCHW.float()
    weight_B1HW = 1 + (c.object_weight - 1) * masks_B1HW.float()
    return ((c.l1 * gap.abs() + c.l2 * gap.square()) * weight_B1HW).sum(), gap.shape[1] * weight_B1HW.sum()


def feature_distance(features: Callable[[Tensor], list[Tensor]], y_BCHW: Tensor, x_BCHW: Tensor) -> Tensor:
    """Compute the mean squared distance of feature vectors of unit length, averaged over the maps.

    Args:
        features: returns a list of maps (B, C, H, W) of a frozen network.
        y_BCHW: reconstruction, which takes the gradient.
        x_BCHW: pictures.

    Returns:
        One distance for each picture (B,).
    """
    with torch.no_grad():
        target_maps = [unit_normalize(map_BCHW) for map_BCHW in features(x_BCHW)]
    maps = [unit_normalize(map_BCHW) for map_BCHW in features(y_BCHW)]
    distances = [(a - b).square().sum(1).mean((1, 2)) for a, b in zip(maps, target_maps, strict=True)]
    return torch.stack(distances).mean(0)


def discriminator_hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's loss, a scalar: mean of relu(1 - real) and relu(1 + fake), halved (Lim & Ye 2017).

    Args:
        real: logits of pictures, of any shape.
        fake: logits of reconstructions, of any shape.
    """
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction: Tensor, generator: Tensor, last: Tensor, limit: float = 1e4) -> Tensor:
    """Compute |grad_last reconstruction| / (|grad_last generator| + 1e-4) (Esser et al. 2021, VQGAN, eq. 7).

    Args:
        reconstruction: loss of the reconstruction, a scalar.
        generator: adversarial loss of the tokenizer, a scalar.
        last: weight of the layer next to the pixels.
        limit: largest result.

    Returns:
        The weight of the adversarial loss, a detached scalar in [0, limit].
    """
    a = torch.autograd.grad(reconstruction, last, retain_graph=True)[0].norm()
    b = torch.autograd.grad(generator, last, retain_graph=True)[0].norm()
    return (a / (b + 1e-4)).clamp(0, limit).detach()
