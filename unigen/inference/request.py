"""What one row of the engine is asked for, checked against what its model can do.

Does not depend on: caches, how anything is generated. What is wrong is a ValueError in one line.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from unigen.diffusion.solvers import MAX_STEPS, SOLVERS
from unigen.document import Document, Segment, is_codes
from unigen.generators.base import SAMPLING_OPTION_NAMES
from unigen.generators.jacobi import SPECULATIVE_METHODS
from unigen.inference.results import Record
from unigen.limits import LIMITS, check_limit
from unigen.media.images import is_image
from unigen.model.template import OUTPUTS, Output, split_system_messages
from unigen.model.unified import UnifiedModel
from unigen.samplers.guidance import Guidance
from unigen.samplers.guiders import GUIDERS
from unigen.samplers.logits import SamplingOptions
from unigen.utils.text import did_you_mean, shorten

MAX_NAME_LENGTH = 64
"""Characters of the name of a generator, a sampler or the like."""

DEFAULT_SAMPLING: dict[str, Any] = {"guidance": 3.0, "temperature": 0.8, "top_k": 0, "top_p": 1.0}
"""How pictures are drawn by a model that does not say."""


@dataclass
class Request:
    """What one row is asked for. `image` and `text` say how ids of either kind are drawn. written: of the pictures that
    have been made, the codes (P,) of those whose generator has codes of its own, else None. candidate: which of the
    answers to one request and seed it is, of which the best is kept."""

    document: Document
    output: Output
    generator: str
    guidance: Guidance
    image: SamplingOptions
    text: SamplingOptions
    seed: int
    max_tokens: int
    max_images: int
    grid: tuple[int, int]
    steps: int | None = None
    sampler: str | None = None
    accelerate: str | None = None
    fixed: torch.Tensor | None = None
    written: list[torch.Tensor | None] = field(default_factory=list)
    previews: int = 0
    candidate_index: int = 0
    record: Record = Record()
    """What is kept of the generation beside ids and codes."""


def build_request(
    model: UnifiedModel,
    prompt: Any,
    output: Output,
    *,
    seed: int = 0,
    generator: str | None = None,
    guidance: float | Sequence[float] | Guidance | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    max_tokens: int = 256,
    max_images: int = 8,
    steps: int | None = None,
    sampler: str | None = None,
    guidance_kind: str | None = None,
    accelerate: str | None = None,
    fixed: torch.Tensor | None = None,
    size: tuple[int, int] | None = None,
    previews: int = 0,
    negative: str | None = None,
) -> Request:
    """A checked request.

    guidance: scale of classifier-free guidance for pictures, 1 is off. temperature, top_k, top_p: how ids are drawn,
    top_k of text where it is the whole answer, else of codes alone; repetition_penalty: of text alone, from 1 (off) to
    10. None is what the model's `sampling` says, else `DEFAULT_SAMPLING` for pictures; text is greedy where it is the
    whole answer, else of temperature 0.8, and top_p 1. max_tokens, max_images: limits of the answer's text and of an
    interleaved answer's pictures.
    steps: how many a generator takes that chooses its own number; sampler, guidance_kind: of a flow.
    accelerate: "sjd" or "jacobi", how next-token writes several codes a step (`generators.jacobi`). fixed: codes
    (h, w) that stay, -1 elsewhere. size: width and height in pixels, for models that draw any; None is what the
    document says. previews: how many of each picture are shown before it is finished, by `Engine.stream`; fewer where
    its steps are fewer, none where the generator writes codes one after another. negative: of pipelines alone.
    """
    if negative is not None and not (isinstance(negative, str) and not negative):
        raise ValueError("this model takes no negative prompt, pipelines do: leave negative out")
    outputs = model.template.outputs
    if not isinstance(output, str) or output not in OUTPUTS:
        raise ValueError(f"unknown output {shorten(output)}: one of {', '.join(OUTPUTS)}")
    name_options = {
        "generator": generator,
        "sampler": sampler,
        "guidance_kind": guidance_kind,
        "accelerate": accelerate,
    }
    for name, value in name_options.items():
        check_name(name, value)
    for name, number in (("temperature", temperature), ("top_k", top_k), ("top_p", top_p)):
        if number is not None:
            check_limit(name, number)
    generator = default_generator(model) if generator is None else generator
    if output == "pair" and generator not in model.template.text_lengths:
        capable_generators = " or ".join(model.template.text_lengths) or "none here does: train with generators.joint=1"
        raise ValueError(f"a text and a picture at once need a generator that writes both ({capable_generators})")
    if output not in outputs:
        raise ValueError(f"this model cannot answer with {output}: it can with {' or '.join(outputs)}")
    if generator not in model.generators or generator == "text":
        capable_generators = ", ".join(name for name in model.generators if name != "text")
        suggestion = did_you_mean(str(generator), model.generators)
        raise ValueError(f"this model has no generator {generator!r}: it has {capable_generators}{suggestion}")
    seed, max_tokens = check_limit("seed", seed), check_limit("max_tokens", max_tokens)
    max_images, previews = check_limit("max_images", max_images), check_limit("previews", previews)
    if sampler is not None and sampler not in SOLVERS:
        raise ValueError(f"unknown sampler {sampler!r}: one of {', '.join(SOLVERS)}")
    if steps is not None:
        steps = check_limit("steps", steps)
    default = DEFAULT_SAMPLING | model.default_sampling.get(generator, {})
    default_guidance, scales = Guidance.of(default["guidance"]), model.template.num_guidance_scales
    guidance = default_guidance if guidance is None else Guidance.of(guidance)
    if scales > 1 and len(guidance.scales) == 1:  # of the words alone; the others are as usual, or all are off
        guidance_off = guidance.scales[0] == 1
        guidance = replace(
            guidance, scales=guidance.scales + ((1.0,) * (scales - 1) if guidance_off else default_guidance.scales[1:])
        )
    given_options: dict[str, object] = {"steps": steps, "sampler": sampler, "guidance_kind": guidance_kind}
    given_options |= {"fixed": fixed, "accelerate": accelerate}
    if accelerate is not None and accelerate not in SPECULATIVE_METHODS:
        raise ValueError(f"unknown acceleration {accelerate!r}: one of {', '.join(SPECULATIVE_METHODS)}")
    if output in ("image", "pair"):  # else they are of its text as well
        given_options |= {"temperature": temperature, "top_k": top_k or None, "top_p": top_p if top_p != 1 else None}
        given_options["repetition_penalty"] = repetition_penalty
    supported_options = model.generators.takes(generator)
    if unsupported := [
        name for name, value in given_options.items() if value is not None and name not in supported_options
    ]:
        supported = f" (it takes {', '.join(supported_options)})" if supported_options else ""
        raise ValueError(f"{generator} does not take {', '.join(unsupported)}: leave that out{supported}")
    if guidance_kind is not None:
        guidance = replace(guidance, guider=guidance_kind)
    if "sampler" in supported_options and steps is not None:
        if steps > MAX_STEPS:
            raise ValueError(f"steps of {generator} must be a whole number from 1 to {MAX_STEPS}, not {steps}")
        if steps < (min_steps := GUIDERS[guidance.guider].min_steps):
            raise ValueError(f"{guidance.guider} needs at least {min_steps} steps, not {steps}")
    if "guidance_kind" not in supported_options and guidance != Guidance(guidance.scales):
        raise ValueError(f"{generator} does not take a kind or an interval of guidance: give a scale")
    shape, codebook_size = model.image_tokenizer.grid, model.vocabulary.image_size
    is_integer = isinstance(fixed, torch.Tensor) and not (fixed.is_floating_point() or fixed.is_complex())
    if fixed is not None and not (
        is_integer and fixed.shape == shape and -1 <= int(fixed.min()) <= int(fixed.max()) < codebook_size
    ):
        raise ValueError(f"fixed must be codes of the shape {model.image_tokenizer.grid}, -1 where to write")
    if len(guidance.scales) != scales:
        count = "one scale" if scales == 1 else f"{scales} scales, or that of the words"
        raise ValueError(f"this model has {scales + 1} branches of guidance: give {count}")
    code_options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    codes: dict[str, Any] = {k: default[k] if value is None else value for k, value in code_options.items()}
    text_options = {"temperature": temperature, "top_p": top_p, "repetition_penalty": repetition_penalty}
    texts = {"temperature": 0.8 if output == "interleaved" else 0.0} | model.default_sampling.get("text", {})
    if output == "text":
        text_options["top_k"] = top_k
    texts |= {name: value for name, value in text_options.items() if value is not None}
    document = Document.of(prompt)
    writer = "text" if output == "text" else generator
    document.check_conditions(writer, model.generators.conditions(writer))
    system_text, dialogue = split_system_messages(document.segments)
    if system_text and not model.template.supports_system:
        raise ValueError("this model follows no system messages: leave them out, or say it as the user")
    if system_text:  # pictures are drawn from what the user says
        document.segments = dialogue if output == "image" else [Segment(text=system_text, role="system"), *dialogue]
    if any(is_codes(image) and image.ndim != 2 for image in document.images()):
        raise ValueError("codes of a picture in a prompt have two dimensions, rows and columns")
    if output != "pair":  # both parts of a pair may be left to the model
        document.check_not_empty()
    grid = code_grid(model, document.size if size is None else size)
    if model.template.variable_size:
        stride = model.image_tokenizer.image_size // model.image_tokenizer.grid[0]
        document.size = (grid[1] * stride, grid[0] * stride)
    return Request(
        document=document,
        output=output,
        generator=generator,
        guidance=guidance,
        image=SamplingOptions(**codes),
        text=SamplingOptions(**texts),
        seed=seed,
        max_tokens=max_tokens,
        max_images=max_images,
        grid=grid,
        steps=steps,
        sampler=sampler,
        accelerate=accelerate,
        fixed=fixed,
        previews=previews,
    )


REQUEST_OPTIONS = tuple(list(inspect.signature(build_request).parameters)[3:])
"""The names of a request's options."""


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
    numbers = [check_limit("seed", seed) for seed in list(seeds)]
    if len(numbers) != len(prompt_list):
        raise ValueError(f"{len(prompt_list)} prompts need as many seeds, not {len(numbers)}")
    return list(zip(prompt_list, numbers, strict=True))


