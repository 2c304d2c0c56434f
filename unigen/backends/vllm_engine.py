"""The engine on vLLM: an `Engine` whose backbone runs in vLLM.

    engine = unigen.load("unigen-tiny", engine="vllm")
    image = engine.generate("two apples on a blue background", seed=0)

Every segment is one request of vLLM's for each branch of guidance. The next segment of an answer is another request, whose
prefix is in vLLM's prefix cache. Ids are sampled in vLLM by `unigen.backends.vllm_guidance`, as the local engine
samples
them: the same seed gives the same answer, whatever else runs. Images of other generators than next-token are not
generated in vLLM but by the model in this process, from the document so far, as in the local engine; only a model that
has such generators is kept here beside vLLM's. vLLM runs in this process, unless VLLM_ENABLE_V1_MULTIPROCESSING=1;
scripts/install_serve.sh makes an environment with it.
Does not depend on: how ids are sampled, HTTP, chat templates.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unigen.batch import Vocabulary
from unigen.document import Document, Prompt
from unigen.generators.options.acceleration import Acceleration
from unigen.hub.resolve import CONFIG, read_json
from unigen.inference.base import check_record
from unigen.inference.candidates import PreparedRequest
from unigen.inference.engine import Engine
from unigen.inference.protocol import EngineInfo, OptionValue
from unigen.inference.request import Request
from unigen.inference.results import Record, Score
from unigen.inference.scheduler import Part, Scheduler
from unigen.inference.sequence import SequenceState
from unigen.model.inputs import PromptSpan
from unigen.model.template import Output, UnsupportedError
from unigen.model.unified import UnifiedModel

if TYPE_CHECKING:
    from vllm import RequestOutput
    from vllm.v1.engine.llm_engine import LLMEngine

ENGINE_ARGS: dict[str, object] = {
    "logits_processors": ["unigen.backends.vllm_guidance:GuidedSampler"],
    "scheduler_cls": "unigen.backends.vllm_guidance.GuidedScheduler",
    "skip_tokenizer_init": True,
    "async_scheduling": False,
}
"""Arguments of vLLM's engine that guidance needs."""
VLLM_GENERATORS = ("text", "next-token")
"""The generators whose spans vLLM writes."""


def load(
    name: str, device: str, dtype: torch.dtype | None = None, options: dict[str, object] | None = None
) -> VllmEngine:
    """Load the engine on vLLM.

    Args:
        name: a model's name or folder, laid out for vLLM.
        device: of the image tokenizer; vLLM chooses its own.
        dtype: of the weights; None is as stored.
        options: of vLLM's EngineArgs.

    Returns:
        The engine.

    Raises:
        ValueError: in one line, where vLLM is missing or cannot serve the model.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ValueError("vLLM is not installed here: run scripts/install_serve.sh, which makes .venv-serve with it")
    from unigen.backends.diffusers_loading import is_pipeline
    from unigen.models import causal_lm, load_resolved, resolve_model
    from unigen.nn.cpu.linear import pack_linears

    folder, variant = resolve_model(name)
    if is_pipeline(folder):
        raise ValueError(f"vLLM cannot serve {name}: it is a diffusers pipeline")
    model = load_resolved(folder, variant, device, dtype)
    kind = type(causal_lm(model)).__name__
    if read_json(folder / CONFIG).get("architectures") != [kind]:
        raise ValueError(f"{name} is not laid out for vLLM: give what unigen convert {name} --to vllm -o FOLDER writes")
    pack_linears(model.backbone)
    return VllmEngine(model, folder, options or {})


def set_environment(processes: int = 1) -> None:
    """Set the environment variables that vLLM reads, where they are not set: to run in this process, and on a CPU.

    Args:
        processes: among how many vLLM splits the model; each gets its share of the cores.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    shares = [",".join(map(str, cores[first::processes] or cores)) for first in range(processes)]
    for variable, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # version 2 takes no logits processor of this kind
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork would keep the pipes of its parent open
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; else vLLM asks for nearly all memory
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(shares) if cores else "auto",  # "auto" leaves one core out
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }.items():
        os.environ.setdefault(variable, value)


