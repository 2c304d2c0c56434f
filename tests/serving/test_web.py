"""The page of the server: its files, and the page in headless Chromium as its users see it.

Tests that need a browser are skipped without one: apt-get install chromium chromium-driver; the extra `browser`."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.serving import browser as chromium
from unigen.serving import page

APPLES = "two apples on a blue background"
RAVEN = "a witch and her raven"

needs_browser = pytest.mark.skipif(
    chromium.DRIVER is None or chromium.CHROMIUM is None or importlib.util.find_spec("selenium") is None,
    reason="no chromium, chromedriver or selenium here",
)


# ---------------------------------------------------------------- as it is served


def fetched(url: str) -> tuple[Any, bytes]:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.headers, answer.read()


def test_page_and_files_have_a_strict_content_policy(tiny_server: Any) -> None:
    headers, index = fetched(tiny_server.url + "/")
    names = re.findall(r'(?:href|src)="(web/[^"]+)"', index.decode())
    assert {"web/page.css", "web/page.js", "web/icon.svg"} <= set(names) and index.count(b"<h1>") == 1
    for name in [*names, *(f"web/{path.name}" for path in page.FOLDER.iterdir() if path.name != page.INDEX)]:
        headers, data = fetched(f"{tiny_server.url}/{name}")
        assert data == (page.FOLDER / Path(name).name).read_bytes()
        assert headers["content-type"] == page.CONTENT_TYPES[Path(name).suffix]
        assert headers["x-content-type-options"] == "nosniff"
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'" and policy["script-src"] == policy["connect-src"] == "'self'"
        assert not any("unsafe" in value or "*" in value or "http" in value for value in policy.values())
        assert tiny_server.get("/" + name, headers={"if-none-match": headers["etag"]})[0] == 304


def test_only_page_files_are_served(tiny_server: Any) -> None:
    for path in ("/web/", "/web/index.html", "/web/../page.py", "/web/..%2fpage.py", "/web/%2e%2e/page.py", "/page.py"):
        assert tiny_server.get(path)[0] == 404, path
    assert tiny_server.get("/", {"a": 1})[0] == 405


def test_files_use_no_external_urls_and_no_markup_sinks() -> None:
    files = {path.name: path.read_text() for path in page.FOLDER.iterdir()}
    assert set(Path(name).suffix for name in files) <= set(page.CONTENT_TYPES)
    for name, text in files.items():
        addresses = re.findall(r"(?:https?:)?//[\w.-]+\.\w+", text)
        assert set(addresses) <= {"http://www.w3.org"}, (name, addresses)  # the name of SVG, which is not asked for
        for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
            assert sink not in text, (name, sink)
    assert not re.search(r"\sstyle=|\son\w+=|<script>|<style", files["index.html"])


def test_page_is_public_with_api_keys(keyed: Any) -> None:
    assert keyed.get("/")[0] == keyed.get("/web/page.js")[0] == 200
    assert keyed.get("/v1/models")[0] == keyed.get("/metrics")[0] == 401


@pytest.fixture(scope="module")
def keyed(start_server: Any, tiny_folder: Any) -> Any:
    served = start_server("--model", str(tiny_folder), "--name", "small", "--api-key", "sesame", "--rate", "12")
    served.wait()
    return served


# ---------------------------------------------------------------- as it is seen


class Page:
    """The page in a browser."""

    def __init__(self, driver: Any, url: str, downloads: Path) -> None:
        self.driver, self.url, self.downloads = driver, url.replace("127.0.0.1", chromium.HOST), downloads
        driver.get(self.url)

    def all(self, css: str) -> list[Any]:
        return self.driver.find_elements("css selector", css)

    def one(self, css: str) -> Any:
        return self.driver.find_element("css selector", css)

    def script(self, text: str, *arguments: Any) -> Any:
        return self.driver.execute_script(text, *arguments)

    def until(self, true: Callable[[], Any], seconds: float = 90) -> Any:
        end = time.monotonic() + seconds
        while not (found := true()):
            assert time.monotonic() < end, (
                self.script("return document.body.innerText"),
                chromium.console_messages(self.driver),
            )
            time.sleep(0.05)
        return found

    def view(self, name: str) -> None:
        self.until(lambda: self.one(f'nav a[href="#{name}"]').is_displayed())
        self.one(f'nav a[href="#{name}"]').click()
        self.until(lambda: self.one(f"#{name}").is_displayed())

    def fill(self, css: str, text: str) -> Any:
        field = self.one(css)
        field.clear()
        field.send_keys(text)
        return field

    def say(self, view: str, text: str) -> None:
        """Fill in the prompt, press Enter, and wait for the end of the answer."""
        self.fill(f"#{view} textarea", text).send_keys("\ue007")
        self.ended(view)

    def ended(self, view: str) -> None:
        self.until(lambda: not self.all(f"#{view} [aria-busy]") and self.one(f"#{view} .submit").is_displayed())

    def pictures(self, css: str) -> list[Image.Image]:
        found = [element.get_attribute("src") for element in self.all(css)]
        files = [urllib.request.urlopen(url).read() for url in found]
        return [Image.open(io.BytesIO(file)).convert("RGB") for file in files]

    def use(self, css: str, what: str) -> None:
        """Choose an action from the menu of an image."""
        menu = self.one(css)
        menu.find_element("css selector", "summary").click()
        next(button for button in menu.find_elements("css selector", "button") if button.text == what).click()

    def error(self, view: str) -> str:
        return self.until(lambda: self.one(f"#{view} .error").text)

    def saved(self, name: str) -> Path:
        self.until((self.downloads / name).is_file)
        return self.downloads / name

    def paint(self, css: str, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Drag from one point to another, in fractions of the element's sides."""
        from selenium.webdriver import ActionChains

        canvas = self.one(css)
        self.script("arguments[0].scrollIntoView({block: 'center'})", canvas)
        box = canvas.size
        (x, y), (to_x, to_y) = (((at[0] - 0.5) * box["width"], (at[1] - 0.5) * box["height"]) for at in (start, end))
        actions = ActionChains(self.driver).move_to_element_with_offset(canvas, int(x), int(y)).click_and_hold()
        actions.move_by_offset(int(to_x - x), int(to_y - y)).release().perform()


