"""Forms (multipart/form-data): their OpenAPI description, and their fields as JSON values."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel

from unigen.options import RENAMED
from unigen.utils.numbers import parse_float, parse_int


def form_schema(kind: type[BaseModel], *files: str) -> dict[str, Any]:
    """Return the OpenAPI description of a form.

    Args:
        kind: the schema of its fields.
        files: names of its files; the first one is required.
    """
    schema = kind.model_json_schema()
    schema["properties"] |= {name: {"type": "string", "format": "binary"} for name in files}
    schema["required"] = [*schema.get("required", []), files[0]]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


UNTYPED_NUMBERS = {"frame_count", "frame_duration_ms"}
"""Fields without a type that are accepted at one number only."""


def _leaf_types(annotation: object) -> set[object]:
    """Return the types in an annotation, as in {int, None} for int | None."""
    parts = get_args(annotation)
    return {annotation} if not parts else {leaf for part in parts for leaf in _leaf_types(part)}


def parse_form_fields(kind: type[BaseModel], fields: dict[str, str]) -> dict[str, object]:
    """Convert the fields of a form, which are texts, to the types of JSON.

    Args:
        kind: the schema of the fields, whose annotations say which are numbers.
        fields: texts by name; options may have their old names.

    Returns:
        Values by name. A text that is no number stays as it is, for the error.
    """
    types = {name: _leaf_types(field.annotation) for name, field in kind.model_fields.items()}
    types |= {old: types[new] for old, new in RENAMED.items() if new in types}

    def parse_value(name: str, value: str) -> object:
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
