"""A language model joined to a pipeline by hidden states: trained on small parts made here, a connector gives what the
pipeline's own text encoder does; what does not fit is one clear line."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import unigen
from tests.conftest import make_vae
from tests.parity import llamagen_t2i as t5_case
from tests.parity import showo as showo_case
from unigen.backends.connector import (
    ConnectedDiffusersEngine,
    Connector,
    ConnectorConfig,
    encode_prompt,
    load_connector,
)
from unigen.backends.diffusers_engine import DiffusersEngine
from unigen.commands import main as cli
from unigen.config import apply_overrides
from unigen.document import Document
from unigen.training.trainer import Trainer

RED, BLUE = (Image.new("RGB", (32, 32), color) for color in ("red", "blue"))
WORDS = [("a red dog", "a red dog"), ("a blue hill", "a blue hill on a hill")]
ASKED: list[tuple[Any, str]] = [
    *WORDS,
    ([RED, "a dog"], "a red dog on a hill"),
    ([BLUE, "a dog"], "a blue dog on a hill"),
]
"""What is read, and the words of which the pipeline's own embeddings are to come out."""
SMALL: dict[str, Any] = {"steps": 3, "size": (32, 32), "guidance": 4.0}
BRIEF = [
    "width=64",
    "layers=2",
    "heads=4",
    "optim.lr=3e-3",
    "optim.warmup_steps=10",
    "optim.weight_decay=0",
    "ema_decay=0",
]
BRIEF += ["sample_every=0", "save_every=0", "num_workers=0", "batch_size=4", "log_every=100"]


