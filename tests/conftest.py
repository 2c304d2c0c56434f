"""Fixtures that several test files share."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # recipes and scripts are imported from the repository's root
    sys.path.insert(0, str(ROOT))


WATCHED = ("UNIGEN_", "TQDM_", "HF_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "COLUMNS", "PATH", "HOME")
"""Beginnings of the variables of the environment that the project reads or sets. Libraries set others when they are
imported, in whichever test comes first."""


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Fails a test that leaves a variable of the environment, or a handler of a signal, changed for the next ones."""

    def state() -> dict[Any, Any]:
        variables = {name: value for name, value in os.environ.items() if name.startswith(WATCHED)}
        return variables | {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}

    before = state()
    yield
    changed = {name for name, _ in before.items() ^ state().items()}
    assert not changed, f"this test leaves {changed} changed"


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def emoji_font() -> Path:
    """The system's emoji font; the test is left out where it is missing."""
    from unigen.toyworld.world import find_font

    try:
        return find_font()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model folder of family "tiny" with random weights that writes in every way there is: 16x16 pictures of
    2x2 codes, two thin layers."""
    import torch
    from transformers import LlamaConfig

    from unigen import generators
    from unigen.generators import build
    from unigen.generators.base import BuildContext
    from unigen.model import assembly, chat_template
    from unigen.tokenizers import text
    from unigen.tokenizers.kl import KLConfig, KLTokenizer
    from unigen.tokenizers.vq import VQConfig, VQTokenizer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    words = "a the blue red horse dog apple apples two three on background how many story about witch and raven".split()
    lines = [" " + " ".join(words[i:] + words[:i]) for i in range(len(words))] * 4
    text.train_tokenizer(lines, folder / "text", 312, chat_template.SPECIAL_TOKENS)
    small: dict[str, Any] = {
        "image_size": 16,
        "codebook_size": 32,
        "channels": 16,
        "decoder_channels": 16,
        "wide_channels": 16,
    }
    small |= {"encoder_blocks": (1, 1), "decoder_blocks": (1, 1)}
    image_tokenizer = VQTokenizer(VQConfig(**small))
    scales = VQTokenizer(VQConfig(**small, quantizer="multiscale", scales=(1, 2), code_dim=4))
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    latents = KLTokenizer(KLConfig(image_size=16, channels=(16, 16), latent_channels=4))
    tokenizers_by_kind: dict[str, Any] = {"multiscale": scales, "kl": latents}
    settings: dict[str, Any] = {
        "flow": {"layers": 2, "heads": 2, "head_dim": 16, "context_length": 16},
        "token-flow": {"width": 32},
    }
    heads = [
        build.build_generator(
            name, BuildContext((2, 2), 0, config.hidden_size, tokenizers_by_kind[kind], settings.get(name, {}))
        )
        for name in generators.generator_names()
        if (kind := generators.find_generator(name).tokenizer_kind)
    ]
    writers = ("next-token", *generators.generator_names())
    model = assembly.build_from_config(config, text.load(folder / "text"), image_tokenizer, writers, heads)
    model.save(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Any:
    """An engine on random weights, spread so that what is drawn depends on what was read."""
    import torch

    import unigen

    engine = unigen.load(str(tiny_folder), device="cpu")
    rng = torch.Generator().manual_seed(1)
    for p in engine.model.parameters():
        if p.ndim > 1 and p.requires_grad:  # the heads' too, of which some begin with zeros; tokenizers are frozen
            p.data.normal_(0, 0.3, generator=rng)
    return engine


def make_vae() -> Any:
    from diffusers import AutoencoderKL

    halves = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(block_out_channels=(32, 64), latent_channels=4, sample_size=32, **halves)


@pytest.fixture(scope="session")
def stable_diffusion_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion of random weights."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz,."
    vocab = {f"{c}</w>": i for i, c in enumerate(letters)} | {c: 30 + i for i, c in enumerate(letters)}
    vocab |= {"<|startoftext|>": 60, "<|endoftext|>": 61}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)
    size = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 2}
    ids = {"bos_token_id": 60, "eos_token_id": 61, "pad_token_id": 61}
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=make_vae(), text_encoder=CLIPTextModel(CLIPTextConfig(**size, **ids, vocab_size=62)), unet=unet,
        tokenizer=tokenizer, scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("words")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DiT of random weights."""
    import torch
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000, norm_type="ada_norm_zero", norm_elementwise_affine=False,
    )  # fmt: skip
    names = {str(n): f"thing {n}" for n in range(10)}
    folder = tmp_path_factory.mktemp("classes")
    DiTPipeline(transformer, make_vae(), DDIMScheduler()).save_pretrained(folder)
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": names}))  # as the public one has them
    return folder


@pytest.fixture(scope="session")
def janus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.parity import janus as janus_case

    folder = tmp_path_factory.mktemp("janus")
    janus_case.checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def causal_lm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of transformers with a chat template, which sees nothing."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Tokenizer

    torch.manual_seed(0)
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(["a red dog on a blue hill, user assistant"] * 4, 300)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    folder = tmp_path_factory.mktemp("chat")
    tokenizer.save_pretrained(folder)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**size, vocab_size=len(tokenizer))).save_pretrained(folder)
    return folder
