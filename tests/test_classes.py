"""Models that draw classes: labels in documents, the template, the engine, the command line, the recipe."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig

import unigen
from unigen.commands.main import main
from unigen.data import digits
from unigen.document import Document, Segment
from unigen.evaluation.tasks.digits import DigitsTask
from unigen.model import assembly, chat_template
from unigen.models import load
from unigen.tokenizers import load_image_tokenizer, text

NAMES = ("ant", "bee", "cow")


@pytest.fixture(scope="module")
def class_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three classes with random weights."""
    folder = tmp_path_factory.mktemp("classes")
    specials = (*chat_template.SPECIAL_TOKENS, *(chat_template.class_token(i) for i in range(3)))
    text.train_tokenizer([" ant bee cow"] * 20, folder / "text", 310, specials)
    shape = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    codes = load_image_tokenizer(tiny_folder / "image_tokenizer")
    model = assembly.build_from_config(
        shape, text.load(folder / "text"), codes, ("next-token", "masked"), classes=NAMES
    )
    for p in model.backbone.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, 0, 0.3)
    model.save(folder / "model")
    return folder / "model"


def test_classes_are_not_compared(class_folder: Path) -> None:
    engine = unigen.load(str(class_folder), "cpu")
    assert engine.info()["candidates"] is False
    with pytest.raises(ValueError, match="candidates are for models that read and draw"):
        engine.generate(Segment(label=2), candidates=2)


def test_a_label_is_part_of_a_document() -> None:
    document = Document([Segment(label=2), Segment(label="bee")])
    again = Document.from_json(document.to_json())
    assert [s.label for s in again.segments] == [2, "bee"]
    assert Document.of(0).segments[0].label == 0
    assert Document.of([np.int64(3), "a"]).segments[0].label == 3
    with pytest.raises(ValueError, match="exactly one"):
        Segment(text="a", label=1)


def test_the_layout_and_the_folder(class_folder: Path) -> None:
    model = load(class_folder)
    drawn = Document([Segment(label="cow"), Segment(image=torch.zeros(2, 2, dtype=torch.int64), role="assistant")])
    names = model.text_tokenizer.convert_ids_to_tokens(model.template.encode(drawn).ids)
    assert names[:5] == ["<s>", "<user>", "<class:2>", "<assistant>", "<boi>"] and names[-1] == "</s>"
    blind = model.text_tokenizer.convert_ids_to_tokens(model.template.encode(drawn, uncond=True).ids)
    assert blind[2] == "<uncond>"
    assert assembly.add_generators(model, ("next-token",)).template.classes == NAMES


def test_a_text_tokenizer_without_the_classes_is_named(tiny_folder: Path) -> None:
    model = load(tiny_folder)
    parts = model.backbone.lm, model.text_tokenizer, model.image_tokenizer, model.vocabulary.text_size
    with pytest.raises(ValueError, match=r"the text tokenizer has no <class:0>, <class:1>"):
        assembly.build_model(*parts, classes=("a", "b"))
    with pytest.raises(ValueError, match="of kind vq, of one scale"):
        assembly.build_model(*parts[:2], model.heads["next-scale"].tokenizer, parts[3])


def test_a_class_is_drawn_and_words_are_refused(class_folder: Path) -> None:
    engine = unigen.load(str(class_folder), device="cpu")
    assert engine.info()["classes"] == list(NAMES) and engine.info()["outputs"] == ["image"]
    first, same, other = (np.asarray(engine.generate(p, guidance=1.0)) for p in (1, Segment(label="bee"), 2))
    assert (first == same).all() and (first != other).any()
    assert (np.asarray(engine.generate_batch([1, 2, 1], [5, 0, 0], guidance=1.0)[2]) == first).all()
    for prompt, message in (("a bee", "by class, not from text: give a class from 0 to 2"), (3, "unknown class 3")):
        with pytest.raises(ValueError, match=message):
            engine.generate(prompt)
    with pytest.raises(ValueError, match="cannot answer with text"):
        engine.describe(Image.new("RGB", (16, 16)))


