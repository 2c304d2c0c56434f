"""Text tokenizers of public folders are read as their tokenizer.json stands, whatever class is named beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from tokenizers import Tokenizer

from tests.parity.common import byte_level_tokenizer
from tests.parity.janus import SPECIALS
from unigen.tokenizers import text

WORDS = "<|User|>: 2 red apples\n\n  on 34 tables, two dogs\n\n<|Assistant|>:"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As in deepseek-ai's repositories: a byte-level BPE beside the name of a class that is not."""
    made = tmp_path / "public"
    made.mkdir()
    byte_level_tokenizer(made, ["two red apples on a blue table User: Assistant:\n\n"] * 4, SPECIALS)
    (made / "config.json").write_text('{"model_type": "multi_modality"}')
    return made


@pytest.mark.parametrize("named", ["LlamaTokenizerFast", "LlamaTokenizer", "T5TokenizerFast", "Nothing", None])
def test_the_file_decides_and_not_the_class_named(folder: Path, tmp_path: Path, named: str | None) -> None:
    settings = json.loads((folder / text.TOKENIZER_CONFIG).read_text()) | {"tokenizer_class": named}
    (folder / text.TOKENIZER_CONFIG).write_text(json.dumps(settings))
    true = Tokenizer.from_file(str(folder / text.TOKENIZER_FILE)).encode(WORDS).ids
    text.save(text.load(folder), tmp_path / "saved")
    shutil.copy(folder / "config.json", tmp_path / "saved")
    for place in (folder, tmp_path / "saved"):
        tokenizer = text.load_from_model(place)
        assert tokenizer(WORDS)["input_ids"] == true
        assert tokenizer.decode(true[1:], skip_special_tokens=False) == WORDS
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == SPECIALS[:3]


def test_what_is_saved_is_read_by_transformers_too(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    true = Tokenizer.from_file(str(folder / text.TOKENIZER_FILE)).encode(WORDS).ids
    assert AutoTokenizer.from_pretrained(folder)(WORDS)["input_ids"] != true  # the fault that is avoided
    text.save(text.load(folder), tmp_path / "saved")
    shutil.copy(folder / "config.json", tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")(WORDS)["input_ids"] == true
    assert (
        json.loads((tmp_path / "saved" / text.TOKENIZER_CONFIG).read_text())["tokenizer_class"]
        == "PreTrainedTokenizerFast"
    )


@pytest.mark.parametrize("part", ["pre_tokenizer", "decoder"])
def test_a_tokenizer_that_loses_spaces_is_refused(folder: Path, part: str) -> None:
    data = json.loads((folder / text.TOKENIZER_FILE).read_text())
    data[part] = {"pre_tokenizer": {"type": "Whitespace"}, "decoder": None}[part]
    (folder / text.TOKENIZER_FILE).write_text(json.dumps(data))
    with pytest.raises(ValueError, match="so prompts would be misread") as caught:
        text.load_from_model(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_file_is_one_line(folder: Path) -> None:
    (folder / text.TOKENIZER_FILE).write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        text.load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_letters_that_a_small_vocabulary_lacks_are_no_fault(tmp_path: Path) -> None:
    text.train_tokenizer(["a red dog\n\n"] * 8, tmp_path, 280, ("<user>",))
    assert text.load(tmp_path)("a red dog", add_special_tokens=False)["input_ids"]


def test_reading_without_transformers_is_the_same(tiny_folder: Path) -> None:
    ours, theirs = text.InferenceTokenizer(tiny_folder), text.load_from_model(tiny_folder)
    assert len(ours) == len(theirs) and ours.get_vocab() == theirs.get_vocab()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert set(ours.all_special_ids) == set(theirs.all_special_ids)
    for said in ("a red  dog", " two <user> apples</s>\n\n", "ünïcode 雪 🐈", "", "<boi><eoi>x"):
        for split in (True, False):
            options = {"add_special_tokens": False, "split_special_tokens": split}
            ids = theirs(said, **options)["input_ids"]
            assert ours(said, **options)["input_ids"] == ids
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    names = ["<user>", "no such", "<boi>"]
    assert ours.convert_tokens_to_ids(names) == theirs.convert_tokens_to_ids(names)
    assert ours.convert_ids_to_tokens(5) == theirs.convert_ids_to_tokens(5)


def turns(roles: str, refuses: str = "", drops: str = "") -> Any:
    """A chat template that knows these roles, with the system's by default, as real ones do."""

    def render(messages: list[dict[str, Any]]) -> str:
        if any(message["role"] == refuses for message in messages):
            raise TemplateError(f"no role {refuses}")
        said = [m for m in messages if m["role"] != drops]
        names = [m["role"] if m["role"] in roles.split() else "user" for m in said]
        if "alternating" in roles and any(a == b for a, b in zip(names, names[1:], strict=False)):
            raise TemplateError("roles must alternate")
        text_of = lambda content: content if isinstance(content, str) else "".join(p.get("text", "") for p in content)  # noqa: E731
        return "".join(f"<{name}>{text_of(m['content'])}" for name, m in zip(names, said, strict=True))

    return render


@pytest.mark.parametrize(
    ("render", "kept"),
    [
        (turns("system user assistant"), True),
        (turns("system user assistant alternating"), True),
        (turns("user assistant", refuses="system"), False),
        (turns("user assistant", drops="system"), False),
        (turns("user assistant"), False),
        (turns("user assistant alternating"), False),
    ],
)
def test_a_system_message_stands_in_its_place_or_before_the_first_words(render: Any, kept: bool) -> None:
    system, user = {"role": "system", "content": "be kind"}, {"role": "user", "content": "a dog"}
    answer = {"role": "assistant", "content": "two"}
    wanted = "<system>be kind<user>a dog<assistant>two" if kept else "<user>be kind\n\na dog<assistant>two"
    assert render(text.merge_system_message([system, user, answer], render)) == wanted
    assert text.merge_system_message([user, answer], render) == [user, answer]
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in (system, user)]
    found = text.merge_system_message(parts, render)
    assert [m["role"] for m in found] == (["system", "user"] if kept else ["user"]) and "a dog" in str(found[-1])
    first = text.merge_system_message([system, answer], render)
    assert [m["role"] for m in first] == ["system" if kept else "user", "assistant"]