Open = Callable[..., Page]


@pytest.fixture
def open_page(tmp_path: Path) -> Iterator[Open]:
    """Open pages, at any size. At the end, checks that they requested nothing from elsewhere, and that the console has
    no
    messages but those of expected errors."""
    running: list[Any] = []
    opened: list[tuple[Page, str]] = []

    def start(served: Any, refused: str = "", **options: Any) -> Page:
        running.append(chromium.browser(tmp_path, **options))
        opened.append((Page(running[-1].__enter__(), served.url + "/", tmp_path), refused))
        return opened[-1][0]

    try:
        yield start
        for made, refused in opened:
            asked = chromium.requested_urls(made.driver)
            assert asked and all(url.startswith(made.url) for url in asked), asked
            said = [
                line
                for line in chromium.console_messages(made.driver)
                if not (refused and f"status of {refused}" in line)
            ]
            assert not said, said
    finally:
        for one in running:
            one.__exit__(None, None, None)


@needs_browser
def test_chat_with_text_and_images(tiny_server: Any, open_page: Open) -> None:
    seen = open_page(tiny_server)
    seen.view("chat")
    seen.one("#chat summary").click()
    seen.fill("#chat [name=seed]", "3")
    seen.one("#chat [name=output] [value=image]").click()
    seen.say("chat", APPLES)
    (drawn,) = seen.pictures("#chat .assistant img")
    shown = seen.one("#chat .assistant img")
    width = shown.size["width"]
    assert width == shown.size["height"] and width % 64 == 0 and width >= 192
    assert shown.value_of_css_property("image-rendering") == "pixelated"
    assert "seed 3 · next-token · guidance 3" in seen.one("#chat .assistant .settings").text
    seen.one("#chat .assistant a[download]").click()
    saved = Image.open(seen.saved("two-apples-on-a-blue-background-3.png"))
    assert saved.size == (64, 64) and saved.convert("RGB").tobytes() == drawn.tobytes()
    seen.one("#chat [name=output] [value=text]").click()
    seen.say("chat", "how many apples are there?")
    assert seen.all("#chat .assistant .text")[0].text == "two"
    seen.one("#chat .new-chat").click()
    assert not seen.all("#chat .turn")


