"""The contract of engines: what `unigen.load` returns, whatever runs behind it.

    engine: InferenceEngine = unigen.load("unigen-tiny")
    image = engine.generate("two apples")

Every engine has every method. A method that an engine does not support raises `UnsupportedError`, a ValueError, in one
line. `unigen.inference.base.BaseEngine` is the base class of all implementations. Does not depend on: any
implementation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, TypedDict, TypeGuard, overload

from PIL.Image import Image

from unigen.document import Document, Preview, Prompt
from unigen.inference.results import RECORD_NOTHING, Answer, GenerationResult, Record, Score
from unigen.media.images import ImageSource
from unigen.model.template import Output

if TYPE_CHECKING:
    from torch import Tensor

    from unigen.inference.candidates import PreparedRequest
    from unigen.inference.scheduler import Scheduler
    from unigen.model.unified import UnifiedModel

OptionValue: TypeAlias = object
"""The value of an option of a generation. The engine checks its type and range."""


class EngineInfo(TypedDict, total=False):
    """What an engine is and can do: the keys of `unigen info`. Each engine has those that apply."""

    family: str
    """The family of a unified model, "diffusion pipeline" or "transformers"."""
    backbone: str
    """Type and size of the language model of a unified model."""
    model: str
    """Type and size of a plain language model."""
    pipeline: str
    """Class of a pipeline of diffusers."""
    components: dict[str, str]
    """Networks of a pipeline and their sizes."""
    scheduler: str
    """Class of a pipeline's scheduler."""
    context: int
    """Positions of a sequence, at most."""
    image_size: int
    """Pixels along a side of a generated image."""
    sizes: str
    """"any", or "this one": whether images of other sizes can be generated."""
    tokens_per_image: int
    """Codes of an image of this size."""
    vocabulary: dict[str, int]
    """Number of ids of text and of codes."""
    generators: list[str]
    """Names of the image generators."""
    takes: dict[str, list[str]] | list[str]
    """The options of each generator, or of the pipeline."""
    solvers: list[str]
    """Names of the solvers that a pipeline can use."""
    sampling: dict[str, dict[str, OptionValue]] | dict[str, OptionValue]
    """Default values of the options, of each generator or of the pipeline."""
    text_sampling: dict[str, OptionValue]
    """Default values of the options of text."""
    outputs: list[str]
    """Kinds of answers."""
    candidates: bool
    """Whether it can generate several candidates and choose the best."""
    system: bool
    """Whether system messages are followed."""
    classes: list[str]
    """Names of the classes of a class-conditional model."""
    sees: bool
    """Whether it reads images."""
    edit_pipeline: str
    """Class of the pipeline that edits images, or "no"."""
    inpaint_pipeline: str
    """Class of the pipeline that inpaints images, or "no"."""
    prompt_type: str
    """What a pipeline generates images from: "words", "classes" or "no: ..."."""
    text_model: EngineInfo
    """Info of the engine of a composed model that answers with text."""
    image_model: EngineInfo
    """Info of the engine of a composed model that generates images."""
    connector: str
    """Size of the connector between the two models of a composed model."""
    precision: str
    """Precision of the weights, such as "float32"."""
    weights_mb: float
    """Size of the weights, in units of 10^6 bytes."""
    device: str
    """Device of the weights."""
    engine: str
    """"vllm" and its version."""
    vllm: str
    """Whether vLLM can serve the model."""


