"""Guidance inside vLLM: a logits processor that samples the ids of spans, and a scheduler that keeps branches together.

vLLM imports both by their names:

    --logits-processors unigen.backends.vllm_guidance:GuidedSampler
    --scheduler-cls unigen.backends.vllm_guidance.GuidedScheduler

A segment is one request of vLLM's for each branch of guidance, all of temperature 0, with arguments in
`extra_args["unigen"]` (`serialize_segment`). `GuidedSampler` samples by the functions of
`unigen.generators.next_token`, from the segment's own seed, and leaves one finite logit, the same for all branches.
`GuidedScheduler` lets branches in together, lets them wait together, and drops ids that one made without the others, so
that chunked prompts, a full cache and requests that arrive one after the other change nothing. Requests without
`extra_args["unigen"]` run as vLLM runs them. Does not depend on: images, templates, tokenizers, the engine.

Shapes: R rows of vLLM's batch, V ids.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.v1.core.sched.request_queue import create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from unigen.batch import Vocabulary
from unigen.generators.base import GenerationState, SegmentSpec
from unigen.generators.next_token import NextToken, Text
from unigen.samplers.guidance import Guidance
from unigen.samplers.logits import SamplingOptions, sample

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.request_queue import RequestQueue
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request
    from vllm.v1.sample.logits_processor import BatchUpdate

EXTRA_ARGS_KEY = "unigen"


def serialize_segment(
    spec: SegmentSpec, vocabulary: Vocabulary, forbidden: list[int], group: str, branch: int
) -> dict[str, Any]:
    """The arguments of `GuidedSampler` for one branch of a segment.

    Args:
        spec: the segment.
        vocabulary: of the model.
        forbidden: ids that no text holds.
        group: a name that the branches of one segment share.
        branch: the branch's number.

    Returns:
        Plain values, which JSON can hold.
    """
    return {
        "group": group,
        "branch": branch,
        "scales": list(spec.guidance.scales) if spec.guidance.num_branches > 1 else [1.0],
        "sampling": asdict(spec.sampling),
        "seed": spec.rng.initial_seed(),
        "vocabulary": [vocabulary.text_size, vocabulary.image_start, vocabulary.image_size],
        "grid": None if spec.grid is None else list(spec.grid),
        "row_end_ids": list(spec.row_end_ids),
        "stop_token_ids": list(spec.stop_token_ids),
        "context_ids": sorted(spec.context_ids),
        "forbidden": forbidden if spec.grid is None else [],
        "record_logprobs": spec.record_logprobs,
    }


class LogitsModel:
    """A model whose hidden states are logits already: what generators need of a model in order to sample.

    Args:
        vocabulary: of the model that vLLM runs.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def embed(self, ids: Tensor) -> Tensor:
        """Not there: vLLM embeds ids itself. Raises TypeError."""
        raise TypeError("vLLM embeds ids itself")

    def logits(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Logits of the ids from start to stop.

        Args:
            hidden: logits (..., V).
            start: first id.
            stop: end of the ids; None is V.

        Returns:
            The slice (..., stop - start).
        """
        return hidden[..., start:stop]


class Branch:
    """One row of the batch: a branch of a segment.

    Args:
        payload: what `serialize_segment` returned.
        ids: of the segment so far; vLLM appends to this list.

    Raises:
        ValueError: for bad arguments; LookupError, TypeError and AttributeError are raised, too.
    """

    def __init__(self, payload: dict[str, Any], ids: list[int]) -> None:
        self.ids = ids
        self.group, self.branch = str(payload["group"]), int(payload["branch"])
        guidance = Guidance(tuple(payload["scales"]))
        self.num_branches = guidance.num_branches
        if not guidance.scales or not 0 <= self.branch < self.num_branches:
            raise ValueError(f"branch {self.branch} of {self.num_branches}, scales {guidance.scales}")
        text_size, first, image_size = (int(n) for n in payload["vocabulary"])
        self.vocabulary = Vocabulary(text_size, image_size, first)
        self.forbidden_ids = [int(id) for id in payload["forbidden"]]
        grid = payload["grid"]
        self.spec = SegmentSpec(
            begin_id=0,
            sampling=SamplingOptions(**payload["sampling"]),
            guidance=guidance,
            rng=torch.Generator(),
            grid=None if grid is None else (int(grid[0]), int(grid[1])),
            row_end_ids=tuple(payload["row_end_ids"]),
            stop_token_ids=tuple(payload["stop_token_ids"]),
            context_ids=frozenset(payload.get("context_ids", ())),
            record_logprobs=bool(payload.get("record_logprobs", False)),
        )
        self.seed = int(payload["seed"])
        self.spec.rng.manual_seed(self.seed)
        self._num_draws = 0

    def forced_id(self) -> int | None:
        """The next id where it is not sampled: what stands between the rows of an image. None where it is sampled."""
        if self.spec.grid is None:
            return None
        width = self.spec.grid[1]
        column = len(self.ids) % (width + len(self.spec.row_end_ids))
        return None if column < width else self.spec.row_end_ids[column - width]

    def state(self) -> GenerationState:
        """The segment with its randomness at the next id, however often that was sampled before."""
        draws = len(self.ids)
        if self.spec.grid is not None:
            width = self.spec.grid[1]
            row, column = divmod(draws, width + len(self.spec.row_end_ids))
            draws = row * width + column
        if draws < self._num_draws:
            self.spec.rng.manual_seed(self.seed)
            self._num_draws = 0
        scores_1V = torch.zeros(1, self.vocabulary.text_size if self.spec.grid is None else self.vocabulary.image_size)
        for _ in range(self._num_draws, draws):
            sample(scores_1V, self.spec.sampling, [self.spec.rng])
        self._num_draws = draws + 1
        return GenerationState(self.spec, pending_ids=[], ids=list(self.ids))


class GuidedSampler(LogitsProcessor):
    """A logits processor that samples the ids of segments, and leaves one finite logit in each row.

    That logit is the log-probability of the id under the distribution from which it was sampled, where the segment
    records it, else 0. vLLM hands it back (`logprobs_mode="processed_logits"`). vLLM passes its own arguments.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.rows: dict[int, Branch] = {}

    @classmethod
    def validate_params(cls, params: SamplingParams) -> None:
        """Check a request.

        Args:
            params: vLLM's `SamplingParams`.

        Raises:
            ValueError: in one line, for a segment that cannot be sampled.
        """
        payload = (params.extra_args or {}).get(EXTRA_ARGS_KEY)
        if payload is None:
            return
        try:
            Branch(payload, [])
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"extra_args[{EXTRA_ARGS_KEY!r}] is no segment: {type(error).__name__}: {error}"
            ) from error
        has_default_sampling = (
            params.temperature == 0 and params.repetition_penalty == 1 and not params.allowed_token_ids
        )
        if not has_default_sampling or params.presence_penalty or params.frequency_penalty:
            raise ValueError(
                "a segment is sampled by its own options: leave vLLM's at temperature 0, without penalties"
            )

    def is_argmax_invariant(self) -> bool:
        """False: the processor changes which id has the largest logit."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the rows of vLLM's batch.

        Args:
            batch_update: vLLM's `BatchUpdate`; None where nothing has changed.
        """
        process_dict_updates(
            self.rows,
            batch_update,
            lambda params, _, ids: (
                Branch(params.extra_args[EXTRA_ARGS_KEY], ids) if EXTRA_ARGS_KEY in (params.extra_args or {}) else None
            ),
        )

    def apply(self, logits_RV: Tensor) -> Tensor:
        """Sample the ids of all spans whose branches are all in the batch and have equally many ids. Other rows stay
        as they are: `GuidedScheduler` drops what they choose.

        Args:
            logits_RV: logits of vLLM's batch, changed in place.

        Returns:
            The same tensor.
        """
        groups: dict[str, dict[int, int]] = {}
        for row, branch in self.rows.items():
            groups.setdefault(branch.group, {})[branch.branch] = row
        groups_by_kind: dict[tuple[Vocabulary, bool, tuple[int, ...]], list[list[int]]] = {}
        for branches in groups.values():
            rows = [branches[number] for number in sorted(branches)]
            first = self.rows[rows[0]]
            if len(rows) != first.num_branches or any(len(self.rows[row].ids) != len(first.ids) for row in rows):
                continue
            if (id := first.forced_id()) is not None:
                force_id(logits_RV, rows, id)
                continue
            kind = (first.vocabulary, first.spec.grid is None, tuple(first.forbidden_ids))
            groups_by_kind.setdefault(kind, []).append(rows)
        for (vocabulary, is_text, forbidden), row_groups in groups_by_kind.items():
            generator = Text(list(forbidden)) if is_text else NextToken((0, 0))
            states = [self.rows[rows[0]].state() for rows in row_groups]
            generator.step(
                LogitsModel(vocabulary), states, [[logits_RV[row, None] for row in rows] for rows in row_groups]
            )
            for rows, state in zip(row_groups, states, strict=True):
                id = state.pending_ids[0] if state.finite else non_finite_id(vocabulary, is_text)
                force_id(logits_RV, rows, id, state.logprobs[-1] if state.logprobs else 0.0)
        return logits_RV


