"""What is LlamaGen's own: classes, words, several models in one place. How its folders behave is in test_public."""

from __future__ import annotations

import shutil
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import unigen
from tests.parity import common
from tests.parity import llamagen as case
from tests.parity import llamagen_t2i as words_case
from unigen.batch import pack
from unigen.commands import main as cli
from unigen.document import Document, Segment
from unigen.generators import next_token
from unigen.models import convert, llamagen
from unigen.utils.captions import clean_caption


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llamagen")
    case.checkpoint(made)
    return made


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llamagen_t2i")
    words_case.checkpoint(made)
    return made


@pytest.mark.parametrize("asked", [["a dog"], ["--class", "10"], ["--class", "dog"]])
def test_what_is_no_class(asked: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.png"
    assert cli.main(["generate", *asked, "-o", str(out), "--model", str(folder), "--device", "cpu"]) == 2
    assert "from 0 to 9" in capsys.readouterr().err and not out.exists()


def test_one_of_several(folder: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    shutil.copytree(folder, both)
    shutil.copy(both / "c2i_T_32.pt", both / "c2i_U_32.pt")
    with pytest.raises(ValueError, match=r"c2i_T_32, c2i_U_32: name one after a colon"):
        unigen.load(str(both), "cpu")
    assert unigen.load(f"{both}:c2i_U_32", "cpu").info()["family"] == "llamagen"
    with pytest.raises(ValueError, match="holds several models: name one"):
        unigen.load("FoundationVision/LlamaGen", "cpu")


def test_pictures_alone_and_in_a_batch(folder: Path) -> None:
    engine = unigen.load(str(folder), "cpu")
    together = engine.generate_batch([1, 2, 1], [5, 6, 7], temperature=1.0)
    for label, seed, picture in zip([1, 2, 1], [5, 6, 7], together, strict=True):
        alone = np.asarray(engine.generate(label, seed=seed, temperature=1.0), dtype=int)
        assert np.abs(alone - np.asarray(picture)).max() <= 1  # convolutions round otherwise in a batch


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (["generate", "--class", "7"], "from text, not by class"),
        (["edit", "{picture}", "make it red"], "generates images from text alone"),
        (["generate", "a red dog " * 40], "pieces, the model reads 120: shorten it"),
    ],
)
def test_what_are_no_words(
    asked: list[str], reason: str, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "in.png")
    asked = [part.format(picture=tmp_path / "in.png") for part in asked]
    out = tmp_path / "out.png"
    assert cli.main([*asked, "-o", str(out), "--model", str(words), "--device", "cpu"]) == 2
    assert reason in capsys.readouterr().err and not out.exists()


def test_words_are_made_plain() -> None:
    for said, read in {
        "  A Dog,a cat ": "a dog, a cat",
        "“An owl” – it’s 3.5 m (tall)": '"an owl" - it\'s 3.5 m tall',
        "'a shop with bread & milk'": "a shop with bread milk",
        "a dog,": "a dog",
        "a dog . a cat": "a dog a cat",
        "see www.x.com,a.png is.code": "see www.x.com, a.png is. code",
        "what...a man : a plan": "what a man: a plan",
        "a state-of-the-art well-made boat": "a state of the art well made boat",
    }.items():
        assert clean_caption(said) == read


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("a red+blue c++ flag", "a red blue c flag"),
        ("a cat :3", "a cat :3"),
        ("a cat : a dog", "a cat: a dog"),
        ("a ratio of 3:4 at 5 :6", "a ratio of 3:4 at 5 :6"),
        ("100%20sure", "100 sure"),
        (", 'quoted'", "quoted"),
        ("a clock: -- +", "a clock"),
    ],
)
def test_plus_signs_and_colons_as_the_official_code_has_them(said: str, read: str) -> None:
    assert clean_caption(said) == read


def wrapped(folder: Path, to: Path, wrap: Callable[[dict[str, Tensor]], Any]) -> Path:
    shutil.copytree(folder, to)
    state = torch.load(folder / "c2i_T_32.pt")["model"]
    torch.save(wrap(state), to / "c2i_T_32.pt")
    return to


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"module": state},
        lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {"model": {f"_orig_mod.{name}": tensor for name, tensor in state.items()}},
        lambda state: {"model": {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}},
        lambda state: {
            "model": state, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]}, "steps": 3,
            "args": Namespace(gpt_model="GPT-B", image_size=256, betas=(0.9, 0.95)), "ema": {},
        },
        lambda state: state,
        lambda state: {"ema": state, "steps": 3},
        lambda state: {"model": state, "loss": np.float64(0.5), "best": np.float32(0.25), "seen": np.int64(7)},
    ],
    ids=["deepspeed", "ddp", "compiled", "both", "trainer", "bare", "mean", "numbers of numpy"],
)  # fmt: skip
def test_files_as_trainers_write_them(wrap: Any, folder: Path, tmp_path: Path) -> None:
    other = wrapped(folder, tmp_path / "other", wrap)
    first, second = (unigen.load(str(place), "cpu") for place in (folder, other))
    assert second.generate(3).tobytes() == first.generate(3).tobytes()


@pytest.mark.parametrize(
    ("width", "more", "config", "head"),
    [
        (4096, {}, {}, 128),
        (3200, {}, {}, 100),
        (2048, {}, {}, 64),
        (768, {}, {"n_head": 6}, 128),
        (768, {"freqs_cis": torch.zeros(257, 16, 2)}, {}, 32),
    ],
)
def test_how_wide_heads_are(width: int, more: dict[str, Tensor], config: dict[str, Any], head: int) -> None:
    state = {"tok_embeddings.weight": torch.empty(4, width)} | more
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert llamagen.infer_head_dim(state, config, Path("c2i.pt")) == head


