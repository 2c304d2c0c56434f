"""Schemas of requests: OpenAI's fields, with the options of our generators beside them. Unknown fields are rejected.

Each field of OpenAI's is followed, accepted at the values at which it has no effect (`accept_only`), or rejected by
name. A null counts as a missing field.

Only types and ranges are checked here; the model checks what it supports. Does not depend on: HTTP, models.
OpenAI's reference: https://platform.openai.com/docs/api-reference (chat, images).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model, field_validator, model_validator

from unigen.inference.options import AnswerCount, AnswerLimits, Previews, RequestOptions, VariationOptions
from unigen.option_groups import collect
from unigen.options import DRAWING, GroupType, Option, groups_for, merge_declared
from unigen.serving.old_names import OldNamesMixin
from unigen.utils.option_types import MAX_TEXT_LENGTH

MAX_CHOICES = 16
"""Answers of one request, including their candidates."""
MAX_STOP_LENGTH = 256
"""Characters of a text at which an answer stops."""
COMMON_SIZES = ("auto", "256x256", "512x512", "1024x1024", "1024x1536", "1536x1024", "1024x1792", "1792x1024")
"""Sizes that clients offer in menus, whatever the model supports."""
SYSTEM_ROLES = ("system", "developer")
"""Roles of system messages."""

PromptText = Annotated[str, Field(min_length=1, max_length=MAX_TEXT_LENGTH)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
LabelText = Annotated[str, Field(max_length=MAX_TEXT_LENGTH)]
"""A label of the client's, such as `user`, which has no effect. Like all texts with a length, it may not contain lone
surrogates, which UTF-8 cannot express."""


def accept_only(*values: object, message: str) -> AfterValidator:
    """Return the validator of a field that is accepted only at values at which it has no effect.

    Args:
        values: the accepted values.
        message: the error for other values: why, and what to do about it.
    """

    def check(value: object) -> None:
        if not any(
            value == accepted_value and isinstance(value, bool) == isinstance(accepted_value, bool)
            for accepted_value in values
        ):
            raise ValueError(message)

    return AfterValidator(check)


def option_field(group: GroupType, name: str, default: Any = None) -> Any:
    """Return the field of an option, with its description and the range that one request may use.

    Args:
        group: declares the option.
        name: of the option.
        default: of the field.
    """
    return _field(group.options()[name], default)


def _field(declared: Option, default: Any = None) -> Any:
    constraints: dict[str, Any] = (declared.served or declared.type).json_type()[1]
    return Field(default, description=declared.describe(), **constraints)


Obfuscation = Annotated[object, accept_only(False, message="streams are not padded here: leave it out")]


class StrictModel(BaseModel):
    """A JSON object. Numbers must not be strings, unknown fields are rejected, and a null counts as a missing field."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None or name not in cls.model_fields}


def derive_fields(name: str, groups: Iterable[GroupType]) -> Any:
    """Return a schema with a field for each option that the server offers; None is the model's default.

    Args:
        name: of the class.
        groups: of options. Of options with the same name, the one with the widest range counts.
    """
    fields: dict[str, Any] = {}
    for option_name, (_, declared) in merge_declared(groups).items():
        if field_name := declared.field_name(option_name):
            annotation: Any = (declared.served or declared.type).json_type()[0]
            fields[field_name] = annotation | None, _field(declared)
    return create_model(name, __base__=StrictModel, **fields)


if TYPE_CHECKING:

    class DrawingFields(StrictModel):
        """The fields that the server reads by name."""

        size: str | None
        temperature: float | None
        top_p: float | None

    class EditFields(StrictModel):
        """The fields of an edit that the server reads by name."""

else:
    DrawingFields = derive_fields("DrawingFields", groups_for(collect(), *DRAWING))
    EditFields = derive_fields("EditFields", groups_for(collect(), "edit"))


