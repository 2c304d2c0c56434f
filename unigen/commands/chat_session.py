"""A conversation in text and images in the terminal: `unigen chat`.

Reads lines, asks the engine's stream for the next turn, prints its words as they come, saves its images and shows
their paths, and the images themselves where the terminal can (kitty's or iTerm2's protocol). The engine is anything
with `stream(document, output=..., **options)` that yields strings and PIL images. Does not depend on: models.

    /image PATH   attach a picture to what you say next        /seed N       draw differently from here on
    /save FILE    write the conversation as JSON               /load FILE    go on with one that was saved
    /new          begin again                                  /help   /quit

Ctrl-C stops an answer; at the prompt it does nothing, so that the conversation is kept.
"""

from __future__ import annotations

import base64
import json
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO
from urllib.parse import unquote

from PIL.Image import Image, Resampling

from unigen.document import Document, Segment
from unigen.media.display import png_bytes
from unigen.media.images import read_image
from unigen.media.output import check_output, save_image, write_text
from unigen.model.template import Output, default_output
from unigen.samplers.seeds import offset_seed
from unigen.utils.files import load_json
from unigen.utils.numbers import parse_int
from unigen.utils.option_types import SEED
from unigen.utils.text import did_you_mean

if TYPE_CHECKING:
    from unigen.inference.protocol import InferenceEngine, OptionValue

COMMANDS = {
    "/image": "PATH",
    "/seed": "N",
    "/save": "FILE.json",
    "/load": "FILE.json",
    "/new": "",
    "/help": "",
    "/quit": "",
}
HELP = (
    "   ".join(f"{name} {meaning}".strip() for name, meaning in COMMANDS.items())
    + "   (anything else is said to the model)"
)


def inline_protocol(environment: Mapping[str, str]) -> str | None:
    """The protocol by which the terminal shows images inside the text.

    Args:
        environment: environment variables of the process.

    Returns:
        "kitty" or "iterm2"; None where the variables name neither, and inside tmux and screen.
    """
    program, term = environment.get("TERM_PROGRAM", ""), environment.get("TERM", "")
    if environment.get("TMUX") or term.startswith(("screen", "tmux")):
        return None
    if environment.get("KITTY_WINDOW_ID") or "kitty" in term or program == "ghostty":
        return "kitty"
    if program in ("iTerm.app", "WezTerm"):
        return "iterm2"
    return None


