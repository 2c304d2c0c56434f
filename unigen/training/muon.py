"""Muon for the matrices inside a network and AdamW for the rest, as one optimizer.

Muon (Jordan et al. 2024) orthogonalises the momentum of each hidden matrix; `torch.optim.Muon` does the work, with the
learning rate scaled to AdamW's update size (Liu et al. 2025, arXiv 2502.16982, section 2.2): one rate serves both.
It orthogonalises in bfloat16; where a device is slow in that, `Muon` does so in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from unigen.config import OptimConfig
from unigen.utils.precision import has_fast_bfloat16


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` with the learning rate scaled to AdamW's. It works in float32 on a device slow in bfloat16.

    Args:
        matrices: the parameters, each with two dimensions.
        lr: learning rate, as of AdamW.
        weight_decay: decoupled weight decay.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.use_bfloat16 = all(has_fast_bfloat16(p.device) for p in matrices)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Do one step. closure: as in torch; it must be None on a device that is slow in bfloat16."""
        if self.use_bfloat16:
            return super().step(closure)
        assert closure is None
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                mean_OI = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                update_OI = p.grad.lerp(mean_OI, momentum) if group["nesterov"] else mean_OI
                update_OI = orthogonalize(update_OI, group["ns_coefficients"], group["ns_steps"], group["eps"])
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update_OI, alpha=-lr * 0.2 * math.sqrt(max(p.shape)))
        return None


def orthogonalize(x_OI: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Approximate U V^T of x = U S V^T by a Newton-Schulz iteration (Jordan et al. 2024).

        x <- a x + b (x x^T) x + c (x x^T)^2 x     takes every singular value in (0, 1] to about 1

    Args:
        x_OI: a matrix (O, I).
        coefficients: a, b, c.
        steps: number of iterations.
        eps: smallest norm that x is divided by before.

    Returns:
        A matrix (O, I), in the precision of x.
    """
    a, b, c = coefficients
    is_wide = x_OI.shape[0] <= x_OI.shape[1]
    x = x_OI if is_wide else x_OI.T
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x if is_wide else x.T


class MuonAdamW(torch.optim.Optimizer):
    """Muon and AdamW as one optimizer, with the groups and the state of both.

    AdamW steps what is no matrix of a linear layer, and the layers that a module names in `io_layers`: those next to
    its inputs and outputs.

    Args:
        model: whose parameters are trained; frozen ones are left out.
        optim: learning rate, weight decay (of Muon's matrices), betas and epsilon (of AdamW).
    """

    def __init__(self, model: nn.Module, optim: OptimConfig) -> None:
        io_layer_ids = {
            id(part)
            for module in model.modules()
            for layer in getattr(module, "io_layers", ())
            for part in layer.modules()
        }
        matrices: list[nn.Parameter] = []
        adamw_params: list[nn.Parameter] = []
        for module in model.modules():
            for p in module.parameters(recurse=False):
                if p.requires_grad:
                    (
                        matrices
                        if isinstance(module, nn.Linear) and p.ndim == 2 and id(module) not in io_layer_ids
                        else adamw_params
                    ).append(p)
        shared = {id(p) for p in adamw_params}  # a head tied to the embeddings is an embedding
        matrices = [p for p in matrices if id(p) not in shared]
        adamw_params = list({id(p): p for p in adamw_params}.values())
        self.optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            self.optimizers.append(Muon(matrices, optim.lr, optim.weight_decay))
        if adamw_params:
            self.optimizers.append(
                torch.optim.AdamW(
                    adamw_params, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=0.0, fused=True
                )
            )
        super().__init__([{"params": part} for part in (matrices, adamw_params) if part], {"lr": optim.lr})
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step both optimizers. closure: must be None."""
        assert closure is None
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, object]:
        """Return the states of both optimizers."""
        return {"parts": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for optimizer, state in zip(self.optimizers, state_dict["parts"], strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
