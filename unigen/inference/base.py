"""Base class of engines: the easy calls, written with `generate_results`, and one-line errors for missing features.

An engine subclasses `BaseEngine` and writes `generate_results`, `check` and `info`. It overrides the other methods that
it supports. Does not depend on: models, how answers are generated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, overload

from PIL.Image import Image

from unigen.document import Document, Preview, Prompt
from unigen.inference.protocol import EngineInfo, OptionValue
from unigen.inference.results import RECORD_NOTHING, Answer, GenerationResult, Record, Score
from unigen.media.display import MediaList, table_html
from unigen.media.images import ImageSource
from unigen.model.template import Output, UnsupportedError
from unigen.samplers.seeds import offset_seed
from unigen.utils.option_types import COUNT, SEED

if TYPE_CHECKING:
    from torch import Tensor

    from unigen.model.unified import UnifiedModel


class BaseEngine(ABC):
    """An `InferenceEngine` that answers requests one after another and supports only generation."""

    batched = False
    accepts_images = False
    pipeline: object | None = None
    """See `InferenceEngine.pipeline`."""

    @property
    def local_model(self) -> UnifiedModel | None:
        """See `InferenceEngine.local_model`."""
        return None

    @property
    @abstractmethod
    def outputs(self) -> tuple[Output, ...]:
        """See `InferenceEngine.outputs`."""

    @abstractmethod
    def generate_results(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int] | None = None,
        output: Output = "image",
        *,
        record: Record = RECORD_NOTHING,
        **options: OptionValue,
    ) -> list[GenerationResult]:
        """See `InferenceEngine.generate_results`."""

    @abstractmethod
    def check(self, prompt: Prompt, output: Output, *, seed: int = 0, **options: OptionValue) -> None:
        """See `InferenceEngine.check`."""

    @abstractmethod
    def info(self) -> EngineInfo:
        """See `InferenceEngine.info`."""

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
    def generate(
        self, prompt: Prompt, output: Output = "image", *, n: int = 1, seed: int = 0, **options: OptionValue
    ) -> Answer | list[Answer]:
        """See `InferenceEngine.generate`."""
        self._check_option_names("generate", options)
        n, seed = COUNT.check("n", n), SEED.check("seed", seed)
        answers: list[Answer] = self.generate_batch(
            [prompt] * n, [offset_seed(seed, i) for i in range(n)], output, **options
        )
        return answers[0] if n == 1 else answers

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
    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int] | None = None,
        output: Output = "image",
        **options: OptionValue,
    ) -> list[Image] | list[str] | list[Answer]:
        """See `InferenceEngine.generate_batch`."""
        self._check_option_names("generate_batch", options)
        return MediaList(
            result.output for result in self.generate_results(prompts, seeds, output, record=RECORD_NOTHING, **options)
        )

    def stream(
        self, prompt: Prompt, output: Output = "interleaved", *, seed: int = 0, **options: OptionValue
    ) -> Iterator[str | Image | Preview]:
        """See `InferenceEngine.stream`. The answer comes as a whole."""
        self.check(prompt, output, seed=seed, **options)
        return self._stream_whole(prompt, output, seed, options)

    def _check_option_names(self, method: str, options: Mapping[str, OptionValue]) -> None:
        """Reject options that a method does not have, before anything else is checked.

        Raises:
            ValueError: there is such an option.
        """
        return

    def _stream_whole(
        self, prompt: Prompt, output: Output, seed: int, options: dict[str, OptionValue]
    ) -> Iterator[str | Image | Preview]:
        (answer,) = self.generate_batch([prompt], [seed], output, **options)
        yield from answer if isinstance(answer, list) else [answer]

    def describe(
        self, image: ImageSource, question: str | None = None, *, seed: int = 0, **options: OptionValue
    ) -> str | list[str]:
        """See `InferenceEngine.describe`."""
        raise UnsupportedError("this model cannot answer with text: pair it with one that reads (--lmm)")

    def edit(
        self, image: ImageSource, instruction: str, *, seed: int = 0, **options: OptionValue
    ) -> Image | list[Image]:
        """See `InferenceEngine.edit`."""
        raise UnsupportedError("this model does not edit images: give one that does")

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
        """See `InferenceEngine.inpaint`."""
        raise UnsupportedError("this model does not inpaint images: give one that does")

    def inpaint_window(self, mask: ImageSource) -> tuple[int, int, int, int] | None:
        """See `InferenceEngine.inpaint_window`. Inpainting is not limited to a part of the image."""
        return None

    def generate_joint(
        self, text: str | None = None, image: ImageSource | None = None, **options: OptionValue
    ) -> tuple[str, Image] | list[tuple[str, Image]]:
        """See `InferenceEngine.generate_joint`."""
        raise UnsupportedError("this model does not write a text and an image at once: give one that does")

    def score(self, documents: Sequence[Document], *, per_token: bool = False) -> list[Score]:
        """See `InferenceEngine.score`."""
        raise UnsupportedError("this model gives no likelihoods: give a language model on the local engine")

    def hidden_states(self, prompt: Prompt) -> Tensor:
        """See `InferenceEngine.hidden_states`."""
        raise UnsupportedError("this model gives no hidden states: give a language model on the local engine")

    def default_options(self, output: Output, given: Mapping[str, OptionValue] | None = None) -> dict[str, OptionValue]:
        """See `InferenceEngine.default_options`. No default is known."""
        return {}

    def _repr_html_(self) -> str:
        return table_html(type(self).__name__, self.info())


def check_record(record: Record, supported: Record, reason: str) -> None:
    """Check that an engine can record what a request wants.

    Args:
        record: what the request wants.
        supported: what the engine can record.
        reason: why it cannot record more, and what to do.

    Raises:
        UnsupportedError: the engine cannot record all of it.
    """
    names = [name for name, value in vars(record).items() if value and not getattr(supported, name)]
    if names:
        raise UnsupportedError(f"{', '.join(names)} cannot be recorded here: {reason}")
