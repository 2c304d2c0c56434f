"""Next-scale prediction: an image as token maps of growing side, all codes of a scale at once (VAR).

    p(r_1 .. r_K) = prod_k p(r_k | r_<k, context),   loss = - mean over all codes of log p

Tian et al. 2024 (arXiv 2404.02905), section 3.2, inside a language model: the begin token predicts the one code of the
first scale. The positions of scale k read the image of scales 1..k-1, resized to scale k, and predict its codes (no
shift); each sees its whole scale and everything before it. Guidance grows with the scales, from none to its full
strength. With `token_corruption` above 0 a fraction of the codes that training reads is wrong, and later scales learn
to correct it, as they must where a scale was sampled badly (Infinity, Han et al. 2024, arXiv 2412.04431, section 3.4).
The multi-scale tokenizer is part of the generator, as are the projections into and out of the backbone.
Does not depend on: templates, caches, how a tokenizer is trained.

Shapes: M images, K scales, n_k codes of scale k, P = n_2 + .. + n_K positions, B rows, L positions of a row, C code
dimension, D width, V codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from unigen.batch import Batch, InputSpan
from unigen.generators.base import (
    BuildContext,
    GenerationState,
    GeneratorHead,
    GeneratorModel,
    SegmentSpec,
    StepInput,
)
from unigen.options import GroupType
from unigen.samplers.guidance import Guidance
from unigen.samplers.logits import log_probabilities, sample_shared_rng
from unigen.samplers.options import CodeSampling, GuidanceOptions

if TYPE_CHECKING:
    from unigen.tokenizers.var_vq import VARVQ
    from unigen.tokenizers.vq import VQTokenizer

Targets = tuple[Tensor, Tensor, Tensor]


@dataclass
class ScaleState(GenerationState):
    """The state of an image that is being written."""

    f_hat_1Chw: Tensor = field(default_factory=lambda: torch.empty(0))
    """Features of the image so far, in the tokenizer's space."""
    codes: list[Tensor] = field(default_factory=list)
    """Codes (n_k,) of each scale written so far."""
    input_LD: Tensor | None = None
    """Input embeddings of the next step; None before the first scale."""

    @property
    def native_codes(self) -> Tensor:
        """See `GenerationState.native_codes`."""
        return torch.cat(self.codes).cpu()


