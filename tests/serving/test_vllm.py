"""The engine on vLLM gives the same token ids as the local engine, whatever else vLLM computes. On a CPU, in float32.

Run: scripts/test.sh --serve"""

from __future__ import annotations

import base64
import gc
import io
import itertools
import os
import random
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import unigen
from tests.serving.test_server import child_pid, group, wait_until
from unigen.batch import Vocabulary
from unigen.commands import main as cli
from unigen.document import Document
from unigen.inference.results import Record
from unigen.models import convert

pytestmark = pytest.mark.serve
pytest.importorskip("vllm")

WORDS = "a the blue red horse dog apple apples two three on background how many story about witch and raven".split()
SMALL: dict[str, Any] = {
    "image_size": 64,
    "codebook_size": 512,
    "channels": 16,
    "decoder_channels": 16,
    "wide_channels": 16,
}
SMALL |= {"encoder_blocks": (1, 1), "decoder_blocks": (1, 1)}
"""An image tokenizer of 8x8 codes."""
LLAMA: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 1}
LLAMA |= {"max_position_embeddings": 512, "tie_word_embeddings": True}


def pieces(folder: Path) -> Any:
    """A text tokenizer that is trained on these words."""
    from unigen.model import chat_template
    from unigen.tokenizers import text

    lines = [" " + " ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))] * 4
    text.train_tokenizer(lines, folder, 312, chat_template.SPECIAL_TOKENS)
    return text.load(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights of a large variance, so that its output depends on its input: 8x8 codes out of
    512."""
    from transformers import LlamaConfig

    from unigen.model import assembly
    from unigen.tokenizers.vq import VQConfig, VQTokenizer

    torch.manual_seed(0)
    scratch = tmp_path_factory.mktemp("wide")
    text, image_tokenizer = pieces(scratch / "text"), VQTokenizer(VQConfig(**SMALL))
    model = assembly.build_from_config(LlamaConfig(**LLAMA), text, image_tokenizer)
    for p in model.backbone.parameters():
        if p.ndim > 1:
            p.data.normal_(0, 0.3)
    model.save(scratch / "model")
    return scratch / "model"


@pytest.fixture(scope="module")
def local(folder: Path) -> Any:
    return unigen.load(str(folder), "cpu")


@contextmanager
def on_vllm(folder: Path, **options: Any) -> Iterator[Any]:
    from unigen.backends import vllm_engine

    engine = vllm_engine.load(str(folder), "cpu", None, {"enforce_eager": True, **options})
    try:
        yield engine
    finally:
        engine.close()
        del engine
        gc.collect()


@pytest.mark.timeout(600)
def test_server_in_two_processes(folder: Path, local: Any, start_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes of vLLM, each with a shard of every layer, are children of the model's process. All end when it is
    killed,
    whether alone or with the server."""
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)  # of one process, where others have run before
    vllm = ["--engine", "vllm", "--vllm", "enforce_eager=true", "--vllm", "tensor_parallel_size=2"]
    served = start_server("--model", str(folder), "--device", "cpu", *vllm)
    served.wait(240)
    child = int(child_pid(served))
    assert len(group(child)) >= 3
    told = {"prompt": "a red dog", "seed": 5, "guidance": 3.0, "temperature": 1.0}
    status, made = served.get("/v1/images/generations", told)
    assert status == 200, made
    given = Image.open(io.BytesIO(base64.b64decode(made["data"][0]["b64_json"])))
    assert given.tobytes() == local.generate("a red dog", seed=5, guidance=3.0, temperature=1.0).tobytes()
    os.kill(child, signal.SIGKILL)
    wait_until(lambda: not group(child))
    served.wait(240)
    child = int(child_pid(served))
    assert len(group(child)) >= 3
    served.process.kill()
    wait_until(lambda: not group(child))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Any]:
    with on_vllm(folder) as engine:
        yield engine


def scheduler(engine: Any) -> Any:
    return engine.llm.engine_core.engine_core.scheduler


def asked(count: int, longest: int) -> list[dict[str, Any]]:
    """Images with and without guidance, greedy and sampled, prompts with a common prefix, and text between them."""
    rng, made = random.Random(0), list[dict[str, Any]]()
    for i in range(count):
        words = " ".join(rng.choices(WORDS, k=rng.randint(3, longest)))
        if i % 3 == 2:
            words = made[-1]["prompt"] + " dog"
        drawn: dict[str, Any] = {"temperature": 0.0} if i % 2 else {"temperature": 1.0, "top_k": 100}
        made.append({"prompt": words, "output": "image", "guidance": (1.0, 3.0, 7.5)[i % 3], "seed": 100 + i, **drawn})
        if i % 2:
            made.append({"prompt": words, "output": "text", "temperature": i % 4 / 3, "max_tokens": 30, "seed": i})
    told = {"prompt": "a story about a witch", "output": "interleaved", "max_images": 2, "max_tokens": 40, "seed": 7}
    return [*made, told]


