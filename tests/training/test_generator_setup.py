"""Shares of ways of writing, and the generators that a recipe makes for a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from unigen.generators.flow import FlowConfig
from unigen.generators.token_flow import TokenFlowConfig
from unigen.model import assembly
from unigen.models import load
from unigen.tokenizers import save_tokenizer
from unigen.training.generator_setup import new_generators, normalize_generator_weights


def test_shares_add_up_in_one_order() -> None:
    shares = normalize_generator_weights({"transfusion": 1.0, "flow": 2.0, "masked": 0.0, "next-token": 1.0})
    assert list(shares.items()) == [("next-token", 0.25), ("flow", 0.5), ("transfusion", 0.25)]
    for wrong, message in (
        ({"next-token": 0.0, "flow": 1.0}, "that of next-token"),
        ({}, "that of next-token"),
        ({"next-token": 1.0, "flow": -1.0}, "at least 0"),
        ({"next-token": 1.0, "next_scale": 1.0}, "unknown generator 'next_scale'"),
    ):
        with pytest.raises(ValueError, match=message):
            normalize_generator_weights(wrong)


def test_heads_are_made_by_their_settings(tiny_folder: Path, tmp_path: Path) -> None:
    whole = load(tiny_folder)
    parts = whole.backbone.lm, whole.text_tokenizer, whole.image_tokenizer, whole.vocabulary.text_size
    model = assembly.build_model(*parts)
    kl = str(save_tokenizer(whole.heads["flow"].tokenizer, tmp_path / "kl"))
    shares = normalize_generator_weights({"next-token": 1.0, "token-flow": 1.0})
    heads = new_generators(model, shares, {"kl": kl, "multiscale": None}, {"token-flow": TokenFlowConfig(width=64)})
    assert [head.name for head in heads] == ["token-flow"] and heads[0].settings.width == 64
    taught = assembly.add_generators(model, tuple(shares), heads)
    assert list(taught.heads) == ["token-flow"] and taught.begin_tokens()["token-flow"] == "<spare:0>"
    assert new_generators(taught, shares, {}, {"token-flow": TokenFlowConfig()}) == []
    with pytest.raises(ValueError, match="another shape"):
        new_generators(taught, shares, {}, {"token-flow": TokenFlowConfig(width=32)})
    with pytest.raises(ValueError, match="kind multiscale: set its folder to none"):
        new_generators(model, shares, {"kl": kl, "multiscale": kl}, {})
    with pytest.raises(ValueError, match="flow needs an image tokenizer of its own: .* tokenizer_kind=kl"):
        new_generators(model, normalize_generator_weights({"next-token": 1.0, "flow": 1.0}), {}, {"flow": FlowConfig()})


def test_begin_tokens_survive_saving(tiny_folder: Path, tmp_path: Path) -> None:
    """A generator keeps its spare token when others are taught before it in order."""
    whole = load(tiny_folder)
    parts = whole.backbone.lm, whole.text_tokenizer, whole.image_tokenizer, whole.vocabulary.text_size
    model = assembly.build_model(*parts, ["next-token"], [whole.heads["transfusion"]])
    assert model.begin_tokens()["transfusion"] == "<spare:0>"
    model.save(tmp_path / "model")
    taught = assembly.add_generators(
        load(tmp_path / "model"), ["next-token", "token-flow"], [whole.heads["token-flow"]]
    )
    assert taught.begin_tokens() == {"next-token": "<boi>", "transfusion": "<spare:0>", "token-flow": "<spare:1>"}


def test_a_missing_head_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    load(tiny_folder).save(tmp_path / "model")
    (tmp_path / "model" / "flow" / "config.json").unlink()
    with pytest.raises(ValueError, match="flow/config.json is missing: the model folder is not whole"):
        load(tmp_path / "model")
