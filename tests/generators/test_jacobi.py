"""Several codes a step are exact: against the exact distribution of a toy, the same picture by the same seed, and with
the mistakes that must show."""

from __future__ import annotations

from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency, chisquare
from torch import Tensor

import unigen
from tests.parity import emu3 as emu3_case
from unigen.batch import Vocabulary
from unigen.commands import main as cli
from unigen.document import Document
from unigen.generators import jacobi
from unigen.generators.base import SegmentSpec
from unigen.generators.next_token import NextToken
from unigen.generators.options.acceleration import SPECULATIVE_METHODS, Acceleration
from unigen.inference.scheduler import Scheduler
from unigen.options import OptionSet
from unigen.samplers.guidance import Guidance
from unigen.samplers.logits import SamplingOptions, probabilities

CODES, GRID = 2, (1, 7)


class ToyModel:
    """A model whose state after a prefix is its logits: a table of every prefix and branch."""

    vocabulary = Vocabulary(1, CODES)

    def __init__(self) -> None:
        rng = torch.Generator().manual_seed(0)
        prefixes = [p for n in range(GRID[1]) for p in product(range(CODES), repeat=n)]
        self.table = {p: torch.randn(2, CODES, generator=rng) for p in prefixes}

    def logits(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        return hidden

    def states(self, written: list[int], asked: list[int], branch: int) -> Tensor:
        """Logits after each id that is read. Id 0 opens the picture; drafts continue what is written."""
        codes = [id - 1 for id in written]
        known = len(codes) - (asked[0] != 0)  # the last of them is read now
        told = []
        for id in asked:
            codes, known = (codes, 0) if id == 0 else ([*codes[:known], id - 1], known + 1)
            told.append(self.table[tuple(codes[:known])][branch])
        return torch.stack(told)


def draw(toy: ToyModel, span: SegmentSpec, kind: str | None) -> tuple[int, ...]:
    generator = NextToken(GRID)
    span.options = OptionSet([Acceleration(accelerate=kind)])
    state = generator.start(span)
    while not state.finished:
        read = generator.prepare_step(state)
        hidden = [toy.states(state.ids, read.ids, branch) for branch in range(2)]
        generator.step(toy, [state], [hidden])  # type: ignore[arg-type]
    return tuple(id - 1 for id in state.ids)


def span(seed: int, sampling: SamplingOptions) -> SegmentSpec:
    return SegmentSpec(0, sampling, Guidance((2.0,)), torch.Generator().manual_seed(seed), GRID)


def exact(toy: ToyModel, sampling: SamplingOptions) -> dict[tuple[int, ...], float]:
    """The probability of every picture."""
    guidance, found = Guidance((2.0,)), {}
    for codes in product(range(CODES), repeat=GRID[1]):
        p = 1.0
        for n, code in enumerate(codes):
            full, blind = toy.table[codes[:n]]
            p *= float(probabilities(guidance.combine([full[None], blind[None]]), sampling)[0, code])
        found[codes] = p
    return found


def sample_codes(toy: ToyModel, sampling: SamplingOptions, kind: str | None, count: int) -> Counter[tuple[int, ...]]:
    return Counter(draw(toy, span(seed, sampling), kind) for seed in range(count))


def p_value(counts: Counter[tuple[int, ...]], wanted: dict[tuple[int, ...], float]) -> float:
    """Of the hypothesis that these are draws of that distribution; what is rare is taken together."""
    total = counts.total()
    common = [codes for codes, p in wanted.items() if p * total >= 8]
    rare = 1 - sum(wanted[codes] for codes in common)
    seen, expected = [counts[codes] for codes in common], [wanted[codes] * total for codes in common]
    if rare * total >= 1:
        seen, expected = [*seen, total - sum(seen)], [*expected, rare * total]
    return float(chisquare(seen, np.array(expected) * sum(seen) / sum(expected)).pvalue)


@pytest.mark.parametrize("kind", SPECULATIVE_METHODS)
@pytest.mark.parametrize("sampling", [SamplingOptions(1.0), SamplingOptions(0.8, top_p=0.9)], ids=["all", "top-p"])
def test_the_distribution_of_a_toy(kind: str, sampling: SamplingOptions) -> None:
    toy = ToyModel()
    wanted, counts = exact(toy, sampling), sample_codes(toy, sampling, kind, 3000)
    assert p_value(counts, wanted) > 1e-3
    distance = sum(abs(counts[codes] / 3000 - p) for codes, p in wanted.items()) / 2
    expected = sum((2 * p * (1 - p) / (torch.pi * 3000)) ** 0.5 for p in wanted.values()) / 2
    assert distance < 1.5 * expected, "total variation beyond the error of sampling"


@pytest.mark.parametrize("mistake", ["proposal", "temperature"])
def test_a_wrong_proposal_shows(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is accepted against another distribution than it was drawn from, as the sheet warns: one of other places,
    or one of another temperature."""
    toy, sampling = ToyModel(), SamplingOptions(1.0)
    tested = jacobi._verify_drafts

    def wrong(state: Any, told_WK: Tensor) -> Any:
        if mistake == "proposal":
            given = [None if q is None else q.roll(1) for q in state.proposals]
        else:
            given = [None if q is None else q.square() / q.square().sum() for q in state.proposals]
        state.proposals = given
        return tested(state, told_WK)

    monkeypatch.setattr(jacobi, "_verify_drafts", wrong)
    assert p_value(sample_codes(toy, sampling, "sjd", 3000), exact(toy, sampling)) < 1e-6


def test_the_same_seed_gives_the_same_picture_of_the_toy() -> None:
    toy = ToyModel()
    for seed in range(200):
        assert draw(toy, span(seed, SamplingOptions(1.0)), "jacobi") == draw(
            toy, span(seed, SamplingOptions(1.0)), None
        )


def codes_of(engine: Any, requests: list[Any]) -> list[list[int]]:
    list(engine.run_requests(requests))
    return [request.document.segments[-1].image.flatten().tolist() for request in requests]


@pytest.mark.parametrize("kind", SPECULATIVE_METHODS)
def test_greedy_is_the_same(tiny_folder: Path, kind: str) -> None:
    engine = unigen.load(str(tiny_folder), "cpu")
    ask = lambda how: engine.build_request("a red dog", "image", temperature=0.0, guidance=3.0, accelerate=how)  # noqa: E731
    assert codes_of(engine, [ask(kind)]) == codes_of(engine, [ask(None)])


def test_alone_and_in_a_batch_and_with_ends_of_rows(tmp_path: Path, monkeypatch: Any) -> None:
    """Rows go on at their own pace; Emu3's pictures have an id after each row of codes."""
    emu3_case.checkpoint(tmp_path)
    engine = unigen.load(str(tmp_path), "cpu")
    steps = 0
    once = Scheduler.step

    def counted(running: Scheduler) -> Any:
        nonlocal steps
        steps += 1
        return once(running)

    monkeypatch.setattr(Scheduler, "step", counted)
    sizes = [(40, 32), (16, 24), (24, 16)]
    for kind in SPECULATIVE_METHODS:
        ask = lambda n, how: engine.build_request(  # noqa: E731
            "a red apple", "image", seed=n, temperature=0.3, top_k=4, size=sizes[n], accelerate=how
        )
        together = codes_of(engine, [ask(n, kind) for n in range(3)])
        assert together == [codes_of(engine, [ask(n, kind)])[0] for n in range(3)]
        if kind == "jacobi":
            steps = 0
            plain = codes_of(engine, [ask(n, None) for n in range(3)])
            plain_steps, steps = steps, 0
            assert codes_of(engine, [ask(n, kind) for n in range(3)]) == plain
            assert steps < plain_steps


def test_in_an_answer_of_text_and_pictures(tiny_folder: Path) -> None:
    engine = unigen.load(str(tiny_folder), "cpu")
    asked = Document.of("a story about a witch")
    options = {"seed": 3, "max_tokens": 40, "max_images": 2}
    plain = engine.generate(asked, "interleaved", **options)
    fast = engine.generate(asked, "interleaved", accelerate="jacobi", **options)
    assert [p if isinstance(p, str) else p.tobytes() for p in fast] == [
        p if isinstance(p, str) else p.tobytes() for p in plain
    ]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--accelerate", "magic"], "one of sjd, jacobi"),
        (["--accelerate", "sjd", "--generator", "masked"], "masked does not take accelerate"),
    ],
)
def test_what_cannot_be(
    options: list[str], reason: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.png"
    assert (
        cli.main(["generate", "a dog", *options, "-o", str(out), "--model", str(tiny_folder), "--device", "cpu"]) == 2
    )
    assert reason in capsys.readouterr().err and not out.exists()


SPANS = 2000


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_shipped_model_place_by_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of 2,000 pictures by ordinary decoding and by sjd, with guidance and top-k: at each of the 64 places the
    two are draws of one distribution (chi-square, p above 1e-3 / 64); and 500 show that they are not where drafts are
    tested against what is told of their places now, and not against what they were drawn from."""
    engine = unigen.load("unigen-tiny", "cpu")

    def pictures(kind: str | None, seed: int, count: int = SPANS) -> np.ndarray:
        made = []
        for first in range(0, count, 50):
            options = {"temperature": 1.0, "top_k": 100, "guidance": 3.0, "accelerate": kind}
            words = "two apples on a blue background"
            asked = [engine.build_request(words, "image", seed=seed + first + n, **options) for n in range(50)]
            made += codes_of(engine, asked)
        return np.array(made)

    def least(one: np.ndarray, two: np.ndarray) -> float:
        """The least p of all places; codes that are rare there are taken together."""
        found = []
        for place in range(one.shape[1]):
            counts = np.stack([np.bincount(x[:, place], minlength=1024) for x in (one, two)])
            common = counts.sum(0) >= 20
            table = np.concatenate([counts[:, common], counts[:, ~common].sum(1, keepdims=True)], 1)
            table = table[:, table.sum(0) > 0]
            found.append(1.0 if table.shape[1] < 2 else float(chi2_contingency(table).pvalue))
        return min(found)

    ordinary = pictures(None, 0)
    assert least(ordinary, pictures("sjd", 1_000_000)) > 1e-3 / ordinary.shape[1]
    tested = jacobi._verify_drafts

    def wrong(state: Any, told_WK: Tensor) -> Any:
        state.proposals = [None if q is None else told_WK[j] for j, q in enumerate(state.proposals)]
        return tested(state, told_WK)

    monkeypatch.setattr(jacobi, "_verify_drafts", wrong)
    assert least(ordinary[:500], pictures("sjd", 2_000_000, 500)) < 1e-3 / ordinary.shape[1]
