"""The engine on random weights: the grammar of spans, seeds, batches, streams; and on a model that has learnt."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import unigen
from unigen.batch import Vocabulary, pack
from unigen.document import Document, Preview, Segment
from unigen.inference.engine import Engine
from unigen.models import load
from unigen.samplers.guidance import Guidance
from unigen.samplers.options import CodeSampling
from unigen.training.objectives import MultiGeneratorLoss
from unigen.utils.numbers import NonFiniteError


def same(a: Image.Image, b: Image.Image) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


PROMPTS = ["a blue horse", "a", "two apples on a blue background and a red dog", "the dog", "witch and raven"]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_picture_does_not_depend_on_its_batch(engine: Engine, guidance: float) -> None:
    options: dict[str, Any] = {"guidance": guidance, "temperature": 2.0}
    together = engine.generate_batch(PROMPTS, seeds=[7, 8, 9, 7, 7], **options)
    alone = [engine.generate(p, seed=s, **options) for p, s in zip(PROMPTS, [7, 8, 9, 7, 7], strict=True)]
    assert all(same(a, b) for a, b in zip(together, alone, strict=True))
    assert not same(engine.generate(PROMPTS[0], seed=8, **options), alone[0])


def test_texts_do_not_depend_on_their_batch(engine: Engine) -> None:
    options: dict[str, Any] = {"output": "text", "temperature": 1.0, "max_tokens": 12}
    together = engine.generate_batch(PROMPTS, seeds=[1, 2, 3, 4, 5], **options)
    assert together == [engine.generate(p, seed=i + 1, **options) for i, p in enumerate(PROMPTS)]


def test_n_pictures_have_seeds_in_a_row(engine: Engine) -> None:
    three = engine.generate("a dog", n=3, seed=4)
    assert same(three[1], engine.generate("a dog", seed=5)) and not same(three[0], three[1])


def run(engine: Engine, prompt: str, **options: Any) -> tuple[list[Any], Document]:
    """The parts of one answer, and the document as the engine left it."""
    request = engine.build_request(prompt, "interleaved", **options)
    parts = [part for _, part in engine.run_requests([request])]
    return parts, request.document


def test_interleaved_output_keeps_the_grammar(engine: Engine) -> None:
    seen = 0
    for seed in range(12):
        parts, document = run(engine, "a story", seed=seed, temperature=1.5, max_tokens=60, max_images=3)
        pictures = [p for p in parts if isinstance(p, Image.Image)]
        said = [s for s in document.segments if s.role == "assistant"]
        assert len(pictures) == sum(s.image is not None for s in said) <= 3
        for segment in said:
            if segment.image is not None:  # complete, and made of image codes only
                assert segment.image.shape == (2, 2) and 0 <= segment.image.min() and segment.image.max() < 32
        text = "".join(p for p in parts if isinstance(p, str))
        assert not any(name in text for name in engine.model.template.special_ids)
        seen += len(pictures)
    assert seen > 0


def test_max_images_and_max_tokens_hold(engine: Engine) -> None:
    most = 0
    for seed in range(6):
        request = engine.build_request(
            "a story", "interleaved", seed=seed, temperature=1.5, max_tokens=10, max_images=1
        )
        row = engine.new_scheduler().new_sequence(request)
        parts = [part for _, part in engine.run_requests([request])]
        assert sum(isinstance(p, Image.Image) for p in parts) <= 1
        assert row.state is not None and row.state.spec.max_tokens == 10
        words = "".join(p for p in parts if isinstance(p, str))
        most = max(most, len(words.encode("utf-8", "replace")))
    longest = max(len(piece) for piece in engine.model.text_tokenizer.get_vocab())
    assert 0 < most <= 10 * longest


def test_a_stream_is_the_answer_in_pieces(engine: Engine) -> None:
    options: dict[str, Any] = {"seed": 3, "temperature": 1.0, "max_tokens": 30}
    pieces = list(engine.stream("a story", "text", **options))
    assert len(pieces) > 1
    assert "".join(pieces).strip() == engine.generate("a story", "text", **options)


SHOWN = {"next-scale": 1, "masked": 2, "joint": 2, "flow": 2, "transfusion": 2}
"""Previews of each generator where two are asked for: of two scales one stands before the last."""


def test_previews_come_before_the_picture_and_change_nothing(engine: Engine) -> None:
    """Alone and in a batch, to the last bit; generators that write code after code have none."""
    writers = [name for name in engine.model.generators if name != "text"]
    takes = engine.info()["takes"]
    assert set(writers) > set(SHOWN)

    def drawn(previews: int, together: bool) -> list[list[Any]]:
        given = {"output": "image", "seed": 5, "previews": previews}
        heated = [given | {"temperature": 2.0} if "temperature" in takes[w] else given for w in writers]
        requests = [
            engine.build_request("a dog", generator=w, **options) for w, options in zip(writers, heated, strict=True)
        ]
        if not together:
            return [[part for _, part in engine.run_requests([request])] for request in requests]
        parts: list[list[Any]] = [[] for _ in writers]
        for row, part in engine.run_requests(requests):
            parts[row].append(part)
        return parts

    for together in (False, True):
        for writer, (*seen, made), (plain,) in zip(writers, drawn(2, together), drawn(0, together), strict=True):
            assert same(made, plain), writer
            expected = [(0, n) for n in range(SHOWN.get(writer, 0))]
            assert [(one.image_index, one.preview_index) for one in seen] == expected, writer
            assert all(one.image.size == made.size for one in seen) and not (seen and same(seen[0].image, made)), writer


def test_previews_of_a_story_are_of_its_pictures_in_turn(engine: Engine) -> None:
    options: dict[str, Any] = {"seed": 6, "temperature": 1.5, "max_tokens": 60, "max_images": 3}
    options |= {"generator": "flow", "steps": 4}
    told = list(engine.stream("a story", previews=9, **options))
    seen = [part for part in told if isinstance(part, Preview)]
    rest = [part for part in told if not isinstance(part, Preview)]
    plain = list(engine.stream("a story", **options))
    pictures = sum(isinstance(part, Image.Image) for part in plain)
    assert pictures >= 2 and [(p.image_index, p.preview_index) for p in seen] == [
        (i, n) for i in range(pictures) for n in range(3)
    ]
    assert [type(part) for part in rest] == [type(part) for part in plain]
    assert all(a == b if isinstance(a, str) else same(a, b) for a, b in zip(rest, plain, strict=True))


def test_nothing_is_decoded_that_nobody_sees(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, decoded = engine.model.heads["flow"].tokenizer, 0
    decode = tokenizer.decode

    def counted(latents: Any) -> Any:
        nonlocal decoded
        decoded += 1
        return decode(latents)

    monkeypatch.setattr(tokenizer, "decode", counted)
    for previews in (0, 3):
        decoded = 0
        list(engine.stream("a dog", "image", generator="flow", steps=8, previews=previews))
        assert decoded == 1 + previews


def test_text_goes_on_between_the_steps_of_a_flow(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what the flow does not read costs no pass of the backbone."""
    passes: list[int] = []
    step = engine.model.cached_hidden_states
    monkeypatch.setattr(
        engine.model, "cached_hidden_states", lambda embeds, *rest: passes.append(len(embeds)) or step(embeds, *rest)
    )
    drawn = engine.build_request("a dog", "image", generator="flow", steps=8, guidance=3.0)
    told = engine.build_request("a story", "text", temperature=1.0, max_tokens=60, seed=1)
    running = engine.new_scheduler()
    picture, text = running.add_request(drawn), running.add_request(told)
    for count in range(1, 9):
        assert (picture in running) and running.usage(text).text_tokens == count - 1
        running.step()
    assert picture not in running and text in running
    assert passes == [3] + [1] * 7  # the flow's two branches have read once


