"""Take the screenshots of the page in docs/pictures, with unigen-tiny and headless Chromium.

python -m tests.serving.screenshots [FOLDER]"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from tests.serving.browser import browser
from tests.serving.conftest import ServerProcess
from tests.serving.test_web import APPLES, RAVEN, Page

MAX_BYTES = 150_000
"""Bytes of one picture."""


def chat(page: Page) -> None:
    page.view("chat")
    page.one("#chat summary").click()
    page.fill("#chat [name=seed]", "5")
    page.one("#chat summary").click()
    page.say("chat", APPLES)
    page.say("chat", "how many apples are there?")
    page.say("chat", "replace the apples with roses")


def studio(page: Page) -> None:
    page.view("studio")
    page.fill("#studio [name=seed]", "3")
    page.say("studio", APPLES)
    page.use("#studio .run .menu", "Inpaint")
    page.until(lambda: page.script("return document.querySelector('.mask-canvas canvas').width") == 64)
    page.script("document.querySelector('#studio [name=brush]').value = 17")
    page.paint("#studio .mask-canvas canvas", (0.25, 0.70), (0.45, 0.85))
    page.fill("#studio [name=n]", "2")
    page.say("studio", "an apple and a pizza on a blue background")
    page.script("window.scrollTo(0, 0); document.activeElement.blur()")


def phone(page: Page) -> None:
    page.view("story")
    page.one("#story summary").click()
    page.fill("#story [name=seed]", "1")
    page.one("#story summary").click()
    page.say("story", RAVEN)
    page.script("window.scrollTo(0, 0); document.activeElement.blur()")


VIEWS: dict[str, tuple[Any, dict[str, Any]]] = {
    "web-chat": (chat, {"width": 960, "height": 1170}),
    "web-studio": (studio, {"width": 1100, "height": 860}),
    "web-phone": (phone, {"width": 320, "height": 640, "dark": True}),
}


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as page_url:
        served = ServerProcess([], Path(page_url) / "log")
        try:
            served.wait()
            for name, (act, options) in VIEWS.items():
                with browser(Path(page_url), **options) as driver:
                    act(Page(driver, served.url + "/", Path(page_url)))
                    save(driver.get_screenshot_as_png(), folder / f"{name}.png")
        finally:
            served.stop()


def save(file: bytes, path: Path) -> None:
    """Save a screenshot with 256 colors, which lose almost nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(io.BytesIO(file)).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path, path.stat().st_size, "bytes")
    assert path.stat().st_size <= MAX_BYTES


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/pictures"))
