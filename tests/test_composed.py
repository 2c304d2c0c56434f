"""Diffusers pipelines behind the engine's interface, and a model that reads paired with one that draws: on small parts
made here, by Python and by the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import unigen
from tests.parity import llamagen as llamagen_case
from unigen.backends.composed import MAX_PASSAGE_TOKENS, ComposedEngine
from unigen.backends.connector import encode_prompt
from unigen.backends.diffusers_engine import DiffusersEngine
from unigen.backends.transformers_engine import FALLBACK_SAMPLING, load_transformers
from unigen.commands import main as cli
from unigen.document import Document, Segment
from unigen.hub.resolve import weights_variant
from unigen.hub.weights import read_tensors, write_tensors
from unigen.inference.base import BaseEngine
from unigen.inference.results import RECORD_NOTHING, GenerationResult, Record
from unigen.serving.jobs import Error, Finished, Job, Part, Rejected, Started
from unigen.serving.worker import SequentialWorker
from unigen.utils.numbers import NonFiniteError

SMALL = {"steps": 3, "size": (32, 32)}


@pytest.fixture(scope="module")
def glm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GLM-Image of random weights, of 32 codes. It writes no end of picture, so that all tokens are codes."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, GlmImagePipeline, GlmImageTransformer2DModel
    from tokenizers import Tokenizer, models
    from transformers import (
        ByT5Tokenizer,
        GlmImageConfig,
        GlmImageForConditionalGeneration,
        GlmImageProcessor,
        PreTrainedTokenizerFast,
        T5Config,
        T5EncoderModel,
    )
    from transformers.models.glm_image.image_processing_pil_glm_image import GlmImageImageProcessorPil

    torch.manual_seed(0)
    special = ["<start>", "<end>", "<|image|>", "<sop>", "<eop>", "<pad>", "<unk>"]
    names = [*(f"<code {n}>" for n in range(32)), *special, *"abcdefghijklmnopqrstuvwxyz0123456789 "]
    vocab = {name: id for id, name in enumerate(names)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>")), bos_token="<start>",
        pad_token="<pad>", unk_token="<unk>", additional_special_tokens=["<end>"],
        extra_special_tokens={"image_token": "<|image|>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"},
    )  # fmt: skip
    template = (
        "{% for m in messages %}{% for part in m['content'] %}"
        "{{ '<start><|image|><end>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
    )
    pictures = GlmImageImageProcessorPil(
        patch_size=16, merge_size=1, temporal_patch_size=1, min_pixels=64**2, max_pixels=128**2
    )
    wide = {"hidden_size": 32, "intermediate_size": 32}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    reader = GlmImageForConditionalGeneration(
        GlmImageConfig(
            text_config=wide | {
                "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": len(names),
                "vision_vocab_size": 32, "eos_token_id": 33, "pad_token_id": vocab["<pad>"], "rope_parameters": rope,
                "max_position_embeddings": 1024,
            },
            vision_config=wide | {"depth": 1, "num_heads": 2, "patch_size": 16, "image_size": 64},
            vq_config={"embed_dim": 8, "num_embeddings": 32, "latent_channels": 32},
            image_token_id=vocab["<|image|>"], image_start_token_id=32, image_end_token_id=33,
        )
    )  # fmt: skip
    torch.nn.init.normal_(reader.lm_head.weight, std=0.5)  # what is written depends on what is read
    transformer = GlmImageTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, text_embed_dim=32,
        time_embed_dim=16, condition_dim=8, prior_vq_quantizer_codebook_size=32,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16,) * 4, latent_channels=4, norm_num_groups=8, latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    glyphs = T5EncoderModel(T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=384))
    processor = GlmImageProcessor(pictures, tokenizer, chat_template=template)
    folder = tmp_path_factory.mktemp("glm")
    GlmImagePipeline(
        ByT5Tokenizer(), processor, glyphs, reader, vae, transformer, FlowMatchEulerDiscreteScheduler()
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def words_engine(stable_diffusion_folder: Path) -> DiffusersEngine:
    engine: DiffusersEngine = unigen.load(str(stable_diffusion_folder), "cpu")
    return engine


def test_a_pipeline_draws_what_diffusers_does(stable_diffusion_folder: Path) -> None:
    from diffusers import DiffusionPipeline

    engine = unigen.load(str(stable_diffusion_folder), "cpu")
    pipe = DiffusionPipeline.from_pretrained(stable_diffusion_folder)
    rng = torch.Generator().manual_seed(7)
    true = pipe("a red dog", num_inference_steps=3, guidance_scale=4.0, width=32, height=32, generator=[rng]).images[0]
    drawn = engine.generate("a red dog", seed=7, guidance=4.0, **SMALL)
    assert drawn.tobytes() == true.tobytes()
    together = engine.generate_batch(["a hill", "a red dog"], [1, 7], guidance=4.0, **SMALL)
    assert together[1].tobytes() == drawn.tobytes() != together[0].tobytes()
    assert engine.generate("a red dog", seed=7, guidance=4.0, solver="dpm++", **SMALL).tobytes() != drawn.tobytes()
    assert engine.generate("a red dog", seed=7, guidance=4.0, **SMALL).tobytes() == drawn.tobytes()  # back as it was
    assert (
        engine.generate("a red dog", seed=7, guidance=4.0, negative_prompt="a hill", **SMALL).tobytes()
        != drawn.tobytes()
    )


@pytest.mark.parametrize("size", [(32, 32), (45, 30), (100, 37)])
def test_a_pipeline_edits_and_inpaints(size: tuple[int, int], stable_diffusion_folder: Path) -> None:
    """Pictures of any size keep it, and what is not marked keeps its pixels."""
    engine = unigen.load(str(stable_diffusion_folder), "cpu")
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    given = Image.fromarray(noise)
    edited = engine.edit(given, "a hill", strength=0.8, steps=4)
    assert edited.size == size and edited.tobytes() != given.tobytes()
    assert engine.edit(given, "a hill", strength=0.8, steps=4, size=(48, 40)).size == (48, 40)
    mask = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    mask[:, size[0] // 2 :] = 255
    for more in ({"steps": 2}, {"steps": 2, "size": (32, 32), "strength": 0.9}):
        painted = np.asarray(engine.inpaint(given, "a hill", mask, **more))
        assert painted.shape == noise.shape
        assert (painted[mask == 0] == noise[mask == 0]).all() and (painted[mask > 0] != noise[mask > 0]).mean() > 0.5


def test_classes(dit_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = unigen.load(str(dit_folder), "cpu")
    assert engine.generate(3, steps=2).tobytes() == engine.generate(Segment(label="thing 3"), steps=2).tobytes()
    out, where = tmp_path / "out.png", ["--model", str(dit_folder), "--device", "cpu"]
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
        (lambda e: e.generate("a", steps=0), "steps must be a whole number from 1 to 1,000"),
        (lambda e: e.generate("a", solver="magic"), "unknown solver"),
        (lambda e: e.generate("a", size=(33, 32), steps=2), "divisible by"),
        (lambda e: e.generate("a", size=512), "a size is two whole numbers"),
        (lambda e: e.generate(["a", Image.new("RGB", (8, 8))]), "give a picture to `edit`"),
        (lambda e: e.edit(Image.new("RGB", (8, 8)), "a", strength=2.0), "strength must be a number above 0"),
        (lambda e: e.inpaint(Image.new("RGB", (8, 8)), "a", Image.new("L", (9, 8), 255)), "make them alike"),
        (lambda e: e.inpaint(Image.new("RGB", (8, 8)), "a", Image.new("RGB", (8, 8))), "marks nothing"),
        (lambda e: e.inpaint(Image.new("RGB", (8, 8)), None, Image.new("RGB", (8, 8), "white")), "must be text"),
        (lambda e: e.edit(Image.new("RGB", (8, 8)), None), "must be text, not NoneType"),
        (lambda e: e.edit(Image.new("RGB", (8, 8)), "a", strength=float("nan")), "strength must be a number above 0"),
        (lambda e: e.edit(Image.new("RGB", (8, 8)), "a", strength="much"), "strength must be a number above 0"),
        (lambda e: e.edit(Image.new("RGB", (8, 8)), "a", strength=0.3, steps=2), "take at least 4 steps"),
        (lambda e: e.edit(Image.new("RGB", (8, 8)), "a", strength=1e-9, steps=2), "give a greater strength"),
        (lambda e: e.edit(Image.new("RGB", (8, 8)), "a", size=(-8, 8)), "a size is two whole numbers"),
        (lambda e: e.generate("a", size=(-8, 8)), "a size is two whole numbers"),
        (lambda e: e.generate("a", size=(0, 8)), "a size is two whole numbers"),
        (lambda e: e.generate("a", size=(True, 8)), "a size is two whole numbers"),
        (lambda e: e.generate("a", size=(8000, 8000)), "too large"),
        (lambda e: e.generate("a", steps=2.5), "steps must be a whole number .*, not 2.5"),
        (lambda e: e.generate("a", steps=True), "steps must be a whole number .*, not True"),
        (lambda e: e.generate("a", steps=10**9), "from 1 to 1,000"),
        (lambda e: e.generate("a", num_inference_steps=10**9), "from 1 to 1,000"),
        (lambda e: e.generate("a", guidance=float("nan")), "guidance must be a number from 0 to 100"),
        (lambda e: e.generate("a", guidance=1e300), "guidance must be a number from 0 to 100"),
        (lambda e: e.generate("a", guidance="7"), "guidance must be a number"),
        (lambda e: e.generate("a", guidance=-1), "guidance must be a number"),
        (lambda e: e.generate("a", negative_prompt=3), "negative_prompt must be a text"),
        (lambda e: e.generate("a", negative_prompt="b\udce9"), "negative_prompt is not valid Unicode"),
        (
            lambda e: e.generate("a", negative_prompt="b", guidance=1.0),
            "hears negative_prompt only with guidance above 1",
        ),
        (lambda e: e.generate("a", generator="masked"), "does not take generator"),
        (lambda e: e.generate("a", output_type="latent"), "does not take output_type"),
        (lambda e: e.generate("a", strength=0.5), "does not take strength"),
        (lambda e: e.generate("a", seed=-1), "seed must be a whole number from 0"),
        (lambda e: e.generate("a", seed=2**64), "seed must be a whole number"),
        (lambda e: e.generate("a", n=0), "n must be a whole number"),
        (lambda e: e.generate_batch(["a", "b"], [1]), "2 prompts need as many seeds"),
        (lambda e: e.generate("a", cross_attention_kwargs=3, steps=1), "StableDiffusionPipeline"),
    ],
)
def test_what_a_pipeline_refuses(call: Any, reason: str, words_engine: DiffusersEngine) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        call(words_engine)
    assert "\n" not in str(caught.value)


def test_glm_image_draws_what_diffusers_does(glm_folder: Path, causal_lm_folder: Path) -> None:
    from diffusers import DiffusionPipeline

    engine = unigen.load(str(glm_folder), "cpu")
    small: dict[str, Any] = {"steps": 2, "size": (96, 64), "guidance": 2.0}
    before = torch.get_rng_state()
    drawn = engine.generate('a dog and "hi"', seed=7, **small)
    assert torch.equal(torch.get_rng_state(), before) and drawn.size == (96, 64)
    pipe, rng = DiffusionPipeline.from_pretrained(glm_folder), torch.Generator().manual_seed(7)
    own = {"num_inference_steps": 2, "guidance_scale": 2.0, "width": 96, "height": 64}
    assert pipe('a dog and "hi"', generator=rng, **own).images[0].tobytes() == drawn.tobytes()
    together = engine.generate_batch(["a hill", 'a dog and "hi"'], [1, 7], **small)
    assert together[1].tobytes() == drawn.tobytes() != together[0].tobytes()
    others = [("a dog", 7, {}), ('a dog and "hi"', 8, {}), ('a dog and "hi"', 7, {"guidance": 4.0})]
    for words, seed, more in others:
        assert engine.generate(words, seed=seed, **small | more).tobytes() != drawn.tobytes()
    assert engine.generate("a dog", steps=1).size == (1024, 1024)  # it has to be told a size
    pair = unigen.load(device="cpu", lmm=str(causal_lm_folder), image_model=str(glm_folder))
    assert pair.generate("a dog", **small).size == (96, 64)


@pytest.mark.parametrize(("size", "drawn"), [((64, 64), (64, 64)), ((70, 130), (64, 128)), ((20, 30), (64, 96))])
def test_glm_image_edits(size: tuple[int, int], drawn: tuple[int, int], glm_folder: Path) -> None:
    """Pictures of any size, brought to what its two readers of them agree on."""
    engine = unigen.load(str(glm_folder), "cpu")
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    edited, again, other = (
        engine.edit(picture, "a hill", steps=2, seed=3)
        for picture in (Image.fromarray(noise), Image.fromarray(noise), Image.new("RGB", size, "red"))
    )
    assert edited.size == size and edited.tobytes() == again.tobytes() != other.tobytes()
    assert engine.edit(Image.fromarray(noise), "a hill", steps=2, size=(96, 64)).size == (96, 64)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda e: e.generate("a", negative_prompt="b"), "does not take negative_prompt"),
        (lambda e: e.generate("a", size=(65, 64), steps=1), "divisible by 32"),
        (lambda e: e.edit(Image.new("RGB", (64, 64)), "a", strength=0.5), "does not take strength"),
        (lambda e: e.edit(Image.new("RGB", (64, 600)), "a", steps=1), "up to four times as long as wide"),
        (lambda e: e.generate("a", size=(64, 64), steps=2, solver="heun"), "unknown solver 'heun' .* one of euler$"),
        (
            lambda e: e.inpaint(Image.new("RGB", (8, 8)), "a", Image.new("L", (8, 8), 255)),
            "no form that takes a picture and",
        ),
        (lambda e: encode_prompt(e.pipe, "a"), "does not take prompt embeddings alone"),
    ],
)
def test_what_glm_image_refuses(call: Any, reason: str, glm_folder: Path) -> None:
    engine = unigen.load(str(glm_folder), "cpu")
    with pytest.raises(ValueError, match=reason) as caught:
        call(engine)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("LTXPipeline", "makes video"),
        ("WanPipeline", "makes video"),
        ("CogVideoXPipeline", "makes video"),
        ("AnimateDiffPipeline", "makes video"),
        ("LattePipeline", "makes video"),
        ("MochiPipeline", "makes video"),
        ("StableVideoDiffusionPipeline", "makes video"),
        ("CogVideoXVideoToVideoPipeline", "makes video"),
        ("TextToVideoZeroPipeline", "makes video"),
        ("StableAudioPipeline", "makes sound"),
        ("AudioLDM2Pipeline", "makes sound"),
        ("StableCascadePriorPipeline", "gives image_embeddings, .* and no picture"),
        ("KandinskyV22PriorPipeline", "gives image_embeds, .* and no picture"),
        ("FluxPriorReduxPipeline", "and no picture"),
        ("StableCascadeDecoderPipeline", "needs image_embeddings"),
        ("KandinskyV22Pipeline", "needs image_embeds"),
        ("StableCascadeCombinedPipeline", "cannot load its image decoder"),
        ("MarigoldDepthPipeline", "gives .*prediction.* and no picture"),
        ("DDPMPipeline", "neither words nor a class"),
        ("StableDiffusionControlNetPipeline", "control picture"),
        ("FluxControlPipeline", "control picture"),
        ("StableDiffusionAdapterPipeline", "control picture"),
        ("StableDiffusionUpscalePipeline", "enlarges pictures"),
        ("StableDiffusionLatentUpscalePipeline", "enlarges pictures"),
        ("QwenImageLayeredPipeline", "layers"),
        ("ShapEPipeline", "three-dimensional"),
        ("LLaDA2Pipeline", "and no picture"),
        ("NoSuchPipeline", "no pipeline 'NoSuchPipeline'"),
        ("AutoencoderKL", "no pipeline 'AutoencoderKL'"),
        (["pipeline", "MyPipeline"], "no pipeline"),
    ],
)
def test_pipelines_that_cannot_draw_are_refused_by_their_index(name: Any, reason: str, tmp_path: Path) -> None:
    """Before any weights are read: there are none."""
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(ValueError, match=reason) as caught:
        unigen.load(str(tmp_path), "cpu")
    assert "\n" not in str(caught.value)


def test_a_pipeline_whose_numbers_are_not_finite(stable_diffusion_folder: Path) -> None:
    engine = unigen.load(str(stable_diffusion_folder), "cpu")
    engine.generate("a", **SMALL)
    next(engine.pipe.vae.decoder.parameters()).data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="pixels of this model are not finite in float32"):
        engine.generate("a", **SMALL)
    worker, events = SequentialWorker(engine), list[Any]()
    worker.submit(0, Job(Document.of("a"), "image", SMALL))
    while worker.busy:
        events += [event for _, event in worker.step()]
    assert isinstance(events[-1], Error) and not events[-1].retryable  # no fault of who asks


def test_seeds_of_64_bits(words_engine: DiffusersEngine) -> None:
    """Each draws its own picture, also where torch would read only its last 32 bits."""
    seeds = [0, 2**32, 2**63, 2**64 - 1]
    drawn = words_engine.generate_batch(["a"] * 4, seeds, **SMALL)
    assert len({picture.tobytes() for picture in drawn}) == 4


def test_a_real_fault_of_a_pipeline_is_not_hidden(words_engine: DiffusersEngine, monkeypatch: Any) -> None:
    """What options may cause is one line, with its traceback behind it; all else stays what it is."""

    def failing(error: Exception) -> Any:
        def forward(*_: Any, **__: Any) -> Any:
            raise error

        return forward

    monkeypatch.setattr(words_engine.pipe.unet, "forward", failing(RuntimeError("sizes of tensors\nmust match")))
    with pytest.raises(ValueError, match="RuntimeError: sizes of tensors.$") as caught:
        words_engine.generate("a", **SMALL)
    assert isinstance(caught.value.__cause__, RuntimeError)
    monkeypatch.setattr(words_engine.pipe.unet, "forward", failing(AttributeError("no such part")))
    with pytest.raises(AttributeError, match="no such part"):
        words_engine.generate("a", **SMALL)


def test_a_damaged_pipeline_is_one_clear_line(
    stable_diffusion_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(stable_diffusion_folder, folder)
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    assert cli.main(["info", "--model", str(folder), "--device", "cpu"]) == 2
    told = capsys.readouterr().err
    assert "cannot be loaded" in told and len(told.strip().splitlines()) == 1


def test_a_pair_chats_draws_edits_and_tells_a_story(
    janus_folder: Path, stable_diffusion_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that sees, with a pipeline: chat, picture, edit and story, by the command."""
    where = ["--lmm", str(janus_folder), "--model", str(stable_diffusion_folder), "--device", "cpu"]
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


