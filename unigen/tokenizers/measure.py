"""How well an image tokenizer keeps pictures: PSNR over all pixels and inside object masks, use of the codebook.

It does not depend on where pictures come from and how the tokenizer was trained. `unigen eval tokenizer` prints these.

Shapes: B batch, C=3 channels, H W pixels in [-1, 1], masks (B, 1, H, W) with 1 inside objects, K codes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def perplexity(share_K: Tensor) -> Tensor:
    """exp(entropy) of the shares of the codes: the number of codes that would be used if all were used alike."""
    return torch.special.entr(share_K).sum().exp()


def psnr(mse: float) -> float:
    """Decibels for a mean squared error of pixels in [0, 1]."""
    return -10 * math.log10(max(mse, 1e-12))


@torch.no_grad()
def evaluate_tokenizer(tokenizer: Any, x_BCHW: Tensor, masks_B1HW: Tensor, batch: int = 100) -> dict[str, float]:
    """Encode, decode and compare pictures in [-1, 1], `batch` at a time.

    psnr over all pixels and psnr_objects inside the masks (errors pooled over pictures, reconstruction in 8 bits);
    where there are codes, usage = share of them that occur, dead = codes that do not, and their perplexity.
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
    """The health of a multi-scale tokenizer, scale by scale: side of the token map, usage, dead codes and perplexity of
    the codes of this scale, and psnr of pictures decoded from the scales up to it. VAR's issues ask for these."""
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
