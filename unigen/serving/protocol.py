"""What the server is asked: OpenAI's schema, with the options of our generators beside it. Unknown fields are refused.

Of OpenAI's own fields each is followed, or accepted at the values that ask for nothing (`accept_only`), or refused by
its name. A null is the same as leaving a field out.

Checks forms and ranges alone; what a model can do is checked where the model is. Knows no HTTP and no model.
OpenAI's reference: https://platform.openai.com/docs/api-reference (chat, images).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model, field_validator, model_validator

from unigen.inference.options import AnswerCount, AnswerLimits, Previews, RequestOptions, VariationOptions
from unigen.option_groups import collect
from unigen.options import DRAWING, RENAMED, GroupType, Option, groups_for, merge_declared
from unigen.utils.numbers import parse_float, parse_int
from unigen.utils.option_types import MAX_TEXT_LENGTH

MAX_CHOICES = 16
"""Pictures or answers of one request, candidates counted."""

MAX_STOP_LENGTH = 256
"""Characters of a text before which an answer ends."""

COMMON_SIZES = ("auto", "256x256", "512x512", "1024x1024", "1024x1536", "1536x1024", "1024x1792", "1792x1024")
"""Sizes that clients offer to choose from, whatever the model draws."""

SYSTEM_ROLES = ("system", "developer")
"""Roles of messages that say how to answer."""

PromptText = Annotated[str, Field(min_length=1, max_length=MAX_TEXT_LENGTH)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
LabelText = Annotated[str, Field(max_length=MAX_TEXT_LENGTH)]
"""A label of the client's own, such as `user`: nothing is asked for by it. Halves of characters, which UTF-8 cannot
hold, are refused in it, as in all texts that have a length."""


def accept_only(*values: Any, says: str) -> AfterValidator:
    """A field that is accepted at these values, at which it asks for nothing; says: what to do about all others."""

    def check(value: Any) -> None:
        if not any(
            value == accepted_value and isinstance(value, bool) == isinstance(accepted_value, bool)
            for accepted_value in values
        ):
            raise ValueError(says)

    return AfterValidator(check)


def option_field(group: GroupType, name: str, default: Any = None) -> Any:
    """A field for an option of a group, in the range that one request may use."""
    return _field(group.options()[name], default)


def _field(declared: Option, default: Any = None) -> Any:
    constraints: dict[str, Any] = (declared.served or declared.type).json_type()[1]
    return Field(default, description=declared.describe(), **constraints)


class StrictModel(BaseModel):
    """Numbers are numbers and not texts; what is not named here is refused. A null is left out."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None or name not in cls.model_fields}


def derive_fields(name: str, groups: Iterable[GroupType]) -> Any:
    """A model with a field for each served option of the groups, which is left to the model where it is None.

    Args:
        name: of the class.
        groups: of options; of those with one name the widest range counts.
    """
    fields: dict[str, Any] = {}
    for option_name, (_, declared) in merge_declared(groups).items():
        if field_name := declared.field_name(option_name):
            annotation: Any = (declared.served or declared.type).json_type()[0]
            fields[field_name] = annotation | None, _field(declared)
    return create_model(name, __base__=StrictModel, **fields)


if TYPE_CHECKING:

    class DrawingFields(StrictModel):
        """The fields that servers read by their names."""

        size: str | None
        temperature: float | None
        top_p: float | None

    class EditFields(StrictModel): ...

else:
    DrawingFields = derive_fields("DrawingFields", groups_for(collect(), *DRAWING))
    EditFields = derive_fields("EditFields", groups_for(collect(), "edit"))


