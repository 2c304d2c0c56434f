"""The faster product is the same product."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unigen.nn.cpu import linear
from unigen.nn.cpu.linear import PackedLinear, fused_linears, pack_linears, packed_copy, packed_linear


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(8, 32), (32, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_linear(rows: int, shape: tuple[int, int], bias: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    weight, x = torch.randn(shape, generator=rng), torch.randn(rows, 1, shape[1], generator=rng)
    b = torch.randn(shape[0], generator=rng) if bias else None
    torch.testing.assert_close(packed_linear(x, weight, b), nn.functional.linear(x, weight, b))
    half = packed_linear(x.bfloat16(), weight.bfloat16())
    assert half.dtype == torch.bfloat16 and half.shape == (rows, 1, shape[0])


def test_modules_are_changed_in_place() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 4, bias=False)), nn.LayerNorm(4))
    x, names = torch.randn(2, 8), list(model.state_dict())
    before = model(x)
    pack_linears(model)
    assert sum(isinstance(m, PackedLinear) for m in model.modules()) == 2 and list(model.state_dict()) == names
    torch.testing.assert_close(model(x), before)


def test_a_copy_shares_its_tensors_and_leaves_the_original() -> None:
    """Also where two modules share a weight; what the original learns, the copy computes with."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 8, bias=False)).eval()
    model[2].weight = model[0].weight
    places = [p.data_ptr() for p in model.parameters()]
    twin = packed_copy(model)
    assert [type(part) for part in model] == [nn.Linear, nn.BatchNorm1d, nn.Linear]
    assert [type(part) for part in twin] == [PackedLinear, nn.BatchNorm1d, PackedLinear]
    assert all(one is other for one, other in zip(model.parameters(), twin.parameters(), strict=True))
    assert all(one is other for one, other in zip(model.buffers(), twin.buffers(), strict=True))
    assert [p.data_ptr() for p in model.parameters()] == places
    with torch.no_grad():
        model[0].weight.mul_(2)
    torch.testing.assert_close(twin(torch.ones(2, 8)), model(torch.ones(2, 8)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4, 40])
def test_what_is_kept_in_another_layout(rows: int, dtype: torch.dtype) -> None:
    """In bfloat16 bit for bit; also of some rows of the weight, and after it has changed. It goes with the weight."""
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 here")
    rng = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(shape, generator=rng).to(dtype) for shape in ((96, 64), (96,)))
    x = torch.randn(rows, 1, 64, generator=rng).to(dtype)
    with torch.inference_mode():
        for start, stop in ((0, None), (0, 32), (32, 96)):
            for _ in range(2):
                part, exact = nn.functional.linear(x, weight[start:stop], bias[start:stop]), {"atol": 0.0, "rtol": 0.0}
                near = exact if dtype == torch.bfloat16 else {"atol": 1e-4, "rtol": 1e-5}
                torch.testing.assert_close(packed_linear(x, weight, bias, start, stop), part, **near)
                weight.mul_(2)
        if dtype == torch.float32 and rows <= linear.MAX_TRANSPOSED_ROWS:
            assert weight not in linear._packed_weights
            return
        assert len(linear._packed_weights[weight]) == 3
        count = len(linear._packed_weights)
        del weight
        assert len(linear._packed_weights) == count - 1


def test_no_more_is_kept_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "MAX_PACKED_BYTES", 0)
    weight, x = torch.randn(32, 64).bfloat16(), torch.randn(2, 64).bfloat16()
    with torch.inference_mode():
        assert torch.equal(packed_linear(x, weight), nn.functional.linear(x, weight))
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert [packed for *_, packed in linear._packed_weights[weight].values()] == [None]


def test_another_tensor_in_a_parameters_place() -> None:
    module, x = nn.Linear(64, 32, bias=False).bfloat16(), torch.randn(2, 64).bfloat16()
    for _ in range(2):
        with torch.inference_mode():
            assert torch.equal(packed_linear(x, module.weight), nn.functional.linear(x, module.weight))
        module.weight.data = torch.randn(32, 64).bfloat16()


@pytest.mark.parametrize("rows", [1, 2, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_side_by_side_is_each_by_itself(rows: int, dtype: torch.dtype) -> None:
    """Also after a weight has changed, or another layer has come to stand in one's place."""
    layers = nn.ModuleList(nn.Linear(64, width, bias=False) for width in (96, 32, 32)).to(dtype)
    pack_linears(layers)
    x = torch.randn(rows, 1, 64).to(dtype)

    def check() -> None:
        with torch.inference_mode():
            near = {"atol": 0.0, "rtol": 0.0} if dtype == torch.bfloat16 else {"atol": 1e-4, "rtol": 1e-5}
            first, last = fused_linears(x, layers[:2], layers[2:])
            torch.testing.assert_close(first, torch.cat((layers[0](x), layers[1](x)), -1), **near)
            torch.testing.assert_close(last, layers[2](x), **near)

    check()
    with torch.no_grad():
        layers[1].weight.mul_(2)
    check()
    layers[2].weight.data = torch.randn(32, 64).to(dtype)
    check()
    layers[2] = nn.Linear(64, 32, bias=False).to(dtype)
    check()  # not every layer is read fast
    pack_linears(layers)
    check()


def test_layers_that_read_the_same_lie_together() -> None:
    """Their weights are parts of one tensor, and stay so where nothing else is put in their place."""
    part = nn.Module()
    for name, width in (("q_proj", 64), ("k_proj", 32), ("v_proj", 32)):
        setattr(part, name, nn.Linear(64, width, bias=False))
    layers = [part.q_proj, part.k_proj, part.v_proj]
    before = [layer.weight.clone() for layer in layers]
    assert linear._fused_view(tuple(layer.weight for layer in layers)) is None
    pack_linears(part)
    joined = linear._fused_view(tuple(layer.weight for layer in layers))
    assert joined is not None and torch.equal(joined, torch.cat(before))
    with torch.no_grad():
        part.k_proj.weight.mul_(2)
    assert torch.equal(joined[64:96], 2 * before[1])
    part.v_proj.weight.data = before[2]
    assert linear._fused_view(tuple(layer.weight for layer in layers)) is None
