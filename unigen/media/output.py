"""Writing results for people: pictures, grids and self-contained pages.

Everything is written under a temporary name in the same folder and then renamed, so that a full disk or an interrupt
never leaves half a file where a good one was. Does not depend on models: PIL images and strings in, files out.

    from unigen.media.output import check_output, save_image
    path = check_output("out.png", PICTURES)        # before the work: a ValueError if nothing can be written there
    save_image(path, image)
"""

from __future__ import annotations

import functools
import html
import math
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import quote

from unigen.media.display import data_uri
from unigen.utils.option_types import MAX_IMAGES
from unigen.utils.text import shorten

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_UMASK = threading.Lock()
PAGE_FORMATS = {".html": "HTML", ".htm": "HTML", ".md": "Markdown"}

PAGE_CSS = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #667085; --paper: #faf9f7; --card: #fff;
        --line: #e6e3dd; --accent: #b4552d }
@media (prefers-color-scheme: dark) {
  :root { --ink: #eceae6; --soft: #a09c94; --paper: #16171a; --card: #1f2125; --line: #33353b; --accent: #e58a5f } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 17px/1.6 system-ui, sans-serif;
       overflow-wrap: anywhere }
main { max-width: 62rem; margin: 0 auto; padding: 3rem 1.25rem 5rem }
h1 { font-size: 2.1rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.02em }
h2 { font-size: 1.25rem; margin: 3rem 0 .2rem }
p { margin: .4rem 0 }
.lead, figcaption, .note { color: var(--soft) }
.row { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1.1rem; margin: 1.1rem 0 }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 12px; overflow: hidden }
figure img { display: block; width: 100%; aspect-ratio: 1; object-fit: cover }
figcaption { padding: .7rem .9rem .8rem; font-size: .86rem; line-height: 1.45 }
figcaption b { display: block; color: var(--ink); font-weight: 600; font-size: .95rem }
.wide { grid-column: span 2 }
.top { align-items: start }
.story { grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)) }
.story figure { max-width: 24rem }
.story figcaption, .end { color: var(--ink); font-size: 1.02rem }
code { font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, monospace; overflow-wrap: anywhere }
pre { background: var(--card); border: 1px solid var(--line); border-left: 3px solid var(--accent); border-radius: 8px;
      padding: .6rem .8rem; margin: .6rem 0; overflow-x: auto; white-space: pre-wrap }
footer { margin-top: 3.5rem; padding-top: 1rem; border-top: 1px solid var(--line);
         color: var(--soft); font-size: .86rem }
""".strip()


def check_output(path: str | Path, kinds: dict[str, str]) -> Path:
    """The path, if a file of one of `kinds` (suffix -> format) can be written there now; else a ValueError."""
    if "\0" in str(path):
        raise ValueError(f"cannot write {shorten(str(path))}: the name holds a zero byte; choose another name")
    path, display_path = Path(path), shorten(str(path), 120)
    if path.suffix.lower() not in kinds:
        raise ValueError(f"cannot write {display_path}: the name must end in one of {', '.join(kinds)}")
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # of a name or a path that is too long, or a folder that may not be entered
        raise ValueError(f"cannot write {display_path}: {error.strerror}; choose another name") from error
    if path.is_dir():
        raise ValueError(f"cannot write {display_path}: it is a folder; name a file in it")
    if path.parent.exists() and not path.parent.is_dir():
        raise ValueError(
            f"cannot write {display_path}: {str(path.parent)!r} is a file and no folder; choose another folder"
        )
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {display_path}: no folder {str(path.parent)!r}; make it first")
    try:
        with tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path))):
            pass
    except OSError as error:
        raise ValueError(f"cannot write {display_path}: {error.strerror}; choose another folder") from error
    return path


def check_story(path: str | Path) -> Path:
    """The same of a story's page; beside one in Markdown its pictures have to have room, too."""
    path = check_output(path, PAGE_FORMATS)
    if PAGE_FORMATS[path.suffix.lower()] == "Markdown":
        check_output(_story_image_path(path, MAX_IMAGES.high - 1), IMAGE_FORMATS)
    return path


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Calls write(file) on a temporary file beside `path` and renames it; a ValueError if the disk refuses."""
    write_all_atomically({path: write})


def write_all_atomically(writes: Mapping[Path, Callable[[IO[bytes]], object]]) -> None:
    """The same of several files, none of which is renamed before all are written. A temporary file's name is short,
    whatever the final one is. A symbolic link stays one: the file to which it points is written."""
    temporary_files: dict[Path, str] = {}
    path = Path()
    try:
        for path, write in writes.items():
            folder = os.path.dirname(os.path.realpath(path))
            _clear_scratch(Path(folder))
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".unigen-", suffix=".tmp", delete=False) as file:
                temporary_files[path] = file.name
                write(file)
                os.chmod(file.name, 0o666 & ~_umask())
        for path in list(temporary_files):
            os.replace(temporary_files[path], os.path.realpath(path))
            del temporary_files[path]
    except OSError as error:
        raise ValueError(f"cannot write {shorten(str(path), 120)}: {error.strerror or error}") from error
    finally:
        for name in temporary_files.values():
            os.unlink(name)


@functools.cache
def _clear_scratch(folder: Path) -> None:
    """Remove, once a process, the temporary files that killed processes left in a folder: those of an hour ago, since
    writing one takes seconds."""
    for stale_file in folder.glob(".unigen-*.tmp"):
        with suppress(OSError):
            if (
                re.fullmatch(r"\.unigen-\w{8}\.tmp", stale_file.name)
                and time.time() - stale_file.lstat().st_mtime > 3600
            ):
                stale_file.unlink()


def _umask() -> int:
    """It is read by setting it, so by one thread at a time: else another would read, and leave, what the first set."""
    with _UMASK:
        mask = os.umask(0o077)
        os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8. The file is replaced whole."""
    write_atomically(path, _text_writer(text))