def test_pipelines_and_pairs_are_served(janus_folder: Path, stable_diffusion_folder: Path) -> None:
    """One job after the other, by what `unigen serve` answers with; one is dropped, and one asks for what cannot be."""
    pair = unigen.load(lmm=str(janus_folder), image_model=str(stable_diffusion_folder), device="cpu")
    for engine in (pair, unigen.load(str(stable_diffusion_folder), "cpu")):
        worker = SequentialWorker(engine)
        worker.submit(0, Job(Document.of("a red dog"), "image", {"seed": 3, **SMALL}, num_previews=3))
        worker.submit(1, Job(Document.of("a red dog"), "image", {"seed": 4, **SMALL}))
        worker.submit(2, Job(Document.of("a red dog"), "image", {"seed": 3, "banana": 1}))
        worker.submit(3, Job(Document.of("a red dog"), "image", {"seed": 3}, num_previews=3, num_candidates=2))
        worker.submit(4, Job(Document.of("a red dog"), "image", base_image=Image.new("RGB", (32, 32)), variation=0.5))
        worker.abort(1)
        events = []
        while worker.busy:
            events += list(worker.step())
        (picture,) = [event.content for number, event in events if isinstance(event, Part)]
        assert picture.tobytes() == engine.generate("a red dog", "image", seed=3, **SMALL).tobytes()
        assert [number for number, event in events if isinstance(event, Finished)] == [0]
        assert [number for number, event in events if isinstance(event, Started)] == [0, 2]
        (begun, *_) = [event.settings for _, event in events if isinstance(event, Started)]
        assert begun == {"guidance": 7.5} | {"seed": 3, **SMALL}
        refused = [event.message for number, event in events if isinstance(event, Rejected)]
        assert all(word in said for word, said in zip(("banana", "candidates", "vary"), refused, strict=True))


