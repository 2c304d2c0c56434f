"""Any diffusers pipeline that draws, behind the interface of `Engine`: words or classes in, pictures out.

    engine = unigen.load("stable-diffusion-v1-5/stable-diffusion-v1-5")
    image = engine.generate("a shiba inu", seed=0, steps=20, guidance=7.5, sampler="dpm++")
    edited = engine.edit(image, "a shiba inu in the snow", strength=0.6)
    painted = engine.inpaint(image, "a red ball", mask)

The pipeline's own `__call__` says what it takes; what it does not take is refused by name. Editing and inpainting are
the pipeline's own parts in diffusers' image-to-image and inpainting forms, where it has them. A picture's randomness is
its own, so it does not depend on the batch. The file refuses to know: schedules, networks, prompts' encoders.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from unigen import hub
from unigen.images import read_image, read_mask
from unigen.request import check_size
from unigen.sequence import Document, as_words
from unigen.templates import Output, Unable

INDEX = "model_index.json"
SAMPLERS = {
    "euler": "EulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "deis": "DEISMultistepScheduler",
}
"""Of pipelines that are no flow."""
FLOW_SAMPLERS = {
    "euler": "FlowMatchEulerDiscreteScheduler",
    "heun": "FlowMatchHeunDiscreteScheduler",
}

GLM_SIZE, GLM_STRIDE = (1024, 1024), 32
"""Of GLM-Image's pictures where no size is asked for, and what sizes are multiples of; in pixels."""

OPTIONS = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "negative": "negative_prompt",
    "size": "height",
    "strength": "strength",
}
"""What options are called here, and by pipelines; a size is their height and width."""


