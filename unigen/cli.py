"""The command line: a lazy table of commands over `unigen.load` and its engine.

    unigen generate "two apples on a blue background" -o out.png
    unigen describe out.png -q "how many apples?"
    unigen --help                                     (no torch is imported for this)

Knows arguments, files and exit codes; refuses to know how anything is generated, trained or scored. Exit codes: 0;
2 for bad input (any ValueError: one line on stderr, no traceback); 1 for a fault of ours (traceback).
"""

from __future__ import annotations

import argparse
import atexit
import io
import json
import math
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from unigen import ENGINES, limits, precision, progress
from unigen.arguments import Parser, did_you_mean, name, summary
from unigen.disk import DISK_FAULTS
from unigen.extras import missing, require
from unigen.limits import argument as limited
from unigen.numbers import parse_float, parse_int

DEFAULT_MODEL = "unigen-tiny"
BATCH = 16  # pictures made at a time


class Command(NamedTuple):
    """A row of the table. arguments=None: the command reads its own arguments (it is given the rest of the line)."""

    help: str
    run: Callable[[Any], int]
    arguments: Callable[[argparse.ArgumentParser], None] | None


# --- values ---------------------------------------------------------------------------------------------------------


def number(low: float, high: float = math.inf, *, open_low: bool = False) -> Callable[[str], float]:
    """A finite float in [low, high], or in (low, high]."""

    def parse(text: str) -> float:
        try:
            value = parse_float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not low <= value <= high or (open_low and value == low):
            least = f"above {low:g}" if open_low else f"of at least {low:g}"
            most = "" if high == math.inf else f" and at most {high:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite number {least}{most}")
        return value

    return parse


def whole(low: int, high: float = math.inf) -> Callable[[str], int]:
    """A whole number in [low, high]."""

    def parse(text: str) -> int:
        try:
            value = parse_int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            bounds = f"of at least {low}" if high == math.inf else f"from {low} to {high:,}"
            raise argparse.ArgumentTypeError(f"{limits.shorten(text)} is not a whole number {bounds}")
        return value

    return parse


def box(value: str) -> tuple[int, int, int, int]:
    """Four whole numbers: left, top, right, bottom, the right beyond the left and the bottom below the top."""
    try:
        left, top, right, bottom = (parse_int(part) for part in value.split(","))
    except ValueError:
        left = right = top = bottom = 0
    if not (0 <= left < right and 0 <= top < bottom):
        raise argparse.ArgumentTypeError(f"{value!r} is not a box like 0,0,32,32: left, top, right, bottom in pixels")
    return left, top, right, bottom


def size(value: str) -> tuple[int, int]:
    """Width and height: two whole numbers with an x between them."""
    width, _, height = value.partition("x")
    try:
        return limits.parse("width", width), limits.parse("height", height)
    except ValueError:
        most = limits.LIMITS["width"].high
        raise argparse.ArgumentTypeError(
            f"{limits.shorten(value)} is not a size like 512x768: width and height in pixels, {most:,} at most"
        ) from None


def setting(value: str) -> tuple[str, Any]:
    """A name and what it is to be, a number, true, false or text, with = between them."""
    name, _, given = value.partition("=")
    if not name.isidentifier() or not given:
        raise argparse.ArgumentTypeError(f"{value!r} is not a setting like max_model_len=4096")
    try:
        return name, json.loads(given)
    except ValueError:
        return name, given


def text(value: str) -> str:
    """Anything but nothing, in UTF-8."""
    if not value.strip():
        raise argparse.ArgumentTypeError("it is empty; say in words what you want")
    if any("\ud800" <= letter <= "\udfff" for letter in value):  # as Python has bytes of another encoding
        raise argparse.ArgumentTypeError("it is not in UTF-8; set the terminal to UTF-8, or write it anew")
    return value.strip()


# --- arguments ------------------------------------------------------------------------------------------------------


def model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        type=name,
        default=DEFAULT_MODEL,
        help="a name, a folder, or owner/name on the hub (default: %(default)s)",
    )
    group.add_argument("--lmm", type=name, help="a model that reads and writes for the one that draws (--model)")
    group.add_argument(
        "--engine", choices=ENGINES, default="local", help="what runs the language model (default: %(default)s)"
    )
    group.add_argument(
        "--vllm", type=setting, action="append", metavar="NAME=VALUE", help="of vLLM's engine; may be repeated"
    )
    group.add_argument(
        "--adapter", type=name, help="a folder: what the --lmm reads is told to a pipeline (--model) by its states"
    )
    precision.add_arguments(group)


