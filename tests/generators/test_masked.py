"""Masked prediction: its schedule against diffusers, its attention, codes that are given."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unigen.batch import InputSpan, pack
from unigen.document import Document, Segment
from unigen.generators.masked import mask_schedule
from unigen.inference.engine import Engine
from unigen.inference.inpainting import square_crop_box
from unigen.model.generators import GeneratorDict
from unigen.nn.attention import packed_mask


@pytest.mark.parametrize("steps", [1, 4, 11, 40])  # not 12: 64 cos(pi/3) is 32, and 31 in diffusers' fp32
def test_the_schedule_is_diffusers(steps: int) -> None:
    """As many codes masked after each step as diffusers' aMUSEd scheduler leaves, from a map that is all masked."""
    from diffusers.schedulers import AmusedScheduler

    codes, mask = 64, 99
    scheduler = AmusedScheduler(mask_token_id=mask, masking_schedule="cosine")
    scheduler.set_timesteps(steps, temperature=0)
    sample, rng = torch.full((1, codes), mask), torch.Generator().manual_seed(0)
    left = codes
    for step, t in enumerate(scheduler.timesteps):
        sample = scheduler.step(torch.randn(1, codes, 32, generator=rng), t, sample, generator=rng).prev_sample
        left = mask_schedule(codes, left, step, steps)
        assert left == int((sample == mask).sum())
    assert left == 0
    if steps > 4:  # the control: a linear schedule is another one
        assert mask_schedule(codes, codes, 1, steps) != math.floor(codes * (1 - 2 / steps))


def test_every_step_writes_something_and_the_last_writes_all() -> None:
    for unknown in (1, 2, 7, 64):
        for steps in (1, 3, 100):
            left = [unknown]
            while left[-1]:
                left.append(mask_schedule(unknown, left[-1], len(left) - 1, steps))
            assert all(a > b for a, b in zip(left, left[1:], strict=False)) and len(left) - 1 <= max(steps, 1)


@torch.inference_mode()
def test_inside_the_picture_all_see_all(engine: Engine) -> None:
    """Packed training equals one full mask, and what is read last changes what is said first."""
    model = engine.model
    chat = Document([Segment(text="a dog"), Segment(image=torch.tensor([[1, 2], [3, 4]]), role="assistant")])
    batch = model.insert_image_ids(
        pack([[model.template.encode(chat, generator="masked"), model.template.encode(chat)]], 40, 16)
    )
    hidden_BLD = model.hidden_states(batch)
    inputs = model.batch_inputs(batch)
    mask = packed_mask(batch.segments_BL, inputs.attend_until_BL)
    real = batch.segments_BL > 0
    full_BLD = model.backbone.forward_cached(inputs.embeds_BLD, batch.positions_BL, mask)
    torch.testing.assert_close(hidden_BLD[real], full_BLD[real], atol=1e-5, rtol=1e-4)
    for writer, sees in (("masked", True), ("next-token", False)):
        [row], at = (x[0] for x in batch.span_positions(batch.images_of(writer)))
        last = int(at[-1])
        other = InputSpan(int(row), slice(last, last + 1), inputs.embeds_BLD[row, last] + 1.0)
        moved = model.hidden_states(batch, [other]) - hidden_BLD
        assert bool(moved[row, at[0]].abs().max() > 1e-4) == sees
        assert moved[row, at[0] - 1].abs().max() < 1e-6  # the begin token never sees the picture


@torch.inference_mode()
def test_sampling_sees_what_training_sees(engine: Engine) -> None:
    """One greedy step over the cached prompt is the argmax of one packed forward, later codes being given."""
    model = engine.model
    options: dict[str, Any] = {"generator": "masked", "steps": 1, "temperature": 0.0, "guidance": 1.0}
    for given in ((9, 3), (4, 4), (20, 0), (1, 30)):
        fixed = torch.tensor([[-1, -1], given])
        request = engine.build_request("a blue horse", "image", fixed_codes=fixed, **options)
        list(engine.run_requests([request]))
        batch = model.insert_image_ids(pack([[model.template.encode(request.document, generator="masked")]], 40, 16))
        [row], at = (x[0] for x in batch.span_positions(batch.images_of("masked")))
        batch.ids_BL[row, at[:2]] = model.generators["masked"].mask_id
        logits = model.logits(
            model.hidden_states(batch)[row, at[:2]], model.vocabulary.text_size, model.vocabulary.size
        )
        assert logits.argmax(-1).tolist() == request.document.segments[-1].image[0].tolist()