@needs_browser
@pytest.mark.slow
def test_chat_about_own_images(tiny_server: Any, open_page: Open, tmp_path: Path) -> None:
    """Chosen as a file, dropped, pasted; and removed."""
    seen = open_page(tiny_server)
    seen.view("chat")
    Image.new("RGB", (2000, 50), "red").save(tmp_path / "large.jpg")
    seen.one("#chat .file").send_keys(str(tmp_path / "large.jpg"))
    seen.until(lambda: len(seen.all("#chat .thumbnail")) == 1)
    assert seen.pictures("#chat .thumbnail img")[0].size == (1024, 26)
    hand_over = """
        const [kind, made] = [arguments[0], new DataTransfer()];
        const canvas = Object.assign(document.createElement("canvas"), { width: 9, height: 9 });
        canvas.getContext("2d").fillRect(0, 0, 9, 9);
        canvas.toBlob((file) => {
            made.items.add(new File([file], "small.png", { type: "image/png" }));
            const way = { bubbles: true, cancelable: true };
            const event = kind === "drop" ? new DragEvent("drop", { dataTransfer: made, ...way })
                : new ClipboardEvent("paste", { clipboardData: made, ...way });
            document.querySelector("#chat textarea").dispatchEvent(event);
        });
    """
    for count, kind in ((2, "drop"), (3, "paste")):
        seen.script(hand_over, kind)
        seen.until(lambda: len(seen.all("#chat .thumbnail")) == count)  # noqa: B023
    for _ in range(2):
        seen.one("#chat .thumbnail button").click()
    assert [picture.size for picture in seen.pictures("#chat .thumbnail img")] == [(9, 9)]
    (tmp_path / "none.png").write_text("no picture")
    seen.one("#chat .file").send_keys(str(tmp_path / "none.png"))
    assert seen.error("chat").startswith("none.png is no picture")
    seen.one("#chat [name=output] [value=text]").click()
    seen.say("chat", "describe this picture")
    assert len(seen.all("#chat .user img")) == 1 and seen.one("#chat .assistant .text").text


@needs_browser
@pytest.mark.slow
def test_markup_is_text(tiny_server: Any, open_page: Open) -> None:
    seen = open_page(tiny_server)
    seen.view("chat")
    evil = "<img src=x onerror=\"document.title='had'\"><script>document.title='had'</script>"
    seen.say("chat", evil)
    assert seen.one("#chat .user .text").text == evil and seen.script("return document.title") == "unigen"


@needs_browser
@pytest.mark.slow
def test_story_page_by_page(tiny_server: Any, open_page: Open) -> None:
    seen = open_page(tiny_server)
    seen.view("story")
    seen.one("#story summary").click()
    seen.fill("#story [name=seed]", "1")
    seen.fill("#story textarea", RAVEN).send_keys("\ue007")
    seen.until(lambda: seen.all("#story .page .picture"))
    assert seen.all("#story [aria-busy]")  # a page is there before the last
    seen.ended("story")
    pages = seen.all("#story .page")
    assert len(pages) >= 3 and seen.one("#story h2").text.lower() == RAVEN
    told = tiny_server.client().chat.completions.create(
        model="unigen-tiny", messages=[{"role": "user", "content": f"a story about {RAVEN}"}], seed=1
    )
    texts = told.choices[0].message.content.split("\n\n")
    assert [words.text for words in seen.all("#story .page .text")] == texts
    seen.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert seen.one("#story .page").is_displayed() and not seen.one("#story form").is_displayed()
    seen.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    seen.use("#story .page .menu", "Tell a story about it")
    seen.say("story", RAVEN)
    assert len(seen.all("#story .references img")) == 1 and len(seen.all("#story .page")) >= 3


