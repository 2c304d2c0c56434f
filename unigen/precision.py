"""In what precision and where a model is held: the arguments of every command that loads one, and what they mean.

It refuses to know models. Importing it costs milliseconds: torch is imported where a device is asked for.
"""

from __future__ import annotations

import argparse
from typing import Any, Literal

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("8bit", "4bit")


def add_arguments(parser: Any) -> None:
    """--device, --dtype and --quantization. parser: a parser or a group of its arguments."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: a GPU where there is one)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="default: float32 for our own models and on a CPU that is slow in half precision, else as stored",
    )
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="of the language model's weights")


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """What `unigen.load` takes of them."""
    return {"device": args.device, "dtype": args.dtype, "quantization": args.quantization}


def has_fast_bfloat16(device: Any = "cpu") -> bool:
    """Whether products in bfloat16 are faster than in float32 on a device. A CPU needs instructions for them, without
    which they are several times slower: AVX-512-BF16 or AMX on x86, BF16 on ARM. A GPU needs them natively.

    Args:
        device: a torch.device or its name.
    """
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu":
        return True
    has = torch.cpu.get_capabilities()
    return any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def train_precision(asked: Literal["auto", "fp32", "bf16"], device: Any) -> Literal["fp32", "bf16"]:
    """What to train in: auto is bf16 where the device is fast in it, else fp32."""
    if asked != "auto":
        return asked
    return "bf16" if has_fast_bfloat16(device) else "fp32"