class PipelineEngine:
    """Draws with one pipeline. Not safe to share between threads."""

    outputs: tuple[Output, ...] = ("image",)
    sees = False
    """May a picture be part of what is asked?"""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.usual = pipe.scheduler
        self.takes = inspect.signature(pipe.__call__).parameters
        defaults = {name: self.takes[own].default for name, own in OPTIONS.items() if own in self.takes}
        self.sampling = {name: value for name, value in defaults.items() if isinstance(value, (int, float))}
        """Options that have a value where nothing is asked for."""
        pipe.set_progress_bar_config(disable=True)

    # ---------------------------------------------------------------- what users call

    def generate(self, prompt: Any, output: Output = "image", *, n: int = 1, seed: int = 0, **options: Any) -> Any:
        """A PIL image of words, or of a class by its number; n > 1 gives a list, with seeds seed, seed + 1 ..

        options: steps, guidance, sampler, size (width, height) and negative (what it shall not be), as far as the
        pipeline takes them. Raises ValueError in one line for bad input.
        """
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"n must be a whole number of at least 1, not {n}")
        drawn = self.generate_batch([prompt] * n, [seed + i for i in range(n)], output, **options)
        return drawn[0] if n == 1 else drawn

    def generate_batch(
        self, prompts: Sequence[Any], seeds: Sequence[int] | None = None, output: Output = "image", **options: Any
    ) -> list[Any]:
        """One picture a prompt; each is what `generate` gives for that prompt and seed alone."""
        if output != "image":
            raise ValueError(f"this model cannot answer with {output}: it can with image")
        given = [self._conditions(Document.of(prompt)) for prompt in prompts]
        return self._draw(self.pipe, given, range(len(prompts)) if seeds is None else seeds, options)

    def stream(self, prompt: Any, output: Output = "image", **options: Any) -> Iterator[Any]:
        """The picture, when it is finished."""
        yield self.generate(prompt, output, **options)

    def edit(
        self, image: Any, instruction: str, *, strength: float | None = None, seed: int = 0, **options: Any
    ) -> Any:
        """The picture drawn anew from where noise has covered a share of it (`strength`, from 0 to 1)."""
        if not instruction.strip():
            raise ValueError("the instruction is empty: say what to change")
        if strength is not None and not 0 < strength <= 1:
            raise ValueError(f"strength lies in (0, 1], not {strength}")
        picture, form = read_image(image), self._form("AutoPipelineForImage2Image", "image")
        words = as_words(instruction)
        asked = Document.of([picture, words] if self.sees else words)
        options |= {} if strength is None else {"strength": strength}
        return self._draw(form, [self._conditions(asked) | {"image": [picture]}], [seed], options)[0]

    def inpaint(self, image: Any, prompt: str, mask: Any, *, seed: int = 0, **options: Any) -> Any:
        """The picture with what is white in the mask (`unigen.images.read_mask`) painted anew."""
        picture, marks = read_image(image), read_mask(mask)
        if picture.size != marks.size:
            raise ValueError(f"the mask is of {marks.size} pixels, the picture of {picture.size}: make them alike")
        form = self._form("AutoPipelineForInpainting", "mask_image")
        given = {"image": [picture], "mask_image": [marks]}
        return self._draw(form, [self._conditions(Document.of(as_words(prompt))) | given], [seed], options)[0]

    def describe(self, image: Any, question: str | None = None, **options: Any) -> str:
        raise ValueError("this model cannot answer with text: pair it with one that reads (--lmm)")

    def info(self) -> dict[str, Any]:
        """What this pipeline is and takes."""
        parts = {name: part for name, part in self.pipe.components.items() if isinstance(part, torch.nn.Module)}
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
        return {
            "family": "diffusion pipeline",
            "pipeline": type(self.pipe).__name__,
            "parts": {name: f"{count / 1e6:.1f}M parameters" for name, count in counts.items()},
            "scheduler": type(self.usual).__name__,
            "draws": "classes" if "class_labels" in self.takes else "words",
            "takes": [name for name, own in OPTIONS.items() if own in self.takes],
            "sampling": self.sampling,
            "outputs": list(self.outputs),
            "device": str(self.pipe.device),
        }

    # ---------------------------------------------------------------- how it is done

    def _conditions(self, document: Document) -> dict[str, Any]:
        """The pipeline's own arguments for words or a class."""
        if document.images():
            raise ValueError("a pipeline draws from words: give a picture to `edit` or `inpaint`")
        words = " ".join((s.text or "").strip() for s in document.segments if s.text)
        labels = [s.label for s in document.segments if s.label is not None]
        if "class_labels" in self.takes:
            if words or len(labels) != 1:
                raise ValueError("this pipeline draws classes, not words: give one class by its number or name")
            return {"class_labels": [self._class(labels[0])]}
        if labels:
            raise ValueError("this pipeline draws words, not classes: say what to draw in words")
        return {"prompt": words} if "prompt" in self.takes else {}

    def _class(self, label: Any) -> int:
        names = getattr(self.pipe, "labels", {}) or {}
        if label in names:
            return int(names[label])
        count = max(names.values(), default=999) + 1
        if not str(label).isdecimal() or int(label) >= count:
            raise ValueError(f"unknown class {label!r}: give a number from 0 to {count - 1}, or its name")
        return int(label)

    def _form(self, kind: str, needs: str) -> Any:
        """The pipeline's parts in another form."""
        import diffusers

        if needs in self.takes:
            return self.pipe
        try:
            form = getattr(diffusers, kind).from_pipe(self.pipe)
        except ValueError as error:
            raise Unable(f"{type(self.pipe).__name__} has no form that takes a picture") from error
        form.set_progress_bar_config(disable=True)
        return form

    @torch.inference_mode()
    def _draw(
        self, pipe: Any, given: Sequence[dict[str, Any]], seeds: Sequence[int], options: dict[str, Any]
    ) -> list[Any]:
        takes = set(inspect.signature(pipe.__call__).parameters)
        asked = {name: value for name, value in options.items() if value is not None}
        sampler, size = asked.pop("sampler", None), asked.pop("size", None)
        if size is not None:
            check_size(size)
            asked |= {"width": size[0], "height": size[1]}
        known = {name: OPTIONS.get(name, name) for name in asked}
        if unheard := [name for name, own in known.items() if own not in takes]:
            heard = ", ".join(short for short, own in OPTIONS.items() if own in takes)
            kind = type(pipe).__name__
            raise ValueError(f"{kind} does not take {', '.join(unheard)}: leave that out (it takes {heard})")
        if asked.get("steps", 1) < 1:
            raise ValueError(f"steps must be at least 1, not {asked['steps']}")
        pipe.scheduler = self._scheduler(sampler)
        named = {known[name]: value for name, value in asked.items()}
        made = []
        for one, seed in zip(given, seeds, strict=True):  # one at a time: a picture does not depend on the batch
            try:
                result = pipe(**one, **named, generator=[torch.Generator().manual_seed(int(seed))])
            except (ValueError, TypeError) as error:
                raise ValueError(f"{type(pipe).__name__}: {hub.first_line(error)}") from error
            made.append(result.images[0])
        return made

    def _scheduler(self, sampler: str | None) -> Any:
        import diffusers

        if sampler is None:
            return self.usual
        kinds = FLOW_SAMPLERS if type(self.usual).__name__.startswith("FlowMatch") else SAMPLERS
        if sampler not in kinds:
            raise ValueError(f"unknown sampler {sampler!r} for this pipeline: one of {', '.join(kinds)}")
        return getattr(diffusers, kinds[sampler]).from_config(self.usual.config)