def answers(engine: Any, options: list[dict[str, Any]]) -> list[list[Any]]:
    """The answers: texts, and images as codes."""
    requests = [engine.build_request(**one) for one in options]
    list(engine.run_requests(requests))
    return [
        [s.text if s.image is None else s.image.tolist() for s in request.document.segments if s.role == "assistant"]
        for request in requests
    ]


class DelayedEngine:
    """vLLM's engine, but requests arrive one per step in random order, so that guidance branches start at different
    steps."""

    def __init__(self, llm: Any) -> None:
        self.llm, self.rng = llm, random.Random(1)
        self.held: list[tuple[Any, ...]] = []

    def add_request(self, *request: Any) -> None:
        self.held.append(request)

    def step(self) -> Any:
        if self.held:
            self.llm.add_request(*self.held.pop(self.rng.randrange(len(self.held))))
        return self.llm.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.llm, name)


CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "basic": (4, 12, {}),
    "many": (16, 12, {"max_num_seqs": 32}),
    "odd": (12, 12, {"max_num_seqs": 7}),
    "chunked": (12, 60, {"max_num_batched_tokens": 64, "max_num_seqs": 16}),
    "preempted": (12, 60, {"num_gpu_blocks_override": 40, "max_num_seqs": 24}),
    "late": (12, 60, {"max_num_batched_tokens": 128, "max_num_seqs": 12, "num_gpu_blocks_override": 60}),
}


@pytest.mark.parametrize("case", CASES)
def test_answers_equal_the_local_engine(case: str, folder: Path, local: Any) -> None:
    count, longest, options = CASES[case]
    wanted = answers(local, asked(count, longest))
    with on_vllm(folder, **options) as engine:
        if case == "late":
            engine.llm = DelayedEngine(engine.llm)
        given = answers(engine, asked(count, longest))
        dropped = scheduler(engine).num_dropped_ids
        assert not engine.llm.has_unfinished_requests()
    assert [one == other for one, other in zip(given, wanted, strict=True)] == [True] * len(wanted)
    pictures = [part for parts in wanted for part in parts if isinstance(part, list)]
    assert min(len({code for row in codes for code in row}) for codes in pictures) >= 32
    assert case not in ("chunked", "preempted", "late") or dropped > 0, "nothing came apart"


def test_aborted_requests_change_nothing_for_others(folder: Path, local: Any) -> None:
    """Half of all requests, with and without guidance, are aborted at some step; nothing of them remains, and the
    others end as when alone."""
    options, rng = asked(12, 60), random.Random(2)
    wanted = answers(local, options)
    with on_vllm(folder, max_num_batched_tokens=64, max_num_seqs=16) as engine:
        requests, running = [engine.build_request(**one) for one in options], engine.new_scheduler()
        leaving = {
            running.add_request(request): rng.randrange(1, 60) if i % 2 else 0 for i, request in enumerate(requests)
        }
        left, steps = set(), 0
        while running:
            running.step()
            steps += 1
            for number in [n for n, at in leaving.items() if at == steps and n in running]:
                running.abort(number)
                left.add(number)
        assert len(left) > len(requests) // 4 and not engine.llm.has_unfinished_requests()
        assert not scheduler(engine).groups and not engine._pending_outputs
        for number, request in enumerate(requests):
            if number not in left:
                said = [s for s in request.document.segments if s.role == "assistant"]
                assert [s.text if s.image is None else s.image.tolist() for s in said] == wanted[number]


