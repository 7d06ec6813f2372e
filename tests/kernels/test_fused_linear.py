"""The fused maps, in Triton's interpreter, against plain PyTorch in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

pytest.importorskip("triton")

from peptrain.adaptation import adapt
from peptrain.kernels import linear as fused
from peptrain.kernels.swiglu_mlp import FusedMLP
from peptrain.methods import BPT
from peptrain.ops import linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEAR = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}
"""Largest ||got - wanted|| / ||wanted||; bf16 rounds each number by up to 0.004 of it."""

QUICK = settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.generate])
"""No shrinking: the interpreter is slow."""

Side = st.integers(8, 150)
"""A sum of fewer numbers may be nearly zero, and its relative error anything."""
Dtype = st.sampled_from([torch.float32, torch.bfloat16])


def weights(n: int, m: int, r: int, seed: int) -> list[Tensor]:
    """W, U, V, a, b in fp64; the diagonals take both signs and are far from 0."""
    g = torch.Generator().manual_seed(seed)
    W, U, V = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((n, m), (n, r), (r, m)))
    a, b = (torch.rand(k, generator=g, dtype=torch.float64) + 0.5 for k in (n, m))
    return [W / m**0.5, U / r**0.5, V / m**0.5, a * torch.randn(n, generator=g).sign(), b]


def inputs(T: int, m: int, dtype: torch.dtype, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed + 1)
    return torch.randn(T, m, generator=g, dtype=torch.float64).to(dtype).double()


def gradients(call, x: Tensor, params: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradients of everything but W, for one fixed direction."""
    leaves = [x.detach().to(DEVICE, dtype, copy=True).requires_grad_()]
    for p in params:
        wide = torch.promote_types(dtype, torch.float32)  # the diagonals are at least fp32
        leaves.append(p.to(DEVICE, dtype if p.ndim == 2 else wide, copy=True))
    for i, leaf in enumerate(leaves[1:]):
        leaf.requires_grad_(i % 5 != 0)
    y = call(*leaves)
    direction = torch.randn(
        y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    y.backward(direction.to(y))
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)]


def assert_near(
    got: list[Tensor], wanted: list[Tensor], dtype: torch.dtype, layers: int = 1
) -> None:
    for one, other in zip(got, wanted, strict=True):
        error = (one.double() - other.double()).norm() / other.double().norm()
        assert error <= layers * NEAR[dtype]


@QUICK
@given(T=Side, n=Side, m=Side, r=st.integers(1, 40), dtype=Dtype, seed=st.integers(0, 99))
def test_bpt_linear(T: int, n: int, m: int, r: int, dtype: torch.dtype, seed: int) -> None:
    params = [p.to(dtype).double() if p.ndim == 2 else p for p in weights(n, m, r, seed)]
    x = inputs(T, m, dtype, seed)
    wanted = gradients(linear.bpt_linear, x, params, torch.float64)
    assert_near(gradients(fused.bpt_linear, x, params, dtype), wanted, dtype)


@QUICK
@given(T=Side, n=Side, m=Side, r=st.integers(1, 40), dtype=Dtype, seed=st.integers(0, 99))
def test_added_linear(T: int, n: int, m: int, r: int, dtype: torch.dtype, seed: int) -> None:
    params = [p.to(dtype).double() for p in weights(n, m, r, seed)[:3]]
    x = inputs(T, m, dtype, seed)
    wanted = gradients(linear.added_linear, x, params, torch.float64)
    assert_near(gradients(fused.added_linear, x, params, dtype), wanted, dtype)


def plain_mlp(x: Tensor, *parts: Tensor) -> Tensor:
    g, u = linear.bpt_linear(x, *parts[:5]), linear.bpt_linear(x, *parts[5:10])
    return linear.bpt_linear(torch.nn.functional.silu(g) * u, *parts[10:])


any_mlp = given(T=Side, d=Side, f=Side, r=st.integers(1, 40), dtype=Dtype, seed=st.integers(0, 99))


@settings(QUICK, max_examples=5)
@any_mlp
def test_bpt_mlp(**case: Any) -> None:
    as_the_plain_mlp(**case)


@pytest.mark.slow
@settings(QUICK, max_examples=30)
@any_mlp
def test_bpt_mlp_of_more_shapes(**case: Any) -> None:
    as_the_plain_mlp(**case)