def test_what_a_pair_says_and_draws(causal_lm_folder: Path, dit_folder: Path, stable_diffusion_folder: Path) -> None:
    """A language model of transformers: the same seed says the same; what the pair cannot do is said."""
    pair = unigen.load(device="cpu", lmm=str(causal_lm_folder), image_model=str(stable_diffusion_folder))
    assert isinstance(pair, ComposedEngine) and isinstance(pair.image_engine, DiffusersEngine)
    said = [pair.generate("a red dog", "text", seed=seed, temperature=1.0, max_tokens=12) for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]
    with pytest.raises(ValueError, match="cannot see pictures"):
        pair.describe(Image.new("RGB", (8, 8)))
    with pytest.raises(ValueError, match="does not answer with text"):
        unigen.load(device="cpu", lmm=str(dit_folder), image_model=str(stable_diffusion_folder))
    with pytest.raises(ValueError, match="both lmm, which reads, and image_model, which draws"):
        unigen.load(device="cpu", lmm=str(causal_lm_folder))


class FakeEngine(BaseEngine):
    """Answers what its `answer` does."""

    def check(self, *_: Any, **__: Any) -> None:
        pass

    def info(self) -> Any:
        return {}

    def answer(self, document: Document, **options: Any) -> Any:
        raise NotImplementedError

    def generate_results(
        self, prompts: Any, seeds: Any = None, output: Any = "image", *, record: Record = RECORD_NOTHING, **options: Any
    ) -> list[GenerationResult]:
        documents = [Document.of(prompt) for prompt in prompts]
        return [
            GenerationResult(self.answer(document, seed=seed, **options), document, seed)
            for document, seed in zip(documents, seeds, strict=True)
        ]


