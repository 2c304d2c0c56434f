"""What the server and the process that holds the model say to each other: jobs one way, their events the other.

    Job(Document.of("two apples"), "image", {"seed": 3})  ->  Started, Part, Finished     (or Rejected, or Error)

Does not depend on: pipes, engines, HTTP; it loads nothing that models need.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from unigen.document import Document, Preview


@dataclass
class Job:
    """One answer to be made. output, options: as of `Engine.request`. stop: texts before which the answer ends.
    around: a picture that is painted in where the mask is white; vary: instead of a mask, the share of it that is drawn
    anew, by lot. previews: of each picture, where the model has some. candidates: of which the answer is the
    best. notes: what its settings say besides."""

    prompt: Document
    output: Any
    options: dict[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    around: Image.Image | None = None
    mask: Image.Image | None = None
    vary: float | None = None
    previews: int = 0
    candidates: int = 1
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Ready:
    """The model is there. info: as of `Engine.info`."""

    info: dict[str, Any]


@dataclass
class Started:
    """The job runs. settings: how its pictures and texts are made, defaults filled in."""

    settings: dict[str, Any]


@dataclass
class Part:
    """A piece of text or a finished picture."""

    part: str | Image.Image


@dataclass
class Finished:
    """reason: "stop" or "length". prompt, text, image: ids read, ids of text and codes of pictures written; None where
    the model does not count. seen: of the ids read, those of pictures."""

    reason: str
    prompt: int | None = None
    text: int | None = None
    image: int | None = None
    seen: int = 0


@dataclass
class Rejected:
    """The job asks for what cannot be; nothing was made."""

    message: str


@dataclass
class Error:
    """A fault that is not the job's own. again: may it be answered when it is asked again?"""

    message: str
    again: bool = True


@dataclass
class Stats:
    """What the process is doing: jobs that run and that wait, sequences in the batch, positions that the cache holds;
    since it began: steps, and seconds in them."""

    running: int
    waiting: int
    rows: int
    positions: int
    steps: int
    seconds: float


@dataclass
class Heartbeat:
    """The process runs. step: seconds for which the model has been in its present step; 0: in none."""

    step: float


Event = Ready | Started | Part | Preview | Finished | Rejected | Error | Stats | Heartbeat
