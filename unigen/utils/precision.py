"""In what precision and where a model is held: the arguments of every command that loads one, and what they mean.

It does not depend on models. Importing it costs milliseconds: torch is imported where a device is requested.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

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


def load_options(args: argparse.Namespace) -> dict[str, Any]:
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
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def fast_dtype() -> str:
    """ "bfloat16" or "float32": the faster one on a GPU where there is one, else on the CPU."""
    import torch

    return "bfloat16" if has_fast_bfloat16("cuda" if torch.cuda.is_available() else "cpu") else "float32"


def train_precision(requested: Literal["auto", "fp32", "bf16"], device: str | torch.device) -> Literal["fp32", "bf16"]:
    """The precision of a training.

    Args:
        requested: "auto" is bf16 where the device is fast in it, else fp32.
        device: where it runs.

    Returns:
        "fp32" or "bf16".
    """
    if requested != "auto":
        return requested
    return "bf16" if has_fast_bfloat16(device) else "fp32"


def load_dtype(folder: Path, device: str) -> tuple[str | None, str]:
    """The dtype of a public checkpoint where none is requested: as it is stored, but float32 where that is bfloat16 and
    the processor is slow in it.

    Args:
        folder: of the model.
        device: where it runs, "cpu" or "cuda".

    Returns:
        "float32", or None for as it is stored; and a line that says why, empty where there is nothing to say.
    """
    if device.partition(":")[0] != "cpu" or has_fast_bfloat16() or stored_dtype(folder) != "bfloat16":
        return None, ""
    needed_bytes, free_bytes = 2 * sum(file.stat().st_size for file in folder.glob("*.safetensors")), available_memory()
    reason = f"{folder.name} is stored in bfloat16, which is slow on this processor"
    if free_bytes is not None and needed_bytes > free_bytes:
        needs = f"{needed_bytes / 1e9:.0f} GB, and {free_bytes / 1e9:.0f} GB are free"
        return None, f"{reason}: held so nevertheless, since float32 needs {needs}"
    return "float32", f"{reason}: held in float32, in twice the memory (--dtype bfloat16 keeps it)"


def stored_dtype(folder: Path) -> str | None:
    """The dtype of most of the weights in a model's folder, as its safetensors or its config.json say.

    Args:
        folder: of the model.

    Returns:
        "float32", "bfloat16" or "float16"; None where they do not say.
    """
    sizes: Counter[str] = Counter()
    try:
        for file in folder.glob("*.safetensors"):
            with open(file, "rb") as stream:
                header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
            for name, tensor in header.items():
                if name != "__metadata__":
                    start, stop = tensor["data_offsets"]
                    sizes[tensor["dtype"]] += stop - start
        if sizes:
            return {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}.get(sizes.most_common(1)[0][0])
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        dtypes = [
            part.get("dtype") or part.get("torch_dtype") for part in (config, *config.values()) if hasattr(part, "get")
        ]
        return next((dtype for dtype in dtypes if dtype in DTYPES), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError):
        return None  # the reader of the weights raises the error


def available_memory() -> int | None:
    """Bytes that processes may still have; None where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError, IndexError):
        return None
