"""What is Show-o's own: where its parts are, what sees what, inpainting, what it refuses. How its folder behaves is in
test_public."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import unigen
from tests.parity import showo as case
from unigen.batch import pack
from unigen.commands import main as cli
from unigen.document import Document, Segment
from unigen.hub.resolve import read_json
from unigen.hub.weights import read_tensors, write_tensors
from unigen.utils.files import save_json


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("showo")
    case.checkpoint(made)
    return made


@pytest.fixture(scope="module")
def engine(folder: Path) -> Any:
    return unigen.load(str(folder), "cpu")


def test_pickles(engine: Any, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "pickled")
    for path in sorted((tmp_path / "pickled").rglob("*.safetensors")):
        torch.save(read_tensors(path), path.with_name("pytorch_model.bin"))
        path.unlink()
    second = unigen.load(str(tmp_path / "pickled"), "cpu")
    assert second.generate(case.PROMPT, steps=2).tobytes() == engine.generate(case.PROMPT, steps=2).tobytes()


def test_frequencies_that_are_computed_may_be_stored(engine: Any, folder: Path, tmp_path: Path) -> None:
    """As older versions of transformers wrote them."""
    shutil.copytree(folder, tmp_path / "old")
    (path,) = (path for path in (tmp_path / "old").glob("*.safetensors"))
    state = read_tensors(path)
    first = next(name for name in state if "layers.0.self_attn" in name)
    name = first.partition("self_attn")[0] + "self_attn.rotary_emb.inv_freq"
    write_tensors(path, state | {name: torch.ones(4)})
    second = unigen.load(str(tmp_path / "old"), "cpu")
    assert second.generate(case.PROMPT, steps=2).tobytes() == engine.generate(case.PROMPT, steps=2).tobytes()


def test_what_is_learnt_sees_what_is_drawn(engine: Any) -> None:
    """The logits of a picture of masked codes are those of the first step that draws it."""
    model, seen = engine.model, []
    generator = model.generators["masked"]

    def watched(state: Any, number: int, logits_NV: Tensor, first: int) -> None:
        seen.append(logits_NV.clone())
        type(generator)._unmask(generator, state, number, logits_NV, first)

    with patch.object(generator, "_unmask", watched):
        engine.generate(case.PROMPT, guidance=1.0, steps=1)
    codes = torch.zeros(case.GRID, case.GRID, dtype=torch.int64)
    tokens = model.template.encode(Document([Segment(text=case.PROMPT), Segment(image=codes, role="assistant")]))
    batch = model.insert_image_ids(pack([[tokens, tokens]], 2 * len(tokens), case.SIDE))
    rows_M1, at_MP = batch.span_positions(batch.images_of("masked"))
    batch.ids_BL[rows_M1, at_MP] = generator.mask_id
    with torch.no_grad():
        states_MPD = model.hidden_states(batch)[rows_M1, at_MP]
        logits_MPV = model.logits(states_MPD, model.vocabulary.image_start, model.vocabulary.image_stop)
    for logits_PV in logits_MPV:
        torch.testing.assert_close(logits_PV, seen[0], atol=1e-4, rtol=1e-4)


def test_a_part_of_a_picture_is_painted_anew(engine: Any) -> None:
    rng = np.random.default_rng(0)
    given = rng.integers(0, 256, (case.SIDE, case.SIDE, 3), dtype=np.uint8)
    mask = np.zeros_like(given)
    mask[:, case.SIDE // 2 :] = 255
    painted = np.asarray(engine.inpaint(given, case.PROMPT, mask, steps=4))
    assert (painted[mask == 0] == given[mask == 0]).all() and (painted[mask > 0] != given[mask > 0]).any()


def test_a_mask_marks_the_codes_that_it_covers_by_half(engine: Any) -> None:
    """As the official script resizes it: a thin line over a code does not mark it, more than its half does."""
    cell, rows = case.SIDE // case.GRID, case.GRID
    marks = engine.model.template.mask_to_cells

    def columns(first: int, last: int) -> list[int]:
        mask = np.zeros((case.SIDE, case.SIDE, 3), np.uint8)
        mask[:, first:last] = 255
        cells = marks(Image.fromarray(mask), case.SIDE, (rows, rows))
        assert (cells == cells[:1]).all()
        return [int(column) for column in np.flatnonzero(cells[0])]

    assert columns(2 * cell, 4 * cell) == [2, 3]
    assert columns(2 * cell, 4 * cell + 1) == [2, 3]  # a quarter of the next
    assert columns(2 * cell, 4 * cell + cell - 1) == [2, 3, 4]
    assert columns(0, case.SIDE) == list(range(rows))
    thin = np.zeros((case.SIDE, case.SIDE, 3), np.uint8)
    thin[0, 0] = 255
    with pytest.raises(ValueError, match="marks nothing"):
        engine.inpaint(np.zeros_like(thin), case.PROMPT, thin)


def test_what_is_kept_is_read_as_all_pictures_are(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes that stay are of the template's own reading of the picture, which keeps its size and its pixels."""
    given = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3 * case.SIDE, 5 * case.SIDE, 3), np.uint8))
    mask = np.zeros((3 * case.SIDE, 5 * case.SIDE), bool)
    mask[:10, :10] = True  # of the upper left code, which shows 12 x 12 pixels
    seen: list[torch.Tensor] = []
    generate = engine.generate
    monkeypatch.setattr(
        engine,
        "generate",
        lambda *a, fixed_codes, **o: seen.append(fixed_codes) or generate(*a, fixed_codes=fixed_codes, **o),
    )
    painted = np.asarray(engine.inpaint(given, case.PROMPT, mask, steps=4))
    square = given.crop((0, 0, 3 * case.SIDE, 3 * case.SIDE))
    read = engine.model.encode_images(engine.model.preprocess_images([square]))[0]
    assert seen[0].flatten()[0] == -1 and torch.equal(seen[0].flatten()[1:], read.flatten()[1:])
    assert (painted[~mask] == np.asarray(given)[~mask]).all() and (painted[mask] != np.asarray(given)[mask]).any()


