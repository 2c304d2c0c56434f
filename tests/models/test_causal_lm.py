"""`unigen convert --to vllm`: a folder that transformers alone reads as a causal language model, and still ours."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import unigen
from unigen.commands import main as cli
from unigen.models import convert, families, vllm_unsupported_reason

PLAIN = {"tiny", "liquid", "emu3"}
OURS = dict.fromkeys(("chameleon", "lumina"), "UnigenChameleonForCausalLM") | {"janus": "UnigenJanusForCausalLM"}
"""What vLLM runs by classes of ours."""
SERVED = PLAIN | OURS.keys()


def public(family: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """A small model of the family and how its pictures are asked for."""
    case = importlib.import_module(f"tests.parity.{family}")
    folder.mkdir()
    case.checkpoint(folder)
    return folder, {"prompt": case.PROMPT, "size": case.SIZE}


@pytest.fixture(scope="module", params=sorted(SERVED))
def exported(request: pytest.FixtureRequest, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The model that was, the folder that was made of it, and how a picture is asked for."""
    scratch = tmp_path_factory.mktemp(request.param)
    if request.param == "tiny":
        source, asked = tiny_folder, {"prompt": "a blue horse", "size": None}
    else:
        source, asked = public(request.param, scratch / "public")
    convert(source, scratch / "vllm", "vllm")
    return unigen.load(str(source), "cpu"), scratch / "vllm", asked


def scores(engine: Any, ids_1L: torch.Tensor) -> torch.Tensor:
    """What our model says to ids, (L, V)."""
    from unigen.batch import Batch

    ones = torch.ones_like(ids_1L)
    batch = Batch(ids_1L, ones.cumsum(1) - 1, ones, ones.bool(), torch.zeros(0, 3, dtype=torch.int64))
    with torch.no_grad():
        return engine.model.logits(engine.model.hidden_states(batch))[0]


@pytest.mark.parametrize("exported", sorted(PLAIN), indirect=True)
def test_transformers_reads_it_as_a_plain_language_model(exported: Any) -> None:
    from transformers import AutoModelForCausalLM

    engine, folder, asked = exported
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] in ("llama", "gemma") and config["architectures"][0].endswith("ForCausalLM")
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    assert type(lm).__module__.startswith("transformers.models.")
    request = engine.build_request(asked["prompt"], "image", size=asked["size"], seed=1)
    list(engine.run_requests([request]))
    ids_1L = torch.tensor([engine.model.token_ids(engine.model.template.encode(request.document))])
    assert engine.model.vocabulary.is_image(ids_1L).sum() >= 4
    with torch.no_grad():
        theirs_LV = lm(ids_1L).logits[0]
        mine_LV = scores(engine, ids_1L)
        torch.testing.assert_close(theirs_LV, mine_LV, rtol=1e-4, atol=1e-4)
        lm.get_output_embeddings().weight[-1] += 1  # the control: the last code's row
        assert not torch.allclose(lm(ids_1L).logits[0], mine_LV, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("exported", sorted(OURS), indirect=True)
def test_it_names_our_class(exported: Any) -> None:
    engine, folder, _ = exported
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [OURS[engine.model.family]]
    assert config["vocab_size"] == engine.model.vocabulary.size


def test_it_is_still_ours(exported: Any) -> None:
    engine, folder, asked = exported
    prompt, size = asked["prompt"], asked["size"]
    other = unigen.load(str(folder), "cpu")
    assert other.info()["family"] == engine.info()["family"] and other.outputs == engine.outputs
    assert other.generate(prompt, size=size, seed=3).tobytes() == engine.generate(prompt, size=size, seed=3).tobytes()
    assert set(other.model.generators) == set(engine.model.generators)


def test_it_can_be_made_of_itself(exported: Any, tmp_path: Path) -> None:
    _, folder, _ = exported
    convert(folder, tmp_path / "again", "vllm")
    for name in ("config.json", "unigen.json"):
        assert (tmp_path / "again" / name).read_text() == (folder / name).read_text()


def test_every_family_says_whether_it_is_served() -> None:
    names = {module.__name__.rpartition(".")[2] for module in families()}
    assert {name for name in names if vllm_unsupported_reason(name) is None} == SERVED


@pytest.mark.parametrize("family", ["showo", "var"])
def test_a_family_that_cannot_be_served_says_why(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _ = public(family, tmp_path / "public")
    assert cli.main(["convert", str(source), "--to", "vllm", "-o", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip()
    assert said == f"unigen: error: vLLM cannot serve {family}: {vllm_unsupported_reason(family)}"
    assert not (tmp_path / "out").exists()
    assert cli.main(["info", "--model", str(source), "--device", "cpu"]) == 0
    assert f"no, {vllm_unsupported_reason(family)}" in capsys.readouterr().out


def test_info_says_what_is_made_beside_vllm(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--model", str(tiny_folder), "--device", "cpu"]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.split(maxsplit=1)[1].startswith("yes, its next-token and text; flow, ") and "masked" in said


def test_the_control_of_unserved_families(monkeypatch: pytest.MonkeyPatch) -> None:
    from unigen.models import var

    monkeypatch.delattr(var, "VLLM_UNSUPPORTED")
    with pytest.raises(AttributeError):
        vllm_unsupported_reason("var")