class GenerationFields(DrawingFields):
    """How pictures are made: the options that one of our engines takes. None is left to the model."""

    seed: int | None = option_field(RequestOptions, "seed")
    n: int = option_field(AnswerCount, "n", 1)
    candidates: int = option_field(AnswerCount, "candidates", 1)
    stream: bool = False
    partial_images: int = option_field(Previews, "previews", 0)

    @model_validator(mode="before")
    @classmethod
    def _read_old_names(cls, data: Any) -> Any:
        """Options by the names that they had in version 0.1."""
        if not isinstance(data, dict):
            return data
        for old, new in RENAMED.items():
            if data.get(old) is not None and new in cls.model_fields:
                if data.get(new) is not None:
                    raise ValueError(f"{old} is called {new} now: give one")
                data = {name: value for name, value in data.items() if name != old} | {new: data[old]}
        return data

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        if self.partial_images and not self.stream:
            raise ValueError("partial_images is for stream=true")
        if self.n * self.candidates > MAX_CHOICES:
            raise ValueError(f"n times candidates may be {MAX_CHOICES} at most, not {self.n * self.candidates}")
        return self

    def options(self) -> dict[str, Any]:
        """What was given, as the engine takes it; the seed and the form of the answer apart."""
        given = {}
        for name, (_, declared) in merge_declared(groups_for(collect(), *DRAWING, "edit")).items():
            value = getattr(self, declared.field_name(name), None)
            if name not in FORM_OPTIONS and value is not None:
                given[name] = declared.type.from_json(value)
        return {name: value for name, value in given.items() if value is not None}


FORM_OPTIONS = ("seed", "n", "candidates", "previews", "max_tokens", "max_images")
"""Options that servers give to each answer themselves, or that have fields of several names."""

# ---------------------------------------------------------------- /v1/chat/completions


class ImageUrl(StrictModel):
    url: str
    detail: Literal["auto", "low", "high", "original"] = "auto"
    format: LabelText | None = None


class TextPart(StrictModel):
    """cache_control, prompt_cache_breakpoint: of clients that tell their server what to keep; nothing is kept here."""

    type: Literal["text"]
    text: str = Field(max_length=MAX_TEXT_LENGTH)
    cache_control: dict[str, Any] | None = None
    prompt_cache_breakpoint: dict[str, Any] | None = None


class RefusalPart(StrictModel):
    type: Literal["refusal"]
    refusal: str = Field(max_length=MAX_TEXT_LENGTH)


