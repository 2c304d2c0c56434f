"""Segments of an answer: how a sequence starts, what it generates next, and the pieces of it that can be streamed.

Every segment has its own random generator, seeded by the request's seed and the segment's number. Does not depend on:
batching, how any generator works.
"""

from __future__ import annotations

import torch
from PIL import Image

from unigen.document import Document, Preview, Segment
from unigen.generators.base import GenerationState, Generator, SegmentSpec
from unigen.generators.options.inpainting import Inpainting
from unigen.inference.request import Request
from unigen.inference.sequence import SequenceState, record_segment
from unigen.media.pixels import to_images
from unigen.model.template import IMAGE_OUTPUTS
from unigen.model.unified import UnifiedModel
from unigen.nn.cache import SlotCache
from unigen.samplers.guidance import Guidance
from unigen.samplers.seeds import make_rng

MAX_CHARS_PER_POSITION = 16
"""Characters for each position of the context, above which a text is rejected before it is tokenized: real text has
fewer."""


def new_sequence(model: UnifiedModel, request: Request) -> SequenceState:
    """Build a sequence for a request and start its first segment.

    Args:
        model: the model that answers.
        request: a validated request; its document's images become codes.

    Raises:
        ValueError: the prompt and the answer do not fit the context.
    """
    _check_length(model, request.document)
    request.document = model.encode_document(request.document)
    sequence = SequenceState(request, request.document)
    uncond = request.output == "joint" and not _prefix_text_ids(model, sequence)
    tokens = model.template.prompt(sequence.document, output=request.output, branch=uncond)
    prompt = model.prompt_ids(tokens)
    sequence.image_prompt_tokens = sum(stop - start for start, stop in tokens.spans)
    num_positions = 1 if request.output == "text" else _image_length(model, request)
    sequence.pending_ids, sequence.prompt_spans = [prompt.ids], [prompt.spans]
    sequence.prompt_tokens, sequence.context_ids = len(prompt.ids), prompt.vocabulary_ids()
    if request.output in IMAGE_OUTPUTS:
        _start_image(model, sequence)
    num_positions += max(len(branch) for branch in sequence.pending_ids)
    if num_positions > model.max_length:
        raise ValueError(f"the prompt needs {num_positions} positions, the model has {model.max_length}: shorten it")
    if request.output not in IMAGE_OUTPUTS:
        _start_text(model, sequence, sequence.pending_ids[0].pop())
    return sequence


def start_next_segment(model: UnifiedModel, sequence: SequenceState, cache: SlotCache) -> None:
    """Start the next segment of a sequence whose segment has ended, or leave the sequence done.

    An image that the cache does not hold as later segments read it is removed from the cache and read again.

    Args:
        model: the model that answers.
        sequence: changed in place.
        cache: holds the sequence's slots.
    """
    state, request = sequence.state, sequence.request
    assert state is not None
    if sequence.generator is not model.generators.get("text"):
        sequence.num_images += 1
        if request.output == "interleaved":
            _read_back_image(model, sequence, cache)
            _start_text(model, sequence, sequence.pending_ids[0].pop())
        return
    record_segment(sequence, state)
    if state.ids:
        text = model.template.decode(state.ids)
        sequence.document.segments.append(Segment(text=text, role="assistant"))
        sequence.num_text_tokens += len(state.ids)
        sequence.context_ids.update(state.ids)
    sequence.truncated = not state.pending_ids or state.pending_ids[0] not in state.spec.stop_token_ids
    if state.pending_ids and state.pending_ids[0] in _image_begin_ids(model):
        sequence.pending_ids = [[]]
        _start_image(model, sequence)


def text_delta(model: UnifiedModel, sequence: SequenceState) -> str:
    """The new text of a sequence since the last call. An unfinished character waits for its last byte.

    Args:
        model: decodes ids.
        sequence: one that writes text; its `streamed_text` is updated.
    """
    assert sequence.state is not None
    text = model.template.decode(sequence.state.ids)
    if text.endswith("\N{REPLACEMENT CHARACTER}") and not sequence.state.finished:
        return ""
    delta = text[len(sequence.streamed_text) :]
    sequence.streamed_text = text
    return delta


