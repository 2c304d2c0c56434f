"""A validated request for one sequence.

    request = build_request(model, "two apples", "image", seed=3, guidance=2.5)
    request.options[CodeSampling].temperature          # of the call, of the model's `sampling`, or as declared

`unigen.inference.options` lists the options. Does not depend on: caches, how anything is generated. Bad input is a
ValueError in one line.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from unigen.diffusion.options import FlowOptions
from unigen.document import Document, Segment, is_codes
from unigen.generators.options.inpainting import Inpainting
from unigen.inference.options import AnswerCount, AnswerLimits, Previews, RequestOptions, local_groups
from unigen.inference.results import Record
from unigen.media.images import is_image
from unigen.model.template import OUTPUTS, Output, split_system_messages
from unigen.model.unified import UnifiedModel
from unigen.options import (
    DRAWING,
    WRITING,
    GroupType,
    OptionGroup,
    OptionSet,
    check_values,
    groups_for,
    merge_declared,
    option_names,
    reject_unknown,
    resolve,
)
from unigen.samplers.guidance import Guidance
from unigen.samplers.logits import SamplingOptions
from unigen.samplers.options import CodeSampling, GuidanceOptions, TextSampling
from unigen.utils.option_types import SEED, Size
from unigen.utils.text import did_you_mean, shorten

GENERAL_GROUPS = (RequestOptions, AnswerLimits, Previews)
"""Groups that every model takes, whatever it is asked for."""
INTERLEAVED_TEMPERATURE = 0.8
"""Of text between pictures."""

Options = OptionGroup | Sequence[OptionGroup]


@dataclass
class Request:
    """One sequence to be generated."""

    document: Document
    "What is answered."
    output: Output
    generator: str
    "Of pictures."
    options: OptionSet
    "Without gaps: what the call says, else the model, else as declared."
    grid: tuple[int, int]
    "Rows and columns of a picture's codes."
    written: list[torch.Tensor | None] = field(default_factory=list)
    "Codes (P,) of each picture that has been made, None where its generator writes the model's own."
    record: Record = Record()
    "What is kept of the generation beside ids and codes."
    candidate_index: int = 0
    "Which of the answers to one request and seed it is, of which the best is kept."

    @property
    def guidance(self) -> Guidance:
        """One scale for each branch of the model but the last."""
        return Guidance.of(self.options[GuidanceOptions].guidance)

    @property
    def seed(self) -> int:
        return self.options[RequestOptions].seed

    @property
    def max_tokens(self) -> int:
        return self.options[AnswerLimits].max_tokens

    @property
    def max_images(self) -> int:
        return self.options[AnswerLimits].max_images

    @property
    def previews(self) -> int:
        return self.options[Previews].previews

    def settings(self) -> dict[str, object]:
        """How the answer is made, as users name it: of what makes pictures and text only where there may be some."""
        values: dict[str, object] = {"seed": self.seed}
        if self.output in WRITING:
            values |= {"text": self.options[TextSampling].reported(), "max_tokens": self.max_tokens}
        if self.output != "text":
            of_pictures = [group for group in self.options if not isinstance(group, (*GENERAL_GROUPS, TextSampling))]
            values["generator"] = self.generator
            values |= {name: value for group in of_pictures for name, value in group.reported().items()}
        return values

    @property
    def image(self) -> SamplingOptions:
        """How codes are drawn."""
        codes = self.options[CodeSampling]
        return SamplingOptions(codes.temperature, codes.top_k, codes.top_p)

    @property
    def text(self) -> SamplingOptions:
        """How ids of text are drawn."""
        return SamplingOptions(**self.options[TextSampling].given())  # type: ignore[arg-type]


def build_request(
    model: UnifiedModel, prompt: Any, output: Output, *, options: Options = (), **keywords: object
) -> Request:
    """Validate what is asked of a model.

    Args:
        model: what answers.
        prompt: as `Document.of` takes it.
        output: what it is asked for.
        options: groups of options; what they leave out is as the model says.
        keywords: options by name. One that several groups have counts in each that suits the output: temperature and
            top_p of an interleaved answer in text and codes, its top_k in codes alone.

    Returns:
        The request, all of its options filled in.
    Raises:
        ValueError: in one line, for what cannot be asked of the model.
    """
    if not isinstance(output, str) or output not in OUTPUTS:
        raise ValueError(f"unknown output {shorten(output)}: one of {', '.join(OUTPUTS)}")
    reject_unknown("a request", keywords, REQUEST_OPTIONS)
    given = check_values(REQUEST_GROUPS, keywords)
    groups = collect_given(options)
    generator = choose_generator(model, output, {**groups.get(RequestOptions, {}), **given})
    reject_unsupported(model, output, generator, given, groups)
    resolved = resolve_options(model, output, generator, given, groups)
    guided = {**groups.get(GuidanceOptions, {}), **groups.get(FlowOptions, {}), **given}
    guidance = resolve_guidance(model, generator, guided, resolved)
    resolved = OptionSet([*resolved, GuidanceOptions(guidance=guidance)])
    if FlowOptions in resolved:
        resolved = OptionSet([*resolved, replace(resolved[FlowOptions], guider=guidance.guider)])
    check_fixed_codes(model, resolved[Inpainting].fixed_codes)
    document = prepare_document(model, prompt, output, generator)
    size = resolved[RequestOptions].size
    grid = code_grid(model, document.size if size is None else size)
    if model.template.variable_size:
        stride = model.image_tokenizer.image_size // model.image_tokenizer.grid[0]
        document.size = (grid[1] * stride, grid[0] * stride)
    return Request(document, output, generator, resolved, grid)


REQUEST_GROUPS = tuple(group for group in groups_for(local_groups(), *DRAWING, *WRITING) if group is not AnswerCount)
REQUEST_OPTIONS = option_names(REQUEST_GROUPS)
"""The names of a request's options."""

