"""In what precision and where a model is held: the arguments of every command that loads one, and what they mean.

It refuses to know models. Importing it costs milliseconds: torch is imported where a device is asked for.
"""

from __future__ import annotations

import argparse
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("8bit", "4bit")


def add_arguments(parser: Any) -> None:
    """--device, --dtype and --quantization. parser: a parser or a group of its arguments."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: a GPU where there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the engine's choice")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="of the language model's weights")


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """What `unigen.load` takes of them."""
    return {"device": args.device, "dtype": args.dtype, "quantization": args.quantization}