def joint_text(model: UnifiedModel, sequence: SequenceState) -> str:
    """The text of a finished segment of a text and an image, up to the end of turn.

    Args:
        model: decodes ids.
        sequence: one whose segment is finished.
    """
    assert sequence.state is not None
    ids = sequence.state.text_ids
    ends = [n for n, id in enumerate(ids) if id in model.template.stop_token_ids]
    return model.template.decode(ids[: ends[0]] if ends else ids)


def decode_image(
    model: UnifiedModel, generator: Generator, state: GenerationState
) -> tuple[Image.Image, torch.Tensor | None]:
    """The image of a segment. Images are decoded one by one, since the rounding of a convolution depends on the batch
    size.

    Args:
        model: decodes codes.
        generator: the generator that wrote the segment.
        state: finished, or with `progress`.

    Returns:
        The image, and its codes (h, w) of the model's image tokenizer; None where the generator gives pixels.

    Raises:
        NonFiniteError: pixels are not finite.
    """
    with model.decode_autocast():
        decoded = generator.decode(model, [state])
        if decoded.is_floating_point():
            return to_images(decoded.float())[0], None
        return model.decode_images(decoded)[0], decoded[0]


def next_preview(model: UnifiedModel, sequence: SequenceState) -> Preview | None:
    """A preview of the sequence's image, where the next one is due.

    Args:
        model: decodes codes.
        sequence: one that writes an image; its counts of previews are updated.

    Returns:
        The preview; None where none is due.

    Raises:
        NonFiniteError: pixels are not finite.
    """
    generator, state = sequence.generator, sequence.state
    assert generator is not None and state is not None
    steps_done, steps = state.progress
    milestone = steps_done * (sequence.request.num_previews + 1) // steps
    if state.finished or milestone <= sequence.preview_milestones:
        return None
    sequence.preview_milestones, sequence.num_previews = milestone, sequence.num_previews + 1
    return Preview(decode_image(model, generator, state)[0], sequence.num_images, sequence.num_previews - 1)


def _check_length(model: UnifiedModel, document: Document) -> None:
    """Reject a document that is far too long before its texts are tokenized and its images encoded."""
    if (characters := document.num_characters()) > MAX_CHARS_PER_POSITION * model.max_length:
        raise ValueError(
            f"the prompt has {characters:,} characters, the model reads {model.max_length:,} positions: shorten it"
        )
    pictures, grid = len(document.images()), model.image_tokenizer.grid
    min_tokens = 1 if model.template.variable_size else model.context_reader.num_positions(grid)
    if pictures * min_tokens > model.max_length:
        raise ValueError(
            f"the prompt has {pictures} pictures, the model reads {model.max_length:,} positions: leave some out"
        )


def _image_length(model: UnifiedModel, request: Request) -> int:
    """Number of positions that an image needs, written and read back."""
    layout, generator = model.template.layout(request.grid), model.generators[request.generator]
    has_begin_token = request.generator in model.template.begin_ids
    num_own_ids = 0 if generator.cache_reusable else generator.num_positions() + 2 * has_begin_token
    return max(len(layout) - (not has_begin_token), num_own_ids)


def _image_begin_ids(model: UnifiedModel) -> list[int]:
    """Begin tokens of all generators. After any of them the request's generator generates the image."""
    return [id for name, id in model.template.begin_ids.items() if name in model.generators]


def _next_rng(sequence: SequenceState) -> torch.Generator:
    sequence.num_segments += 1
    request = sequence.request
    candidate = [request.candidate_index] if request.candidate_index else []
    return make_rng(request.seed, *candidate, sequence.num_segments)