def test_a_model_of_words_refuses_a_class(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="from text, not by class"):
        unigen.load(str(tiny_folder), device="cpu").generate(1)


def test_command(class_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = ["--model", str(class_folder), "-o", str(tmp_path / "a.png")]
    assert main(["generate", "--class", "cow", *shared]) == 0
    assert main(["generate", "--class", "2", *shared[:2], "-o", str(tmp_path / "b.png")]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    for bad, message in (
        ([], "say what to draw: in words, or by --class"),
        (["a cow", "--class", "2"], "both words and --class are given"),
        (["a cow"], "by class, not from text"),
        (["--class", "7"], "unknown class '7': give a class from 0 to 2, or its name (ant, bee, cow)"),
    ):
        capsys.readouterr()
        assert main(["generate", *bad, *shared]) == 2
        assert message in capsys.readouterr().err


def test_digits_and_back() -> None:
    images, labels = digits.load_split(held_out=False)
    held, _ = digits.load_split(held_out=True)
    assert images.shape == (1437, 8, 8) and len(held) == 360 and labels.max() == 9
    for size in (16, 32):
        again = digits.to_digit(Image.fromarray(digits.to_rgb_image(images[3], size)))
        assert np.abs(again - images[3]).max() < 4.5 and np.abs(again - images[3]).mean() < 1


def test_the_recipe_and_its_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three tokenizers and the model, a few steps each; then the score."""
    small = ["image_source=digits", "steps=2", "batch_size=4", "num_workers=0", "time_limit=none", "precision=fp32"]
    small += [
        "model.image_size=16",
        "model.codebook_size=32",
        "model.channels=16",
        "model.decoder_channels=16",
        "model.wide_channels=16",
    ]
    kinds = {
        "vq": [],
        "scales": ["model.quantizer=multiscale", "model.scales=1,2", "model.code_dim=4"],
        "kl": ["tokenizer_kind=kl", "kl.image_size=16", "kl.channels=16,16", "kl.latent_channels=4"],
    }
    for name, more in kinds.items():
        assert main(["train", "recipes/tiny_vq.py", *small, *more, f"run_dir={tmp_path / name}"]) == 0
    names = {"image_tokenizer": "vq", "scale_tokenizer": "scales", "kl_tokenizer": "kl"}
    folders = [f"{key}={tmp_path / name / 'model'}" for key, name in names.items()]
    assert (
        main(["train", "recipes/digits.py", "steps=2", "num_workers=0", *folders, f"run_dir={tmp_path / 'run'}"]) == 0
    )
    model = str(tmp_path / "run" / "model")
    assert load(model).template.classes == digits.NAMES
    capsys.readouterr()
    for generator in ("next-scale", "flow"):
        assert main(["eval", "digits", "--model", model, "--generator", generator, "--images", "2"]) == 0
        said = capsys.readouterr().out
        assert "true, held out                 0.9" in said and "by class: zero" in said
    more = [f"init_from={model}", "steps=1", "num_workers=0", "scale_tokenizer=none", "kl_tokenizer=none"]
    assert main(["train", "recipes/digits.py", *more, f"run_dir={tmp_path / 'more'}"]) == 0
    assert (
        main(["train", "recipes/digits.py", *folders, "generators.flow=0", "steps=1", f"run_dir={tmp_path / 'two'}"])
        == 0
    )
    capsys.readouterr()
    assert main(["eval", "digits", "--model", "unigen-tiny", "--images", "1"]) == 2
    assert "from text, not by class" in capsys.readouterr().err


def test_copies_are_seen() -> None:
    task = DigitsTask()
    known = digits.load_split(held_out=False)[0][:50].reshape(50, -1).astype(np.float32)
    assert task.relative_nearest_distance(known) == 0
    held = digits.load_split(held_out=True)[0].reshape(digits.NUM_HELD_OUT, -1).astype(np.float32)
    assert 0.7 < task.relative_nearest_distance(held[:100]) < 1.3
