"""A flow for each token: continuous latents in raster order, each sampled by a small MLP from the state before it.

    loss = mean over i, t of |v(x_t, t, z_i) - (noise - x_i)|^2,    x_t = (1 - t) x_i + t noise,    z_i = state before i

Li et al. 2024 (MAR, arXiv 2406.11838), eq. 3 and its MLP with adaLN, on causal states as in Orthus (Kou et al. 2024,
arXiv 2412.00127), with flow instead of DDPM. Each token is noised several times, since the MLP costs little. Guidance
combines the velocities of the branches, not their hidden states.
Does not depend on: templates, caches, how a tokenizer is trained.

Shapes: M images, P tokens of Z latent channels, T tokens, R noisings of each, D width, B rows, L positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from unigen.batch import Batch, InputSpan
from unigen.config import from_dict, to_dict
from unigen.diffusion.options import FlowOptions
from unigen.diffusion.sampling import sample
from unigen.diffusion.solvers import build_solver
from unigen.generators.base import BuildContext, GenerationState, GeneratorModel, SegmentSpec, StepInput
from unigen.generators.latents import LatentFlowHead
from unigen.nn.denoisers import TimestepEmbedder
from unigen.samplers.guidance import Guidance

if TYPE_CHECKING:
    from unigen.tokenizers.kl import KLTokenizer

Targets = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TokenFlowConfig:
    """Settings of the MLP."""

    RENAMED: ClassVar[Mapping[str, str]] = {"repeats": "noise_samples_per_token"}
    """Keys of version 0.1, and their names now."""

    width: int = 256
    """Width of its hidden layers."""
    blocks: int = 3
    """Residual blocks."""
    noise_samples_per_token: int = 4
    """Noised copies of each token in training."""

    def __post_init__(self) -> None:
        if min(self.width, self.noise_samples_per_token) < 1 or self.blocks < 0:
            raise ValueError("token_flow: width and noise_samples_per_token are at least 1, blocks at least 0")


@dataclass
class TokenFlowState(GenerationState):
    """The state of an image that is being written."""

    tokens: list[Tensor] = field(default_factory=list)
    """Tokens (Z,) so far."""
    latents_Zhw: Tensor = field(default_factory=lambda: torch.empty(0))
    """Latents of the finished image."""
    input_1D: Tensor | None = None
    """Input embedding of the next step; None before the first token."""

    @property
    def num_written(self) -> int:
        """See `GenerationState.num_written`."""
        return len(self.tokens)

    @property
    def latents(self) -> Tensor:
        """See `GenerationState.latents`."""
        return self.latents_Zhw


class AdaLNBlock(nn.Module):
    """h + gate * mlp((1 + scale) * norm(h) + shift), with scale, shift and gate from the condition (adaLN-Zero: they
    start at zero).

    Args:
        width: width of h and of the condition.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 3 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        """The block's output, of h's shape (..., width), for a condition of the same shape."""
        shift, scale, gate = self.modulation(nn.functional.silu(condition)).chunk(3, -1)
        return h + gate * self.mlp(self.norm(h) * (1 + scale) + shift)


