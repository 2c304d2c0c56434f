"""VAR against its official code: what its transformer, its sampler and its VAE made of the same tensors.

The goldens are made from `checkpoint` by the official code:
    UNIGEN_REFERENCE_VAR=<VAR> python scripts/parity.py var --goldens
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import unigen
from tests.parity import common
from tests.parity.common import ParityRow, max_error, mismatch_share
from unigen.document import Segment
from unigen.generators import next_scale
from unigen.models import var
from unigen.samplers.guidance import Guidance
from unigen.tokenizers import var_vq

SCALES, CODES, CLASSES, WIDTH, LAYERS = (1, 2, 4, 8), 128, 10, 128, 2
SIDE = SCALES[-1] * 16
SIZE, PROMPT = (SIDE, SIDE), 7
CLI_ARGUMENTS = ["--class", "7"]
LABELS, CFG, TOP_K, TOP_P, SEED = (7, 3, 1, 9), 4.0, 50, 0.9, 5
GOLDEN = common.GOLDENS / "var.safetensors"


def image_tokenizer_tensors() -> dict[str, Tensor]:
    config = var_vq.VARVQConfig(SCALES, (32, 32, 64, 64, 128), 2, 16, CODES)
    return common.randomize_state(var_vq.to_public(var_vq.VARVQ(config)), seed=1, scale=1.2)


def tensors(shared: bool) -> dict[str, Tensor]:
    """Of the official transformer, random; shared: with one adaLN for all blocks, as var_d36 has it."""
    count, heads = sum(side * side for side in SCALES), WIDTH // var.HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {
        "class_emb.weight": (CLASSES + 1, WIDTH),
        "pos_start": (1, 1, WIDTH),
        "pos_1LC": (1, count, WIDTH),
        "lvl_embed.weight": (len(SCALES), WIDTH),
        "word_embed.weight": (WIDTH, 16),
        "word_embed.bias": (WIDTH,),
        "head_nm.ada_lin.1.weight": (2 * WIDTH, WIDTH),
        "head_nm.ada_lin.1.bias": (2 * WIDTH,),
        "head.weight": (CODES, WIDTH),
        "head.bias": (CODES,),
    }
    if shared:
        shapes |= {"shared_ada_lin.1.weight": (6 * WIDTH, WIDTH), "shared_ada_lin.1.bias": (6 * WIDTH,)}
    for block in range(LAYERS):
        native_tokenizer: dict[str, tuple[int, ...]] = {
            "attn.mat_qkv.weight": (3 * WIDTH, WIDTH),
            "attn.q_bias": (WIDTH,),
            "attn.v_bias": (WIDTH,),
            "attn.scale_mul_1H11": (1, heads, 1, 1),
            "attn.proj.weight": (WIDTH, WIDTH),
            "attn.proj.bias": (WIDTH,),
            "ffn.fc1.weight": (4 * WIDTH, WIDTH),
            "ffn.fc1.bias": (4 * WIDTH,),
            "ffn.fc2.weight": (WIDTH, 4 * WIDTH),
            "ffn.fc2.bias": (WIDTH,),
        }
        if shared:
            native_tokenizer["ada_gss"] = (1, 1, 6, WIDTH)
        else:
            native_tokenizer |= {"ada_lin.1.weight": (6 * WIDTH, WIDTH), "ada_lin.1.bias": (6 * WIDTH,)}
        shapes |= {f"blocks.{block}.{name}": shape for name, shape in native_tokenizer.items()}
    outputs = common.randomize_state({name: torch.empty(shape) for name, shape in shapes.items()}, seed=2, scale=1.5)
    for name, size in (("class_emb.weight", 0.3), ("pos_1LC", 1.0), ("word_embed.weight", 1.0)):
        outputs[name] = size * outputs[name] / outputs[name].std()  # so that all parts of the sum are heard
    return outputs


def checkpoint(folder: Path, shared: bool = False) -> None:
    """The two files of the public layout, with random weights."""
    torch.save(tensors(shared), folder / f"var_d{LAYERS}.pth")
    torch.save(image_tokenizer_tensors(), folder / var.TOKENIZER_FILE)


def make_goldens(folder: Path) -> None:
    """Codes and logits by the official sampler, pixels by the official VAE."""
    with common.importable(folder):
        from models import var as official  # type: ignore[import-not-found]
        from models.vqvae import VQVAE  # type: ignore[import-not-found]
    vae = VQVAE(vocab_size=CODES, z_channels=16, ch=32, v_patch_nums=SCALES)
    vae.load_state_dict(vae.state_dict() | image_tokenizer_tensors())
    outputs: dict[str, Tensor] = {}
    sample = official.sample_with_top_k_top_p_
    steps: list[tuple[Tensor, Tensor]] = []

    def watched(logits_BlV: Tensor, **options: Any) -> Tensor:
        before = logits_BlV.clone()
        sampled_ids: Tensor = sample(logits_BlV, **options)
        steps.append((before[0], sampled_ids[0, :, 0]))
        return sampled_ids

    official.sample_with_top_k_top_p_ = watched
    for shared in (False, True):
        model = official.VAR(
            vae, num_classes=CLASSES, depth=LAYERS, embed_dim=WIDTH, num_heads=WIDTH // var.HEAD_DIM,
            shared_aln=shared, attn_l2_norm=True, patch_nums=SCALES, flash_if_available=False, fused_if_available=False,
        ).eval()  # fmt: skip
        model.load_state_dict(model.state_dict() | tensors(shared))
        for label in LABELS:
            for part, options in (("greedy", {"top_k": 1}), ("sampled", {"top_k": TOP_K, "top_p": TOP_P})):
                steps.clear()
                seed = SEED * 1_000_003 + 1
                pixels = model.autoregressive_infer_cfg(1, torch.tensor([label]), g_seed=seed, cfg=CFG, **options)
                name = f"{'shared' if shared else 'own'}.{part}.{label}"
                outputs[f"{name}.codes"] = torch.cat([codes for _, codes in steps])
                if part == "greedy" and label == LABELS[0]:
                    outputs[f"{name}.logits"] = torch.cat([logits[[0, -1]] for logits, _ in steps])
                elif not shared and label == LABELS[0]:
                    outputs["pixels"] = pixels * 2 - 1
    picture = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3)) * 2 - 1
    outputs["read"] = torch.cat(vae.img_to_idxBl(picture), 1)
    save_file({name: tensor.contiguous() for name, tensor in outputs.items()}, GOLDEN)


def rows(folder: Path) -> Iterator[ParityRow]:
    golden = load_file(GOLDEN)
    (folder / "shared").mkdir()
    checkpoint(folder / "shared", shared=True)
    reference_name, mistake = "the official transformer and sampler (goldens)", "guidance that does not grow"
    for kind, place in (("own", folder), ("shared", folder / "shared")):
        engine = unigen.load(str(place), device="cpu")
        sampled_ids: dict[tuple[str, bool], list[int]] = {}
        logits: dict[bool, Tensor] = {}
        for constant in (False, True):
            for part, options in (("greedy", {"temperature": 0.0}), ("sampled", {"top_k": TOP_K, "top_p": TOP_P})):
                codes: list[int] = []
                for label in LABELS:
                    with with_constant_guidance(constant), record_logits() as steps:
                        request = engine.build_request(
                            Segment(label=label), "image", seed=SEED, guidance=CFG + 1, **options
                        )
                        list(engine.run_requests([request]))
                    codes += [int(code) for _, written in steps for code in written]
                    if part == "greedy" and label == LABELS[0]:
                        logits[constant] = torch.cat([scores[[0, -1]] for scores, _ in steps])
                sampled_ids[part, constant] = codes
        reference_values = golden[f"{kind}.greedy.{LABELS[0]}.logits"]
        name = "var" if kind == "own" else "var shared"
        yield ParityRow(
            f"{name} logits",
            max_error(logits[False], reference_values),
            max_error(logits[True], reference_values),
            mistake,
            reference_name,
        )
        for part in ("greedy", "sampled"):
            expected_ids = [int(code) for label in LABELS for code in golden[f"{kind}.{part}.{label}.codes"]]
            assert len(set(expected_ids)) >= 32, f"too few different codes: {len(set(expected_ids))}"
            share = mismatch_share(sampled_ids[part, True], expected_ids)
            yield ParityRow(
                f"{name} {part} ids",
                mismatch_share(sampled_ids[part, False], expected_ids),
                share,
                mistake,
                reference_name,
            )
    tokenizer: Any = unigen.load(str(folder), device="cpu").model.image_tokenizer
    picture = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3)) * 2 - 1
    share = float((tokenizer.encode(picture) != golden["read"]).float().mean())
    control = float((tokenizer.encode((picture + 1) / 2) != golden["read"]).float().mean())
    yield ParityRow("var pixels to codes", share, control, "pixels in [0, 1]", "the official VAE (goldens)")
    codes_1P = golden[f"own.sampled.{LABELS[0]}.codes"][None]
    outputs, reference_values = tokenizer.decode(codes_1P), golden["pixels"]
    num_steps = tokenizer.decode(codes_1P[:, : 1 + 4 + 16])
    yield ParityRow(
        "var codes to pixels",
        max_error(outputs, reference_values),
        max_error(num_steps, reference_values),
        "a scale left out",
        "the official VAE (goldens)",
    )


class record_logits:  # noqa: N801
    """Logits after guidance and the codes drawn from them, scale after scale."""

    def __enter__(self) -> list[tuple[Tensor, Tensor]]:
        steps: list[tuple[Tensor, Tensor]] = []
        self.draw = next_scale.sample_shared_rng

        def watched(logits_NV: Tensor, *rest: Any) -> Tensor:
            codes_N = self.draw(logits_NV, *rest)
            steps.append((logits_NV.clone(), codes_N))
            return codes_N

        next_scale.sample_shared_rng = watched
        return steps

    def __exit__(self, *_: Any) -> None:
        next_scale.sample_shared_rng = self.draw


class with_constant_guidance:  # noqa: N801
    """The mistake of the control: one strength of guidance for all scales, where `on`."""

    def __init__(self, on: bool) -> None:
        self.on, self.combine = on, Guidance.combine

    def __enter__(self) -> None:
        if self.on:
            combine = self.combine
            Guidance.combine = lambda self, parts, weight=1.0: combine(self, parts)  # type: ignore[method-assign]

    def __exit__(self, *_: Any) -> None:
        Guidance.combine = self.combine  # type: ignore[method-assign]