class FakeLanguageModel(FakeEngine):
    """A model that reads: remembers what it was asked, and says what it is told to."""

    outputs = ("text",)

    def __init__(self, *answers: str) -> None:
        self.answers, self.asked, self.options = list(answers), [], []  # type: ignore[var-annotated]

    def answer(self, document: Document, **options: Any) -> str:
        self.asked.append([s.text for s in document.segments if s.text])
        self.options.append(options)
        return self.answers.pop(0)


class FakeImageEngine(FakeEngine):
    """A model that draws words alone: a picture as wide as its prompt is long."""

    outputs = ("image",)

    def answer(self, document: Document, **options: Any) -> Image.Image:
        words = " ".join(s.text or "" for s in document.segments)
        return Image.new("RGB", (len(words), 1))

    def edit(self, *_: Any, **__: Any) -> Image.Image:
        from unigen.model.template import UnsupportedError

        raise UnsupportedError("draws from words alone")


def test_passages_and_their_pictures_alternate() -> None:
    reader = FakeLanguageModel("Once.", "a witch", "Then.", "a raven!", "")
    parts = list(ComposedEngine(reader, FakeImageEngine()).stream("a story", max_images=5))
    assert [p if isinstance(p, str) else p.width for p in parts] == ["Once.", 7, "Then.", 8]
    assert reader.asked[3][:3] == ["a story", "Once.", "Then."]  # the reader is told what was told


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("A witch flies. She lands on a hi", "A witch flies."),
        ('"Who is there?" Nobody ans', '"Who is there?"'),
        ("A witch flies. She lands.", "A witch flies. She lands."),
        (
            "Mr. Raven sits on a branch and looks at the 3.5 moons",
            "Mr. Raven sits on a branch and looks at the 3.5 moons",
        ),
        ("a witch and her raven", "a witch and her raven"),
    ],
)
def test_a_passage_ends_with_a_sentence(said: str, kept: str) -> None:
    reader = FakeLanguageModel(said, "a witch", "")
    assert next(ComposedEngine(reader, FakeImageEngine()).stream("a story")) == kept