@needs_browser
@pytest.mark.slow
def test_escape_and_stop_button_abort_an_answer(tiny_server: Any, open_page: Open) -> None:
    seen = open_page(tiny_server)
    for view, stop in (("chat", None), ("story", None), ("studio", None), ("studio", ".stop")):
        seen.view(view)
        if view == "studio":
            seen.fill("#studio [name=n]", "16")
        field = seen.fill(f"#{view} textarea", f"a story about {RAVEN}")
        field.send_keys("\ue007")
        seen.until(lambda: tiny_server.metric("unigen_jobs_running") > 0)
        if stop:
            seen.one(f"#{view} {stop}").click()
        else:
            field.send_keys("\ue00c")
        seen.ended(view)
        seen.until(lambda: tiny_server.jobs == 0)
        assert not seen.one(f"#{view} .error").is_displayed()
    assert not seen.all("#studio .run")


@needs_browser
@pytest.mark.slow
def test_studio_draws_edits_varies_and_shows_settings(tiny_server: Any, open_page: Open) -> None:
    seen = open_page(tiny_server)
    seen.view("studio")
    seen.one("#studio [name=generator] [value=flow]").click()
    assert not seen.one("#studio [name=top_p]").is_displayed()  # a flow takes none
    for name, value in {"n": "6", "steps": "3", "guidance": "2", "seed": "5"}.items():
        seen.fill(f"#studio [name={name}]", value)
    seen.say("studio", APPLES)
    assert (
        len(seen.all("#studio .run .picture")) == 6
        and len({one.tobytes() for one in seen.pictures("#studio .run img")}) == 6
    )
    made = seen.one("#studio .run").text
    assert "flow · guidance 2 · steps 3" in made and all(f"seed {seed}" in made for seed in range(5, 11))
    seen.use("#studio .run .menu", "Edit")
    assert seen.one("#studio .prompt-label").text == "What to change"
    for name, value in {"n": "1", "guidance": "", "seed": "1"}.items():
        seen.fill(f"#studio [name={name}]", value)
    given = seen.pictures("#studio .thumbnail img")
    seen.say("studio", "make the background red")
    assert seen.one("#studio .run .settings").text.startswith("seed 1 · next-token · guidance 3")
    assert seen.pictures("#studio .run img")[0] != given[0]
    seen.use("#studio .run .menu", "Vary")
    seen.fill("#studio [name=variation]", "0.2")
    seen.one("#studio .submit").click()
    seen.ended("studio")
    assert len(seen.all("#studio .run")) == 3 and "masked" in seen.one("#studio .run .settings").text


@needs_browser
@pytest.mark.slow
def test_studio_shows_previews(tiny_server: Any, open_page: Open) -> None:
    """In their places, each clearer than the one before; finished images wait for the others."""
    seen = open_page(tiny_server)
    seen.view("studio")
    watch = """
        window.told = [];
        new MutationObserver(() => {
            const frames = [...document.querySelectorAll("#studio .run[aria-busy] .placeholder")];
            told.push(frames.map((one) => [one.querySelector("img")?.src ?? "", one.classList.contains("finished")]));
        }).observe(document.querySelector("#studio .runs"), { childList: true, subtree: true, attributes: true });
    """
    seen.script(watch)
    for generator, previews in (("flow", 3), ("next-token", 0)):
        seen.script("told.length = 0")
        seen.one(f"#studio [name=generator] [value={generator}]").click()
        for name, value in {"n": "2", "seed": "5"}.items():
            seen.fill(f"#studio [name={name}]", value)
        seen.say("studio", APPLES)
        made = [element.get_attribute("src") for element in seen.all("#studio .run:first-child .picture img")]
        told = seen.script("return told")
        for place in range(2):
            shown = list(dict.fromkeys(tuple(state[place]) for state in told if state and state[place][0]))
            looks = [url for url, done in shown if not done and url != made[place]]
            assert len(set(looks)) == previews and (made[place], True) in shown
        assert len(made) == len(set(made)) == 2 and not seen.all("#studio .placeholder")


