"""LlamaGen against its official code: what its Transformer, its `generate` and its VQ-16 made of the same tensors.

The goldens are made from `checkpoint` by the official code:
    UNIGEN_REFERENCE_LLAMAGEN=<LlamaGen> python scripts/parity.py llamagen --goldens
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import unigen
from tests.parity import common
from tests.parity.common import ParityRow, max_error, mismatch_share
from unigen.document import Segment
from unigen.generators import next_token
from unigen.models import llamagen
from unigen.tokenizers import vqgan
from unigen.utils.files import save_json

SIDE, CODES, CLASSES, WIDTH, LAYERS = 32, 256, 10, 128, 2
SIZE, PROMPT = (SIDE, SIDE), 7
CLI_ARGUMENTS = ["--class", "7"]
LABELS = (7, 3)
SCALE, TOP_K, TOP_P, SEED = 4.0, 100, 0.95, 5
GOLDEN = common.GOLDENS / "llamagen.safetensors"


def image_tokenizer_tensors() -> dict[str, Tensor]:
    config = vqgan.VQGANConfig(SIDE, (32, 32, 64), 2, 16, 8, CODES, attention=True, l2_normalize=True)
    return common.randomize_state(vqgan.to_public(vqgan.VQGAN(config), "llamagen"), seed=1, scale=1.4)


Shapes = dict[str, tuple[int, ...]]


def tensors(condition: Shapes | None = None) -> dict[str, Tensor]:
    """Of the official Transformer, random. condition: what it is told by, if not by classes."""
    wide = 512  # 2/3 of 4 widths, up to a multiple of 256
    shapes: Shapes = {
        **(condition or {"cls_embedding.embedding_table.weight": (CLASSES + 1, WIDTH)}),
        "tok_embeddings.weight": (CODES, WIDTH),
        "norm.weight": (WIDTH,),
        "output.weight": (CODES, WIDTH),
    }
    for layer in range(LAYERS):
        shapes |= {
            f"layers.{layer}.attention.wqkv.weight": (3 * WIDTH, WIDTH),
            f"layers.{layer}.attention.wo.weight": (WIDTH, WIDTH),
            f"layers.{layer}.feed_forward.w1.weight": (wide, WIDTH),
            f"layers.{layer}.feed_forward.w3.weight": (wide, WIDTH),
            f"layers.{layer}.feed_forward.w2.weight": (WIDTH, wide),
            f"layers.{layer}.attention_norm.weight": (WIDTH,),
            f"layers.{layer}.ffn_norm.weight": (WIDTH,),
        }
    return common.randomize_state({name: torch.empty(shape) for name, shape in shapes.items()}, seed=2, scale=2.0)


def checkpoint(folder: Path) -> None:
    """The two files of the public layout, with random weights."""
    torch.save({"model": tensors()}, folder / f"c2i_T_{SIDE}.pt")
    save_json(folder / "config.json", {"n_head": WIDTH // 64})  # no published model is so narrow
    torch.save({"model": image_tokenizer_tensors()}, folder / llamagen.TOKENIZERS["c2i"])


def make_goldens(folder: Path) -> None:
    """Codes by the official `generate`, guided logits by the official forward pass, pixels by the official VQ."""
    with common.importable(folder):
        from autoregressive.models import generate as sampler  # type: ignore[import-not-found]
        from autoregressive.models import gpt
    grid = SIDE // 4
    args = gpt.ModelArgs(
        dim=WIDTH, n_layer=LAYERS, n_head=WIDTH // 64, num_classes=CLASSES, vocab_size=CODES, block_size=grid * grid
    )
    model = gpt.Transformer(args).eval()
    model.load_state_dict(tensors())
    outputs: dict[str, Tensor] = {}
    torch.backends.cuda.sdp_kernel = lambda **_: nullcontext()  # the script sets CUDA's kernels
    for label in LABELS:
        for name, options in (("greedy", {"sample_logits": False}), ("sampled", {"top_k": TOP_K, "top_p": TOP_P})):
            torch.manual_seed(SEED * 1_000_003 + 1)
            with torch.no_grad():
                codes = sampler.generate(model, torch.tensor([label]), grid * grid, cfg_scale=SCALE, **options)
            outputs[f"{name}.{label}"] = codes[0].long()
    for block in model.layers:
        block.attention.kv_cache = None
    with torch.no_grad():
        codes = outputs[f"greedy.{LABELS[0]}"][:-1].repeat(2, 1)
        labels = torch.tensor([LABELS[0], CLASSES])
        cond_ids, blind = model(codes, labels, torch.arange(grid * grid))[0]
        outputs["logits"] = blind + SCALE * (cond_ids - blind)
    outputs["pixels"] = official_pixels(folder, outputs[f"sampled.{LABELS[0]}"])
    save_file(outputs, GOLDEN)


@torch.no_grad()
def official_pixels(folder: Path, codes: Tensor) -> Tensor:
    """Of codes (h w,), by the official VQ."""
    with common.importable(folder):
        from tokenizer.tokenizer_image.vq_model import Decoder, Encoder, ModelArgs, VQModel  # type: ignore
    vq = VQModel(ModelArgs(z_channels=16, codebook_size=CODES, codebook_embed_dim=8))
    vq.encoder, vq.decoder = (kind(ch=32, ch_mult=(1, 1, 2), z_channels=16) for kind in (Encoder, Decoder))
    vq.load_state_dict(image_tokenizer_tensors() | {"quantize.codebook_used": vq.quantize.codebook_used})
    return vq.eval().decode_code(codes[None], [1, 8, SIDE // 4, SIDE // 4])  # type: ignore[no-any-return]


def rows(folder: Path) -> Iterator[ParityRow]:
    engine, golden = unigen.load(str(folder), device="cpu"), load_file(GOLDEN)
    grid, reference_name = SIDE // 4, "the official Transformer and generate (goldens)"
    mistake, parts = "the condition turned like a code", ("greedy", "sampled")
    places = [0, 1, grid - 1, grid * grid - 1]
    logits: dict[bool, Tensor] = {}
    sampled_ids: dict[tuple[str, bool], list[int]] = {}
    for turned in (False, True):
        with with_wrong_rotary(engine.model, turned):
            with common.record_logits(next_token) as steps:
                engine.generate(LABELS[0], temperature=0.0, guidance=SCALE)
            logits[turned] = torch.stack([steps[position][0] for position in places])
            for part, options in zip(parts, ({"temperature": 0.0}, {"top_k": TOP_K, "top_p": TOP_P}), strict=True):
                codes: list[int] = []
                for label in LABELS:
                    request = engine.build_request(Segment(label=label), "image", seed=SEED, guidance=SCALE, **options)
                    list(engine.run_requests([request]))
                    image = request.document.segments[-1].image
                    assert isinstance(image, Tensor)
                    codes += image.flatten().tolist()
                sampled_ids[part, turned] = codes
    reference_values = golden["logits"][places]
    yield ParityRow(
        "llamagen logits",
        max_error(logits[False], reference_values),
        max_error(logits[True], reference_values),
        mistake,
        reference_name,
    )
    for part in parts:
        expected_ids = [int(code) for label in LABELS for code in golden[f"{part}.{label}"]]
        assert len(set(expected_ids)) >= 32, f"too few different codes: {len(set(expected_ids))}"
        control = mismatch_share(sampled_ids[part, True], expected_ids)
        yield ParityRow(
            f"llamagen {part} ids",
            mismatch_share(sampled_ids[part, False], expected_ids),
            control,
            mistake,
            reference_name,
        )
    codes_1hw = golden[f"sampled.{LABELS[0]}"].reshape(1, grid, grid)
    tokenizer = engine.model.image_tokenizer
    outputs, wrong_BCHW = tokenizer.decode(codes_1hw), tokenizer.decode(codes_1hw.transpose(1, 2))
    reference_values = golden["pixels"].clamp(-1, 1)
    reference_name = "the official VQ-16 (goldens)"
    yield ParityRow(
        "llamagen codes to pixels",
        max_error(outputs, reference_values),
        max_error(wrong_BCHW, reference_values),
        "columns for rows",
        reference_name,
    )


class with_wrong_rotary:  # noqa: N801
    """The mistake of the control: the identity for the condition's zeros, where `on`."""

    def __init__(self, model: Any, on: bool) -> None:
        self.rotary, self.on = model.backbone.lm.model.rotary_emb, on

    def __enter__(self) -> None:
        if self.on:
            self.rotary.cos[0] = 1.0

    def __exit__(self, *_: Any) -> None:
        self.rotary.cos[0] = 0.0
