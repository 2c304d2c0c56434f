"""Speculative Jacobi decoding for `NextToken`: exact next-token sampling of several codes a step.

    x_j accepted with probability min(1, p(x_j) / q_j(x_j)), else drawn from max(0, p - q_j) normalised
                                                          (Teng et al. 2024, arXiv 2410.01699; Leviathan et al. 2023)

The backbone reads a window of drafts along with the last code, so that one pass gives the distribution p after each of
them. Drafts are accepted from the left up to the first rejection. Those after it are sampled again from this pass's
distributions at their places; these are the q_j of their next test. A draft without a distribution repeats the code
above it, and its q_j is a point mass. p and q_j are the distributions that are sampled from: after guidance,
temperature, top-k and top-p.

"sjd"      as above: the distribution of an image is that of ordinary decoding
"jacobi"   one race of exponential variables for each place (`samplers.logits.exponential_race_sample`), drawn in the
           order in which ordinary decoding draws them; a draft is accepted where the race gives the same code. The
           image is then that of ordinary decoding, up to rounding: a window's sums have another order, so that it is
           the same in float32, and often another one in half precision

Each row advances at its own pace, and ids between the rows of an image are read in their places. Does not depend on:
caches, templates. Shapes: L positions of a step, W drafts, K codes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from unigen.generators.base import GenerationState, GeneratorModel, StepInput
from unigen.samplers.logits import exponential_race_sample, log_probabilities, probabilities

WINDOW_SIZE = 8
"""Number of drafts, at most."""


@dataclass
class SpeculativeState(GenerationState):
    """The state of an image that is being sampled."""

    method: str = "sjd"
    """One of `SPECULATIVE_METHODS`."""
    offset: int = 0
    """The id of code 0."""
    drafts: list[int] = field(default_factory=list)
    """Codes for the next positions."""
    proposals: list[Tensor | None] = field(default_factory=list)
    """Of each draft the distribution (K,) that it was sampled from; None for a point mass."""
    exponentials: list[Tensor] = field(default_factory=list)
    """Exponential variables (K,) of the next positions, for "jacobi"."""


def prepare_step(state: SpeculativeState) -> StepInput:
    """The input of the next step: pending ids, then the drafts, with the ids between rows.

    Args:
        state: of an image that is not done.
    """
    return StepInput([*state.pending_ids, *(id for ids in _draft_ids(state) for id in ids)])


def step(model: GeneratorModel, state: SpeculativeState, hidden: list[Tensor]) -> int:
    """Accept drafts, sample the code after them, and draft again.

    Args:
        model: the model.
        state: changed in place.
        hidden: of each branch the hidden states (L, D) of the step.

    Returns:
        The number of positions of the step that stay in the cache.
    """
    spec, vocabulary = state.spec, model.vocabulary
    state.offset = vocabulary.image_start
    draft_ids = _draft_ids(state)
    prefix_lengths = [len(state.pending_ids)]  # how many ids stand before each place
    for ids in draft_ids:
        prefix_lengths.append(prefix_lengths[-1] + len(ids))
    from_end = (
        torch.tensor(prefix_lengths, device=hidden[0].device) - prefix_lengths[-1] - 1
    )  # from the end: a prompt may open the image
    parts = [
        model.logits(states_LD[from_end], vocabulary.image_start, vocabulary.image_stop).float() for states_LD in hidden
    ]
    guided_WK = spec.guidance.combine(parts)
    target_probs_WK = probabilities(guided_WK, spec.sampling).cpu()
    if target_probs_WK[:, 0].isnan().any():  # then all of the row's are
        state.finite = False
        return prefix_lengths[0]
    if state.method == "jacobi":
        num_accepted, code, drafts = _verify_by_race(state, target_probs_WK)
        proposals: list[Tensor | None] = [None] * len(drafts)
    else:
        num_accepted, code, drafts = _verify_drafts(state, target_probs_WK)
        proposals = list(target_probs_WK[num_accepted + 1 : num_accepted + 1 + len(drafts)])
    codes = [*state.drafts[:num_accepted], code]
    if spec.record_logprobs:
        state.logprobs += log_probabilities(guided_WK[: len(codes)], spec.sampling, torch.tensor(codes)).tolist()
    _append_codes(state, codes)
    state.drafts, state.proposals = drafts, proposals
    _extend_drafts(state)
    return prefix_lengths[num_accepted]


def _verify_drafts(state: SpeculativeState, target_probs_WK: Tensor) -> tuple[int, int, list[int]]:
    """The number of accepted drafts, the code after them, and new drafts for the places after that code."""
    rng = state.spec.rng
    for j, (code, proposal_K) in enumerate(zip(state.drafts, state.proposals, strict=True)):
        if proposal_K is None:
            proposal_K = torch.zeros_like(target_probs_WK[j])
            proposal_K[code] = 1.0
        if torch.rand((), generator=rng) * proposal_K[code] < target_probs_WK[j, code]:
            continue
        residual_K = (target_probs_WK[j] - proposal_K).clamp(min=0)
        if not residual_K.any():  # equal but for rounding
            residual_K = target_probs_WK[j]
        return (
            j,
            _sample_weights(residual_K, rng),
            [_sample_weights(target_probs_K, rng) for target_probs_K in target_probs_WK[j + 1 :]],
        )
    return len(state.drafts), _sample_weights(target_probs_WK[-1], rng), []


def _verify_by_race(state: SpeculativeState, target_probs_WK: Tensor) -> tuple[int, int, list[int]]:
    """The same, by races whose exponential variables stay with their places."""
    for target_probs_K in target_probs_WK[len(state.exponentials) :]:
        state.exponentials.append(torch.empty(len(target_probs_K)).exponential_(generator=state.spec.rng))
    codes = exponential_race_sample(target_probs_WK, torch.stack(state.exponentials[: len(target_probs_WK)])).tolist()
    num_accepted = next((j for j, code in enumerate(state.drafts) if codes[j] != code), len(state.drafts))
    del state.exponentials[: num_accepted + 1]
    return num_accepted, codes[num_accepted], codes[num_accepted + 1 :]


def _sample_weights(weights_K: Tensor, rng: torch.Generator) -> int:
    return int(exponential_race_sample(weights_K, torch.empty(len(weights_K)).exponential_(generator=rng)))


def _append_codes(state: SpeculativeState, codes: list[int]) -> None:
    """Append final codes to the image."""
    assert state.spec.grid is not None
    height, width = state.spec.grid
    state.ids += [state.offset + code for code in codes]
    row_complete = len(state.ids) % width == 0
    state.pending_ids = [state.ids[-1], *(state.spec.row_end_ids if row_complete else ())]
    state.finished = len(state.ids) == height * width


def _extend_drafts(state: SpeculativeState) -> None:
    """Fill the window, at most up to the last place but one, with the codes above (in the first row, those before)."""
    assert state.spec.grid is not None
    height, width = state.spec.grid
    num_drafts = min(WINDOW_SIZE, height * width - len(state.ids) - 1)
    del state.drafts[max(0, num_drafts) :], state.proposals[max(0, num_drafts) :]
    while len(state.drafts) < num_drafts:
        codes = [id - state.offset for id in state.ids[-width:]] + state.drafts
        state.drafts.append(codes[-width] if len(codes) >= width else codes[-1])
        state.proposals.append(None)


def _draft_ids(state: SpeculativeState) -> list[list[int]]:
    """The ids of each draft, with those after it at the end of a row."""
    assert state.spec.grid is not None
    width = state.spec.grid[1]
    return [
        [state.offset + code, *(state.spec.row_end_ids if (len(state.ids) + j) % width == 0 else ())]
        for j, code in enumerate(state.drafts, start=1)
    ]
