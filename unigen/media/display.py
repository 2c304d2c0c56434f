"""How results look in a notebook: HTML and PNG for lists of pictures, stories, documents and models.

Below everything else of the package; it knows strings and PIL pictures only.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, SupportsIndex

if TYPE_CHECKING:
    from PIL.Image import Image

ROW_STYLE = "display:flex;flex-wrap:wrap;gap:8px;align-items:flex-start"
MAX_IMAGE_WIDTH = 256
"""Of a picture in a notebook, at most, in pixels."""
MAX_PARTS = 64
"""Parts of a list that a notebook shows, at most."""


def png_bytes(image: Image) -> bytes:
    """An image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def data_uri(image: Image) -> str:
    """An image as a `data:` address of a PNG, for pages that hold their images."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode()


def part_html(part: Any) -> str:
    """A picture, a text, or a list of both, as HTML."""
    if isinstance(part, list | tuple):
        return f'<div style="{ROW_STYLE}">{"".join(map(part_html, part))}</div>'
    if hasattr(part, "save") and hasattr(part, "size"):
        width = min(max(part.width, 128), MAX_IMAGE_WIDTH)
        return f'<img src="{data_uri(part)}" width="{width}" style="image-rendering:auto" alt="">'
    return f'<div style="max-width:{MAX_IMAGE_WIDTH}px">{html.escape(str(part))}</div>'


def table_html(title: str, values: Mapping[str, object]) -> str:
    """A table of names and values, as HTML."""
    rows = "".join(
        f'<tr><th style="text-align:left;vertical-align:top">{html.escape(str(name))}</th>'
        f'<td style="text-align:left">{html.escape(format_value(value))}</td></tr>'
        for name, value in values.items()
    )
    return f"<b>{html.escape(title)}</b><table>{rows}</table>"


def format_value(value: object) -> str:
    """A fact as people read it: 'text 1024, image 1024', 'next-token (guidance 2.5, top_p 0.5)'."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if not isinstance(value, Mapping):
        return str(value)
    return ", ".join(
        f"{name} ({format_value(nested)})" if isinstance(nested, Mapping | list) else f"{name} {nested}"
        for name, nested in value.items()
    )


class MediaList(list[Any]):
    """A list of pictures and texts. A notebook shows what is in it; everywhere else it is a plain list."""

    def __getitem__(self, index: SupportsIndex | slice) -> Any:
        items = super().__getitem__(index)
        return type(self)(items) if isinstance(index, slice) else items

    def _repr_html_(self) -> str:
        remainder_html = f"<div>and {len(self) - MAX_PARTS} more</div>" if len(self) > MAX_PARTS else ""
        return part_html(list(self)[:MAX_PARTS]) + remainder_html


def turns_html(turns: Iterable[tuple[str, object]]) -> str:
    """A conversation, (role, part) by (role, part), as HTML."""
    rows, previous_role = [], None
    for role, part in turns:
        head = f"<b>{html.escape(role)}</b>" if role != previous_role else ""
        rows.append(f'<div style="margin:4px 0">{head}{part_html(part)}</div>')
        previous_role = role
    return "".join(rows)
