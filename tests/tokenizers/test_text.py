"""Text tokenizers of public folders are read as their tokenizer.json stands, whatever class is named beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
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
    settings = json.loads((folder / text.SETTINGS).read_text()) | {"tokenizer_class": named}
    (folder / text.SETTINGS).write_text(json.dumps(settings))
    true = Tokenizer.from_file(str(folder / text.FILE)).encode(WORDS).ids
    text.save(text.load(folder), tmp_path / "saved")
    shutil.copy(folder / "config.json", tmp_path / "saved")
    for place in (folder, tmp_path / "saved"):
        tokenizer = text.of_model(place)
        assert tokenizer(WORDS)["input_ids"] == true
        assert tokenizer.decode(true[1:], skip_special_tokens=False) == WORDS
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == SPECIALS[:3]


def test_what_is_saved_is_read_by_transformers_too(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    true = Tokenizer.from_file(str(folder / text.FILE)).encode(WORDS).ids
    assert AutoTokenizer.from_pretrained(folder)(WORDS)["input_ids"] != true  # the fault that is avoided
    text.save(text.load(folder), tmp_path / "saved")
    shutil.copy(folder / "config.json", tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")(WORDS)["input_ids"] == true
    assert json.loads((tmp_path / "saved" / text.SETTINGS).read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("part", ["pre_tokenizer", "decoder"])
def test_a_tokenizer_that_loses_spaces_is_refused(folder: Path, part: str) -> None:
    data = json.loads((folder / text.FILE).read_text())
    data[part] = {"pre_tokenizer": {"type": "Whitespace"}, "decoder": None}[part]
    (folder / text.FILE).write_text(json.dumps(data))
    with pytest.raises(ValueError, match="so prompts would be misread") as caught:
        text.of_model(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_file_is_one_line(folder: Path) -> None:
    (folder / text.FILE).write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        text.load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_letters_that_a_small_vocabulary_lacks_are_no_fault(tmp_path: Path) -> None:
    text.train(["a red dog\n\n"] * 8, tmp_path, 280, ("<user>",))
    assert text.load(tmp_path)("a red dog", add_special_tokens=False)["input_ids"]


def test_reading_without_transformers_is_the_same(tiny_folder: Path) -> None:
    ours, theirs = text.InferenceTokenizer(tiny_folder), text.of_model(tiny_folder)
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