def test_control_of_the_scheduler(folder: Path, local: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With vLLM's own scheduler, guidance branches get out of step: what one generates alone is not even a code."""
    options = [one for one in asked(12, 60) if one["output"] == "image" and one["guidance"] != 1]
    wanted = answers(local, options)
    from unigen.backends import vllm_engine

    take = vllm_engine.apply_output

    def take_anything(row: Any, *output: Any) -> None:
        take(row, *output)
        row.state.finite = True  # an id that is no code would end the row

    monkeypatch.setattr(vllm_engine, "apply_output", take_anything)
    monkeypatch.setattr(
        Vocabulary, "image_codes", lambda self, ids: (ids - self.image_start).clamp(0, self.image_size - 1)
    )
    monkeypatch.setitem(vllm_engine.ENGINE_ARGS, "scheduler_cls", None)
    with on_vllm(folder, **CASES["late"][2]) as engine:
        engine.llm = DelayedEngine(engine.llm)
        given = answers(engine, options)
    assert sum(one == other for one, other in zip(given, wanted, strict=True)) < len(wanted) / 2


def test_plain_vllm_reads_exported_folders(folder: Path, local: Any, tmp_path: Path) -> None:
    """Without our classes, it generates the same ids as transformers."""
    from transformers import AutoModelForCausalLM
    from vllm import LLM, SamplingParams

    from unigen.backends import vllm_engine

    vllm_engine.set_environment()
    convert(folder, tmp_path / "vllm", "vllm")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "vllm", dtype=torch.float32)
    prompt_1L = torch.tensor(
        [local.model.token_ids(local.model.template.prompt(Document.of("a red dog"), output="image"))]
    )
    wanted = lm.generate(prompt_1L, do_sample=False, max_new_tokens=32, min_new_tokens=32)[0, prompt_1L.shape[1] :]
    llm = LLM(str(tmp_path / "vllm"), dtype="float32", enforce_eager=True)
    greedy = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, min_tokens=32)
    (made,) = llm.generate([{"prompt_token_ids": prompt_1L[0].tolist()}], greedy, use_tqdm=False)
    assert list(made.outputs[0].token_ids) == wanted.tolist() and len(set(wanted.tolist())) > 4
    llm.llm_engine.engine_core.shutdown()


def test_segment_uses_the_prefix_cache(engine: Any) -> None:
    """For every segment but the first, all complete blocks of its prompt are in vLLM's prefix cache."""
    spans: list[tuple[str, int, int]] = []

    class Heard(DelayedEngine):
        def step(self) -> Any:
            outputs = self.llm.step()
            spans.extend((o.request_id, len(o.prompt_token_ids), o.num_cached_tokens) for o in outputs if o.finished)
            return outputs

        def add_request(self, *request: Any) -> None:
            self.llm.add_request(*request)

    llm, engine.llm = engine.llm, Heard(engine.llm)
    try:
        list(engine.stream("a story about two horse on a blue background", seed=7, max_images=2, max_tokens=120))
    finally:
        engine.llm = llm
    main = [(asked, cached) for name, asked, cached in spans if name.endswith("-0")]
    assert len(main) >= 3
    for (before, _), (asked, cached) in itertools.pairwise(main):
        assert cached >= before // engine.block_size * engine.block_size and asked > before
    assert main[-1][1] > 2 * engine.block_size


def test_vllm_engine_has_the_engine_api(engine: Any, local: Any) -> None:
    """The methods of `Engine`, and their results."""
    picture = local.generate("a red dog", seed=5)
    assert engine.generate("a red dog", seed=5).tobytes() == picture.tobytes()
    assert [p.tobytes() for p in engine.generate("a dog", n=2)] == [p.tobytes() for p in local.generate("a dog", n=2)]
    assert engine.describe(picture, max_tokens=20) == local.describe(picture, max_tokens=20, candidates=1)
    assert engine.edit(picture, "a blue dog").tobytes() == local.edit(picture, "a blue dog").tobytes()
    told: dict[str, Any] = {"max_tokens": 30, "seed": 2}
    pieces, wanted = list(engine.stream("a story", **told)), list(local.stream("a story", **told))
    assert [p for p in pieces if isinstance(p, str)] == [p for p in wanted if isinstance(p, str)]
    info = engine.info()
    assert info["generators"] == ["next-token"] and "joint" not in info["outputs"]
    assert info["backbone"] == local.info()["backbone"]


@pytest.mark.parametrize(
    "options",
    [
        {"output": "image", "guidance": 3.0, "temperature": 0.9, "top_k": 40},
        {"output": "image", "guidance": 1.0, "temperature": 0.0},
        {"output": "text", "temperature": 1.2, "top_p": 0.9, "max_tokens": 12},
        {"output": "interleaved", "temperature": 1.0, "max_tokens": 8, "max_images": 1},
    ],
)
def test_log_probabilities_are_those_of_the_local_engine(engine: Any, local: Any, options: dict[str, Any]) -> None:
    """Of the distribution from which ids are sampled: guided, warped. The negative control hands back no logits."""
    from unigen.backends import vllm_guidance

    found, expected = (
        e.generate_results(["two apples"], [3], record=Record(logprobs=True), **options)[0] for e in (engine, local)
    )
    assert found.logprobs is not None and expected.logprobs is not None and len(expected.logprobs) > 1
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-4, rtol=0)
    force_id = vllm_guidance.force_id
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_guidance, "force_id", lambda logits, rows, id, logit=0.0: force_id(logits, rows, id))
        control = engine.generate_results(["two apples"], [3], record=Record(logprobs=True), **options)[0]
    assert bool((control.logprobs == 0).all()) and (expected.logprobs - control.logprobs).abs().max() > 0.1
    assert engine.generate_results(["two apples"], [3], **options)[0].logprobs is None