def as_the_plain_mlp(T: int, d: int, f: int, r: int, dtype: torch.dtype, seed: int) -> None:
    shapes = ((f, d), (f, d), (d, f))
    params = [p for i, s in enumerate(shapes) for p in weights(*s, r, seed + 100 * i)]
    params = [p.to(dtype).double() if p.ndim == 2 else p for p in params]
    x = inputs(T, d, dtype, seed)
    wanted = gradients(plain_mlp, x, params, torch.float64)

    def call(x: Tensor, *parts: Tensor) -> Tensor:
        return fused.bpt_mlp(x, parts[:5], parts[5:10], parts[10:])

    assert_near(gradients(call, x, params, dtype), wanted, dtype, layers=3)


def test_more_tokens_than_one_program_sums() -> None:
    params = weights(24, 16, 4, 0)
    x = inputs(450, 16, torch.float64, 0).view(3, 150, 16)
    wanted = gradients(linear.bpt_linear, x, params, torch.float64)
    assert_near(gradients(fused.bpt_linear, x, params, torch.float32), wanted, torch.float32)


def test_a_diagonal_that_is_zero_gives_no_nan() -> None:
    params = weights(5, 4, 2, 0)
    params[3][1] = 0
    for gradient in gradients(fused.bpt_linear, torch.randn(7, 4), params, torch.float32):
        assert gradient.isfinite().all()


class MLP(nn.Module):
    """Something around three linear layers d -> f, d -> f, f -> d."""

    def __init__(self, around: Callable[..., Any], d: int = 8, f: int = 12) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(d, f, bias=False) for _ in range(2))
        self.down = nn.Linear(f, d, bias=False)
        self.around = around

    def forward(self, x: Tensor) -> Any:
        return self.around(x, self.gate, self.up, self.down)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(
    "name, around",
    [
        ("swiglu", lambda x, g, u, d: d(F.silu(g(x)) * u(x))),
        ("geglu", lambda x, g, u, d: d(F.gelu(g(x)) * u(x))),
        ("capped", lambda x, g, u, d: d(F.silu(g(x).clamp(max=7)) * u(x))),
        ("tuple", lambda x, g, u, d: (d(F.silu(g(x)) * u(x)), None)),
        ("flat", lambda x, g, u, d: d(F.silu(g(x)) * u(x)).view(*x.shape[:5], 8)),
    ],
)
def test_only_swiglu_is_fused(name: str, around: Callable[..., Any], zero: bool) -> None:
    """A zero `down`, as some models begin with, shows nothing: it is left plain."""
    mlp = MLP(around)
    if zero:
        nn.init.zeros_(mlp.down.weight)
    model = nn.Sequential(mlp).to(DEVICE)
    method = BPT(rank=2)
    adapt(model, method, steps=10)
    method.fuse(model)
    assert isinstance(mlp, FusedMLP) == (name == "swiglu" and not zero)


def test_matrices_may_be_transposed_views() -> None:
    W, U, V = weights(24, 16, 4, 0)[:3]
    x = inputs(9, 16, torch.float64, 0)
    views = [p.mT.contiguous().mT for p in (W, U, V)]
    wanted = gradients(linear.added_linear, x, [W, U, V], torch.float64)
    found = gradients(
        lambda x, *_: fused.added_linear(x, *(p.to(x) for p in views)), x, [W], torch.float32
    )
    assert_near(found[:2], wanted[:2], torch.float32)


@pytest.mark.parametrize("name", ["added_linear", "bpt_linear"])
def test_a_compiler_keeps_no_copy_of_the_weight_for_the_backward_pass(name: str) -> None:
    """It would, were both passes to ask for W + U V in the same words."""
    params = weights(24, 16, 4, 0)[: 5 if name == "bpt_linear" else 3]
    W, *rest = (p.to(DEVICE, torch.float32) for p in params)
    for p in rest:
        p.requires_grad_()
    x = inputs(8, 16, torch.float32, 0).to(DEVICE, torch.float32).requires_grad_()
    kept: list[tuple[int, int]] = []

    def pack(t: Tensor) -> Tensor:
        kept.append((tuple(t.shape), t.data_ptr()))
        return t

    torch._dynamo.reset()
    call = torch.compile(getattr(fused, name), backend="aot_eager_decomp_partition")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(x, W, *rest)
    assert kept
    assert not [at for shape, at in kept if shape in ((24, 16), (16, 24)) and at != W.data_ptr()]