def test_given_codes_stay(engine: Engine) -> None:
    fixed = torch.tensor([[9, -1], [-1, 3]])
    for seed in range(4):
        request = engine.build_request(
            "a dog", "image", generator="masked", fixed_codes=fixed, seed=seed, temperature=2.0
        )
        list(engine.run_requests([request]))
        codes = request.document.segments[-1].image
        assert codes[0, 0] == 9 and codes[1, 1] == 3 and codes.min() >= 0
    request = engine.build_request("a dog", "image", generator="masked", fixed_codes=codes)
    list(engine.run_requests([request]))
    assert torch.equal(request.document.segments[-1].image, codes)


def test_inpainting_keeps_what_is_not_marked(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    mask = np.zeros_like(image)
    mask[2:5, 9:11] = 255  # inside the upper right code
    options: dict[str, Any] = {"seed": 1, "temperature": 1.5}
    painted = np.asarray(engine.inpaint(image, "a dog", mask, **options))
    changed = (painted != image).any(-1)
    assert changed[2:5, 9:11].any() and not changed[mask[..., 0] == 0].any()
    assert len(engine.inpaint(image, "a dog", mask, n=2, **options)) == 2
    with pytest.raises(ValueError, match="make them alike"):
        engine.inpaint(image, "a dog", mask[:8])
    with pytest.raises(ValueError, match="marks nothing"):
        engine.inpaint(image, "a dog", mask * 0)
    with pytest.raises(ValueError, match="next-token cannot keep"):
        engine.inpaint(image, "a dog", mask, generator="next-token")
    generators = engine.model.generators
    for names, said in (({"next-token"}, "train it with generators.masked=1"), ({"next-token", "random-order"}, None)):
        some = GeneratorDict({name: generators[name] for name in generators if name in names | {"text"}})
        monkeypatch.setattr(engine.model, "generators", some)
        if said:
            with pytest.raises(ValueError, match=said):
                engine.inpaint(image, "a dog", mask)
        else:  # whichever can is taken
            assert np.asarray(engine.inpaint(image, "a dog", mask, **options)).shape == (16, 16, 3)


@pytest.mark.parametrize(("height", "width", "left"), [(160, 160, 0), (160, 400, 230), (160, 400, 0), (400, 160, 0)])
def test_inpainting_keeps_the_size_of_a_photograph(engine: Engine, height: int, width: int, left: int) -> None:
    """The model sees the square of the shorter side around the marks; a code is painted that a speck touches."""
    photo = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), dtype=bool)
    mask[70:72, left + 150 : left + 152] = True
    window = square_crop_box(Image.fromarray(mask))
    request: dict[str, Any] = {"seed": 1, "temperature": 1.5}
    painted = engine.inpaint(photo, "a dog", mask, **request)
    changed = (np.asarray(painted) != photo).any(-1)
    assert painted.size == (width, height) and changed[mask].all() and not changed[~mask].any()
    x, y, right, bottom = window
    seen = Image.fromarray(photo).crop(window)
    fixed = engine.model.encode_images(engine.model.preprocess_images([seen]))[0].cpu()
    for column in (left + 150, left + 151):  # in the middle of the window they are of two codes
        fixed[(70 - y) * 2 // 160, (column - x) * 2 // 160] = -1
    drawn = engine.generate("a dog", generator="masked", fixed_codes=fixed, **request).resize(
        (160, 160), Image.Resampling.LANCZOS
    )
    inside = np.asarray(painted)[y:bottom, x:right], mask[y:bottom, x:right]
    assert (inside[0][inside[1]] == np.asarray(drawn)[inside[1]]).all()


def test_more_steps_than_codes_are_as_many_as_codes(engine: Engine) -> None:
    calls = 0

    def counted(*args: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return step(*args)

    step, engine.model.cached_hidden_states = engine.model.cached_hidden_states, counted  # type: ignore[method-assign]
    try:
        engine.generate("a dog", generator="masked", steps=50)
        assert calls == 4
        engine.generate("a dog", generator="masked", steps=1)
        assert calls == 5
    finally:
        engine.model.cached_hidden_states = step  # type: ignore[method-assign]
