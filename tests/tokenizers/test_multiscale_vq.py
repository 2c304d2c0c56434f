"""The multi-scale quantizer against VAR's, and its own health.

goldens/var_quantizer.safetensors: outputs of the official code (FoundationVision/VAR, models/quant.py,
`VectorQuantizer2(48, 6, False, 0.25, v_patch_nums=(1, 2, 3, 4, 6, 8))` in eval mode) after torch.manual_seed(0), all
parameters drawn anew from normal(0, 0.4), on features randn(2, 6, 8, 8): the inputs, the weights and what it gave.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from unigen.tokenizers.multiscale_vq import MultiscaleQuantizer
from unigen.tokenizers.vq import VQConfig, VQTokenizer

SCALES = (1, 2, 3, 4, 6, 8)


@pytest.fixture
def golden() -> dict[str, Tensor]:
    return load_file(Path(__file__).parent / "goldens" / "var_quantizer.safetensors")


@pytest.fixture
def quantizer(golden: dict[str, Tensor]) -> MultiscaleQuantizer:
    quantizer = MultiscaleQuantizer(48, 6, SCALES)
    known = {k: v for k, v in golden.items() if k == "codebook" or k.startswith("phis.")}
    quantizer.load_state_dict(quantizer.state_dict() | known)
    return quantizer.eval()


def test_equals_vars(quantizer: MultiscaleQuantizer, golden: dict[str, Tensor]) -> None:
    codes_BP = quantizer.to_codes(golden["features"])
    assert torch.equal(codes_BP, golden["codes"]) and codes_BP.unique().numel() >= 32
    torch.testing.assert_close(quantizer.to_vectors(codes_BP), golden["picture"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(quantizer.to_vectors(codes_BP[:, : 1 + 4 + 9]), golden["third"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(quantizer.scale_inputs(codes_BP), golden["inputs"], atol=1e-5, rtol=1e-5)


def test_losses_and_gradients_equal_vars(quantizer: MultiscaleQuantizer, golden: dict[str, Tensor]) -> None:
    features = golden["features"].clone().requires_grad_()
    result = quantizer(features)
    torch.testing.assert_close(result.vectors_BDhw, golden["picture"], atol=1e-5, rtol=1e-5)
    loss = (
        sum(total / count for total, count in result.losses.values()) / quantizer.dim
    )  # VAR's mean is over dimensions too
    torch.testing.assert_close(loss, golden["loss"], atol=1e-6, rtol=1e-5)
    of_features, of_codebook = torch.autograd.grad(loss, [features, quantizer.codebook])
    torch.testing.assert_close(of_features, golden["grad_features"], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(of_codebook, golden["grad_codebook"], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("trap", ["bilinear", "no phi", "last map alone"])
def test_the_traps_are_noticed(
    quantizer: MultiscaleQuantizer, golden: dict[str, Tensor], trap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if trap == "bilinear":
        plain = F.interpolate
        monkeypatch.setattr(
            F, "interpolate", lambda x, size, mode: plain(x, size=size, mode=mode.replace("bicubic", "bilinear"))
        )
    elif trap == "no phi":
        monkeypatch.setattr(quantizer, "phi", lambda k: torch.nn.Identity())
    else:
        add_scale = quantizer.add_scale
        monkeypatch.setattr(
            quantizer, "add_scale", lambda f_hat, codes, k: add_scale(torch.zeros_like(f_hat), codes, k)
        )
    assert (quantizer.scale_inputs(golden["codes"]) - golden["inputs"]).abs().max() > 1e-2


def test_scales_that_cannot_be() -> None:
    for scales in ((), (2, 2), (4, 2), (0, 2)):
        with pytest.raises(ValueError, match="growing"):
            MultiscaleQuantizer(8, 4, scales)
    with pytest.raises(ValueError, match="end at the grid's side 8"):
        VQConfig(quantizer="multiscale", scales=(1, 2, 4))
    with pytest.raises(ValueError, match="whole scales"):
        MultiscaleQuantizer(8, 4, (1, 2)).to_vectors(torch.zeros(1, 3, dtype=torch.int64))


def test_it_learns_and_its_dead_codes_are_revived() -> None:
    """In a few steps the reconstruction betters, and most codes are used, where without revival most are dead."""
    torch.manual_seed(0)
    pictures = torch.rand(24, 3, 1, 1).expand(24, 3, 16, 16) * 2 - 1
    pictures = pictures + 0.3 * torch.randn(24, 3, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    used = {}
    for revive in (2, 0):
        torch.manual_seed(1)
        config = VQConfig(
            image_size=16,
            codebook_size=32,
            code_dim=4,
            quantizer="multiscale",
            scales=(1, 2),
            revive_every=revive,
            dead_threshold=0.7,
            channels=16,
            decoder_channels=16,
            wide_channels=16,
            encoder_blocks=(1, 1),
            decoder_blocks=(1, 1),
        )
        tokenizer, rng = VQTokenizer(config).train(), torch.Generator().manual_seed(0)
        optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=3e-3)
        errors = []
        for _ in range(60):
            output = tokenizer(pictures, rng)
            error = (output.pixels_BCHW - pictures).square().mean()
            loss = error + sum(total / count for total, count in output.losses.values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            errors.append(float(error.detach()))
        assert errors[-1] < 0.5 * errors[0]
        used[revive] = tokenizer.eval().encode(pictures).unique().numel()
    assert used[2] > used[0]


def test_later_scales_mend_mistakes(quantizer: MultiscaleQuantizer, golden: dict[str, Tensor]) -> None:
    """Without mistakes codes are as ever; with them the targets of later scales are what is then missing, so that the
    picture comes nearer to the true one than by the codes of a picture without mistakes."""
    f_BDhw = golden["features"].repeat(40, 1, 1, 1)
    rng = torch.Generator().manual_seed(0)
    plain_BP = quantizer.to_codes(f_BDhw)
    for codes_BP in quantizer.encode_with_corruption(f_BDhw, 0.0, rng):
        assert torch.equal(codes_BP, plain_BP)
    wanted_BP, read_BP = quantizer.encode_with_corruption(f_BDhw, 0.6, rng)
    wrong_BP = wanted_BP != read_BP
    assert 0.2 < wrong_BP.float().mean() < 0.4
    assert wrong_BP.float().mean(1).std() > 0.1  # of some pictures more than of others
    first = quantizer.lengths[0]
    assert torch.equal(wanted_BP[:, :first], plain_BP[:, :first])  # nothing has been read before it
    assert (wanted_BP[:, first:] != plain_BP[:, first:]).float().mean() > 0.1
    last = quantizer.lengths[-1]
    early_BP = read_BP[:, :-last]

    def gap(last_BP: Tensor) -> float:
        seen_BDhw = quantizer.to_vectors(torch.cat([early_BP, last_BP], 1))
        return float((seen_BDhw - f_BDhw).square().mean().detach())

    assert gap(wanted_BP[:, -last:]) < gap(plain_BP[:, -last:])
    again = quantizer.encode_with_corruption(f_BDhw, 0.6, torch.Generator().manual_seed(1))
    assert all(map(torch.equal, again, quantizer.encode_with_corruption(f_BDhw, 0.6, torch.Generator().manual_seed(1))))


def test_dropped_scales_leave_the_first_scales_alone(quantizer: MultiscaleQuantizer, golden: dict[str, Tensor]) -> None:
    f_BDhw = golden["features"].repeat(20, 1, 1, 1).requires_grad_()
    codes_BP = quantizer.to_codes(f_BDhw)
    ends = torch.tensor(quantizer.lengths).cumsum(0).tolist()
    cut = torch.stack([quantizer.to_vectors(codes_BP[:, :end]) for end in ends])  # (K, B, D, h, w)

    def scales_of(scale_dropout: float) -> list[int]:
        quantizer.scale_dropout = scale_dropout
        got = quantizer(f_BDhw, torch.Generator().manual_seed(0)).vectors_BDhw
        (got * torch.arange(64.0).view(8, 8)).sum().backward()
        near = (cut - got).abs().flatten(2).amax(-1)
        assert near.amin(0).max() < 1e-4
        return near.argmin(0).tolist()

    quantizer.train()
    quantizer.revive_every = 0
    assert set(scales_of(0)) == {5} and set(scales_of(1)) == set(range(5))
    assert 10 <= sum(k < 5 for k in scales_of(0.5)) <= 30
    assert f_BDhw.grad is not None and f_BDhw.grad.flatten(1).abs().amin() > 0
    quantizer.eval()
    assert set(scales_of(1)) == {5}
