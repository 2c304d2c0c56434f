"""The command `convert`: `unigen convert MODEL -o FOLDER`."""

from __future__ import annotations

import argparse

HELP = "convert a public checkpoint to our layout, back, or for vLLM"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `unigen convert`."""
    parser.add_argument("source", metavar="MODEL", help="a name, a folder, or owner/name on the hub")
    parser.add_argument(
        "-o", "--output", required=True, metavar="FOLDER", help="where to write; what it holds is replaced"
    )
    layouts = ["unigen", "public", "vllm"]
    parser.add_argument("--to", choices=layouts, default="unigen", help="layout (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Write the model in another layout, and print the folder. Returns the exit code."""
    from unigen.models import convert as convert_model

    convert_model(args.source, args.output, args.to)
    print(args.output)
    return 0