def test_a_passage_that_was_told_is_asked_for_again() -> None:
    """With another seed, and the story ends where nothing new comes."""
    reader = FakeLanguageModel(
        "A witch flies.", "a witch", "A witch flies!", "She lands.", "a hill", *["She lands."] * 3
    )
    parts = list(ComposedEngine(reader, FakeImageEngine()).stream("a story", max_images=5, seed=2**64 - 1))
    assert [p for p in parts if isinstance(p, str)] == ["A witch flies.", "She lands."]
    seeds = [options["seed"] for options in reader.options]
    assert seeds[2] != seeds[3] == seeds[3] and seeds[3] != seeds[0] and len({*seeds[5:]}) == 3
    assert all(0 <= seed < 2**64 for seed in seeds)


@pytest.mark.parametrize(
    ("said", "sampling"),
    [
        (None, FALLBACK_SAMPLING),
        ({"eos_token_id": 0}, FALLBACK_SAMPLING),
        ({"eos_token_id": 0, "repetition_penalty": 1.3}, FALLBACK_SAMPLING | {"repetition_penalty": 1.3}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9}),
        ({"do_sample": True, "top_k": 20}, {"temperature": 1.0, "top_k": 20}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
    ],
)
def test_text_is_drawn_as_the_model_says(
    said: Any, sampling: dict[str, Any], causal_lm_folder: Path, tmp_path: Path
) -> None:
    """By its generation_config.json, else at temperature 0.7 with a guard; what is asked for wins."""
    shutil.copytree(causal_lm_folder, tmp_path / "chat")
    file = tmp_path / "chat" / "generation_config.json"
    file.unlink()
    if said is not None:
        file.write_text(json.dumps(said))
    reader = load_transformers(tmp_path / "chat")
    assert reader.text_sampling == sampling == reader.info()["text_sampling"]
    pair, asked = ComposedEngine(reader, FakeImageEngine()), {}
    job = Job(Document.of("a dog"), "text", {"seed": 3})
    assert SequentialWorker(pair)._reported_settings(job) == {"seed": 3, "text": sampling}  # as the server reports it
    reader.model.generate = lambda **options: asked.update(options) or options["input_ids"]  # type: ignore[func-returns-value]
    pair.generate("a dog", "text")
    drawn = {name: asked[name] for name in FALLBACK_SAMPLING.keys() & asked.keys() if asked["do_sample"]}
    assert (
        drawn.items()
        >= {k: v for k, v in sampling.items() if k in FALLBACK_SAMPLING and sampling["temperature"]}.items()
    )
    assert asked["do_sample"] == bool(sampling["temperature"])
    asked.clear()
    pair.generate("a dog", "text", temperature=0.0)
    assert not asked["do_sample"] and asked.get("repetition_penalty") in (None, (said or {}).get("repetition_penalty"))


