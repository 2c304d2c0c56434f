"""A validated request for one sequence.

    request = build_request(model, "two apples", "image", seed=3, guidance=2.5)
    request.options[CodeSampling].temperature          # of the call, of the model's `sampling`, or as declared

`unigen.inference.options` lists the options. Bad input raises a ValueError of one line. Does not depend on: caches, how
answers are generated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from unigen.diffusion.options import FlowOptions
from unigen.document import Document, Prompt, Segment, is_codes
from unigen.generators.options.inpainting import Inpainting
from unigen.inference.options import AnswerCount, AnswerLimits, Previews, RequestOptions, local_groups
from unigen.inference.results import Record
from unigen.media.images import is_image
from unigen.model.template import OUTPUTS, Output, split_system_messages
from unigen.model.unified import UnifiedModel
from unigen.options import (
    DEFAULT_GENERATOR,
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
"""Groups of options that every model takes, for every output."""
INTERLEAVED_TEMPERATURE = 0.8
"""Default temperature of text in an interleaved answer."""

Options = OptionGroup | Sequence[OptionGroup]


@dataclass
class Request:
    """One sequence to be generated."""

    document: Document
    """The prompt."""
    output: Output
    """Kind of the answer."""
    generator: str
    """Name of the image generator."""
    options: OptionSet
    """All options: from the call, else from the model, else the declared defaults."""
    grid: tuple[int, int]
    """Rows and columns of the codes of an image."""
    native_codes: list[torch.Tensor | None] = field(default_factory=list)
    """Codes (P,) of each finished image; None where its generator generates codes of the model's image tokenizer."""
    record: Record = Record()
    """What to record beside ids and codes."""
    candidate_index: int = 0
    """Index among the candidates of one request and seed, of which the best is kept."""

    @property
    def guidance(self) -> Guidance:
        """Guidance, with one scale for each branch of the model but the last."""
        return Guidance.from_value(self.options[GuidanceOptions].guidance)

    @property
    def seed(self) -> int:
        """Seed of the answer."""
        return self.options[RequestOptions].seed

    @property
    def max_tokens(self) -> int:
        """Tokens of text, at most."""
        return self.options[AnswerLimits].max_tokens

    @property
    def max_images(self) -> int:
        """Images of an interleaved answer, at most."""
        return self.options[AnswerLimits].max_images

    @property
    def num_previews(self) -> int:
        """Previews of each image, at most."""
        return self.options[Previews].previews

    def settings(self) -> dict[str, object]:
        """Settings of the generation, by the options' names: those of images and of text where the answer may contain
        some."""
        values: dict[str, object] = {"seed": self.seed}
        if self.output in WRITING:
            values |= {"text": self.options[TextSampling].to_settings(), "max_tokens": self.max_tokens}
        if self.output != "text":
            image_groups = [group for group in self.options if not isinstance(group, (*GENERAL_GROUPS, TextSampling))]
            values["generator"] = self.generator
            values |= {name: value for group in image_groups for name, value in group.to_settings().items()}
        return values

    @property
    def image_sampling(self) -> SamplingOptions:
        """How codes are sampled."""
        return SamplingOptions(**self.options[CodeSampling].to_dict())  # type: ignore[arg-type]

    @property
    def text_sampling(self) -> SamplingOptions:
        """How ids of text are sampled."""
        return SamplingOptions(**self.options[TextSampling].to_dict())  # type: ignore[arg-type]


def build_request(
    model: UnifiedModel, prompt: Prompt, output: Output, *, options: Options = (), **keywords: object
) -> Request:
    """Validate a request to a model.

    Args:
        model: the model that answers.
        prompt: as `Document.of` takes it.
        output: kind of the answer.
        options: groups of options; those left out are the model's defaults.
        **keywords: options by name. An option of several groups applies to each that suits the output: in an
            interleaved answer temperature and top_p apply to text and codes, top_k to codes only.

    Returns:
        The request, with values of all options.

    Raises:
        ValueError: in one line, where the model cannot answer such a request.
    """
    if isinstance(output, str) and output == "pair":
        raise ValueError("the output 'pair' is called 'joint' now")
    if not isinstance(output, str) or output not in OUTPUTS:
        raise ValueError(f"unknown output {shorten(output)}: one of {', '.join(OUTPUTS)}")
    reject_unknown("a request", keywords, REQUEST_OPTIONS)
    call_options = check_values(REQUEST_GROUPS, keywords)
    groups = collect_given(options)
    generator = choose_generator(model, output, {**groups.get(RequestOptions, {}), **call_options})
    reject_unsupported(model, output, generator, call_options, groups)
    resolved = resolve_options(model, output, generator, call_options, groups)
    guided = {**groups.get(GuidanceOptions, {}), **groups.get(FlowOptions, {}), **call_options}
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
"""Options of a call, by name."""


