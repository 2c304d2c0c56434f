"""Images of other generators than next-token, with text by vLLM, equal those of the local engine. On a CPU, in float32.

Run: scripts/test.sh --serve"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import unigen
from tests.serving.test_vllm import LLAMA, SMALL, WORDS, answers, on_vllm, pieces, scheduler
from unigen.backends.vllm_engine import is_vllm_segment

pytestmark = pytest.mark.serve
pytest.importorskip("vllm")

WRITERS = ("next-token", "masked", "next-scale", "flow", "joint")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights and several generators: 8x8 codes out of 512, in four scales, or latents."""
    from transformers import LlamaConfig

    from unigen import generators
    from unigen.generators import build
    from unigen.generators.base import BuildContext
    from unigen.model import assembly
    from unigen.tokenizers.kl import KLConfig, KLTokenizer
    from unigen.tokenizers.vq import VQConfig, VQTokenizer

    torch.manual_seed(0)
    scratch = tmp_path_factory.mktemp("many")
    own: dict[str, Any] = {
        "multiscale": VQTokenizer(VQConfig(**SMALL, quantizer="multiscale", scales=(1, 2, 4, 8), code_dim=4)),
        "kl": KLTokenizer(KLConfig(image_size=64, channels=(16, 16, 16, 16), latent_channels=4)),
    }
    settings: dict[str, Any] = {"flow": {"layers": 2, "heads": 2, "head_dim": 16, "context_length": 64}}
    config = LlamaConfig(**LLAMA)
    heads = [
        build.build_generator(name, BuildContext((8, 8), 0, config.hidden_size, own[kind], settings.get(name, {})))
        for name in WRITERS
        if (kind := generators.find_generator(name).tokenizer_kind)
    ]
    model = assembly.build_from_config(config, pieces(scratch / "text"), VQTokenizer(VQConfig(**SMALL)), WRITERS, heads)
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.requires_grad:
            parameter.data.normal_(0, 0.3)
    model.save(scratch / "model")
    return scratch / "model"


@pytest.fixture(scope="module")
def local(folder: Path) -> Any:
    return unigen.load(str(folder), "cpu")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Any]:
    with on_vllm(folder) as engine:
        yield engine


def assert_same(one: Any, other: Any) -> bool:
    """The images are equal, up to the rounding of sums of a flow that is computed in other passes."""
    return bool(np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1)


def assert_unchanged(engine: Any) -> bool:
    """Has vLLM no requests left?"""
    return not engine.llm.has_unfinished_requests() and not scheduler(engine).groups and not engine._pending_outputs


def stories(generator: str, **options: Any) -> list[dict[str, Any]]:
    told = {"output": "interleaved", "generator": generator, "max_images": 2, "max_tokens": 80, **options}
    return [told | {"prompt": f"a story about a {word}", "seed": seed} for seed, word in enumerate(WORDS[3:9])]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("generator", ["masked", "next-scale"])
def test_stories(generator: str, guidance: float, engine: Any, local: Any) -> None:
    """Text by vLLM and images by the local model, together with a story that vLLM generates alone; also greedy
    images."""
    options = [*stories(generator, guidance=guidance), *stories("next-token", guidance=guidance)]
    wanted = answers(local, options)
    assert answers(engine, options) == wanted and assert_unchanged(engine)
    drawn = [part for parts in wanted[:6] for part in parts if isinstance(part, list)]
    least = 32 if generator == "masked" else 16  # a random tokenizer reads most of what next-scale draws as the same
    assert len(drawn) >= 4 and len({code for codes in drawn for row in codes for code in row}) >= least
    assert any([type(part) for part in parts[:4]] == [str, list, str, list] for parts in wanted[:6])