class GlmImageEngine(PipelineEngine):
    """GLM-Image: a language model writes a picture's tokens, a DiT draws them. Its pipeline has to be told every size,
    and a picture to edit has to be as large as its processor would make it."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        reader = pipe.vision_language_encoder
        tokens = type(reader).get_image_tokens

        def get_image_tokens(features: Any, grids: Any = None) -> Any:
            """transformers wants a list of pictures (C, h, w), of which diffusers gives the one without its list."""
            alone = isinstance(features, torch.Tensor) and features.ndim == 3
            return tokens(reader, [features] if alone else features, grids)

        reader.get_image_tokens = get_image_tokens

    def _draw(
        self, pipe: Any, given: Sequence[dict[str, Any]], seeds: Sequence[int], options: dict[str, Any]
    ) -> list[Any]:
        given = [one | {name: [self._fitted(x) for x in one[name]] for name in one if name == "image"} for one in given]
        usual = given[0]["image"][0].size if given and "image" in given[0] else GLM_SIZE
        devices = [pipe.device] if pipe.device.type == "cuda" else []
        with hub.quiet(), torch.random.fork_rng(devices):  # tokens are drawn by the global state, which it seeds
            return super()._draw(pipe, given, seeds, options | {"size": options.get("size") or usual})

    def _fitted(self, picture: Image.Image) -> Image.Image:
        if max(picture.size) > 4 * min(picture.size):
            raise ValueError(f"GLM-Image reads pictures up to four times as long as wide, not {picture.size}: crop it")
        bounds = self.pipe.processor.image_processor.size
        least, most = bounds["shortest_edge"] ** 0.5, bounds["longest_edge"] ** 0.5
        scale = min(max(1.0, least / min(picture.size)), most / max(picture.size))
        width, height = (max(GLM_STRIDE, round(side * scale / GLM_STRIDE) * GLM_STRIDE) for side in picture.size)
        return picture.resize((width, height), Image.Resampling.BICUBIC)


def is_pipeline(folder: Path) -> bool:
    """Does the folder hold a diffusers pipeline?"""
    return (folder / INDEX).is_file()


def load(folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> PipelineEngine:
    """The pipeline in `folder`, from safetensors alone; no code of the folder is run. Raises ValueError in one line."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    hub.read_json(folder / INDEX)
    try:
        with hub.quiet():
            logging.disable_progress_bar()
            pipe = DiffusionPipeline.from_pretrained(
                folder, dtype=dtype or torch.float32, local_files_only=True, use_safetensors=True
            )
    except Exception as error:  # whatever a damaged part makes its own library raise
        raise ValueError(f"pipeline {folder} cannot be loaded: {hub.first_line(error)}") from error
    kind = GlmImageEngine if type(pipe).__name__ == "GlmImagePipeline" else PipelineEngine
    return kind(pipe.to(device))