class GenerationFields(DrawingFields, OldNamesMixin):
    """How an answer is generated: the options of all engines. None is the model's default."""

    seed: int | None = option_field(RequestOptions, "seed")
    n: int = option_field(AnswerCount, "n", 1)
    candidates: int = option_field(AnswerCount, "candidates", 1)
    stream: bool = False
    partial_images: int = option_field(Previews, "previews", 0)

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        if self.partial_images and not self.stream:
            raise ValueError("partial_images is for stream=true")
        if self.n * self.candidates > MAX_CHOICES:
            raise ValueError(f"n times candidates may be {MAX_CHOICES} at most, not {self.n * self.candidates}")
        return self

    def options(self) -> dict[str, Any]:
        """Return the given options as keywords of the engine, without the seed and `FORM_OPTIONS`."""
        given = {}
        for name, (_, declared) in merge_declared(groups_for(collect(), *DRAWING, "edit")).items():
            value = getattr(self, declared.field_name(name), None)
            if name not in FORM_OPTIONS and value is not None:
                given[name] = declared.type.from_json(value)
        return {name: value for name, value in given.items() if value is not None}


FORM_OPTIONS = ("seed", "n", "candidates", "previews", "max_tokens", "max_images")
"""Options that the server sets for each answer, or whose fields have several names."""

# ---------------------------------------------------------------- /v1/chat/completions


class ImageUrl(StrictModel):
    """An image by its address: a data URI, or a link where the server fetches."""

    url: str
    detail: Literal["auto", "low", "high", "original"] = "auto"
    format: LabelText | None = None


class TextPart(StrictModel):
    """A text in a message."""

    type: Literal["text"]
    text: str = Field(max_length=MAX_TEXT_LENGTH)
    cache_control: dict[str, object] | None = None
    """Hints of clients for a prompt cache, which have no effect; likewise `prompt_cache_breakpoint`."""
    prompt_cache_breakpoint: dict[str, object] | None = None


class RefusalPart(StrictModel):
    """The assistant's refusal in a message."""

    type: Literal["refusal"]
    refusal: str = Field(max_length=MAX_TEXT_LENGTH)


class ImagePart(StrictModel):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: ImageUrl
    """An object with its url, or the url alone."""
    cache_control: dict[str, object] | None = None
    prompt_cache_breakpoint: dict[str, object] | None = None

    @field_validator("image_url", mode="before")
    @classmethod
    def _url_as_object(cls, value: object) -> object:
        return {"url": value} if isinstance(value, str) else value


class AnswerImage(ImagePart):
    """An image of an earlier answer, as the server sent it."""

    type: Literal["image_url"] = "image_url"
    index: int | None = Field(None, ge=0)
    offset: int | None = Field(None, ge=0)
    """Number of characters of `content` before the image; the end if it is missing."""
    partial: Literal[False] = False


class MessagePart(NamedTuple):
    """A text or an image of a message."""

    kind: Literal["text", "image"]
    value: str
    """The text, or the url of the image."""
    path: str
    """Where it stands in the message, as in "content.0.image_url.url"."""