def test_heads_of_an_unpublished_width_are_a_guess_that_is_said() -> None:
    state = {"tok_embeddings.weight": torch.empty(4, 320)}
    with pytest.warns(UserWarning, match="no published LlamaGen is 320 wide"):
        assert llamagen.infer_head_dim(state, {}, Path("c2i.pt")) == 64
    with pytest.raises(ValueError, match="n_head 7 does not divide a width of 320"):
        llamagen.infer_head_dim(state, {"n_head": 7}, Path("c2i.pt"))


def test_keys_and_values_of_fewer_heads(folder: Path, tmp_path: Path) -> None:
    """n_kv_head: a model whose heads share keys and values is that one in which each has a copy of them."""
    width, kv = case.WIDTH, 64  # of two heads one

    def fewer(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v[: width + 2 * kv] if ".wqkv." in k else v for k, v in state.items()}

    def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
        made = {}
        for name, tensor in fewer(state).items():
            if ".wqkv." in name:
                query, key, value = tensor.split([width, kv, kv])
                tensor = torch.cat((query, key, key, value, value))
            made[name] = tensor
        return made

    shared, alike = (
        wrapped(folder, tmp_path / make.__name__, lambda s, m=make: {"model": m(s)}) for make in (fewer, copied)
    )  # type: ignore[misc]  # noqa: E501
    convert(shared, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "public", "public")
    drawn = [unigen.load(str(place), "cpu") for place in (shared, alike, tmp_path / "ours", tmp_path / "public")]
    assert drawn[0].model.backbone.lm.config.num_key_value_heads == 1
    pictures = [engine.generate(3, temperature=0.0).tobytes() for engine in drawn]
    assert pictures[0] == pictures[1] == pictures[2] == pictures[3]


def test_both_kinds_in_one_folder(folder: Path, words: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "both")
    shutil.copytree(words, tmp_path / "both", dirs_exist_ok=True)
    classes, text = (unigen.load(f"{tmp_path / 'both'}:{name}", "cpu") for name in ("c2i_T_32", "t2i_T_stage1_32"))
    assert classes.info()["sampling"]["next-token"]["guidance"] == 4.0 and len(classes.info()["classes"]) == 10
    assert (
        text.info()["sampling"]["next-token"] | {"top_k": 1000, "guidance": 7.5}
        == text.info()["sampling"]["next-token"]
    )


def test_words_need_their_reader(words: Path, tmp_path: Path) -> None:
    shutil.copytree(words, tmp_path / "alone", ignore=shutil.ignore_patterns(llamagen.TEXT_FOLDER))
    with pytest.raises(ValueError, match=r"has no flan-t5-xl/ \(the text encoder\), and google/flan-t5-xl"):
        unigen.load(str(tmp_path / "alone"), "cpu")


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("config.json", "{}", "has no d_model"),
        ("config.json", "{", "cannot be read"),
        ("tokenizer.json", "{}", "damaged"),
        ("tokenizer.json", None, "damaged|tokenizer"),
        ("model.safetensors", None, "has no weights"),
    ],
)
def test_a_damaged_reader_of_words(
    file: str, content: str | None, reason: str, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(words, tmp_path / "damaged")
    path = tmp_path / "damaged" / llamagen.TEXT_FOLDER / file
    path.unlink() if content is None else path.write_text(content)
    assert cli.main(["info", "--model", str(tmp_path / "damaged"), "--device", "cpu"]) == 2
    told = capsys.readouterr().err
    assert any(words in told for words in reason.split("|")) and len(told.strip().splitlines()) == 1


def test_a_prompt_is_read_alike_step_by_step_and_packed(words: Path) -> None:
    """Codes are counted from the end of their prompt, however long it is and whatever stands beside it."""
    engine = unigen.load(str(words), "cpu")
    model, prompts = engine.model, [Document.of(prompt) for prompt in words_case.PROMPTS]
    with common.record_logits(next_token) as steps:
        requests = [engine.build_request(p, "image", temperature=0.0, guidance=1.0) for p in prompts]
        list(engine.run_requests(requests))
    drawn = [request.document.segments[-1].image for request in requests]
    documents = [
        model.template.encode(Document([*prompt.segments, Segment(image=codes, role="assistant")]))
        for prompt, codes in zip(prompts, drawn, strict=True)
    ]
    batch = model.insert_image_ids(pack([documents], sum(map(len, documents)) + 3, 32))
    with torch.no_grad():
        hidden_BLD = model.hidden_states(batch)
        rows, at = batch.loss_BL.nonzero(as_tuple=True)
        logits_TV = model.logits(hidden_BLD[rows, at - 1], model.vocabulary.image_start, model.vocabulary.image_stop)
    assert torch.allclose(logits_TV.unflatten(0, (3, -1)).transpose(0, 1), torch.stack(steps), atol=1e-3)


def test_words_drawn_several_codes_a_step(words: Path) -> None:
    engine = unigen.load(str(words), "cpu")
    plain = engine.generate("a red apple", seed=3)
    assert engine.generate("a red apple", seed=3, accelerate="jacobi").tobytes() == plain.tobytes()


def test_the_reader_of_words_stays_in_float32_where_float16_is_too_narrow(words: Path) -> None:
    for dtype, kept in (("float16", torch.float32), ("bfloat16", torch.bfloat16)):
        backbone = unigen.load(str(words), "cpu", dtype).model.backbone
        assert isinstance(backbone, llamagen.TextBackbone)
        assert {p.dtype for p in backbone.encoder.parameters()} == {kept}


def test_pairs_half_a_head_apart_and_back() -> None:
    weight = torch.arange(16.0)[:, None]
    apart = llamagen.permute_rotary(weight, 8)
    assert apart[:8, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert torch.equal(llamagen.permute_rotary(apart, 8, back=True), weight)
