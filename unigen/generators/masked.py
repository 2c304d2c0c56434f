"""Masked prediction: all codes of an image in parallel, the most confident first (MaskGIT, Show-o).

    loss = - E_r mean over the masked i of log p(x_i | what is not masked, context),   ceil(P cos(pi r / 2)) of P masked

Chang et al. 2022 (arXiv 2202.04200), section 3. Inside the image every position attends to every other, and the state
at a masked position predicts that position's own code (no shift). An image is generated in few steps: all masked codes
are sampled, those of highest confidence stay, and the fraction that is still masked falls along the cosine. Codes that
are given from the start stay as they are, so any part of an image can be inpainted.
Does not depend on: templates, tokenizers, caches.

Shapes: M images, P positions of an image, K parts of it, N positions of a part, T masked ones in all images, B rows, L
positions, D width, V ids of a part's vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unigen.batch import Batch, InputSpan, Vocabulary
from unigen.generators.base import (
    BuildContext,
    GenerationState,
    GeneratorModel,
    SegmentSpec,
    StepInput,
)
from unigen.generators.next_token import decode_ids
from unigen.generators.options.inpainting import Inpainting
from unigen.generators.options.masked import MaskedOptions
from unigen.options import GroupType
from unigen.samplers.logits import argmax_ids, exponential_race_sample, warp
from unigen.samplers.options import CodeSampling, GuidanceOptions

STEPS = 12
CHOICE_TEMPERATURE = 0.5
"""Choice temperature: scale of the Gumbel noise on confidences, times 1 - (step + 1) / steps, 0 in the last step."""

Targets = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass
class MaskedState(GenerationState):
    """The state of an image that is being written."""

    ids_P: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """Ids (P,), -1 where one is masked."""
    predicted_P: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """The same, with the last sampled ids at masked positions."""
    num_masked_at_start: list[int] = field(default_factory=list)
    """Number of masked ids at the start, of each part."""
    step_index: int = 0
    """Steps taken."""
    logprobs_P: Tensor = field(default_factory=lambda: torch.empty(0))
    """Log-probabilities (P,) of the ids when they were last sampled; 0 for given ones."""


def mask_schedule(num_masked_at_start: int, num_masked: int, step: int, steps: int) -> int:
    """The number of codes that stay masked after a step: the cosine's fraction, with at least one code written.

    Args:
        num_masked_at_start: number of masked codes before the first step.
        num_masked: number of masked codes before this step.
        step: index of the step, from 0.
        steps: number of steps.

    Returns:
        A number in [0, num_masked); 0 after the last step.
    """
    if step + 1 >= steps:
        return 0
    return max(
        0, min(num_masked - 1, max(1, math.floor(num_masked_at_start * math.cos(math.pi / 2 * (step + 1) / steps))))
    )


class Masked:
    """The codes of one image by masked prediction."""

    name = "masked"
    tokenizer_kind: str | None = None
    cache_reusable, trains_on_codes, needs_context = False, True, False
    guided_loss = None
    is_text, is_causal = False, False
    forbidden_ids: Sequence[int] = ()
    text_length = 0
    conditions: frozenset[str] = frozenset()
    options: tuple[GroupType, ...] = (GuidanceOptions, CodeSampling, MaskedOptions, Inpainting)
    defaults: Mapping[str, object]

    def __init__(
        self, grid: tuple[int, int], mask_id: int, steps: int = STEPS, choice_temperature: float = CHOICE_TEMPERATURE
    ) -> None:
        """A generator for one size of images.

        Args:
            grid: rows and columns of codes.
            mask_id: the id of a masked code.
            steps: steps of an image, where a request does not say.
            choice_temperature: scale of the noise on the confidences; 0 is none.
        """
        self.grid, self.mask_id, self.defaults = grid, mask_id, {"steps": steps}
        self.choice_temperature = choice_temperature

    @classmethod
    def from_context(cls, context: BuildContext) -> Masked:
        """An untrained generator for a model.

        Args:
            context: sizes and ids of the model, the generator's own tokenizer and settings.
        """
        return cls(context.grid, context.mask_id)

    def num_positions(self) -> int:
        """See `Generator.num_positions`."""
        return self.text_length + self.grid[0] * self.grid[1]

    def attend_until(self) -> list[int] | None:
        """See `Generator.attend_until`."""
        return [self.num_positions() - 1] * self.num_positions()

    def part_slices(self) -> list[slice]:
        """The K parts of the segment, each with its own mask ratio and its own schedule."""
        return [slice(0, self.num_positions())]

    def vocab_slice(self, part: int, vocabulary: Vocabulary) -> slice:
        """The ids of a part's vocabulary.

        Args:
            part: index of the part; the codes are the last one.
            vocabulary: the model's.
        """
        return slice(vocabulary.image_start, vocabulary.image_stop)

    # ---------------------------------------------------------------- training

    def mask_ratios(self, count: int, rng: torch.Generator) -> Tensor:
        """Mask ratios (M, K) in [0, 1] of the parts in training.

        Args:
            count: number M of images.
            rng: random generator.
        """
        return torch.cos(math.pi / 2 * torch.rand(count, 1, generator=rng))

    def prepare(self, model: GeneratorModel, batch: Batch, rng: torch.Generator) -> tuple[list[InputSpan], Targets]:
        """See `Generator.prepare`."""
        rows_M1, positions_MP = batch.span_positions(batch.images_of(self.name))
        ids_MP = batch.ids_BL[rows_M1, positions_MP]
        masked_MP = torch.zeros(ids_MP.shape, dtype=torch.bool)
        ratios_MK = self.mask_ratios(len(ids_MP), rng)
        for part, ratio_M1 in zip(self.part_slices() if len(ids_MP) else (), ratios_MK.split(1, -1), strict=False):
            length = part.stop - part.start
            order_MN = torch.rand(len(ids_MP), length, generator=rng).argsort(-1).argsort(-1)
            masked_MP[:, part] = order_MN < (length * ratio_M1).ceil()
        masked_MP = masked_MP.to(ids_MP.device)
        input_MPD = model.embed(ids_MP.masked_fill(masked_MP, self.mask_id))
        return [InputSpan(rows_M1, positions_MP, input_MPD)], (rows_M1, positions_MP, ids_MP, masked_MP)

    def loss(self, model: GeneratorModel, batch: Batch, hidden_BLD: Tensor, targets: Targets) -> Tensor:
        """See `Generator.loss`: the mean (M,) over each image's masked codes, summed over its parts."""
        rows_M1, positions_MP, ids_MP, masked_MP = targets
        if not len(ids_MP):
            return hidden_BLD[:0].flatten()
        total_M = hidden_BLD.new_zeros(len(ids_MP), dtype=torch.float32)
        for number, part in enumerate(self.part_slices()):
            masked_MN, table = masked_MP[:, part], self.vocab_slice(number, model.vocabulary)
            states_TD = hidden_BLD[rows_M1, positions_MP[:, part]][masked_MN]
            logits_TV = model.logits(states_TD, table.start, table.stop).float()
            target_T = ids_MP[:, part][masked_MN] - table.start
            nats_T = torch.nn.functional.cross_entropy(logits_TV, target_T, reduction="none")
            mask_share_MN = (1 / masked_MN.sum(-1, keepdim=True).clamp(min=1)).expand(masked_MN.shape)
            total_M = total_M.index_add(0, masked_MN.nonzero()[:, 0], nats_T * mask_share_MN[masked_MN])
        return total_M

    def num_targets(self, batch: Batch) -> int:
        """See `Generator.num_targets`."""
        return len(batch.images_of(self.name))

    # ---------------------------------------------------------------- sampling

    def start(self, spec: SegmentSpec) -> GenerationState:
        """See `Generator.start`."""
        codes = self.grid[0] * self.grid[1]
        text_T = (
            torch.full((self.text_length,), -1)
            if spec.text_ids is None
            else torch.tensor(spec.text_ids, dtype=torch.int64)
        )
        codes_P = torch.full((codes,), -1) if spec.fixed_ids is None else spec.fixed_ids.flatten().cpu()
        ids_P = torch.cat([text_T, codes_P])
        num_masked_at_start = [int((ids_P[part] < 0).sum()) for part in self.part_slices()]
        return MaskedState(
            spec,
            [],
            ids_P=ids_P,
            predicted_P=ids_P.clone(),
            num_masked_at_start=num_masked_at_start,
            logprobs_P=torch.zeros(len(ids_P)),
        )

    def prepare_step(self, state: GenerationState) -> StepInput:
        """See `Generator.prepare_step`."""
        assert isinstance(state, MaskedState)
        length = self.num_positions()
        input_P = torch.where(state.ids_P < 0, self.mask_id, state.ids_P)
        uncond_P = input_P.clone()
        uncond_P[: self.text_length] = self.mask_id
        ids, uncond_ids = ([state.spec.begin_id, *branch_ids.tolist()] for branch_ids in (input_P, uncond_P))
        return StepInput(ids, attend_until=[0] + [length] * length, uncond_ids=uncond_ids if self.text_length else None)

    def num_masked(self, state: MaskedState, number: int, steps: int) -> int:
        """The number of ids of a part that stay masked after this step.

        Args:
            state: before the step.
            number: index of the part.
            steps: number of steps of the image.
        """
        masked = int((state.ids_P[self.part_slices()[number]] < 0).sum())
        return mask_schedule(state.num_masked_at_start[number], masked, state.step_index, steps)

    def choice_temperature_at(self, step: int, steps: int) -> float:
        """Scale of the Gumbel noise on the confidences in a step.

        Args:
            step: index of the step, from 0.
            steps: number of steps of the image.
        """
        return self.choice_temperature * (1 - (step + 1) / steps)

    def sample_gumbel(self, count: int, rng: torch.Generator) -> Tensor:
        """Gumbel noise (count,)."""
        return -torch.empty(count).exponential_(generator=rng).log()

    def step(self, model: GeneratorModel, states: list[GenerationState], hidden: list[list[Tensor]]) -> list[int]:
        """See `Generator.step`."""
        for number, part in enumerate(self.part_slices()):
            codes, table = number == len(self.part_slices()) - 1, self.vocab_slice(number, model.vocabulary)
            unfinished = [i for i, state in enumerate(states) if bool((state.ids_P[part] < 0).any())]  # type: ignore[attr-defined]
            if not unfinished:
                continue
            branch_hidden = [hidden[i] if codes else hidden[i][:1] for i in unfinished]  # only codes have guidance
            flat = torch.stack([branch[1:][part] for branches in branch_hidden for branch in branches])
            logits = model.logits(flat.flatten(0, 1), table.start, table.stop).unflatten(0, flat.shape[:2])
            for i, split in zip(unfinished, logits.split([len(branches) for branches in branch_hidden]), strict=True):
                guided_NV = states[i].spec.guidance.combine(list(split)) if codes else self.mask_forbidden(split[0])
                self._unmask(states[i], number, guided_NV, table.start)  # type: ignore[arg-type]
        for state in states:
            assert isinstance(state, MaskedState)
            state.step_index += 1
            state.finished = not bool((state.ids_P < 0).any())
            steps = state.spec.options[MaskedOptions].steps
            state.progress = state.step_index, min(steps, max(*state.num_masked_at_start, 1))
            state.text_ids = state.predicted_P[: self.text_length].tolist()
            state.ids = state.predicted_P[self.text_length :].tolist()
            if state.spec.record_logprobs:
                state.logprobs = state.logprobs_P.tolist()
        return [0] * len(states)

    def mask_forbidden(self, logits_NV: Tensor) -> Tensor:
        """Logits (N, V) of text, -inf for ids that do not occur in text."""
        return logits_NV

    def _unmask(self, state: MaskedState, number: int, logits_NV: Tensor, first: int) -> None:
        """Sample all masked ids of a part; keep the most confident ones."""
        spec, steps, part = state.spec, state.spec.options[MaskedOptions].steps, self.part_slices()[number]
        ids_N = state.ids_P[part]
        if spec.sampling.temperature == 0:
            weights_NV, noise = logits_NV.float().softmax(-1), 0.0
            sampled_N = argmax_ids(logits_NV).cpu()
        else:
            weights_NV = warp(logits_NV, spec.sampling).softmax(-1)
            sampled_N = exponential_race_sample(
                weights_NV, torch.empty(logits_NV.shape).exponential_(generator=spec.rng)
            ).cpu()
            codes = number == len(self.part_slices()) - 1  # text has no noise, as in LLaDA
            noise = self.choice_temperature_at(state.step_index, steps) if codes else 0.0
        if bool((sampled_N < 0).any()):
            state.finite = False
            return
        # confidence = log p(sampled id) + noise * Gumbel
        gumbel_N = self.sample_gumbel(len(sampled_N), spec.rng)
        logprobs_N = weights_NV.cpu().gather(-1, sampled_N[:, None])[:, 0].log()
        confidence_N = logprobs_N + noise * gumbel_N
        masked_N = ids_N < 0
        remasked = confidence_N.masked_fill(~masked_N, math.inf).argsort()[: self.num_masked(state, number, steps)]
        ids_N = torch.where(masked_N, sampled_N + first, ids_N)
        state.predicted_P[part] = ids_N
        ids_N[remasked] = -1
        state.ids_P[part] = ids_N
        if spec.record_logprobs:
            state.logprobs_P[part] = torch.where(masked_N, logprobs_N, state.logprobs_P[part])

    def decode(self, model: GeneratorModel, states: list[GenerationState]) -> Tensor:
        """See `Generator.decode`."""
        return decode_ids(model, states)


GENERATOR = Masked