def save_image(path: Path, image: Image) -> None:
    """Write an image in the format of the file's suffix. The file is replaced whole."""
    write_atomically(path, _image_writer(path, image))


def _text_writer(text: str) -> Callable[[IO[bytes]], object]:
    """What writes a text as UTF-8; what that cannot hold, such as bytes of a path in another encoding, is escaped."""
    return lambda file: file.write(text.encode(errors="backslashreplace"))


def _image_writer(path: Path, image: Image) -> Callable[[IO[bytes]], object]:
    return lambda file: image.save(file, format=IMAGE_FORMATS[path.suffix.lower()])


def _story_image_path(path: Path, number: int) -> Path:
    """A picture of a story in Markdown."""
    return path.with_name(f"{path.stem}-{number}.png")


def numbered_paths(path: Path, n: int) -> list[Path]:
    """out.png for one picture; out-0.png, out-1.png, ... for several."""
    return [path] if n == 1 else [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(n)]


def image_grid(images: Sequence[Image], gap: int = 2, columns: int | None = None) -> Image:
    """The pictures in one, row by row, `gap` pixels of white between them. columns: None is as square as it goes."""
    from PIL import Image as PILImage

    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = max(im.width for im in images), max(im.height for im in images)
    sheet = PILImage.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, ((i % columns) * (width + gap), (i // columns) * (height + gap)))
    return sheet


def html_page(title: str, body: str) -> str:
    """A whole HTML page without scripts or links to elsewhere; `body` is HTML, `title` is text."""
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{PAGE_CSS}\n</style>\n<main>\n{body}\n</main>\n</html>\n"
    )


def html_figure(image: Image, caption: str = "", alt: str = "") -> str:
    """A picture in a card; `caption` is HTML, `alt` is text."""
    caption_html = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure><img src="{data_uri(image)}" alt="{html.escape(alt)}">{caption_html}</figure>'


def story_body(parts: Sequence[str | Image]) -> str:
    """Text and pictures in order, as HTML: a picture carries the text before it, as in a picture book."""
    rows, text = [], ""
    for part in parts:
        if isinstance(part, str):
            text = f"{text} {part.strip()}".strip()
        else:
            rows.append(html_figure(part, html.escape(text), text))
            text = ""
    end = f'\n<p class="end">{html.escape(text)}</p>' if text else ""
    return '<div class="row story">\n' + "\n".join(rows) + f"\n</div>{end}"


def write_story(path: Path, title: str, parts: Sequence[str | Image], provenance: str) -> list[Path]:
    """One self-contained HTML page, or a Markdown file with its pictures beside it; returns what was written.

    provenance: one line of text on how the story was made (command, model, seed).
    """
    if PAGE_FORMATS[path.suffix.lower()] == "HTML":
        head = f"<h1>{html.escape(title)}</h1>"
        foot = f"<footer>Made by <code>{html.escape(provenance)}</code></footer>"
        write_text(path, html_page(title, "\n".join([head, story_body(parts), foot])))
        return [path]
    lines: list[str] = [f"# {' '.join(title.split())}"]
    pictures: dict[Path, Callable[[IO[bytes]], object]] = {}
    for part in parts:
        if isinstance(part, str):
            lines.append(part.strip())
            continue
        picture = _story_image_path(path, len(pictures))
        pictures[picture] = _image_writer(picture, part)
        lines.append(f"![]({quote(os.fsencode(picture.name))})")
    lines.append(f"Made by {markdown_code(provenance)}")
    write_all_atomically({**pictures, path: _text_writer("\n\n".join(lines) + "\n")})
    return [path, *pictures]


def markdown_code(text: str) -> str:
    """A text as code in Markdown, between more backticks than follow each other in it."""
    longest_run = max((len(run) for run in re.findall("`+", text)), default=0)
    fence, space = "`" * (longest_run + 1), " " if longest_run else ""
    return f"{fence}{space}{text}{space}{fence}"


@contextmanager
def to_stdout(suffix: str) -> Iterator[Path]:
    """A temporary file that is copied to stdout when the block ends well; what the block prints goes to stderr.

    Args:
        suffix: of the file's name: ".png", ".html" or ".json".

    Raises:
        ValueError: stdout is a terminal and the file is not one of text to be read there.
    """
    out = sys.stdout
    if suffix != ".json" and out.isatty():
        raise ValueError(f"stdout is a terminal: send it to a file or a program, such as > out{suffix}, or name a file")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"out{suffix}")
        with redirect_stdout(sys.stderr):
            yield path
        if path.is_file():
            out.flush()
            out.buffer.write(path.read_bytes())
            out.buffer.flush()


def one_line_errors(main: Callable[[], int]) -> Callable[[], int]:
    """A program's main function that says bad input, a ValueError, in one line under the file's name and returns 2."""

    @functools.wraps(main)
    def run() -> int:
        try:
            return main()
        except ValueError as error:
            print(f"{Path(main.__code__.co_filename).stem}: error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2

    return run
