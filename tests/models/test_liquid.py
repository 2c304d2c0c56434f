"""What is Liquid's own: its template, and what it refuses. How its folder behaves is in test_public."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

import unigen
from tests.parity import liquid as case
from unigen.commands import main as cli
from unigen.document import Document, Segment
from unigen.models import liquid
from unigen.tokenizers import text
from unigen.utils.files import save_json


@pytest.fixture(scope="session")
def liquid_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("liquid")
    case.checkpoint(folder)
    return folder


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["edit", "{picture}", "make it blue", "-o", "{out}"], "generates images from text alone"),
        (["story", "a witch", "-o", "{folder}"], "cannot answer with interleaved"),
        (["generate", "--class", "7", "-o", "{out}"], "from text, not by class"),
        (["generate", "a dog", "--generator", "masked", "-o", "{out}"], "no generator 'masked'"),
    ],
)
def test_what_it_cannot_do_is_said(
    arguments: list[str], reason: str, liquid_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (40, 20)).save(tmp_path / "in.png")
    places = {"picture": tmp_path / "in.png", "out": tmp_path / "out.png", "folder": tmp_path / "story.md"}
    filled = [argument.format(**places) for argument in arguments]
    assert cli.main([*filled, "--model", str(liquid_folder), "--device", "cpu"]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


def test_names_of_special_tokens_are_text_to_a_user(liquid_folder: Path) -> None:
    template = unigen.load(str(liquid_folder), "cpu").model.template
    for output in ("image", "text"):
        ids = template.prompt(Document.of("a red <boi> apple"), output=output).ids  # type: ignore[arg-type]
        assert template.begin_ids["next-token"] not in ids


def test_what_is_learnt(liquid_folder: Path) -> None:
    model = unigen.load(str(liquid_folder), "cpu").model
    picture = Segment(image=Image.new("RGB", (32, 32)), role="assistant")
    drawn = model.template.encode(Document([Segment(text="a red apple"), picture]))
    names = model.text_tokenizer.convert_ids_to_tokens
    assert sum(drawn.loss) == 64 + 2 and names(drawn.ids[-2:]) == [liquid.EOI, "<eos>"]
    said = model.template.encode(Document([Segment(text="What is it"), Segment(text="a red apple", role="assistant")]))
    learnt = [name for name, loss in zip(names(said.ids), said.loss, strict=True) if loss]
    assert "".join(learnt[:-1]).replace("▁", " ") == "a red apple" and learnt[-1] == "<end_of_turn>"


def test_names_that_the_tokenizer_does_not_flag_are_text_too(liquid_folder: Path) -> None:
    from tokenizers import AddedToken

    model = unigen.load(str(liquid_folder), "cpu").model
    model.text_tokenizer.add_tokens([AddedToken("<aside>", special=False)])
    id = model.text_tokenizer.convert_tokens_to_ids("<aside>")
    assert text.PromptBuilder(model.text_tokenizer).add_template_text("a<aside>b").build().ids.count(id) == 1
    assert id not in text.PromptBuilder(model.text_tokenizer).add_user_text("a<aside>b").build().ids


def test_liquid_on_a_model_without_a_first_token(tmp_path: Path) -> None:
    """Qwen's tokenizer has no bos, and its prompts none."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    specials = ["<|im_start|>", "<|im_end|>", liquid.BOI, liquid.EOI, liquid.UNCOND]
    lines = ["a red apple Generate an image based on this description. What is it"] * 4
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(lines, 300, new_special_tokens=specials)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer.bos_token_id is None
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "num_key_value_heads": 2}
    config = Qwen2Config(**small, **ids, vocab_size=len(tokenizer) + case.CODES)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    torch.save({"state_dict": case.image_tokenizer_tensors()}, tmp_path / "tokenizer" / "vqgan.ckpt")
    yaml = f"model:\n  params:\n    ddconfig:\n      resolution: {case.SIDE}\n"
    (tmp_path / "tokenizer" / "vqgan.yaml").write_text(yaml)
    engine = unigen.load(str(tmp_path), "cpu")
    said = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("a red apple" + liquid.INSTRUCTION).ids
    template = engine.model.template
    assert template.prompt(Document.of("a red apple"), output="image").ids == said
    blind = template.prompt(Document.of("a red apple"), output="image", branch=1).ids
    assert blind == [tokenizer.convert_tokens_to_ids(liquid.UNCOND)]
    assert engine.generate("a red apple").size == (case.SIDE, case.SIDE)


@pytest.mark.parametrize("kind", ["gemma2", "cohere2"])
def test_it_is_refused_before_its_weights_are_read(kind: str, liquid_folder: Path, tmp_path: Path) -> None:
    shutil.copy(liquid_folder / "tokenizer.json", tmp_path)
    names = {"gemma2": "Gemma2ForCausalLM", "cohere2": "Cohere2ForCausalLM"}
    save_json(tmp_path / "config.json", {"model_type": kind, "architectures": [names[kind]]})
    with pytest.raises(ValueError, match=f"Liquid on {kind}, which .* is not supported"):
        unigen.load(str(tmp_path), "cpu")


def test_layouts_whose_logits_are_changed_are_refused(liquid_folder: Path, tmp_path: Path) -> None:
    import json
    import shutil

    from transformers import Cohere2Config, Cohere2ForCausalLM

    folder = tmp_path / "cohere"
    shutil.copytree(liquid_folder, folder)
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    Cohere2ForCausalLM(Cohere2Config(**small, vocab_size=size, num_key_value_heads=2)).save_pretrained(folder)
    with pytest.raises(ValueError, match="Liquid on cohere2, which .* is not supported"):
        unigen.load(str(folder), "cpu")
