"""Two optimizers that step, and come back from a checkpoint, as one."""

from __future__ import annotations

import copy

import torch
from torch import nn

from unigen.config import OptimConfig
from unigen.training.muon import MuonAdamW


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.norm = nn.Embedding(12, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.inner(self.embed(ids))))


def steps(model: Tied, optimizer: MuonAdamW, count: int) -> float:
    ids = torch.arange(12)
    for _ in range(count):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(ids), ids.roll(1))
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def test_each_weight_has_one_optimizer() -> None:
    model = Tied()
    optimizer = MuonAdamW(model, OptimConfig())
    muon, adam = ([id(p) for g in part.param_groups for p in g["params"]] for part in optimizer.optimizers)
    assert muon == [id(model.inner.weight)]
    assert sorted(muon + adam) == sorted(id(p) for p in model.parameters())


def test_it_learns_and_resumes_exactly() -> None:
    torch.manual_seed(0)
    model = Tied()
    optimizer = MuonAdamW(model, OptimConfig(lr=1e-2))
    before = steps(model, optimizer, 1)
    twin = copy.deepcopy(model)
    other = MuonAdamW(twin, OptimConfig(lr=1e-2))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert steps(model, optimizer, 60) < 0.5 * before
    steps(twin, other, 60)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_the_rate_of_a_group_is_the_rate_of_its_part() -> None:
    optimizer = MuonAdamW(Tied(), OptimConfig(lr=1e-2))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    assert all(g["lr"] == 0 for part in optimizer.optimizers for g in part.param_groups)