def non_finite_id(vocabulary: Vocabulary, is_text: bool) -> int:
    """The id that stands for scores that are not finite.

    Args:
        vocabulary: of the model.
        is_text: whether the segment is a text.

    Returns:
        A code in a text; in an image an id that is no code.
    """
    return vocabulary.image_start if is_text else 0 if vocabulary.image_start > 0 else vocabulary.image_stop


def force_id(logits_RV: Tensor, rows: list[int], id: int, logit: float = 0.0) -> None:
    """Leave one id finite in some rows.

    Args:
        logits_RV: logits, changed in place.
        rows: indices of the rows.
        id: the id.
        logit: its logit.
    """
    logits_RV[rows] = -torch.inf
    logits_RV[rows, id] = logit


class GuidedScheduler(Scheduler):
    """vLLM's scheduler, with the branches of a segment in step: they are let in, preempted and ended together.

    An id that some branches generated without the others, or that is not the same for all, is dropped and generated
    again. vLLM passes its own arguments.
    """

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)
        self.waiting: RequestQueue
        if self.scheduler_config.async_scheduling or self.vllm_config.speculative_config or self.connector is not None:
            raise ValueError("guided spans need vLLM without async scheduling, speculation and KV connectors")
        self.groups: dict[str, dict[int, str]] = {}
        """By segment of several branches: the request of each branch."""
        self.group_by_request: dict[str, str] = {}
        self.group_size: dict[str, int] = {}
        self.num_dropped_ids = self.num_sibling_preemptions = 0

    def add_request(self, request: Request) -> None:
        """Queue a request, and note its segment where that has several branches.

        Args:
            request: a request of vLLM's.
        """
        payload = ((request.sampling_params.extra_args or {}) if request.sampling_params else {}).get(EXTRA_ARGS_KEY)
        if payload is not None and request.request_id not in self.requests and len(payload["scales"]) > 0:
            branches = Guidance(tuple(payload["scales"])).num_branches
            if branches > 1:
                self.groups.setdefault(payload["group"], {})[int(payload["branch"])] = request.request_id
                self.group_by_request[request.request_id] = payload["group"]
                self.group_size[payload["group"]] = branches
        super().add_request(request)

    def _sibling_ids(self, request_id: str) -> list[str]:
        """The requests of the other branches of its segment."""
        group = self.groups.get(self.group_by_request.get(request_id, ""), {})
        return [sibling_id for sibling_id in group.values() if sibling_id != request_id]

    def schedule(self, *args: object, **options: object) -> SchedulerOutput:
        """Schedule a step: vLLM's own, with only those requests waiting whose branches can all begin.

        Args:
            args: of vLLM's method.
            options: of vLLM's method.

        Returns:
            vLLM's `SchedulerOutput`.
        """
        if not self.groups:
            return super().schedule(*args, **options)
        preempted_ids = self._preempt_siblings()
        waiting_queue = self.waiting
        self.waiting = create_request_queue(self.policy)
        admitted = self._admissible_requests(list(waiting_queue), preempted_ids)
        for request in admitted:
            self.waiting.add_request(request)
        waiting_queue.remove_requests(admitted)
        try:
            return super().schedule(*args, **options)
        finally:
            for request in reversed(list(self.waiting)):  # `prepend_requests` would reverse their order
                waiting_queue.prepend_request(request)
            self.waiting = waiting_queue

    def _preempt_siblings(self) -> set[str]:
        """Preempt running requests of which another branch was preempted. Returns all of both, which wait in this
        step."""
        preempted_ids: set[str] = set()
        for group in self.groups.values():
            requests = [self.requests[id] for id in group.values() if id in self.requests]
            if not any(request.status == RequestStatus.PREEMPTED for request in requests):
                continue
            for request in requests:
                if request.status == RequestStatus.RUNNING:
                    self.running.remove(request)
                    self._preempt_request(request, time.monotonic())
                    self.num_sibling_preemptions += 1
                    preempted_ids.update(group.values())
        return preempted_ids

    def _admissible_requests(self, waiting: list[Request], preempted_ids: set[str]) -> list[Request]:
        """The requests that may begin now: first come, first served, and all branches of a segment or none."""
        by_id = {request.request_id: request for request in waiting}
        room = self.max_num_running_reqs - len(self.running)
        admitted: dict[str, Request] = {}
        for request in waiting:
            name = request.request_id
            if name in admitted:
                continue
            group = [request]
            if name in self.group_by_request:
                siblings = [
                    self.requests[sibling_id] for sibling_id in self._sibling_ids(name) if sibling_id in self.requests
                ]
                if name in preempted_ids or 1 + len(siblings) < self.group_size[self.group_by_request[name]]:
                    continue
                group_requests = [request, *siblings]
                max_tokens = min(
                    min(member.max_tokens, self.max_model_len - member.num_prompt_tokens) for member in group_requests
                )
                for member in group_requests:  # all end in the same step
                    member.max_tokens = max_tokens
                group += [member for member in siblings if member.request_id in by_id]
            if len(group) > room:
                break
            admitted.update((member.request_id, member) for member in group)
            room -= len(group)
        return list(admitted.values())

    def update_from_output(
        self, scheduler_output: SchedulerOutput, output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Drop the ids that the branches of a segment do not share, then update the requests as vLLM does.

        Args:
            scheduler_output: vLLM's `SchedulerOutput`.
            output: vLLM's `ModelRunnerOutput`.

        Returns:
            vLLM's outputs, by client.
        """
        sampled_ids, row = output.sampled_token_ids, output.req_id_to_index
        for group in self.groups.values() if sampled_ids else ():
            scheduled = [
                id for id in group.values() if id in scheduler_output.num_scheduled_tokens and sampled_ids[row[id]]
            ]
            if len(scheduled) == len(group) and all(
                sampled_ids[row[id]] == sampled_ids[row[scheduled[0]]] for id in scheduled
            ):
                continue
            for id in scheduled:
                request = self.requests.get(id)
                if request is not None and not request.is_finished() and request.status == RequestStatus.RUNNING:
                    sampled_ids[row[id]] = []
                    request.num_computed_tokens -= 1  # its last position is computed again
                    self.num_dropped_ids += 1
        result = super().update_from_output(scheduler_output, output)
        self._remove_broken_groups()
        return result

    def finish_requests(self, request_ids: str | Iterable[str] | None, *args: object, **options: object) -> object:
        """End requests, and with each the other branches of its segment.

        Args:
            request_ids: one id, several, or None for all.
            args: of vLLM's method.
            options: of vLLM's method.

        Returns:
            What vLLM's method returns.
        """
        if request_ids is not None:
            requested_ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
            request_ids = {
                *requested_ids,
                *(
                    sibling_id
                    for id in requested_ids
                    for sibling_id in self._sibling_ids(id)
                    if sibling_id in self.requests
                ),
            }
        result = super().finish_requests(request_ids, *args, **options)
        self._remove_broken_groups()
        return result

    def _remove_broken_groups(self) -> None:
        """Forget spans of which a branch is gone: the other branches would wait for it for ever."""
        for name, group in list(self.groups.items()):
            if any(id not in self.requests for id in group.values()):
                for id in group.values():
                    self.group_by_request.pop(id, None)
                del self.groups[name], self.group_size[name]