class TokenFlow(LatentFlowHead):
    """The latents of one image, one token after the other.

    Args:
        tokenizer: a `KLTokenizer`.
        width: width D of the backbone.
        config: settings of the MLP; None is the defaults.
    """

    name = "token-flow"
    needs_context = False
    OLD_KEYS: ClassVar[Mapping[str, str]] = {
        "read": "token_proj",
        "condition": "condition_proj",
        "time": "time_embed",
        "enter": "proj_in",
        "leave": "proj_out",
    }
    """Names of layers in version 0.1, and their names now."""

    def __init__(self, tokenizer: KLTokenizer, width: int, config: TokenFlowConfig | None = None) -> None:
        super().__init__(tokenizer)
        self.settings = c = config or TokenFlowConfig()
        channels = tokenizer.latent_channels
        self.grid: tuple[int, int] = tokenizer.grid
        self.token_proj = nn.Linear(channels, width)
        self.condition_proj = nn.Linear(width, c.width)
        self.time_embed = TimestepEmbedder(c.width)
        self.proj_in = nn.Linear(channels, c.width)
        self.blocks = nn.ModuleList(AdaLNBlock(c.width) for _ in range(c.blocks))
        self.norm = nn.LayerNorm(c.width)
        self.proj_out = nn.Linear(c.width, channels)

    @classmethod
    def from_context(cls, context: BuildContext) -> TokenFlow:
        """An untrained generator for a model.

        Args:
            context: sizes and ids of the model, the generator's own tokenizer and settings.

        Raises:
            ValueError: the tokenizer or the settings do not fit.
        """
        return cls(context.tokenizer, context.width, from_dict(TokenFlowConfig, context.settings))

    @property
    def io_layers(self) -> tuple[nn.Module, ...]:  # type: ignore[override]
        """See `GeneratorHead.io_layers`."""
        return self.token_proj, self.time_embed, self.proj_in, self.proj_out

    def config(self) -> dict[str, object]:
        """See `GeneratorHead.config`."""
        return to_dict(self.settings)

    def num_positions(self) -> int:
        """See `Generator.num_positions`."""
        return self.grid[0] * self.grid[1]

    def attend_until(self) -> list[int] | None:
        """See `Generator.attend_until`."""
        return None

    def velocity(self, x_TZ: Tensor, t_T: Tensor, states_TD: Tensor) -> Tensor:
        """The predicted velocity, noise - data.

        Args:
            x_TZ: noised tokens.
            t_T: times in [0, 1].
            states_TD: hidden states before the tokens.

        Returns:
            The velocity (T, Z) in fp32.
        """
        dtype = self.proj_in.weight.dtype
        condition = self.condition_proj(states_TD.to(dtype)) + self.time_embed(t_T)
        h = self.proj_in(x_TZ.to(dtype))
        for block in self.blocks:
            h = block(h, condition)
        return self.proj_out(self.norm(h)).float()

    # ---------------------------------------------------------------- training

    def prepare(self, model: GeneratorModel, batch: Batch, rng: torch.Generator) -> tuple[list[InputSpan], Targets]:
        """See `Generator.prepare`: the backbone reads clean tokens. The targets are these tokens, repeated, with noise
        and times."""
        if not self.num_targets(batch):
            empty = torch.zeros(0, device=batch.ids_BL.device)
            return [], (empty, empty)
        tokens_MPZ = self.encode_targets(batch, batch.ids_BL.device).flatten(2).transpose(1, 2)
        input_MPD = self.token_proj(tokens_MPZ.to(self.token_proj.weight.dtype))
        x_TRZ = tokens_MPZ.flatten(0, 1)[:, None].expand(-1, self.settings.noise_samples_per_token, -1)
        noise_TRZ = torch.randn(x_TRZ.shape, generator=rng).to(x_TRZ)
        t_TR = self.path.sample_times(x_TRZ.shape[:2], rng).to(x_TRZ)
        rows_M1, positions_MP = batch.span_positions(batch.images_of(self.name))
        return [InputSpan(rows_M1, positions_MP, input_MPD)], (torch.stack((x_TRZ, noise_TRZ)), t_TR)

    def loss(self, model: GeneratorModel, batch: Batch, hidden_BLD: Tensor, targets: Targets) -> Tensor:
        """See `Generator.loss`: the mean squared error (T,) of each token's velocity."""
        if not self.num_targets(batch):
            return self.zero_loss(hidden_BLD)
        (x_TRZ, noise_TRZ), t_TR = targets
        rows_M1, positions_MP = batch.span_positions(batch.images_of(self.name))
        states_TD = hidden_BLD[rows_M1, positions_MP - 1].flatten(0, 1)
        x_t_TRZ = self.path.add_noise(x_TRZ, noise_TRZ, t_TR)
        states_TRD = states_TD[:, None].expand(-1, self.settings.noise_samples_per_token, -1)
        velocity = self.velocity(x_t_TRZ.flatten(0, 1), t_TR.flatten(), states_TRD.flatten(0, 1))
        error = velocity - self.path.target(x_TRZ, noise_TRZ, t_TR).flatten(0, 1)
        return error.square().mean(-1).unflatten(0, (-1, self.settings.noise_samples_per_token)).mean(1)

    def num_targets(self, batch: Batch) -> int:
        """See `Generator.num_targets`."""
        return len(batch.images_of(self.name)) * self.num_positions()

    # ---------------------------------------------------------------- sampling

    def start(self, spec: SegmentSpec) -> GenerationState:
        """See `Generator.start`."""
        return TokenFlowState(spec, [])

    def prepare_step(self, state: GenerationState) -> StepInput:
        """See `Generator.prepare_step`."""
        assert isinstance(state, TokenFlowState)
        return StepInput([state.spec.begin_id]) if state.input_1D is None else StepInput([0], embeds=state.input_1D)

    def step(self, model: GeneratorModel, states: list[GenerationState], hidden: list[list[Tensor]]) -> list[int]:
        """See `Generator.step`: the next token of each image, by a whole flow of the MLP."""
        tokens = self._sample_tokens(states, [[branch[-1] for branch in branches] for branches in hidden])
        for state, token_Z in zip(states, tokens, strict=True):
            assert isinstance(state, TokenFlowState)
            state.tokens.append(token_Z)
            state.input_1D = self.token_proj(token_Z[None].to(self.token_proj.weight.dtype))
            state.finished = len(state.tokens) == self.num_positions()
            if state.finished:
                state.latents_Zhw = torch.stack(state.tokens, 1).unflatten(1, self.grid)
        return [len(branches[0]) for branches in hidden]

    def _sample_tokens(self, states: list[GenerationState], conditions: list[list[Tensor]]) -> list[Tensor]:
        """A token (Z,) of each state, from noise of its own segment. States with equal options and guidance are sampled
        together.

        Args:
            states: N of them.
            conditions: `conditions[i][b]` (D,) is the last hidden state of branch b of state i.
        """
        groups: dict[tuple[FlowOptions, Guidance], list[int]] = {}
        for i, state in enumerate(states):
            groups.setdefault((state.spec.options[FlowOptions], state.spec.guidance), []).append(i)
        tokens: dict[int, Tensor] = {}
        for (options, guidance), members in groups.items():
            condition_ND = torch.stack([conditions[i][b] for b in range(guidance.num_branches) for i in members])
            noise_MZ = torch.stack(
                [torch.randn(self.tokenizer.latent_channels, generator=states[i].spec.rng) for i in members]
            )
            predict = partial(self._branch_velocities, condition_ND, guidance.num_branches)
            solver = build_solver(options.solver, options.steps, self.path.shift)
            data_MZ = sample(predict, noise_MZ.to(condition_ND.device), solver, guidance)
            tokens |= zip(members, data_MZ, strict=True)
        return [tokens[i] for i in range(len(states))]

    def _branch_velocities(self, condition_ND: Tensor, branches: int, x_MZ: Tensor, t: float) -> tuple[Tensor, ...]:
        """The velocity (M, Z) of each branch; `condition_ND` holds the M states of one branch after those of the
        other."""
        times_N = torch.full((len(condition_ND),), t, dtype=x_MZ.dtype, device=x_MZ.device)
        return self.velocity(torch.cat([x_MZ] * branches), times_N, condition_ND).chunk(branches)


GENERATOR = TokenFlow