class Message(StrictModel):
    """A message of the conversation. Further fields that SDKs send back with an answer are accepted and ignored, except
    for calls of tools, which are rejected."""

    role: Literal["user", "assistant", "system", "developer"]
    content: list[Annotated[TextPart | ImagePart | RefusalPart, Field(discriminator="type")]] = []
    """Parts in order, or a text, which is one part."""
    images: list[AnswerImage] = []
    """Images of an earlier answer, as the server sent them."""
    name: LabelText | None = None
    refusal: str | None = Field(None, max_length=MAX_TEXT_LENGTH)
    annotations: list[object] | None = None
    reasoning: object = None
    reasoning_content: object = None
    reasoning_details: object = None
    thinking_blocks: object = None
    provider_specific_fields: object = None
    audio: Annotated[object, accept_only(message="this server speaks no sound: leave it out")] = None
    function_call: Annotated[object, accept_only(message="this model calls no functions: leave it out")] = None
    tool_calls: Annotated[object, accept_only([], message="this model calls no tools: leave it out")] = None
    parsed: object = None
    cache_control: dict[str, object] | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _content_as_parts(cls, content: object) -> object:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    @model_validator(mode="after")
    def _check_complete(self) -> Message:
        if self.role != "assistant":
            if "content" not in self.model_fields_set:
                raise ValueError("a message needs its content")
            if self.images:
                raise ValueError("images are of answers: give the user's pictures as parts of content")
        if self.role in SYSTEM_ROLES and any(isinstance(part, ImagePart) for part in self.content):
            raise ValueError(f"a {self.role} message holds text alone")
        return self

    def parts(self) -> list[MessagePart]:
        """Return the texts and images in order, without blank texts."""
        parts: list[MessagePart] = []
        for i, part in enumerate(self.content):
            path = f"content.{i}"
            if isinstance(part, ImagePart):
                parts.append(MessagePart("image", part.image_url.url, f"{path}.image_url.url"))
            else:
                parts.append(MessagePart("text", part.text if isinstance(part, TextPart) else part.refusal, path))
        if not parts and self.refusal:
            parts.append(MessagePart("text", self.refusal, "refusal"))
        if self.images:
            text = "".join(part.value for part in parts if part.kind == "text")
            parts = [*self._interleave_images(text), *(part for part in parts if part.kind == "image")]
        return [part for part in parts if part.kind == "image" or part.value.strip()]

    def _interleave_images(self, text: str) -> Iterator[MessagePart]:
        """Split the text at the offsets of the images; an image without an offset stands at the end."""
        offsets = [len(text) if image.offset is None else image.offset for image in self.images]
        start = 0
        for i in sorted(range(len(offsets)), key=offsets.__getitem__):
            yield MessagePart("text", text[start : offsets[i]], "content")
            yield MessagePart("image", self.images[i].image_url.url, f"images.{i}.image_url.url")
            start = max(start, offsets[i])
        yield MessagePart("text", text[start:], "content")


class StreamOptions(StrictModel):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: Obfuscation = None


NO_TOOLS = "this model calls no tools: leave it out"
NOT_STORED = "nothing is stored here: leave it out"
SINGLE_MODEL = "there is one model here: leave it out"
FIXED_CHAT_TEMPLATE = "the model's own form is used: leave it out"
NO_REASONING = "this model does not reason: leave it out"


class ClientLabels(StrictModel):
    """Labels of the client's and hints for serving, none of which has an effect."""

    user: LabelText | None = None
    safety_identifier: LabelText | None = None
    prompt_cache_key: LabelText | None = None
    prompt_cache_retention: LabelText | None = None
    prompt_cache_options: dict[str, object] | None = None
    metadata: dict[LabelText, LabelText] | None = Field(None, max_length=16)
    parallel_tool_calls: bool | None = None