@needs_browser
@pytest.mark.slow
def test_studio_best_of_several(tiny_server: Any, open_page: Open) -> None:
    seen = open_page(tiny_server)
    seen.view("studio")
    for name, value in {"n": "2", "seed": "3", "candidates": "2"}.items():
        seen.fill(f"#studio [name={name}]", value)
    seen.say("studio", APPLES)
    assert len(seen.all("#studio .run .picture")) == 2 and "candidates 2" in seen.one("#studio .run").text
    seen.script("document.querySelector('#studio [value=edit]').click()")
    assert not seen.one("#studio [name=candidates]").is_displayed()


@needs_browser
@pytest.mark.slow
def test_studio_inpaints(tiny_server: Any, open_page: Open) -> None:
    seen = open_page(tiny_server, refused="400")
    seen.view("studio")
    seen.fill("#studio [name=n]", "1")
    seen.fill("#studio [name=seed]", "3")
    seen.say("studio", APPLES)
    seen.use("#studio .run .menu", "Inpaint")
    seen.until(lambda: seen.script("return document.querySelector('.mask-canvas canvas').width") == 64)
    seen.say("studio", "two roses on a blue background")
    assert "the mask marks nothing" in seen.error("studio")
    seen.paint("#studio .mask-canvas canvas", (0.1, 0.1), (0.1, 0.9))
    seen.say("studio", "two roses on a blue background")
    new, old = seen.pictures("#studio .run img")
    left, right = (0, 0, 24, 64), (32, 0, 64, 64)
    assert new.crop(left).tobytes() != old.crop(left).tobytes()
    difference = sum(abs(a - b) for a, b in zip(new.crop(right).tobytes(), old.crop(right).tobytes(), strict=True))
    assert difference / (32 * 64 * 3) < 8  # as it was, through the image tokenizer
    seen.one("#studio .clear-mask").click()
    canvas = seen.one("#studio .mask-canvas canvas")
    canvas.send_keys("\ue014\ue014 ")  # by the keys: twice to the right, and Space
    marked = "const c = arguments[0]; return c.getContext('2d').getImageData(0, 0, 64, 64).data.filter(Boolean).length"
    assert seen.script(marked, canvas) > 100


@needs_browser
@pytest.mark.slow
def test_errors_are_shown_and_fields_marked(tiny_server: Any, open_page: Open) -> None:
    seen = open_page(tiny_server, refused="400")
    seen.view("studio")
    for name, value, says in (("guidance", "lots", "number"), ("n", "17", "16"), ("seed", "-1", "0")):
        seen.fill(f"#studio [name={name}]", value)
        seen.say("studio", APPLES)
        assert name in seen.error("studio") and says in seen.error("studio")
        field = seen.one(f"#studio [name={name}]")
        assert field.get_attribute("aria-invalid") == "true" and field == seen.driver.switch_to.active_element
        seen.fill(f"#studio [name={name}]", "1")
    seen.say("studio", "")
    assert "prompt" in seen.error("studio") and seen.one("#studio textarea").get_attribute("aria-invalid")
    seen.say("studio", APPLES)
    assert not seen.one("#studio .error").is_displayed() and not seen.all("#studio [aria-invalid]")
    seen.view("chat")
    field = seen.one("#chat textarea")
    seen.script("arguments[0].value = 'a '.repeat(5000)", field)
    field.send_keys("\ue007")
    assert "positions" in seen.error("chat") and not seen.all("#chat .turn")  # and nothing of it is lost
    assert len(field.get_attribute("value")) > 9000


