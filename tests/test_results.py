"""What a generation reports beside its answer, against computations that share nothing with the samplers.

Run: pytest tests/test_results.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from unigen.batch import pack
from unigen.document import Document, Segment
from unigen.inference.engine import Engine
from unigen.inference.results import Record

LOGPROBS = Record(logprobs=True)
CODES = ("next-token", "masked", "next-scale", "random-order")


def run(engine: Engine, output: Any, seed: int = 0, record: Record = LOGPROBS, **options: Any) -> Any:
    (result,) = engine.generate_results(["a blue horse"], [seed], output, record=record, **options)
    return result


def text_logits(engine: Engine, result: Any) -> Tensor:
    """Logits (T, V) of the answer's ids by one pass over prompt and answer, without a cache."""
    model = engine.model
    prompt = model.token_ids(model.template.prompt(Document.of("a blue horse"), output="text"))
    ids_1L = torch.tensor([[*prompt, *result.token_ids]])
    with torch.inference_mode():
        positions_1L = torch.arange(ids_1L.shape[1])[None]
        hidden_1LD = model.backbone.forward_packed(model.embed(ids_1L), positions_1L, torch.ones_like(ids_1L))
        logits_TV = model.logits(hidden_1LD[0, len(prompt) - 1 : -1], 0, model.vocabulary.text_size).float()
    logits_TV = logits_TV.clone()
    forbidden = [id for id in model.generators["text"].forbidden_ids if id not in model.template.stop_token_ids]
    logits_TV[:, forbidden] = -torch.inf
    logits_TV[:, model.vocabulary.image_start : model.vocabulary.image_stop] = -torch.inf
    return logits_TV


def image_logits(engine: Engine, codes_hw: Tensor, blind: bool = False) -> Tensor:
    """Logits (h w, codes) of next-token's image by one pass over the finished document."""
    model = engine.model
    segments = [Segment(text="a blue horse"), Segment(image=codes_hw, role="assistant")]
    tokens = model.template.encode(Document(segments), uncond=blind)
    with torch.inference_mode():
        batch = model.insert_image_ids(pack([[tokens]], 64, 16))
        row, start, stop = batch.spans_N3[0].tolist()
        hidden_BLD = model.hidden_states(batch)
        return model.logits(
            hidden_BLD[row, start - 1 : stop - 1], model.vocabulary.image_start, model.vocabulary.image_stop
        ).float()


def picked(logits: Tensor, ids: Any) -> Tensor:
    return logits.log_softmax(-1).gather(-1, torch.as_tensor(ids)[:, None])[:, 0]


def test_results_hold_what_generate_gives(engine: Engine) -> None:
    for output in ("image", "text", "interleaved"):
        options: dict[str, Any] = {"max_images": 1} if output == "interleaved" else {}
        result = run(engine, output, record=Record(), seed=3, max_tokens=6, **options)
        answer = engine.generate("a blue horse", output, seed=3, max_tokens=6, **options)
        assert result.output == answer and result.seed == 3 and result.logprobs is None
        assert result.document.segments[0].text == "a blue horse" and result.settings["seed"] == 3
        images = [part for part in (answer if isinstance(answer, list) else [answer]) if not isinstance(part, str)]
        assert len(result.codes) == len(images) and result.usage.image_tokens == 4 * len(images)
        assert result.finish_reason == ("length" if result.usage.truncated else "stop")
    result = run(engine, "image")
    assert result.token_ids == engine.model.vocabulary.image_ids(result.codes[0]).flatten().tolist()
    assert result.document.segments[-1].image is result.codes[0]


def test_the_log_probabilities_of_greedy_text_are_those_of_one_pass(engine: Engine) -> None:
    result = run(engine, "text", temperature=0.0, max_tokens=6)
    expected = picked(text_logits(engine, result), result.token_ids)
    torch.testing.assert_close(result.logprobs, expected, atol=1e-4, rtol=1e-4)