def test_an_edit_by_one_that_draws_from_words_alone() -> None:
    pair = ComposedEngine(FakeLanguageModel("a blue dog", "a hill with a tree"), FakeImageEngine())
    assert pair.edit(Image.new("RGB", (4, 4)), "make it blue").width == len("a blue dog")
    asked = Document.of([Image.new("RGB", (4, 4)), "the same with a tree"])
    assert pair.generate(asked).width == len("a hill with a tree")
    assert pair.generate("a cat").width == len("a cat")  # words alone go as they are


def test_no_option_is_swallowed(stable_diffusion_folder: Path) -> None:
    """What the one that reads does not get, the one that draws does, and refuses by name."""
    reader, picture = FakeLanguageModel("a dog"), Image.new("RGB", (32, 32))
    pair = ComposedEngine(reader, unigen.load(str(stable_diffusion_folder), "cpu"))
    for call, reason in (
        (lambda: pair.generate("two apples", temperature=0.1, top_p=0.5, max_images=3, **SMALL), "temperature, top_p"),
        (lambda: pair.generate([picture, "with a tree"], max_images=3, **SMALL), "does not take max_images"),
        (lambda: pair.describe(picture, candidates=4, nonsense=3), "does not take candidates, nonsense"),
        (lambda: pair.generate("a hill", "text", steps=3), "does not take steps"),
    ):
        with pytest.raises(ValueError, match=reason):
            call()
    assert pair.describe(picture, temperature=0.5, seed=3) == "a dog"
    assert reader.options == [{"temperature": 0.5, "seed": 3}]  # who is refused has asked nobody


