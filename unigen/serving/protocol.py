"""What the server is asked: OpenAI's schema, with the options of our generators beside it. Unknown fields are refused.

Checks forms and ranges alone; what a model can do is checked where the model is. Knows no HTTP and no model.
OpenAI's reference: https://platform.openai.com/docs/api-reference (chat, images).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from unigen.numbers import parse_float, parse_int

MOST_ANSWERS, MOST_CANDIDATES = 16, 8
LONGEST = 100_000
"""Characters of one text."""

LONGEST_STOP = 256
"""Characters of a text before which an answer ends."""

Words = Annotated[str, Field(min_length=1, max_length=LONGEST)]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]


class Strict(BaseModel):
    """Numbers are numbers and not texts; what is not named here is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Drawing(Strict):
    """How pictures are made; None is left to the model. As of `unigen.request.checked`. candidates: among so many
    each answer is the best. stream: in events, as they are made; partial_images: of each picture at most, before it is
    finished."""

    seed: int | None = Field(None, ge=0, lt=1 << 53)
    guidance: float | list[float] | None = None
    generator: str | None = Field(None, max_length=64)
    steps: int | None = Field(None, ge=1, le=10_000)
    top_k: int | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    temperature: float | None = Field(None, ge=0, le=2)
    sampler: str | None = Field(None, max_length=64)
    guidance_kind: str | None = Field(None, max_length=64)
    accelerate: str | None = Field(None, max_length=64)
    size: str | None = Field(None, pattern=r"^([1-9][0-9]{0,4}x[1-9][0-9]{0,4}|auto)$")
    n: int = Field(1, ge=1, le=MOST_ANSWERS)
    candidates: int = Field(1, ge=1, le=MOST_CANDIDATES)
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=3)

    @model_validator(mode="after")
    def _within(self) -> Self:
        if self.partial_images and not self.stream:
            raise ValueError("partial_images is for stream=true")
        if self.n * self.candidates > MOST_ANSWERS:
            raise ValueError(f"n times candidates may be {MOST_ANSWERS} at most, not {self.n * self.candidates}")
        return self

    def options(self) -> dict[str, Any]:
        """What was given, as the engine takes it; the seed and the form of the answer apart."""
        form = {"n", "candidates", "stream", "partial_images"}
        names = set(Drawing.model_fields) - form - {"seed", "size"}
        given = {name: value for name in sorted(names) if (value := getattr(self, name)) is not None}
        if self.size not in (None, "auto"):
            width, _, height = str(self.size).partition("x")
            given["size"] = (int(width), int(height))
        return given


# ---------------------------------------------------------------- /v1/chat/completions


class ImageUrl(Strict):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class TextPart(Strict):
    type: Literal["text"]
    text: str = Field(max_length=LONGEST)


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class Message(Strict):
    """content: parts in order, or a text, which is one part. Of an answer that is given back, as it came."""

    role: Literal["user", "assistant"]
    content: list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]

    @field_validator("content", mode="before")
    @classmethod
    def _parts(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


class StreamOptions(Strict):
    include_usage: bool = False


class ChatRequest(Drawing):
    """modalities: what the answer may hold; left out, all that the model can."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=1000)
    modalities: list[Literal["text", "image"]] | None = Field(None, min_length=1, max_length=2)
    stream_options: StreamOptions | None = None
    stop: list[Stop] | None = Field(None, max_length=4)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    max_images: int | None = Field(None, ge=1, le=64)
    # what some clients always send, and only at the value at which it asks for nothing
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    presence_penalty: float | None = Field(None, ge=0, le=0)
    logprobs: Literal[False] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @model_validator(mode="after")
    def _once(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are the same: give one")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream=true")
        if self.messages[-1].role != "user":
            raise ValueError("the last of the messages must be the user's")
        return self

    def options(self) -> dict[str, Any]:
        most = self.max_tokens or self.max_completion_tokens
        given = {"max_tokens": most, "max_images": self.max_images}
        return super().options() | {name: value for name, value in given.items() if value is not None}


# ---------------------------------------------------------------- /v1/images/...


class ImagesRequest(Drawing):
    """What all requests for pictures share."""

    model: str | None = None
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    background: Literal["auto", "opaque"] | None = None
    quality: Literal["auto"] | None = None
    moderation: Literal["auto"] | None = None

    @model_validator(mode="after")
    def _carried(self) -> Self:
        if self.stream and self.response_format != "b64_json":
            raise ValueError("a stream carries its pictures: leave response_format out")
        return self


class GenerationRequest(ImagesRequest):
    """prompt: what to draw in words; or label, of a model that draws classes: a number or a name."""

    prompt: Words | None = None
    label: int | str | None = None

    @model_validator(mode="after")
    def _one(self) -> GenerationRequest:
        if (self.prompt is None) == (self.label is None):
            raise ValueError("say what to draw: a prompt, or a label for a model that draws classes")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("the prompt is empty: say what to draw")
        return self


class EditRequest(ImagesRequest):
    """The fields beside the files `image` and `mask`: with a mask the prompt says what the whole picture shall show,
    without one what to change."""

    prompt: Words


class VariationRequest(ImagesRequest):
    """vary: the share of the picture that is drawn anew."""

    vary: float = Field(0.5, gt=0, le=1)


class Fault(BaseModel):
    """OpenAI's form of an error; param: the field that is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class FaultAnswer(BaseModel):
    error: Fault


def form_schema(kind: type[BaseModel], *files: str) -> dict[str, Any]:
    """What OpenAPI says of a form with these fields and files, the first of which is required."""
    schema = kind.model_json_schema()
    schema["properties"] |= {name: {"type": "string", "format": "binary"} for name in files}
    schema["required"] = [*schema.get("required", []), files[0]]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


NUMBERS = {"n", "seed", "steps", "top_k", "guidance", "top_p", "temperature", "vary", "partial_images", "candidates"}
FLAGS = {"stream"}


def of_form(fields: dict[str, str]) -> dict[str, Any]:
    """A form's fields, all texts, as JSON would have them."""

    def read(name: str, value: str) -> Any:
        if name in FLAGS:
            return {"true": True, "false": False}.get(value, value)
        for kind in (parse_int, parse_float):
            try:
                return kind(value)
            except ValueError:
                pass
        return value

    return {name: read(name, value) if name in NUMBERS | FLAGS else value for name, value in fields.items()}
