"""Diffusers pipelines behind the engine's interface, and a model that reads paired with one that draws: on small parts
made here, by Python and by the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import unigen
from tests.parity import llamagen as llamagen_case
from unigen import cli
from unigen.pairs import PairedEngine
from unigen.pipelines import PipelineEngine
from unigen.sequence import Document, Segment

SMALL = {"steps": 3, "size": (32, 32)}


def test_a_pipeline_draws_what_diffusers_does(words_folder: Path) -> None:
    from diffusers import DiffusionPipeline

    engine = unigen.load(str(words_folder), "cpu")
    pipe = DiffusionPipeline.from_pretrained(words_folder)
    rng = torch.Generator().manual_seed(7)
    true = pipe("a red dog", num_inference_steps=3, guidance_scale=4.0, width=32, height=32, generator=[rng]).images[0]
    drawn = engine.generate("a red dog", seed=7, guidance=4.0, **SMALL)
    assert drawn.tobytes() == true.tobytes()
    together = engine.generate_batch(["a hill", "a red dog"], [1, 7], guidance=4.0, **SMALL)
    assert together[1].tobytes() == drawn.tobytes() != together[0].tobytes()
    assert engine.generate("a red dog", seed=7, guidance=4.0, sampler="dpm++", **SMALL).tobytes() != drawn.tobytes()
    assert engine.generate("a red dog", seed=7, guidance=4.0, **SMALL).tobytes() == drawn.tobytes()  # back as it was
    assert engine.generate("a red dog", seed=7, guidance=4.0, negative="a hill", **SMALL).tobytes() != drawn.tobytes()


def test_a_pipeline_edits_and_inpaints(words_folder: Path) -> None:
    engine = unigen.load(str(words_folder), "cpu")
    given = Image.new("RGB", (32, 32), "red")
    edited = engine.edit(given, "a hill", strength=0.8, steps=4)
    assert edited.size == (32, 32) and edited.tobytes() != given.tobytes()
    mask = np.zeros((32, 32, 3), dtype=np.uint8)
    mask[:, 16:] = 255
    assert engine.inpaint(given, "a hill", mask, **SMALL).size == (32, 32)


def test_classes(classes_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = unigen.load(str(classes_folder), "cpu")
    assert engine.generate(3, steps=2).tobytes() == engine.generate(Segment(label="thing 3"), steps=2).tobytes()
    out, where = tmp_path / "out.png", ["--model", str(classes_folder), "--device", "cpu"]
    assert cli.main(["generate", "--class", "3", "--steps", "2", "-o", str(out), *where]) == 0 and out.exists()
    assert cli.main(["info", *where]) == 0 and "DiTPipeline" in capsys.readouterr().out
    for asked, reason in ((["a dog"], "draws classes, not words"), (["--class", "10"], "from 0 to 9")):
        assert cli.main(["generate", *asked, "-o", str(tmp_path / "no.png"), *where]) == 2
        assert reason in capsys.readouterr().err
    with pytest.raises(ValueError, match="no form that takes a picture"):
        engine.edit(Image.new("RGB", (32, 32)), "a hill")


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda e: e.generate(3), "draws words, not classes"),
        (lambda e: e.generate("a", "text"), "cannot answer with text"),
        (lambda e: e.generate("a", temperature=0.5), "does not take temperature"),
        (lambda e: e.generate("a", steps=0), "steps must be at least 1"),
        (lambda e: e.generate("a", sampler="magic"), "unknown sampler"),
        (lambda e: e.generate("a", size=(33, 32), steps=2), "divisible by"),
        (lambda e: e.generate(["a", Image.new("RGB", (8, 8))]), "give a picture to `edit`"),
        (lambda e: e.edit(Image.new("RGB", (8, 8)), "a", strength=2.0), "strength lies in"),
        (lambda e: e.inpaint(Image.new("RGB", (8, 8)), "a", Image.new("RGB", (9, 8))), "make them alike"),
    ],
)
def test_what_a_pipeline_refuses(call: Any, reason: str, words_folder: Path) -> None:
    engine = unigen.load(str(words_folder), "cpu")
    with pytest.raises(ValueError, match=reason) as caught:
        call(engine)
    assert "\n" not in str(caught.value)


def test_a_damaged_pipeline_is_one_clear_line(
    words_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    folder = tmp_path / "damaged"
    shutil.copytree(words_folder, folder)
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    assert cli.main(["info", "--model", str(folder), "--device", "cpu"]) == 2
    told = capsys.readouterr().err
    assert "cannot be loaded" in told and len(told.strip().splitlines()) == 1


def test_a_pair_chats_draws_edits_and_tells_a_story(
    janus_folder: Path, words_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that sees, with a pipeline: chat, picture, edit and story, by the command."""
    where = ["--lmm", str(janus_folder), "--model", str(words_folder), "--device", "cpu"]
    out, story = tmp_path / "out.png", tmp_path / "story.md"
    small = ["--steps", "2", "--size", "32x32"]
    assert cli.main(["generate", "a red dog", "-o", str(out), *small, *where]) == 0
    assert cli.main(["edit", str(out), "make it blue", "-o", str(out), "--steps", "4", *where]) == 0
    assert Image.open(out).size == (32, 32)
    assert cli.main(["describe", str(out), "-q", "What is it", *where]) == 0
    assert cli.main(["story", "a witch", "-o", str(story), *small, *where]) == 0
    assert story.exists() and list(tmp_path.rglob("*.png"))
    assert cli.main(["info", *where]) == 0
    printed = capsys.readouterr().out
    assert "janus" in printed and "StableDiffusionPipeline" in printed


