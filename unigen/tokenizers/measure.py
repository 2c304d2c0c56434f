"""Metrics of image tokenizers: PSNR over all pixels and inside object masks, use of the codebook.

`unigen eval tokenizer` prints these. Does not depend on: where pictures come from, how the tokenizer was trained.

Shapes: B batch, C=3 channels, H W pixels in [-1, 1], masks (B, 1, H, W) with 1 inside objects, K codes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from unigen.tokenizers import ImageTokenizer
    from unigen.tokenizers.kl import KLTokenizer


def perplexity(share_K: Tensor) -> Tensor:
    """Return exp(entropy): the number of codes in use if all of these were used equally.

    Args:
        share_K: the share of each code, (K,), in all 1.

    Returns:
        The perplexity, a scalar in [1, K].
    """
    return torch.special.entr(share_K).sum().exp()


def psnr(mse: float) -> float:
    """Return the PSNR in decibels.

    Args:
        mse: mean squared error of pixels in [0, 1].
    """
    return -10 * math.log10(max(mse, 1e-12))


@torch.no_grad()
def evaluate_tokenizer(
    tokenizer: ImageTokenizer | KLTokenizer, x_BCHW: Tensor, masks_B1HW: Tensor, batch: int = 100
) -> dict[str, float]:
    """Encode, decode and compare pictures. Reconstructions are rounded to 8 bits.

    Args:
        tokenizer: an image tokenizer, with codes or with latents.
        x_BCHW: pixels in [-1, 1], (B, 3, H, W).
        masks_B1HW: 1 inside objects, (B, 1, H, W).
        batch: pictures that are encoded at a time.

    Returns:
        "psnr" over all pixels and "psnr_objects" inside the masks, in decibels, with errors pooled over pictures;
        "pictures", their number; where there are codes, "usage" (the share of them that occur), "dead" (the number
        that do not) and "perplexity".
    """
    total = masked_error = 0.0
    count_K = torch.zeros(getattr(tokenizer, "codebook_size", 0))
    for x, mask in zip(x_BCHW.split(batch), masks_B1HW.split(batch), strict=True):
        codes = tokenizer.encode(x)
        y = ((tokenizer.decode(codes) + 1) * 127.5).round() / 127.5 - 1
        squared = (y - x).square() / 4
        total += float(squared.sum())
        masked_error += float((squared * mask).sum())
        if len(count_K):
            count_K += torch.bincount(codes.reshape(-1), minlength=len(count_K)).cpu()
    metrics = {
        "psnr": psnr(total / x_BCHW.numel()),
        "psnr_objects": psnr(masked_error / max(3 * float(masks_B1HW.sum()), 1.0)),
        "pictures": float(len(x_BCHW)),
    }
    if len(count_K):
        num_used = int((count_K > 0).sum())
        metrics |= {
            "usage": num_used / len(count_K),
            "dead": float(len(count_K) - num_used),
            "perplexity": float(perplexity(count_K / count_K.sum())),
        }
    return metrics


@torch.no_grad()
def evaluate_scales(tokenizer: Any, x_BCHW: Tensor, batch: int = 100) -> list[dict[str, float]]:
    """Evaluate a multi-scale tokenizer scale by scale.

    Args:
        tokenizer: a tokenizer with a `MultiscaleQuantizer`.
        x_BCHW: pixels in [-1, 1], (B, 3, H, W).
        batch: pictures that are encoded at a time.

    Returns:
        For each scale "side" of the token map; "usage", "dead" and "perplexity" of its codes; and "psnr" in decibels
        of pictures decoded from the scales up to it.
    """
    quantizer = tokenizer.quantizer
    count_KV = torch.zeros(len(quantizer.scales), quantizer.size)
    error_K = torch.zeros(len(quantizer.scales), dtype=torch.float64)
    for x in x_BCHW.split(batch):
        parts = quantizer.split_scales(tokenizer.encode(x))
        for k, codes in enumerate(parts):
            count_KV[k] += torch.bincount(codes.reshape(-1), minlength=quantizer.size).cpu()
            y = tokenizer.decode(torch.cat(parts[: k + 1], 1))
            error_K[k] += float((y - x).square().sum()) / 4
    return [
        {
            "side": float(side),
            "usage": float((count_V > 0).float().mean()),
            "dead": float((count_V == 0).sum()),
            "perplexity": float(perplexity(count_V / count_V.sum())),
            "psnr": psnr(float(error) / x_BCHW.numel()),
        }
        for side, count_V, error in zip(quantizer.scales, count_KV, error_K, strict=True)
    ]