@pytest.fixture(scope="module")
def seeing_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA of random weights."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        Qwen2Tokenizer,
    )

    torch.manual_seed(0)
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(["a red dog on a blue hill, user assistant"] * 4, 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"], "pad_token": "<|endoftext|>"})
    template = (
        "{% for m in messages %}{{ m['role'] }}{% for part in m['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    folder = tmp_path_factory.mktemp("seeing")
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}), tokenizer, patch_size=8,
        vision_feature_select_strategy="default", chat_template=template, num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    eyes, voice = CLIPVisionConfig(**size, image_size=16, patch_size=8), LlamaConfig(**size, vocab_size=len(tokenizer))
    picture = {"image_token_id": tokenizer.convert_tokens_to_ids("<image>"), "vision_feature_layer": -1}
    config = LlavaConfig(vision_config=eyes, text_config=voice, **picture)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pooled_folder(stable_diffusion_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion XL of random weights: two text encoders, and a pooled embedding beside the others."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(stable_diffusion_folder / "tokenizer")
    texts = CLIPTextConfig.from_pretrained(stable_diffusion_folder / "text_encoder", projection_dim=32)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )  # fmt: skip
    pipe = StableDiffusionXLPipeline(
        vae=make_vae(), text_encoder=CLIPTextModel(texts), tokenizer=tokenizer, unet=unet, tokenizer_2=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(texts), scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        add_watermarker=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("pooled")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def free_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PixArt of random weights: as many embeddings as the prompt has pieces, and a mask."""
    from diffusers import DDIMScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
    from transformers import T5EncoderModel, T5Tokenizer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("free")
    (folder / "parts").mkdir()
    t5_case.checkpoint(folder / "parts")
    texts = T5EncoderModel.from_pretrained(folder / "parts" / "flan-t5-xl")
    transformer = PixArtTransformer2DModel(
        sample_size=16, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        caption_channels=texts.config.d_model, cross_attention_dim=16, out_channels=8, norm_type="ada_norm_single",
        norm_elementwise_affine=False, norm_eps=1e-6,
    )  # fmt: skip
    PixArtSigmaPipeline(
        T5Tokenizer.from_pretrained(folder / "parts" / "flan-t5-xl"), texts, make_vae(), transformer,
        DDIMScheduler(clip_sample=False),
    ).save_pretrained(folder / "whole")  # fmt: skip
    return folder / "whole"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("connector_recipe", "recipes/connector.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def train(recipe: ModuleType) -> Callable[..., dict[str, Any]]:
    """The recipe on a few documents; gives the last metrics."""

    def run(lmm: Path, generator: Path, run_dir: Path, *more: str, asked: Any = ASKED) -> dict[str, Any]:
        given = [*BRIEF, f"lmm={lmm}", f"image_model={generator}", f"run_dir={run_dir}", *more]
        cfg = apply_overrides(recipe.config(), given)
        rows = [(Document.of(read), words) for read, words in asked]
        return Trainer(cfg, replace(recipe.build(cfg), dataset=rows, write_samples=None)).run()

    return run


@pytest.fixture(scope="module")
def composed(seeing_folder: Path, stable_diffusion_folder: Path, tmp_path_factory: Any, train: Any) -> Path:
    """A connector of LLaVA and Stable Diffusion that knows what is asked here."""
    folder = tmp_path_factory.mktemp("joined")
    assert train(seeing_folder, stable_diffusion_folder, folder, "steps=250")["embeds"] < 0.01
    return folder / "model"


@pytest.fixture(scope="module")
def engines(seeing_folder: Path, stable_diffusion_folder: Path, composed: Path) -> Any:
    return unigen.load(
        device="cpu", lmm=str(seeing_folder), image_model=str(stable_diffusion_folder), connector=str(composed)
    )


def untrained(pair: Any) -> ConnectedDiffusersEngine:
    torch.manual_seed(1)
    return ConnectedDiffusersEngine(
        pair.image_engine.pipe, pair.text_engine, Connector(pair.image_engine.connector.config).eval()
    )


def distance(one: Image.Image, other: Image.Image) -> float:
    """The mean difference of two pictures, of 255."""
    return float(np.abs(np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).mean())


def test_a_connector_draws_what_the_text_encoder_does(engines: Any) -> None:
    """Of words and of pictures; an untrained one does not."""
    own, other = DiffusersEngine(engines.image_engine.pipe), untrained(engines)
    for more in ({}, {"negative_prompt": "a blue dog"}):  # guidance's other branch is the pipeline's own
        for asked, words in ASKED:
            true = own.generate(words, seed=3, **SMALL, **more)
            assert distance(engines.generate(asked, seed=3, **SMALL, **more), true) < 0.1
            assert distance(other.generate(asked, seed=3, **SMALL, **more), true) > 2


def test_a_picture_is_part_of_what_is_asked(engines: Any) -> None:
    red, blue = (engines.generate([picture, "a dog"], seed=3, **SMALL) for picture in (RED, BLUE))
    assert distance(red, blue) > 10 * distance(
        red, DiffusersEngine(engines.image_engine.pipe).generate(ASKED[2][1], seed=3, **SMALL)
    )
    drawn = [engines.edit(picture, "a dog", strength=0.8, steps=4, seed=1) for picture in (RED, BLUE, RED)]
    assert drawn[0].tobytes() == drawn[2].tobytes() != drawn[1].tobytes()
    whole = Image.new("RGB", (32, 32), "white")
    assert engines.inpaint(RED, "a blue hill", whole, steps=3).size == (32, 32)


def test_alone_as_in_a_batch_and_seeded(engines: Any) -> None:
    together = engines.generate_batch([asked for asked, _ in ASKED], [5, 6, 7, 8], **SMALL)
    for (asked, _), seed, drawn in zip(ASKED, (5, 6, 7, 8), together, strict=True):
        assert engines.generate(asked, seed=seed, **SMALL).tobytes() == drawn.tobytes()
    assert engines.generate(ASKED[0][0], seed=6, **SMALL).tobytes() != together[0].tobytes()


@pytest.mark.parametrize(("kind", "reads"), [("pooled_folder", "janus_folder"), ("free_folder", "causal_lm_folder")])
def test_pooled_embeddings_and_prompts_of_any_length(
    kind: str, reads: str, tmp_path: Path, train: Any, request: Any
) -> None:
    """Two text encoders and a pooled embedding; a mask, and as many embeddings as the words have pieces."""
    lmm, folder = request.getfixturevalue(reads), request.getfixturevalue(kind)
    metrics = train(lmm, folder, tmp_path, "steps=120", "max_prompt_length=24", asked=WORDS)
    assert ("pooled" in metrics) == (kind == "pooled_folder") and ("counts" in metrics) == (kind == "free_folder")
    made = unigen.load(device="cpu", lmm=str(lmm), image_model=str(folder), connector=str(tmp_path / "model"))
    own, other = DiffusersEngine(made.image_engine.pipe), untrained(made)
    size = SMALL | ({"use_resolution_binning": False} if kind == "free_folder" else {})
    for asked, words in WORDS:
        told = made.image_engine.connector.prompt_embeds(made.text_engine.hidden_states(asked))
        assert told.embeds_MND.shape == encode_prompt(own.pipe, words).embeds_MND.shape
        true = own.generate(words, seed=3, **size)
        near, far = (distance(one.generate(asked, seed=3, **size), true) for one in (made, other))
        assert far > 10 * near, (near, far)


def test_the_states_are_those_that_an_answer_begins_with(
    janus_folder: Path, seeing_folder: Path, engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model of ours and of one of transformers: the last of them says the first token."""
    engine = unigen.load(str(janus_folder), "cpu")
    asked = [RED, "what is it"]
    first = engine.model.logits(engine.hidden_states(asked)[-1:], 0, engine.model.vocabulary.text_size).argmax()
    assert engine.model.template.decode([int(first)]) == engine.generate(asked, "text", max_tokens=1)
    made, new = [], engine.model.backbone.new_cache
    monkeypatch.setattr(engine.model.backbone, "new_cache", lambda *a: made.append(new(*a)) or made[-1])
    engine.hidden_states(asked)
    assert len(made) == 1 and made[0].capacity > 0, "of the precision that all caches have"
    first = engines.text_engine.model.lm_head(engines.text_engine.hidden_states(asked)[-1]).argmax()
    assert engines.text_engine.processor.decode([int(first)]).strip() == engines.text_engine.generate(
        asked, "text", max_tokens=1
    )


def test_a_run_goes_on_where_it_stopped(
    recipe: ModuleType, seeing_folder: Path, stable_diffusion_folder: Path, tmp_path: Path
) -> None:
    """On the rendered world's captions, bit for bit; a new run begins from the connector."""
    models = [f"lmm={seeing_folder}", f"image_model={stable_diffusion_folder}", *BRIEF, "optim.schedule=constant"]
    for name, steps in (("halves", 2), ("halves", 4), ("whole", 4)):
        cfg = apply_overrides(recipe.config(), [*models, f"run_dir={tmp_path / name}", f"steps={steps}"])
        assert Trainer(cfg, recipe.build(cfg)).run()["step"] == steps
    halves, whole = (load_connector(tmp_path / name / "model").state_dict() for name in ("halves", "whole"))
    assert all(torch.equal(halves[name], whole[name]) for name in whole)
    cfg = apply_overrides(recipe.config(), [*models, f"init_from={tmp_path / 'whole' / 'model'}"])
    job = recipe.build(cfg)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in job.model.state_dict().items())
    job.write_samples(job.model, 7, tmp_path)
    assert (tmp_path / "000007.png").exists()


