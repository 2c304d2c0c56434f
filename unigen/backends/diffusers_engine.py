"""The engine of diffusers pipelines: words or classes in, images out.

    engine = unigen.load("stable-diffusion-v1-5/stable-diffusion-v1-5")
    image = engine.generate("a shiba inu", seed=0, steps=20, guidance=7.5, solver="dpm++")
    edited = engine.edit(image, "a shiba inu in the snow", strength=0.6)
    painted = engine.inpaint(image, "a red ball", mask)

The options of a pipeline are read from its class (`unigen.backends.diffusers_support`). Options that it does not take
are refused by name, and a class that cannot be used here is refused before its weights are loaded. To edit and inpaint,
the pipeline's components are put into diffusers' image-to-image and inpainting classes, where it has them. An edited
image keeps its size, and the unmasked part of an inpainted one keeps its pixels. Each image has its own random
generator, so that it does not depend on the batch. Does not depend on: schedules, networks, text encoders.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from unigen.backends.diffusers_options import STEPS, EditOptions, PipelineOptions
from unigen.backends.diffusers_support import (
    INPAINT_CHANNELS,
    call_parameters,
    compatible_schedulers,
    native_area,
    needs_image,
    network_config,
    size_multiple,
    supported_options,
    unsupported_reason,
)
from unigen.document import Document, Preview, Prompt, Segment, as_text
from unigen.inference.base import BaseEngine, check_record
from unigen.inference.options import PromptOptions
from unigen.inference.protocol import EngineInfo, OptionValue
from unigen.inference.request import zip_with_seeds
from unigen.inference.results import RECORD_NOTHING, GenerationResult, Record
from unigen.media.display import MediaList, table_html
from unigen.media.images import ImageSource, read_image, read_mask
from unigen.model.template import Output, UnsupportedError
from unigen.options import reject_renamed, resolve
from unigen.samplers.guidance import GUIDANCE_SCALE
from unigen.samplers.seeds import make_rng
from unigen.utils import progress
from unigen.utils.numbers import NonFiniteError
from unigen.utils.option_types import SEED, Size
from unigen.utils.text import first_line

if TYPE_CHECKING:
    from inspect import Parameter

    from unigen.backends.diffusers_support import Pipeline

MAX_OUTPUT_PIXELS = 4096 * 4096
"""Pixels of a generated image, at most."""
ENGINE_ARGUMENTS = {"class_labels", "generator", "height", "image", "mask_image", "num_images_per_prompt"}
ENGINE_ARGUMENTS |= {"negative_prompt", "output_type", "prompt", "return_dict", "width"}
"""Arguments of pipelines that only the engine sets, itself or for an option of `supported_options`."""
PIPELINE_ERRORS = (RuntimeError, IndexError, AssertionError, ArithmeticError, ImportError)
"""Errors of pipelines for arguments that they cannot work with, beside ValueError and TypeError. Arguments of their
own, which are not checked here, can raise AttributeError and KeyError too."""


class DiffusersEngine(BaseEngine):
    """Generates images with one pipeline of diffusers. Not safe to share between threads."""

    outputs: tuple[Output, ...] = ("image",)

    def __init__(self, pipe: Pipeline) -> None:
        """An engine of a loaded pipeline of diffusers."""
        self.pipe = self.pipeline = pipe
        self.default_scheduler: Any = getattr(pipe, "scheduler", None)
        self.call_parameters = call_parameters(pipe)
        self.variants: dict[str, Pipeline] = {}
        self.sampling = self.default_values(self._variant_or_none("text") or pipe)
        """The values of options where a request does not say."""
        pipe.set_progress_bar_config(disable=True)

    # ---------------------------------------------------------------- what users call

    def generate_results(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int] | None = None,
        output: Output = "image",
        *,
        record: Record = RECORD_NOTHING,
        **options: OptionValue,
    ) -> list[GenerationResult]:
        """See `InferenceEngine.generate_results`: an image of words, or of a class by its number.

        Args:
            prompts: what is asked for.
            seeds: one for each prompt; None is 0, 1, ...
            output: "image".
            record: nothing.
            options: as far as the pipeline takes them: steps (1 to 1000), guidance (0 to 100), solver, size (width,
                height in pixels), negative_prompt (words for what it shall not show), and what its own `__call__` takes
                besides.
        """
        if output not in self.outputs:
            raise ValueError(f"this model cannot answer with {output}: it can with image")
        prompts_and_seeds = zip_with_seeds(prompts, seeds)
        check_record(record, Record(), "a pipeline gives its images alone")
        documents = [Document.of(prompt) for prompt, _ in prompts_and_seeds]
        arguments = [self._prompt_arguments(document) for document in documents]
        image_seeds = [seed for _, seed in prompts_and_seeds]
        images = self._run_pipeline(self._as_variant("text"), arguments, image_seeds, options)
        settings = self.default_options(output) | {name: value for name, value in options.items() if value is not None}
        return [
            GenerationResult(
                image,
                Document([*document.segments, Segment(image=image, role="assistant")]),
                seed,
                codes=[None],
                settings=dict(settings),
            )
            for image, document, seed in zip(images, documents, image_seeds, strict=True)
        ]

    def stream(
        self, prompt: Prompt, output: Output = "image", *, seed: int = 0, **options: OptionValue
    ) -> Iterator[str | Image.Image | Preview]:
        """See `InferenceEngine.stream`: the image, when it is finished."""
        return super().stream(prompt, output, seed=seed, **options)

    def check(self, prompt: Prompt, output: Output = "image", *, seed: int = 0, **options: OptionValue) -> None:
        """See `InferenceEngine.check`."""
        if output not in self.outputs:
            raise ValueError(f"this model cannot answer with {output}: it can with image")
        check_seed(seed)
        document = Document.of(prompt)
        document.check_conditions("a pipeline")
        if not self.accepts_images:
            self._prompt_arguments(document)
        variant = self._as_variant("text")
        _, solver = self._call_arguments(variant, options, False)
        self._scheduler(variant, solver)

    def default_options(self, output: Output, given: Mapping[str, OptionValue] | None = None) -> dict[str, OptionValue]:
        """See `InferenceEngine.default_options`."""
        return dict(self.sampling) if output == "image" else {}

    def edit(self, image: ImageSource, instruction: str, *, seed: int = 0, **options: Any) -> Image.Image:
        """See `InferenceEngine.edit`. The image keeps its size where the options have no size (width, height in
        pixels).
        strength: the share of the noise from which the image is generated anew, from 0 to 1, where the pipeline edits
            so."""
        check_prompt_text("the instruction", instruction, "say what to change")
        picture, variant = read_image(image), self._as_variant("edit")
        words = as_text(instruction)
        document = Document.of([picture, words] if self.accepts_images else words)
        size = options.pop("size", None)
        input_size, output_size = self._render_sizes(variant, picture, size)
        arguments = self._prompt_arguments(document) | {"image": [resize_to(picture, input_size)]}
        options |= {"size": output_size}
        generated = self._run_pipeline(variant, [arguments], [seed], options, auto_size=True)[0]
        return resize_to(generated, size or picture.size)

    def inpaint(
        self,
        image: ImageSource,
        prompt: str,
        mask: ImageSource | None = None,
        *,
        variation: float | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Image.Image:
        """See `InferenceEngine.inpaint`: all pixels that are not marked stay.

        Args:
            image: a path, a PIL image, or all else that `read_image` takes.
            prompt: what the image is to show.
            mask: of the image's size, white where to generate (`unigen.media.images.read_mask`).
            variation: is refused.
            seed: of the image's randomness.
            options: of the pipeline. strength: the share of the noise that covers what is generated anew, from 0 to 1.
                size: that at which it is generated; the result has the image's own.
        """
        if variation is not None or mask is None:
            raise UnsupportedError("this model does not vary pictures: give a mask of what to paint anew")
        check_prompt_text("the prompt", prompt, "say what the picture is to show")
        picture, mask_image = read_image(image), read_mask(mask)
        if picture.size != mask_image.size:
            raise ValueError(f"the mask is of {mask_image.size} pixels, the picture of {picture.size}: make them alike")
        variant = self._as_variant("inpaint")
        input_size, output_size = self._render_sizes(variant, picture, options.pop("size", None))
        arguments = {
            "image": [resize_to(picture, input_size)],
            "mask_image": [mask_image.resize(input_size, Image.Resampling.NEAREST)],
        }
        options |= {"size": output_size}
        generated = self._run_pipeline(
            variant, [self._prompt_arguments(Document.of(as_text(prompt))) | arguments], [seed], options, auto_size=True
        )[0]
        return Image.composite(resize_to(generated, picture.size), picture, mask_image)

    def info(self) -> EngineInfo:
        """See `InferenceEngine.info`."""
        modules = {name: part for name, part in self.pipe.components.items() if isinstance(part, torch.nn.Module)}
        counts = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
        variants = {task: self._variant_or_none(task) for task in ("text", "edit", "inpaint")}
        main = next((variant for variant in variants.values() if variant), self.pipe)
        prompt_type = "classes" if "class_labels" in self.call_parameters else "words"
        return {
            "family": "diffusion pipeline",
            "pipeline": type(self.pipe).__name__,
            "components": {name: f"{count / 1e6:.1f}M parameters" for name, count in counts.items()},
            "scheduler": type(self.default_scheduler).__name__,
            "prompt_type": prompt_type if variants["text"] else "no: it changes pictures",
            "edit_pipeline": type(variants["edit"]).__name__ if variants["edit"] else "no",
            "inpaint_pipeline": type(variants["inpaint"]).__name__ if variants["inpaint"] else "no",
            "takes": self.options(main),
            "solvers": list(compatible_schedulers(main, self.default_scheduler)),
            "sampling": self.sampling,
            "outputs": list(self.outputs),
            "device": str(self.pipe.device),
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.pipe).__name__})"

    def _repr_html_(self) -> str:
        return table_html(type(self.pipe).__name__, self.info())

    # ---------------------------------------------------------------- what pipelines take

    def options(self, pipe: Pipeline) -> list[str]:
        """The names of the options that change what a pipeline (in the form of a task) generates."""
        return [*supported_options(pipe), *(["solver"] if compatible_schedulers(pipe, self.default_scheduler) else [])]

    def default_values(self, pipe: Pipeline) -> dict[str, OptionValue]:
        """The numbers that the signature of a pipeline (in the form of a task) has for its options, by the options'
        names."""
        parameters = call_parameters(pipe)
        values = {
            name: parameters[argument].default for name, argument in supported_options(pipe).items() if name != "size"
        }
        return {name: value for name, value in values.items() if isinstance(value, (int, float))}

    def _prompt_arguments(self, document: Document) -> dict[str, object]:
        """The pipeline's own arguments for words or a class."""
        document.check_conditions("a pipeline")
        if document.images():
            raise ValueError("a pipeline draws from words: give a picture to `edit` or `inpaint`")
        words = " ".join((s.text or "").strip() for s in document.segments if s.text)
        labels = [s.label for s in document.segments if s.label is not None]
        if "class_labels" in self.call_parameters:
            if words or len(labels) != 1:
                raise ValueError("this pipeline draws classes, not words: give one class by its number or name")
            return {"class_labels": [self._class_index(labels[0])]}
        if labels:
            raise ValueError("this pipeline draws words, not classes: say what to draw in words")
        return {"prompt": words}

    def _class_index(self, label: str | int) -> int:
        names = getattr(self.pipe, "labels", {}) or {}
        if label in names:
            return int(names[label])
        network = network_config(self.pipe)
        num_classes = network.get("num_class_embeds") or network.get("num_embeds_ada_norm") or 1000
        count = max(names.values(), default=num_classes - 1) + 1
        if not str(label).isdecimal() or int(label) >= count:
            raise ValueError(f"unknown class {label!r}: give a number from 0 to {count - 1}, or its name")
        return int(label)

    def _variant_or_none(self, task: str) -> Pipeline | None:
        try:
            return self._as_variant(task)
        except UnsupportedError:
            return None

    def _as_variant(self, task: str) -> Pipeline:
        """The pipeline's components in the class that does a task: "text", "edit" or "inpaint". Raises
        UnsupportedError where diffusers has none."""
        if task not in self.variants:
            self.variants[task] = self._build_variant(task)
            self.variants[task].set_progress_bar_config(disable=True)
        return self.variants[task]

    def _build_variant(self, task: str) -> Pipeline:
        import diffusers

        is_inpainting, kind = "mask_image" in self.call_parameters, type(self.pipe)
        is_native = {
            "text": not needs_image(kind),
            "edit": "image" in self.call_parameters and not is_inpainting,
            "inpaint": is_inpainting,
        }
        if is_native[task]:
            return self.pipe
        auto_classes = {"text": "AutoPipelineForText2Image", "edit": "AutoPipelineForImage2Image"}
        vae: Any = getattr(self.pipe, "vae", None)
        latent_channels = vae.config.get("latent_channels") if vae is not None and hasattr(self.pipe, "unet") else None
        if latent_channels and needs_image(kind) and network_config(self.pipe).get("in_channels") != latent_channels:
            variant = None  # its network takes the image as input: it has no other form
        else:
            try:
                variant = getattr(diffusers, auto_classes.get(task, "AutoPipelineForInpainting")).from_pipe(self.pipe)
            except ValueError:
                variant = None
        channels = INPAINT_CHANNELS.get(type(variant).__name__)
        if channels is not None and network_config(variant).get("in_channels") != channels:  # type: ignore[arg-type]
            variant = None
        if variant is not None and unsupported_reason(type(variant)) is None:
            return variant
        if task == "text":
            alternative = (
                "paints parts of a picture: use `inpaint`" if is_inpainting else "changes a picture: use `edit`"
            )
            raise UnsupportedError(f"{kind.__name__} draws nothing from words alone; it {alternative}")
        mask = " and a mask" if task == "inpaint" else ""
        raise UnsupportedError(f"{kind.__name__} has no form that takes a picture{mask}")

    def _render_sizes(
        self, form: Pipeline, picture: Image.Image, size: tuple[int, int] | None
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """The sizes (width, height) in pixels of the pipeline's input and output. size: as requested; None is about
        the image's own, at most twice as wide and high as the form's usual one; for a form that begins with noise
        alone about as large as the usual one."""
        if size is not None:
            Size().check("size", size)
            return (size[0], size[1]), (size[0], size[1])
        area, native, stride = picture.width * picture.height, native_area(form), size_multiple(form)
        target = min(area, max(4 * native, 1024**2)) if "strength" in call_parameters(form) else native
        scale = math.sqrt(target / area)
        width, height = (max(stride, round(side * scale / stride) * stride) for side in picture.size)
        return (width, height), (width, height)

    # ---------------------------------------------------------------- how it is done

    @torch.inference_mode()
    def _run_pipeline(
        self,
        pipe: Pipeline,
        given: Sequence[dict[str, object]],
        seeds: Sequence[int],
        options: dict[str, Any],
        auto_size: bool = False,
    ) -> list[Image.Image]:
        """Generate one image for each seed. given: the pipeline's own arguments of each image: its prompt, and the
        input image if there is one. auto_size: whether the engine chose the size: a form without this option then
        ignores it. Raises ValueError in one line for options that the pipeline does not take, and for what it raises
        itself."""
        call_arguments, solver = self._call_arguments(pipe, options, auto_size)
        seeds = [check_seed(seed) for seed in seeds]
        if self.default_scheduler is not None:
            pipe.scheduler = self._scheduler(pipe, solver)
        parameters, kind = call_parameters(pipe), type(pipe).__name__
        unchecked = call_arguments.keys() - ENGINE_ARGUMENTS - {*supported_options(pipe).values()}
        errors: tuple[type[Exception], ...] = (
            (*PIPELINE_ERRORS, AttributeError, KeyError) if unchecked else PIPELINE_ERRORS
        )
        if "output_type" in parameters:
            call_arguments["output_type"] = "np"
        pipe.set_progress_bar_config(disable=not progress.visible(), leave=False)
        images = []
        for arguments, seed in zip(given, seeds, strict=True):  # one at a time: an image does not depend on the batch
            try:
                result = pipe(**arguments, **call_arguments, generator=[make_rng(seed)])
            except (ValueError, TypeError) as error:
                raise ValueError(f"{kind}: {first_line(error)}") from error
            except errors as error:
                reason = f"{type(error).__name__}: {first_line(error)}"
                raise ValueError(f"{kind} cannot draw this with these options ({reason})") from error
            picture = output_image(result, kind, pipe.dtype)
            if "width" in call_arguments:  # some pipelines generate the nearest size that they support
                picture = resize_to(picture, (call_arguments["width"], call_arguments["height"]))
            images.append(picture)
        return MediaList(images)

    def _call_arguments(
        self, pipe: Pipeline, options: dict[str, Any], auto_size: bool
    ) -> tuple[dict[str, Any], str | None]:
        """The pipeline's own arguments, and the solver's name, of the options of a request. Raises ValueError in one
        line for options that it does not take, that are out of their range, or that would change nothing."""
        argument_by_option, parameters, kind = supported_options(pipe), call_parameters(pipe), type(pipe).__name__
        option_by_argument = {
            pipeline_arguments: name for name, pipeline_arguments in argument_by_option.items() if name != "size"
        }
        requested = {option_by_argument.get(name, name): value for name, value in options.items() if value is not None}
        solver, size = requested.pop("solver", None), requested.pop("size", None)
        if auto_size and "size" not in argument_by_option:
            size = None
        pipeline_arguments = parameters.keys() - ENGINE_ARGUMENTS
        reject_renamed(requested.keys() - pipeline_arguments)
        unsupported = [name for name in requested if name not in argument_by_option and name not in pipeline_arguments]
        if size is not None and "size" not in argument_by_option:
            unsupported.append("size")
        if solver is not None and not compatible_schedulers(pipe, self.default_scheduler):
            unsupported.append("solver")
        if unsupported:
            supported = ", ".join(self.options(pipe)) or "no options"
            raise ValueError(f"{kind} does not take {', '.join(unsupported)}: leave that out (it takes {supported})")
        check_option_ranges(requested)
        call_arguments = {argument_by_option.get(name, name): value for name, value in requested.items()}
        if size is not None:
            Size().check("size", size)
            if size[0] * size[1] > MAX_OUTPUT_PIXELS:
                raise ValueError(
                    f"a picture of {size[0]}x{size[1]} pixels is too large: at most {MAX_OUTPUT_PIXELS:,} pixels"
                )
            call_arguments |= {"width": size[0], "height": size[1]}
        self._check_guidance(kind, argument_by_option, parameters, call_arguments)
        steps, strength = (
            call_arguments.get(argument_by_option.get(name, ""), self.default_values(pipe).get(name))
            for name in ("steps", "strength")
        )
        if steps and strength and int(steps * strength) < 1:
            min_steps = math.ceil(1 / strength)
            exceeds_limit = min_steps > STEPS.high
            advice = "give a greater strength" if exceeds_limit else f"take at least {min_steps} steps"
            raise ValueError(f"{steps} steps at strength {strength:g} leave none to draw: {advice}")
        return call_arguments, solver

    @staticmethod
    def _check_guidance(
        kind: str, argument_names: dict[str, str], takes: Mapping[str, Parameter], call_arguments: dict[str, object]
    ) -> None:
        """Set the prompt of the unconditional branch where guidance needs one. Raises ValueError for a negative prompt
        that would have no effect."""
        scale = argument_names.get("guidance")
        value = call_arguments.get(scale, takes[scale].default) if scale else None
        if "negative_prompt" not in argument_names or not isinstance(value, (int, float)):
            return
        if "negative_prompt" in call_arguments and value <= 1:
            raise ValueError(f"{kind} hears negative_prompt only with guidance above 1, and it is {value:g}: give both")
        if scale == "true_cfg_scale" and value > 1:
            call_arguments.setdefault("negative_prompt", " ")

    def _scheduler(self, pipe: Pipeline, solver: str | None) -> Any:
        if solver is None:
            return self.default_scheduler
        kinds = compatible_schedulers(pipe, self.default_scheduler)
        if solver not in kinds:
            raise ValueError(f"unknown solver {solver!r} for this pipeline: one of {', '.join(kinds)}")
        return kinds[solver].from_config(self.default_scheduler.config)


def check_option_ranges(options: dict[str, OptionValue]) -> None:
    """Raises ValueError in one line for a value out of its range. asked: values by the options' names."""
    if "guidance" in options:  # one scale
        GUIDANCE_SCALE.check("guidance", options["guidance"])
    for group in (PipelineOptions, EditOptions, PromptOptions):
        resolve(group, options)


def check_prompt_text(name: str, words: object, expected: str) -> None:
    """Raises ValueError in one line for what is no text, or empty. name and wanted: what it is and what to give, for
    the message."""
    if not isinstance(words, str):
        raise ValueError(f"{name} must be text, not {type(words).__name__}: {expected}")
    if not words.strip():
        raise ValueError(f"{name} is empty: {expected}")


def check_seed(seed: object) -> int:
    """The seed as an int of 64 bits. Raises ValueError in one line for anything else."""
    return SEED.check("seed", seed)


def output_image(result: Any, kind: str, dtype: torch.dtype) -> Image.Image:
    """The image in a pipeline's output.

    Args:
        result: what the pipeline returns.
        kind: name of its class.
        dtype: of its weights.

    Returns:
        The image, in RGB.

    Raises:
        ValueError: where a safety checker withholds it.
        NonFiniteError: where it has values that are not finite.
    """
    if any(getattr(result, "nsfw_content_detected", None) or []):
        raise ValueError(f"{kind}'s safety checker withholds the picture: ask in other words or with another seed")
    images = result.images if hasattr(result, "images") else result.image
    if isinstance(images[0], Image.Image):
        return images[0].convert("RGB")
    values_HWC = np.asarray(images[0])
    if not np.isfinite(values_HWC).all():
        raise NonFiniteError("pixels", dtype)
    if values_HWC.dtype != np.uint8:
        values_HWC = (values_HWC * 255).round().astype("uint8")
    return Image.fromarray(values_HWC.squeeze(-1) if values_HWC.shape[-1] == 1 else values_HWC).convert("RGB")


def resize_to(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image at a size (width, height) in pixels; the image itself where it has this size."""
    return picture if picture.size == tuple(size) else picture.resize(size, Image.Resampling.LANCZOS)
