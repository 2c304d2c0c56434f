"""Models of transformers that read in a pair: the documented examples, on small checkpoints made here in the layout of
the public ones. Nothing here needs torchvision."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

import unigen
from tests.parity.common import byte_level_tokenizer
from unigen.backends.transformers_engine import load_transformers
from unigen.document import Document, Segment
from unigen.tokenizers import text

RED, BLUE = (Image.new("RGB", (64, 48), color) for color in ("red", "blue"))
LINES = ["a red dog on a blue hill, user assistant what is it\n"] * 4
SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    f"{{% for part in m['content'] %}}{{% if part['type'] == 'image' %}}{IMAGE}{{% else %}}{{{{ part['text'] }}}}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_vl(folder: Path, newest: bool) -> None:
    """Qwen3-VL or Qwen2.5-VL of random weights; its files name a video processor, which needs torchvision."""
    import transformers
    from transformers import Qwen2Tokenizer

    marks = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(LINES, 300, new_special_tokens=marks)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    known = tokenizer.get_vocab()
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    voice = SMALL | {"num_key_value_heads": 1, "head_dim": 16, "rope_parameters": rope, "vocab_size": len(tokenizer)}
    voice |= {"bos_token_id": None, "eos_token_id": known["<|im_end|>"], "max_position_embeddings": 512}
    eyes = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    eyes |= {"patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]} if newest else {}
    ids = {f"{k}_token_id": known[f"<|{k}|>"] for k in ("vision_start", "vision_end")}
    ids |= {f"{k}_token_id": known[f"<|{k}_pad|>"] for k in ("image", "video")}
    name = "Qwen3VL" if newest else "Qwen2_5_VL"
    config = getattr(transformers, f"{name}Config")(text_config=voice, vision_config=eyes, **ids)
    torch.manual_seed(0)
    getattr(transformers, f"{name}ForConditionalGeneration")(config).save_pretrained(folder)
    pictures = {"size": {"shortest_edge": 3136, "longest_edge": 65536}, "patch_size": 16 if newest else 14}
    pictures |= {"temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    pictures |= {"processor_class": f"{name}Processor", "image_processor_type": "Qwen2VLImageProcessorFast"}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    videos = pictures | {"video_processor_type": "Qwen3VLVideoProcessor" if newest else "Qwen2VLVideoProcessor"}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(videos))


READERS: dict[str, Callable[[Path], None]] = {
    "Qwen3-VL": lambda folder: qwen_vl(folder, True),
    "Qwen2.5-VL": lambda folder: qwen_vl(folder, False),
}


@pytest.fixture(scope="module", params=list(READERS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("reader")
    READERS[request.param](made)
    return made


def test_a_model_that_sees_joins_one_that_draws(folder: Path, stable_diffusion_folder: Path) -> None:
    pair = unigen.load(device="cpu", lmm=str(folder), image_model=str(stable_diffusion_folder))
    assert pair.info()["text_model"]["sees"]
    assert isinstance(pair.describe(RED, max_tokens=4), str)
    assert pair.edit(RED, "put it in the snow", steps=2, max_tokens=4).size
    assert isinstance(pair.generate("what is it", "text", max_tokens=4), str)


def test_pictures_are_seen_as_transformers_shows_them(folder: Path) -> None:
    """The prompt's ids and pixels are those of the image processor and the tokenizer, each alone."""
    from transformers import AutoImageProcessor

    reader = load_transformers(folder)
    states = [reader.hidden_states([picture, "what is it"]) for picture in (RED, BLUE)]
    assert states[0].shape == states[1].shape and not torch.allclose(states[0], states[1], atol=1e-3)
    pixels = AutoImageProcessor.from_pretrained(folder)([RED], return_tensors="pt")
    places = int(pixels["image_grid_thw"].prod()) // 4
    words = f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * places}<|vision_end|>what is it<|im_end|>\n"
    true = Tokenizer.from_file(str(folder / text.TOKENIZER_FILE)).encode(f"{words}<|im_start|>assistant\n").ids
    given = reader._build_inputs(unigen.Document.of([RED, "what is it"]))
    assert given["input_ids"][0].tolist() == true
    assert torch.equal(given["pixel_values"], pixels["pixel_values"])


def test_a_reader_whose_files_name_another_tokenizer(tmp_path: Path) -> None:
    """As DeepSeek-R1-Distill-Llama's: the file is a byte-level BPE, the class that is named is not."""
    from transformers import LlamaConfig, LlamaForCausalLM

    specials = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<pad>", "<｜User｜>", "<｜Assistant｜>")
    byte_level_tokenizer(tmp_path, LINES, specials, 330)
    path = tmp_path / text.TOKENIZER_CONFIG
    template = (
        "{{ bos_token }}{% for m in messages %}{{ '<｜' + m['role'].capitalize() + '｜>' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
    )
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    config = LlamaConfig(**SMALL, vocab_size=330, bos_token_id=0, eos_token_id=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    reader = load_transformers(tmp_path)
    ids = reader._build_inputs(unigen.Document.of("what is it\n12 dogs"))["input_ids"][0].tolist()
    file = Tokenizer.from_file(str(tmp_path / text.TOKENIZER_FILE))
    assert ids == file.encode("<｜User｜>what is it\n12 dogs<｜Assistant｜>").ids
    assert isinstance(reader.generate("what is it", "text", max_tokens=4), str)


def test_a_folder_without_its_image_processor(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        load_transformers(tmp_path / "other")
    assert "\n" not in str(caught.value)


def test_scores_end_with_the_turn_and_depend_on_the_picture(folder: Path) -> None:
    """The id that ends a turn is scored, and the line that the template writes after it is not."""
    engine = load_transformers(folder)
    question, answer = Segment(text="how many dogs"), Segment(text="12 dogs", role="assistant")
    red, blue = engine.score([Document([Segment(image=picture), question, answer]) for picture in (RED, BLUE)])
    assert engine.processor.decode(red.token_ids) == "12 dogs<|im_end|>"
    assert red.total != pytest.approx(blue.total, abs=1e-5)
