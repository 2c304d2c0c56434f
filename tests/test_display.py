"""How results look in a notebook.

Run: pytest tests/test_display.py
"""

from __future__ import annotations

import base64
import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import unigen
from unigen.document import Document, Preview, Segment
from unigen.media.display import MAX_PARTS, MediaList


def colours(page: str) -> list[Any]:
    """The first pixel of each picture in the HTML."""
    found = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(data))).getpixel((0, 0)) for data in found]


RED, BLUE = (Image.new("RGB", (16, 16), name) for name in ("red", "blue"))


def test_a_list_of_pictures_is_shown_and_stays_a_list() -> None:
    pictures = MediaList([RED, BLUE])
    assert colours(pictures._repr_html_()) == [(255, 0, 0), (0, 0, 255)]
    assert pictures == [RED, BLUE] and isinstance(pictures, list) and len(pickle.loads(pickle.dumps(pictures))) == 2
    assert isinstance(pictures[:1], MediaList) and pictures[0] is RED
    many = MediaList([RED] * (MAX_PARTS + 3))._repr_html_()
    assert len(colours(many)) == MAX_PARTS and "and 3 more" in many


def test_a_story_is_shown_in_order_and_escaped() -> None:
    page = MediaList(["once <upon> a time", RED, "the end"])._repr_html_()
    assert page.index("once &lt;upon&gt; a time") < page.index("<img") < page.index("the end")
    both = MediaList([("a red dog", RED), ("a blue dog", BLUE)])._repr_html_()
    assert colours(both) == [(255, 0, 0), (0, 0, 255)] and both.index("a blue dog") > both.index("<img")


def test_a_document_is_shown(tmp_path: Path) -> None:
    BLUE.save(tmp_path / "blue.png")
    document = Document(
        [
            Segment(text="what is <this>?"),
            Segment(image=RED),
            Segment(text="a dog", role="assistant"),
            Segment(image=tmp_path / "blue.png", role="assistant"),
            Segment(image=np.full((4, 4, 3), 255, np.uint8)),
            Segment(image=torch.zeros(8, 8, dtype=torch.int64)),
            Segment(image=tmp_path / "none.png"),
            Segment(label="seven"),
        ]
    )
    page = document._repr_html_()
    assert colours(page) == [(255, 0, 0), (0, 0, 255), (255, 255, 255)]
    assert (
        "what is &lt;this&gt;?" in page and "8x8 codes" in page and "does not exist" in page and "class seven" in page
    )
    assert [part for part in re.findall(r"<b>(\w+)</b>", page)] == ["user", "assistant", "user"]


def test_a_preview_is_a_png() -> None:
    shown = Image.open(io.BytesIO(Preview(RED, 0, 1)._repr_png_()))
    assert shown.format == "PNG" and shown.getpixel((0, 0)) == (255, 0, 0)


def test_what_an_engine_gives_is_shown(engine: Any) -> None:
    page = engine._repr_html_()
    assert all(word in page for word in ("<table>", "image_size", "next-token")) and "{" not in page
    assert repr(engine).startswith("Engine(family='tiny', generators=[")
    assert len(colours(engine.generate("a dog", n=2)._repr_html_())) == 2
    assert len(colours(engine.generate_batch(["a dog"])._repr_html_())) == 1
    story = engine.generate("a story", output="interleaved", max_images=1, max_tokens=4)
    assert isinstance(story, MediaList) and isinstance(story._repr_html_(), str)


def test_dir_shows_the_api() -> None:
    assert {"load", "Engine", "Document", "Segment", "Preview", "Guidance"} <= set(dir(unigen))
    assert "annotations" not in dir(unigen) and all(hasattr(unigen, name) for name in dir(unigen))