def inline(image: Image, protocol: str, width: int = 256) -> str:
    """The escape sequence that shows an image.

    kitty: https://sw.kovidgoyal.net/kitty/graphics-protocol (chunks of 4096); iTerm2: https://iterm2.com/documentation-images.html

    Args:
        image: the image.
        protocol: "kitty" or "iterm2".
        width: pixels on the screen; the height follows.

    Returns:
        The text to print.
    """
    image = image.resize((width, max(1, width * image.height // image.width)), Resampling.BICUBIC)
    data = base64.b64encode(png_bytes(image)).decode()
    if protocol == "iterm2":
        return f"\033]1337;File=inline=1;width={width}px:{data}\a\n"
    chunks = [data[i : i + 4096] for i in range(0, len(data), 4096)]
    parts = []
    for i, chunk in enumerate(chunks):
        control = "a=T,f=100," if i == 0 else ""
        parts.append(f"\033_G{control}m={int(i + 1 < len(chunks))};{chunk}\033\\")
    return "".join(parts) + "\n"


def pasted_paths(text: str) -> list[str]:
    """The paths of the files that a line names as terminals paste them: plain, quoted, with escaped blanks, or as
    file:// addresses.

    Args:
        text: the line. One that is the name of a file as a whole is that file.

    Returns:
        The paths.

    Raises:
        ValueError: where it names none.
    """
    plain = os.path.expanduser(text)
    if os.path.isfile(plain):
        return [plain]
    try:
        parts = shlex.split(text)
    except ValueError:  # a quote that is not closed, as in a name with an apostrophe
        parts = [text]
    if not parts:
        raise ValueError("say /image and the path of a picture")
    paths = []
    for part in parts:
        if part.lower().startswith("file://"):
            part = unquote(part[len("file://") :].removeprefix("localhost"))
        paths.append(os.path.expanduser(part))
    is_one_path = len(paths) > 1 and not all(os.path.isfile(path) for path in paths)
    return [plain] if is_one_path else paths


def parse_seed(text: str) -> int:
    """Parse a seed.

    Args:
        text: a whole number in digits.

    Returns:
        The seed.

    Raises:
        ValueError: in one line, for anything else.
    """
    try:
        value: object = parse_int(text.strip())
    except ValueError:
        value = text
    return SEED.check("seed", value)


class Chat:
    """The state of one conversation. Turn i has the seed `seed + i`.

    Args:
        folder: where images are saved; it is made when it is needed.
        seed: of the first turn.
        output: kind of output of each turn; None is as of `unigen.model.template.default_output`.
        options: options of `engine.stream`.
    """

    def __init__(
        self, folder: str | Path, seed: int = 0, output: Output | None = "interleaved", **options: OptionValue
    ) -> None:
        self.output = output
        self.folder = Path(folder)
        self.seed = seed
        self.options = options
        self.begin()

    def begin(self) -> None:
        """Begin a new conversation: an empty document, no attached images, turn 0."""
        self.document = Document([])
        self.pending_images: list[Image] = []
        self.turn = 0

    def run(self, engine: InferenceEngine, lines: TextIO, out: TextIO) -> None:
        """Answer lines until /quit or the end of the input. Bad input gets one line and the conversation goes on.

        Args:
            engine: answers the turns.
            lines: the user's input.
            out: where answers and messages are printed.

        Raises:
            KeyboardInterrupt: for Ctrl-C where input or output is not a terminal.
        """
        asks = lines.isatty() and out.isatty()
        protocol = inline_protocol(os.environ) if out.isatty() else None
        if asks:
            print(HELP, file=out)
        for line in self.read_lines(lines, out, asks):
            try:
                if line.startswith("/"):
                    if not self.command(line, out):
                        return
                elif line:
                    self.say(engine, line, out, protocol)
            except ValueError as error:
                hint = " (/new begins again)" if self.document.segments and not line.startswith("/") else ""
                print(f"unigen: {error}{hint}", file=out)
            except KeyboardInterrupt:
                if not asks:
                    raise
                print("\n(stopped; nothing of this turn is kept)", file=out)

    @staticmethod
    def read_lines(lines: TextIO, out: TextIO, asks: bool) -> Iterator[str]:
        """Read the input line by line.

        Args:
            lines: the user's input.
            out: where messages are printed.
            asks: whether both are terminals: then with a prompt, and Ctrl-C at it prints how to quit.

        Returns:
            The lines, without white space around them.
        """
        if asks:
            try:
                import readline  # noqa: F401  (arrow keys and history in input())
            except ImportError:
                pass
        while True:
            try:
                line = input("> ") if asks else lines.readline()
            except EOFError:
                return
            except KeyboardInterrupt:
                if not asks:
                    raise
                print("\n(/quit ends the conversation)", file=out)
                continue
            if not asks and not line:
                return
            yield line.strip()

    def command(self, line: str, out: TextIO) -> bool:
        """Obey a slash command.

        Args:
            line: the command and its argument.
            out: where its message is printed.

        Returns:
            False where the conversation ends, else True.

        Raises:
            ValueError: in one line, for an unknown command or a bad argument.
        """
        name, _, arguments = line.partition(" ")
        arguments = arguments.strip()
        if name not in COMMANDS:
            is_file = os.path.isfile(os.path.expanduser(line))
            hint = f"; to attach a picture: /image {line}" if is_file else did_you_mean(name, COMMANDS)
            name = name if len(name) <= 80 else f"{name[:77]}..."
            raise ValueError(f"unknown command {name}{hint} (commands: {' '.join(COMMANDS)})")
        if name in ("/save", "/load") and not arguments:
            raise ValueError(f"say {name} {COMMANDS[name]}")
        if name == "/quit":
            return False
        if name == "/image":
            paths = pasted_paths(arguments)
            self.pending_images += [read_image(path) for path in paths]
            print(f"attached {', '.join(paths)}", file=out)
        elif name == "/seed":
            self.seed, self.turn = parse_seed(arguments), 0
        elif name == "/save":
            path = check_output(os.path.expanduser(arguments), {".json": "JSON"})
            write_text(path, json.dumps(self.to_json(), indent=1) + "\n")
            print(f"saved {path}", file=out)
        elif name == "/load":
            turns = self.load(os.path.expanduser(arguments))
            print(f"loaded {arguments}: {turns} turn{'s' * (turns != 1)}", file=out)
        elif name == "/new":
            self.begin()
        else:
            print(HELP, file=out)
        return True

    def to_json(self) -> dict[str, object]:
        """The conversation, and the seed of its next turn: what `load` reads."""
        return self.document.to_json() | {"seed": self.seed, "turn": self.turn}

    def load(self, path: str) -> int:
        """Go on with a saved conversation: the next answer is the one that would have come then.

        Args:
            path: a file that /save wrote, or the JSON of any `Document`.

        Returns:
            How many turns of the user's it has.

        Raises:
            ValueError: the file cannot be read or holds no conversation; nothing is changed then.
        """
        data = load_json(path)
        try:
            document = Document.from_json(data)
            roles = [None, *(segment.role for segment in document.segments)]
            turns = sum(role == "user" != before for before, role in zip(roles, roles[1:], strict=False))
            seed, turn = data.get("seed", self.seed), data.get("turn", turns)
            if not all(isinstance(number, int) and number >= 0 for number in (seed, turn)):
                raise ValueError("seed and turn are whole numbers")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path} holds no conversation: {reason}") from error
        self.document, self.seed, self.turn = document, seed, turn
        return turns

    def say(self, engine: Any, line: str, out: TextIO, protocol: str | None) -> None:
        """Take one turn: the user's images and words, then the answer. The turn is kept only if the answer is finished.

        Args:
            engine: answers.
            line: the user's words.
            out: where the answer is printed.
            protocol: how images are shown, as of `inline_protocol`.

        Raises:
            ValueError: in one line, for what the engine refuses.
        """
        user_segments = [*(Segment(image=image) for image in self.pending_images), Segment(text=line)]
        request = Document([*self.document.segments, *user_segments])
        answer: list[Segment] = []
        output = self.output or default_output(request, engine.outputs)
        stream = engine.stream(request, output=output, seed=offset_seed(self.seed, self.turn), **self.options)
        for part in stream:
            if isinstance(part, str):
                print(part, end="", file=out, flush=True)
                if answer and answer[-1].text is not None:
                    answer[-1].text += part
                else:
                    answer.append(Segment(text=part, role="assistant"))
                continue
            if answer and answer[-1].text is not None:
                print(file=out)
            path = self.save(part)
            print(f"[{path}]", file=out)
            if protocol is not None:
                print(inline(part, protocol), end="", file=out, flush=True)
            answer.append(Segment(image=part, role="assistant"))
        if answer and answer[-1].text is not None:
            print(file=out)
        self.document = Document([*request.segments, *answer])
        self.pending_images = []
        self.turn += 1

    def save(self, image: Image) -> Path:
        """Save an image under the first free number in the folder, which is made when it is needed.

        Args:
            image: the image.

        Returns:
            The file's path.

        Raises:
            ValueError: where the folder cannot be made or written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot make the folder {str(self.folder)!r}: {error.strerror}") from error
        taken = {path.stem for path in self.folder.glob("picture-*.png")}
        number = next(i for i in range(1, len(taken) + 2) if f"picture-{i:03d}" not in taken)
        path = check_output(self.folder / f"picture-{number:03d}.png", {".png": "PNG"})
        save_image(path, image)
        return path