def create_llm_engine(
    folder: Path, dtype: torch.dtype, context: int, options: dict[str, object], features: bool = False
) -> LLMEngine:
    """Create vLLM's engine for a folder.

    Args:
        folder: of the model, laid out as a plain causal language model.
        dtype: of the weights.
        context: positions of a sequence, at most, where the options do not say.
        options: of vLLM's EngineArgs.
        features: whether the model reads images as vectors instead of ids.

    Returns:
        vLLM's `LLMEngine`.

    Raises:
        ValueError: in one line, for options that vLLM refuses.
    """
    parallel = [options.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline")]
    set_environment(
        math.prod(n if isinstance(n, int) and n > 0 else 1 for n in parallel)
    )  # vLLM says what is wrong with them
    from pydantic import ValidationError
    from vllm.engine.arg_utils import EngineArgs
    from vllm.exceptions import VLLMError
    from vllm.platforms import current_platform
    from vllm.v1.engine.llm_engine import LLMEngine

    from unigen.backends.vllm_models import register

    register()
    fixed_args = ENGINE_ARGS | {"model": str(folder), "dtype": str(dtype).removeprefix("torch.")}
    fixed_args |= {"enable_prompt_embeds": True} if features else {}
    default_args: dict[str, object] = {
        "max_model_len": context,
        "enable_prefix_caching": True,
        "use_tqdm_on_load": False,
    }
    if current_platform.is_cpu():
        default_args["block_size"] = 32  # else 128; the prefix cache has only whole blocks
    if unknown := sorted(set(options) - {field.name for field in fields(EngineArgs)}):
        raise ValueError(f"vLLM's engine has no argument {', '.join(unknown)}: vllm.EngineArgs lists those it has")
    if conflicting_args := sorted(set(options) & set(fixed_args)):
        raise ValueError(f"{', '.join(conflicting_args)} of vLLM's engine is given by us: leave it out")
    try:
        return LLMEngine.from_engine_args(EngineArgs(**default_args | options | fixed_args))
    except (ValueError, TypeError, VLLMError) as error:
        error_messages = (
            [entry["msg"] for entry in error.errors()] if isinstance(error, ValidationError) else [str(error)]
        )
        raise ValueError(f"vLLM cannot serve {folder}: {'; '.join(error_messages)}") from error


@dataclass
class _SubmittedSegment:
    """A segment of a sequence, as requests of vLLM's."""

    names: list[str]
    """Ids of the requests, one for each branch of guidance; none where the segment is written by the model here."""
    prompts: list[list[int]]
    """Ids that each branch reads."""
    ids: list[int] = field(default_factory=list)
    """Ids that have been generated."""


class VllmEngine(Engine):
    """An engine whose language model runs in vLLM. Not safe to share between threads.

    Args:
        model: its image tokenizer, template and generators.
        folder: of the model, laid out as a plain causal language model.
        options: of vLLM's EngineArgs.
    """

    def __init__(self, model: UnifiedModel, folder: Path, options: dict[str, object]) -> None:
        super().__init__(model)
        self.local = any(name not in VLLM_GENERATORS for name in model.generators)
        """Whether the language model stays in this process, too."""
        self._info = super().info()
        self.dtype = next(model.backbone.parameters()).dtype
        for weight in () if self.local else model.backbone.parameters():  # vLLM has its own
            weight.data = weight.new_empty(0)
        self.llm = create_llm_engine(
            folder, self.dtype, model.max_length, options, features=model.vision_encoder is not None
        )
        vllm = self.llm.vllm_config
        # the context is vLLM's now, which may be shorter than the model's
        model.backbone.lm.config.get_text_config().max_position_embeddings = vllm.model_config.max_model_len
        self.block: int = vllm.cache_config.block_size
        self.blocks: int = vllm.cache_config.num_gpu_blocks - 1  # one is vLLM's own
        self.most: int = vllm.scheduler_config.max_num_seqs
        self._names = itertools.count()
        self._heard: dict[str, list[RequestOutput]] = {}

    def close(self) -> None:
        """Free vLLM's memory."""
        self.llm.engine_core.shutdown()

    def info(self) -> EngineInfo:
        """See `InferenceEngine.info`."""
        from vllm import __version__

        return {**self._info, "context": self.model.max_length, "engine": f"vllm {__version__}"}

    @property
    def can_rerank(self) -> bool:
        """Whether candidates can be compared: by the model beside vLLM, where there is one."""
        return self.local and super().can_rerank

    def new_scheduler(self) -> VllmScheduler:
        """See `BatchedEngine.new_scheduler`."""
        return VllmScheduler(self)

    def build_request(self, prompt: Prompt, output: Output, **options: OptionValue) -> Request:
        """See `Engine.build_request`. Raises ValueError, too, for what vLLM cannot do."""
        request = super().build_request(prompt, output, **options)
        if request.options[Acceleration].accelerate:
            raise ValueError("vLLM writes one code a step: leave accelerate out, or use --engine local")
        return request

    def prepare(self, prompt: Prompt, output: Output, *, candidates: int = 1, **options: Any) -> PreparedRequest:
        """See `BatchedEngine.prepare`. Candidates are compared by the model beside vLLM, where there is one."""
        if candidates != 1 and not self.local:
            raise UnsupportedError("candidates are compared by the local engine: leave them out, or use --engine local")
        check_record(options.get("record", Record()), Record(), "use --engine local")
        return super().prepare(prompt, output, candidates=candidates, **options)

    def score(self, documents: Sequence[Document], *, per_token: bool = False) -> list[Score]:
        """See `InferenceEngine.score`: by the model beside vLLM, where there is one."""
        if not self.local:
            raise UnsupportedError("documents are scored by the local engine: use --engine local")
        return super().score(documents, per_token=per_token)

    def hidden_states(self, prompt: Prompt) -> torch.Tensor:
        """See `InferenceEngine.hidden_states`: by the model beside vLLM, where there is one."""
        if not self.local:
            raise UnsupportedError("vLLM does not tell its hidden states: use --engine local")
        return super().hidden_states(prompt)

    def send(self, row: SequenceState, before: list[int]) -> _SubmittedSegment:
        """Submit a sequence's current segment to vLLM.

        Args:
            row: the sequence. Where its segment is written by the model here, its main branch is set to read all of
                `before` again.
            before: ids that the main branch has read.

        Returns:
            The submitted requests; none where the segment is written here.

        Raises:
            ValueError: in one line, where vLLM refuses a request.
        """
        if not is_vllm_segment(row):
            assert row.generator is not None and not row.generator.cache_reusable
            row.pending_ids[0] = before + row.pending_ids[0]
            return _SubmittedSegment([], [row.pending_ids[0]])
        from vllm import SamplingParams
        from vllm.exceptions import VLLMError
        from vllm.sampling_params import RequestOutputKind

        from unigen.backends.vllm_guidance import EXTRA_ARGS_KEY, serialize_segment

        assert row.state is not None
        spec, vocabulary, group = row.state.spec, self.model.vocabulary, f"span{next(self._names)}"
        forbidden = list(self.model.generators["text"].forbidden_ids)
        is_image = spec.grid is not None  # an image comes when it is finished, text as it is generated
        segment = _SubmittedSegment([], branch_prompts(row, before))
        for branch, prompt in enumerate(segment.prompts):
            params = SamplingParams(
                temperature=0.0,
                max_tokens=max_segment_tokens(row),
                stop_token_ids=list(spec.stop_token_ids),
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY if is_image else RequestOutputKind.DELTA,
                extra_args={EXTRA_ARGS_KEY: serialize_segment(spec, vocabulary, forbidden, group, branch)},
            )
            name = f"{group}-{branch}"
            try:
                self.llm.add_request(name, self._to_vllm_prompt(prompt, row.prompt_spans[branch]), params)
            except VLLMError as error:
                self.stop(segment)
                raise ValueError(f"vLLM refuses what is asked: {error}") from error
            self._heard[name] = []
            segment.names.append(name)
        return segment

    def _to_vllm_prompt(self, prompt: list[int], spans: Sequence[PromptSpan]) -> object:
        """A branch's prompt in vLLM's form: ids, and embeddings where spans have features."""
        from vllm.inputs.engine import embeds_input, tokens_input

        if not spans:
            return tokens_input(prompt)
        width = spans[0].features_PD.shape[1]
        embeds_LD = torch.zeros(len(prompt), width, dtype=self.dtype)
        is_token_id = [True] * len(prompt)
        for span in spans:
            embeds_LD[span.start : span.stop] = span.features_PD.to(embeds_LD)
            is_token_id[span.start : span.stop] = [False] * (span.stop - span.start)
        return embeds_input(embeds_LD, prompt_token_ids=prompt, is_token_ids=is_token_id)

    def stop(self, sent: _SubmittedSegment) -> None:
        """Abort the requests of a segment.

        Args:
            sent: the segment.
        """
        self.llm.abort_request(sent.names)
        for name in sent.names:
            self._heard.pop(name, None)

    def listen(self, names: list[str]) -> Iterator[tuple[str, RequestOutput]]:
        """The outputs of requests, after one step of vLLM where there are none yet.

        Args:
            names: ids of requests.

        Returns:
            Pairs of a request's id and an output of vLLM's, in the order of `names`.
        """
        if not any(self._heard[name] for name in names):
            for output in self.llm.step():
                if output.request_id in self._heard:
                    self._heard[output.request_id].append(output)
        for name in names:
            while self._heard[name]:
                yield name, self._heard[name].pop(0)


class VllmScheduler(Scheduler):
    """Runs requests whose spans vLLM batches itself. `cache` holds the spans that are written by the model here, and
    nothing between two spans.

    Args:
        engine: the engine on vLLM.
    """

    def __init__(self, engine: VllmEngine) -> None:
        super().__init__(engine.model)
        self.engine = engine
        self._submitted_segments: dict[int, _SubmittedSegment] = {}

    @property
    def num_cached_tokens(self) -> int:
        """Positions in the cache here and of all running spans in vLLM; a prefix that branches share counts for
        each."""
        submitted = (segment for segment in self._submitted_segments.values() if segment.names)
        return super().num_cached_tokens + sum(
            len(prompt) + len(segment.ids) for segment in submitted for prompt in segment.prompts
        )

    def new_sequence(self, request: Request) -> SequenceState:
        """See `Scheduler.new_sequence`. Raises ValueError, too, for what vLLM's batch or cache cannot hold."""
        row, engine = super().new_sequence(request), self.engine
        if not is_vllm_segment(row):
            return row
        branches = (
            request.guidance.num_branches if request.output != "text" and request.generator in VLLM_GENERATORS else 1
        )
        if branches > engine.most:
            raise ValueError(f"guidance takes {branches} sequences, vLLM runs {engine.most}: raise max_num_seqs")
        if request.output == "interleaved":
            lengths = [self.model.max_length] * branches
        else:
            lengths = [len(prompt) + max_segment_tokens(row) for prompt in branch_prompts(row, [])]
        if max(lengths) > self.model.max_length:
            raise ValueError(f"the answer needs {max(lengths)} positions, vLLM has {self.model.max_length}: shorten it")
        if (need := sum(-(-length // engine.block) for length in lengths)) > engine.blocks:
            have = f"vLLM's cache has {engine.blocks * engine.block}: give it more (VLLM_CPU_KVCACHE_SPACE in GiB)"
            raise ValueError(f"the answer's {branches} branches take {need * engine.block} positions, {have}")
        return row

    def add_sequence(self, row: SequenceState) -> int:
        """See `Scheduler.add_sequence`."""
        segment = self.engine.send(row, [])
        number = super().add_sequence(row)
        self._submitted_segments[number] = segment
        return number

    def abort(self, number: int) -> None:
        """See `Scheduler.abort`."""
        super().abort(number)
        self.engine.stop(self._submitted_segments.pop(number))

    @torch.inference_mode()
    def step(self) -> list[tuple[int, Part]]:
        """One step of vLLM for all spans that it writes, and one here for the others.

        Returns:
            Pairs of a sequence's number and a piece of text or an image.
        """
        updated_sequences = {
            number: self._sequences[number] for number, segment in self._submitted_segments.items() if not segment.names
        }
        if updated_sequences:
            self._step_all(list(updated_sequences.values()))
        # all branches have the same ids: the first stands for them
        number_of = {segment.names[0]: number for number, segment in self._submitted_segments.items() if segment.names}
        for name, output in self.engine.listen(list(number_of)) if number_of else ():
            number = number_of[name]
            updated_sequences[number], segment = self._sequences[number], self._submitted_segments[number]
            segment.ids += output.outputs[0].token_ids
            apply_output(updated_sequences[number], segment.ids, self.model.vocabulary)
        finished_sequences = {
            number: row for number, row in updated_sequences.items() if row.state and row.state.finished
        }
        # a segment has read all but its last id, with which the next one begins, or which has ended it; one that was
        # written here is taken back
        prefix_ids = {
            number: self._submitted_segments[number].prompts[0] + self._submitted_segments[number].ids[:-1]
            for number in finished_sequences
        }
        parts = self._postprocess(list(updated_sequences.values()))
        for number, row in finished_sequences.items():
            if number in self:
                self.engine.stop(self._submitted_segments[number])
                self._resize_slots(row, 0)
                self._submitted_segments[number] = self.engine.send(row, prefix_ids[number])
        return parts


def is_vllm_segment(row: SequenceState) -> bool:
    """Whether vLLM writes the sequence's current segment."""
    assert row.generator is not None
    return row.generator.name in VLLM_GENERATORS


def branch_prompts(row: SequenceState, before: list[int]) -> list[list[int]]:
    """The ids that each branch of a sequence's segment reads before it writes.

    Args:
        row: the sequence.
        before: ids that the main branch has read already.

    Returns:
        One list a branch, the main one first.
    """
    assert row.state is not None
    main, *others = [unread + row.state.pending_ids for unread in row.pending_ids]
    return [before + main, *others]


def max_segment_tokens(row: SequenceState) -> int:
    """How many ids a sequence's segment may have: all ids of an image but for the end of its last row."""
    assert row.state is not None
    spec = row.state.spec
    if spec.grid is None:
        return spec.max_tokens
    return spec.grid[0] * (spec.grid[1] + len(spec.row_end_ids)) - len(spec.row_end_ids)


def apply_output(row: SequenceState, ids: list[int], vocabulary: Vocabulary) -> None:
    """Store the ids that vLLM has generated in the state of a sequence's spec. An image comes as a whole. An id that
    cannot be there means that the scores were not finite (`vllm_guidance.non_finite_id`).

    Args:
        row: the sequence.
        ids: of the segment so far.
        vocabulary: of the model.

    Raises:
        RuntimeError: where an image is not whole.
    """
    state = row.state
    assert state is not None
    spec = state.spec
    if spec.grid is None:
        has_stop_id = bool(ids) and ids[-1] in spec.stop_token_ids
        state.ids, state.pending_ids = ids[: len(ids) - has_stop_id], ids[-1:]
        state.finished = has_stop_id or len(ids) >= spec.max_tokens
        state.finite = not any(vocabulary.image_start <= id < vocabulary.image_stop for id in state.ids)
        return
    if len(ids) != max_segment_tokens(row):
        raise RuntimeError(f"vLLM ended a picture after {len(ids)} of {max_segment_tokens(row)} ids")
    width = spec.grid[1]
    state.ids = [id for index, id in enumerate(ids) if index % (width + len(spec.row_end_ids)) < width]
    state.pending_ids, state.finished = [ids[-1], *spec.row_end_ids], True
    state.finite = all(vocabulary.image_start <= id < vocabulary.image_stop for id in state.ids)
