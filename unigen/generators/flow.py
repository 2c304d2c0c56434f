"""Rectified flow: a diffusion head samples an image's latents, conditioned on the backbone's hidden states.

    loss = E |v(x_t, t, hidden) - (noise - x)|^2,    x_t = (1 - t) x + t noise

Esser et al. 2024 (SD3, arXiv 2403.03206), section 2 and eq. 19. The network of the velocity is one of
`unigen.nn.denoisers`. The backbone reads the prompt up to the begin token once. The head takes its last hidden states
as context: a fixed number, padded with zeros as in SD3, so that an image does not depend on its batch. The state of
the begin token comes last. The KL tokenizer is part of the generator.
Does not depend on: templates, caches, how a tokenizer is trained.

Shapes: M images, S branches of guidance, Z latent channels, h w grid of latents, N context states, D width, B rows, L
positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from unigen.batch import Batch, InputSpan
from unigen.config import from_dict, to_dict
from unigen.diffusion.denoiser import PromptEmbeds
from unigen.diffusion.path import LinearPath, PathSample
from unigen.generators.base import BuildContext, GenerationState, GeneratorModel, SegmentSpec, StepInput
from unigen.generators.latents import DenoisingState, LatentFlowHead
from unigen.nn.attention import math_attention
from unigen.nn.denoisers import DenoiserKind, build_denoiser

if TYPE_CHECKING:
    from unigen.tokenizers.kl import KLTokenizer

NOISE_SAMPLES_PER_IMAGE = 4
"""Noised copies of an image in one training step. The prompt is read once for all of them (as in MAR, Li et al. 2024,
arXiv 2406.11838)."""


@dataclass(frozen=True)
class FlowConfig:
    """Settings of the head."""

    RENAMED: ClassVar[Mapping[str, str]] = {"patch": "patch_size"}
    """Keys of version 0.1, and their names now."""

    network: DenoiserKind = "mm-dit"
    """The network that predicts the velocity (`unigen.nn.denoisers`)."""
    layers: int = 4
    """Blocks of a transformer; residual blocks in all on the way down of a U-Net."""
    heads: int = 4
    """Heads of attention."""
    head_dim: int = 48
    """Width of a head."""
    patch_size: int = 1
    """Side of a patch in latents; a U-Net takes no patch."""
    context_length: int = 64
    """Number N of hidden states of the backbone that the network reads."""
    shift: float = 1.0
    """Shift of the times towards noise, in training and sampling alike (SD3, eq. 23); 1 is none."""

    def __post_init__(self) -> None:
        if min(self.layers, self.heads, self.head_dim, self.patch_size, self.context_length) < 1 or not self.shift > 0:
            raise ValueError(
                "flow: layers, heads, head_dim, patch_size, context_length are at least 1, shift is above 0"
            )


@dataclass
class FlowState(DenoisingState):
    """The state of an image that is being sampled, with its context."""

    context: PromptEmbeds | None = None
    """Context states (S, N, D) of the S branches of guidance; None until the prompt is read."""


class Flow(LatentFlowHead):
    """The latents of one image, sampled from noise by a flow.

    Args:
        tokenizer: a `KLTokenizer`.
        width: width D of the backbone.
        config: settings of the head; None is the defaults.
    """

    name = "flow"
    needs_context = True
    uses_positions = False
    OLD_KEYS: ClassVar[Mapping[str, str]] = {"head": "denoiser"}
    """Names of layers in version 0.1, and their names now."""

    def __init__(self, tokenizer: KLTokenizer, width: int, config: FlowConfig | None = None) -> None:
        super().__init__(tokenizer)
        self.settings = c = config or FlowConfig()
        self.path = LinearPath(c.shift)
        self.denoiser = build_denoiser(
            c.network,
            channels=tokenizer.latent_channels,
            sample_size=tokenizer.grid[0],
            context_dim=width,
            layers=c.layers,
            heads=c.heads,
            head_dim=c.head_dim,
            patch_size=c.patch_size,
        )
        self.norm = nn.LayerNorm(width)

    @classmethod
    def from_context(cls, context: BuildContext) -> Flow:
        """An untrained generator for a model.

        Args:
            context: sizes and ids of the model, the generator's own tokenizer and settings.

        Raises:
            ValueError: the tokenizer or the settings do not fit.
        """
        return cls(context.tokenizer, context.width, from_dict(FlowConfig, context.settings))

    @property
    def io_layers(self) -> tuple[nn.Module, ...]:  # type: ignore[override]
        """See `GeneratorHead.io_layers`."""
        return self.denoiser.io_layers

    def config(self) -> dict[str, object]:
        """See `GeneratorHead.config`."""
        return to_dict(self.settings)

    def num_positions(self) -> int:
        """See `Generator.num_positions`."""
        return 0

    def attend_until(self) -> list[int] | None:
        """See `Generator.attend_until`."""
        return None

    def velocity(self, x_MZhw: Tensor, t_M: Tensor, context: PromptEmbeds) -> Tensor:
        """The predicted velocity, noise - data.

        Args:
            x_MZhw: noised latents.
            t_M: times in [0, 1].
            context: hidden states of the backbone, the last of each sample the begin token's.

        Returns:
            The velocity (M, Z, h, w) in x's dtype: fp32, whatever the dtype of the model.
        """
        normed_MND = self.norm(context.embeds_MND)
        if context.mask_MN is not None:
            normed_MND = normed_MND * context.mask_MN[:, :, None]
        condition = PromptEmbeds(normed_MND, context.mask_MN)
        return self.denoiser(x_MZhw.to(normed_MND.dtype), t_M, condition).to(x_MZhw.dtype)

    # ---------------------------------------------------------------- training

    def prepare(self, model: GeneratorModel, batch: Batch, rng: torch.Generator) -> tuple[list[InputSpan], PathSample]:
        """See `Generator.prepare`: the targets are x_t, t and the velocity. No position is read."""
        return [], self.add_noise(batch, batch.ids_BL.device, rng, NOISE_SAMPLES_PER_IMAGE)

    def loss(self, model: GeneratorModel, batch: Batch, hidden_BLD: Tensor, targets: PathSample) -> Tensor:
        """See `Generator.loss`: the mean squared error (M,) of each image's velocity."""
        x_t_MZhw, t_M, velocity_MZhw = targets
        if not self.num_targets(batch):
            return self.zero_loss(hidden_BLD)
        context = self.context_states(batch, hidden_BLD).repeat_interleave(NOISE_SAMPLES_PER_IMAGE)
        with math_attention(hidden_BLD.device):
            error = self.velocity(x_t_MZhw, t_M, context).float() - velocity_MZhw
        return error.square().mean((1, 2, 3)).unflatten(0, (-1, NOISE_SAMPLES_PER_IMAGE)).mean(1)

    def context_states(self, batch: Batch, hidden_BLD: Tensor) -> PromptEmbeds:
        """The context of each image: the hidden states up to its begin token.

        Args:
            batch: packed rows with M images of this generator.
            hidden_BLD: hidden states of the backbone.

        Returns:
            States (M, N, D) and mask (M, N). Places before the document's first position are zeros and masked.
        """
        spans_M3 = batch.spans_N3[batch.images_of(self.name).to(batch.spans_N3.device)]
        rows_M1, begin_M1 = spans_M3[:, :1], spans_M3[:, 1:2] - 1
        back_N = torch.arange(self.settings.context_length - 1, -1, -1, device=begin_M1.device)
        valid_MN = back_N <= batch.positions_BL[rows_M1, begin_M1]
        states_MND = hidden_BLD[rows_M1, (begin_M1 - back_N).clamp(min=0)]
        return PromptEmbeds(states_MND * valid_MN[:, :, None], valid_MN)

    # ---------------------------------------------------------------- sampling

    def start(self, spec: SegmentSpec) -> GenerationState:
        """See `Generator.start`."""
        return FlowState(spec, [], trajectory=self.new_trajectory(spec))

    def prepare_step(self, state: GenerationState) -> StepInput:
        """See `Generator.prepare_step`."""
        assert isinstance(state, FlowState)
        return StepInput([state.spec.begin_id] if state.context is None else [])

    def step(self, model: GeneratorModel, states: list[GenerationState], hidden: list[list[Tensor]]) -> list[int]:
        """See `Generator.step`: one evaluation of the velocity, the first one after the begin token."""
        flow_states = [state for state in states if isinstance(state, FlowState)]
        num_kept = [int(state.context is None) for state in flow_states]
        for state, branches in zip(flow_states, hidden, strict=True):
            if state.context is None:
                state.context = PromptEmbeds.cat([self._pad_context(branch) for branch in branches])
        counts = [len(branches) for branches in hidden]
        trajectories = [state.trajectory for state in flow_states]
        x_t = torch.cat([path.x_t.expand(n, -1, -1, -1) for path, n in zip(trajectories, counts, strict=True)])
        times = [path.t for path, n in zip(trajectories, counts, strict=True) for _ in range(n)]
        context = PromptEmbeds.cat([state.context for state in flow_states if state.context is not None])
        velocities = self.velocity(x_t, torch.tensor(times, dtype=x_t.dtype, device=x_t.device), context)
        for state, parts in zip(flow_states, velocities.split(counts), strict=True):
            state.step(parts.split(1))
        return num_kept

    def _pad_context(self, states_LD: Tensor) -> PromptEmbeds:
        """The last states as one sample (1, N, D), padded in front with zeros, which are masked."""
        length = self.settings.context_length
        last_states = states_LD[-length:]
        padding = length - len(last_states)
        mask_N = torch.arange(length, device=states_LD.device) >= padding
        return PromptEmbeds(nn.functional.pad(last_states, (0, 0, padding, 0))[None], mask_N[None])


GENERATOR = Flow
