"""The family's template, folder and grown vocabularies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from unigen.document import Document, Segment
from unigen.inference.engine import Engine
from unigen.model import assembly
from unigen.models import load
from unigen.samplers.logits import SamplingOptions
from unigen.tokenizers import load_image_tokenizer, text


def chat() -> Document:
    return Document(
        [
            Segment(image=Image.new("RGB", (16, 16))),
            Segment(text="How many  apples"),
            Segment(text="two", role="assistant"),
            Segment(text="a red dog"),
            Segment(image=Image.new("RGB", (16, 16), "red"), role="assistant"),
        ]
    )


def test_the_layout_of_a_chat(tiny_folder: Path) -> None:
    model = load(tiny_folder)
    tokens = model.template.encode(chat())
    names = model.text_tokenizer.convert_ids_to_tokens
    image = ["<boi>", *["."] * 4, "<eoi>"]
    spelt = ["." if any(a <= i < b for a, b in tokens.spans) else names(t) for i, t in enumerate(tokens.ids)]
    text_of = lambda s: names(model.template.text_ids(s))  # noqa: E731
    wanted = ["<s>", "<user>", *image, *text_of("how many apples"), "<assistant>", *text_of("two"), "</s>"]
    wanted += ["<user>", *text_of("a red dog"), "<assistant>", *image, "</s>"]
    assert spelt == wanted
    learnt = [s for s, loss in zip(spelt, tokens.loss, strict=True) if loss]
    assert learnt == [*text_of("two"), "</s>", "<boi>", ".", ".", ".", ".", "</s>"]


def test_the_blind_rendering_keeps_only_pictures(tiny_folder: Path) -> None:
    model = load(tiny_folder)
    tokens = model.template.encode(chat(), uncond=True)
    kept = [t for i, t in enumerate(tokens.ids) if not any(a <= i < b for a, b in tokens.spans)]
    assert set(kept) <= {*model.template.special_ids.values(), model.template.bos_id, model.template.eos_id}
    assert len(tokens.spans) == 2 and sum(tokens.loss) == 4


def test_the_chat_template_says_the_same(tiny_folder: Path) -> None:
    """Plain transformers renders a text chat to our ids, and marks where pictures go."""
    model = load(tiny_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    messages = [{"role": "user", "content": "how many apples"}, {"role": "assistant", "content": "two"}]
    document = Document([Segment(text="how many apples"), Segment(text="two", role="assistant")])
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer(rendered, add_special_tokens=False)["input_ids"] == model.template.encode(document).ids
    parts = [{"type": "image"}, {"type": "text", "text": "how many"}]
    for given in (parts, parts[::-1]):
        marked = tokenizer.apply_chat_template(
            [{"role": "user", "content": given}], tokenize=False, add_generation_prompt=True
        )
        assert marked == "<s><user><boi><image><eoi> how many<assistant>"


def test_pictures_stand_before_the_words_of_their_message(tiny_folder: Path) -> None:
    """So the model has learnt questions, however they are given; what the assistant says stays in its order."""
    template = load(tiny_folder).template
    codes = torch.zeros(2, 2, dtype=torch.int64)
    picture, other = Segment(image=codes), Segment(image=codes + 1)
    first, second = Segment(text="how many"), Segment(text="and where")
    told = [Segment(text="two", role="assistant"), Segment(image=codes, role="assistant")]
    wanted = [picture, other, first, second]
    for given in ([first, picture, other, second], [picture, first, second, other], [first, second, picture, other]):
        for blind in (0, 1):
            ids = template.prompt(Document([*given, *told, *given]), branch=blind).ids
            assert ids == template.prompt(Document([*wanted, *told, *wanted]), branch=blind).ids
    assert template.prompt(Document([first, *told])).ids != template.prompt(Document([first, *told[::-1]])).ids
    blind = template.prompt(Document(wanted), branch=1).ids
    assert blind.count(template.special_ids["<uncond>"]) == 1  # as one text has it


def test_special_tokens_typed_by_users_are_text(tiny_folder: Path) -> None:
    template = load(tiny_folder).template
    ids = template.text_ids("two <boi> </s> apples")
    assert not set(ids) & {*template.special_ids.values(), template.eos_id}
    assert template.decode(ids) == "two <boi> </s> apples"


def test_text_survives_the_tokenizer(tiny_folder: Path) -> None:
    template = load(tiny_folder).template
    for sentence in ("two apples", "a dog, a cat; a zebra!", "ein blaues pferd äöü 🐎 中"):
        assert template.decode(template.text_ids(sentence)) == sentence


def test_the_folder_is_a_plain_causal_language_model(tiny_folder: Path) -> None:
    model = load(tiny_folder)
    lm = AutoModelForCausalLM.from_pretrained(tiny_folder)
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        ours = model.logits(
            model.backbone.forward_packed(model.backbone.embed(ids), torch.arange(19)[None], torch.ones_like(ids))
        )
        torch.testing.assert_close(lm(ids).logits, ours, atol=1e-5, rtol=1e-4)


def test_save_and_load_are_exact(tiny_folder: Path, tmp_path: Path) -> None:
    model = load(tiny_folder)
    model.save(tmp_path / "copy")
    again = load(tmp_path / "copy")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    model.save(tmp_path / "copy", dtype=torch.bfloat16)
    assert load(tmp_path / "copy").backbone.lm.dtype == torch.float32
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_model_says_how_it_is_drawn_from(tiny_folder: Path, tmp_path: Path) -> None:
    model = load(tiny_folder)
    model.set_default_sampling("next-token", guidance=2.5, top_p=0.6)
    model.save(tmp_path / "model")
    again = load(tmp_path / "model")
    assert (
        again.default_sampling
        == assembly.add_generators(again, ("next-token",)).default_sampling
        == {"next-token": {"guidance": 2.5, "top_p": 0.6}}
    )
    engine = Engine(again)
    asked, told = (
        engine.build_request("a", "image"),
        engine.build_request("a", "image", guidance=4.0, top_p=1.0, temperature=0.5),
    )
    assert (asked.guidance.scales, asked.image_sampling, asked.text_sampling.top_p) == (
        (2.5,),
        SamplingOptions(0.8, 0, 0.6),
        1.0,
    )
    assert (told.guidance.scales, told.image_sampling) == ((4.0,), SamplingOptions(0.5, 0, 1.0))
    assert engine.build_request("a", "image", generator="masked").image_sampling == SamplingOptions(0.8, 0, 1.0)
    assert engine.info()["sampling"]["next-token"] == {"guidance": 2.5, "temperature": 0.8, "top_k": 0, "top_p": 0.6}
    assert engine.info()["sampling"]["flow"] == {"guidance": 3.0, "steps": 20, "solver": "euler", "guider": "cfg"}


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"brush": {}}, "no generator 'brush'"),
        ({"flow": {"top_p": 0.5}}, "flow does not take top_p: it takes guidance, steps, solver, guider$"),
        ({"next-token": {"steps": 4}}, "next-token does not take steps"),
        ({"next-token": {"top_p": 0}}, "top_p must be a number above 0 and at most 1"),
        ({"next-token": {"guidance": -1}}, "guidance must be"),
        ({"next-token": {"temperature": "warm"}}, "sampling in "),
        ({"next-token": 3}, "sampling in "),
        ([], "sampling in "),
    ],
)
def test_sampling_that_cannot_be_is_refused(tiny_folder: Path, tmp_path: Path, sampling: Any, message: str) -> None:
    shutil.copytree(tiny_folder, tmp_path / "model")
    manifest = json.loads((tmp_path / "model" / "unigen.json").read_text())
    (tmp_path / "model" / "unigen.json").write_text(json.dumps(manifest | {"sampling": sampling}))
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path / "model")
    assert "unigen.json" in str(caught.value) and "\n" not in str(caught.value)


def test_a_failed_save_leaves_the_old_folder(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_folder)
    model.save(tmp_path / "model")
    before = sorted(p.name for p in (tmp_path / "model").iterdir())
    monkeypatch.setattr(model.text_tokenizer, "save_pretrained", lambda folder: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        model.save(tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "unigen.json"])
def test_a_damaged_folder_is_named(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(tiny_folder, tmp_path / "model")
    data = (tmp_path / "model" / name).read_bytes()
    (tmp_path / "model" / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError) as caught:
        load(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_does_not_fit_says_how(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["intermediate_size"] *= 2
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"of another shape: .*mlp"):
        load(tmp_path / "model")


def test_a_pretrained_language_model_grows_by_image_codes(tiny_folder: Path) -> None:
    tokenizer = text.load(tiny_folder)
    torch.manual_seed(0)
    shape = Qwen3Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=len(tokenizer),
        tie_word_embeddings=False,
    )
    lm = AutoModelForCausalLM.from_config(shape)
    before = lm.get_input_embeddings().weight[: len(tokenizer)].clone()
    model = assembly.extend_vocabulary(lm, tokenizer, load_image_tokenizer(tiny_folder / "image_tokenizer"))
    assert model.vocabulary.size == len(tokenizer) + 32 == lm.get_output_embeddings().weight.shape[0]
    assert torch.equal(lm.get_input_embeddings().weight[: len(before)], before)
