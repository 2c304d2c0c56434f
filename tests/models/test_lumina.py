"""What is Lumina-mGPT's own: its mark, sizes, norms that heads share, the order of a turn. Its folder: test_public."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import unigen
from tests.parity import chameleon as other
from tests.parity import lumina as case
from unigen.commands import main as cli
from unigen.document import Document, Segment
from unigen.hub.weights import read_tensors, write_tensors
from unigen.models import convert, find_family, load, lumina


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("lumina")
    case.checkpoint(made)
    return made


def test_whose_folder_it_is(folder: Path, tmp_path: Path) -> None:
    other.checkpoint(tmp_path)
    found = [find_family(place, None).__name__.rpartition(".")[2] for place in (folder, tmp_path)]
    assert found == ["lumina", "chameleon"]


def test_the_public_layout_is_written_as_it_was_read(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "public", "public")
    before, after = (read_tensors(place / "model.safetensors") for place in (folder, tmp_path / "public"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    engine = unigen.load(str(folder), "cpu")
    norm = engine.model.backbone.lm.model.layers[0].self_attn.q_norm
    with torch.no_grad():
        norm.weight[0] += 1
    with pytest.raises(ValueError, match="norms of their own"):
        lumina.to_public(engine.model.backbone.lm.state_dict(), case.SHARED)


def test_the_size_that_a_name_says(folder: Path, tmp_path: Path) -> None:
    named = tmp_path / "mGPT-7B-128" / "Lumina-mGPT-7B-64"  # the last name says it
    shutil.copytree(folder, named)
    for place, side in ((folder, 32), (named, 64)):
        assert unigen.load(str(place), "cpu").generate("a red apple").size == (side, side)


def test_what_an_answer_and_an_edit_read(folder: Path) -> None:
    """Words before pictures where a turn begins with them; guidance's other branch begins with the picture."""
    model = unigen.load(str(folder), "cpu").model
    codes = torch.zeros(2, 4, dtype=torch.int64)
    asked = Document([Segment(image=codes), Segment(text="make it red")])
    ids = model.token_ids(model.template.prompt(asked, output="image"))
    names = model.text_tokenizer.convert_ids_to_tokens(ids)
    assert "".join(names[1:13]).replace("Ġ", " ") == "make it red "
    row = [*["IMGIMGAZ"] * 4, lumina.EOL]
    assert names[13:] == [lumina.BOI, "<reserved08801>", "<reserved08802>", *row * 2, lumina.EOI, lumina.EOT]
    assert len(model.template.prompt(asked, output="image", branch=1)) == 0
    between = Document([Segment(image=codes), Segment(text="and"), Segment(image=codes)])
    first = model.template.prompt(between, output="text").spans[0]
    assert first[0] < len(names) - 13  # a picture between words stays where it is


def test_pictures_of_several_sizes_in_one_batch(folder: Path) -> None:
    engine = unigen.load(str(folder), "cpu")
    sizes = [(16, 8), (8, 16), (16, 8)]
    drawn = dict(
        engine.run_requests([engine.build_request("a", "image", seed=n, size=size) for n, size in enumerate(sizes)])
    )
    assert [drawn[n].size for n in range(3)] == sizes
    for n, size in enumerate(sizes):
        assert engine.generate("a", seed=n, size=size).tobytes() == drawn[n].tobytes()


def test_a_second_picture_is_guided_by_its_own_beginning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blind branch reads no word, and nothing of the first picture."""
    engine = unigen.load(str(folder), "cpu")
    model, begin, starts = engine.model, engine.model.template.begin_ids["next-token"], []
    step = model.cached_hidden_states

    def watched(embeds_BLD: Any, positions_BL: Any, mask: Any, cache: Any) -> Any:
        starts.extend(positions_BL[1:, 0].tolist())
        return step(embeds_BLD, positions_BL, mask, cache)

    def announces(_: Any, states: list[Any], hidden: list[list[torch.Tensor]]) -> list[int]:
        """A text of nothing, and then a picture while there may be one."""
        for state in states:
            state.pending_ids, state.finished = (
                [begin if begin in state.spec.stop_token_ids else state.spec.stop_token_ids[0]],
                True,
            )
        return [len(branches[0]) for branches in hidden]

    monkeypatch.setattr(model, "cached_hidden_states", watched)
    monkeypatch.setattr(model.generators["text"], "step", announces)
    parts = engine.generate("a", "interleaved", max_images=2, size=(16, 8))
    assert [type(part) for part in parts] == [Image.Image] * 2 and starts.count(0) == 2


@pytest.mark.parametrize(
    ("size", "reason"), [("12x16", "multiples of 8"), ("256x8", "up to 128"), ("10x8", "multiples of 4")]
)
def test_sizes_that_cannot_be(
    size: str, reason: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.png"
    where = ["--model", str(folder), "--device", "cpu", "-o", str(out)]
    assert cli.main(["generate", "a red apple", "--size", size, *where]) == 2
    told = capsys.readouterr().err
    assert reason in told and len(told.strip().splitlines()) == 1 and not out.exists()


def test_weights_stay_as_they_are_stored(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "half")
    write_tensors(tmp_path / "half" / "model.safetensors", read_tensors(folder / "model.safetensors"), torch.bfloat16)
    model = load(tmp_path / "half")
    assert {p.dtype for p in model.backbone.parameters()} == {torch.bfloat16}
