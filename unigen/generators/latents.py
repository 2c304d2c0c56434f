"""Base class of generators of continuous latents: their KL tokenizer, noise in training, options.

    x_t = (1 - t) x + t noise,    v = noise - x,    t = sigmoid(normal), then shifted towards noise

Rectified flow as in Esser et al. 2024 (SD3, arXiv 2403.03206), eq. 19 and 23. Does not depend on: how a velocity
is predicted.

Shapes: M images, Z latent channels, h w grid of latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unigen.batch import Batch
from unigen.diffusion.options import FlowOptions
from unigen.diffusion.path import LinearPath, PathSample
from unigen.diffusion.sampling import Trajectory
from unigen.diffusion.solvers import build_solver
from unigen.generators.base import GenerationState, GeneratorHead, GeneratorModel, SegmentSpec
from unigen.options import GroupType
from unigen.samplers.options import GuidanceOptions

if TYPE_CHECKING:
    from unigen.tokenizers.kl import KLTokenizer


@dataclass
class DenoisingState(GenerationState):
    """The state of an image that is being sampled from noise, with one evaluation of the velocity a step."""

    trajectory: Trajectory = field(kw_only=True)
    """The trajectory of its latents (1, Z, h, w)."""
    x_t_history: list[tuple[Tensor, float]] = field(default_factory=list)
    """x_t (1, Z, h, w) and t of each evaluation, where the segment records them."""

    @property
    def latents_Zhw(self) -> Tensor:
        """Denoised latents (Z, h, w) by the last velocity; those of the image when it is finished."""
        return self.trajectory.denoised[0]

    @property
    def latents(self) -> Tensor:
        """See `GenerationState.latents`."""
        return self.latents_Zhw

    @property
    def recorded_trajectory(self) -> tuple[Tensor, Tensor] | None:
        """See `GenerationState.recorded_trajectory`."""
        if not self.x_t_history:
            return None
        x_t, times = zip(*self.x_t_history, (self.trajectory.x_t, 0.0), strict=True)
        return torch.cat(x_t).cpu(), torch.tensor(times)

    def step(self, velocities: Sequence[Tensor]) -> None:
        """Advance the trajectory by one evaluation of the velocity.

        Args:
            velocities: (1, Z, h, w) of each branch of guidance, strongest condition first.
        """
        if self.spec.record_trajectory and self.trajectory.t is not None:
            self.x_t_history.append((self.trajectory.x_t, self.trajectory.t))
        self.trajectory.step(velocities)
        self.progress, self.finished = self.trajectory.progress, self.trajectory.t is None


class LatentFlowHead(GeneratorHead):
    """A generator of the latents of one image. `decode` takes them from a state's `latents_Zhw`.

    Args:
        tokenizer: a `KLTokenizer`.
    """

    tokenizer_kind: str | None = "kl"
    options: tuple[GroupType, ...] = (GuidanceOptions, FlowOptions)
    path = LinearPath()
    """The path between data and noise, in training and sampling."""

    def __init__(self, tokenizer: KLTokenizer) -> None:
        if not hasattr(tokenizer, "latent_channels"):
            raise ValueError(f"{self.name} needs a tokenizer of continuous latents (tokenizer_kind=kl)")
        super().__init__(tokenizer)

    def add_noise(self, batch: Batch, device: torch.device, rng: torch.Generator, copies: int = 1) -> PathSample:
        """Noised latents for training.

        Args:
            batch: packed rows; the images of this generator are noised.
            device: device of the result.
            rng: random generator; all times are drawn before the noise.
            copies: noised copies of each image, each with its own noise and time; they follow each other.

        Returns:
            x_t (M, Z, h, w), t (M,) and the target velocity (M, Z, h, w), where M is the number of images times
            `copies`; three empty tensors (0,) where there is no image.
        """
        count, empty = len(batch.images_of(self.name)), torch.zeros(0, device=device)
        if not count:
            return PathSample(empty, empty, empty)
        x_MZhw = self.encode_targets(batch, device).repeat_interleave(copies, 0)
        t_M = self.path.sample_times((count * copies,), rng).to(x_MZhw)
        noise_MZhw = torch.randn(x_MZhw.shape, generator=rng).to(x_MZhw)
        return PathSample(self.path.add_noise(x_MZhw, noise_MZhw, t_M), t_M, self.path.target(x_MZhw, noise_MZhw, t_M))

    def encode_targets(self, batch: Batch, device: torch.device) -> Tensor:
        """Latents (M, Z, h, w) of the batch's images of this generator.

        Args:
            batch: packed rows. Its images are pixels, or latents already.
            device: device of the result.
        """
        shape = (self.tokenizer.latent_channels, *self.tokenizer.grid)
        if batch.images is not None and batch.images.shape[1:] == shape:
            return batch.images[batch.images_of(self.name)].to(device)
        return super().encode_targets(batch, device)

    def num_targets(self, batch: Batch) -> int:
        """See `Generator.num_targets`."""
        return len(batch.images_of(self.name))

    def new_trajectory(self, spec: SegmentSpec) -> Trajectory:
        """A trajectory of latents (1, Z, h, w) from noise.

        Args:
            spec: the segment, with its random generator, its guidance and its `FlowOptions`.
        """
        noise = torch.randn((1, self.tokenizer.latent_channels, *self.tokenizer.grid), generator=spec.rng)
        noise = noise.to(next(self.parameters()).device)
        options = spec.options[FlowOptions]
        solver = build_solver(options.solver, options.steps, self.path.shift)
        return Trajectory(noise, solver, spec.guidance, path=self.path, rng=spec.rng)

    def decode(self, model: GeneratorModel, states: list[GenerationState]) -> Tensor:
        """See `Generator.decode`."""
        return self.tokenizer.decode(torch.stack([state.latents_Zhw for state in states]))  # type: ignore[attr-defined]