def reject_unknown_options(what: str, options: Iterable[str], known: Sequence[str]) -> None:
    """Raises ValueError where an option is not among those known, with the one that may have been meant."""
    for name in options:
        if name not in known:
            suggestion = did_you_mean(name, known) or f": it takes {', '.join(known)}"
            raise ValueError(f"{what} has no option {name!r}{suggestion}")


def check_name(what: str, name: Any) -> None:
    """Raises ValueError for what can be no name of a way to draw; None leaves it to the model."""
    if name is not None and (not isinstance(name, str) or not name.strip() or len(name) > MAX_NAME_LENGTH):
        raise ValueError(f"{what} must be a name, not {shorten(name)}: leave it out for the usual one")


def check_size(size: Any) -> None:
    """Raises ValueError for what is no width and height."""
    limits = LIMITS["width"], LIMITS["height"]
    is_size = isinstance(size, (tuple, list)) and len(size) == 2
    if not (is_size and all(limit.contains(n) for limit, n in zip(limits, size, strict=True))):
        codebook_size = f"at most {limits[0].high:,} each"
        raise ValueError(
            f"a size is two whole numbers, width and height in pixels, {codebook_size}, not {shorten(size)}"
        )


def code_grid(model: UnifiedModel, size: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of codes of pictures of this size, width and height in pixels."""
    tokenizer = model.image_tokenizer
    side, stride = tokenizer.image_size, tokenizer.image_size // tokenizer.grid[0]
    if size is None:
        return tokenizer.grid
    check_size(size)
    if tuple(size) == (side, side):
        return tokenizer.grid
    if not model.template.variable_size:
        raise ValueError(f"this model draws pictures of {side}x{side} pixels alone: leave the size out")
    if min(size) < stride or any(length % stride for length in size):
        raise ValueError(f"a size is width and height in pixels, multiples of {stride}, not {size}")
    return size[1] // stride, size[0] // stride


def default_options(model: UnifiedModel, generator: str) -> dict[str, Any]:
    """How pictures are drawn where nothing else is asked for: guidance, and what else the generator takes."""
    writer = model.generators[generator]
    generator_defaults = {name: getattr(writer, name) for name in ("steps", "sampler") if name in writer.takes}
    default = DEFAULT_SAMPLING | generator_defaults | model.default_sampling.get(generator, {})
    return {name: default[name] for name in default if name in ("guidance", *writer.takes)}


def report_settings(model: UnifiedModel, request: Request) -> dict[str, Any]:
    """How an answer is made, by the options' names; of what makes images only where there may be some."""
    settings: dict[str, Any] = {"seed": request.seed}
    if request.output != "image":
        settings["text"] = {"temperature": request.text.temperature, "top_p": request.text.top_p}
        if request.text.repetition_penalty != 1:
            settings["text"]["repetition_penalty"] = request.text.repetition_penalty
        settings["max_tokens"] = request.max_tokens
    if request.output != "text":
        defaults, scales = default_options(model, request.generator), request.guidance.scales
        settings |= {"generator": request.generator, "guidance": scales[0] if len(scales) == 1 else list(scales)}
        options = {name: getattr(request.image, name) for name in SAMPLING_OPTION_NAMES}
        options |= {name: getattr(request, name) or defaults.get(name) for name in ("steps", "sampler", "accelerate")}
        options |= {"guidance_kind": request.guidance.guider}
        takes = model.generators[request.generator].takes
        settings |= {name: value for name, value in options.items() if name in takes and value is not None}
    return settings
