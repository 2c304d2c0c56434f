"""Models whose language model is held in 8 or 4 bits: every family, what stays as it is, and what is said where the
package is missing. The products are compared with formulas written out here, not with what the package says of itself.

Run: pytest tests/models/test_precision.py        (with pip install 'unigen[quantization]'; else most is left out)
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import unigen
from scripts import bench
from scripts.parity import family_names
from unigen.backends.transformers_engine import load_transformers
from unigen.commands import main as cli
from unigen.commands.eval import build_parser
from unigen.evaluation.runner import find_task
from unigen.nn.quantized import count_parameters, quantize
from unigen.utils.precision import QUANTIZATIONS

needs = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: pip install 'unigen[quantization]'"
)
every = pytest.mark.parametrize("kind", QUANTIZATIONS)
NF4 = (
    *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
)
"""Dettmers et al. 2023, appendix E."""


def rounded(weight_OI: Tensor, kind: str) -> Tensor:
    """What the weights are in so many bits."""
    if kind == "8bit":
        scale_O1 = weight_OI.abs().amax(1, keepdim=True) / 127
        return (weight_OI / scale_O1).round() * scale_O1
    blocks = weight_OI.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(NF4)
    return (levels[((blocks / scale)[..., None] - levels).abs().argmin(-1)] * scale).reshape(weight_OI.shape)


def error(x: Tensor, reference: Tensor) -> float:
    return float((x - reference).norm() / reference.norm())


def spread(seed: int, outputs: int, inputs: int) -> nn.Linear:
    """A map whose rows and columns are of very different sizes, so that a scale in the wrong place shows."""
    rng, linear = torch.Generator().manual_seed(seed), nn.Linear(inputs, outputs)
    scale = torch.randn(outputs, 1, generator=rng).exp() * torch.randn(inputs, generator=rng).exp()
    linear.weight.data = torch.randn(outputs, inputs, generator=rng) * scale
    return linear


@needs
@every
@pytest.mark.parametrize("size", [(64, 128), (96, 192), (320, 864), (33, 48)], ids=str)
def test_products_are_those_of_rounded_weights(kind: str, size: tuple[int, int]) -> None:
    linear = spread(0, *size)
    true, bias = linear.weight.detach().clone(), linear.bias.detach()
    module = nn.Sequential(linear, nn.Linear(64, 32)).eval()
    quantize(module, kind, "cpu")
    whole = kind == "8bit" or (size[0] % 32 == 0 and size[1] % 64 == 0)
    weight_OI = rounded(true, kind) if whole else true
    assert (type(module[0]) is nn.Linear) == (not whole)
    for rows in (1, 3, 40):
        x = torch.randn(1, rows, size[1], generator=torch.Generator().manual_seed(rows))
        with torch.inference_mode():
            assert error(module[0](x), x @ weight_OI.t() + bias) < (0.02 if whole else 1e-5)
            assert whole == (error(module[0](x), x @ true.t() + bias) > 1e-3)


@needs
@every
def test_a_language_model_is_that_of_rounded_weights(kind: str) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    lm = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=50)).eval()
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        true = lm(ids).logits
        quantised = LlamaForCausalLM(lm.config).eval()
        quantised.load_state_dict(lm.state_dict())
        quantize(quantised.get_decoder(), kind, "cpu")
        for part in lm.get_decoder().modules():
            if isinstance(part, nn.Linear):
                part.weight.data = rounded(part.weight.data, kind)
        expected, found = lm(ids).logits, quantised(ids).logits
    assert type(quantised.lm_head) is nn.Linear
    assert error(found, expected) < 0.03
    assert error(found, true) > 0.5 * error(expected, true) > 1e-3


@needs
@every
@pytest.mark.parametrize("family", family_names())
def test_every_family(family: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case: Any = importlib.import_module(f"tests.parity.{family}")
    case.checkpoint(tmp_path)
    whole = unigen.load(str(tmp_path), "cpu", "bfloat16")
    engine = unigen.load(str(tmp_path), "cpu", "bfloat16", quantization=kind)
    before, after = whole.info(), engine.info()
    assert after["precision"] == f"{kind}, tables and head bfloat16" and before["precision"] == "bfloat16"
    assert after["backbone"] == before["backbone"]  # as many weights
    assert count_parameters(engine.model)[1] < count_parameters(whole.model)[1]
    blocks = {id(p) for p in engine.model.backbone.lm.get_decoder().parameters()}
    kept = {name: p for name, p in engine.model.named_parameters() if id(p) not in blocks}
    true = dict(whole.model.named_parameters())
    assert kept and all(torch.equal(p, true[name]) for name, p in kept.items())
    assert {p.dtype for p in engine.model.image_tokenizer.parameters()} == {torch.float32}
    together = engine.generate_batch([case.PROMPT] * 2, [1, 2], size=case.SIZE)
    assert together[0].size == case.SIZE and together[0].tobytes() != together[1].tobytes()
    capsys.readouterr()
    assert cli.main(["info", "--model", str(tmp_path), "--device", "cpu", "--quantization", kind]) == 0
    told = capsys.readouterr()
    assert f"{kind}, tables and head" in told.out and told.err == ""
    with pytest.raises(ValueError, match=f"{kind} weights are not saved"):
        engine.model.save(tmp_path / "saved")


@pytest.mark.parametrize("family", ["liquid", "janus"])
def test_float16_on_a_cpu(family: str, tmp_path: Path) -> None:
    """The weights are those of float16, the products of float32: what is drawn does not depend on what is drawn beside
    it, and what exceeds float16 is no fault."""
    case: Any = importlib.import_module(f"tests.parity.{family}")
    case.checkpoint(tmp_path)
    true, engine = unigen.load(str(tmp_path), "cpu"), unigen.load(str(tmp_path), "cpu", "float16")
    weights = dict(true.model.backbone.named_parameters())
    for name, p in engine.model.backbone.named_parameters():
        assert p.dtype == torch.float32 and torch.equal(p, weights[name].half().float())
    assert engine.info()["precision"] == "float32"
    prompts = [case.PROMPT, "two dogs on a blue table", "a"]
    together = engine.generate_batch(prompts, [1, 2, 3])
    for prompt, seed, picture in zip(prompts, [1, 2, 3], together, strict=True):
        assert picture.tobytes() == engine.generate(prompt, seed=seed).tobytes()


def test_a_reader_in_float16_on_a_cpu(causal_lm_folder: Path) -> None:
    reader = load_transformers(causal_lm_folder, "cpu", torch.float16)
    assert {p.dtype for p in reader.model.parameters()} == {torch.float32}


@needs
@every
def test_every_way_of_writing(kind: str, tiny_folder: Path) -> None:
    engine = unigen.load(str(tiny_folder), "cpu", quantization=kind)
    for name in engine.info()["generators"]:
        assert engine.generate("two red apples", generator=name).size == (16, 16), name
    assert isinstance(engine.describe(engine.generate("a blue horse"), candidates=2), str)


@needs
def test_a_reader_of_transformers(causal_lm_folder: Path) -> None:
    painter = "unigen-tiny"
    pair = unigen.load(device="cpu", lmm=str(causal_lm_folder), image_model=painter, quantization="8bit")
    assert [part["precision"] for part in pair.info().values() if isinstance(part, dict)] == [
        "8bit, tables and head float32"
    ] * 2
    assert isinstance(pair.generate("a red dog", "text", max_tokens=4), str)


@needs
def test_the_bench(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["quantization", "--model", str(tiny_folder), "--device", "cpu", "--count", "2"]) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split()[0] for row in rows] == ["float32", "bfloat16", "float32", "float32"]
    assert rows[0].split()[-3:] == ["0.0000", "1.000", "1.000"]


@needs
@pytest.mark.parametrize(
    ("files", "options", "reason"),
    [
        ({"model_index.json": "{}"}, {"quantization": "8bit"}, "has no language model to quantise"),
        ({}, {"quantization": "3bit"}, "unknown quantization '3bit': one of 8bit, 4bit"),
    ],
)
def test_what_cannot_be_quantised(files: dict[str, str], options: Any, reason: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=reason):
        unigen.load(str(tmp_path), "cpu", **options)


@needs
def test_a_map_of_no_size_for_4_bits() -> None:
    with pytest.raises(ValueError, match="multiples of 32, 64"):
        quantize(nn.Sequential(nn.Linear(48, 32)), "4bit", "cpu")


@needs
@every
def test_a_model_that_an_engine_holds(kind: str, tiny_folder: Path) -> None:
    """Draws as one that was quantised before, and is quantised once."""
    engine, before = unigen.load(str(tiny_folder), "cpu"), unigen.load(str(tiny_folder), "cpu", quantization=kind)
    engine.model.quantize(kind, "cpu")
    assert count_parameters(engine.model) == count_parameters(before.model)
    drawn = (one.generate("two red apples", seed=1).tobytes() for one in (engine, before))
    assert next(drawn) == next(drawn)
    for again in QUANTIZATIONS:
        with pytest.raises(ValueError, match="quantised already"):
            engine.model.quantize(again, "cpu")


@every
def test_without_the_package(kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for command in (["info"], ["generate", "a dog"], ["eval", "scenes", "--quick"]):
        assert cli.main([*command, "--device", "cpu", "--quantization", kind]) == 2
        told = capsys.readouterr().err.strip().splitlines()
        assert told == ["unigen: error: bitsandbytes is not installed; run: pip install 'unigen[quantization]'"]


def test_every_command_that_loads_a_model_takes_it() -> None:
    parsers = [cli.build_parser(name) for name, command in cli.COMMANDS.items() if hasattr(command, "add_arguments")]
    for parser in [*parsers, build_parser("scenes", find_task("scenes"))]:
        takes = {action.dest for action in parser._actions}
        assert ("dtype" in takes) == ("quantization" in takes) == ("device" in takes), parser.prog