def test_closed_stream_leaves_nothing_behind(engine: Any) -> None:
    stream = engine.stream("a story", max_tokens=200, seed=1)
    next(stream)
    assert engine.llm.has_unfinished_requests()
    stream.close()
    assert not engine.llm.has_unfinished_requests() and not scheduler(engine).groups and not engine._pending_outputs


def test_concurrent_streams(engine: Any, local: Any) -> None:
    told: dict[str, Any] = {"max_tokens": 20, "max_images": 1}
    alone = [list(local.stream("a story", seed=seed, **told)) for seed in (1, 2)]
    streams = [engine.stream("a story", seed=seed, **told) for seed in (1, 2)]
    together: list[list[Any]] = [[], []]
    for parts in itertools.zip_longest(*streams):
        for got, part in zip(together, parts, strict=True):
            got += [] if part is None else [part]
    for got, wanted in zip(together, alone, strict=True):
        assert "".join(p for p in got if isinstance(p, str)) == "".join(p for p in wanted if isinstance(p, str))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"output": "image", "prompt": "a dog " * 200}, "positions, the model has 512: shorten it"),
        ({"output": "image", "accelerate": "sjd"}, "leave accelerate out"),
        ({"output": "image", "guidance": -1}, "guidance must be"),
        ({"output": "text", "max_tokens": 0}, "max_tokens must be"),
    ],
)
def test_unsupported_options_are_rejected(options: dict[str, Any], line: str, engine: Any) -> None:
    given = {"prompt": "a dog", **options}
    with pytest.raises(ValueError, match=line):
        list(engine.run_requests([engine.build_request("a dog", "image"), engine.build_request(**given)]))
    assert not engine.llm.has_unfinished_requests()


def test_unsupported_features_of_vllm_are_rejected(engine: Any) -> None:
    """A model with next-token only keeps no local copy for other generators."""
    paper = Image.new("RGB", (64, 64))
    for call in (
        lambda: engine.generate("a dog", accelerate="sjd"),
        lambda: engine.describe(paper, candidates=2),
        lambda: engine.generate("a dog", candidates=2),
        lambda: engine.hidden_states("a dog"),
    ):
        with pytest.raises(ValueError, match="use --engine local"):
            call()
    assert not any(weight.numel() for weight in engine.model.backbone.parameters())


def test_too_long_requests_are_rejected_early(folder: Path, local: Any) -> None:
    picture = {"prompt": "a dog", "output": "image", "guidance": 2.0, "temperature": 0.0}
    with on_vllm(folder, num_gpu_blocks_override=7, max_model_len=160) as engine:  # 192 positions for requests
        assert answers(engine, [picture]) == answers(local, [picture])
        with pytest.raises(ValueError, match="give it more"):
            engine.generate("a blue horse " * 5, guidance=2.0)
        with pytest.raises(ValueError, match="the model has 160"):
            engine.generate("a blue horse " * 12, guidance=1.0)
        with pytest.raises(ValueError, match="give it more"):
            engine.generate("a story", "interleaved", guidance=2.0)
        long = {"prompt": "a blue horse " * 6, "output": "text", "max_tokens": 256, "temperature": 1.0}
        (said,), (whole,) = answers(engine, [long]), answers(local, [long])
        assert whole[0].startswith(said[0]) and len(whole[0]) > len(said[0])  # up to its end of the context
        assert not engine.llm.has_unfinished_requests()
    with pytest.raises(ValueError, match="vLLM cannot serve"), on_vllm(folder, max_model_len=100_000):
        pass


