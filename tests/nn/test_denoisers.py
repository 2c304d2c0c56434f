"""Networks for a velocity: what each depends on, what it does not look at, where it begins."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from unigen.diffusion.denoiser import PromptEmbeds
from unigen.nn.attention import math_attention
from unigen.nn.denoisers import DENOISERS, DenoiserKind, build_denoiser, from_patches, to_patches

SHAPE: dict[str, Any] = {"channels": 4, "sample_size": 4, "context_dim": 24, "layers": 2, "heads": 2, "head_dim": 16}


def inputs() -> tuple[torch.Tensor, torch.Tensor, PromptEmbeds]:
    rng = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 4, 4, generator=rng), torch.randn(2, 5, 24, generator=rng)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, :3] = False  # padding
    return x, torch.tensor([0.2, 0.7]), PromptEmbeds(context * mask[:, :, None], mask)


def changed(condition: PromptEmbeds, position: int) -> PromptEmbeds:
    """The same but for one context state of each sample."""
    embeds = condition.embeds_MND.clone()
    embeds[:, position] += 1
    return PromptEmbeds(embeds, condition.mask_MN)


def network(kind: DenoiserKind, spread: float = 0.2, **changes: Any) -> Any:
    torch.manual_seed(0)
    made = build_denoiser(kind, **(SHAPE | changes)).eval()
    for p in made.parameters():
        if spread:
            torch.nn.init.normal_(p, 0, spread)
    return made


def gap(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    return (a - b).abs().amax((1, 2, 3)).tolist()


@pytest.mark.parametrize("kind", DENOISERS)
@torch.no_grad()
def test_what_it_depends_on(kind: DenoiserKind) -> None:
    model = network(kind)
    x, t, context = inputs()
    v = model(x, t, context)
    assert v.shape == x.shape
    alone = PromptEmbeds(context.embeds_MND[1:])  # none of its states is padding
    torch.testing.assert_close(model(x[1:], t[1:], alone), v[1:], atol=1e-4, rtol=1e-4)
    assert min(gap(model(x, t + 0.1, context), v)) > 1e-3
    assert min(gap(model(x + 0.1, t, context), v)) > 1e-3
    assert min(gap(model(x, t, changed(context, -1)), v)) > 1e-3
    looks = max(gap(model(x, t, changed(context, 3)), v)) > 1e-3
    assert looks == (kind != "dit-adaln")  # which has one vector only
    assert context.mask_MN is not None
    longer = PromptEmbeds(
        nn.functional.pad(context.embeds_MND, (0, 0, 3, 0), value=2.0), nn.functional.pad(context.mask_MN, (3, 0))
    )
    assert (max(gap(model(x, t, longer), v)) < 1e-4) == (kind != "mm-dit")
    unmasked = gap(model(x, t, PromptEmbeds(longer.embeds_MND)), v)  # the control: the same without a mask
    assert (max(unmasked) > 1e-3) == (kind != "dit-adaln")


@pytest.mark.parametrize("kind", DENOISERS)
def test_every_weight_learns(kind: DenoiserKind) -> None:
    model = network(kind)
    x, t, context = inputs()
    model(x, t, context).square().sum().backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # keys' biases do not change a softmax; mm-dit's last block throws away what its context asks for
    excused = ("to_k.bias", "add_k_proj.bias", "blocks.1.attn.add_q_proj", "blocks.1.attn.norm_added_q")
    assert [name for name in still if not any(part in name for part in excused)] == []
    assert all(any(layer is module for module in model.modules()) for layer in model.io_layers)


def test_what_no_network_reads_is_refused() -> None:
    model, (x, t, context) = network("dit-cross"), inputs()
    with pytest.raises(ValueError, match="DiT reads no mask of a region"):
        model(x, t, context, torch.ones(2, 1, 4, 4))
    with pytest.raises(ValueError, match="DiT reads no guidance"):
        model(x, t, context, guidance=torch.ones(2))


@pytest.mark.parametrize("kind", ["dit-adaln", "dit-cross", "dit-context"])
@torch.no_grad()
def test_a_dit_begins_at_zero(kind: DenoiserKind) -> None:
    assert not network(kind, spread=0)(*inputs()).any()


@torch.no_grad()
def test_blocks_begin_as_nothing_with_adaln_zero() -> None:
    block = network("dit-adaln", spread=0).blocks[0]
    h, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    assert torch.equal(block(h, c, None, None), h)
    torch.nn.init.normal_(block.modulation.weight)
    assert not torch.allclose(block(h, c, None, None), h, atol=1e-2)


@torch.no_grad()
def test_patches_of_two() -> None:
    x = inputs()[0]
    assert to_patches(x, 2).shape == (2, 4, 16)
    assert torch.equal(to_patches(x, 2)[:, 1], x[:, :, :2, 2:].flatten(1))  # row by row
    torch.testing.assert_close(from_patches(to_patches(x, 2), (4, 4), 2), x)
    for kind in ("mm-dit", "dit-cross"):
        x, t, context = inputs()
        assert network(kind, patch_size=2)(x, t, context).shape == x.shape
        with pytest.raises(ValueError, match="patch must divide"):
            network(kind, patch_size=3)


def test_unfused_attention_changes_nothing_but_the_kernel() -> None:
    """Outputs and gradients are the same, products stand in the fused kernel's place, and all is as before in the end,
    after an error too."""
    model, cpu = network("mm-dit"), torch.device("cpu")
    allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed
    seen = []
    for context in (nullcontext(), math_attention(cpu)):
        model.zero_grad()
        with torch.profiler.profile() as profile, context:
            out = model(*inputs())
            out.square().sum().backward()
        kernels = {event.key for event in profile.key_averages()}
        seen.append((out.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None], kernels))
    (plain, plain_grads, fused), (ours, our_grads, written_out) = seen
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(our_grads, plain_grads, rtol=1e-4, atol=1e-4)
    assert any("flash_attention" in name for name in fused) and not any("flash_attention" in n for n in written_out)
    before = allowed()
    with pytest.raises(RuntimeError, match="stopped"), math_attention(cpu):
        assert allowed()
        raise RuntimeError("stopped")
    assert allowed() == before