class ChatRequest(GenerationFields, ClientLabels):
    """Body of `/v1/chat/completions`."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=1000)
    modalities: list[Literal["text", "image"]] | None = Field(None, min_length=1, max_length=2)
    """What the answer may contain; missing: text for a question about an image, else as the model decides."""
    content_format: Literal["string", "parts"] = "string"
    """"parts" makes `content` of a whole answer with images a list of its parts in order."""
    stream_options: StreamOptions | None = None
    stop: list[StopText] | None = Field(None, max_length=4)
    max_tokens: int | None = option_field(AnswerLimits, "max_tokens")
    max_completion_tokens: int | None = option_field(AnswerLimits, "max_tokens")
    max_images: int | None = option_field(AnswerLimits, "max_images")
    # fields of clients that are accepted at the values at which they change nothing
    audio: Annotated[object, accept_only(message="this server speaks no sound: leave it out")] = None
    frequency_penalty: Annotated[object, accept_only(0, message="penalties are not known here: leave it out")] = None
    presence_penalty: Annotated[object, accept_only(0, message="penalties are not known here: leave it out")] = None
    repetition_penalty: Annotated[object, accept_only(1, message="penalties are not known here: leave it out")] = None
    min_p: Annotated[object, accept_only(0, message="there are top_p and top_k: leave it out")] = None
    function_call: Annotated[object, accept_only("none", "auto", message=NO_TOOLS)] = None
    functions: Annotated[object, accept_only([], message=NO_TOOLS)] = None
    tools: Annotated[object, accept_only([], message=NO_TOOLS)] = None
    tool_choice: Annotated[object, accept_only("none", "auto", message=NO_TOOLS)] = None
    logit_bias: Annotated[object, accept_only({}, message="ids have no bias here: leave it out")] = None
    logprobs: Annotated[object, accept_only(False, message="no probabilities are given here: leave it out")] = None
    top_logprobs: Annotated[object, accept_only(0, message="no probabilities are given here: leave it out")] = None
    moderation: Annotated[object, accept_only(message="nothing is moderated here: leave it out")] = None
    prediction: Annotated[object, accept_only(message="answers are not predicted here: leave it out")] = None
    reasoning_effort: Annotated[object, accept_only("none", "minimal", message=NO_REASONING)] = None
    response_format: Annotated[
        object, accept_only({"type": "text"}, message='text alone is written here: {"type": "text"}')
    ] = None
    service_tier: Annotated[object, accept_only("auto", "default", message="there is one tier: leave it out")] = None
    store: Annotated[object, accept_only(False, message=NOT_STORED)] = None
    verbosity: Annotated[
        object, accept_only("medium", message="the model chooses its length: leave it out, or give max_tokens")
    ] = None
    web_search_options: Annotated[object, accept_only(message="nothing is searched here: leave it out")] = None
    # fields of OpenRouter
    image_config: Annotated[object, accept_only({}, message="give size: leave it out")] = None
    include_reasoning: bool | None = None
    plugins: Annotated[object, accept_only([], message="there are no plugins here: leave it out")] = None
    provider: Annotated[object, accept_only({}, message=SINGLE_MODEL)] = None
    reasoning: Annotated[
        object, accept_only({}, {"enabled": False}, {"effort": "none"}, {"exclude": True}, message=NO_REASONING)
    ] = None
    route: Annotated[object, accept_only("fallback", message=SINGLE_MODEL)] = None
    transforms: Annotated[object, accept_only([], message="messages are read as they are: leave it out")] = None
    usage: dict[Literal["include"], bool] | None = None
    # fields of vLLM and Qwen
    add_generation_prompt: Annotated[object, accept_only(True, message="the model answers: leave it out")] = None
    add_special_tokens: Annotated[object, accept_only(False, True, message=FIXED_CHAT_TEMPLATE)] = None
    bad_words: Annotated[object, accept_only([], message="no words are forbidden here: leave it out")] = None
    best_of: Annotated[object, accept_only(1, message="there are candidates: leave it out")] = None
    chat_template_kwargs: Annotated[
        object, accept_only({}, {"enable_thinking": False}, message=FIXED_CHAT_TEMPLATE)
    ] = None
    continue_final_message: Annotated[object, accept_only(False, message="answers are begun anew: leave it out")] = None
    echo: Annotated[object, accept_only(False, message="what was asked is not repeated: leave it out")] = None
    enable_thinking: Annotated[object, accept_only(False, message=NO_REASONING)] = None
    ignore_eos: Annotated[object, accept_only(False, message="answers end where the model ends them: leave it out")] = (
        None
    )
    include_stop_str_in_output: Annotated[
        object, accept_only(False, message="answers end before a stop: leave it out")
    ] = None
    length_penalty: Annotated[object, accept_only(1, 0, message="penalties are not known here: leave it out")] = None
    min_tokens: Annotated[object, accept_only(0, message="the model chooses its length: leave it out")] = None
    priority: Annotated[object, accept_only(0, message="who comes first is answered first: leave it out")] = None
    request_id: LabelText | None = None
    skip_special_tokens: Annotated[object, accept_only(True, message="text has none: leave it out")] = None
    spaces_between_special_tokens: Annotated[
        object, accept_only(True, False, message="text has none: leave it out")
    ] = None
    stop_token_ids: Annotated[object, accept_only([], message="give texts as stop: leave it out")] = None
    thinking: Annotated[object, accept_only({"type": "disabled"}, message=NO_REASONING)] = None
    use_beam_search: Annotated[object, accept_only(False, message="there are candidates: leave it out")] = None

    @field_validator("top_k", mode="before")
    @classmethod
    def _normalize_top_k(cls, top_k: object) -> object:
        """In vLLM and llama.cpp, -1 turns top-k off."""
        return 0 if isinstance(top_k, int) and top_k == -1 else top_k

    @model_validator(mode="before")
    @classmethod
    def _drop_disabled_tools(cls, data: object) -> object:
        """Tools that may not be called have no effect."""
        if isinstance(data, dict) and data.get("tool_choice") == "none":
            return {name: value for name, value in data.items() if name not in ("tools", "functions")}
        return data

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_as_list(cls, stop: object) -> object:
        return [stop] if isinstance(stop, str) else stop

    @model_validator(mode="after")
    def _check_consistent(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are the same: give one")
        if self.stream and self.content_format == "parts":
            raise ValueError("content_format is for whole answers: a stream has its parts in order")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream=true")
        turns = [message for message in self.messages if message.role not in SYSTEM_ROLES]
        if not turns or turns[-1].role != "user":
            raise ValueError("the last of the messages must be the user's")
        return self

    def options(self) -> dict[str, Any]:
        """The options of the generation that the request gives, by name."""
        max_tokens = self.max_tokens or self.max_completion_tokens
        options = {"max_tokens": max_tokens, "max_images": self.max_images}
        return super().options() | {name: value for name, value in options.items() if value is not None}


# ---------------------------------------------------------------- /v1/images/...


class ImagesRequest(GenerationFields):
    """Fields of all requests for images."""

    model: str | None = None
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int | None = Field(None, ge=0, le=100)
    user: LabelText | None = None
    safety_identifier: LabelText | None = None
    # fields of clients that are accepted at the values at which they change nothing
    background: Annotated[object, accept_only("auto", "opaque", message="pictures are opaque here: leave it out")] = (
        None
    )
    complexity: Annotated[object, accept_only(message="pictures are not planned here: leave it out")] = None
    frame_count: Annotated[object, accept_only(1, message="pictures do not move here: leave it out")] = None
    frame_duration_ms: Annotated[object, accept_only(message="pictures do not move here: leave it out")] = None
    moderation: Annotated[object, accept_only("auto", "low", message="nothing is moderated here: leave it out")] = None
    quality: Annotated[
        object, accept_only("auto", "standard", message="there is one quality: leave it out, or try candidates")
    ] = None
    style: Annotated[object, accept_only("vivid", message="say the style in the prompt and leave it out")] = None
    svg: Annotated[object, accept_only(message="pictures are png, jpeg or webp here: leave it out")] = None

    @model_validator(mode="after")
    def _check_output_format(self) -> Self:
        if self.output_format == "png" and self.output_compression not in (None, 100):
            raise ValueError("output_compression is for output_format jpeg or webp")
        if self.stream and self.response_format != "b64_json":
            raise ValueError("a stream carries its pictures: leave response_format out")
        return self


class GenerationRequest(ImagesRequest):
    """Body of `/v1/images/generations`: a prompt, or a label for a class-conditional model."""

    prompt: PromptText | None = None
    label: int | LabelText | None = None
    """Number or name of a class."""

    @model_validator(mode="after")
    def _check_prompt_or_label(self) -> GenerationRequest:
        if (self.prompt is None) == (self.label is None):
            raise ValueError("say what to draw: a prompt, or a label for a model that draws classes")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("the prompt is empty: say what to draw")
        return self


class EditRequest(EditFields, ImagesRequest):
    """Fields of the form of `/v1/images/edits`, beside its files `image` and `mask`."""

    prompt: PromptText
    """With a mask: what the whole image shows. Without one: what to change."""
    input_fidelity: Annotated[
        object, accept_only("low", message="there is one fidelity: leave it out, or mark by a mask")
    ] = None


class VariationRequest(ImagesRequest):
    """Fields of the form of `/v1/images/variations`, beside its file `image`."""

    variation: float = option_field(VariationOptions, "variation", 0.5)