def collect_given(options: Options) -> dict[GroupType, Given]:
    """The values that groups of options set.

    Args:
        options: a group, or a list of groups.

    Returns:
        By the type of each group, its values by name.

    Raises:
        ValueError: there is something else than a group of a request's options, or a seed in one.
    """
    groups = [options] if isinstance(options, OptionGroup) else options
    if not isinstance(groups, (list, tuple)) or not all(isinstance(group, OptionGroup) for group in groups):
        raise ValueError(f"options must be a list of groups such as CodeSampling(top_k=9), not {shorten(options)}")
    for group in groups:
        if type(group) not in REQUEST_GROUPS:
            names = ", ".join(sorted(known.__name__ for known in REQUEST_GROUPS))
            raise ValueError(f"options cannot hold {type(group).__name__}: it takes {names}")
        if isinstance(group, RequestOptions) and group.seed is not None:
            raise ValueError(f"give the seed by its name, seed={group.seed}, not in RequestOptions")
    return {type(group): group.to_dict() for group in groups}


def choose_generator(model: UnifiedModel, output: Output, given: Given) -> str:
    """The image generator of a request.

    Args:
        model: the model that answers.
        output: kind of the answer.
        given: options of the call; "generator" is one of them.

    Returns:
        The name of the given generator, or of the model's default.

    Raises:
        ValueError: the model has no such generator, or it cannot generate this output.
    """
    generator = given.get("generator", default_generator(model))
    if output == "joint" and generator not in model.template.text_lengths:
        capable_generators = " or ".join(model.template.text_lengths) or "none here does: train with generators.joint=1"
        raise ValueError(f"a text and a picture at once need a generator of both ({capable_generators})")
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
    """Check that the generator, or the text of the answer, takes all given options. A value that switches an option off
    is always accepted.

    Args:
        model: the model that answers.
        output: kind of the answer.
        generator: name of the image generator.
        given: options of the call.
        groups: options of the call in groups.

    Raises:
        ValueError: an option is not taken.
    """
    generator_groups = model.generators.options(generator)
    accepted = [*GENERAL_GROUPS, *generator_groups, *([TextSampling] if output in WRITING else [])]
    if output == "text":  # no image is generated
        accepted += [GuidanceOptions, CodeSampling]
    off_values = {name: declared.off for name, (_, declared) in merge_declared(REQUEST_GROUPS).items()}
    names = {name: value for group, values in groups.items() if group not in accepted for name, value in values.items()}
    names |= {name: value for name, value in given.items() if name not in option_names(accepted)}
    if unsupported := [name for name, value in names.items() if off_values[name] is None or value != off_values[name]]:
        supported = ", ".join(option_names(generator_groups))
        raise ValueError(f"{generator} does not take {', '.join(unsupported)}: leave that out (it takes {supported})")


def resolve_options(
    model: UnifiedModel, output: Output, generator: str, given: Given, groups: Mapping[GroupType, Given]
) -> OptionSet:
    """Values of all options that apply to a generator and an output.

    Args:
        model: the model that answers; it has defaults of its own.
        output: kind of the answer.
        generator: name of the image generator.
        given: options of the call.
        groups: options of the call in groups.

    Returns:
        The groups, with a value for each option.
    """
    defaults = model.default_sampling.get(generator, {}), model.generators[generator].defaults
    groups_taken = (*GENERAL_GROUPS, *model.generators.options(generator))
    resolved = [resolve(group, given, groups.get(group, {}), *defaults) for group in groups_taken]
    if output in WRITING:
        text_given = {name: value for name, value in given.items() if name != "top_k" or output == "text"}
        default = {"temperature": INTERLEAVED_TEMPERATURE} if output == "interleaved" else {}
        text_defaults = model.default_sampling.get("text", {}), default
        resolved.append(resolve(TextSampling, text_given, groups.get(TextSampling, {}), *text_defaults))
    return OptionSet(resolved)