Given = Mapping[str, object]


def collect_given(options: Options) -> dict[GroupType, Given]:
    """The values of groups, by their types. Raises ValueError for what is no group."""
    groups = [options] if isinstance(options, OptionGroup) else options
    if not isinstance(groups, (list, tuple)) or not all(isinstance(group, OptionGroup) for group in groups):
        raise ValueError(f"options must be a list of groups such as CodeSampling(top_k=9), not {shorten(options)}")
    return {type(group): group.given() for group in groups}


def choose_generator(model: UnifiedModel, output: Output, given: Given) -> str:
    """The generator of pictures that is asked for, or the model's usual one. Raises ValueError where it cannot answer
    with this output."""
    generator = given.get("generator", default_generator(model))
    if output == "pair" and generator not in model.template.text_lengths:
        capable_generators = " or ".join(model.template.text_lengths) or "none here does: train with generators.joint=1"
        raise ValueError(f"a text and a picture at once need a generator that writes both ({capable_generators})")
    if output not in model.template.outputs:
        raise ValueError(f"this model cannot answer with {output}: it can with {' or '.join(model.template.outputs)}")
    if generator not in model.generators or generator == "text":
        capable_generators = ", ".join(name for name in model.generators if name != "text")
        suggestion = did_you_mean(str(generator), model.generators)
        raise ValueError(f"this model has no generator {generator!r}: it has {capable_generators}{suggestion}")
    return str(generator)


def reject_unsupported(
    model: UnifiedModel, output: Output, generator: str, given: Given, groups: Mapping[GroupType, Given]
) -> None:
    """Raises ValueError for options that neither the generator nor the text of the answer takes, unless their value
    asks for nothing."""
    taken = model.generators.options(generator)
    accepted = [*GENERAL_GROUPS, *taken, *([TextSampling] if output in WRITING else [])]
    if output == "text":  # no picture is made
        accepted += [GuidanceOptions, CodeSampling]
    off = {name: declared.off for name, (_, declared) in merge_declared(REQUEST_GROUPS).items()}
    names = {name: value for group, values in groups.items() if group not in accepted for name, value in values.items()}
    names |= {name: value for name, value in given.items() if name not in option_names(accepted)}
    if unsupported := [name for name, value in names.items() if off[name] is None or value != off[name]]:
        supported = ", ".join(option_names(taken))
        raise ValueError(f"{generator} does not take {', '.join(unsupported)}: leave that out (it takes {supported})")


def resolve_options(
    model: UnifiedModel, output: Output, generator: str, given: Given, groups: Mapping[GroupType, Given]
) -> OptionSet:
    """The groups that count for this generator and output, without gaps."""
    defaults = model.default_sampling.get(generator, {}), model.generators[generator].defaults
    taken = (*GENERAL_GROUPS, *model.generators.options(generator))
    resolved = [resolve(group, given, groups.get(group, {}), *defaults) for group in taken]
    if output in WRITING:
        of_text = {name: value for name, value in given.items() if name != "top_k" or output == "text"}
        usual = {"temperature": INTERLEAVED_TEMPERATURE} if output == "interleaved" else {}
        text_defaults = model.default_sampling.get("text", {}), usual
        resolved.append(resolve(TextSampling, of_text, groups.get(TextSampling, {}), *text_defaults))
    return OptionSet(resolved)