@pytest.mark.parametrize(
    ("asked", "most"), [({}, MAX_PASSAGE_TOKENS), ({"max_tokens": 500}, MAX_PASSAGE_TOKENS), ({"max_tokens": 7}, 7)]
)
def test_prompts_for_the_painter_are_short(asked: dict[str, int], most: int) -> None:
    """In a picture of a picture, an edit and a story alike; an answer is as long as is asked for."""
    reader = FakeLanguageModel(*"abcde", "")
    pair = ComposedEngine(reader, FakeImageEngine())
    pair.generate([Image.new("RGB", (4, 4)), "with a tree"], **asked)
    pair.edit(Image.new("RGB", (4, 4)), "with a tree", **asked)
    pair.generate("a story", "interleaved", max_images=1, **asked)
    assert [options["max_tokens"] for options in reader.options] == [most] * 4
    pair.generate("why", "text", **asked)
    assert reader.options[4].get("max_tokens") == asked.get("max_tokens")


def test_two_of_our_families_pair(janus_folder: Path, tmp_path: Path) -> None:
    llamagen_case.checkpoint(tmp_path)
    pair = unigen.load(device="cpu", lmm=str(janus_folder), image_model=str(tmp_path))
    assert pair.generate(7).size == (32, 32)


def test_a_system_message_is_read_before_all_else(causal_lm_folder: Path) -> None:
    """By the model that reads, wherever it stands; what is drawn is what the user says."""
    reader = load_transformers(causal_lm_folder)
    system, asked = Segment(text="a blue hill", role="system"), Segment(text="a red dog")
    for said in ([system, asked], [asked, system]):
        ids = reader._build_inputs(Document(said))["input_ids"][0]
        assert reader.processor.decode(ids) == "systema blue hillusera red dogassistant"
    drawn: list[Any] = []

    class Painter(FakeEngine):
        outputs = ("image",)

        def answer(self, document: Document, **options: Any) -> None:
            drawn.append(document)

    ComposedEngine(reader, Painter()).generate([system, asked], "image")
    assert [segment.text for segment in drawn[0].segments] == ["a red dog"]


BAD_STREAMS: dict[str, Any] = {
    "steps": lambda e: e.stream("a", "image", steps=0),
    "guidance": lambda e: e.stream("a", "image", guidance=float("nan")),
    "solver": lambda e: e.stream("a", "image", solver="magic"),
    "nonsense": lambda e: e.stream("a", "image", nonsense=3),
    "seed": lambda e: e.stream("a", "image", seed=-1),
    "size": lambda e: e.stream("a", "image", size=(-8, 8)),
    "answer with": lambda e: e.stream("a", "joint"),
    "empty": lambda e: e.stream(" ", "image"),
    "a prompt is": lambda e: e.stream(None, "image"),
}
BAD_STORIES: dict[str, Any] = {
    "max_images": lambda e: e.stream("a", max_images=0),
    "temperature": lambda e: e.stream("a", temperature=-1),
    "top_p": lambda e: e.stream("a", "text", top_p=0),
    "max_tokens": lambda e: e.stream("a", max_tokens=0),
    "steps": lambda e: e.stream("a", "text", steps=2),
    "seed": lambda e: e.stream("a", seed=2**64),
    "solver": lambda e: e.stream("a", solver="magic"),
    "cannot see": lambda e: e.stream([Image.new("RGB", (8, 8)), "a"]),
    "not classes": lambda e: e.stream(3),
}