class NextScale(GeneratorHead):
    """The codes of one image, scale by scale."""

    name = "next-scale"
    tokenizer_kind: str | None = "multiscale"
    needs_context = False
    options: tuple[GroupType, ...] = (GuidanceOptions, CodeSampling)
    OLD_KEYS: ClassVar[Mapping[str, str]] = {"project": "proj_in"}
    """Names of layers in version 0.1, and their names now."""

    def __init__(self, tokenizer: VQTokenizer | VARVQ, width: int) -> None:
        """A generator for one tokenizer and one backbone.

        Args:
            tokenizer: a `VARVQ`, or a `VQTokenizer` with the multi-scale quantizer; the first scale is one code.
            width: width D of the backbone.

        Raises:
            ValueError: the tokenizer has no such quantizer.
        """
        super().__init__(tokenizer)
        self.token_corruption = 0.0
        quantizer: Any = getattr(tokenizer, "quantizer", None)
        scales = getattr(quantizer, "scales", None)
        if scales is None or scales[0] != 1:
            raise ValueError(f"next-scale needs a multi-scale tokenizer whose first scale is 1, not one of {scales}")
        self.lengths: list[int] = quantizer.lengths
        self.proj_in = nn.Linear(quantizer.dim, width)
        self.scale_embedding = nn.Embedding(len(self.lengths), width)
        self.position_embedding = nn.Embedding(sum(self.lengths), width)
        self.head = nn.Linear(width, quantizer.size)
        for embedding in (self.scale_embedding, self.position_embedding):
            nn.init.normal_(embedding.weight, std=0.02)
        scale_ids = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))
        self.register_buffer("scale_ids", scale_ids, persistent=False)
        self.scale_ids: Tensor

    @classmethod
    def from_context(cls, context: BuildContext) -> NextScale:
        """An untrained generator for a model.

        Args:
            context: sizes and ids of the model, the generator's own tokenizer and settings.

        Raises:
            ValueError: the tokenizer or the settings do not fit.
        """
        return cls(context.tokenizer, context.width)

    @property
    def io_layers(self) -> tuple[nn.Module, ...]:  # type: ignore[override]
        """See `GeneratorHead.io_layers`."""
        return self.proj_in, self.head

    @property
    def code_shape(self) -> tuple[int, int]:
        """Number of codes of an image, and size of the codebook."""
        return sum(self.lengths), self.tokenizer.quantizer.size

    def num_positions(self) -> int:
        """See `Generator.num_positions`."""
        return sum(self.lengths[1:])

    def attend_until(self) -> list[int] | None:
        """See `Generator.attend_until`."""
        last_position, attend_until = -1, []
        for length in self.lengths[1:]:
            last_position += length
            attend_until += [last_position] * length
        return attend_until

    def embed_maps(self, maps_MPC: Tensor, first: int) -> Tensor:
        """Input embeddings (M, P, D): projected maps, plus embeddings of their scales and positions.

        Args:
            maps_MPC: features at consecutive positions.
            first: the first of these positions, counted over all scales.
        """
        positions = slice(first, first + maps_MPC.shape[1])
        return (
            self.proj_in(maps_MPC.to(self.proj_in.weight.dtype))
            + self.scale_embedding(self.scale_ids[positions])
            + self.position_embedding.weight[positions]
        )

    # ---------------------------------------------------------------- training

    def prepare(self, model: GeneratorModel, batch: Batch, rng: torch.Generator) -> tuple[list[InputSpan], Targets]:
        """See `Generator.prepare`."""
        rows_M1, positions_MP = batch.span_positions(batch.images_of(self.name))
        if not len(positions_MP):
            return [], (rows_M1, positions_MP, positions_MP)
        quantizer = self.tokenizer.quantizer
        with torch.no_grad(), torch.autocast(batch.ids_BL.device.type, enabled=False):
            if self.token_corruption and batch.images is not None and batch.images.is_floating_point():
                f_MChw = self.tokenizer.features(self.target_pixels(batch, batch.ids_BL.device))
                codes_MP, input_codes_MP = quantizer.encode_with_corruption(f_MChw, self.token_corruption, rng)
            else:
                codes_MP = input_codes_MP = self.encode_targets(batch, batch.ids_BL.device)
            maps_MPC = quantizer.scale_inputs(input_codes_MP)
        input_MPD = self.embed_maps(maps_MPC, self.lengths[0])
        return [InputSpan(rows_M1, positions_MP, input_MPD)], (rows_M1, positions_MP, codes_MP)

    def loss(self, model: GeneratorModel, batch: Batch, hidden_BLD: Tensor, targets: Targets) -> Tensor:
        """See `Generator.loss`."""
        if not len(targets[1]):
            return self.zero_loss(hidden_BLD)
        logits = self.logits(hidden_BLD, targets).flatten(0, 1)
        return nn.functional.cross_entropy(logits, targets[2].flatten(), reduction="none")

    def logits(self, hidden_BLD: Tensor, targets: Targets) -> Tensor:
        """Logits (M, n_1 + P, V) of the codes of all scales.

        Args:
            hidden_BLD: hidden states of the backbone.
            targets: those of `prepare`.
        """
        rows_M1, positions_MP, _ = targets
        positions_MP = torch.cat([positions_MP[:, :1] - 1, positions_MP], 1)
        return self.head(hidden_BLD[rows_M1, positions_MP]).float()

    def guided_loss(self, branches: Sequence[tuple[Tensor, Targets]], guidance: Guidance, temperature: float) -> Tensor:
        """`loss` under guidance and a temperature.

        Args:
            branches: hidden states and targets of each branch of guidance.
            guidance: how the branches' logits are combined.
            temperature: divisor of the combined logits.

        Returns:
            Losses (T,), in nats.
        """
        logits, codes_MP = torch.cat(self.guided_logits(branches, guidance), 1) / temperature, branches[0][1][2]
        return nn.functional.cross_entropy(logits.flatten(0, 1), codes_MP.flatten(), reduction="none")

    def guided_logits(self, branches: Sequence[tuple[Tensor, Targets]], guidance: Guidance) -> list[Tensor]:
        """Guided logits (M, n_k, V) of each scale, given the targets' codes of the scales before it.

        Args:
            branches: hidden states and targets of each branch of guidance.
            guidance: how the branches' logits are combined.
        """
        splits = [self.logits(*branch).split(self.lengths, 1) for branch in branches]
        return [
            guidance.combine(list(logits), self.guidance_weight(k))
            for k, logits in enumerate(zip(*splits, strict=True))
        ]

    def guidance_weight(self, k: int) -> float:
        """Weight in [0, 1] of guidance at scale k: VAR has logits = (1 + t) c - t u with t = (s - 1) k / (K - 1)."""
        return k / max(len(self.lengths) - 1, 1)

    def num_targets(self, batch: Batch) -> int:
        """See `Generator.num_targets`."""
        return len(batch.images_of(self.name)) * sum(self.lengths)

    # ---------------------------------------------------------------- sampling

    def start(self, spec: SegmentSpec) -> GenerationState:
        """See `Generator.start`."""
        return ScaleState(spec, [], f_hat_1Chw=self.tokenizer.quantizer.initial_f_hat(1))

    def prepare_step(self, state: GenerationState) -> StepInput:
        """See `Generator.prepare_step`."""
        assert isinstance(state, ScaleState)
        if state.input_LD is None:
            return StepInput(state.spec.prompt_ids)
        length = len(state.input_LD)
        return StepInput([0] * length, embeds=state.input_LD, attend_until=[length - 1] * length)

    def step(self, model: GeneratorModel, states: list[GenerationState], hidden: list[list[Tensor]]) -> list[int]:
        """See `Generator.step`: one scale of each image. All positions stay in the cache: later scales see them."""
        groups: dict[int, list[int]] = {}
        for i, state in enumerate(states):
            assert isinstance(state, ScaleState)
            groups.setdefault(len(state.codes), []).append(i)
        num_read = [len(s.spec.prompt_ids if s.input_LD is None else s.input_LD) for s in states]  # type: ignore[attr-defined]
        for k, members in groups.items():
            flat = torch.stack([branch for i in members for branch in hidden[i]])
            split = self.head(flat.to(self.head.weight.dtype)).float().split([len(hidden[i]) for i in members])
            self._sample_scale([states[i] for i in members], split, k)  # type: ignore[misc]
        return num_read

    def _sample_scale(self, states: list[ScaleState], logits: Sequence[Tensor], k: int) -> None:
        """Sample scale k of each image from the logits of its branches, and prepare the input of the next scale."""
        for state, split in zip(states, logits, strict=True):
            guided_NV = state.spec.guidance.combine(list(split), self.guidance_weight(k))
            codes_N = sample_shared_rng(guided_NV, state.spec.sampling, state.spec.rng)
            state.codes.append(codes_N)
            if state.spec.record_logprobs:
                state.logprobs += log_probabilities(guided_NV, state.spec.sampling, codes_N.clamp(min=0)).tolist()
        quantizer, codes_MN = self.tokenizer.quantizer, torch.stack([state.codes[k] for state in states])
        for state, min_code in zip(states, codes_MN.amin(-1).tolist(), strict=True):
            state.finite = min_code >= 0
        codes_MN = codes_MN.clamp(min=0)
        f_hat_MChw = torch.cat([state.f_hat_1Chw for state in states]).to(codes_MN.device)
        f_hat_MChw = quantizer.add_scale(f_hat_MChw, codes_MN, k)
        last_position = k + 1 == len(self.lengths)
        if not last_position:
            maps_MNC = quantizer.downsample(f_hat_MChw, k + 1).flatten(2).transpose(1, 2)
            next_input_MND = self.embed_maps(maps_MNC, sum(self.lengths[: k + 1]))
        for i, state in enumerate(states):
            state.f_hat_1Chw, state.finished, state.progress = (
                f_hat_MChw[i : i + 1],
                last_position,
                (k + 1, len(self.lengths)),
            )
            state.input_LD = None if last_position else next_input_MND[i]

    def decode(self, model: GeneratorModel, states: list[GenerationState]) -> Tensor:
        """See `Generator.decode`."""
        codes_MP = torch.stack([torch.cat(state.codes) for state in states if isinstance(state, ScaleState)])
        return self.tokenizer.decode(codes_MP)


GENERATOR = NextScale