def test_the_log_probabilities_of_sampled_text_are_of_what_is_drawn_from(engine: Engine) -> None:
    result = run(engine, "text", temperature=1.5, top_k=4, max_tokens=6)
    logits_TV = text_logits(engine, result) / 1.5
    cut_TV = logits_TV.masked_fill(logits_TV < logits_TV.topk(4).values[:, -1:], -torch.inf)
    torch.testing.assert_close(result.logprobs, picked(cut_TV, result.token_ids), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(result.logprobs, picked(logits_TV, result.token_ids), atol=1e-2), "without top-k"


def test_the_id_that_ends_a_text_counts(engine: Engine) -> None:
    results = engine.generate_results(
        ["a blue horse"] * 30, None, "text", record=LOGPROBS, temperature=2.0, max_tokens=12
    )
    ended = [result for result in results if result.finish_reason == "stop"]
    assert ended and all(result.token_ids[-1] in engine.model.template.stop_token_ids for result in ended)
    assert all(len(result.logprobs) == len(result.token_ids) for result in results)
    torch.testing.assert_close(
        ended[0].logprobs, picked(text_logits(engine, ended[0]) / 2.0, ended[0].token_ids), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("accelerate", [None, "sjd", "jacobi"])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_the_log_probabilities_of_codes_are_after_guidance(
    engine: Engine, temperature: float, accelerate: str | None
) -> None:
    options: dict[str, Any] = {"temperature": temperature, "accelerate": accelerate, "top_k": 8 if temperature else 0}
    result = run(engine, "image", guidance=2.5, **options)
    codes_P = result.codes[0].flatten()
    cond, uncond = (image_logits(engine, result.codes[0], blind) for blind in (False, True))
    guided = (uncond + 2.5 * (cond - uncond)) / (temperature or 1.0)
    if temperature:
        guided = guided.masked_fill(guided < guided.topk(8).values[:, -1:], -torch.inf)
    torch.testing.assert_close(result.logprobs, picked(guided, codes_P), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(result.logprobs, picked(cond, codes_P), atol=1e-2), "without guidance"


def test_a_greedy_image_without_guidance_is_scored_as_it_was_drawn(engine: Engine) -> None:
    result = run(engine, "image", temperature=0.0, guidance=1.0)
    (score,) = engine.score([result.document], per_token=True)
    assert score.logprobs is not None and score.total == pytest.approx(float(score.logprobs.sum()), abs=1e-4)
    is_code = engine.model.vocabulary.is_image(torch.tensor(score.token_ids))
    assert torch.tensor(score.token_ids)[is_code].tolist() == result.token_ids
    torch.testing.assert_close(score.logprobs[is_code], result.logprobs, atol=1e-4, rtol=1e-4)
    assert score.token_ids[-1] == engine.model.template.stop_token_ids[0], "the end of the turn counts"
    other = Document([*result.document.segments[:1], Segment(image=result.codes[0].flip(0), role="assistant")])
    assert engine.score([other])[0].total < score.total, "other codes are less likely than the likeliest"
    with pytest.raises(ValueError, match="has no text or image of the assistant"):
        engine.score([Document.of("a blue horse")])


@pytest.mark.parametrize("generator", CODES)
def test_the_first_code_is_drawn_as_often_as_it_says(engine: Engine, generator: str) -> None:
    """With three codes left by top-k, their probabilities sum to 1 and are their shares."""
    count, options = 240, {"temperature": 3.0, "top_k": 3, "guidance": 1.0, "generator": generator}
    if generator == "masked":
        options["steps"] = 1
    results = engine.generate_results(["a blue horse"] * count, range(count), record=LOGPROBS, **options)
    assert all(len(result.logprobs) == len(result.token_ids) for result in results)
    first = [(result.token_ids[0], float(result.logprobs[0].exp())) for result in results]
    if generator == "random-order":  # the place that is drawn first differs: all of them follow one rule
        assert all(0 < probability <= 1 for _, probability in first)
        return
    probabilities = dict(first)
    assert len(probabilities) == 3 and sum(probabilities.values()) == pytest.approx(1, abs=1e-4)
    for id, probability in probabilities.items():
        share = sum(one == id for one, _ in first) / count
        assert abs(share - probability) < 4 * (probability * (1 - probability) / count) ** 0.5, (id, share)


def test_a_masked_code_reports_the_step_that_fixed_it(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from unigen.generators import masked

    steps: list[Tensor] = []
    warp = masked.warp
    monkeypatch.setattr(masked, "warp", lambda *given: steps.append(warp(*given)) or steps[-1])
    fixed = torch.tensor([[3, -1], [-1, -1]])
    result = run(engine, "image", generator="masked", steps=3, temperature=1.0, fixed_codes=fixed, seed=2)
    assert result.logprobs[0] == 0 and len(steps) == 3, "a given code has 0"
    candidates = torch.stack([picked(step, result.codes[0].flatten()) for step in steps])
    difference = (candidates - result.logprobs).abs()
    assert (difference.amin(0)[1:] < 1e-5).all() and len(set(difference.argmin(0)[1:].tolist())) == 3, "a code a step"


@pytest.mark.parametrize("generator", ["flow", "transfusion", "token-flow"])
def test_latents_and_trajectories(engine: Engine, generator: str) -> None:
    record = Record(latents=True, trajectory=True)
    result = run(engine, "image", generator=generator, steps=3, record=record)
    head = engine.model.generators[generator]
    with torch.inference_mode():
        decoded = head.tokenizer.decode(result.latents[0][None])
    from unigen.media.pixels import to_images

    assert to_images(decoded.float())[0].tobytes() == result.output.tobytes()
    assert result.codes == [None] and not result.token_ids
    if generator != "token-flow":  # whose tokens have each a path of their own
        (trajectory,) = result.trajectories
        assert trajectory.x_t.shape[0] == len(trajectory.t) == 4 and trajectory.t[0] == 1 and trajectory.t[-1] == 0
        torch.testing.assert_close(trajectory.x_t[-1], result.latents[0])
    assert not run(engine, "image", generator=generator, steps=3, record=Record()).trajectories
