"""The BPT linear map and its hand-written backward, against plain autograd of the dense formula."""

import pytest
import torch
import torch.nn.functional as F
from oracles import algebra
from torch import Tensor, nn

from peptrain.methods.bpt import BPTLinear
from peptrain.models.sites import Site
from peptrain.ops.linear import bpt_linear, bpt_weight
from peptrain.rng import Rng

Tensors = tuple[Tensor, ...]
SHAPES = [(7, 5, 3), (5, 7, 3), (6, 6, 6), (1, 4, 1), (4, 1, 1), (3, 5, 8)]
NAMES = ("x", "W", "U", "V", "a", "b")


def tensors(n: int, m: int, r: int, batch: tuple[int, ...], zeros: bool = False) -> Tensors:
    """x, W, U, V, a, b, all of them leaves that ask for a gradient."""
    generator = torch.Generator().manual_seed(n * 100 + m * 10 + r)
    shapes = ((*batch, m), (n, m), (n, r), (r, m), (n,), (m,))
    made = [torch.randn(*s, dtype=torch.float64, generator=generator) for s in shapes]
    if zeros:  # the gradient of a and b there is what a division by them would lose
        made[4][::2] = 0
        made[5][1::2] = 0
        made[3].zero_()
    return tuple(t.requires_grad_() for t in made)


def gradients(y: Tensor, leaves: Tensors, seed: int = 9) -> tuple[Tensor | None, ...]:
    dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.autograd.grad(y, leaves, dy.to(y.dtype), allow_unused=True)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("batch", [(4,), (2, 3), (2, 2, 3), ()])
@pytest.mark.parametrize("n, m, r", SHAPES)
def test_forward_and_gradients_are_those_of_the_dense_formula(
    n: int, m: int, r: int, batch: tuple[int, ...], zeros: bool
) -> None:
    leaves = tensors(n, m, r, batch, zeros)
    x, W, U, V, a, b = leaves
    y = bpt_linear(x, W, U, V, a, b)
    expected = algebra.bpt_forward(x, W, U, V, a, b, None)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    found, dense = gradients(y, leaves), gradients(expected, leaves)
    for name, g, right in zip(NAMES, found, dense, strict=True):
        if name == "W":
            assert g is None, "the frozen base gets no gradient"
        else:
            assert g is not None and right is not None
            torch.testing.assert_close(g, right, rtol=0, atol=1e-12, msg=f"gradient of {name}")


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("n, m, r", SHAPES)
def test_gradients_agree_with_finite_differences(n: int, m: int, r: int, zeros: bool) -> None:
    x, W, *rest = tensors(n, m, r, (2, 3), zeros)
    frozen = W.detach()
    assert torch.autograd.gradcheck(lambda x, *t: bpt_linear(x, frozen, *t), (x, *rest))


def test_a_frozen_input_is_no_obstacle() -> None:
    """The first layer of a model under test may get an x without gradient."""
    x, W, U, V, a, b = tensors(4, 5, 2, (3,))
    y = bpt_linear(x.detach(), W.detach(), U, V, a, b)
    dense = algebra.bpt_forward(x.detach(), W.detach(), U, V, a, b, None)
    for g, right in zip(gradients(y, (U, V, a, b)), gradients(dense, (U, V, a, b)), strict=True):
        torch.testing.assert_close(g, right, rtol=0, atol=1e-12)


def test_the_effective_weight_is_the_dense_one() -> None:
    x, W, U, V, a, b = (t.detach() for t in tensors(7, 5, 3, (4,)))
    weight = bpt_weight(W, U, V, a, b)
    torch.testing.assert_close(weight, algebra.bpt_effective(W, U, V, a, b), rtol=0, atol=1e-13)
    torch.testing.assert_close(bpt_linear(x, W, U, V, a, b), F.linear(x, weight))
    low = [t.bfloat16() for t in (W, U, V)]
    assert bpt_weight(*low, a.float(), b.float()).dtype == torch.float32
    assert bpt_weight(*low, a.bfloat16(), b.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n, m", [(7, 5), (5, 7)])
def test_the_layers_forward_is_linear_in_its_effective_weight(n: int, m: int, bias: bool) -> None:
    torch.manual_seed(0)
    parent = nn.Sequential(nn.Linear(m, n, bias=bias, dtype=torch.float64))
    layer = BPTLinear(Site("0", parent, m), 3, "kaiming_normal", Rng(0))
    with torch.no_grad():
        for p in (layer.V, layer.a, layer.b, *([layer.bias] if bias else [])):
            p.copy_(torch.randn(p.shape))
    x = torch.randn(2, 4, m, dtype=torch.float64)
    expected = F.linear(x, layer.effective_weight(), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    dense = algebra.bpt_forward(x, layer.weight, layer.U, layer.V, layer.a, layer.b, layer.bias)
    torch.testing.assert_close(layer(x), dense, rtol=0, atol=1e-12)


def relative(x: Tensor, right: Tensor) -> float:
    return float((x.detach().double() - right.detach()).norm() / right.detach().norm())


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_it_computes_in_bf16_and_keeps_fp32_gradients(x_dtype: torch.dtype) -> None:
    exact = tensors(48, 32, 8, (4, 6))
    dense = algebra.bpt_forward(*exact, None)
    rounded = [t.detach().float().requires_grad_() for t in exact]
    rounded[0] = exact[0].detach().to(x_dtype).requires_grad_()
    x, W, U, V, a, b = rounded
    with torch.autocast("cpu", torch.bfloat16):
        y = bpt_linear(x, W, U, V, a, b)
    assert y.dtype == torch.bfloat16
    # bf16 has 8 bits: 0.4 % for a rounding; measured 0.3 to 0.6 % here.
    assert relative(y, dense) < 0.01
    for name, p, g, right in zip(
        NAMES, rounded, gradients(y, tuple(rounded)), gradients(dense, exact), strict=True
    ):
        if name == "W":
            assert g is None
        else:
            assert g is not None and right is not None and g.dtype == p.dtype
            assert relative(g, right) < 0.015, name


def test_in_bf16_the_diagonals_stay_fp32() -> None:
    x, W, U, V, a, b = tensors(48, 32, 8, (24,))
    low = [t.detach().bfloat16().requires_grad_() for t in (x, W, U, V)]
    a32, b32 = a.detach().float().requires_grad_(), b.detach().float().requires_grad_()
    y = bpt_linear(*low, a32, b32)
    assert y.dtype == torch.bfloat16
    assert relative(y, algebra.bpt_forward(x, W, U, V, a, b, None)) < 0.015
    y.float().square().sum().backward()
    leaves = (low[0], low[2], low[3], a32, b32)
    assert [t.grad is not None and t.grad.dtype == t.dtype for t in leaves] == [True] * 5
    assert low[1].grad is None


@pytest.mark.parametrize("autocast", [False, True])
def test_the_diagonals_are_applied_unrounded(autocast: bool) -> None:
    """With W = I nothing else is rounded: y is the one rounding of a x, or of b x."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 64, generator=generator).bfloat16()
    near_1 = 1 + 0.1 * torch.randn(64, generator=generator)
    W, U, V, ones = torch.eye(64), torch.zeros(64, 2), torch.zeros(2, 64), torch.ones(64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = bpt_linear(x, W, U, V, near_1, ones)
        into = bpt_linear(x, W, U, V, ones, near_1)
    expected = (x.float() * near_1).bfloat16()
    assert torch.equal(output, expected) and torch.equal(into, expected)
