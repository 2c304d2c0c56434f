"""The image tokenizer: quantizers against their definitions, revival, saving, shapes, losses, and learning."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unigen.nn.perceptual import LPIPS
from unigen.tokenizers import load_image_tokenizer, save_tokenizer
from unigen.tokenizers.measure import evaluate_tokenizer, perplexity, psnr
from unigen.tokenizers.quantize import FSQ, LFQ, Quantizer, VectorQuantizer, channels_last
from unigen.tokenizers.vq import VQConfig, VQTokenizer, from_config
from unigen.training.vq_objective import VQLossConfig, VQObjective, VQTraining, adaptive_weight, pixel_loss

TINY = {
    "codebook_size": 64,
    "channels": 16,
    "decoder_channels": 32,
    "wide_channels": 32,
    "encoder_blocks": (1, 1),
    "decoder_blocks": (1, 1),
}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny(**changes: object) -> VQTokenizer:
    torch.manual_seed(0)
    return VQTokenizer(VQConfig(**{**TINY, **changes}))  # type: ignore[arg-type]


def pictures(n: int = 8, size: int = 64) -> dict[str, torch.Tensor]:
    """Coloured squares on coloured grounds, with their masks."""
    g = rng(1)
    x = (torch.rand(n, 3, 1, 1, generator=g) * 2 - 1).expand(n, 3, size, size).clone()
    masks = torch.zeros(n, 1, size, size)
    for i in range(n):
        row, column = torch.randint(0, size - 24, (2,), generator=g).tolist()
        x[i, :, row : row + 24, column : column + 24] = torch.rand(3, 1, 1, generator=g) * 2 - 1
        masks[i, :, row : row + 24, column : column + 24] = 1
    return {"pixels": x, "masks": masks}


def quantizers() -> list[Quantizer]:
    torch.manual_seed(0)
    return [VectorQuantizer(32, 4), FSQ((8, 5, 5, 5)), FSQ((2, 3)), LFQ(6)]


# ---------------------------------------------------------------- quantizers


@pytest.mark.parametrize("quantizer", quantizers(), ids=lambda q: f"{type(q).__name__}-{q.size}")
def test_every_code_is_its_own_vectors_code(quantizer: Quantizer) -> None:
    codes = torch.arange(quantizer.size).reshape(1, 1, -1)
    vectors = quantizer.to_vectors(codes)
    assert vectors.shape == (1, quantizer.dim, 1, quantizer.size)
    assert torch.equal(quantizer.to_codes(vectors), codes)
    assert len(channels_last(vectors).reshape(-1, quantizer.dim).unique(dim=0)) == quantizer.size


@pytest.mark.parametrize("quantizer", quantizers(), ids=lambda q: f"{type(q).__name__}-{q.size}")
def test_straight_through(quantizer: Quantizer) -> None:
    """Value of the code's vector, gradient of the features as the quantizer compares them."""
    z = torch.randn(2, quantizer.dim, 3, 3, generator=rng(), requires_grad=True)
    weight = torch.randn(2, quantizer.dim, 3, 3, generator=rng(1))
    out = quantizer(z)
    torch.testing.assert_close(out.vectors_BDhw, quantizer.to_vectors(out.codes_Bhw))
    got = torch.autograd.grad((out.vectors_BDhw * weight).sum(), z)[0]
    wanted = torch.autograd.grad((quantizer.normalize(z) * weight).sum(), z)[0]
    torch.testing.assert_close(got, wanted)
    assert got.abs().sum() > 0


@pytest.mark.parametrize("quantizer", quantizers(), ids=lambda q: f"{type(q).__name__}-{q.size}")
def test_codes_out_of_range_are_refused(quantizer: Quantizer) -> None:
    for bad in (-1, quantizer.size):
        with pytest.raises(ValueError, match="codes must be in"):
            quantizer.to_vectors(torch.full((1, 2, 2), bad))


def test_lookup_equals_brute_force_cosine() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(50, 8)
    quantizer.codebook.data *= torch.rand(50, 1) * 10  # lengths must not matter
    z = torch.randn(3, 8, 4, 5) * 7
    cosine = F.cosine_similarity(z.permute(0, 2, 3, 1)[..., None, :], quantizer.codebook, dim=-1)
    assert torch.equal(quantizer(z).codes_Bhw, cosine.argmax(-1))
    torch.testing.assert_close(quantizer(z).vectors_BDhw.norm(dim=1), torch.ones(3, 4, 5))