@pytest.mark.parametrize(("reason", "call"), [*BAD_STREAMS.items(), *BAD_STORIES.items()])
def test_a_stream_refuses_at_once(
    reason: str, call: Any, words_engine: DiffusersEngine, causal_lm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the call, as that of one model: nothing is taken of it, and nobody is asked."""
    pair = ComposedEngine(load_transformers(causal_lm_folder), words_engine)
    monkeypatch.setattr(pair.text_engine.model, "generate", lambda **_: pytest.fail("the reader was asked"))
    for engine in [pair, words_engine] if call in BAD_STREAMS.values() else [pair]:
        with pytest.raises(ValueError, match=reason) as caught:
            call(engine)
        assert "\n" not in str(caught.value)


def test_a_stream_draws_when_it_is_taken(words_engine: DiffusersEngine) -> None:
    stream = words_engine.stream("a red dog", seed=7, **SMALL)
    assert [p.tobytes() for p in stream] == [words_engine.generate("a red dog", seed=7, **SMALL).tobytes()]


def test_one_prompt_is_no_list_of_letters(words_engine: DiffusersEngine) -> None:
    for engine in (words_engine, ComposedEngine(FakeLanguageModel(), words_engine)):
        with pytest.raises(ValueError, match="the prompts must be a list"):
            engine.generate_batch("a cat", **SMALL)
        with pytest.raises(ValueError, match="2 prompts need as many seeds"):
            engine.generate_batch(["a", "b"], [1], **SMALL)


def test_a_reader_whose_numbers_are_not_finite(causal_lm_folder: Path) -> None:
    """Greedily it would say the first id for ever, and drawn torch would raise an error of its own."""
    reader = load_transformers(causal_lm_folder)
    assert isinstance(reader.generate("a", "text", max_tokens=2), str)
    reader.model.model.layers[0].mlp.down_proj.weight.data.fill_(float("inf"))
    for call in (
        lambda: reader.generate("a", "text", max_tokens=2),
        lambda: reader.generate("a", "text", max_tokens=2, temperature=1.0),
        lambda: reader.hidden_states("a"),
    ):
        with pytest.raises(NonFiniteError, match="of this model are not finite in float32"):
            call()


@pytest.mark.parametrize(
    ("said", "sampling"),
    [
        (None, {}),
        ({"top_p": 0.5}, {}),
        ({"do_sample": True, "temperature": 0.6, "top_k": 7}, {"temperature": 0.6, "top_k": 7}),
        ({"do_sample": False, "repetition_penalty": 1.3}, {"temperature": 0.0, "repetition_penalty": 1.3}),
    ],
)
def test_text_of_our_families_is_drawn_as_their_folder_says(
    said: Any, sampling: dict[str, Any], janus_folder: Path, dit_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(janus_folder, tmp_path / "janus")
    if said is not None:
        (tmp_path / "janus" / "generation_config.json").write_text(json.dumps(said))
    pair = unigen.load(device="cpu", lmm=str(tmp_path / "janus"), image_model=str(dit_folder))
    asked: list[Any] = []
    request = pair.text_engine.build_request
    pair.text_engine.build_request = lambda *given, **options: asked.append(request(*given, **options)) or asked[-1]
    pair.generate("what is it", "text", max_tokens=2)
    usual = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    assert vars(asked[-1].text_sampling) == usual | sampling
    pair.generate("what is it", "text", max_tokens=2, temperature=0.0)
    assert asked[-1].text_sampling.temperature == 0.0
    assert pair.default_options("text") == sampling


def test_numbers_of_a_folder_that_are_out_of_range_are_named(janus_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(janus_folder, tmp_path / "janus")
    (tmp_path / "janus" / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": "hot"}))
    with pytest.raises(ValueError, match=r"generation_config.json: temperature must be a number"):
        unigen.load(device="cpu", lmm=str(tmp_path / "janus"), image_model=str(tmp_path))


def keep_half(folder: Path, parts: str) -> None:
    """Weights under the names of the variant fp16 alone, as some repositories have them."""
    for path in folder.glob(f"{parts}/*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))


def lose(folder: Path, part: str, name: str) -> None:
    path = next((folder / part).glob("*.safetensors"))
    state = read_tensors(path)
    del state[next(key for key in state if key.endswith(name))]
    write_tensors(path, state)


@pytest.mark.parametrize("parts", ["*", "unet", "text_encoder"])
def test_weights_of_a_variant_are_read_where_there_are_no_others(
    parts: str, stable_diffusion_folder: Path, words_engine: DiffusersEngine, tmp_path: Path
) -> None:
    shutil.copytree(stable_diffusion_folder, tmp_path / "half")
    assert weights_variant(tmp_path / "half") is None
    keep_half(tmp_path / "half", parts)
    drawn = unigen.load(str(tmp_path / "half"), "cpu").generate("a", **SMALL)
    assert drawn.tobytes() == words_engine.generate("a", **SMALL).tobytes()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda f: shutil.rmtree(f / "tokenizer"), "has no folder tokenizer/ with its CLIPTokenizer"),
        (lambda f: shutil.rmtree(f / "unet"), "has no folder unet/ with its UNet2DConditionModel"),
        (
            lambda f: next((f / "vae").glob("*.safetensors")).rename(f / "vae" / "model.bin"),
            "no weights in safetensors",
        ),
        (
            lambda f: lose(f, "unet", "conv_out.weight"),
            r"its unet lacks 1 tensors \(conv_out.weight\): download it again",
        ),
        (lambda f: lose(f, "text_encoder", "final_layer_norm.weight"), "1 missing: .*final_layer_norm.weight"),
    ],
)
def test_a_pipeline_that_is_not_whole(spoil: Any, reason: str, stable_diffusion_folder: Path, tmp_path: Path) -> None:
    """Libraries would make up a tokenizer and tensors, or end in an error of their own."""
    shutil.copytree(stable_diffusion_folder, tmp_path / "spoilt")
    spoil(tmp_path / "spoilt")
    with pytest.raises(ValueError, match=reason) as caught:
        unigen.load(str(tmp_path / "spoilt"), "cpu")
    assert "\n" not in str(caught.value)
