"""Next-scale prediction: the cache of scales against teacher forcing, the reach of a scale, guidance that grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from unigen.batch import InputSpan, pack
from unigen.document import Document, Segment
from unigen.generators.next_scale import NextScale
from unigen.inference.engine import Engine
from unigen.model import assembly
from unigen.models import load
from unigen.nn.attention import packed_mask
from unigen.samplers.guidance import Guidance
from unigen.tokenizers.vq import VQConfig, VQTokenizer


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Engine:
    """Three scales of 1, 4 and 16 codes; random weights spread so that what is drawn depends on what was read."""
    torch.manual_seed(0)
    small: dict[str, Any] = {"channels": 16, "decoder_channels": 16, "wide_channels": 16}
    small |= {"encoder_blocks": (1, 1), "decoder_blocks": (1, 1)}
    scales = VQTokenizer(
        VQConfig(image_size=32, codebook_size=32, code_dim=4, quantizer="multiscale", scales=(1, 2, 4), **small)
    )
    known = load(tiny_folder)
    reader = VQTokenizer(VQConfig(image_size=32, codebook_size=32, **small)).eval()
    head = NextScale(scales.eval(), known.backbone.width)
    parts = known.backbone.lm, known.text_tokenizer, reader, known.vocabulary.text_size
    model = assembly.build_model(*parts, heads=[head]).eval()
    with pytest.raises(ValueError, match="is for pictures of 32 pixels, the model's 16"):
        assembly.add_generators(known, (), [head])
    for module in (model.backbone, model.heads["next-scale"].proj_in, model.heads["next-scale"].head):
        for p in module.parameters():
            if p.ndim > 1:
                torch.nn.init.normal_(p, 0.0, 0.3)
    return Engine(model)


def chat() -> Document:
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Document([Segment(text="a blue horse"), Segment(image=pixels, role="assistant")])


@torch.inference_mode()
def test_the_cache_of_scales_equals_teacher_forcing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    model = engine.model
    head = model.heads["next-scale"]
    written: list[Tensor] = []

    def pictures(model: Any, states: list[Any]) -> Tensor:
        written.extend(torch.cat(state.codes) for state in states)
        return torch.zeros(len(states), 3, 32, 32)

    monkeypatch.setattr(head, "decode", pictures)
    list(
        engine.run_requests(
            [engine.build_request("a blue horse", "image", generator="next-scale", temperature=0.0, guidance=1.0)]
        )
    )
    assert len(written[0]) == 1 + 4 + 16 and written[0].unique().numel() > 4
    monkeypatch.setattr(head.tokenizer, "encode", lambda pixels: written[0][None])
    batch = pack([[model.template.encode(chat(), generator="next-scale")]], 64, 32)
    logits: list[Tensor] = []
    hook = head.head.register_forward_hook(lambda module, inputs, output: logits.append(output))
    spans, targets = head.prepare(model, batch, torch.Generator())
    head.loss(model, batch, model.hidden_states(batch, spans), targets)
    hook.remove()
    assert torch.equal(logits[0][0].argmax(-1), written[0])


@torch.inference_mode()
def test_mistakes_are_read_and_mended(engine: Engine) -> None:
    """With mistakes later scales read another picture and have other targets; the first scale's are the true ones."""
    model, head = engine.model, engine.model.heads["next-scale"]
    batch = pack([[model.template.encode(chat(), generator="next-scale")] for _ in range(20)], 64, 32)
    [plain], (rows_M1, at_MP, plain_MP) = head.prepare(model, batch, torch.Generator().manual_seed(0))
    try:
        head.token_corruption = 0.9
        [read], (_, _, codes_MP) = head.prepare(model, batch, torch.Generator().manual_seed(0))
    finally:
        head.token_corruption = 0.0
    assert torch.equal(codes_MP[:, :1], plain_MP[:, :1]) and (codes_MP != plain_MP).any(1).float().mean() > 0.5
    changed_M = (read.embeds - plain.embeds).abs().amax((1, 2)) > 1e-4
    assert changed_M.float().mean() > 0.5
    for span in (plain, read):  # nothing else is touched
        assert torch.equal(span.rows, rows_M1) and torch.equal(span.positions, at_MP) and span.attend_until is None


@torch.inference_mode()
def test_a_scale_sees_itself_and_those_before(engine: Engine) -> None:
    model = engine.model
    batch = pack([[model.template.encode(chat(), generator="next-scale")]], 64, 32)
    rng = torch.Generator()
    spans, _ = model.heads["next-scale"].prepare(model, batch, rng)
    hidden_BLD, inputs = model.hidden_states(batch, spans), model.batch_inputs(batch, spans)
    mask = packed_mask(batch.segments_BL, inputs.attend_until_BL)
    full_BLD = model.backbone.forward_cached(inputs.embeds_BLD, batch.positions_BL, mask)
    real = batch.segments_BL > 0
    torch.testing.assert_close(hidden_BLD[real], full_BLD[real], atol=1e-5, rtol=1e-4)
    [row], at = (x[0] for x in batch.span_positions(batch.images_of("next-scale")))
    second, third = at[:4], at[4:]
    for moved, same, other in ((second[-1], at[:1] - 1, at), (third[-1], second, third)):
        changed = InputSpan(int(row), slice(int(moved), int(moved) + 1), inputs.embeds_BLD[row, moved] + 1.0)
        difference = (model.hidden_states(batch, [*spans, changed]) - hidden_BLD)[row].abs().amax(-1)
        assert difference[same].max() < 1e-6 and difference[other].min() > 1e-6


def test_guidance_grows_with_the_scales(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """VAR: logits = (1 + t) c - t u with t = cfg k / (K - 1), cfg being our scale less 1."""
    c, u = torch.randn(2, 5).unbind()
    for k, t in ((0, 0.0), (1, 1.5), (2, 3.0)):
        torch.testing.assert_close(Guidance((4.0,)).combine([c, u], k / 2), (1 + t) * c - t * u)
    weights: list[float] = []
    combine = Guidance.combine

    def record(self: Guidance, predictions: Any, weight: float = 1.0) -> Tensor:
        weights.append(weight)
        return combine(self, predictions, weight)

    monkeypatch.setattr(Guidance, "combine", record)
    list(engine.run_requests([engine.build_request("a dog", "image", generator="next-scale", guidance=3.0)]))
    assert weights == [0.0, 0.5, 1.0]


def test_it_needs_pixels_and_a_first_scale_of_one(engine: Engine) -> None:
    model = engine.model
    codes = Document([Segment(text="a dog"), Segment(image=torch.zeros(4, 4, dtype=torch.int64), role="assistant")])
    batch = pack([[model.template.encode(codes, generator="next-scale")]], 64, 32)
    with pytest.raises(ValueError, match="learns from pixels"):
        model.heads["next-scale"].prepare(model, batch, torch.Generator())
    with pytest.raises(ValueError, match="needs a multi-scale tokenizer"):
        NextScale(VQTokenizer(VQConfig(image_size=32)), 8)
    with pytest.raises(ValueError, match="first scale is 1"):
        NextScale(VQTokenizer(VQConfig(image_size=32, quantizer="multiscale", scales=(2, 4))), 8)
