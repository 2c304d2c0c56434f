"""What an image tokenizer is trained for.

The objective: L1 + L2 on pixels (more inside object masks), the quantizer's own losses, and at will a feature loss,
LPIPS and a hinge PatchGAN with adaptive weight. It knows the tokenizer's forward; no data, no optimizer, no files.

One backward serves generator and discriminator: the generator's term reads the discriminator with its parameters
detached, the discriminator's term reads the reconstruction detached, so neither gradient leaks into the other.

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
    """Weights of the losses; 0 switches one off. The quantizer's (commitment, entropy) are in VQConfig."""

    l1: float = 1.0
    l2: float = 1.0
    object_weight: float = 4.0  # of a pixel inside an object, against 1 outside
    feature: float = 0.0  # distance in a frozen network given as `features`
    lpips: float = 0.0
    gan: float = 0.0  # scale of the adaptive weight (LlamaGen: 0.5)
    gan_start: int = 2000  # training step at which the generator begins to hear the discriminator

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"loss.{name} must be a finite number that is not negative, got {value}")


class VQTraining(nn.Module):
    """The tokenizer, beside the discriminator when there is one: what the Trainer optimises and checkpoints."""

    def __init__(self, tokenizer: VQTokenizer | KLTokenizer, gan: bool = False) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.discriminator = PatchDiscriminator() if gan else None

    def forward(self, x_BCHW: Tensor, rng: torch.Generator | None = None, *codes_Bhw: Tensor) -> VQOutput:
        return self.tokenizer(x_BCHW, rng, *codes_Bhw)


class VQObjective:
    """(model, {"pixels": (B, 3, H, W), "masks": (B, 1, H, W)}, rng) -> {name: (sum, count)}; where the batch has
    "codes", pictures are decoded from those.

    `features(x_BCHW)` gives a list of maps of a frozen network; `lpips(x_BCHW, y_BCHW)` a distance per picture (B,).
    """

    step = 0  # set by the Trainer

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

    def _gan(self, model: Any, x_BCHW: Tensor, y_BCHW: Tensor, reconstruction: Any) -> Losses:
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
    """Sum of weighted l1 |y-x| + l2 (y-x)^2 over pixels and channels, and the sum of the weights."""
    gap = y_BCHW.float() - x_BCHW.float()
    weight_B1HW = 1 + (c.object_weight - 1) * masks_B1HW.float()
    return ((c.l1 * gap.abs() + c.l2 * gap.square()) * weight_B1HW).sum(), gap.shape[1] * weight_B1HW.sum()


def feature_distance(features: Callable[[Tensor], list[Tensor]], y_BCHW: Tensor, x_BCHW: Tensor) -> Tensor:
    """Mean squared distance of unit-normalised feature vectors, averaged over the maps; one number a picture (B,)."""
    with torch.no_grad():
        target_maps = [unit_normalize(map_BCHW) for map_BCHW in features(x_BCHW)]
    got = [unit_normalize(map_BCHW) for map_BCHW in features(y_BCHW)]
    gaps = [(a - b).square().sum(1).mean((1, 2)) for a, b in zip(got, target_maps, strict=True)]
    return torch.stack(gaps).mean(0)


def discriminator_hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss (Lim & Ye 2017): mean of relu(1 - real) and relu(1 + fake), halved."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction: Tensor, generator: Tensor, last: Tensor, limit: float = 1e4) -> Tensor:
    """|grad_last reconstruction| / (|grad_last generator| + 1e-4), detached (Esser et al. 2021, VQGAN, eq. 7)."""
    a = torch.autograd.grad(reconstruction, last, retain_graph=True)[0].norm()
    b = torch.autograd.grad(generator, last, retain_graph=True)[0].norm()
    return (a / (b + 1e-4)).clamp(0, limit).detach()
