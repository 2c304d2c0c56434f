"""Folders as others write them are loaded, and what does not fit is named in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import unigen
from tests.tiny_pipelines import make_pipeline
from unigen.hub.resolve import CONFIG, read_json
from unigen.hub.weights import load_pretrained


def test_a_pipeline_without_a_part_that_its_class_wants(tmp_path: Path) -> None:
    """As people write Stable Diffusion 3 without its T5."""
    pipe = make_pipeline("StableDiffusion3Pipeline")
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["text_encoder_3"] == index["tokenizer_3"] == [None, None]
    engine = unigen.load(str(tmp_path), "cpu")
    assert engine.pipe.text_encoder_3 is None and engine.info()["pipeline"] == "StableDiffusion3Pipeline"


def test_json_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    for mark in (b"\xef\xbb\xbf", b""):
        (tmp_path / CONFIG).write_bytes(mark + '{"name": "é"}'.encode())
        assert read_json(tmp_path / CONFIG) == {"name": "é"}


def test_a_config_of_other_sizes_names_the_tensors(causal_lm_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "model"
    shutil.copytree(causal_lm_folder, folder)
    assert load_pretrained(AutoModelForCausalLM, folder, None)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 7}))
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight") as error:
        load_pretrained(AutoModelForCausalLM, folder, None)
    assert "\n" not in str(error.value) and "above" not in str(error.value)