class ImagePart(StrictModel):
    """image_url: with its url, or the url alone."""

    type: Literal["image_url"]
    image_url: ImageUrl
    cache_control: dict[str, Any] | None = None
    prompt_cache_breakpoint: dict[str, Any] | None = None

    @field_validator("image_url", mode="before")
    @classmethod
    def _url(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value


class AnswerImage(ImagePart):
    """A picture of an answer that is given back: its number, and how many characters of `content` stand before it."""

    type: Literal["image_url"] = "image_url"
    index: int | None = Field(None, ge=0)
    offset: int | None = Field(None, ge=0)
    partial: Literal[False] = False


class Message(StrictModel):
    """content: parts in order, or a text, which is one part. images: those of an answer that is given back as it came.

    What else SDKs give back with an answer is accepted and not read, but for calls of tools, which are refused."""

    role: Literal["user", "assistant", "system", "developer"]
    content: list[Annotated[TextPart | ImagePart | RefusalPart, Field(discriminator="type")]] = []
    images: list[AnswerImage] = []
    name: LabelText | None = None
    refusal: str | None = Field(None, max_length=MAX_TEXT_LENGTH)
    annotations: list[Any] | None = None
    reasoning: Any = None
    reasoning_content: Any = None
    reasoning_details: Any = None
    thinking_blocks: Any = None
    provider_specific_fields: Any = None
    audio: Annotated[Any, accept_only(says="this server speaks no sound: leave it out")] = None
    function_call: Annotated[Any, accept_only(says="this model calls no functions: leave it out")] = None
    tool_calls: Annotated[Any, accept_only([], says="this model calls no tools: leave it out")] = None
    parsed: Any = None
    cache_control: dict[str, Any] | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _parts(cls, content: Any) -> Any:
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

    def parts(self) -> list[tuple[str, str, str]]:
        """What was said, in order, without blank texts: the kind, "text" or "image"; the text or url; its place."""
        parts: list[tuple[str, str, str]] = []
        for number, part in enumerate(self.content):
            place = f"content.{number}"
            if isinstance(part, ImagePart):
                parts.append(("image", part.image_url.url, f"{place}.image_url.url"))
            else:
                parts.append(("text", part.text if isinstance(part, TextPart) else part.refusal, place))
        if not parts and self.refusal:
            parts.append(("text", self.refusal, "refusal"))
        if self.images:
            words = "".join(said for kind, said, _ in parts if kind == "text")
            parts = [*self._interleave_images(words), *(part for part in parts if part[0] == "image")]
        return [part for part in parts if part[0] == "image" or part[1].strip()]

    def _interleave_images(self, words: str) -> Iterator[tuple[str, str, str]]:
        """The words with the images where they stood among them: at the end, where an image does not say."""
        places = [len(words) if image.offset is None else image.offset for image in self.images]
        start = 0
        for number in sorted(range(len(places)), key=places.__getitem__):
            yield "text", words[start : places[number]], "content"
            yield "image", self.images[number].image_url.url, f"images.{number}.image_url.url"
            start = max(start, places[number])
        yield "text", words[start:], "content"


class StreamOptions(StrictModel):
    include_usage: bool = False
    include_obfuscation: Annotated[Any, accept_only(False, says="streams are not padded here: leave it out")] = None


NO_TOOLS = "this model calls no tools: leave it out"
NOT_STORED = "nothing is stored here: leave it out"
SINGLE_MODEL = "there is one model here: leave it out"
FIXED_CHAT_TEMPLATE = "the model's own form is used: leave it out"
NO_REASONING = "this model does not reason: leave it out"


class ClientLabels(StrictModel):
    """Labels of the client's own, and what only says how to serve: nothing is asked for by them."""

    user: LabelText | None = None
    safety_identifier: LabelText | None = None
    prompt_cache_key: LabelText | None = None
    prompt_cache_retention: LabelText | None = None
    prompt_cache_options: dict[str, Any] | None = None
    metadata: dict[LabelText, LabelText] | None = Field(None, max_length=16)
    parallel_tool_calls: bool | None = None


class ChatRequest(GenerationFields, ClientLabels):
    """modalities: what the answer may hold; left out, as of `unigen.model.template.default_output`. content_format:
    "parts" gives the `content` of a whole answer that holds pictures as a list of parts in order."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=1000)
    modalities: list[Literal["text", "image"]] | None = Field(None, min_length=1, max_length=2)
    content_format: Literal["string", "parts"] = "string"
    stream_options: StreamOptions | None = None
    stop: list[StopText] | None = Field(None, max_length=4)
    max_tokens: int | None = option_field(AnswerLimits, "max_tokens")
    max_completion_tokens: int | None = option_field(AnswerLimits, "max_tokens")
    max_images: int | None = option_field(AnswerLimits, "max_images")
    # what clients send though they ask for nothing by it
    audio: Annotated[Any, accept_only(says="this server speaks no sound: leave it out")] = None
    frequency_penalty: Annotated[Any, accept_only(0, says="penalties are not known here: leave it out")] = None
    presence_penalty: Annotated[Any, accept_only(0, says="penalties are not known here: leave it out")] = None
    repetition_penalty: Annotated[Any, accept_only(1, says="penalties are not known here: leave it out")] = None
    min_p: Annotated[Any, accept_only(0, says="there are top_p and top_k: leave it out")] = None
    function_call: Annotated[Any, accept_only("none", "auto", says=NO_TOOLS)] = None
    functions: Annotated[Any, accept_only([], says=NO_TOOLS)] = None
    tools: Annotated[Any, accept_only([], says=NO_TOOLS)] = None
    tool_choice: Annotated[Any, accept_only("none", "auto", says=NO_TOOLS)] = None
    logit_bias: Annotated[Any, accept_only({}, says="ids have no bias here: leave it out")] = None
    logprobs: Annotated[Any, accept_only(False, says="no probabilities are given here: leave it out")] = None
    top_logprobs: Annotated[Any, accept_only(0, says="no probabilities are given here: leave it out")] = None
    moderation: Annotated[Any, accept_only(says="nothing is moderated here: leave it out")] = None
    prediction: Annotated[Any, accept_only(says="answers are not predicted here: leave it out")] = None
    reasoning_effort: Annotated[Any, accept_only("none", "minimal", says=NO_REASONING)] = None
    response_format: Annotated[
        Any, accept_only({"type": "text"}, says='text alone is written here: {"type": "text"}')
    ] = None
    service_tier: Annotated[Any, accept_only("auto", "default", says="there is one tier: leave it out")] = None
    store: Annotated[Any, accept_only(False, says=NOT_STORED)] = None
    verbosity: Annotated[
        Any, accept_only("medium", says="the model chooses its length: leave it out, or give max_tokens")
    ] = None
    web_search_options: Annotated[Any, accept_only(says="nothing is searched here: leave it out")] = None
    # of OpenRouter's clients
    image_config: Annotated[Any, accept_only({}, says="give size: leave it out")] = None
    include_reasoning: bool | None = None
    plugins: Annotated[Any, accept_only([], says="there are no plugins here: leave it out")] = None
    provider: Annotated[Any, accept_only({}, says=SINGLE_MODEL)] = None
    reasoning: Annotated[
        Any, accept_only({}, {"enabled": False}, {"effort": "none"}, {"exclude": True}, says=NO_REASONING)
    ] = None
    route: Annotated[Any, accept_only("fallback", says=SINGLE_MODEL)] = None
    transforms: Annotated[Any, accept_only([], says="messages are read as they are: leave it out")] = None
    usage: dict[Literal["include"], bool] | None = None
    # of vLLM's and Qwen's
    add_generation_prompt: Annotated[Any, accept_only(True, says="the model answers: leave it out")] = None
    add_special_tokens: Annotated[Any, accept_only(False, True, says=FIXED_CHAT_TEMPLATE)] = None
    bad_words: Annotated[Any, accept_only([], says="no words are forbidden here: leave it out")] = None
    best_of: Annotated[Any, accept_only(1, says="there are candidates: leave it out")] = None
    chat_template_kwargs: Annotated[Any, accept_only({}, {"enable_thinking": False}, says=FIXED_CHAT_TEMPLATE)] = None
    continue_final_message: Annotated[Any, accept_only(False, says="answers are begun anew: leave it out")] = None
    echo: Annotated[Any, accept_only(False, says="what was asked is not repeated: leave it out")] = None
    enable_thinking: Annotated[Any, accept_only(False, says=NO_REASONING)] = None
    ignore_eos: Annotated[Any, accept_only(False, says="answers end where the model ends them: leave it out")] = None
    include_stop_str_in_output: Annotated[Any, accept_only(False, says="answers end before a stop: leave it out")] = (
        None
    )
    length_penalty: Annotated[Any, accept_only(1, 0, says="penalties are not known here: leave it out")] = None
    min_tokens: Annotated[Any, accept_only(0, says="the model chooses its length: leave it out")] = None
    priority: Annotated[Any, accept_only(0, says="who comes first is answered first: leave it out")] = None
    request_id: LabelText | None = None
    skip_special_tokens: Annotated[Any, accept_only(True, says="text has none: leave it out")] = None
    spaces_between_special_tokens: Annotated[Any, accept_only(True, False, says="text has none: leave it out")] = None
    stop_token_ids: Annotated[Any, accept_only([], says="give texts as stop: leave it out")] = None
    thinking: Annotated[Any, accept_only({"type": "disabled"}, says=NO_REASONING)] = None
    use_beam_search: Annotated[Any, accept_only(False, says="there are candidates: leave it out")] = None

    @field_validator("top_k", mode="before")
    @classmethod
    def _normalize_top_k(cls, top_k: Any) -> Any:
        """vLLM's and llama.cpp's way to say that it is off."""
        return 0 if isinstance(top_k, int) and top_k == -1 else top_k

    @model_validator(mode="before")
    @classmethod
    def _drop_disabled_tools(cls, data: Any) -> Any:
        """Tools that may not be called ask for nothing."""
        if isinstance(data, dict) and data.get("tool_choice") == "none":
            return {name: value for name, value in data.items() if name not in ("tools", "functions")}
        return data

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_as_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @model_validator(mode="after")
    def _check_consistent(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are the same: give one")
        if self.stream and self.content_format == "parts":
            raise ValueError("content_format is for whole answers: a stream has its parts in order")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream=true")
        said = [message for message in self.messages if message.role not in SYSTEM_ROLES]
        if not said or said[-1].role != "user":
            raise ValueError("the last of the messages must be the user's")
        return self

    def options(self) -> dict[str, Any]:
        max_tokens = self.max_tokens or self.max_completion_tokens
        options = {"max_tokens": max_tokens, "max_images": self.max_images}
        return super().options() | {name: value for name, value in options.items() if value is not None}


# ---------------------------------------------------------------- /v1/images/...


class ImagesRequest(GenerationFields):
    """What all requests for pictures share."""

    model: str | None = None
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int | None = Field(None, ge=0, le=100)
    user: LabelText | None = None
    safety_identifier: LabelText | None = None
    # what clients send though they ask for nothing by it
    background: Annotated[Any, accept_only("auto", "opaque", says="pictures are opaque here: leave it out")] = None
    complexity: Annotated[Any, accept_only(says="pictures are not planned here: leave it out")] = None
    frame_count: Annotated[Any, accept_only(1, says="pictures do not move here: leave it out")] = None
    frame_duration_ms: Annotated[Any, accept_only(says="pictures do not move here: leave it out")] = None
    moderation: Annotated[Any, accept_only("auto", "low", says="nothing is moderated here: leave it out")] = None
    quality: Annotated[
        Any, accept_only("auto", "standard", says="there is one quality: leave it out, or try candidates")
    ] = None
    style: Annotated[Any, accept_only("vivid", says="say the style in the prompt and leave it out")] = None
    svg: Annotated[Any, accept_only(says="pictures are png, jpeg or webp here: leave it out")] = None

    @model_validator(mode="after")
    def _check_output_format(self) -> Self:
        if self.output_format == "png" and self.output_compression not in (None, 100):
            raise ValueError("output_compression is for output_format jpeg or webp")
        if self.stream and self.response_format != "b64_json":
            raise ValueError("a stream carries its pictures: leave response_format out")
        return self


class GenerationRequest(ImagesRequest):
    """prompt: what to draw in words; or label, of a model that draws classes: a number or a name."""

    prompt: PromptText | None = None
    label: int | LabelText | None = None

    @model_validator(mode="after")
    def _check_prompt_or_label(self) -> GenerationRequest:
        if (self.prompt is None) == (self.label is None):
            raise ValueError("say what to draw: a prompt, or a label for a model that draws classes")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("the prompt is empty: say what to draw")
        return self


class EditRequest(EditFields, ImagesRequest):
    """The fields beside the files `image` and `mask`: with a mask the prompt says what the whole picture shall show,
    without one what to change."""

    prompt: PromptText
    input_fidelity: Annotated[
        Any, accept_only("low", says="there is one fidelity: leave it out, or mark by a mask")
    ] = None


class VariationRequest(ImagesRequest):
    """The fields beside the file `image`."""

    variation: float = option_field(VariationOptions, "variation", 0.5)


class ErrorBody(BaseModel):
    """OpenAI's form of an error; param: the field that is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorBody


def form_schema(kind: type[BaseModel], *files: str) -> dict[str, Any]:
    """What OpenAPI says of a form with these fields and files, the first of which is required."""
    schema = kind.model_json_schema()
    schema["properties"] |= {name: {"type": "string", "format": "binary"} for name in files}
    schema["required"] = [*schema.get("required", []), files[0]]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


UNTYPED_NUMBERS = {"frame_count", "frame_duration_ms"}
"""Numbers that are accepted at one value alone."""


def _leaf_types(annotation: Any) -> set[Any]:
    """The types of which an annotation is made."""
    parts = get_args(annotation)
    return {annotation} if not parts else {leaf for part in parts for leaf in _leaf_types(part)}


def parse_form_fields(kind: type[BaseModel], fields: dict[str, str]) -> dict[str, Any]:
    """A form's fields, all texts, as JSON would have them.

    Args:
        kind: the model that they are for, whose annotations say which are numbers.
        fields: by name; old names of options too.
    """
    types = {name: _leaf_types(field.annotation) for name, field in kind.model_fields.items()}
    types |= {old: types[new] for old, new in RENAMED.items() if new in types}

    def parse_value(name: str, value: str) -> Any:
        if bool in types.get(name, ()):
            return {"true": True, "false": False}.get(value, value)
        if not types.get(name, set()) & {int, float} and name not in UNTYPED_NUMBERS:
            return value
        for kind in (parse_int, parse_float):
            try:
                return kind(value)
            except ValueError:
                pass
        return value

    return {name: parse_value(name, value) for name, value in fields.items()}