@needs_browser
@pytest.mark.slow
def test_api_key_is_asked_for_and_kept_in_the_tab(keyed: Any, open_page: Open) -> None:
    seen = open_page(keyed, refused="401")
    seen.until(lambda: seen.one("#key").is_displayed())
    assert not seen.one("main").text
    seen.fill("#key input", "wrong").send_keys("\ue007")
    seen.until(lambda: seen.one("#key").is_displayed() and "API key" in seen.one("#state").text)
    seen.fill("#key input", "sesame").send_keys("\ue007")
    seen.until(lambda: seen.one("#chat").is_displayed())
    seen.driver.refresh()
    seen.until(lambda: seen.one("#chat").is_displayed())
    assert seen.script("return [localStorage.length, sessionStorage.length]") == [0, 1]


@needs_browser
@pytest.mark.slow
def test_rate_limited_request_is_retried_once(keyed: Any, open_page: Open) -> None:
    seen = open_page(keyed, refused="4")
    seen.until(lambda: seen.one("#key").is_displayed())
    seen.fill("#key input", "sesame").send_keys("\ue007")
    seen.view("studio")
    seen.fill("#studio [name=n]", "1")
    field = seen.fill("#studio textarea", APPLES)
    while keyed.get("/v1/models", headers={"authorization": "Bearer sesame"})[0] != 429:
        pass
    field.send_keys("\ue007")
    seen.until(lambda: "asking again in" in seen.one("#studio .status").text)
    seen.ended("studio")
    assert len(seen.all("#studio .run img")) == 1, seen.one("#studio .error").text
    assert not seen.one("#studio .status").is_displayed()


@needs_browser
@pytest.mark.slow
def test_history_is_kept_opened_exported_and_cleared(tiny_server: Any, open_page: Open) -> None:
    seen = open_page(tiny_server)
    seen.view("chat")
    seen.say("chat", APPLES)
    seen.view("studio")
    seen.fill("#studio [name=n]", "1")
    seen.say("studio", "a rose")
    seen.driver.refresh()
    seen.view("story")
    seen.say("story", RAVEN)
    seen.one("#open-history").click()
    titles = seen.until(lambda: [one.text for one in seen.all("#history li button:first-child")])
    assert titles == [RAVEN, "a rose", APPLES]
    seen.one("#history .export").click()
    entries = json.loads(seen.saved("unigen-history.json").read_text())["entries"]
    assert [entry["view"] for entry in entries] == ["story", "studio", "chat"]
    assert entries[2]["data"][1]["parts"][0]["image"].startswith("data:image/png;base64,")
    seen.all("#history li button:first-child")[2].click()
    seen.until(lambda: len(seen.all("#chat .turn")) == 2)
    assert len(seen.pictures("#chat .assistant img")) == 1
    seen.say("chat", "how many apples are there?")  # it goes on, as the same entry
    seen.one("#open-history").click()
    assert len(seen.until(lambda: seen.all("#history li"))) == 3
    seen.all("#history li button:last-child")[1].click()
    seen.until(lambda: len(seen.all("#history li")) == 2)
    for _ in range(2):
        seen.one("#history .clear").click()
    seen.until(lambda: "Nothing yet." in seen.one("#history").text)
    seen.one("#history form button").click()
    seen.driver.refresh()
    seen.one("#open-history").click()
    seen.until(lambda: "Nothing yet." in seen.one("#history").text)


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("view", ["chat", "story", "studio"])
def test_reloaded_page_keeps_request_and_partial_answer(tiny_server: Any, open_page: Open, view: str) -> None:
    """It says that the answer was interrupted, and a click generates it again in its place."""
    prompt = f"a story about {RAVEN}"
    seen = open_page(tiny_server)
    seen.view(view)
    if view == "studio":
        seen.one("#studio [name=generator] [value=flow]").click()
        for name, value in {"n": "16", "steps": "250", "seed": "3"}.items():
            seen.fill(f"#studio [name={name}]", value)
    seen.fill(f"#{view} textarea", prompt).send_keys("\ue007")
    made = {"chat": ".assistant .picture", "story": ".page .picture", "studio": ".placeholder"}[view]
    seen.until(lambda: seen.all(f"#{view} {made}"))
    before = len(seen.all(f"#{view} {made}"))
    sizes = """
        const done = arguments[0];
        import("/web/history.js").then(async (history) => done((await history.list()).map((entry) => entry.size)));
    """
    least = 200 if view == "studio" else 3000 * before  # characters: its pictures are there
    seen.until(lambda: (seen.driver.execute_async_script(sizes) or [0])[0] > least)
    seen.driver.refresh()
    seen.until(lambda: seen.all(f"#{view} .interrupted"))
    assert "Interrupted" in seen.one(f"#{view} .interrupted").text and prompt in seen.one(f"#{view}").text.lower()
    if view == "studio":
        assert not seen.one("#studio [name=steps]").get_attribute("value")
    else:
        assert len(seen.all(f"#{view} {made}")) >= before
    seen.until(lambda: tiny_server.jobs == 0)  # the server has seen that the page left: else its queue may be full
    seen.one(f"#{view} .interrupted button").click()
    if view == "studio":
        seen.until(lambda: len(seen.all("#studio .placeholder")) == 16)
        assert seen.one("#studio [name=steps]").get_attribute("value") == "250"
        seen.one("#studio .stop").click()
    seen.ended(view)
    assert not seen.all(f"#{view} .interrupted") and len(seen.all("#chat .turn")) == 2 * (view == "chat")
    assert seen.script("return sessionStorage.length") == 0
    seen.one("#open-history").click()
    kept = seen.until(lambda: seen.all("#history li"))
    assert len(kept) == 1 and ("interrupted" in kept[0].text) == (view == "studio"), "what was stopped is as before"