def resolve_guidance(model: UnifiedModel, generator: str, given: Given, options: OptionSet) -> Guidance:
    """Guidance with a scale for each branch of the model but the last.

    Args:
        model: the model that answers.
        generator: name of the image generator.
        given: options of the call.
        options: values of all options.

    Raises:
        ValueError: the model or the generator does not take such guidance.
    """
    default = Guidance.from_value(resolve(GuidanceOptions, model.default_sampling.get(generator, {})).guidance)
    guidance, scales = Guidance.from_value(given.get("guidance", default)), model.template.num_guidance_scales  # type: ignore[arg-type]
    if scales > 1 and len(guidance.scales) == 1:  # that of the text; the others have their defaults, or all are off
        others = (1.0,) * (scales - 1) if guidance.scales[0] == 1 else default.scales[1:]
        guidance = replace(guidance, scales=guidance.scales + others)
    if "guider" in given:
        guidance = replace(guidance, guider=options[FlowOptions].guider)
    if FlowOptions not in options and guidance != Guidance(guidance.scales):
        raise ValueError(f"{generator} does not take a guider or an interval of guidance: give a scale")
    if len(guidance.scales) != scales:
        count = "one scale" if scales == 1 else f"{scales} scales, or that of the words"
        raise ValueError(f"this model has {scales + 1} branches of guidance: give {count}")
    return guidance


def check_fixed_codes(model: UnifiedModel, codes: object) -> None:
    """Check given codes of an image.

    Args:
        model: the model that answers.
        codes: codes (h, w) of its image tokenizer, -1 where to generate; or None.

    Raises:
        ValueError: the shape, the type or the range is wrong.
    """
    shape, codebook_size = model.image_tokenizer.grid, model.vocabulary.image_size
    if codes is None:
        return
    is_integer = isinstance(codes, torch.Tensor) and not (codes.is_floating_point() or codes.is_complex())
    if not (is_integer and codes.shape == shape and -1 <= int(codes.min()) <= int(codes.max()) < codebook_size):  # type: ignore[attr-defined]
        raise ValueError(f"fixed_codes must be codes of the shape {shape}, -1 where to write")


def prepare_document(model: UnifiedModel, prompt: Prompt, output: Output, generator: str) -> Document:
    """The document of a prompt, with its system messages joined to one at the front.

    Args:
        model: the model that answers.
        prompt: as `Document.of` takes it.
        output: kind of the answer.
        generator: name of the image generator.

    Raises:
        ValueError: the model cannot read it.
    """
    document = Document.of(prompt)
    last_generator = "text" if output == "text" else generator
    document.check_conditions(last_generator, model.generators.conditions(last_generator))
    system_text, dialogue = split_system_messages(document.segments)
    if system_text and not model.template.supports_system:
        raise ValueError("this model follows no system messages: leave them out, or say it as the user")
    if system_text:  # images are generated from the user's segments
        document.segments = dialogue if output == "image" else [Segment(text=system_text, role="system"), *dialogue]
    if any(is_codes(image) and image.ndim != 2 for image in document.images()):
        raise ValueError("codes of a picture in a prompt have two dimensions, rows and columns")
    if output != "joint":  # the model may generate both parts
        document.check_not_empty()
    return document


def default_generator(model: UnifiedModel) -> str:
    """The name of the image generator where a request names none.

    Args:
        model: the model that answers.
    """
    names = [name for name in model.generators if name != "text"]
    return DEFAULT_GENERATOR if DEFAULT_GENERATOR in names else names[0]


def zip_with_seeds(prompts: Sequence[Prompt], seeds: Sequence[int] | None = None) -> list[tuple[Prompt, int]]:
    """Pair each prompt with its seed.

    Args:
        prompts: a list of prompts.
        seeds: one for each prompt; None is 0, 1, ...

    Raises:
        ValueError: the prompts are no list, or the seeds are no list of as many whole numbers.
    """
    is_single_prompt = isinstance(prompts, (str, Document, Segment, dict)) or is_image(prompts)
    if is_single_prompt or not isinstance(prompts, Iterable):
        value = shorten(prompts) if isinstance(prompts, (str, bytes)) else type(prompts).__name__
        raise ValueError(
            f"the prompts must be a list, with one answer each, not {value}: give [prompt], or ask generate"
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
    """Rows and columns of the codes of an image.

    Args:
        model: the model that generates it.
        size: width and height in pixels; None is the model's own size.

    Raises:
        ValueError: the model cannot generate images of this size.
    """
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
    """Default values of the options of a generator, by name: guidance first, then the others.

    Args:
        model: the model that generates.
        generator: name of the generator.
    """
    sources = model.default_sampling.get(generator, {}), model.generators[generator].defaults
    groups = [resolve(group, *sources) for group in model.generators.options(generator)]
    return {name: value for group in groups for name, value in group.to_settings().items()}