def test_a_run_that_begins_from_a_connector_of_another_size(
    recipe: ModuleType, seeing_folder: Path, stable_diffusion_folder: Path, tmp_path: Path
) -> None:
    config = ConnectorConfig(input_dim=32, output_dim=32, max_length=77, width=16, heads=2, layers=1)
    Connector(config).save(tmp_path / "a")
    models = [
        f"lmm={seeing_folder}",
        f"image_model={stable_diffusion_folder}",
        f"init_from={tmp_path / 'a'}",
        "heads=2",
    ]
    with pytest.raises(ValueError, match="of another size: give width=16 layers=1$"):
        recipe.build(apply_overrides(recipe.config(), models))
    recipe.build(apply_overrides(recipe.config(), [*models, "width=16", "layers=1"]))  # length: the pipeline says


def test_pictures_are_read_for_their_captions(recipe: ModuleType, emoji_font: Path) -> None:
    read = [recipe.CaptionDataset(0, 0.5)[i] for i in range(8)]
    assert {bool(document.images()) for document, _ in read} == {True, False} and all(words for _, words in read)


def test_the_command(
    seeing_folder: Path,
    stable_diffusion_folder: Path,
    composed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, where = (
        tmp_path / "out.png",
        ["--lmm", str(seeing_folder), "--model", str(stable_diffusion_folder), "--device", "cpu"],
    )
    small = ["--steps", "2", "--size", "32x32", "-o", str(out)]
    assert cli.main(["generate", "a red dog", *small, *where, "--connector", str(composed)]) == 0 and out.exists()
    assert (
        cli.main(["edit", str(out), "a hill", *small[4:], *where, "--dtype", "bfloat16", "--connector", str(composed)])
        == 0
    )
    assert cli.main(["info", *where, "--connector", str(composed)]) == 0
    assert "77 embeddings of 32" in capsys.readouterr().out
    assert (
        cli.main(["generate", "a", *small, "--model", str(stable_diffusion_folder), "--connector", str(composed)]) == 2
    )
    assert "--lmm" in capsys.readouterr().err
    assert cli.main(["generate", "a", *small, *where, "--adapter", str(composed)]) == 2
    assert "--adapter is called --connector now" in capsys.readouterr().err
    with pytest.raises(TypeError, match=r"load\(\): the argument 'adapter' is called 'connector' now"):
        unigen.load(lmm="a", image_model="b", adapter="c")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"input_dim": 48}, "reads states of width 48, the lmm has 32"),
        ({"output_dim": 24}, "embeddings of width 24, the pipeline takes 32"),
        ({"max_length": 10}, "so many of them: 10, the pipeline takes 77"),
        ({"pooled_dim": 8}, "pooled one of width 8, the pipeline takes 0"),
        ({"variable_length": True}, "how many count: True, for the pipeline it is False"),
    ],
)
def test_a_connector_of_another_pair(
    changed: dict[str, Any], reason: str, seeing_folder: Path, stable_diffusion_folder: Path, tmp_path: Path
) -> None:
    settings = {"input_dim": 32, "output_dim": 32, "max_length": 77, "width": 16, "heads": 2, "layers": 1}
    Connector(ConnectorConfig(**settings | changed)).save(tmp_path / "a")
    with pytest.raises(ValueError, match=f"does not fit these models: .*{reason}") as caught:
        unigen.load(
            device="cpu",
            lmm=str(seeing_folder),
            image_model=str(stable_diffusion_folder),
            connector=str(tmp_path / "a"),
        )
    assert "\n" not in str(caught.value)


