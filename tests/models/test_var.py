"""What is VAR's own: the class stays with its row, pictures alone and in a batch. Its folder is in test_public."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import unigen
from tests.parity import var as case
from unigen.models import convert, var


@pytest.fixture(scope="module", params=[False, True], ids=["own", "shared"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("var")
    case.checkpoint(made, shared=request.param)
    return made


def test_pictures_alone_and_in_a_batch(folder: Path, tmp_path: Path) -> None:
    """Classes do not leak from row to row, whatever runs beside; and our layout draws the same."""
    convert(folder, tmp_path / "ours")
    engine, ours = (unigen.load(str(place), "cpu") for place in (folder, tmp_path / "ours"))
    together = engine.generate_batch([1, 2, 1], [5, 6, 5], guidance=2.0)
    assert together[0].tobytes() == together[2].tobytes() != together[1].tobytes()
    for label, seed, picture in zip([1, 2], [5, 6], together, strict=False):
        alone = np.asarray(engine.generate(label, seed=seed, guidance=2.0), dtype=int)
        assert np.abs(alone - np.asarray(picture)).max() <= 1  # convolutions round otherwise in a batch
        assert ours.generate(label, seed=seed, guidance=2.0).tobytes() == alone.astype(np.uint8).tobytes()


def test_what_it_draws_by(folder: Path) -> None:
    engine = unigen.load(str(folder), "cpu")
    assert engine.info()["generators"] == ["next-scale"] and engine.outputs == ("image",)
    with pytest.raises(ValueError, match="no generator 'next-token'"):
        engine.generate(1, generator="next-token")


def test_scales_that_the_file_says(tmp_path: Path) -> None:
    """Others than those of the published models and than powers of two: the sides of the official buffers."""
    scales, state, levels = (1, 3, 4), case.tensors(False), []
    count = sum(side * side for side in scales)
    for name, rows in (("pos_1LC", (1, count)), ("lvl_embed.weight", (len(scales),))):
        state[name] = torch.randn(*rows, case.WIDTH)
    for level, side in enumerate(scales):
        levels += [level] * side * side
    levels_L = torch.tensor(levels)
    mask_LL = torch.where(levels_L[:, None] >= levels_L, 0.0, -torch.inf)
    torch.save(case.image_tokenizer_tensors(), tmp_path / var.TOKENIZER_FILE)
    for buffers in ({"lvl_1L": levels_L[None]}, {"attn_bias_for_masking": mask_LL[None, None]}):
        torch.save(state | buffers, tmp_path / f"var_d{case.LAYERS}.pth")
        engine = unigen.load(str(tmp_path), "cpu")
        assert engine.model.image_tokenizer.settings.scales == scales
        assert engine.generate(1).size == (4 * 16, 4 * 16)
    convert(tmp_path, tmp_path / "public", "public")
    again = unigen.load(str(tmp_path / "public"), "cpu")
    assert again.generate(1).tobytes() == engine.generate(1).tobytes()
    torch.save(state, tmp_path / f"var_d{case.LAYERS}.pth")
    with pytest.raises(ValueError, match="of no scales known here"):
        unigen.load(str(tmp_path), "cpu")


def test_a_trainers_checkpoint(folder: Path, tmp_path: Path) -> None:
    """As the official trainer saves one."""
    state = torch.load(folder / f"var_d{case.LAYERS}.pth")
    inside = {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
    torch.save({"epoch": 3, "trainer": {"config": {}, "var_wo_ddp": inside}}, tmp_path / f"var_d{case.LAYERS}.pth")
    torch.save(case.image_tokenizer_tensors(), tmp_path / var.TOKENIZER_FILE)
    first, second = (unigen.load(str(place), "cpu") for place in (folder, tmp_path))
    assert second.generate(1).tobytes() == first.generate(1).tobytes()


def test_scales_by_their_positions() -> None:
    assert var.SCALES_BY_LENGTH[680][-1] == 16 and var.SCALES_BY_LENGTH[2240][-1] == 32
    assert all(sum(side * side for side in scales) == count for count, scales in var.SCALES_BY_LENGTH.items())
    with pytest.raises(ValueError, match="7 positions are of no scales known here"):
        var.infer_scales({}, 7)


def test_a_folder_without_its_image_tokenizer_says_so(folder: Path, tmp_path: Path) -> None:
    shutil.copy(next(folder.glob("var_d*.pth")), tmp_path)
    with pytest.raises(ValueError, match="vae_ch160v4096z32.pth cannot be read .missing"):
        unigen.load(str(tmp_path), "cpu")
