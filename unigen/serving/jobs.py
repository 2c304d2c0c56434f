"""The messages between the server and the model's process: jobs one way, their events the other.

    Job(Document.of("two apples"), "image", {"seed": 3})  ->  Started, Part, Finished     (or Rejected, or Error)

Does not depend on: pipes, engines, HTTP; it imports nothing that models need.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

from PIL import Image

from unigen.document import Document, Preview

if TYPE_CHECKING:
    from unigen.model.template import Output


@dataclass
class Job:
    """One answer that is to be generated."""

    prompt: Document
    """The prompt, text and images."""
    output: Output
    """What the answer is: "text", "image" and the like."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keywords of `Engine.generate`."""
    stop: tuple[str, ...] = ()
    """Texts before which the answer ends."""
    base_image: Image.Image | None = None
    """The image that is inpainted."""
    mask: Image.Image | None = None
    """Where it is inpainted: white."""
    variation: float | None = None
    """Instead of a mask: the share of the image that is drawn anew, at random positions; (0, 1]."""
    num_previews: int = 0
    """Previews of each image, where the model has some."""
    num_candidates: int = 1
    """The answer is the best of so many."""
    extra_settings: dict[str, object] = field(default_factory=dict)
    """What the settings of the answer say besides, such as what was ignored."""


@dataclass
class Ready:
    """The model is loaded."""

    info: ServedModelInfo
    """`Engine.info`, and the outputs that the model can generate."""


@dataclass
class Started:
    """The job runs."""

    settings: dict[str, object]
    """How its images and texts are made, defaults filled in."""


@dataclass
class Part:
    """A piece of text or a finished image."""

    content: str | Image.Image
    """The text or the image."""


@dataclass
class Finished:
    """The answer is complete. Token counts are None where the model does not count."""

    finish_reason: str
    """ "stop" or "length"."""
    prompt_tokens: int | None = None
    text_tokens: int | None = None
    """Generated text tokens."""
    image_tokens: int | None = None
    """Generated image codes."""
    prompt_image_tokens: int = 0
    """Tokens of the prompt that are of images."""


@dataclass
class Rejected:
    """The job asks for something that is not possible; nothing was generated."""

    message: str
    """The reason, in one line."""


@dataclass
class Error:
    """A fault that is not the job's own."""

    message: str
    """What has failed, in one line."""
    retryable: bool = True
    """Whether the same job may succeed when it is sent again."""


@dataclass
class Stats:
    """What the process is doing."""

    num_running: int
    """Jobs in the batch."""
    num_waiting: int
    """Jobs that wait."""
    num_sequences: int
    """Sequences in the batch, one for each branch of guidance."""
    num_cached_tokens: int
    """Positions of the cache in use."""
    num_steps: int
    """Steps of the model since the process started."""
    step_seconds: float
    """Seconds in these steps."""


@dataclass
class Heartbeat:
    """The process is alive."""

    step_seconds: float
    """For how long the model has been in its present step; 0 between steps."""


Event = Ready | Started | Part | Preview | Finished | Rejected | Error | Stats | Heartbeat


class ServedModelInfo(TypedDict, total=False):
    """Description of the served model: the keys of `Engine.info` that the server reads. Others pass through."""

    outputs: list[Output]
    """What the model can answer with."""
    system: bool
    """Whether it follows system messages."""
    sizes: str
    """ "any", or "this one": `image_size` alone."""
    image_size: int
    """Pixels along a side of the images."""


class JobEngine(Protocol):
    """What the server needs of the model: `process.EngineProcess` satisfies it."""

    info: ServedModelInfo
    """Description of the model; empty before it is loaded."""
    ready: asyncio.Event
    """Set while the model is loaded."""
    max_jobs: int
    """Jobs that may run and wait."""
    num_starts: int
    """How often the model's process was started."""
    stats: Stats
    """What the model's process is doing."""

    @property
    def unavailable_reason(self) -> str | None:
        """Why no job can run now; None where it can."""

    @property
    def is_alive(self) -> bool:
        """Whether the model is loaded or may still come back."""

    def run_job(self, job: Job) -> AsyncGenerator[Event, None]:
        """Run a job.

        Yields:
            Its events, the last one `Finished`, `Rejected` or `Error`. Closing the generator drops the job.

        Raises:
            QueueFull: too many jobs wait.
            ModelUnavailable: the model is being loaded.
        """

    async def __aenter__(self) -> object: ...

    async def __aexit__(self, *exception: object) -> None: ...
