"""The orthographic retraction, against its dense definition and the truncated SVD, in float64."""

from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracles import algebra
from test_riemannian import KINDS, SINGULAR_SHAPES, draw, error, factors, made_singular
from torch import Tensor
from torch.linalg import norm

from peptrain.ops import riemannian_gram
from peptrain.ops.orthographic import orthographic_step
from peptrain.ops.riemannian import riemannian_step

EXAMPLES = settings(max_examples=100, deadline=None, derandomize=True)


def one(
    B: Tensor, A: Tensor, D_B: Tensor, D_A: Tensor, lr: float, cap: float | None = None
) -> tuple[Tensor, Tensor, bool, float]:
    """The step of one pair."""
    (B,), (A,), sound, ratio = orthographic_step(B[None], A[None], D_B[None], D_A[None], lr, cap)
    return B, A, bool(sound), float(ratio)


def rate_of(share: float, B: Tensor, A: Tensor, D_B: Tensor, D_A: Tensor) -> float:
    """The lr with |lr T| = share |W|."""
    return share * float(norm(B @ A) / norm(algebra.loro_tangent(B, A, D_B, D_A)))


@EXAMPLES
@given(factors(), st.sampled_from(["adam", "raw", "zero"]), st.sampled_from([1e-3, 0.1, 0.5]))
def test_it_is_the_dense_definition(
    case: tuple[Tensor, Tensor, float, int], kind: str, share: float
) -> None:
    B, A, condition, seed = case
    assume(condition < 1e4)
    (n, r), m = B.shape, A.shape[1]
    G = draw(n, m, seed=seed + 4)
    D_B, D_A = {
        "adam": (draw(n, r, seed=seed + 5).tanh(), draw(r, m, seed=seed + 6).tanh()),
        "raw": (G @ A.T, B.T @ G),
        "zero": (0 * B, 0 * A),
    }[kind]
    lr = rate_of(share, B, A, D_B, D_A) if kind != "zero" else share
    new_B, new_A, sound, ratio = one(B, A, D_B, D_A, lr)
    U, _, Vt = torch.linalg.svd(B @ A)
    Z = B @ A - lr * algebra.loro_tangent(B, A, D_B, D_A)
    middle = U[:, :r].T @ Z @ Vt[:r].T
    inner = float(torch.linalg.cond(middle))
    expected = algebra.loro_orthographic(B, A, D_B, D_A, lr)
    normal, step = norm(expected - Z), norm(Z - B @ A)
    assume(not 0.99 < float(normal / step.clamp_min(1e-300)) < 1.01)
    assert sound == (kind == "zero" or bool(normal <= step))
    if sound:
        within = 1e-13 * (condition**2 + inner)
        assert error(new_B, new_A, expected, B @ A) < within
        assert ratio == pytest.approx(error(new_B, new_A, B @ A, B @ A), abs=within)
        widths = norm(new_B, dim=0)
        torch.testing.assert_close(norm(new_A, dim=1), widths, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["raw", "adam"])
@pytest.mark.parametrize("n, m, r", [(12, 9, 3), (9, 30, 4), (16, 40, 8)])
def test_it_is_the_svds_step_to_second_order(n: int, m: int, r: int, kind: str) -> None:
    """Half of the lr leaves an eighth of their difference: it is of third order. From W - lr P(D)
    each is apart in second order, a quarter."""
    B, A, G = draw(n, r, seed=0), draw(r, m, seed=1), draw(n, m, seed=2)
    raw = (G @ A.T, B.T @ G)
    directions = raw if kind == "raw" else (raw[0].sign(), raw[1].sign())
    lr, apart, beyond = rate_of(0.02, B, A, *directions), [], []
    for halved in range(5):
        here = lr / 2**halved
        new_B, new_A, sound, _ = one(B, A, *directions, here)
        svd_B, svd_A, *_ = riemannian_step(B, A, *directions, here)
        assert sound
        Z = B @ A - here * algebra.loro_tangent(B, A, *directions)
        apart.append(float(norm(new_B @ new_A - svd_B @ svd_A)))
        beyond.append(float(norm(new_B @ new_A - Z)))
    for many, few in pairwise(apart):
        assert many / few == pytest.approx(8, rel=0.1)
    for many, few in pairwise(beyond):
        assert many / few == pytest.approx(4, rel=0.1)


def test_no_learning_rate_leaves_the_product() -> None:
    B, A = draw(12, 3, seed=0) * 10, draw(3, 9, seed=1)
    new_B, new_A, sound, ratio = one(B, A, draw(12, 3, seed=2), draw(3, 9, seed=3), 0.0)
    assert sound and ratio == 0 and error(new_B, new_A, B @ A, B @ A) < 1e-14
    torch.testing.assert_close(new_B / norm(new_B, dim=0), B / norm(B, dim=0))


