"""Fixtures that several test files share."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # recipes and scripts are imported from the repository's root
    sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def emoji_font() -> Path:
    """The system's emoji font; the test is left out where it is missing."""
    from unigen.data.world import find_font

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
    from unigen.generators.base import Frame
    from unigen.models import tiny
    from unigen.tokenizers import text
    from unigen.tokenizers.kl import KLConfig, KLTokenizer
    from unigen.tokenizers.vq import VQConfig, VQTokenizer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    words = "a the blue red horse dog apple apples two three on background how many story about witch and raven".split()
    lines = [" " + " ".join(words[i:] + words[:i]) for i in range(len(words))] * 4
    text.train(lines, folder / "text", 312, tiny.SPECIALS)
    small: dict[str, Any] = {"image_size": 16, "codes": 32, "channels": 16, "decoder_channels": 16, "wide": 16}
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
    own: dict[str, Any] = {"multiscale": scales, "kl": latents}
    settings: dict[str, Any] = {
        "flow": {"layers": 2, "heads": 2, "head_dim": 16, "context_length": 16},
        "token-flow": {"width": 32},
    }
    heads = [
        tiny.new_generator(name, Frame((2, 2), 0, config.hidden_size, own[kind], settings.get(name, {})))
        for name in generators.names()
        if (kind := generators.find(name).own)
    ]
    writers = ("next-token", *generators.names())
    model = tiny.create(config, text.load(folder / "text"), image_tokenizer, writers, heads)
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