def test_guidance_of_zero_ignores_the_prompt(engine: Engine) -> None:
    blind = engine.generate_batch(["a horse", "two apples"], seeds=[3, 3], guidance=0.0)
    assert same(*blind)
    assert not same(*engine.generate_batch(["a horse", "two apples"], seeds=[3, 3], guidance=1.0))


def test_a_picture_in_the_prompt_is_read(engine: Engine) -> None:
    light, dark = (Image.new("RGB", (16, 16), shade) for shade in ("white", "black"))
    options: dict[str, Any] = {"temperature": 1.0, "max_tokens": 16, "seed": 0}
    codes = engine.model.encode_images(torch.stack([torch.ones(3, 16, 16), -torch.ones(3, 16, 16)]))
    assert not torch.equal(codes[0], codes[1])
    assert engine.describe(light, **options) != engine.describe(dark, **options)
    assert engine.edit(light, "a dog", seed=1).size == (16, 16)


def test_pictures_given_and_made_stand_in_one_chat(engine: Engine) -> None:
    """References come as pixels, the model's own pictures as codes; both branches read both."""
    made = Segment(image=torch.tensor([[1, 2], [3, 4]]), role="assistant")
    chat = Document([Segment(image=Image.new("RGB", (16, 16), "red")), Segment(text="a dog"), made, Segment(text="a")])
    assert engine.generate(chat, "image", guidance=3.0).size == (16, 16)
    assert [type(s.image) for s in chat.segments] == [Image.Image, type(None), torch.Tensor, type(None)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.generate(""), "empty"),
        (lambda e: e.generate("a", "video"), "unknown output"),
        (lambda e: e.generate("a", previews=1), "ask stream"),
        (lambda e: e.stream("a", previews=-1), "previews must be a whole number"),
        (
            lambda e: e.generate("a", generator="brush"),
            "no generator 'brush': it has flow, joint, masked, next-scale, next-token",
        ),
        (lambda e: e.generate("a", generator="text"), "no generator"),
        (lambda e: e.generate("a", guidance=float("nan")), "guidance must be"),
        (lambda e: e.generate("a", guidance=[1.0, 2.0]), "one scale"),
        (lambda e: e.generate("a", n=0), "n must be"),
        (lambda e: e.generate("a", n="2"), "n must be"),
        (lambda e: e.generate("a", max_tokens=0), "max_tokens must be a whole number from 1 to 1,000,000, not 0"),
        (lambda e: e.generate("a", max_tokens="5"), "max_tokens must be a whole number from 1 to 1,000,000, not '5'"),
        (lambda e: e.generate("a", "interleaved", max_images=1.5), "max_images must be a whole number"),
        (
            lambda e: e.generate("a", seed="a"),
            "seed must be a whole number from 0 to 18,446,744,073,709,551,615, not 'a'",
        ),
        (
            lambda e: e.generate_batch(["a"], [1.5]),
            "seed must be a whole number from 0 to 18,446,744,073,709,551,615, not 1.5",
        ),
        (lambda e: e.generate("a", temperature="x"), "temperature must be a number"),
        (lambda e: e.generate("a", top_p="x"), "top_p must be a number above 0 and at most 1"),
        (lambda e: e.generate("a", top_k=2.5), "top_k must be a whole number from 0 to 1,000,000 .0 is off., not 2.5"),
        (lambda e: e.generate("a", guidance="x"), "guidance must be a number"),
        (lambda e: e.generate("a", guidance=["x"]), "guidance must be a number"),
        (lambda e: e.generate("a", generator="masked", steps=2.5), "steps must be a whole number"),
        (lambda e: e.generate("a", generator="masked", steps=0), "steps must be"),
        (lambda e: e.generate("a", steps=4), "next-token does not take steps"),
        (lambda e: e.generate("a", generator="flow", temperature=0.5), "flow does not take temperature"),
        (
            lambda e: e.generate("a", guidance=Guidance((3.0,), "apg")),
            "next-token does not take a guider",
        ),
        (
            lambda e: e.generate("a", generator="masked", fixed_codes=torch.zeros(3, 3).long()),
            "fixed_codes must be codes",
        ),
        (
            lambda e: e.generate("a", generator="masked", fixed_codes=torch.full((2, 2), 32)),
            "fixed_codes must be codes",
        ),
        (lambda e: e.generate("a", generator="flow", guider="cfg-zero", steps=1), "at least 2 steps"),
        (lambda e: e.generate("a", generator="flow", guider="none"), "unknown guider"),
        (lambda e: e.generate("a dog " * 400), "shorten"),
        (lambda e: e.edit(Image.new("RGB", (4, 4)), " "), "instruction is empty"),
        (lambda _: unigen.load("no-such-model"), "unknown model"),
        (lambda _: unigen.load("unigen-tiny", dtype="int3"), "unknown dtype"),
        (lambda _: unigen.load("unigen-tiny", device="abacus"), "not available"),
    ],
)
def test_bad_requests_get_one_clear_line(engine: Engine, call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call(engine)
    assert "\n" not in str(caught.value)


def test_cached_decoding_equals_the_full_forward(engine: Engine) -> None:
    """Greedy codes from the cache are the argmax of one packed forward over the finished document."""
    model = engine.model
    request = engine.build_request("a blue horse", "image", temperature=0.0, guidance=1.0)
    list(engine.run_requests([request]))
    with torch.inference_mode():
        batch = model.insert_image_ids(pack([[model.template.encode(request.document)]], 64, 16))
        row, start, stop = batch.spans_N3[0].tolist()
        hidden_BLD = model.hidden_states(batch)
        logits = model.logits(hidden_BLD[row, start - 1 : stop - 1], model.vocabulary.text_size)
    assert logits.argmax(-1).tolist() == model.vocabulary.image_codes(batch.ids_BL[row, start:stop]).tolist()


def test_a_model_that_has_learnt_one_batch_gives_it_back(tiny_folder: Path) -> None:
    """Loss and sampler mirror each other: overfit three chats, then draw, tell and answer them."""
    model = load(tiny_folder).train()
    codes = torch.tensor([[[1, 2], [3, 4]], [[31, 7], [7, 0]], [[5, 5], [6, 6]]])
    documents = [
        Document([Segment(text="a red dog"), Segment(image=codes[0], role="assistant")]),
        Document([Segment(image=codes[1]), Segment(text="how many"), Segment(text="two apples", role="assistant")]),
        Document(
            [
                Segment(text="story"),
                Segment(text="a witch", role="assistant"),
                Segment(image=codes[2], role="assistant"),
                Segment(text="and raven", role="assistant"),
                Segment(image=codes[0], role="assistant"),
            ]
        ),
    ]
    batch = pack(
        [[model.template.encode(d) for d in documents], [model.template.encode(documents[0], uncond=True)]], 96, 16
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    objective = MultiGeneratorLoss(model.generators)
    for _ in range(150):
        losses = objective(model, batch, torch.Generator())
        loss = sum(losses[k][0] / losses[k][1] for k in ("text", "next-token"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05
    engine = Engine(model.eval())

    def drawn(request: Any) -> list[Any]:
        list(engine.run_requests([request]))
        return [
            s.image.tolist() if s.image is not None else s.text
            for s in request.document.segments
            if s.role == "assistant"
        ]

    assert drawn(engine.build_request("a red dog", "image", temperature=0)) == [codes[0].tolist()]
    assert drawn(engine.build_request(documents[1].segments[:2], "text")) == ["two apples"]
    told = ["a witch", codes[2].tolist(), "and raven", codes[0].tolist()]
    assert drawn(engine.build_request("story", "interleaved", temperature=0)) == told


def test_keys_and_values_are_freed_with_what_was_running(engine: Engine) -> None:
    """At once, not when cycles are next collected: hundreds of megabytes for many pictures at a time."""
    running = engine.new_scheduler()
    running.add_request(engine.build_request("a dog", "image"))
    while running:
        running.step()
    cache = weakref.ref(running.cache)
    gc.disable()
    try:
        del running
        assert cache() is None
    finally:
        gc.enable()


def test_codes_that_are_not_codes_are_noticed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the grammar: ids taken for codes are refused by the tokenizer, not clamped."""
    monkeypatch.setattr(Vocabulary, "image_codes", lambda self, ids: ids)
    with pytest.raises(ValueError, match="another tokenizer"):
        engine.generate("a dog")


def test_requests_join_and_leave(engine: Engine) -> None:
    """Whenever a request joins, and whoever leaves meanwhile, its answer is the one that it gets alone."""
    asked: list[tuple[str, Any]] = [("image", 3.0), ("text", 1.0), ("interleaved", 2.0), ("image", 1.0)] * 3
    outputs = [
        dict(prompt=PROMPTS[k % 5], output=output, seed=k, **({} if output == "text" else {"guidance": guidance}))
        for k, (output, guidance) in enumerate(asked)
    ]
    options = [one | ({} if one["output"] == "image" else {"max_tokens": 12}) for one in outputs]
    alone = [[part for _, part in engine.run_requests([engine.build_request(**one)])] for one in options]
    running, rng, waiting = engine.new_scheduler(), np.random.default_rng(0), list(range(len(asked)))
    parts: dict[int, list[Any]] = {k: [] for k in waiting}
    number: dict[int, int] = {}
    dropped: set[int] = set()
    while waiting or running:
        if waiting and (not running or rng.random() < 0.3):
            k = waiting.pop(0)
            number[running.add_request(engine.build_request(**options[k]))] = k
        elif len(dropped) < 3 and len(running) > 2 and rng.random() < 0.1:
            (left,) = rng.choice([n for n in number if n in running], 1)
            running.abort(int(left))
            dropped.add(number[int(left)])
        for n, part in running.step():
            parts[number[n]].append(part)
    assert dropped and running.cache.num_slots < 2 * len(asked) and not running.cache.lengths.any()
    for k in set(parts) - dropped:
        texts = ["".join(p for p in said if isinstance(p, str)) for said in (parts[k], alone[k])]
        pictures = [[p for p in said if not isinstance(p, str)] for said in (parts[k], alone[k])]
        assert texts[0] == texts[1] and len(pictures[0]) == len(pictures[1]), asked[k]
        assert all(same(a, b) for a, b in zip(*pictures, strict=True)), asked[k]


def test_what_does_not_fit_does_not_join(engine: Engine) -> None:
    running = engine.new_scheduler()
    with pytest.raises(ValueError, match="shorten it"):
        running.add_request(engine.build_request("a blue horse " * 500, "image"))
    assert not running
    number = running.add_request(engine.build_request("a blue horse", "image"))
    while running:
        parts = running.step()
    assert [n for n, _ in parts] == [number] and same(parts[0][1], engine.generate("a blue horse"))


SEEDS = [0, 2**31, 2**32, 2**32 + 1, 2**53, 2**63, 2**64 - 1]


def test_all_seeds_draw_and_none_as_another(engine: Engine) -> None:
    """Of 64 bits, which torch's generator on a CPU would cut to 32."""
    options: dict[str, Any] = {"output": "text", "temperature": 2.0, "max_tokens": 12}
    said = engine.generate_batch(["a dog"] * len(SEEDS), SEEDS, **options)
    assert len(set(said)) == len(SEEDS)
    assert said[-1] == engine.generate("a dog", seed=2**64 - 1, **options)
    assert engine.generate("a dog", seed=2**64 - 1, n=2, **options)[1] == said[0], "0 comes after the last"


def test_candidates_of_seeds_are_not_those_of_others(engine: Engine) -> None:
    first, second = (engine.prepare("a dog", "image", candidates=3, seed=seed).requests for seed in (0, 2**32))
    running = engine.new_scheduler()
    seeds = [running.new_sequence(request).state.spec.rng.initial_seed() for request in (*first, *second)]  # type: ignore[union-attr]
    assert len({seed % 2**32 for seed in seeds}) == 6
    assert seeds[:3] == [1, 1_000_004, 2_000_007], "as they were before seeds had 64 bits"


WRITERS = ("next-token", "masked", "next-scale", "flow", "joint", "transfusion", "random-order", "token-flow")


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("writer", ["text", *WRITERS, "sjd", "jacobi"])
def test_numbers_that_are_not_finite_end_their_row_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, writer: str, greedy: bool
) -> None:
    """The rows beside it go on as if it was not there."""
    request: dict[str, Any] = {"output": "text", "max_tokens": 6} if writer == "text" else {"output": "image"}
    if writer in ("sjd", "jacobi"):
        request["accelerate"] = writer
    elif writer != "text":
        request["generator"] = writer
    if CodeSampling in engine.model.generators.options(request.get("generator", "next-token")):
        request |= {"temperature": 0.0 if greedy else 1.0}
    elif greedy:
        pytest.skip("it draws no codes")
    (alone,) = [part for part in engine.stream("the dog", seed=3, **request) if isinstance(part, Image.Image)] or [""]
    words = "".join(part for part in engine.stream("the dog", seed=3, **request) if isinstance(part, str))
    running = engine.new_scheduler()
    bad = running.add_request(engine.build_request("a blue horse", seed=3, **request))
    good = running.add_request(engine.build_request("the dog", seed=3, **request))
    step = engine.model.cached_hidden_states

    def overflow(embeds: Any, *rest: Any) -> Any:
        hidden = step(embeds, *rest).clone()
        if bad in running:
            hidden[: running._sequences[bad].num_branches] = float("nan")  # its slots are the first
            for layer in running.cache.layers:  # what the rows beside it get to read when it has left its slots
                layer.keys[running._sequences[bad].slots] = layer.values[running._sequences[bad].slots] = float("nan")
        return hidden

    monkeypatch.setattr(engine.model, "cached_hidden_states", overflow)
    failed: dict[int, str] = {}
    parts = []
    while running:
        for number, part in running.step():
            assert number == good
            parts.append(part)
        failed |= {number: str(error) for number, error in running.failed.items()}
    assert list(failed) == [bad] and failed[bad].startswith(("scores", "pixels"))
    assert "".join(part for part in parts if isinstance(part, str)) == words
    pictures = [part for part in parts if isinstance(part, Image.Image)]
    assert running.num_cached_tokens == 0 and len(pictures) == (writer != "text")
    if pictures:  # a flow's is a level of 255 off where sums are rounded otherwise in a batch
        levels = np.abs(np.asarray(pictures[0], int) - np.asarray(alone, int))
        assert levels.max() <= (writer in ("flow", "transfusion", "token-flow"))


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [("bfloat16", "dtype float32"), ("float32", "may be damaged")],
)
def test_what_to_do_about_numbers_that_are_not_finite(tiny_folder: Path, dtype: str, advice: str) -> None:
    engine = unigen.load(str(tiny_folder), "cpu", dtype)
    for name, weight in engine.model.backbone.named_parameters():
        if "layers.1.mlp" in name:
            weight.data.fill_(3e38)
    calls = [
        lambda: engine.generate("a dog"),
        lambda: engine.generate("a dog", "text"),
        lambda: engine.hidden_states("a"),
    ]
    calls.append(lambda: list(engine.stream("a dog", "interleaved")))
    for call in calls:
        with pytest.raises(ValueError, match=f"not finite in {dtype}: .*{advice}") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_float16_is_advised_against_where_it_overflows() -> None:
    error = NonFiniteError("scores", torch.float16)
    assert "not finite in float16: load it with dtype bfloat16 or float32" in str(error)


def test_pixels_that_are_not_finite_are_no_picture(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a finished one nor a preview."""
    tokenizer = engine.model.heads["flow"].tokenizer
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda latents: decode(latents) * float("inf"))
    for previews in (0, 2):
        with pytest.raises(ValueError, match="pixels of this model are not finite"):
            list(engine.stream("a dog", "image", generator="flow", steps=4, previews=previews))