def test_random_draws_are_reproducible(engine: Any) -> None:
    """A draw that is discarded is repeated; the negative control is a generator that goes on."""
    from unigen.backends.vllm_guidance import Branch, serialize_segment
    from unigen.samplers.logits import sample

    row = engine.new_scheduler().new_sequence(engine.build_request("a dog", "image", temperature=1.0, guidance=2.0))
    ids: list[int] = []
    branch = Branch(serialize_segment(row.state.spec, engine.model.vocabulary, [], "span", 0), ids)
    scores = torch.zeros(1, engine.model.vocabulary.image_size)

    def drawn(count: int) -> int:
        ids[:] = [0] * count
        return int(sample(scores, branch.spec.sampling, [branch.state().spec.rng]))

    first = [drawn(count) for count in range(5)]
    assert len(set(first)) > 1
    assert [drawn(count) for count in (4, 4, 0, 2, 3)] == [first[count] for count in (4, 4, 0, 2, 3)]
    assert int(sample(scores, branch.spec.sampling, [branch.spec.rng])) != first[3]


@pytest.mark.parametrize(
    "harm", [{"branch": 2}, {"scales": []}, {"seed": None}, {"sampling": {"temperature": -1}}, {"grid": [1]}]
)
def test_request_without_segment_is_rejected(engine: Any, harm: dict[str, Any]) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    from unigen.backends.vllm_guidance import EXTRA_ARGS_KEY, serialize_segment

    row = engine.new_scheduler().new_sequence(engine.build_request("a dog", "image", guidance=2.0))
    said = serialize_segment(row.state.spec, engine.model.vocabulary, [], "span", 0)
    with pytest.raises(VLLMValidationError, match="no segment"):
        engine.llm.add_request(
            "x", {"prompt_token_ids": [1, 2]}, SamplingParams(temperature=0, extra_args={EXTRA_ARGS_KEY: said | harm})
        )
    with pytest.raises(VLLMValidationError, match="sampled by its own options"):
        engine.llm.add_request(
            "x", {"prompt_token_ids": [1, 2]}, SamplingParams(temperature=1, extra_args={EXTRA_ARGS_KEY: said})
        )
    assert not engine.llm.has_unfinished_requests()


def test_commands(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["--model", str(folder), "--device", "cpu"]
    vllm = ["--engine", "vllm", "--vllm", "enforce_eager=true"]
    assert cli.main(["generate", "a red dog", "--seed", "3", "-o", "local.png", *line]) == 0
    assert cli.main(["generate", "a red dog", "--seed", "3", "-o", "vllm.png", *line, *vllm]) == 0
    assert Image.open("vllm.png").tobytes() == Image.open("local.png").tobytes()
    assert cli.main(["describe", "vllm.png", "-q", "how many", *line]) == 0
    local = capsys.readouterr().out.splitlines()[-1:]
    assert cli.main(["describe", "vllm.png", "-q", "how many", *line, *vllm]) == 0
    assert capsys.readouterr().out.splitlines()[-1:] == local
    for given, told in {
        "enforce_eagre=true": "vLLM's engine has no argument enforce_eagre",
        "dtype=bfloat16": "dtype of vLLM's engine is given by us",
        "max_model_len=100000": "User-specified max_model_len (100000) is greater",
    }.items():
        assert cli.main(["generate", "x", *line, *vllm, "--vllm", given]) == 2
        assert told in capsys.readouterr().err


def test_server(folder: Path, local: Any, start_server: Any) -> None:
    """The server on vLLM: the same image alone and with other requests."""
    served = start_server("--model", str(folder), "--device", "cpu", "--engine", "vllm", "--vllm", "enforce_eager=true")
    served.wait()
    asked = {"prompt": "a red dog", "seed": 5}
    chat = {"model": str(folder), "messages": [{"role": "user", "content": "how many"}], "max_tokens": 20}
    with ThreadPoolExecutor(8) as pool:
        pictures = [pool.submit(served.get, "/v1/images/generations", asked) for _ in range(4)]
        texts = [pool.submit(served.get, "/v1/chat/completions", chat | {"seed": n}) for n in range(4)]
        alone = served.get("/v1/images/generations", asked)
        drawn = [alone, *(job.result() for job in pictures)]
        assert [status for status, _ in [*drawn, *(job.result() for job in texts)]] == [200] * 9
    picture = local.generate("a red dog", seed=5).tobytes()
    for _, answer in drawn:
        assert Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))).tobytes() == picture
    status, refused = served.get("/v1/images/generations", asked | {"generator": "masked"})
    assert status == 400 and "no generator" in refused["error"]["message"]
    assert served.get("/v1/models")[1]["data"][0]["unigen"]["generators"] == ["next-token"]
    assert served.stop() in (0, -signal.SIGTERM)  # it ends by the signal when it is done