def corrupt_file(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (corrupt_file, "cannot be read"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot be read"),
        (lambda f: (f / "config.json").unlink(), "is missing"),
        (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "is not a connector's"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
        (lambda f: edit_config(f, layers=1), "does not fit the model: .* unknown: layers.1"),
        (lambda f: edit_config(f, heads=3), "multiple of its heads"),
    ],
)
def test_a_damaged_connector(damage: Any, reason: str, composed: Path, tmp_path: Path) -> None:
    shutil.copytree(composed, tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(ValueError, match=reason) as caught:
        load_connector(tmp_path / "a")
    assert "\n" not in str(caught.value)


def edit_config(folder: Path, **changed: Any) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))


def test_what_cannot_be_joined(
    recipe: ModuleType,
    causal_lm_folder: Path,
    stable_diffusion_folder: Path,
    dit_folder: Path,
    janus_folder: Path,
    composed: Path,
    tmp_path: Path,
) -> None:
    for generator, reason in ((dit_folder, "does not take prompt embeddings"), (janus_folder, "diffusers pipeline")):
        with pytest.raises(ValueError, match=reason):
            unigen.load(device="cpu", lmm=str(causal_lm_folder), image_model=str(generator), connector=str(composed))
    with pytest.raises(ValueError, match="both lmm, which reads, and image_model, which draws"):
        unigen.load(device="cpu", connector=str(composed))
    with pytest.raises(ValueError, match="is missing"):  # before models that may be large are looked for
        unigen.load(device="cpu", lmm="no such", image_model="no such", connector=str(causal_lm_folder / ".."))
    with pytest.raises(ValueError, match="does not answer with text"):
        unigen.load(
            device="cpu",
            lmm=str(stable_diffusion_folder),
            image_model=str(stable_diffusion_folder),
            connector=str(composed),
        )
    showo_case.checkpoint(tmp_path)
    with pytest.raises(ValueError, match="cannot be the lmm of a connector: it reads no words without a picture"):
        unigen.load(device="cpu", lmm=str(tmp_path), image_model=str(stable_diffusion_folder), connector=str(composed))
    with pytest.raises(ValueError, match="cannot be the lmm of a connector"):
        recipe.build(apply_overrides(recipe.config(), [f"lmm={tmp_path}", f"image_model={stable_diffusion_folder}"]))
    for wrong, reason in (([], "name both models"), ([f"image_model={janus_folder}"], "diffusers pipeline")):
        with pytest.raises(ValueError, match=reason):
            recipe.build(apply_overrides(recipe.config(), [*wrong, *([f"lmm={causal_lm_folder}"] if wrong else [])]))
