"""What is typed in the terminal's conversation."""

from __future__ import annotations

import io
import shlex
from pathlib import Path
from urllib.parse import quote

import pytest
from PIL import Image

from unigen.commands.chat_session import Chat, pasted_paths


@pytest.mark.parametrize(
    "name", ["plain.png", "two words.png", "it's (1) & 2.png", "50% #1.png", 'a "b".png', "ünï.png"]
)
def test_pasted_pictures(name: str, tmp_path: Path) -> None:
    """As terminals paste them: plain, quoted by a shell, with escaped blanks, as addresses, with a blank behind."""
    path = tmp_path / name
    Image.new("RGB", (4, 4), "red").save(path)
    escaped = "".join(c if c.isalnum() or c in "/.-_" else f"\\{c}" for c in str(path))
    address = f"file://{quote(str(path))}"
    forms = [str(path), shlex.quote(str(path)), escaped, address, f"file://localhost{quote(str(path))}", f"'{address}'"]
    for form in forms:
        chat, out = Chat(tmp_path), io.StringIO()
        assert chat.command(f"/image {form} ", out) and len(chat.pending_images) == 1, form
        assert out.getvalue().strip() == f"attached {path}"


def test_several_pictures_and_none(tmp_path: Path) -> None:
    paths = [tmp_path / "a b.png", tmp_path / "c.png"]
    for path in paths:
        Image.new("RGB", (4, 4)).save(path)
    chat = Chat(tmp_path)
    chat.command("/image " + shlex.join(map(str, paths)), io.StringIO())
    assert len(chat.pending_images) == 2
    with pytest.raises(ValueError, match="say /image and the path of a picture"):
        chat.command("/image", io.StringIO())
    for text, named in (("no such.png", "no such.png"), ("'no such.png'", "no such.png"), ("it's.png", "it's.png")):
        assert pasted_paths(text) == [named]
        with pytest.raises(ValueError, match=f"{named} does not exist"):
            chat.command(f"/image {text}", io.StringIO())