class InferenceEngine(Protocol):
    """Generates text and images. An engine is not safe to share between threads."""

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The kinds of answers that it can generate."""
        ...

    @property
    def batched(self) -> bool:
        """Whether it generates answers in batches, as a `BatchedEngine` does, and not one after another."""
        ...

    @property
    def accepts_images(self) -> bool:
        """Whether the prompt of an image may contain images."""
        ...

    @property
    def local_model(self) -> UnifiedModel | None:
        """The unified model of the engine; None where this process has none."""
        ...

    @property
    def pipeline(self) -> object | None:
        """The diffusers pipeline of the engine; None where it has none."""
        ...

    @overload
    def generate(
        self,
        prompt: Prompt,
        output: Literal["image"] = "image",
        *,
        n: Literal[1] = 1,
        seed: int = 0,
        **options: OptionValue,
    ) -> Image: ...
    @overload
    def generate(
        self, prompt: Prompt, output: Literal["text"], *, n: Literal[1] = 1, seed: int = 0, **options: OptionValue
    ) -> str: ...
    @overload
    def generate(
        self,
        prompt: Prompt,
        output: Literal["interleaved", "joint"],
        *,
        n: Literal[1] = 1,
        seed: int = 0,
        **options: OptionValue,
    ) -> list[Image | str]: ...
    @overload
    def generate(
        self, prompt: Prompt, output: Output = "image", *, n: int = 1, seed: int = 0, **options: OptionValue
    ) -> Answer | list[Answer]: ...
    def generate(self, prompt, output="image", *, n=1, seed=0, **options):  # type: ignore[no-untyped-def]
        """Answer a prompt.

        Args:
            prompt: the prompt.
            output: kind of the answer.
            n: number of answers, with seeds seed, seed + 1, ...
            seed: seed of the answer; the same seed gives the same answer.
            **options: options of the generation.

        Returns:
            A PIL image, a string, or a list of both for "interleaved" and "joint"; a list of n answers where n > 1.

        Raises:
            ValueError: in one line, for bad input.
        """
        ...

    @overload
    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int] | None = None,
        output: Literal["image"] = "image",
        **options: OptionValue,
    ) -> list[Image]: ...
    @overload
    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int] | None = None,
        *,
        output: Literal["text"],
        **options: OptionValue,
    ) -> list[str]: ...
    @overload
    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int] | None = None,
        output: Output = "image",
        **options: OptionValue,
    ) -> list[Answer]: ...
    def generate_batch(self, prompts, seeds=None, output="image", **options):  # type: ignore[no-untyped-def]
        """One answer for each prompt, the same as that of `generate` for this prompt and seed alone.

        Args:
            prompts: the prompts.
            seeds: one for each prompt; None is 0, 1, ...
            output: kind of the answer.
            **options: options of the generation.

        Returns:
            The answers, in the prompts' order.

        Raises:
            ValueError: in one line, for bad input.
        """
        ...

    def generate_results(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int] | None = None,
        output: Output = "image",
        *,
        record: Record = RECORD_NOTHING,
        **options: OptionValue,
    ) -> list[GenerationResult]:
        """The answers of `generate_batch`, with records of their generation.

        Args:
            prompts: the prompts.
            seeds: one for each prompt; None is 0, 1, ...
            output: kind of the answer.
            record: what to record beside ids and codes.
            **options: options of the generation.

        Returns:
            One result for each prompt, in the prompts' order.

        Raises:
            ValueError: in one line, for bad input, and where the engine cannot record all of `record`.
        """
        ...

    def stream(
        self, prompt: Prompt, output: Output = "interleaved", *, seed: int = 0, **options: OptionValue
    ) -> Iterator[str | Image | Preview]:
        """The parts of one answer, as they are generated.

        Args:
            prompt: the prompt.
            output: kind of the answer.
            seed: seed of the answer.
            **options: options of the generation.

        Returns:
            Pieces of text, finished images, and before an image its previews, where the options request some.

        Raises:
            ValueError: in one line, at once, for bad input.
        """
        ...

    def describe(
        self, image: ImageSource, question: str | None = None, *, seed: int = 0, **options: OptionValue
    ) -> str | list[str]:
        """Describe an image, or answer a question about it.

        Args:
            image: a path, a PIL image, or anything else that `read_image` takes.
            question: None requests a caption.
            seed: seed of the answer.
            **options: options of the generation; n > 1 gives a list.

        Returns:
            The text.

        Raises:
            ValueError: in one line, for bad input, and where the engine does not answer with text.
        """
        ...

    def edit(
        self, image: ImageSource, instruction: str, *, seed: int = 0, **options: OptionValue
    ) -> Image | list[Image]:
        """Change an image as an instruction says.

        Args:
            image: a path, a PIL image, or anything else that `read_image` takes.
            instruction: what to change.
            seed: seed of the image.
            **options: options of the generation.

        Returns:
            The changed image.

        Raises:
            ValueError: in one line, for bad input, and where the engine does not edit.
        """
        ...

    def inpaint(
        self,
        image: ImageSource,
        prompt: str,
        mask: ImageSource | None = None,
        *,
        variation: float | None = None,
        seed: int = 0,
        **options: OptionValue,
    ) -> Image | list[Image]:
        """Regenerate a part of an image; the rest of it stays.

        Args:
            image: a path, a PIL image, or anything else that `read_image` takes.
            prompt: what the image shall show.
            mask: of the image's size, white where to generate.
            variation: instead of a mask, the fraction in (0, 1] of the image, drawn at random, that is regenerated.
            seed: seed of the image and of the variation.
            **options: options of the generation.

        Returns:
            The image.

        Raises:
            ValueError: in one line, for bad input, and where the engine does not inpaint.
        """
        ...

    def inpaint_window(self, mask: ImageSource) -> tuple[int, int, int, int] | None:
        """The part of an image that inpainting is limited to: left, top, right, bottom in pixels.

        Args:
            mask: as for `inpaint`.

        Returns:
            The window where the mask marks pixels outside it, else None.
        """
        ...

    def generate_joint(
        self, text: str | None = None, image: ImageSource | None = None, **options: OptionValue
    ) -> tuple[str, Image] | list[tuple[str, Image]]:
        """Generate a text and an image that belong together, both at once.

        Args:
            text: a given text, which stays; None is generated.
            image: a given image, which stays as its codes; None is generated.
            **options: options of the generation; n > 1 gives a list.

        Returns:
            The text and the image.

        Raises:
            ValueError: in one line, for bad input, and where no generator generates both.
        """
        ...

    def score(self, documents: Sequence[Document], *, per_token: bool = False) -> list[Score]:
        """Log-likelihoods of the assistant's segments in documents.

        Args:
            documents: each with at least one segment of the assistant.
            per_token: whether to return the log-probability of each id.

        Returns:
            One score for each document.

        Raises:
            ValueError: in one line, for bad input, and where the engine does not score.
        """
        ...

    def hidden_states(self, prompt: Prompt) -> Tensor:
        """Hidden states (S, D) of a prompt, after the last norm.

        Args:
            prompt: the prompt.

        Returns:
            One state for each of the S positions of the prompt.

        Raises:
            ValueError: in one line, for bad input, and where the engine does not give them.
        """
        ...

    def info(self) -> EngineInfo:
        """The engine's properties and features."""
        ...

    def check(self, prompt: Prompt, output: Output, *, seed: int = 0, **options: OptionValue) -> None:
        """Check a request without answering it.

        Args:
            prompt: the prompt.
            output: kind of the answer.
            seed: seed of the answer.
            **options: options of the generation.

        Raises:
            ValueError: in one line, for what `generate` would reject before it starts.
        """
        ...

    def default_options(self, output: Output, given: Mapping[str, OptionValue] | None = None) -> dict[str, OptionValue]:
        """Default values of options.

        Args:
            output: kind of the answer.
            given: options of a request, on which some defaults depend.

        Returns:
            The values by the options' names, as far as they are known.
        """
        ...


