"""The command `story`: `unigen story "a witch and her raven" -o story.html`."""

from __future__ import annotations

import argparse
import time

from unigen.commands.arguments import (
    generation_options,
    load,
    model_arguments,
    parse_text,
    print_elapsed,
    sampling_arguments,
)

HELP = "write an illustrated story"
STDOUT = {"output": ".html"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `unigen story`."""
    parser.add_argument("prompt", type=parse_text, help='such as "a witch and her raven"')
    parser.add_argument("--reference", action="append", default=[], help="a picture of a character; may be repeated")
    help_of_output = "one .html page, - is the page on stdout, or .md and its pictures (default: %(default)s)"
    parser.add_argument("-o", "--output", default="story.html", help=help_of_output)
    sampling_arguments(parser, "interleaved")
    model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Write an illustrated story and its images. Returns the exit code."""
    from unigen.document import as_text
    from unigen.media.images import read_image
    from unigen.media.output import check_story, write_story

    path = check_story(args.output)
    references = [read_image(name) for name in args.reference]
    engine = load(args)
    start = time.perf_counter()
    parts = engine.generate(
        [*references, as_text(story_prompt(args.prompt, len(references)))],
        output="interleaved",
        **generation_options(args),
    )
    saved_paths = write_story(path, args.prompt, parts, provenance=args.line)
    return print_elapsed(args, saved_paths, start)


def story_prompt(prompt: str, references: int) -> str:
    """The prompt of a story, in the words of the training recipes.

    Args:
        prompt: words of the user.
        references: how many reference images stand before it.

    Returns:
        The prompt.
    """
    request = prompt if "story" in prompt.lower().split() else f"a story about {prompt}"
    if not references:
        return request
    reference_words = "this image" if references == 1 else f"these {references if references > 2 else 'two'} images"
    return f"follow the identity of {reference_words}: {request}"
