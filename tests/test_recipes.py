"""What recipes add to the parts: a tokenizer begun from another's, and the table of a flow's networks."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from unigen.commands.main import main
from unigen.models import load
from unigen.nn.denoisers import build_denoiser
from unigen.tokenizers import load_image_tokenizer

SMALL = [
    "model.image_size=16",
    "model.codebook_size=32",
    "model.channels=16",
    "model.decoder_channels=16",
    "model.wide_channels=16",
]
BRIEF = [
    "image_source=digits",
    "steps=1",
    "time_limit=none",
    "batch_size=2",
    "num_workers=0",
    "sample_every=0",
    "save_every=0",
]


@pytest.fixture(scope="module")
def networks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("flow_networks", "recipes/flow_networks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_a_tokenizer_begins_with_the_weights_of_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", "recipes/tiny_vq.py", *BRIEF, *SMALL, "precision=fp32"]
    assert main([*train, f"run_dir={tmp_path / 'vq'}"]) == 0
    more = ["model.quantizer=multiscale", "model.scales=1,2", "model.code_dim=4", "optim.lr=1e-9"]
    more += [f"init_from={tmp_path / 'vq' / 'model'}"]
    assert main([*train, *more, f"run_dir={tmp_path / 'scales'}"]) == 0
    old, new = (load_image_tokenizer(tmp_path / name / "model").state_dict() for name in ("vq", "scales"))
    fit = [
        name for name in old if name in new and not name.startswith("quantizer.") and old[name].shape == new[name].shape
    ]
    own = [name for name in new if not name.startswith("quantizer.") and name not in fit]
    assert sorted(own) == ["decoder.stem.weight", "encoder.head.bias", "encoder.head.weight"]
    for name in fit:
        torch.testing.assert_close(new[name], old[name], atol=1e-6, rtol=0)
    for wrong in (["model.wide_channels=32"], ["model.quantizer=vq", "model.code_dim=8", "model.wide_channels=32"]):
        assert main([*train, *more, *wrong, f"run_dir={tmp_path / 'no'}"]) == 2
        assert "is another network than model.*" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["unet", "dit-cross", "mm-dit"])
def test_a_network_is_sized_by_what_it_costs(networks: ModuleType, kind: str) -> None:
    shape = {"channels": 4, "sample_size": 4, "context_dim": 32}
    costs = []
    for gflops in (0.01, 0.04):
        found = networks.config_for_flops(kind, gflops, 2, *shape.values())
        network = build_denoiser(kind, **shape, layers=2, heads=4, head_dim=found.head_dim)  # type: ignore[arg-type]
        costs.append(networks.count_gflops(network, *shape.values()))
        assert 0.5 < costs[-1] / gflops < 2
    assert costs[1] > 2 * costs[0]


def test_spans_give_way_to_sentinels(networks: ModuleType) -> None:
    rng, cut = np.random.default_rng(0), []
    for _ in range(200):
        ids = [int(i) for i in rng.integers(10, 100, 40)]
        read, wanted = networks.span_corruption(ids, 1000, 2, rng)
        parts: dict[int, list[int]] = {}
        for i in wanted[:-1]:
            if i >= 1000:
                parts[i] = []
            else:
                parts[max(parts)].append(i)
        assert [i for r in read for i in (parts[r] if r >= 1000 else [r])] == ids and wanted[-1] == 2
        cut.append(sum(map(len, parts.values())) / len(ids))
    assert 0.1 < np.mean(cut) < 0.2


def test_the_table(
    networks: ModuleType, tiny_folder: Path, tmp_path: Path, emoji_font: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row is trained, scored and written; the sampler works on whatever tells the words."""
    given = [f"model={tiny_folder}", f"kl_tokenizer={tiny_folder / 'flow' / 'tokenizer'}", "gflops=0.001", "layers=1"]
    given += ["steps=1", "batch_size=2", "num_workers=0", "prompts_per_tag=1", "num_examples=3"]
    given += ["encoder_steps=2", f"encoder={tmp_path / 'encoder'}"]
    command = ["flow_networks.py", "--json", str(tmp_path / "table.json"), "--out", str(tmp_path / "sheets"), *given]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(
        networks, "VARIANTS", (("dit-adaln", "backbone"), ("dit-cross", "backbone"), ("mm-dit", "encoder"))
    )
    assert networks.main() == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "table.json").read_text())["rows"]}
    assert len(rows) == 15 and rows["mm-dit, encoder: loss"]["value"] > 0
    assert rows["dit-cross, backbone: gflops"]["baseline"] == rows["dit-adaln, backbone: gflops"]["value"]
    assert (tmp_path / "sheets" / "mm-dit-encoder.png").exists()
    monkeypatch.setattr(sys, "argv", ["flow_networks.py", "gflops=0"])
    assert networks.main() == 2


def test_heads_alone_learn_beside_a_frozen_backbone(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", "recipes/tiny.py", "batch_size=1", "seq_len=512", "num_workers=0", "steps=2", "time_limit=none"]
    train += [
        f"init_from={tiny_folder}",
        "freeze_backbone=true",
        "sample_every=0",
        "optim.warmup_steps=0",
        "generators.next-token=0.01",
    ]
    assert main([*train, "generators.flow=1", f"run_dir={tmp_path}"]) == 0
    old, new = ({k: v for k, v in load(folder).state_dict().items()} for folder in (tiny_folder, tmp_path / "model"))
    moved = {name.split(".")[1] for name in old if not torch.equal(old[name], new[name].to(old[name]))}
    assert moved == {"flow"}
    rare = ["generators.random-order=1", "generators.next-token=1000", f"run_dir={tmp_path / 'rare'}"]
    assert main([*train, *rare]) == 0  # no picture of its, and no hidden matrix
    for wrong in (
        [],
        ["generators.flow=1", "generators.masked=1"],
        ["generators.flow=1", f"lwf_teacher={tiny_folder}"],
    ):
        assert main([*train, *wrong, f"run_dir={tmp_path / 'no'}"]) == 2
        assert "freeze_backbone=true" in capsys.readouterr().err
