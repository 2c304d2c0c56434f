"""Linear layers with weights in 8 or 4 bits, by bitsandbytes, as transformers' `quantization_config` has it.

    quantize(decoder, "4bit", "cuda")

8bit is LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339): rows of weights and of inputs are in int8, but columns with
an input beyond 6 are in half precision, so that the other rows of a batch may change a row a little. 4bit is NF4
(Dettmers et al. 2023, arXiv 2305.14314): blocks of 64 weights with a scale each, inputs as they are. It is for
inference; nothing is calibrated. Does not depend on: the model around the layers, files.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from unigen.nn.cpu.linear import PackedLinear
from unigen.utils.extras import require_extra
from unigen.utils.precision import QUANTIZATIONS

SIZE_MULTIPLES = {"8bit": (1, 1), "4bit": (32, 64)}
"""Outputs and inputs of quantised layers are multiples of these. Other layers stay as they are: in 4 bits bitsandbytes'
product on a CPU fails on them, or uses a wrong scale for blocks that continue in the next row."""

QUANTIZABLE = (nn.Linear, PackedLinear)
"""Classes of layers that are quantised; others may compute more than a product with their weights."""


def check_quantization(kind: str, device: str | torch.device) -> None:
    """Try a quantization on one small layer.

    Args:
        kind: one of `QUANTIZATIONS`.
        device: device of the weights.

    Raises:
        ValueError: the kind is unknown, or bitsandbytes does not support it on this device.
    """
    if kind not in QUANTIZATIONS:
        raise ValueError(f"unknown quantization {kind[:60]!r}: one of {', '.join(QUANTIZATIONS)}")
    require_extra("quantization")
    linear = nn.Linear(64, 32, device="meta").to_empty(device="cpu")  # leaves torch's global generator alone
    small = nn.Sequential(linear)
    nn.init.ones_(linear.weight)
    try:
        _replace_linears(small, kind, device)
        small.to(device).eval()(torch.ones(1, 1, 64, device=device))
    except (RuntimeError, OSError, AttributeError, ImportError, AssertionError) as error:
        raise ValueError(f"bitsandbytes has no {kind} weights on {device} here: {error}") from error


def quantize(module: nn.Module, kind: str, device: str | torch.device) -> None:
    """Replace every `nn.Linear` of a module whose size suits `SIZE_MULTIPLES` by a quantised one, in place. Everything
    else stays as it is.

    Args:
        module: such as a decoder.
        kind: one of `QUANTIZATIONS`.
        device: device of the quantised weights.

    Raises:
        ValueError: the device does not support it, the module is quantised already, or no layer is of such a size.
    """
    check_quantization(kind, device)
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    if any(isinstance(part, Linear4bit | Linear8bitLt) for part in module.modules()):
        raise ValueError(f"no {kind} weights: these are quantised already, load the model anew")
    if not _replace_linears(module, kind, device):
        outputs, inputs = SIZE_MULTIPLES[kind]
        raise ValueError(f"no {kind} weights: of no linear map are outputs and inputs multiples of {outputs}, {inputs}")


def _replace_linears(module: nn.Module, kind: str, device: str | torch.device) -> int:
    """Replace the linear layers of a module; returns how many."""
    from transformers import BitsAndBytesConfig
    from transformers.integrations import replace_with_bnb_linear
    from transformers.pytorch_utils import Conv1D

    bnb_options: dict[str, object] = {"load_in_8bit": True}
    if kind == "4bit":
        dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
        bnb_options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    old_modules = dict(module.named_modules())
    linears = {name: part for name, part in old_modules.items() if isinstance(part, nn.Linear | Conv1D)}
    skipped = [name for name, part in linears.items() if not _is_quantizable(part, kind)]
    if len(skipped) == len(linears):
        return 0
    for name in linears.keys() - set(skipped):
        linears[name].__class__ = nn.Linear
    replace_with_bnb_linear(module, skipped, BitsAndBytesConfig(**bnb_options))
    count = 0
    for name, layer in module.named_modules():
        old_layer: Any = old_modules.pop(name)  # so that no two of them are held at once
        if layer is not old_layer:
            quantized_OI = type(layer.weight)(old_layer.weight.detach(), requires_grad=False, **vars(layer.weight))
            layer.weight, layer.bias = quantized_OI.to(device), old_layer.bias
            count += 1
    return count


def _is_quantizable(part: nn.Module, kind: str) -> bool:
    if type(part) not in QUANTIZABLE or not isinstance(part, nn.Linear):
        return False
    return not any(size % multiple for size, multiple in zip(part.weight.shape, SIZE_MULTIPLES[kind], strict=True))


def describe_precision(lm: Any, kind: str | None) -> str:
    """The precision of a language model's weights, for people to read.

    Args:
        lm: a model of transformers, or `InferenceLlama`.
        kind: its quantization; None is none.

    Returns:
        Such as "float32", or "4bit, tables and head bfloat16".
    """
    dtype = str(lm.get_input_embeddings().weight.dtype).removeprefix("torch.")
    return dtype if kind is None else f"{kind}, tables and head {dtype}"


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Count a module's parameters.

    Args:
        module: quantised or not.

    Returns:
        The number of parameters, and the bytes that they take, with the scales of quantised ones.
    """
    count = size = 0
    for p in module.parameters():
        quant_state = getattr(p, "quant_state", None)
        count += p.numel() if quant_state is None else quant_state.shape.numel()
        size += p.nbytes + (0 if quant_state is None else quant_state.absmax.nbytes)
        size += 4 * len(p) if p.dtype == torch.int8 else 0
    return count, size