def sampling_arguments(parser: argparse.ArgumentParser, generator: str = "next-token") -> None:
    """What is not given is left to the engine's defaults. generator: the default one, as the help names it."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--seed", type=limited("seed"), default=0, help="same seed, same result (default: %(default)s)")
    group.add_argument("--guidance", type=limited("guidance"), help="how strongly pictures follow the words; 1 is off")
    group.add_argument("--temperature", type=limited("temperature"), help="1 samples as trained, 0 takes the likeliest")
    group.add_argument("--top-k", type=limited("top_k"), help="sample among the k likeliest tokens; 0 is all")
    group.add_argument("--top-p", type=limited("top_p"), help="nucleus sampling: the smallest set of this probability")
    group.add_argument("--size", type=size, metavar="WxH", help="of pictures in pixels, where the model draws any")
    group.add_argument(
        "--generator", type=name, help=f"how pictures are written (default: {generator}; see unigen info)"
    )
    group.add_argument("--steps", type=limited("steps"), help="in how many steps, where the generator can choose")
    group.add_argument("--sampler", type=name, help="of a flow: euler, heun, dpm++, unipc or deis")
    group.add_argument(
        "--accelerate", type=name, help="of next-token, several codes a step: jacobi (same picture) or sjd"
    )
    group.add_argument("--guidance-kind", type=name, help="of a flow: cfg, rescale, apg or cfg-zero")
    group.add_argument("--negative", metavar="WORDS", help="of a diffusers pipeline: what pictures are not to show")


def generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", type=text, help="what to draw, in words")
    parser.add_argument("--class", dest="label", type=text, help="of a model that draws classes: a number or a name")
    parser.add_argument(
        "-o", "--output", default="out.png", help="the picture, - is a PNG on stdout (default: %(default)s)"
    )
    parser.add_argument("-n", type=limited("n"), default=1, help="how many: out-0.png, out-1.png, ... (default: 1)")
    parser.add_argument("--grid", action="store_true", help="all of them in one picture")
    parser.add_argument(
        "--candidates",
        type=limited("candidates"),
        help="draw so many for each, and keep the one that reads best",
    )
    sampling_arguments(parser)
    model_arguments(parser)


def describe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", help="a picture")
    parser.add_argument("-q", "--question", type=text, help="answer this instead of describing the picture")
    parser.add_argument(
        "--candidates", type=limited("candidates"), help="captions of which to give the best; 1 is fastest"
    )
    model_arguments(parser)


def strength_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--strength", type=number(0, 1, open_low=True), help="of a diffusers pipeline: how much is changed; 1 is all"
    )


def edit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", help="the picture to change")
    parser.add_argument("instruction", type=text, help='such as "replace the sunflower with a rose"')
    parser.add_argument(
        "-o", "--output", default="out.png", help="the new picture, - is a PNG on stdout (default: %(default)s)"
    )
    strength_argument(parser)
    sampling_arguments(parser)
    model_arguments(parser)


def inpaint_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", help="the picture to paint in")
    parser.add_argument("prompt", type=text, help="what the whole picture is to show")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--mask", type=name, metavar="FILE", help="a picture, white and opaque where to paint")
    where.add_argument("--box", type=box, metavar="L,T,R,B", help="paint inside this box, in pixels of the picture")
    where.add_argument("--around", type=box, metavar="L,T,R,B", help="paint outside this box (outpainting)")
    where.add_argument("--vary", type=limited("vary"), help="paint this share of it, drawn by lot")
    parser.add_argument(
        "-o", "--output", default="out.png", help="the new picture, - is a PNG on stdout (default: %(default)s)"
    )
    strength_argument(parser)
    sampling_arguments(parser, "masked, else another that can keep codes")
    model_arguments(parser)


def pair_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="?", type=text, help="what the picture shows; left out, it is written too")
    parser.add_argument("--image", type=name, metavar="FILE", help="a picture to which the text is written")
    parser.add_argument("-o", "--output", type=name, help="the picture, - is a PNG on stdout (default: out.png)")
    sampling_arguments(parser, "joint")
    model_arguments(parser)


def story_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", type=text, help='such as "a witch and her raven"')
    parser.add_argument("--reference", action="append", default=[], help="a picture of a character; may be repeated")
    help_of_output = "one .html page, - is the page on stdout, or .md and its pictures (default: %(default)s)"
    parser.add_argument("-o", "--output", default="story.html", help=help_of_output)
    sampling_arguments(parser)
    model_arguments(parser)


def chat_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=name, default="chat", help="where pictures are saved (default: %(default)s)")
    sampling_arguments(parser)
    model_arguments(parser)


def serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", type=name, default="127.0.0.1", help="0.0.0.0 is everyone (default: %(default)s)")
    parser.add_argument("--port", type=whole(1, 65_535), default=8000, help="(default: %(default)s)")
    parser.add_argument("--name", type=name, help="of the model in requests (default: as --model)")
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--slots", type=whole(1), default=32, help="sequences generated at a time (default: %(default)s)"
    )
    group.add_argument("--queue", type=whole(1), default=128, help="answers that run and wait (default: %(default)s)")
    group.add_argument("--timeout", type=number(0, open_low=True), default=300.0, help="seconds (default: %(default)g)")
    group.add_argument(
        "--max-body", type=whole(1), default=32, metavar="MB", help="of a request (default: %(default)s)"
    )
    group.add_argument("--rate", type=whole(0), default=0, help="requests a minute of each client; 0 is any")
    group = parser.add_argument_group("faults")
    group.add_argument(
        "--heartbeat-timeout",
        type=number(3),
        default=30.0,
        metavar="S",
        help="start the model again when nothing was heard of it for so many seconds (default: %(default)g)",
    )
    group.add_argument(
        "--restart-timeout",
        type=number(1),
        default=300.0,
        metavar="S",
        help="/health fails when the model has been away for so many seconds (default: %(default)g)",
    )
    group = parser.add_argument_group("access")
    group.add_argument("--api-key", action="append", default=[], help="may be repeated; also from UNIGEN_API_KEY")
    group.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="of this server, asked without a key; may be repeated; * is any (default: localhost, --host, addresses)",
    )
    group.add_argument("--allow-origin", action="append", default=[], help="of pages in a browser; may be repeated")
    group.add_argument(
        "--trusted-proxy",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="whose X-Forwarded-For says who asks, an address or a network; may be repeated (default: none)",
    )
    group.add_argument("--allow-fetch", action="store_true", help="read pictures from public http(s) addresses")
    group.add_argument("--images-folder", type=name, metavar="FOLDER", help="keep pictures that are asked for by url")
    group.add_argument("--log-prompts", action="store_true", help="what is asked stands in the log")
    model_arguments(parser)


def train_arguments(parser: argparse.ArgumentParser) -> None:
    from unigen.training.recipes import shipped_recipes

    parser.add_argument("recipe", help="name of a shipped recipe, or path of a recipe file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as steps=1000 optim.lr=1e-4")
    rows = [f"  {name:<16} {summary(path)}" for name, path in shipped_recipes().items()]
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n".join(["shipped recipes:", *rows])


def convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="MODEL", help="a name, a folder, or owner/name on the hub")
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="what it holds is replaced")
    layouts = ["unigen", "public", "vllm"]
    parser.add_argument("--to", choices=layouts, default="unigen", help="layout (default: %(default)s)")


def info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=name, metavar="FILE", help="write it as one JSON object too; - is stdout")
    model_arguments(parser)


# --- commands -------------------------------------------------------------------------------------------------------


def source(args: argparse.Namespace) -> dict[str, Any]:
    """What `unigen.load` is given."""
    if args.adapter and not args.lmm:
        raise ValueError("an adapter joins two models: give the one that reads too, by --lmm")
    pair = {"lmm": args.lmm, "generator": args.model, "adapter": args.adapter}
    given = (pair if args.lmm else {"name": args.model}) | precision.options_of(args)
    if args.vllm or args.engine != "local":
        given |= {"engine": args.engine, "vllm": dict(args.vllm or [])}
    return given


def load(args: argparse.Namespace) -> Any:
    import unigen

    with progress.status(f"loading {' and '.join(filter(None, [args.lmm, args.model]))}"):
        return unigen.load(**source(args))


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    names = (
        "seed",
        "size",
        "accelerate",
        "guidance",
        "temperature",
        "top_k",
        "top_p",
        "generator",
        "steps",
        "sampler",
        "guidance_kind",
        "negative",
        "strength",
    )
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def note_size(given: tuple[int, int], made: Any) -> None:
    """Says on stderr where a picture comes back in another size than it was given."""
    if made.size != given:
        theirs, ours = ("x".join(map(str, size)) for size in (given, made.size))
        print(f"note: your picture of {theirs} pixels comes back as {ours}, as this model draws", file=sys.stderr)


def show_written(args: argparse.Namespace, paths: list[Path]) -> None:
    """Print the paths of files that are written, a line each; nothing where they go to stdout themselves."""
    for path in [] if args.piped else paths:
        print(path, flush=True)


def report(args: argparse.Namespace, paths: list[Path], start: float) -> int:
    show_written(args, paths)
    print(f"{time.perf_counter() - start:.1f} s", file=sys.stderr)
    return 0


def generate(args: argparse.Namespace) -> int:
    from unigen.output import PICTURES, check_output, grid, numbered, save_picture
    from unigen.samplers.seeds import later_seed
    from unigen.sequence import Segment

    if args.prompt is None and args.label is None:
        raise ValueError("say what to draw: in words, or by --class for a model that draws classes")
    if args.prompt is not None and args.label is not None:
        raise ValueError("both words and --class are given: a model draws one or the other, so leave one out")
    if args.piped and args.n > 1 and not args.grid:
        raise ValueError("only one picture can be written to stdout: add --grid, or give -o a file name")
    asked = args.prompt if args.label is None else Segment(label=args.label)
    path = check_output(args.output, PICTURES)
    paths = [path] if args.grid else [check_output(one, PICTURES) for one in numbered(path, args.n)]
    engine = load(args)
    start = time.perf_counter()
    options = sampling(args) | ({} if args.candidates is None else {"candidates": args.candidates})
    seed = options.pop("seed")
    batch = 1 if getattr(engine, "one_by_one", False) else BATCH
    images: list[Any] = []
    written: list[Path] = []
    try:
        with progress.bar(args.n, "image", silent=args.n <= batch) as bar:
            for first in range(0, args.n, batch):
                n = min(batch, args.n - first)
                made = engine.generate(asked, output="image", n=n, seed=later_seed(seed, first), **options)
                images += made if n > 1 else [made]
                bar.clear()
                if not args.grid:  # each batch is saved as it is finished
                    for target, image in zip(paths[first : first + n], images, strict=True):
                        save_picture(target, image)
                        written.append(target)
                    show_written(args, paths[first : first + n])
                    images = []
                bar.update(n)
        if args.grid:
            save_picture(path, grid(images))
            show_written(args, paths)
    except KeyboardInterrupt:
        print(f"\nstopped: {len(written)} of {len(paths)} files were written", file=sys.stderr)
        return 130
    return report(args, [], start)


def describe(args: argparse.Namespace) -> int:
    from unigen.images import read_image

    image = read_image(args.image)
    options = {} if args.candidates is None else {"candidates": args.candidates}
    if options and args.question:
        raise ValueError("--candidates is for captions: leave it out, or the question")
    engine = load(args)
    start = time.perf_counter()
    print(engine.describe(image, args.question, **options), flush=True)
    return report(args, [], start)


def edit(args: argparse.Namespace) -> int:
    from unigen.images import read_image
    from unigen.output import PICTURES, check_output, save_picture

    path = check_output(args.output, PICTURES)
    image = read_image(args.image)
    engine = load(args)
    start = time.perf_counter()
    edited = engine.edit(image, args.instruction, **sampling(args))
    save_picture(path, edited)
    note_size(image.size, edited)
    return report(args, [path], start)


def inpaint(args: argparse.Namespace) -> int:
    import numpy as np

    from unigen.engine import Engine
    from unigen.images import read_image, read_mask
    from unigen.output import PICTURES, check_output, save_picture
    from unigen.painting import limiting_window, lot

    path = check_output(args.output, PICTURES)
    image: Any = read_image(args.image)
    engine, given = None, image.size
    if args.mask:
        mask: Any = read_mask(args.mask)
    elif args.vary:
        engine = load(args)
        if not isinstance(engine, Engine):
            raise ValueError("--vary is for models that write codes: give this one a --mask")
        image, mask = lot(engine.model, image, args.vary, args.seed)
    else:
        left, top, right, bottom = args.box or args.around
        inside = np.zeros((image.height, image.width), dtype=bool)
        inside[top:bottom, left:right] = True
        mask = inside if args.box else ~inside
    engine = engine or load(args)
    start = time.perf_counter()
    painted = engine.inpaint(image, args.prompt, mask, **sampling(args))
    save_picture(path, painted)
    note_size(given, painted)
    if isinstance(getattr(engine, "painter", engine), Engine) and (window := limiting_window(mask)):
        left, top, right, bottom = window
        where = f"{right - left}x{bottom - top} pixels at {left},{top}"
        print(f"note: this model painted in a square of {where} of your picture; all else stays", file=sys.stderr)
    return report(args, [path], start)


def pair(args: argparse.Namespace) -> int:
    from unigen.images import read_image
    from unigen.output import PICTURES, check_output, save_picture

    image = read_image(args.image) if args.image else None
    if image is not None and (args.text or args.output or args.piped):
        raise ValueError("the picture is there: leave out its text, which is to be written, and --output")
    path = check_output(args.output or "out.png", PICTURES)
    engine = load(args)
    start = time.perf_counter()
    said, picture = engine.pair(args.text, image, **sampling(args))
    print(said)  # on stderr where the picture goes to stdout
    if image is not None:
        return 0
    save_picture(path, picture)
    return report(args, [path], start)


def story(args: argparse.Namespace) -> int:
    from unigen.images import read_image
    from unigen.output import check_story, write_story
    from unigen.sequence import as_words

    path = check_story(args.output)
    references = [read_image(name) for name in args.reference]
    engine = load(args)
    start = time.perf_counter()
    parts = engine.generate(
        [*references, as_words(story_prompt(args.prompt, len(references)))], output="interleaved", **sampling(args)
    )
    written = write_story(path, args.prompt, parts, made=args.line)
    return report(args, written, start)


def story_prompt(prompt: str, references: int) -> str:
    """The words that ask for a story, as the recipes ask for one."""
    asked = prompt if "story" in prompt.lower().split() else f"a story about {prompt}"
    if not references:
        return asked
    these = "this image" if references == 1 else f"these {references if references > 2 else 'two'} images"
    return f"follow the identity of {these}: {asked}"


def chat(args: argparse.Namespace) -> int:
    from unigen.chat import Chat

    engine = load(args)
    with progress.hidden():  # a bar would be drawn over the answer
        Chat(args.folder, output=None, **sampling(args)).run(engine, sys.stdin, sys.stdout)
    return 0


def serve(args: argparse.Namespace) -> int:
    require("serve")
    from unigen.serving.guard import Limits
    from unigen.serving.server import Settings, run

    given = source(args)
    keys = (*args.api_key, *(os.environ[name] for name in ["UNIGEN_API_KEY"] if name in os.environ))
    hosts = (*args.allow_host, args.host)
    settings = Settings(
        model=args.name or args.model,
        limits=Limits(keys, args.max_body << 20, rate=args.rate, hosts=hosts, origins=tuple(args.allow_origin)),
        seconds=args.timeout,
        folder=Path(args.images_folder) if args.images_folder else None,
        fetch=args.allow_fetch,
        prompts=args.log_prompts,
        origins=tuple(args.allow_origin),
        proxies=tuple(args.trusted_proxy),
        silence=args.heartbeat_timeout,
        patience=args.restart_timeout,
    )
    run(given, settings, args.host, args.port, args.slots, args.queue)
    return 0


def convert(args: argparse.Namespace) -> int:
    from unigen.models import convert as convert_model

    convert_model(args.source, args.output, args.to)
    print(args.output)
    return 0


def train(args: argparse.Namespace) -> int:
    from unigen.training import run_recipe
    from unigen.training.recipes import find_recipe

    recipe = find_recipe(args.recipe)
    require("train", "accelerate", "tensorboard")
    run_recipe(str(recipe), args.overrides)
    return 0


def evaluate(arguments: list[str]) -> int:
    from unigen.evaluation.runner import main as run

    return run(arguments) or 0


def info(args: argparse.Namespace) -> int:
    import unigen
    from unigen.display import fact_text
    from unigen.output import check_output, write_text

    path = check_output(args.json, {".json": "JSON"}) if args.json else None
    engine = load(args)
    facts = engine.info()
    if isinstance(engine, unigen.Engine):  # of one of the families
        from unigen.models import unserved

        why = unserved(facts["family"])
        others = [name for name in facts["generators"] if name != "next-token"]
        beside = f"; {', '.join(others)} beside it" if others else ""
        facts["vllm"] = f"no, {why}" if why else f"yes, its next-token and text{beside}"
    for key, value in facts.items():
        print(f"{key:<20} {fact_text(value)}")
    if path is not None:
        write_text(path, json.dumps(facts, indent=2, default=str) + "\n")
    return 0


COMMANDS = {
    "generate": Command("draw pictures from a sentence", generate, generate_arguments),
    "describe": Command("say what a picture shows, or answer a question about it", describe, describe_arguments),
    "edit": Command("change a picture as told", edit, edit_arguments),
    "pair": Command("a picture and its text, written at once", pair, pair_arguments),
    "inpaint": Command("paint a part of a picture anew, or all around it", inpaint, inpaint_arguments),
    "story": Command("write an illustrated story", story, story_arguments),
    "chat": Command("talk in text and pictures, in the terminal", chat, chat_arguments),
    "serve": Command("text and pictures behind the OpenAI API", serve, serve_arguments),
    "train": Command("run a recipe", train, train_arguments),
    "eval": Command("score a model", evaluate, None),
    "convert": Command("a public checkpoint in our layout, back, or for vLLM", convert, convert_arguments),
    "info": Command("what a model is made of", info, info_arguments),
}


PIPES = {
    **dict.fromkeys(("generate", "edit", "inpaint", "pair"), {"output": ".png"}),
    "story": {"output": ".html"},
    "info": {"json": ".json"},
}
"""Commands that write to stdout where an option is "-", and the kind of file that they write there."""


# --- the way in -----------------------------------------------------------------------------------------------------


def overview() -> str:
    rows = [f"  {name:<10} {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: unigen COMMAND ...",
            "",
            "One model that reads and writes text and pictures.",
            "",
            "commands:",
            *rows,
            "",
            "unigen COMMAND --help says more; unigen --version prints the version.",
        ]
    )


def parser_of(name: str) -> Parser:
    """The parser of one command of the table that has arguments of its own here."""
    command = COMMANDS[name]
    assert command.arguments is not None, name
    parser = Parser(prog=f"unigen {name}", description=f"{command.help[0].upper()}{command.help[1:]}.")
    command.arguments(parser)
    return parser


def dispatch(argv: list[str]) -> int:
    if argv[:1] == ["help"]:  # unigen help generate
        argv = [*argv[1:], "--help"]
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return 0
    if argv[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"unigen {version('unigen')}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        raise ValueError(f"no command {name!r}{did_you_mean(name, COMMANDS)} (commands: {', '.join(COMMANDS)})")
    command = COMMANDS[name]
    if command.arguments is None:
        return command.run(rest)
    args = parser_of(name).parse_args(rest)
    args.line = shlex.join(["unigen", *argv])
    args.piped = False
    for option, suffix in PIPES.get(name, {}).items():
        if getattr(args, option) == "-":
            from unigen.output import to_stdout

            with to_stdout(suffix) as path:
                setattr(args, option, str(path))
                args.piped = True
                return command.run(args)
    return command.run(args)


def flushed(run: Callable[[], int]) -> int:
    """What a command returns, when all that it has printed is written: what goes wrong there can then still be said."""
    try:
        return run()
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()


def drop_output() -> None:
    """What is still to be printed is lost, and Python shall not try again when it ends."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):  # it is no file
        pass