def test_finite_scalar_reaches_every_level_and_no_more() -> None:
    quantizer = FSQ((8, 5, 5, 5))
    assert quantizer.size == 1000
    z = torch.linspace(-9, 9, 2001).reshape(1, 1, 1, -1).expand(1, 4, 1, -1)
    vectors = quantizer(z).vectors_BDhw
    assert [len(vectors[0, i].unique()) for i in range(4)] == [8, 5, 5, 5]
    assert vectors.abs().max() <= 1


def test_lookup_free_is_the_sign() -> None:
    z = torch.randn(2, 6, 3, 3, generator=rng())
    assert torch.equal(LFQ(6)(z).vectors_BDhw.sign(), z.sign())


def test_entropy_rewards_spread_codes() -> None:
    quantizer = LFQ(4, entropy=1.0)
    spread = channels_last(quantizer.to_vectors(torch.arange(16).reshape(1, 4, 4))).permute(0, 3, 1, 2) * 3
    same = torch.full((1, 4, 4, 4), 3.0)
    (a, n), (b, _) = quantizer(spread).losses["entropy"], quantizer(same).losses["entropy"]
    assert a / n < b / n - 2  # log 16 = 2.77 nats apart at best


def test_commitment_and_codebook_gradients() -> None:
    """The codebook learns from "codebook" alone, the features from "commit" alone."""
    quantizer = VectorQuantizer(16, 4)
    z = torch.randn(1, 4, 4, 4, generator=rng(), requires_grad=True)
    losses = quantizer(z).losses
    assert torch.autograd.grad(losses["codebook"][0], z, allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(losses["commit"][0], quantizer.codebook, allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(losses["codebook"][0], quantizer.codebook)[0].abs().sum() > 0
    torch.testing.assert_close(losses["commit"][0], 0.25 * losses["codebook"][0])


# ---------------------------------------------------------------- revival


def clustered(n: int = 512) -> torch.Tensor:
    """Features near two directions, so that most random codes die."""
    z = torch.randn(n, 4, generator=rng(3)) * 0.2
    z[: n // 2, 0] += 1
    z[n // 2 :, 1] += 1
    return z.T.reshape(1, 4, 1, n)


def used_after(revive_every: int, steps: int = 60) -> int:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(64, 4, revive_every=revive_every, dead_below=0.1, momentum=0.8)
    generator = rng(5)
    for _ in range(steps):
        quantizer(clustered(), generator)
    return len(quantizer(clustered()).codes_Bhw.unique())


def test_revival_revives_and_off_it_does_not() -> None:
    without, with_ = used_after(0), used_after(5)
    assert without < 40 < 58 < with_


def test_revival_is_seeded_and_its_state_is_saved() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        quantizer = VectorQuantizer(64, 4, revive_every=5, momentum=0.8)
        generator = rng(5)
        for _ in range(20):
            quantizer(clustered(), generator)
        states.append(quantizer.state_dict())
    assert set(states[0]) == {"codebook", "usage_K", "steps"}
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert int(states[0]["steps"]) == 20


def test_nothing_moves_in_eval_or_without_gradient() -> None:
    quantizer = VectorQuantizer(64, 4, revive_every=1, momentum=0.1)
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    with torch.no_grad():
        quantizer(clustered(), rng())
    quantizer.eval()(clustered(), rng())
    assert all(torch.equal(before[name], tensor) for name, tensor in quantizer.state_dict().items())
    quantizer.train()(clustered(), rng())
    assert not torch.equal(before["usage_K"], quantizer.usage_K)


# ---------------------------------------------------------------- the tokenizer


@pytest.mark.parametrize("kind", ["vq", "fsq", "lfq"])
@pytest.mark.parametrize("size", [64, 96])
def test_shapes(kind: str, size: int) -> None:
    tokenizer = tiny(quantizer=kind, image_size=size).eval()
    x = pictures(2, size)["pixels"]
    codes = tokenizer.encode(x)
    assert codes.shape == (2, *tokenizer.grid) == (2, size // 8, size // 8) and codes.dtype == torch.int64
    assert 0 <= codes.min() and codes.max() < tokenizer.codebook_size
    y = tokenizer.decode(codes)
    assert y.shape == x.shape and y.dtype == torch.float32 and y.min() >= -1 and y.max() <= 1


def test_other_sizes_than_trained_and_bad_ones() -> None:
    tokenizer = tiny().eval()
    assert tokenizer.encode(torch.zeros(1, 3, 96, 32)).shape == (1, 12, 4)
    for bad in (torch.zeros(1, 3, 60, 64), torch.zeros(3, 64, 64), torch.zeros(1, 1, 64, 64)):
        with pytest.raises(ValueError, match="multiples of 8"):
            tokenizer.encode(bad)


def test_a_picture_has_the_same_codes_alone_and_in_a_batch() -> None:
    tokenizer = tiny().eval()
    x = pictures(6)["pixels"] + 0.1 * torch.randn(6, 3, 64, 64, generator=rng())
    together = tokenizer.encode(x)
    assert torch.equal(together, tokenizer.encode(x))
    alone = torch.cat([tokenizer.encode(x[i : i + 1]) for i in range(6)])
    assert torch.equal(together, alone)
    pixels = torch.cat([tokenizer.decode(together[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(tokenizer.decode(together), pixels, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["vq", "fsq", "lfq"])
def test_save_and_load_bit_for_bit(kind: str, tmp_path: object) -> None:
    tokenizer = tiny(quantizer=kind).eval()
    folder = save_tokenizer(tokenizer, f"{tmp_path}/tok")
    loaded = load_image_tokenizer(folder)
    assert not loaded.training and loaded.config() == tokenizer.config()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in tokenizer.state_dict().items())
    x = pictures(3)["pixels"]
    assert torch.equal(loaded.encode(x), tokenizer.encode(x))
    half = load_image_tokenizer(save_tokenizer(tokenizer, f"{tmp_path}/half", dtype=torch.bfloat16))
    assert next(half.parameters()).dtype == torch.float32


def test_frozen_codes_train_the_decoder_alone() -> None:
    tokenizer, batch = tiny(), pictures(4)
    codes, before = tokenizer.encode(batch["pixels"]), tokenizer.decode(tokenizer.encode(batch["pixels"]))
    tokenizer.freeze_codes()
    model = VQTraining(tokenizer)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = VQObjective()(model, batch, rng())
    assert "commit" not in losses
    total(losses).backward()
    optimizer.step()
    assert torch.equal(tokenizer.encode(batch["pixels"]), codes)
    assert not torch.equal(tokenizer.decode(codes), before)
    assert all(p.grad is None for p in [*tokenizer.encoder.parameters(), *tokenizer.quantizer.parameters()])


def test_broken_folders_are_said_plainly(tmp_path: object) -> None:
    folder = save_tokenizer(tiny(), f"{tmp_path}/tok")
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(ValueError, match="config.json is missing"):
        load_image_tokenizer(f"{tmp_path}/nowhere")
    for change, message in [
        ({"kind": "nothing"}, "kind 'nothing'"),
        ({"wide_channels": 64}, "does not fit"),
        ({"depth": 1}, "depth"),
    ]:
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            load_image_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        load_image_tokenizer(folder)


@pytest.mark.parametrize(
    "bad",
    [
        {"image_size": 60},
        {"quantizer": "rvq"},
        {"quantizer": "lfq", "codebook_size": 1000},
        {"quantizer": "fsq", "levels": (8, 1)},
        {"codebook_size": 1},
        {"channels": 20},
        {"beta": float("nan")},
        {"revive_every": -1},
        {"decoder_blocks": (1,)},
    ],
    ids=str,
)
def test_bad_config(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        VQConfig(**bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        from_config(json.loads(json.dumps({**TINY, **bad})))


# ---------------------------------------------------------------- losses and measures


def total(losses: dict[str, tuple[torch.Tensor, torch.Tensor | int]]) -> torch.Tensor:
    return torch.stack([s / c for name, (s, c) in losses.items() if not name.startswith("metric/")]).sum()


def test_pixel_loss_weighs_objects() -> None:
    batch = pictures(2)
    config = VQLossConfig(l1=1, l2=0, object_weight=4)
    inside, outside = batch["masks"], 1 - batch["masks"]
    a, n = pixel_loss(batch["pixels"] + 0.1 * inside, batch["pixels"], batch["masks"], config)
    b, _ = pixel_loss(batch["pixels"] + 0.1 * outside, batch["pixels"], batch["masks"], config)
    torch.testing.assert_close(a, 0.1 * 4 * 3 * inside.sum())
    torch.testing.assert_close(b, 0.1 * 3 * outside.sum())
    torch.testing.assert_close(n, 3 * (4 * inside.sum() + outside.sum()))


def test_adaptive_weight_formula() -> None:
    last = nn.Parameter(torch.tensor([3.0, 4.0]))
    reconstruction, generator = (last * torch.tensor([3.0, 4.0])).sum(), (last * torch.tensor([0.0, 2.0])).sum()
    assert float(adaptive_weight(reconstruction, generator, last)) == pytest.approx(5 / (2 + 1e-4))
    assert float(adaptive_weight(reconstruction, 0 * generator, last)) == pytest.approx(1e4)  # clamped


def test_gan_trains_each_side_on_its_own_loss_only() -> None:
    model = VQTraining(tiny(), gan=True).train()
    assert model.discriminator is not None
    objective = VQObjective(VQLossConfig(gan=0.5, gan_start=10))
    judge, decoder = list(model.discriminator.parameters()), model.tokenizer.decoder.last.weight
    early = objective(model, pictures(2), rng())
    assert "gan" not in early and "discriminator" in early
    objective.step = 10
    losses = objective(model, pictures(2), rng())
    nn.init.normal_(judge[-2])
    losses = objective(model, pictures(2), rng())
    grads = torch.autograd.grad(losses["gan"][0], [*judge, decoder], retain_graph=True, allow_unused=True)
    assert all(g is None for g in grads[:-1]) and grads[-1].abs().sum() > 0
    grads = torch.autograd.grad(losses["discriminator"][0], [*judge, decoder], allow_unused=True)
    assert all(g is not None for g in grads[:-1]) and grads[-1] is None


def test_feature_loss_and_missing_networks() -> None:
    def features(x: torch.Tensor) -> list[torch.Tensor]:
        return [F.avg_pool2d(x, 4), F.avg_pool2d(x, 8)]

    model = VQTraining(tiny())
    losses = VQObjective(VQLossConfig(feature=2.0), features=features)(model, pictures(2), rng())
    assert losses["feature"][0] > 0 and losses["feature"][1] == 2
    for config in (VQLossConfig(feature=1), VQLossConfig(lpips=1)):
        with pytest.raises(ValueError, match="needs"):
            VQObjective(config)
    with pytest.raises(ValueError, match="gan"):
        VQLossConfig(gan=float("inf"))


def test_lpips_from_a_local_file(tmp_path: object) -> None:
    """Random VGG weights under torchvision's and lpips' names; zero for equal pictures; missing weights are named."""
    torch.manual_seed(0)
    named = {}
    for name, tensor in LPIPS().state_dict().items():
        outer = f"lin{name[5]}.model.1.weight" if name.startswith("lins") else f"net.{name}"
        named[outer] = tensor.abs() if name.startswith("lins") else tensor
    torch.save(named, f"{tmp_path}/lpips.pt")
    lpips = LPIPS.from_file(f"{tmp_path}/lpips.pt")
    x = pictures(2, 32)["pixels"]
    assert torch.equal(lpips(x, x), torch.zeros(2))
    assert (lpips(x, -x) > 0).all() and not any(p.requires_grad for p in lpips.parameters())
    torch.save({name: tensor for name, tensor in named.items() if "lin3" not in name}, f"{tmp_path}/part.pt")
    with pytest.raises(ValueError, match="lins.3"):
        LPIPS.from_file(f"{tmp_path}/part.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        LPIPS.from_file(f"{tmp_path}/nowhere.safetensors")


def test_measures() -> None:
    assert psnr(0.01) == pytest.approx(20)
    assert float(perplexity(torch.full((8,), 1 / 8))) == pytest.approx(8)
    assert float(perplexity(torch.tensor([1.0, 0.0]))) == pytest.approx(1)

    class Half(VQTokenizer):
        """Reconstructs every picture as mid-grey."""

        def decode(self, codes_Bhw: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(codes_Bhw), 3, 64, 64)

    x, masks = torch.zeros(3, 3, 64, 64), torch.zeros(3, 1, 64, 64)
    masks[:, :, :8, :8] = 1
    x[:, :, :8, :8] = 1  # wrong by 1/2 of the range inside, by 1/255 / 2 (rounding) outside
    figures = evaluate_tokenizer(Half(VQConfig(**TINY)), x, masks, batch=2)  # type: ignore[arg-type]
    assert figures["psnr_objects"] == pytest.approx(-10 * torch.tensor(0.25).log10().item(), abs=0.1)
    assert figures["psnr"] > figures["psnr_objects"] + 10
    assert figures["usage"] * 64 + figures["dead"] == 64


@pytest.mark.parametrize("kind", ["vq", "fsq", "lfq"])
def test_learns_a_few_pictures(kind: str) -> None:
    batch = pictures(4)
    model = VQTraining(tiny(quantizer=kind))
    objective, generator = VQObjective(), rng()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0)
    before = evaluate_tokenizer(model.tokenizer, batch["pixels"], batch["masks"])
    for _ in range(120):
        optimizer.zero_grad()
        total(objective(model, batch, generator)).backward()
        optimizer.step()
    after = evaluate_tokenizer(model.tokenizer, batch["pixels"], batch["masks"])
    assert after["psnr_objects"] > max(22, before["psnr_objects"] + 6)