class BatchedEngine(InferenceEngine, Protocol):
    """An engine with continuous batching: requests run together and may join while others run."""

    def prepare(
        self,
        prompt: Prompt,
        output: Output,
        *,
        seed: int = 0,
        candidates: int = 1,
        image: ImageSource | None = None,
        mask: ImageSource | None = None,
        variation: float | None = None,
        record: Record = RECORD_NOTHING,
        **options: OptionValue,
    ) -> PreparedRequest:
        """Validate a request.

        Args:
            prompt: the prompt.
            output: kind of the answer.
            seed: seed of the answer.
            candidates: number of answers that are generated, of which the best is kept.
            image: an image to be inpainted.
            mask: of the image's size, white where to generate.
            variation: instead of a mask, the fraction in (0, 1] of the image that is regenerated.
            record: what to record beside ids and codes.
            **options: options of the generation.

        Returns:
            The sequences to run, and how their answers become one.

        Raises:
            ValueError: in one line, for bad input.
        """
        ...

    def select_best(self, prepared: Sequence[PreparedRequest], answers: Sequence[Sequence[Answer]]) -> list[int]:
        """Choose the best answer of each prepared request.

        Args:
            prepared: requests of several candidates each.
            answers: of each request the answers of its candidates.

        Returns:
            Of each request the index of its best answer.
        """
        ...

    def new_scheduler(self) -> Scheduler:
        """A scheduler of this engine, without sequences."""
        ...


def is_batched(engine: InferenceEngine) -> TypeGuard[BatchedEngine]:
    """Whether an engine has continuous batching.

    Args:
        engine: any.
    """
    return engine.batched