FILL_HISTORY = """
    const [done, entries] = [arguments[arguments.length - 1], arguments[0]];
    import("/web/history.js").then(async (history) => {
        for (const { characters, ...entry } of entries) {
            await history.put({ at: Date.now(), ...entry, ...(characters ? { data: "x".repeat(characters) } : {}) });
        }
        done((await history.list()).map((one) => one.id));
    }).catch((error) => done(String(error)));
"""


@needs_browser
@pytest.mark.slow
def test_damaged_history_entries_are_marked_and_kept(tiny_server: Any, open_page: Open) -> None:
    seen = open_page(tiny_server)
    seen.view("chat")
    turns = [{"role": "user", "parts": [{"text": "a"}]}, {"role": "assistant", "parts": [{"text": "b"}]}]
    damaged = [5, [{"role": "user"}], [{"role": "user", "parts": [{}]}]]
    entries = [{"id": f"bad{i}", "view": "chat", "title": f"bad {i}", "data": data} for i, data in enumerate(damaged)]
    entries += [
        {"id": "story", "view": "story", "title": "bad story", "data": {"title": "a"}},
        {"id": "nameless", "view": "chat", "at": "never", "data": turns},
        {"id": "good", "view": "chat", "title": "good", "data": turns},
    ]
    seen.driver.execute_async_script(FILL_HISTORY, entries)
    seen.one("#open-history").click()
    seen.until(lambda: len(seen.all("#history li")) == 6)

    def lines() -> Any:
        return seen.script("return [...document.querySelectorAll('#history li')].map((one) => one.innerText)")

    for title in ("bad 0", "bad 1", "bad 2", "bad story"):
        next(one for one in seen.all("#history li button:first-child") if one.text == title).click()
        seen.until(lambda: [one for one in lines() if title in one and "damaged" in one])  # noqa: B023
    assert not seen.all("#chat .turn")
    seen.one("#history .export").click()
    exported = json.loads(seen.saved("unigen-history.json").read_text())["entries"]
    assert {one["id"]: one["data"] for one in exported}["bad1"] == damaged[1]
    for title in ("good", "without a title"):
        if not seen.one("#history").is_displayed():
            seen.one("#open-history").click()
        next(one for one in seen.all("#history li button:first-child") if one.text == title).click()
        seen.until(lambda: [one.text for one in seen.all("#chat .turn")] == ["a", "b"])