def _start_image(model: UnifiedModel, sequence: SequenceState) -> None:
    """Start an image. The main branch continues in its slot. The others read their prompts again, with the images so
    far."""
    request = sequence.request
    others = [
        model.prompt_ids(model.template.prompt(sequence.document, output=request.output, branch=branch))
        for branch in range(1, request.guidance.num_branches)
    ]
    sequence.pending_ids = [sequence.pending_ids[0], *(prompt.ids for prompt in others)]
    sequence.prompt_spans = [sequence.prompt_spans[0], *(prompt.spans for prompt in others)]
    sequence.generator = model.generators[request.generator]
    begin = model.template.begin_ids.get(request.generator)  # None where the prompt opens the image
    layout = model.template.layout(request.grid)
    fixed = request.options[Inpainting].fixed_codes
    if fixed is not None:
        fixed = torch.where(fixed < 0, fixed, model.vocabulary.image_ids(fixed))
    spec = SegmentSpec(
        begin or 0, request.image_sampling, request.guidance, _next_rng(sequence), request.grid, fixed_ids=fixed
    )
    spec.prefix_ids, spec.row_end_ids = () if begin is None else (begin, *layout.prefix), layout.row_end_ids
    spec.options = request.options
    spec.text_ids = _prefix_text_ids(model, sequence)
    spec.record_logprobs, spec.record_trajectory = request.record.logprobs, request.record.trajectory
    sequence.state, sequence.num_cached = sequence.generator.start(spec), 0
    sequence.preview_milestones = sequence.num_previews = 0


def _prefix_text_ids(model: UnifiedModel, sequence: SequenceState) -> list[int] | None:
    """The ids of the text with which an image's segment opens; None where it has none, or is to be generated."""
    template, name = model.template, sequence.request.generator
    if name not in template.text_lengths or not any((s.text or "").strip() for s in sequence.document.segments):
        return None
    return template.prefix_text_ids(sequence.document, name)


def _read_back_image(model: UnifiedModel, sequence: SequenceState, cache: SlotCache) -> None:
    """Let the main branch read a finished image as context, except for positions that are in the cache already."""
    state, template = sequence.state, model.template
    assert state is not None and sequence.generator is not None
    layout = template.layout(sequence.request.grid)
    if sequence.generator.cache_reusable:
        sequence.pending_ids = [list(state.pending_ids)]
    else:
        cache.commit(sequence.slots[:1], [-sequence.num_cached])
        if 0 in sequence.hidden_states:
            num_read = len(sequence.hidden_states[0]) - sequence.num_cached
            sequence.hidden_states[0] = sequence.hidden_states[0][:num_read]
        sequence.request.document = sequence.document = model.encode_document(sequence.document)
        codes_hw = sequence.document.segments[-1].image
        assert isinstance(codes_hw, torch.Tensor), "encode_document gives codes"
        ids_hw = model.vocabulary.image_ids(codes_hw)
        begin = template.begin_ids[template.context_generator]
        sequence.pending_ids = [[begin, *layout.prefix, *layout.to_ids(ids_hw)]]
    sequence.pending_ids[0] += layout.suffix
    sequence.context_ids.update((*state.spec.prompt_ids, *layout.suffix))


def _start_text(model: UnifiedModel, sequence: SequenceState, begin: int) -> None:
    """Start a text. It may end in an image while the answer may have more images and the context has room for one."""
    request, template = sequence.request, model.template
    sequence.streamed_text = ""
    positions_used = len(template.prompt(sequence.document, output=request.output)) + 1
    positions_left = model.max_length - positions_used - 1
    stops = list(template.stop_token_ids)
    image_length = _image_length(model, request) + 1
    may_draw = request.output == "interleaved" and sequence.num_images < request.max_images
    if may_draw and positions_left > image_length:
        stops += _image_begin_ids(model)
        positions_left -= image_length
    limit = max(1, min(request.max_tokens - sequence.num_text_tokens, positions_left))
    sequence.generator = model.generators["text"]
    rng = _next_rng(sequence)
    spec = SegmentSpec(
        begin, request.text_sampling, Guidance((1.0,)), rng, stop_token_ids=tuple(stops), max_tokens=limit
    )
    spec.record_logprobs = request.record.logprobs
    if request.text_sampling.repetition_penalty != 1:
        spec.context_ids = frozenset(sequence.context_ids)
    sequence.state = sequence.generator.start(spec)