def test_what_a_pair_says_and_draws(chat_folder: Path, classes_folder: Path, words_folder: Path) -> None:
    """A language model of transformers: the same seed says the same; what the pair cannot do is said."""
    pair = unigen.load(device="cpu", lmm=str(chat_folder), generator=str(words_folder))
    assert isinstance(pair, PairedEngine) and isinstance(pair.painter, PipelineEngine)
    said = [pair.generate("a red dog", "text", seed=seed, temperature=1.0, max_tokens=12) for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]
    with pytest.raises(ValueError, match="cannot see pictures"):
        pair.describe(Image.new("RGB", (8, 8)))
    with pytest.raises(ValueError, match="does not answer with text"):
        unigen.load(device="cpu", lmm=str(classes_folder), generator=str(words_folder))
    with pytest.raises(ValueError, match="both an lmm that reads and a generator that draws"):
        unigen.load(device="cpu", lmm=str(chat_folder))


class Says:
    """A model that reads: remembers what it was asked, and says what it is told to."""

    outputs = ("text",)

    def __init__(self, *answers: str) -> None:
        self.answers, self.asked = list(answers), []  # type: ignore[var-annotated]

    def generate(self, document: Document, output: str, **options: Any) -> str:
        self.asked.append([s.text for s in document.segments if s.text])
        return self.answers.pop(0)


class Draws:
    """A model that draws words alone: a picture as wide as its prompt is long."""

    outputs = ("image",)

    def generate(self, prompt: Any, output: str, **options: Any) -> Image.Image:
        words = " ".join(s.text or "" for s in Document.of(prompt).segments)
        return Image.new("RGB", (len(words), 1))

    def edit(self, *_: Any, **__: Any) -> Image.Image:
        from unigen.templates import Unable

        raise Unable("draws from words alone")


def test_passages_and_their_pictures_alternate() -> None:
    reader = Says("Once.", "a witch", "Then.", "a raven!", "")
    parts = list(PairedEngine(reader, Draws()).stream("a story", max_images=5))
    assert [p if isinstance(p, str) else p.width for p in parts] == ["Once.", 7, "Then.", 8]
    assert reader.asked[3][:3] == ["a story", "Once.", "Then."]  # the reader is told what was told


def test_an_edit_by_one_that_draws_from_words_alone() -> None:
    pair = PairedEngine(Says("a blue dog", "a hill with a tree"), Draws())
    assert pair.edit(Image.new("RGB", (4, 4)), "make it blue").width == len("a blue dog")
    asked = Document.of([Image.new("RGB", (4, 4)), "the same with a tree"])
    assert pair.generate(asked).width == len("a hill with a tree")
    assert pair.generate("a cat").width == len("a cat")  # words alone go as they are


def test_two_of_our_families_pair(janus_folder: Path, tmp_path: Path) -> None:
    llamagen_case.checkpoint(tmp_path)
    pair = unigen.load(device="cpu", lmm=str(janus_folder), generator=str(tmp_path))
    assert pair.generate(7).size == (32, 32)