def resolve_guidance(model: UnifiedModel, generator: str, given: Given, options: OptionSet) -> Guidance:
    """Guidance with a scale for each branch. Raises ValueError for what the model or the generator does not take.

    Args:
        model, generator: what is guided.
        given: the options of the call.
        options: all of them, without gaps.
    """
    usual = Guidance.of(resolve(GuidanceOptions, model.default_sampling.get(generator, {})).guidance)
    guidance, scales = Guidance.of(given.get("guidance", usual)), model.template.num_guidance_scales  # type: ignore[arg-type]
    if scales > 1 and len(guidance.scales) == 1:  # of the words alone; the others are as usual, or all are off
        others = (1.0,) * (scales - 1) if guidance.scales[0] == 1 else usual.scales[1:]
        guidance = replace(guidance, scales=guidance.scales + others)
    if "guider" in given:
        guidance = replace(guidance, guider=options[FlowOptions].guider)
    if FlowOptions not in options and guidance != Guidance(guidance.scales):
        raise ValueError(f"{generator} does not take a kind or an interval of guidance: give a scale")
    if len(guidance.scales) != scales:
        count = "one scale" if scales == 1 else f"{scales} scales, or that of the words"
        raise ValueError(f"this model has {scales + 1} branches of guidance: give {count}")
    return guidance


def check_fixed_codes(model: UnifiedModel, codes: object) -> None:
    """Raises ValueError for what cannot be codes (h, w) of the model's pictures, -1 where to write; None is fine."""
    shape, codebook_size = model.image_tokenizer.grid, model.vocabulary.image_size
    if codes is None:
        return
    is_integer = isinstance(codes, torch.Tensor) and not (codes.is_floating_point() or codes.is_complex())
    if not (is_integer and codes.shape == shape and -1 <= int(codes.min()) <= int(codes.max()) < codebook_size):  # type: ignore[attr-defined]
        raise ValueError(f"fixed_codes must be codes of the shape {shape}, -1 where to write")


def prepare_document(model: UnifiedModel, prompt: Any, output: Output, generator: str) -> Document:
    """The document, its system messages as one at its front. Raises ValueError for what the model cannot read."""
    document = Document.of(prompt)
    last_generator = "text" if output == "text" else generator
    document.check_conditions(last_generator, model.generators.conditions(last_generator))
    system_text, dialogue = split_system_messages(document.segments)
    if system_text and not model.template.supports_system:
        raise ValueError("this model follows no system messages: leave them out, or say it as the user")
    if system_text:  # pictures are drawn from what the user says
        document.segments = dialogue if output == "image" else [Segment(text=system_text, role="system"), *dialogue]
    if any(is_codes(image) and image.ndim != 2 for image in document.images()):
        raise ValueError("codes of a picture in a prompt have two dimensions, rows and columns")
    if output != "pair":  # both parts of a pair may be left to the model
        document.check_not_empty()
    return document


def default_generator(model: UnifiedModel) -> str:
    """The generator of pictures where none is asked for."""
    names = [name for name in model.generators if name != "text"]
    return "next-token" if "next-token" in names else names[0]


def zip_with_seeds(prompts: Sequence[Any], seeds: Sequence[int] | None = None) -> list[tuple[Any, int]]:
    """Each prompt with its seed; 0, 1, .. where none are given. Raises ValueError for what is no list of prompts, or no
    list of as many seeds."""
    is_single_prompt = isinstance(prompts, (str, Document, Segment, dict)) or is_image(prompts)
    if is_single_prompt or not isinstance(prompts, Iterable):
        what = shorten(prompts) if isinstance(prompts, (str, bytes)) else type(prompts).__name__
        raise ValueError(
            f"the prompts must be a list, with one answer each, not {what}: give [prompt], or ask generate"
        )
    prompt_list = list(prompts)
    if seeds is None:
        return [(prompt, i) for i, prompt in enumerate(prompt_list)]
    unordered = isinstance(seeds, (str, bytes, dict, set, frozenset, torch.Tensor))
    if unordered or not isinstance(seeds, Iterable) or getattr(seeds, "ndim", 1) != 1:
        raise ValueError(f"the seeds must be a list of whole numbers, one for each prompt, not {shorten(seeds)}")
    numbers = [SEED.check("seed", seed) for seed in list(seeds)]
    if len(numbers) != len(prompt_list):
        raise ValueError(f"{len(prompt_list)} prompts need as many seeds, not {len(numbers)}")
    return list(zip(prompt_list, numbers, strict=True))


def code_grid(model: UnifiedModel, size: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of codes of pictures of this size, width and height in pixels."""
    tokenizer = model.image_tokenizer
    side, stride = tokenizer.image_size, tokenizer.image_size // tokenizer.grid[0]
    if size is None:
        return tokenizer.grid
    Size().check("size", size)
    if tuple(size) == (side, side):
        return tokenizer.grid
    if not model.template.variable_size:
        raise ValueError(f"this model draws pictures of {side}x{side} pixels alone: leave the size out")
    if min(size) < stride or any(length % stride for length in size):
        raise ValueError(f"a size is width and height in pixels, multiples of {stride}, not {size}")
    return size[1] // stride, size[0] // stride


def default_options(model: UnifiedModel, generator: str) -> dict[str, object]:
    """What holds for a generator where nothing else is asked for: guidance first, then what else it takes."""
    sources = model.default_sampling.get(generator, {}), model.generators[generator].defaults
    groups = [resolve(group, *sources) for group in model.generators.options(generator)]
    return {name: value for group in groups for name, value in group.reported().items()}
