"""Muon for the matrices inside a network and AdamW for the rest, as one optimizer.

Muon (Jordan et al. 2024) orthogonalises the momentum of each hidden matrix; `torch.optim.Muon` does the work, with the
learning rate scaled to AdamW's update size (Liu et al. 2025, arXiv 2502.16982, section 2.2): one rate serves both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from unigen.config import OptimConfig


class MuonAdamW(torch.optim.Optimizer):
    """Steps two optimizers as one; its groups and state are theirs.

    A module's `edges`, where it has them, are its layers next to what goes in and comes out: AdamW steps those.
    """

    def __init__(self, model: nn.Module, optim: OptimConfig) -> None:
        edges = {
            id(part) for module in model.modules() for edge in getattr(module, "edges", ()) for part in edge.modules()
        }
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for module in model.modules():
            for p in module.parameters(recurse=False):
                if p.requires_grad:
                    (
                        matrices
                        if isinstance(module, nn.Linear) and p.ndim == 2 and id(module) not in edges
                        else others
                    ).append(p)
        shared = {id(p) for p in others}  # a head tied to the embeddings is an embedding
        matrices = [p for p in matrices if id(p) not in shared]
        others = list({id(p): p for p in others}.values())
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            muon = {"lr": optim.lr, "weight_decay": optim.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
            self.parts.append(torch.optim.Muon(matrices, **muon))
        if others:
            adamw = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps, "weight_decay": 0.0, "fused": True}
            self.parts.append(torch.optim.AdamW(others, **adamw))
        super().__init__([{"params": part} for part in (matrices, others) if part], {"lr": optim.lr})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
