"""Measurements of speed: a lazy table of the modules in scripts/benches.

    python scripts/bench.py --help
    python scripts/bench.py NAME [--json FILE] ...

A bench is one file there: its docstring's first line is its help, and `main(args) -> int` runs it. Exit codes as for
`unigen`: 0; 2 for bad input, in one line; 1 for a fault of ours.
"""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def find_benchmarks() -> dict[str, str]:
    """Name -> first line of the docstring, without importing anything."""
    files = sorted((ROOT / "scripts" / "benches").glob("[!_]*.py"))
    return {file.stem: (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n")[0] for file in files}


def main(args: list[str]) -> int:
    benchmarks = find_benchmarks()
    if not args or args[0] in ("-h", "--help"):
        print("usage: python scripts/bench.py NAME ...\n")
        print("\n".join(f"  {name:<10} {line}" for name, line in benchmarks.items()))
        return 0
    try:
        if args[0] not in benchmarks:
            raise ValueError(f"no bench {args[0]!r}; there are: {', '.join(benchmarks) or 'none'}")
        sys.path.insert(0, str(ROOT))
        return importlib.import_module(f"scripts.benches.{args[0]}").main(args[1:])
    except ValueError as error:
        print(f"bench: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
