"""What a task of `unigen eval` writes: the figures, the outputs, a contact sheet for each group of examples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw

from unigen.evaluation.task import Example, Scores
from unigen.media.output import save_image, write_text

MAX_SHEET_SIDE = 128
"""Pixels along a side of an image on a contact sheet, at most."""


@dataclass(frozen=True)
class Report:
    """The figures of one run."""

    overall: float
    """The one figure by which models are compared."""
    tasks: Mapping[str, float]
    """Its parts, by name."""
    rows: Sequence[Mapping[str, object]]
    """All figures, each with name, value and unit."""
    details: Mapping[str, object] = field(default_factory=dict)
    """Further keys of the JSON object."""
    model: str | None = None
    """What was scored, where it is not the engine."""


def make_folder(folder: str | Path) -> Path:
    """Make a folder where it is not there yet.

    Args:
        folder: its path.

    Returns:
        The path.

    Raises:
        ValueError: where that cannot be.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write into {folder}: {error}") from error
    return Path(folder)


def write_outputs(
    folder: str | Path,
    examples: Sequence[Example],
    outputs: Sequence[Sequence[Image.Image | str]],
    scores: Sequence[Sequence[Scores]],
) -> None:
    """Write outputs.jsonl (prompt, tag, scores, text outputs) and, for images, a contact sheet for each tag.

    Args:
        folder: where to.
        examples: the examples of the outputs.
        outputs: of each example.
        scores: of each output; "correct" gives the colour of its frame.

    Raises:
        ValueError: where the folder cannot be written.
    """
    folder = make_folder(folder)
    lines = []
    for example, row, example_scores in zip(examples, outputs, scores, strict=True):
        prompt = example.prompt
        line = {
            "prompt": [part for part in prompt if isinstance(part, str)] if isinstance(prompt, list) else prompt,
            "tag": example.tag,
            "scores": list(example_scores),
            "texts": [output for output in row if isinstance(output, str)],
        }
        lines.append(json.dumps(line | example.metadata))
    write_text(folder / "outputs.jsonl", "\n".join(lines) + "\n")
    for tag in dict.fromkeys(example.tag for example in examples):
        group = [group for group in zip(examples, outputs, scores, strict=True) if group[0].tag == tag]
        images = [[output for output in row if isinstance(output, Image.Image)] for _, row, _ in group]
        if all(len(row) == len(found) for (_, row, _), found in zip(group, images, strict=True)):
            rows = [(example, row, marks) for (example, _, marks), row in zip(group, images, strict=True)]
            save_image(folder / f"{tag}.png", contact_sheet(rows))


def contact_sheet(
    rows: Sequence[tuple[Example, Sequence[Image.Image], Sequence[Scores]]], columns: int = 3
) -> Image.Image:
    """Each prompt above its images, with a green frame where an image is correct, else a red one.

    Args:
        rows: an example, its images and their scores.
        columns: examples beside each other.

    Returns:
        The sheet; images of more than `MAX_SHEET_SIDE` pixels are reduced.
    """
    side = min(MAX_SHEET_SIDE, max(max(image.size) for _, row, _ in rows for image in row))
    text_height, border = 14, 2
    cell = side + 2 * border
    width, height = max(200, max(len(row) for _, row, _ in rows) * cell + 8), cell + text_height
    sheet = Image.new("RGB", (columns * width, -(-len(rows) // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for k, (example, row, marks) in enumerate(rows):
        left, top = k % columns * width, k // columns * height
        for j, (image, mark) in enumerate(zip(row, marks, strict=True)):
            x, color = left + j * cell, "#2a9d4e" if mark["correct"] else "#d43a2f"
            draw.rectangle((x, top + text_height, x + cell - 1, top + text_height + cell - 1), fill=color)
            if max(image.size) > side:
                image = image.copy()
                image.thumbnail((side, side))
            sheet.paste(image, (x + border, top + text_height + border))
        label = str(example.prompt)
        while label and draw.textlength(label) > width - 8:
            label = label[:-1]
        draw.text((left + 2, top + 1), label, fill="black")
    return sheet
