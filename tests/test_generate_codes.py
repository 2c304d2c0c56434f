"""Codes that a model draws for rendered pictures, and the decoder that learns from them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools import generate_codes
from unigen.commands.main import main
from unigen.inference.engine import Engine
from unigen.samplers.guidance import Guidance
from unigen.samplers.logits import SamplingOptions
from unigen.tokenizers import load_image_tokenizer

PROMPTS = ["a dog", "two red apples"]


def test_what_follows_the_kept_scales_is_what_the_engine_draws(engine: Engine) -> None:
    """At temperature 0, from any scale on; and what is kept stays, whatever it is."""
    options: dict[str, Any] = {"guidance": 2.0, "temperature": 0.0, "generator": "next-scale"}
    requests = [engine.build_request(prompt, "image", **options) for prompt in PROMPTS]
    dict(engine.run_requests(requests))
    codes_2P = torch.stack([request.native_codes[0] for request in requests if request.native_codes[0] is not None])
    rng, kept_2 = torch.Generator(), torch.tensor([0, 1])

    def drawn_on(codes_2P: torch.Tensor, kept_2: torch.Tensor, guidance: float) -> torch.Tensor:
        return generate_codes.resample_scales(
            engine.model, PROMPTS, codes_2P, kept_2, Guidance.from_value(guidance), SamplingOptions(0.0), rng
        )

    spoilt_2P = codes_2P.clone()
    spoilt_2P[0] = spoilt_2P[1, 1:] = 0
    assert torch.equal(drawn_on(spoilt_2P, kept_2, 2.0), codes_2P)
    assert not torch.equal(drawn_on(spoilt_2P, kept_2, 1.0), codes_2P)
    other_2P = codes_2P.flip(0)
    found_2P = drawn_on(other_2P, torch.tensor([1, 2]), 2.0)
    assert torch.equal(found_2P[:, :1], other_2P[:, :1]) and torch.equal(found_2P[1], other_2P[1])


def test_a_decoder_learns_from_what_was_drawn(
    tiny_folder: Path, tmp_path: Path, emoji_font: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    file = tmp_path / "drawn.npz"
    command = ["generate_codes", str(tiny_folder), str(file), "--count", "5", "--batch", "3", "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", [*command, "--fixed-scales", "1"])
    assert generate_codes.main() == 0
    assert "5 pictures" in capsys.readouterr().out
    with np.load(file) as arrays:
        drawn = dict(arrays)
    tokenizer: Any = load_image_tokenizer(tiny_folder / "next-scale" / "tokenizer")
    pixels = torch.from_numpy(drawn["pixels"]).permute(0, 3, 1, 2) / 127.5 - 1
    assert np.array_equal(tokenizer.encode(pixels), drawn["true"])
    assert (drawn["generated"][:, 0] == drawn["true"][:, 0]).all() and (drawn["generated"] != drawn["true"]).any()

    settings = [
        f"model.{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in vars(tokenizer.settings).items()
    ]
    train = ["train", "recipes/tiny_vq.py", *settings, f"init_from={tiny_folder / 'next-scale' / 'tokenizer'}"]
    train += ["batch_size=4", "num_workers=0", "time_limit=none", "precision=fp32", "save_every=0", "sample_every=0"]
    learn = [
        *train,
        "freeze_codes=true",
        f"generated_codes={file},{file}",
        "true_codes_share=0",
        "steps=60",
        "optim.lr=3e-3",
        "optim.warmup_steps=1",
    ]
    assert main([*learn, f"run_dir={tmp_path / 'run'}"]) == 0
    learnt = load_image_tokenizer(tmp_path / "run" / "model")
    assert np.array_equal(learnt.encode(pixels), drawn["true"])

    def gap(one: Any, codes: str) -> float:
        return float((one.decode(torch.from_numpy(drawn[codes])) - pixels).square().mean())

    assert gap(learnt, "generated") < 0.5 * gap(tokenizer, "generated")
    assert main([*learn, "true_codes_share=1", f"run_dir={tmp_path / 'own'}"]) == 0
    own = load_image_tokenizer(tmp_path / "own" / "model")
    assert gap(own, "true") < gap(learnt, "true") and gap(own, "generated") > gap(learnt, "generated")

    fewer = {"drawn": drawn.pop("generated")[:, 1:], "true": drawn["true"][:, 1:]}  # as version 0.1 named them
    np.savez(tmp_path / "other.npz", **(drawn | fewer))
    np.savez(tmp_path / "part.npz", pixels=drawn["pixels"])
    (tmp_path / "cut.npz").write_bytes(file.read_bytes()[:500])
    (tmp_path / "empty.npz").write_bytes(b"")
    for wrong, message in (
        ([*train, f"generated_codes={file}"], "generated_codes is for a decoder alone"),
        ([*learn, "true_codes_share=2"], "true_codes_share is from 0 to 1"),
        *(
            ([*learn, f"generated_codes={file},{tmp_path / name}"], f"{name} cannot be read")
            for name in ("part.npz", "cut.npz", "empty.npz")
        ),
        ([*learn, f"generated_codes={file},{tmp_path / 'none.npz'}"], "none.npz is not there: make it by"),
        ([*learn, f"generated_codes={tmp_path / 'other.npz'}"], "codes of another tokenizer"),
    ):
        assert main([*wrong, f"run_dir={tmp_path / 'no'}"]) == 2
        assert message in capsys.readouterr().err
    for wrong, message in (
        (["--fixed-scales", "7"], "--fixed-scales is of counts"),
        (["--seed", "0"], "--seed: '0' is not a whole number from 1"),
    ):
        monkeypatch.setattr(sys, "argv", [*command, *wrong])
        assert generate_codes.main() == 2 and message in capsys.readouterr().err
