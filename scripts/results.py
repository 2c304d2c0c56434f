"""docs/results.md from the runs stored in docs/runs, so that no figure is written by hand.

python scripts/results.py            # every docs/runs/*.json is what a command's --json FILE wrote, its .png beside it
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from unigen.media.output import write_text
from unigen.utils.files import load_json

ROOT = Path(__file__).resolve().parent.parent
RUNS_FOLDER, RESULTS_PAGE = ROOT / "docs" / "runs", ROOT / "docs" / "results.md"


def format_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        if 0 < abs(value) < 1e-3:
            return f"{value:.1e}"
        return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
    if isinstance(value, (list, tuple)):
        return " to ".join(format_cell(v) for v in value)
    return str(value)


def markdown_table(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table of the columns that any row fills."""
    columns = [k for k in dict.fromkeys(k for row in rows for k in row) if any(row.get(k) is not None for row in rows)]
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(format_cell(row.get(column)) for column in columns) for row in rows]
    return [f"| {line} |" for line in lines]


def section(title: str, run: dict[str, Any]) -> list[str]:
    """One run: its command, where and when it ran, and its figures."""
    seconds = run.get("seconds")
    duration = f", {seconds:.0f} s" if seconds else ""
    lines = [
        f"## {title}",
        "",
        f"`{run['command']}`",
        "",
        f"{run['model']}; {run['hardware']}; {run['date']}{duration}",
        "",
    ]
    if run.get("overall") is not None:
        lines += [f"Overall **{format_cell(run['overall'])}**", ""]
    rows = run.get("rows") or []
    if rows and all(": " in row["name"] for row in rows):  # each figure of each variant: a line a variant
        variants: dict[str, dict[str, Any]] = {}
        for row in rows:
            name, _, figure = row["name"].partition(": ")
            variants.setdefault(name, {"name": name})[figure] = row["value"]
        return [*lines, *markdown_table(list(variants.values())), ""]
    if run.get("tasks"):
        lines += [*markdown_table([run["tasks"]]), ""]
    if rows:
        lines += [*markdown_table(rows), ""]
    return lines


def main() -> int:
    files = sorted(RUNS_FOLDER.glob("*.json"))
    if not files:
        print(f"results: error: {RUNS_FOLDER} holds no runs; store what --json FILE writes there", file=sys.stderr)
        return 2
    lines = ["# Results", "", "Written by `python scripts/results.py` from the runs in `docs/runs`.", ""]
    for file in files:
        lines += section(file.stem.replace("-", " "), load_json(file))
        if (picture := file.with_suffix(".png")).exists():
            lines += [f"![{file.stem}]({picture.relative_to(RESULTS_PAGE.parent)})", ""]
    write_text(RESULTS_PAGE, "\n".join(lines).rstrip() + "\n")
    print(RESULTS_PAGE.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
