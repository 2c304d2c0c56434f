"""Transfusion: rectified flow inside the backbone, which reads noised patches and predicts their velocity.

    loss = E |v(x_t, t, context) - (noise - x)|^2,    x_t = (1 - t) x + t noise

Zhou et al. 2024 (arXiv 2408.11039), section 3, with flow instead of DDPM: the embedding of a patch is a linear map of
its latents, plus embeddings of its position and of the image's time. Inside the image every position attends to every
other. A linear map of the last states gives the velocity. Later segments never see noise: the finished image is read
again as codes.
Does not depend on: templates, caches, how a tokenizer is trained.

Shapes: M images, P patches of F values, Z latent channels, h w grid of latents, D width, B rows, L positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from unigen.batch import Batch, InputSpan
from unigen.config import from_dict, to_dict
from unigen.diffusion.path import LinearPath
from unigen.generators.base import BuildContext, GenerationState, GeneratorModel, SegmentSpec, StepInput
from unigen.generators.latents import DenoisingState, LatentFlowHead
from unigen.nn.denoisers import TimestepEmbedder, from_patches, to_patches

if TYPE_CHECKING:
    from unigen.tokenizers.kl import KLTokenizer


@dataclass(frozen=True)
class TransfusionConfig:
    """Settings of the flow."""

    RENAMED: ClassVar[Mapping[str, str]] = {"patch": "patch_size"}
    """Keys of version 0.1, and their names now."""

    patch_size: int = 1
    """Side of a patch in latents."""
    shift: float = 1.0
    """Shift of the times towards noise, in training and sampling (SD3, eq. 23); 1 is none."""

    def __post_init__(self) -> None:
        if self.patch_size < 1 or not self.shift > 0:
            raise ValueError("transfusion: patch_size is at least 1, shift is above 0")


@dataclass
class TransfusionState(DenoisingState):
    """The state of an image that is being sampled."""

    begin_cached: bool = False
    """Whether the cache holds the begin token."""


class Transfusion(LatentFlowHead):
    """The latents of one image, by a flow in the backbone.

    Args:
        tokenizer: a `KLTokenizer`.
        width: width D of the backbone.
        config: settings of the flow; None is the defaults.
    """

    name = "transfusion"
    needs_context = False
    OLD_KEYS: ClassVar[Mapping[str, str]] = {
        "read": "proj_in",
        "time": "time_embed",
        "place": "position_embedding",
        "say": "velocity_head",
    }
    """Names of layers in version 0.1, and their names now."""

    def __init__(self, tokenizer: KLTokenizer, width: int, config: TransfusionConfig | None = None) -> None:
        super().__init__(tokenizer)
        self.settings = c = config or TransfusionConfig()
        self.path = LinearPath(c.shift)
        height, columns = tokenizer.grid
        if height % c.patch_size or columns % c.patch_size:
            raise ValueError(f"patch_size must divide the grid of latents {height} x {columns}, got {c.patch_size}")
        self.patch_grid = height // c.patch_size, columns // c.patch_size
        values = tokenizer.latent_channels * c.patch_size**2
        self.proj_in = nn.Linear(values, width)
        self.time_embed = TimestepEmbedder(width)
        self.position_embedding = nn.Embedding(self.patch_grid[0] * self.patch_grid[1], width)
        self.velocity_head = nn.Linear(width, values)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    @classmethod
    def from_context(cls, context: BuildContext) -> Transfusion:
        """An untrained generator for a model.

        Args:
            context: sizes and ids of the model, the generator's own tokenizer and settings.

        Raises:
            ValueError: the tokenizer or the settings do not fit.
        """
        return cls(context.tokenizer, context.width, from_dict(TransfusionConfig, context.settings))

    @property
    def io_layers(self) -> tuple[nn.Module, ...]:  # type: ignore[override]
        """See `GeneratorHead.io_layers`."""
        return self.proj_in, self.time_embed, self.velocity_head

    def config(self) -> dict[str, object]:
        """See `GeneratorHead.config`."""
        return to_dict(self.settings)

    def num_positions(self) -> int:
        """See `Generator.num_positions`."""
        return self.patch_grid[0] * self.patch_grid[1]

    def attend_until(self) -> list[int] | None:
        """See `Generator.attend_until`."""
        return [self.num_positions() - 1] * self.num_positions()

    def embed_patches(self, x_MZhw: Tensor, t_M: Tensor) -> Tensor:
        """Input embeddings (M, P, D) of noised latents.

        Args:
            x_MZhw: noised latents.
            t_M: times in [0, 1].
        """
        patches_MPF = to_patches(x_MZhw, self.settings.patch_size).to(self.proj_in.weight.dtype)
        return self.proj_in(patches_MPF) + self.position_embedding.weight + self.time_embed(t_M)[:, None]

    def velocity(self, states_MPD: Tensor) -> Tensor:
        """The predicted velocity, noise - data (M, Z, h, w), in fp32.

        Args:
            states_MPD: last hidden states at the patches.
        """
        return from_patches(self.velocity_head(states_MPD).float(), self.tokenizer.grid, self.settings.patch_size)

    # ---------------------------------------------------------------- training

    def prepare(self, model: GeneratorModel, batch: Batch, rng: torch.Generator) -> tuple[list[InputSpan], Tensor]:
        """See `Generator.prepare`: the backbone reads x_t; the targets are the velocities (M, Z, h, w)."""
        x_t_MZhw, t_M, velocity_MZhw = self.add_noise(batch, batch.ids_BL.device, rng)
        if not len(t_M):
            return [], t_M
        rows_M1, positions_MP = batch.span_positions(batch.images_of(self.name))
        return [InputSpan(rows_M1, positions_MP, self.embed_patches(x_t_MZhw, t_M))], velocity_MZhw

    def loss(self, model: GeneratorModel, batch: Batch, hidden_BLD: Tensor, velocity_MZhw: Tensor) -> Tensor:
        """See `Generator.loss`: the mean squared error (M,) of each image's velocity."""
        if not self.num_targets(batch):
            return self.zero_loss(hidden_BLD)
        error = self.velocity(hidden_BLD[batch.span_positions(batch.images_of(self.name))]) - velocity_MZhw
        return error.square().mean((1, 2, 3))

    # ---------------------------------------------------------------- sampling

    def start(self, spec: SegmentSpec) -> GenerationState:
        """See `Generator.start`."""
        return TransfusionState(spec, [], trajectory=self.new_trajectory(spec))

    def prepare_step(self, state: GenerationState) -> StepInput:
        """See `Generator.prepare_step`."""
        assert isinstance(state, TransfusionState) and state.trajectory.t is not None
        count, x_t_1Zhw = self.num_positions(), state.trajectory.x_t
        input_PD = self.embed_patches(x_t_1Zhw, torch.tensor([state.trajectory.t], device=x_t_1Zhw.device))[0]
        if state.begin_cached:
            return StepInput([0] * count, embeds=input_PD, attend_until=[count - 1] * count)
        return StepInput([state.spec.begin_id] + [0] * count, embeds=input_PD, attend_until=[0] + [count] * count)

    def step(self, model: GeneratorModel, states: list[GenerationState], hidden: list[list[Tensor]]) -> list[int]:
        """See `Generator.step`: one evaluation of the velocity; only the begin token stays in the cache."""
        patches = torch.stack([branch[-self.num_positions() :] for branches in hidden for branch in branches])
        velocities, num_kept = iter(self.velocity(patches).split(1)), []
        for state, branches in zip(states, hidden, strict=True):
            assert isinstance(state, TransfusionState)
            state.step([next(velocities) for _ in branches])
            num_kept.append(0 if state.begin_cached else 1)
            state.begin_cached = True
        return num_kept


GENERATOR = Transfusion