@needs_browser
@pytest.mark.slow
def test_large_history_entry_displaces_no_others(tiny_server: Any, open_page: Open) -> None:
    seen = open_page(tiny_server)
    seen.view("chat")

    def fill(*entries: Any) -> Any:
        return seen.driver.execute_async_script(FILL_HISTORY, list(entries))

    small = [{"id": f"small{i}", "view": "chat", "title": "a", "characters": 10, "at": i} for i in range(3)]
    large = {"id": "large", "view": "chat", "title": "a", "characters": 61_000_000, "at": 10}
    assert sorted(fill(*small, large)) == ["large", "small0", "small1", "small2"]
    assert len(fill({"id": "more", "view": "chat", "title": "a", "characters": 10, "at": 11})) == 5
    assert "large" not in fill({**large, "id": "larger", "at": 12}), "the older of two large ones goes"


@needs_browser
@pytest.mark.slow
def test_phone_needs_no_horizontal_scrolling(tiny_server: Any, open_page: Open) -> None:
    seen = open_page(tiny_server, width=320, height=640)

    def fits() -> None:
        assert seen.script("return document.documentElement.scrollWidth") == 320
        assert seen.script("return innerWidth") == 320

    seen.view("chat")
    seen.say("chat", "a story about " + "w" * 80)
    fits()
    seen.view("story")
    seen.say("story", RAVEN)
    fits()
    seen.view("studio")
    seen.fill("#studio [name=n]", "8")
    seen.say("studio", APPLES)
    fits()
    seen.script("for (const menu of document.querySelectorAll('#studio .menu')) menu.open = true")
    fits()
    seen.script("document.querySelector('#studio [value=inpaint]').click()")  # under the head of the page
    fits()
    seen.one("#open-history").click()
    fits()


@needs_browser
@pytest.mark.slow
def test_unsupported_features_are_not_offered(start_server: Any, dit_folder: Any, open_page: Open) -> None:
    served = start_server("--model", str(dit_folder), "--name", "digits")
    served.wait()
    seen = open_page(served)
    seen.until(lambda: seen.one("#studio").is_displayed())
    assert [link.get_attribute("hash") for link in seen.all("nav a") if link.is_displayed()] == ["#studio"]
    assert not seen.one("#studio .modes").is_displayed() and not seen.one("#studio textarea").is_displayed()
    assert not seen.one("#studio [name=candidates]").is_displayed()
    seen.fill("#studio [name=n]", "2")
    seen.fill("#studio [name=label]", "7").send_keys("\ue007")
    seen.until(lambda: len(seen.all("#studio .run .picture")) == 2)


TRACK = """
const done = arguments[0];
(async () => {
  const { createTracker, takeInterruptedId } = await import(new URL("web/storage.js", location).href);
  const track = createTracker(() => {});
  const entry = () => ({ view: "chat", title: "a", data: {} });
  const first = track("first", entry), second = track("second", entry);
  first.finish({ ...entry(), at: 1 });
  const later = takeInterruptedId();
  const third = track("third", entry);
  third.finish({ ...entry(), at: 1 });
  second.discard();
  done([later, takeInterruptedId()]);
})();
"""


@needs_browser
def test_finished_answer_keeps_the_id_of_a_later_one(tiny_server: Any, open_page: Open) -> None:
    """The id of the answer that is still being generated when the tab is reloaded."""
    seen = open_page(tiny_server)
    assert seen.driver.execute_async_script(TRACK) == ["second", None]
