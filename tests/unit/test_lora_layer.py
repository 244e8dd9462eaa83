"""The layer with an adapter: what it computes, and its gradients, against the formula taken apart."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rove.policies import lora
from rove.policies.lora import LoraLinear

ROWS, IN, RANK = 5, 12, 3
OUT = (8, 12, 6)


def layers(dtype: torch.dtype, bias: bool, scaling: float) -> list[LoraLinear]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for out in OUT:
        base = nn.Linear(IN, out, bias=bias).to(dtype).requires_grad_(False)
        made.append(layer := LoraLinear(base, RANK, scaling))
        for side in layer.pair:
            side.data.copy_(torch.randn(side.shape, generator=generator) / RANK)
    return made


def apart(x: Tensor, layer: LoraLinear) -> Tensor:
    a, b = layer.pair
    base = F.linear(x, layer.base_layer.weight, layer.base_layer.bias)
    return base + layer.scaling * F.linear(F.linear(x.to(a.dtype), a), b)


def gradients(outputs: tuple[Tensor, ...], leaves: list[Tensor]) -> list[Tensor]:
    loss = sum((i + 1) * (y.float() ** 2).sum() for i, y in enumerate(outputs))
    assert isinstance(loss, Tensor)
    return list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scaling", [1.0, 0.5])
def test_outputs_and_gradients_are_the_formulas(bias: bool, scaling: float) -> None:
    own = layers(torch.float32, bias, scaling)
    x = torch.randn(2, ROWS, IN, requires_grad=True)
    leaves = [x, *(side for layer in own for side in layer.pair)]
    together, expected = lora.linear(x, *own), tuple(apart(x, layer) for layer in own)
    for y, want in zip(together, expected, strict=True):
        torch.testing.assert_close(y, want)
    for got, want in zip(gradients(together, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want)


def test_a_residual_is_added_and_gets_its_gradient() -> None:
    layer = layers(torch.float32, True, 1.0)[1]
    x, residual = (torch.randn(ROWS, IN, requires_grad=True) for _ in range(2))
    (y,) = lora.linear(x, layer, plus=residual)
    torch.testing.assert_close(y, apart(x, layer) + residual)
    got, want = (torch.autograd.grad((z**2).sum(), (x, residual)) for z in (y, apart(x, layer) + residual))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)
    plain = nn.Linear(IN, IN)
    torch.testing.assert_close(lora.linear(x, plain, plus=residual)[0], plain(x) + residual)


def test_half_precision_weights_are_computed_with_in_half_precision_and_trained_in_float32() -> None:
    own = layers(torch.bfloat16, False, 1.0)
    x = torch.randn(ROWS, IN).bfloat16().requires_grad_()
    outputs = lora.linear(x, *own)
    assert {y.dtype for y in outputs} == {torch.bfloat16}
    leaves = [side for layer in own for side in layer.pair]
    got = gradients(outputs, leaves)
    assert {g.dtype for g in got} == {torch.float32}
    for layer in own:
        layer.float()
    want = gradients(tuple(apart(x.float(), layer) for layer in own), leaves)
    for one, other in zip(got, want, strict=True):
        assert F.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.99


def test_under_autocast_as_other_layers() -> None:
    own = layers(torch.float32, True, 1.0)
    x = torch.randn(ROWS, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = lora.linear(x, *own)
    assert {y.dtype for y in outputs} == {torch.bfloat16}
    (got,) = gradients(outputs, [x])
    (want,) = gradients(tuple(apart(x, layer) for layer in own), [x])
    assert got.dtype == torch.float32 and F.cosine_similarity(got.flatten(), want.flatten(), dim=0) > 0.99


def test_inference_sees_the_adapters_as_they_are_now() -> None:
    own = layers(torch.bfloat16, False, 1.0)
    x = torch.randn(ROWS, IN).bfloat16()
    for _ in range(2):
        with torch.no_grad():
            plain = lora.linear(x, *own)
        with torch.inference_mode(), lora.lowered(own):
            assert all(layer.low is not None for layer in own)
            for y, want in zip(lora.linear(x, *own), plain, strict=True):
                assert torch.equal(y, want)
        assert all(layer.low is None for layer in own)
        with torch.no_grad():
            for layer in own:
                layer.pair[1].add_(0.5)


def test_some_rows() -> None:
    layer = layers(torch.float32, False, 0.5)[0]
    x = torch.randn(ROWS, IN)
    torch.testing.assert_close(lora.rows(layer, x, slice(2, 5)), apart(x, layer)[:, 2:5])


def test_small_changes_to_half_precision_weights_are_not_lost() -> None:
    """An adapter beside the weights acts where the same change, added to them, would be rounded away."""
    layer = layers(torch.bfloat16, False, 1.0)[1]
    a, b = layer.pair
    with torch.no_grad():
        layer.base_layer.weight.fill_(1.0)
        a.zero_()
        a[:, 0], b[:] = 1e-2, 1e-2
        x = torch.zeros(1, IN).bfloat16()
        x[0, :2] = torch.tensor([1.0, -1.0])
        x[0, 2] = 1e-2
        base = F.linear(x, layer.base_layer.weight)
        assert torch.equal(layer.base_layer.weight, layer.base_layer.weight + (b @ a).bfloat16())
        assert not torch.equal(layer(x), base)
