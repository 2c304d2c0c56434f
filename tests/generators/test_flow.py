"""Rectified flow, in a head and in the backbone: what is learnt, what the head sees, guidance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import unigen
from unigen import generators
from unigen.batch import pack
from unigen.diffusion.denoiser import PromptEmbeds
from unigen.diffusion.solvers import SOLVERS
from unigen.document import Document, Segment
from unigen.generators.flow import NOISE_SAMPLES_PER_IMAGE, Flow, FlowConfig
from unigen.generators.token_flow import TokenFlowConfig
from unigen.generators.transfusion import Transfusion, TransfusionConfig
from unigen.inference.engine import Engine
from unigen.media.pixels import to_pixels
from unigen.model import assembly
from unigen.models import load
from unigen.nn.denoisers import DENOISERS as KINDS_OF_NETWORK
from unigen.samplers.guiders import GUIDERS, Guider
from unigen.training.objectives import MultiGeneratorLoss

PICTURES = np.random.default_rng(0).integers(0, 256, (2, 2, 2, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)


def chat(words: str, picture: Any) -> Document:
    return Document([Segment(text=words), Segment(image=picture, role="assistant")])


@pytest.mark.parametrize(
    "writer", [name for name in generators.generator_names() if generators.find_generator(name).tokenizer_kind == "kl"]
)
def test_what_is_learnt_is_drawn(tiny_folder: Path, writer: str) -> None:
    """Overfit two pictures; each prompt's samples, from any seed, are nearest to its own picture's latents."""
    model = load(tiny_folder).train()
    torch.manual_seed(0)
    flow = model.heads[writer]
    words = ("a red dog", "two apples on a blue background")
    rows = [[model.template.encode(chat(w, p), generator=writer) for w, p in zip(words, PICTURES, strict=True)] * 4]
    batch = pack(rows, 256, 16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    objective, rng = MultiGeneratorLoss(model.generators, {writer: 1.0}), torch.Generator().manual_seed(0)
    losses = []
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 3e-3 if step < 220 else 5e-4
        total, count = objective(model, batch, rng)[writer]
        losses.append(float(total.detach()) / int(count))
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    assert sum(losses[-20:]) < 0.25 * sum(losses[:20])
    latents: list[Tensor] = []
    decode = flow.tokenizer.decode
    flow.tokenizer.decode = lambda z: latents.append(z) or decode(z)  # type: ignore[method-assign]
    Engine(model.eval()).generate_batch([*words, *words], [0, 1, 2, 3], generator=writer, guidance=1.0)
    true = flow.tokenizer.encode(to_pixels(list(PICTURES), 16))
    gaps = (torch.cat(latents)[:, None] - true[None]).square().mean((2, 3, 4))
    assert gaps.argmin(1).tolist() == [0, 1, 0, 1]
    assert gaps.min(1).values.max() < 0.3 * (true[0] - true[1]).square().mean()


@torch.inference_mode()
def test_sampling_sees_what_training_sees(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The context of a cached prompt, in a chat with a picture before it, is that of the packed forward."""
    engine = unigen.load(str(tiny_folder), device="cpu")
    model, flow = engine.model, engine.model.heads["flow"]
    seen: list[PromptEmbeds] = []
    velocity = flow.velocity

    def watched(x: Tensor, t: Tensor, context: PromptEmbeds) -> Tensor:
        seen.append(context)
        return velocity(x, t, context)

    monkeypatch.setattr(flow, "velocity", watched)
    before = [Segment(image=PICTURES[0]), Segment(text="a")]
    for words in ("a", "two apples on a blue background and a red dog " * 2):
        document = Document([*before, Segment(text=words)])
        engine.generate(document, generator="flow", guidance=1.0, steps=1)
        whole = Document([*document.segments, Segment(image=PICTURES[1], role="assistant")])
        batch = model.insert_image_ids(
            pack([[model.template.encode(whole), model.template.encode(whole, generator="flow")]], 256, 16)
        )
        expected = flow.context_states(batch, model.hidden_states(batch))
        torch.testing.assert_close(seen[-1].embeds_MND, expected.embeds_MND, atol=1e-5, rtol=1e-4)
        assert expected.mask_MN is not None and torch.equal(seen[-1].mask_MN, expected.mask_MN)
        assert not expected.embeds_MND[~expected.mask_MN].any()
    begin = model.hidden_states(batch)[0, int(batch.spans_N3[batch.images_of("flow")][0, 1]) - 1]
    torch.testing.assert_close(expected.embeds_MND[0, -1], begin)  # the pooled condition is the begin token's state


