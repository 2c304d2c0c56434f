"""Write the rendered world as sharded parquet: pictures, captions, boxes, masks, depth, questions, edits, verdicts
and stories.

    python data_tools/make_scenes.py out_dir --count 1000 --shards 4 --seed 0 [--size 64] [--kind heldout]
    datasets.load_dataset("parquet", data_files="out_dir/*.parquet", split="train")        # pictures come decoded

Row i depends on (seed, i) only, whatever the number of shards: the world is infinite, and `--start N` goes on where a
run of N rows ended (into another folder). Boxes, masks and items are in z-order, from back to front. Each shard is
written under a temporary name, then renamed. Exit 2 with one line for bad input or a full disk. Does not depend on
models and training.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unigen.toyworld.language import (
    caption,
    descriptive_caption,
    expansion,
    extract_facts,
    noisy_caption,
    questions,
    sample_edit,
    sample_judgement,
    short_caption,
)
from unigen.toyworld.scenes import Scene, SceneRenderer, is_held_out, sample_scene
from unigen.toyworld.stories import story
from unigen.utils.argparser import OneLineParser
from unigen.utils.disk import check_folder
from unigen.utils.extras import require_extra
from unigen.utils.option_types import SEED, number_argument

ROW_GROUP = 200  # rows held in memory at a time
SIZES = (32, 512)  # sides of a picture in pixels


def features() -> Any:
    """The columns as `datasets.Features`."""
    from datasets import Features, Image, List, Value

    text, number = Value("string"), Value("float32")
    item = {"name": text, "color": text, "x": number, "y": number, "size": number, "angle": number}
    return Features(
        {
            "index": Value("int64"),
            "image": Image(),
            "depth": Image(),  # 16 bit, 65535 = far
            "masks": List(Image()),  # 255 = a visible pixel of the item
            "boxes": List(List(number)),  # x0 y0 x1 y1 in pixels around the visible pixels
            "items": List(item),
            "background": text,
            "ground": Value("bool"),
            "heldout": Value("bool"),
            "caption": text,
            "short": text,
            "descriptive": text,
            "noisy": text,
            "expansion": {"short": text, "long": text},
            "questions": List({"question": text, "answer": text, "kind": text}),
            "edit": {"instruction": text, "kind": text, "image": Image()},
            "verdict": {"prompt": text, "ok": Value("bool"), "reason": text},
            "story": {
                "request": text,
                "references": List(Image()),
                "frames": List({"text": text, "image": Image()}),
            },
        }
    )


def png_cell(pixels: np.ndarray) -> dict[str, Any]:
    """An image cell: uint8 (H, W, 3), uint8 (H, W) or uint16 (H, W) as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=4)
    return {"bytes": buffer.getvalue(), "path": None}


def make_row(world: SceneRenderer, seed: int, index: int, size: int, held_out: bool) -> dict[str, Any]:
    """Row `index` of the world: a pure function of (seed, index, size, held_out)."""
    rng = np.random.default_rng((seed, index))
    scene = sample_scene(rng, size, held_out)
    picture = world.render(scene)
    edit = sample_edit(scene, rng, held_out=held_out)
    judgement = sample_judgement(scene, rng)
    short, long = expansion(scene, rng)
    tale = story(rng, references=int(rng.integers(3)), held_out=held_out, size=size)

    def draw(scene_to_draw: Scene) -> dict[str, Any]:
        return png_cell(world.render(scene_to_draw).image)

    return {
        "index": index,
        "image": png_cell(picture.image),
        "depth": png_cell(np.rint(picture.depth * 65535).astype(np.uint16)),
        "masks": [png_cell(mask.astype(np.uint8) * 255) for mask in picture.masks],
        "boxes": picture.boxes.tolist(),
        "items": [vars(item) for item in scene.objects],
        "background": scene.background,
        "ground": scene.ground,
        "heldout": is_held_out(scene),
        "caption": caption(extract_facts(scene)),
        "short": short_caption(scene, rng),
        "descriptive": descriptive_caption(scene, rng),
        "noisy": noisy_caption(scene, rng),
        "expansion": {"short": short, "long": long},
        "questions": [vars(qa) for qa in questions(scene, rng)],
        "edit": {"instruction": edit.instruction, "kind": edit.kind, "image": draw(edit.edited_scene)},
        "verdict": {"prompt": judgement.prompt, "ok": judgement.is_satisfied, "reason": judgement.reason},
        "story": {
            "request": tale.request,
            "references": [draw(reference) for reference in tale.references],
            "frames": [{"text": text, "image": draw(page)} for text, page in tale.pages],
        },
    }


def write_shard(path: Path, world: SceneRenderer, seed: int, indices: range, size: int, held_out: bool) -> None:
    """One parquet file, complete or not there. OSError when it cannot be written."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = features().arrow_schema
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with pq.ParquetWriter(temporary, schema) as writer:
            for start in range(0, len(indices), ROW_GROUP):
                rows = [make_row(world, seed, i, size, held_out) for i in indices[start : start + ROW_GROUP]]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_shards(folder: Path, count: int, shards: int, seed: int, size: int, held_out: bool, start: int) -> list[Path]:
    """Write all shards.

    Args:
        folder: for the shards, made where it is not there; shards of another number of files are refused.
        count: rows in all, at least `shard_files`.
        shards: files, at least 1.
        seed: of the world, at least 0.
        size: side of the pictures in pixels, in `SIZES`.
        held_out: whether the scenes are of combinations that are never in training.
        start: index of the first row.

    Returns:
        The paths of the shards.

    Raises:
        ValueError: bad input.
        OSError: the disk.
    """
    if shards > count:
        raise ValueError(f"--shards {shards} is more than --count {count}: every shard needs a row")
    require_extra("train", "datasets")
    world = SceneRenderer(size)
    folder = check_folder(folder, replace=False)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"scenes-{k:05d}-of-{shards:05d}.parquet" for k in range(shards)]
    strangers = sorted(set(folder.glob("*.parquet")) - set(paths))
    if strangers:
        raise ValueError(f"{folder} holds other shards ({strangers[0].name}): choose an empty folder")
    bounds = [start + count * k // shards for k in range(shards + 1)]
    for k, path in enumerate(paths):
        write_shard(path, world, seed, range(bounds[k], bounds[k + 1]), size, held_out)
        print(f"{path}: {bounds[k + 1] - bounds[k]} rows", flush=True)
    return paths


def main(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    parser = OneLineParser(prog="make_scenes", description="Write rendered scenes as sharded parquet.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("-n", "--count", type=number_argument(1, 100_000_000), default=1000, help="rows in all")
    parser.add_argument("--shards", type=number_argument(1, 100_000), default=1, help="files")
    parser.add_argument("--seed", type=SEED.parse, default=0)
    parser.add_argument("--size", type=number_argument(*SIZES), default=64, help="side of the pictures in pixels")
    parser.add_argument(
        "--kind", choices=("train", "heldout"), default="train", help="heldout: combinations never in training"
    )
    parser.add_argument("--start", type=number_argument(0, 2**62), default=0, help="index of the first row")
    try:
        args = parser.parse_args(argv)
        make_shards(args.folder, args.count, args.shards, args.seed, args.size, args.kind == "heldout", args.start)
    except ValueError as error:
        print(f"make_scenes: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        why = error.strerror or str(error)
        print(
            f"make_scenes: error: cannot write to {args.folder} ({why}): free space or choose another folder",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