def test_another_factoring_of_the_same_matrix_takes_the_same_raw_step() -> None:
    B, A, G = draw(12, 3, seed=0), draw(3, 9, seed=1), draw(12, 9, seed=2)
    X = draw(3, 3, seed=3)
    lr = rate_of(0.2, B, A, G @ A.T, B.T @ G)
    other = (B @ X, torch.linalg.inv(X) @ A)
    steps = [one(L, R, G @ R.T, L.T @ G, lr) for L, R in ((B, A), other)]
    assert error(*steps[0][:2], steps[1][0] @ steps[1][1], B @ A) < 1e-12


@pytest.mark.parametrize("n, m, r", [(12, 9, 3), (9, 30, 9), (16, 40, 15), (1, 5, 1)])
def test_a_cap_limits_the_step(n: int, m: int, r: int) -> None:
    B, A = draw(n, r, seed=1), draw(r, m, seed=2)
    D_B, D_A = draw(n, r, seed=5).sign(), draw(r, m, seed=6).sign()
    for lr, cap in ((1e-4, 0.2), (0.1, 0.2), (0.1, 0.02), (10.0, 0.1), (0.0, 0.5)):
        new_B, new_A, sound, ratio = one(B, A, D_B, D_A, lr, cap)
        rate = algebra.loro_capped_rate(B, A, D_B, D_A, lr, cap)
        expected = algebra.loro_orthographic(B, A, D_B, D_A, rate)
        assert sound == one(B, A, D_B, D_A, rate)[2]
        if sound:
            assert error(new_B, new_A, expected, B @ A) < 1e-10
            assert ratio <= 1.42 * cap


def test_a_step_beyond_its_range_is_not_taken() -> None:
    """There it would not follow the tangent: Uᵀ Z V is nearly singular, and W' without bounds."""
    B, A = draw(12, 3, seed=0), draw(3, 9, seed=1)
    D_B, D_A = draw(12, 3, seed=2).sign(), draw(3, 9, seed=3).sign()
    found = [one(B, A, D_B, D_A, rate_of(share, B, A, D_B, D_A)) for share in (0.1, 1.0, 3.0)]
    assert found[0][2] and not found[2][2]
    assert all(ratio < 1.42 * share for (_, _, sound, ratio), share in
               zip(found, (0.1, 1.0, 3.0), strict=True) if sound)  # fmt: skip


def test_no_pair_that_may_be_singular_is_taken() -> None:
    for n, m, r in SINGULAR_SHAPES:
        for kind in [*KINDS, "both zero"]:
            B, A = made_singular(draw(n, r, seed=1), draw(r, m, seed=2), kind)
            for scale in (1e-30, 1.0, 1e15):
                low = [(x * scale).float().double() for x in (B, A, B.sign(), A.sign())]
                assert not one(*low, 0.1)[2]
    B, A = draw(20, 5, seed=1), draw(5, 15, seed=2)
    for bad in (torch.nan, torch.inf):
        assert not one(B, A, B * bad, A, 0.1)[2] and not one(B, A, B, A * bad, 0.1)[2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_all_pairs_step_in_place_but_the_refused_ones(dtype: torch.dtype) -> None:
    pairs = []
    for i, (n, m) in enumerate([(12, 9), (12, 9), (9, 12), (12, 9), (3, 9)]):
        pairs.append((draw(n, 4, seed=i).to(dtype), draw(4, m, seed=-i).to(dtype)))
    pairs[1][0].zero_()
    before = [(B.clone(), A.clone()) for B, A in pairs]
    left, ratios = riemannian_gram.gram_steps_(pairs, torch.sin, 0.02, step=orthographic_step)
    assert set(left) == {1, 4} and ratios[1] == ratios[4] == 0
    for i, ((B, A), (old_B, old_A)) in enumerate(zip(pairs, before, strict=True)):
        if i in left:
            assert torch.equal(B, old_B) and torch.equal(A, old_A)
            continue
        wide = [x.double() for x in (old_B, old_A, old_B.sin(), old_A.sin())]
        expected = algebra.loro_orthographic(*wide, 0.02)
        W = wide[0] @ wide[1]
        assert B.dtype == A.dtype == dtype
        assert error(B.double(), A.double(), expected, expected) < 2e3 * torch.finfo(dtype).eps
        assert float(ratios[i]) == pytest.approx(float(norm(expected - W) / norm(W)), rel=1e-9)
