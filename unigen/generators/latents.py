"""What generators of continuous latents share: the KL tokenizer as a part of them, noise in training, options.

    x_t = (1 - t) x + t noise,    v = noise - x,    t = sigmoid(normal), then shifted towards noise

Rectified flow as in Esser et al. 2024 (SD3, arXiv 2403.03206), eq. 19 and 23. Does not depend on: how a velocity
is predicted.

Shapes: M images, Z latent channels, h w grid of latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unigen.batch import Batch
from unigen.diffusion.solvers import ODESolver, solve
from unigen.generators.base import GenerationState, GeneratorHead, SegmentSpec
from unigen.samplers.guidance import Guidance, guided_velocity


@dataclass
class DenoisingState(GenerationState):
    """An image on its way from noise, a velocity a step. memory: of the guidance."""

    flow: ODESolver = field(kw_only=True)
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def latents_Zhw(self) -> Tensor:
        return self.flow.data[0]

    def go(self, parts: Sequence[Tensor]) -> None:
        """On, by the velocities (1, Z, h, w) that the branches of guidance say."""
        flow = self.flow
        assert flow.t is not None
        flow.go(guided_velocity(self.span.guidance, parts, flow.x, flow.t, self.memory))
        self.progress, self.done = flow.progress, flow.t is None


class LatentFlowHead(GeneratorHead):
    """The latents of one image. `pictures` takes them from a state's `latents_Zhw`."""

    own = "kl"
    takes: tuple[str, ...] = ("steps", "sampler", "guidance_kind")
    steps, sampler = 20, "euler"
    """Where a request does not say."""

    def __init__(self, tokenizer: Any) -> None:
        if not hasattr(tokenizer, "latent_channels"):
            raise ValueError(f"{self.name} needs a tokenizer of continuous latents (kind=kl)")
        super().__init__(tokenizer)

    def times(self, shape: Sequence[int], rng: torch.Generator, shift: float = 1.0) -> Tensor:
        """Times in (0, 1) as training draws them."""
        t = torch.sigmoid(torch.randn(tuple(shape), generator=rng))
        return shift * t / (1 + (shift - 1) * t)

    def noised(
        self, batch: Batch, device: torch.device, rng: torch.Generator, shift: float = 1.0, copies: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x_t (M, Z, h, w), t (M,) and noise - x of the batch's pictures that this generator writes, M being how many
        they are times `copies`: those of one picture follow each other, with noise and time of their own."""
        count, empty = len(batch.images_of(self.name)), torch.zeros(0, device=device)
        if not count:
            return empty, empty, empty
        x_MZhw = self.encoded(batch, device).repeat_interleave(copies, 0)
        t_M = self.times((count * copies,), rng, shift).to(x_MZhw)
        noise_MZhw = torch.randn(x_MZhw.shape, generator=rng).to(x_MZhw)
        return torch.lerp(x_MZhw, noise_MZhw, t_M[:, None, None, None]), t_M, noise_MZhw - x_MZhw

    def encoded(self, batch: Batch, device: torch.device) -> Tensor:
        """Latents (M, Z, h, w), those of pictures or what is given as latents already."""
        shape = (self.tokenizer.latent_channels, *self.tokenizer.grid)
        if batch.images is not None and batch.images.shape[1:] == shape:
            return batch.images[batch.images_of(self.name)].to(device)
        return super().encoded(batch, device)

    def count(self, batch: Batch) -> int:
        return len(batch.images_of(self.name))

    def flow(self, span: SegmentSpec, shift: float) -> ODESolver:
        """The way of a span's latents from its own noise."""
        noise = torch.randn((1, self.tokenizer.latent_channels, *self.tokenizer.grid), generator=span.rng)
        noise = noise.to(next(self.parameters()).device)
        return ODESolver(noise, span.steps or self.steps, span.sampler or self.sampler, shift)

    def solved(self, states: list[GenerationState], seen: list[list[Tensor]], shape: tuple[int, ...]) -> list[Tensor]:
        """Data of this shape for each state, by the flow of `velocity(x, t, seen)` from the span's own noise; states
        alike in steps, sampler and guidance go together. seen[i][b]: what branch b of state i is conditioned on."""
        groups: dict[tuple[int, str, Guidance], list[int]] = {}
        for i, state in enumerate(states):
            span = state.span
            groups.setdefault((span.steps or self.steps, span.sampler or self.sampler, span.guidance), []).append(i)
        results: dict[int, Tensor] = {}
        for (steps, sampler, guidance), members in groups.items():
            condition = torch.stack([seen[i][b] for b in range(guidance.branches) for i in members])
            noise = torch.stack([torch.randn(shape, generator=states[i].span.rng) for i in members])
            velocity = partial(self._guided_velocity, guidance, condition, {})
            results |= zip(members, solve(velocity, noise.to(condition.device), steps, sampler), strict=True)
        return [results[i] for i in range(len(states))]

    def _guided_velocity(
        self, guidance: Guidance, condition: Tensor, memory: dict[str, Any], x: Tensor, t: float
    ) -> Tensor:
        """The velocity of all branches, one after the other in `condition`, as one."""
        times = torch.full((len(condition),), t, dtype=x.dtype, device=x.device)
        parts = self.velocity(torch.cat([x] * guidance.branches), times, condition).chunk(guidance.branches)
        return guided_velocity(guidance, parts, x, t, memory)

    def pictures(self, model: Any, states: list[GenerationState]) -> Tensor:
        return self.tokenizer.decode(torch.stack([state.latents_Zhw for state in states]))  # type: ignore[attr-defined]
