"""Every way of writing a picture: loss and sampler mirror each other, a picture is its own in a batch, training sees
what sampling sees. A new generator is tested here without an edit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import unigen
from unigen import generators
from unigen.batch import pack
from unigen.document import Document, Segment
from unigen.inference.engine import Engine
from unigen.media.pixels import to_images, to_pixels
from unigen.models import load
from unigen.samplers.options import CodeSampling
from unigen.training.objectives import MultiGeneratorLoss

GENERATORS = generators.generator_names()
CODES = [name for name in GENERATORS if CodeSampling in generators.find_generator(name).options]
PROMPTS = ["a blue horse", "a", "two apples on a blue background and a red dog", "the dog"]
PICTURES = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)


def to_lists(image: Any) -> Any:
    return image.tolist() if isinstance(image, torch.Tensor) else np.asarray(image).tolist()


def run_separately(some: list[Any], others: list[Any]) -> int:
    """The greatest difference of pictures, in codes or in 255ths."""
    pairs = zip(some, others, strict=True)
    return max(int(np.abs(np.array(a, dtype=np.int64) - np.array(b, dtype=np.int64)).max()) for a, b in pairs)


def sampling_options(writer: str) -> dict[str, Any]:
    return {"generator": writer} | ({"temperature": 1.5} if writer in CODES else {"steps": 3})


def generate(engine: Engine, prompts: list[Any], seeds: list[int], **options: Any) -> list[list[list[int]]]:
    """One picture for each prompt, all in one batch: codes, or pixels where there are none."""
    requests = [engine.build_request(p, "image", seed=s, **options) for p, s in zip(prompts, seeds, strict=True)]
    list(engine.run_requests(requests))
    return [to_lists(request.document.segments[-1].image) for request in requests]


def codes_in_order(engine: Engine, writer: str) -> list[Any]:
    """The codes of `IMAGE_WEIGHT` as they are read back after this generator has written them."""
    generator, pixels = engine.model.generators[writer], to_pixels(list(PICTURES), 16)
    if generator.trains_on_codes:
        return engine.model.encode_images(pixels).tolist()
    pixels = generator.tokenizer.decode(generator.tokenizer.encode(pixels))
    return [to_lists(picture) for picture in to_images(pixels)]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("writer", GENERATORS)
def test_a_picture_does_not_depend_on_its_batch(engine: Engine, writer: str, guidance: float) -> None:
    options: dict[str, Any] = {"guidance": guidance} | sampling_options(writer)
    together = generate(engine, PROMPTS, [7, 8, 9, 7], **options)
    alone = [generate(engine, [p], [s], **options)[0] for p, s in zip(PROMPTS, [7, 8, 9, 7], strict=True)]
    tolerance = (
        0 if engine.model.generators[writer].trains_on_codes else 1
    )  # of 255: another batch rounds differently in decoding
    assert run_separately(together, alone) <= tolerance
    assert max(run_separately(generate(engine, PROMPTS[:1], [seed], **options), alone[:1]) for seed in (8, 9, 10)) > 2
    assert run_separately(generate(engine, PROMPTS[1:2], [7], **options), alone[:1]) > 2


@pytest.mark.parametrize("writer", [name for name in GENERATORS if name not in CODES])
def test_guidance_of_zero_ignores_the_prompt(engine: Engine, writer: str) -> None:
    """Which branch is which: at scale 0 only the blind one counts."""
    pictures = generate(engine, PROMPTS[:2], [7, 7], guidance=0.0, **sampling_options(writer))
    assert run_separately(pictures[:1], pictures[1:]) <= 1
    pictures = generate(engine, PROMPTS[:2], [7, 7], guidance=1.0, **sampling_options(writer))
    assert run_separately(pictures[:1], pictures[1:]) > 2


def test_a_generator_goes_by_one_name() -> None:
    assert [generators.find_generator(name).name for name in GENERATORS] == GENERATORS
    for wrong in ("next_token", "token_flow", "base", "no/such"):
        with pytest.raises(ValueError, match=f"unknown generator '{wrong}': one of flow, joint, masked"):
            generators.find_generator(wrong)


def test_writers_share_a_batch(engine: Engine) -> None:
    requests = [engine.build_request(PROMPTS[0], "image", seed=3, **sampling_options(w)) for w in GENERATORS]
    list(engine.run_requests(requests))
    together = [to_lists(request.document.segments[-1].image) for request in requests]
    alone = [generate(engine, PROMPTS[:1], [3], **sampling_options(w))[0] for w in GENERATORS]
    assert run_separately(together, alone) <= 1


@pytest.mark.parametrize("writer", CODES)  # a flow's pictures are near, not equal: test_flow.py
def test_loss_and_sampler_mirror_each_other(tiny_folder: Path, writer: str) -> None:
    """Overfit three chats; sampling gives them back, alone and inside a story."""
    model = load(tiny_folder).train()
    chats = [
        Document([Segment(text="a red dog"), Segment(image=PICTURES[0], role="assistant")]),
        Document([Segment(image=PICTURES[1]), Segment(text="apples"), Segment(image=PICTURES[2], role="assistant")]),
        Document(
            [
                Segment(text="story"),
                Segment(text="a witch", role="assistant"),
                Segment(image=PICTURES[2], role="assistant"),
                Segment(text="and raven", role="assistant"),
                Segment(image=PICTURES[0], role="assistant"),
            ]
        ),
    ]
    first = Document(chats[2].segments[:3])  # what is written is the last picture, so the first is learnt here
    rows = [[model.template.encode(chat, generator=writer) for chat in (*chats, first)]]
    rows.append([model.template.encode(chats[0], generator=writer, uncond=True), model.template.encode(chats[2])])
    batch = pack(rows, 256, 16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    objective, rng = MultiGeneratorLoss(model.generators), torch.Generator().manual_seed(0)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 1e-2 if step < 150 else 1e-3
        losses = objective(model, batch, rng)
        loss = sum(losses[k][0] / losses[k][1] for k in objective.weights if losses[k][1] > 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    engine = Engine(model.eval())
    options: dict[str, Any] = {"generator": writer, "temperature": 0.0, "guidance": 1.0}
    first_codes, _, third_codes = codes_in_order(engine, writer)
    assert generate(engine, [chat.segments[:-1] for chat in chats[:2]], [0, 0], **options) == [first_codes, third_codes]
    request = engine.build_request("story", "interleaved", **options)
    list(engine.run_requests([request]))
    said = [s.text or to_lists(s.image) for s in request.document.segments[1:]]
    if not engine.model.generators[writer].trains_on_codes:  # in a story each picture is read again, as codes
        pixels = to_pixels([np.array(picture, dtype=np.uint8) for picture in (first_codes, third_codes)], 16)
        first_codes, third_codes = engine.model.encode_images(pixels).tolist()
    assert said == ["a witch", third_codes, "and raven", first_codes]


@pytest.mark.parametrize("writer", GENERATORS)
@torch.inference_mode()
def test_counts_are_known_before_the_pictures(engine: Engine, writer: str) -> None:
    model, rng = engine.model, torch.Generator()
    chat = Document([Segment(text="a dog"), Segment(image=PICTURES[0], role="assistant")])
    batch = pack([[model.template.encode(chat, generator=writer), model.template.encode(chat)]], 64, 16)
    objective = MultiGeneratorLoss(model.generators)
    found = {name: int(count) for name, (_, count) in objective(model, batch, rng).items()}
    assert found == {name: int(count) for name, count in objective.counts(batch, rng).items()}
    assert found[writer] > 0


@pytest.mark.parametrize("writer", GENERATORS)
def test_an_image_is_complete_or_not_there(engine: Engine, writer: str) -> None:
    seen = 0
    for seed in range(6):
        options: dict[str, Any] = {"seed": seed, "temperature": 1.5, "max_tokens": 40, "max_images": 2}
        request = engine.build_request("a story", "interleaved", generator=writer, **options)
        list(engine.run_requests([request]))
        for segment in request.document.segments[1:]:
            seen += segment.image is not None
            if isinstance(segment.image, torch.Tensor):
                assert segment.image.shape == (2, 2) and 0 <= segment.image.min() and segment.image.max() < 32
            elif segment.image is not None:
                assert segment.image.size == (16, 16)
    assert seen > 0


@pytest.mark.parametrize("writer", GENERATORS)
def test_in_bfloat16_too(tiny_folder: Path, writer: str) -> None:
    engine = unigen.load(str(tiny_folder), device="cpu", dtype="bfloat16")
    assert engine.generate("a dog", generator=writer).size == (16, 16)
