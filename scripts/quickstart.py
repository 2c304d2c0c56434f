"""The main job on one model, as a page: pictures from sentences, questions, an edit, stories; for quickstart.sh.

    python scripts/quickstart.py [--model unigen-tiny] [--folder quickstart] [--seed 1]

Uses only `unigen.load` and the engine, as a user would; every result stands beside the command that makes it again.
"""

from __future__ import annotations

import argparse
import functools
import html
import shlex
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import unigen
from unigen.commands.story import story_prompt
from unigen.media.output import check_output, html_figure, html_page, save_image, story_body, write_text
from unigen.utils.argparser import OneLineParser
from unigen.utils.files import hardware_summary
from unigen.utils.option_types import SEED

T = TypeVar("T")

PROMPTS = {
    "horse": "a blue horse and a red dog",
    "apples": "two apples on a blue background",
    "sunflower": "a sunflower on a white background",
    "witch": "a witch",
    "raven": "a raven",
    "penguins": "three penguins",
    "rocket": "a rocket to the left of a moon",
    "house": "a house and a purple tree",
}
QUESTIONS = ["how many apples are there?", "is there a horse?", "what color is the background?"]
EDIT = "replace the sunflower with a rose"
STORY = "a witch and her raven"
REFERENCES = ("witch", "raven")


class PageBuilder:
    """Makes results one by one, timed, and collects the page's sections."""

    def __init__(self, engine: Any, folder: Path, model: str, seed: int) -> None:
        self.engine, self.folder, self.model, self.seed = engine, folder, model, seed
        self.options = {"seed": seed}
        self.sections: list[str] = []
        self.pictures: dict[str, Any] = {}

    def run_timed(self, label: str, make: Callable[[], T]) -> tuple[T, float]:
        start = time.perf_counter()
        result = make()
        seconds = time.perf_counter() - start
        print(f"{seconds:6.1f} s  {label}", flush=True)
        return result, seconds

    def command(self, *words: str, seeded: bool = True) -> str:
        """The command line that makes the same again, as HTML."""
        if seeded:
            words += ("--seed", str(self.seed))
        if self.model != "unigen-tiny":
            words += ("--model", self.model)
        return f"<code>{html.escape(shlex.join(['unigen', *words]))}</code>"

    def place(self, name: str) -> str:
        return str(self.folder / f"{name}.png")

    def keep(self, name: str, image: Any) -> None:
        self.pictures[name] = image
        save_image(Path(self.place(name)), image)

    def section(self, title: str, note: str, body: str) -> None:
        note = f'<p class="note">{html.escape(note)}</p>\n' if note else ""
        self.sections.append(f"<h2>{html.escape(title)}</h2>\n{note}{body}")

    def draw(self) -> None:
        cards = []
        for name, prompt in PROMPTS.items():
            make = functools.partial(self.engine.generate, prompt, output="image", **self.options)
            image, seconds = self.run_timed(prompt, make)
            self.keep(name, image)
            command = self.command("generate", prompt, "-o", self.place(name))
            cards.append(
                html_figure(
                    image, f"<b>{html.escape(prompt)}</b>seed {self.seed}, {seconds:.1f} s<br>{command}", prompt
                )
            )
        self.section("Drawn from a sentence", "", f'<div class="row">{"".join(cards)}</div>')

    def ask(self) -> None:
        image = self.pictures["apples"]
        answer, seconds = self.run_timed("what does the picture show?", functools.partial(self.engine.describe, image))
        command = self.command("describe", self.place("apples"), seeded=False)
        rows = [
            f"<p><b>Describe it.</b> {html.escape(answer)}<br><span class=note>{seconds:.1f} s</span> {command}</p>"
        ]
        for question in QUESTIONS:
            answer, seconds = self.run_timed(question, functools.partial(self.engine.describe, image, question))
            command = self.command("describe", self.place("apples"), "-q", question, seeded=False)
            rows.append(
                f"<p><b>{html.escape(question)}</b> {html.escape(answer)}<br>"
                f"<span class=note>{seconds:.1f} s</span> {command}</p>"
            )
        figure = html_figure(image, alt=PROMPTS["apples"])
        body = f'<div class="row top">{figure}<div class="wide">{"".join(rows)}</div></div>'
        self.section("Asked about a picture", "The model reads its own drawing again, from the pixels.", body)

    def edit(self) -> None:
        before = self.pictures["sunflower"]
        after, seconds = self.run_timed(EDIT, functools.partial(self.engine.edit, before, EDIT, **self.options))
        self.keep("edited", after)
        command = self.command("edit", self.place("sunflower"), EDIT, "-o", self.place("edited"))
        cards = [
            html_figure(before, f"<b>before</b>{html.escape(PROMPTS['sunflower'])}", "before"),
            html_figure(after, f"<b>after</b>seed {self.seed}, {seconds:.1f} s<br>{command}", "after"),
        ]
        self.section("Edited", f"“{EDIT}”", f'<div class="row">{"".join(cards)}</div>')

    def story(self, references: tuple[str, ...]) -> None:
        pictures = [self.pictures[name] for name in references]
        prompt = [*pictures, story_prompt(STORY, len(pictures))]
        make = functools.partial(self.engine.generate, prompt, output="interleaved", **self.options)
        parts, seconds = self.run_timed(f"a story: {STORY}" + " from references" * bool(references), make)
        flags = [word for name in references for word in ("--reference", self.place(name))]
        name = "story-of-these.html" if references else "story.html"
        command = self.command("story", STORY, *flags, "-o", str(self.folder / name))
        title = "A story about these two" if references else "A story"
        reference_figures = "".join(
            html_figure(self.pictures[name], f"<b>reference</b>{name}", name) for name in references
        )
        reference_figures = f'<div class="row">{reference_figures}</div>' if reference_figures else ""
        body = f"{reference_figures}{story_body(parts)}<p class=note>seed {self.seed}, {seconds:.1f} s {command}</p>"
        self.section(title, f"“{STORY}”", body)