@torch.inference_mode()
def test_a_step_in_the_backbone_is_that_of_training(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a chat with a picture before it, cached sampling says the velocity that the packed forward says; and each
    patch's depends on all others'."""
    engine = unigen.load(str(tiny_folder), device="cpu")
    model, head = engine.model, engine.model.heads["transfusion"]
    said: list[Tensor] = []
    velocity, embed, read = head.velocity, head.embed_patches, []
    monkeypatch.setattr(head, "velocity", lambda states: said.append(velocity(states)) or said[-1])
    monkeypatch.setattr(head, "embed_patches", lambda x, t: read.append((x, t)) or embed(x, t))
    before = [Segment(image=PICTURES[0]), Segment(text="a red dog")]
    engine.generate(Document(before), generator="transfusion", guidance=1.0, steps=3)
    whole = Document([*before, Segment(image=PICTURES[1], role="assistant")])
    batch = pack([[model.template.encode(whole), model.template.encode(whole, generator="transfusion")]], 256, 16)

    def packed(x: Tensor, t: Tensor) -> Tensor:
        monkeypatch.setattr(head, "add_noise", lambda *args: (x, t, x))
        spans, targets = head.prepare(model, model.insert_image_ids(batch), None)
        head.loss(model, batch, model.hidden_states(model.insert_image_ids(batch), spans), targets)
        return said[-1]

    for (x, t), expected in list(zip(read, said, strict=True)):
        torch.testing.assert_close(packed(x, t), expected, atol=1e-5, rtol=1e-4)
    x, t = read[0]
    assert not torch.allclose(packed(x, t * 0.5), said[0], atol=1e-4)
    x = x.clone()
    x[..., -1, -1] += 1
    assert (packed(x, t)[..., 0, 0] - said[0][..., 0, 0]).abs().max() > 1e-4


@torch.inference_mode()
def test_a_token_is_drawn_from_the_state_of_training(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The states that condition the MLP, cached token by token in sampling, are those of the packed forward."""
    engine = unigen.load(str(tiny_folder), device="cpu")
    model, head = engine.model, engine.model.heads["token-flow"]
    seen: list[Tensor] = []
    velocity = head.velocity
    monkeypatch.setattr(head, "velocity", lambda x, t, states: seen.append(states) or velocity(x, t, states))
    latents: list[Tensor] = []
    decode = head.tokenizer.decode
    monkeypatch.setattr(head.tokenizer, "decode", lambda z: latents.append(z) or decode(z))
    before = [Segment(image=PICTURES[0]), Segment(text="a red dog")]
    engine.generate(Document(before), generator="token-flow", guidance=1.0, steps=1)
    sampled = torch.cat(seen)
    whole = Document([*before, Segment(image=PICTURES[1], role="assistant")])
    batch = model.insert_image_ids(
        pack([[model.template.encode(whole), model.template.encode(whole, generator="token-flow")]], 256, 16)
    )
    monkeypatch.setattr(head, "encode_targets", lambda *args: latents[0])
    spans, targets = head.prepare(model, batch, torch.Generator())
    head.loss(model, batch, model.hidden_states(batch, spans), targets)
    packed = seen[-1].unflatten(0, (4, -1))[:, 0]
    torch.testing.assert_close(packed, sampled, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(packed.roll(1, 0), sampled, atol=1e-3)


@pytest.mark.parametrize("network", KINDS_OF_NETWORK)
def test_every_network_learns_and_draws(tiny_folder: Path, network: Any) -> None:
    model = load(tiny_folder)
    torch.manual_seed(0)
    config = FlowConfig(network=network, layers=2, heads=2, head_dim=16, context_length=16)
    model = assembly.add_generators(model, ["next-token"], [Flow(model.heads["flow"].tokenizer, 32, config)]).train()
    batch = pack([[model.template.encode(chat("a dog", PICTURES[0]), generator="flow")] * 4], 100, 16)
    optimizer = torch.optim.AdamW([p for p in model.heads["flow"].parameters() if p.requires_grad], lr=3e-3)
    objective, rng, losses = MultiGeneratorLoss(model.generators, {"flow": 1.0}), torch.Generator().manual_seed(0), []
    for _ in range(40):
        total, count = objective(model, batch, rng)["flow"]
        losses.append(float(total.detach()) / int(count))
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    pictures = Engine(model.eval()).generate_batch(["a dog", "a"], generator="flow", steps=3)
    assert [picture.size for picture in pictures] == [(16, 16)] * 2


def test_transfusion_of_larger_patches(tiny_folder: Path) -> None:
    head = Transfusion(load(tiny_folder).heads["transfusion"].tokenizer, 32, TransfusionConfig(patch_size=2))
    x, t = torch.randn(3, 4, 2, 2), torch.rand(3)
    assert head.num_positions() == 1 and head.embed_patches(x, t).shape == (3, 1, 32)
    assert head.velocity(head.embed_patches(x, t)).shape == x.shape


@pytest.mark.parametrize(
    ("settings", "values"),
    [(FlowConfig, {"patch_size": 0}), (FlowConfig, {"shift": 0.0}), (TransfusionConfig, {"patch_size": 0})]
    + [(TokenFlowConfig, {"noise_samples_per_token": -1}), (TokenFlowConfig, {"width": 0})],
)
def test_settings_that_cannot_work_are_refused(settings: Any, values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        settings(**values)


def test_the_target_is_noise_less_data(tiny_folder: Path) -> None:
    model = load(tiny_folder)
    flow = model.heads["flow"]
    batch = pack([[model.template.encode(chat("a dog", PICTURES[0]), generator="flow")]], 32, 16)
    spans, (mixed, t, target) = flow.prepare(model, batch, torch.Generator().manual_seed(3))
    assert not spans and len(t) == NOISE_SAMPLES_PER_IMAGE == len(t.unique()) and 0 < t.min() and t.max() < 1
    data, t = flow.tokenizer.encode(batch.images).expand_as(mixed), t[:, None, None, None]
    torch.testing.assert_close(mixed - t * target, data)  # x_t - t (noise - data) = data
    torch.testing.assert_close(mixed + (1 - t) * target, target + data)
    assert not torch.equal(*(mixed + (1 - t) * target)[:2])  # each copy has noise of its own


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm++"])
@pytest.mark.parametrize("writer", ["flow", "transfusion"])
def test_steps_and_samplers_are_heard(tiny_folder: Path, writer: str, sampler: str) -> None:
    engine = unigen.load(str(tiny_folder), device="cpu")
    calls = 0
    flow = engine.model.heads[writer]
    velocity = flow.velocity

    def counted(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return velocity(*args)

    flow.velocity = counted  # type: ignore[method-assign]
    picture = engine.generate("a dog", generator=writer, steps=5, solver=sampler)
    assert isinstance(picture, Image.Image) and calls == (9 if sampler == "heun" else 5)
    with pytest.raises(ValueError, match="unknown solver 'rk9'"):
        engine.generate("a dog", generator=writer, solver="rk9")


def test_a_new_solver_and_a_new_guider_are_heard(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entered in their tables they can be asked for, and nothing else names them."""
    engine = unigen.load(str(tiny_folder), device="cpu")
    monkeypatch.setitem(SOLVERS, "twice", lambda steps, shift: SOLVERS["euler"](2 * steps, shift))
    middle = Guider("middle", lambda predictions, scales, state: (predictions[0] + predictions[1]) / 2)
    monkeypatch.setitem(GUIDERS, "middle", middle)
    options: dict[str, Any] = {"generator": "flow", "seed": 3}
    assert np.array_equal(
        engine.generate("a dog", steps=2, solver="twice", **options), engine.generate("a dog", steps=4, **options)
    )
    assert np.array_equal(
        engine.generate("a dog", guidance=3.0, guider="middle", **options),
        engine.generate("a dog", guidance=0.5, **options),
    )