def test_pictures_are_read_alone_as_in_a_batch(engine: Any) -> None:
    """What is read in full attention stands beside what is read causally, and beside what is drawn."""
    pictures = [Image.new("RGB", (40, 20), color) for color in ("red", "blue")]
    asked = [[pictures[0], "What is it"], [pictures[1], "What is it on a blue table"]]
    together = engine.generate_batch(asked, [0, 0], output="text", max_tokens=8)
    assert together == [engine.generate(one, "text", max_tokens=8) for one in asked]
    requests = [
        engine.build_request(asked[0], "text", max_tokens=8),
        engine.build_request(case.PROMPT, "image", steps=3),
    ]
    parts: dict[int, list[Any]] = {0: [], 1: []}
    for number, part in engine.run_requests(requests):
        parts[number].append(part)
    assert "".join(parts[0]).strip() == together[0]
    assert parts[1][0].tobytes() == engine.generate(case.PROMPT, steps=3).tobytes()


def test_what_it_refuses(engine: Any) -> None:
    red = Image.new("RGB", (8, 8), "red")
    with pytest.raises(ValueError, match="generates images from text alone"):
        engine.edit(red, "make it red")
    for asked in ("What is it", [red, red, "What is it"]):
        with pytest.raises(ValueError, match="one question about one picture"):
            engine.generate(asked, "text")
    with pytest.raises(ValueError, match="code by code"):
        engine.describe(red, candidates=2)
    with pytest.raises(ValueError, match="learns to draw here"):
        engine.model.template.encode(Document([Segment(text="a"), Segment(text="b", role="assistant")]))


def clip(folder: Path) -> None:
    save_json(folder / "config.json", read_json(folder / "config.json") | {"w_clip_vit": True})


def more_codes(folder: Path) -> None:
    path = folder / "magvitv2" / "pytorch_model.safetensors"
    state = read_tensors(path)
    write_tensors(path, state | {"quantize.embedding": -state["quantize.embedding"]})


def no_images(folder: Path) -> None:
    shutil.rmtree(folder / "magvitv2")


def no_language(folder: Path) -> None:
    shutil.rmtree(folder / "phi-1_5")


def other_words(folder: Path) -> None:
    shutil.copytree(folder / "phi-1_5", folder / "kept")
    tokenizer = read_json(folder / "kept" / "tokenizer.json")
    tokenizer["added_tokens"] = tokenizer["added_tokens"][:-1]
    save_json(folder / "phi-1_5" / "tokenizer.json", tokenizer)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (clip, "reads pictures by CLIP"),
        (more_codes, "is not that of 8 bits"),
        (no_images, "has no magvitv2/"),
        (no_language, "has no phi-1_5/"),
        (other_words, "is not that of"),
    ],
)
def test_other_folders(
    harm: Any, reason: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "other")
    harm(tmp_path / "other")
    assert cli.main(["info", "--model", str(tmp_path / "other"), "--device", "cpu"]) == 2
    told = capsys.readouterr().err
    assert reason in told and len(told.strip().splitlines()) == 1