def main(argv: list[str] | None = None) -> int:
    """Runs a command line and returns its exit code."""
    for stream in (sys.stdout, sys.stderr):  # a letter that it cannot show must not undo what was done
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):  # where a text is used it is said to be no UTF-8
        sys.stdin.reconfigure(errors="surrogateescape")
    try:
        return flushed(lambda: dispatch(sys.argv[1:] if argv is None else argv))
    except ValueError as error:
        message = " ".join(str(error).split())
    except ModuleNotFoundError as error:
        line = missing(error, (sys.argv[1:] if argv is None else argv)[0])
        if line is None:
            raise
        message = line
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads has seen enough
        drop_output()
        return 0
    except OSError as error:
        if error.errno not in DISK_FAULTS:
            raise
        message = f"cannot read or write {error.filename or 'the output'}: {error.strerror}"
        if error.filename is None:
            drop_output()
    print(f"unigen: error: {message}", file=sys.stderr)
    return 2


def run() -> NoReturn:
    """Run the command line of this process and end it.

    The interpreter is not torn down, which takes long with torch and transformers loaded, and longer on a busy machine.
    What is registered to be done at the end (`atexit`) is done, and output is flushed."""
    try:
        code = main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(bool(error.code))
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        sys.exit(code)  # something still works
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # closed, or nobody reads: `main` has said what can be said
            pass
    os._exit(code)