def footer(args: argparse.Namespace, info: dict[str, Any]) -> str:
    """What made the page, in sentences, and where to read on, as HTML."""
    size, device = info.get("image_size"), info.get("device", "cpu")
    draws = f" draws pictures of {size}x{size} pixels" if size else " ran"
    model_text = f"{args.model} ({info.get('backbone', info['family'])}){draws} on {device}"
    lines = [
        f"{model_text}: {hardware_summary()}, {date.today()}, seed {args.seed}.",
        "Another page: scripts/quickstart.sh --seed 2. All commands: unigen --help. More: README.md and docs/guide.md.",
    ]
    return f"<footer>{'<br>'.join(map(html.escape, lines))}</footer>"


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="unigen-tiny")
    parser.add_argument("--folder", type=Path, default=Path("quickstart"))
    parser.add_argument("--seed", type=SEED.parse, default=1)
    args = parser.parse_args(argv)

    start = time.perf_counter()
    args.folder.mkdir(parents=True, exist_ok=True)
    target = check_output(args.folder / "index.html", {".html": "HTML"})
    maker = PageBuilder(unigen.load(args.model), args.folder, args.model, args.seed)
    print(f"{time.perf_counter() - start:6.1f} s  load {args.model}")
    maker.draw()
    maker.ask()
    maker.edit()
    maker.story(())
    maker.story(REFERENCES)
    seconds = time.perf_counter() - start

    head = (
        "<h1>One model that draws, looks and tells</h1>\n"
        f'<p class="lead">Everything below was made by <b>{html.escape(args.model)}</b> on this machine in '
        f"{seconds:.0f} seconds. Each result stands beside the command that makes it again "
        "(after <code>source .venv/bin/activate</code>).</p>"
    )
    write_text(
        target, html_page("unigen quickstart", "\n".join([head, *maker.sections, footer(args, maker.engine.info())]))
    )
    print(f"\nLook at {target.resolve()}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"quickstart: error: {error}", file=sys.stderr)
        sys.exit(2)