def test_control_of_stories(engine: Any, local: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The local model's images without the context that vLLM has read."""
    wanted = answers(local, stories("masked"))
    submit = type(engine).submit_segment
    monkeypatch.setattr(
        type(engine),
        "submit_segment",
        lambda self, row, before: submit(self, row, before if is_vllm_segment(row) else before[:1]),
    )
    assert answers(engine, stories("masked")) != wanted


@pytest.mark.parametrize("generator", WRITERS)
def test_pictures(generator: str, engine: Any, local: Any) -> None:
    """The same seed gives the same image."""
    for options in ({"guidance": 1.0}, {"guidance": 2.0, "seed": 4}):
        given, wanted = (one.generate("a red dog", generator=generator, **options) for one in (engine, local))
        assert assert_same(given, wanted)
        assert not assert_same(given, engine.generate("a red dog", generator=generator, **options | {"seed": 9}))
    assert assert_unchanged(engine)


def test_story_of_a_flow(engine: Any, local: Any) -> None:
    """Its head needs the hidden states of the whole context, which vLLM does not return."""
    options, *_ = stories("flow", steps=3, guidance=2.0)
    given, wanted = (list(one.stream(**options)) for one in (engine, local))
    texts = ["".join(part for part in parts if isinstance(part, str)) for parts in (given, wanted)]
    pictures = [[part for part in parts if not isinstance(part, str)] for parts in (given, wanted)]
    assert texts[0] == texts[1]
    assert len(pictures[0]) == len(pictures[1]) > 0 and all(map(assert_same, *pictures))
    seen = [part for part in engine.stream(**options, previews=2) if isinstance(part, unigen.Preview)]
    expected = [(i, n) for i in range(len(pictures[0])) for n in range(2)]
    assert [(one.image_index, one.preview_index) for one in seen] == expected
    assert assert_unchanged(engine)


def test_other_capabilities(engine: Any, local: Any) -> None:
    """Joint generation, inpainting, and captions chosen among candidates by scores of the local model."""
    paper = local.generate("a red dog", seed=5)
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    assert assert_same(engine.inpaint(paper, "a blue horse", mask), local.inpaint(paper, "a blue horse", mask))
    given, wanted = engine.generate_joint("a red dog", seed=2), local.generate_joint("a red dog", seed=2)
    assert given[0] == wanted[0] and assert_same(given[1], wanted[1])
    captions = [local.describe(paper, candidates=n, max_tokens=12) for n in (1, 6)]
    assert [engine.describe(paper, candidates=n, max_tokens=12) for n in (1, 6)] == captions
    assert engine.describe(paper, max_tokens=12) == local.describe(paper, max_tokens=12)
    drawn = {"candidates": 3, "seed": 2}
    assert engine.generate("a blue horse", **drawn).tobytes() == local.generate("a blue horse", **drawn).tobytes()
    torch.testing.assert_close(engine.hidden_states("a dog"), local.hidden_states("a dog"))
    told, known = engine.info(), local.info()
    assert all(told[name] == known[name] for name in ("generators", "takes", "sampling", "outputs"))
    with pytest.raises(ValueError, match="leave accelerate out"):
        engine.generate("a dog", accelerate="sjd")


def test_control_of_candidates(engine: Any, local: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight of the local model differs from that of vLLM."""
    paper = local.generate("a red dog", seed=5)
    wanted = [local.describe(paper, candidates=6, max_tokens=12, seed=seed) for seed in range(3)]
    embeddings = engine.model.backbone.lm.get_input_embeddings().weight
    kept = embeddings.data.clone()
    embeddings.data.neg_()
    try:
        assert [engine.describe(paper, candidates=6, max_tokens=12, seed=seed) for seed in range(3)] != wanted
    finally:
        embeddings.data.copy_(kept)


def test_stream_closed_within_an_image_leaves_nothing_behind(engine: Any) -> None:
    running = engine.new_scheduler()
    options, *_ = stories("masked")
    number = running.add_request(engine.build_request(**options))
    while running._submitted[number].request_ids:
        running.step()
    running.step()
    assert number in running and running.cache.num_used == 2 and running.num_cached_tokens > 0
    running.abort_all()
    assert running.cache.num_used == 0 and running.num_cached_tokens == 0 and assert_unchanged(engine)


def test_images_need_no_space_in_vllm(folder: Path, local: Any) -> None:
    """Only text counts for its limits then; with next-token the limits are as before."""
    with on_vllm(folder, max_num_seqs=1) as engine:
        given = engine.generate("a red dog", generator="masked", guidance=2.0)
        assert assert_same(given, local.generate("a red dog", generator="masked", guidance=2.0))
        with pytest.raises(ValueError, match="raise max_num_seqs"):
            engine.generate("a red dog", guidance=2.0)


def test_server(folder: Path, local: Any, start_server: Any) -> None:
    """Images of other generators and text in one batch equal those alone."""
    served = start_server("--model", str(folder), "--device", "cpu", "--engine", "vllm", "--vllm", "enforce_eager=true")
    served.wait()
    chat = {"model": str(folder), "messages": [{"role": "user", "content": "how many"}], "max_tokens": 20, "seed": 1}
    drawn = {"prompt": "a red dog", "seed": 5, "generator": "masked"}
    with ThreadPoolExecutor(8) as pool:
        texts = [pool.submit(served.get, "/v1/chat/completions", chat) for _ in range(3)]
        pictures = [pool.submit(served.get, "/v1/images/generations", drawn) for _ in range(3)]
        said, made = ([job.result() for job in jobs] for jobs in (texts, pictures))
    assert [status for status, _ in said + made] == [200] * 6
    picture = local.generate("a red dog", seed=5, generator="masked").tobytes()
    for _, answer in made:
        assert Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))).tobytes() == picture
    assert len({repr(answer["choices"][0]["message"]) for _, answer in said}) == 1
    assert "masked" in served.get("/v1/models")[1]["data"][0]["unigen"]["generators"]
