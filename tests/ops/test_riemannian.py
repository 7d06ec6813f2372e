"""LORO's exact step, its ablation and the frames they stand on, against dense float64 oracles."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracles import algebra
from torch import Tensor
from torch.linalg import norm, qr, svdvals

from peptrain.ops import riemannian_gram
from peptrain.ops.riemannian import TOLERANCE, preconditioned_step, riemannian_step
from peptrain.ops.riemannian_gram import gram_step
from peptrain.ops.spectral import balanced, orthonormal, semi_orthogonal

EXAMPLES = settings(max_examples=100, deadline=None, derandomize=True)
SINGULAR_SHAPES = [(12, 9, 3), (9, 12, 3), (7, 9, 7), (9, 7, 7), (9, 7, 12), (8, 30, 12)]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_condition(n: int, r: int, condition: float, seed: int) -> Tensor:
    """n x r with singular values from 1 down to 1 / condition, evenly on a log scale."""
    left, right = qr(draw(n, r, seed=seed))[0], qr(draw(r, r, seed=seed + 1))[0]
    return left * torch.logspace(0, -math.log10(condition), r, dtype=torch.float64) @ right


def step_of_half_its_norm(W: Tensor, tangent: Tensor, r: int) -> float:
    """The lr with ‖lr T‖ = ‖W‖ / 2; passes over a near tie of sigma_r and sigma_{r+1}, where the
    truncation is ambiguous."""
    lr = 0.5 * float(norm(W) / norm(tangent))
    sigma = svdvals(W - lr * tangent)
    assume(r == sigma.shape[0] or sigma[r] < 0.9 * sigma[r - 1])
    return lr


def error(B: Tensor, A: Tensor, expected: Tensor, W: Tensor) -> float:
    return float(norm(B @ A - expected) / norm(W))


def assert_balanced(B: Tensor, A: Tensor) -> None:
    """sigma_i(B)^2 = sigma_i(A)^2 = sigma_i(BA)."""
    sigma, r = svdvals(B @ A), min(B.shape[1], *B.shape, *A.shape)
    for factor in (B, A):
        close = svdvals(factor)[:r].square()
        torch.testing.assert_close(close, sigma[:r], rtol=0, atol=1e-12 * float(sigma[0]) + 1e-300)


@st.composite
def factors(draw_value: st.DrawFn) -> tuple[Tensor, Tensor, float, int]:
    n, m = draw_value(st.integers(1, 30)), draw_value(st.integers(1, 30))
    r = draw_value(st.integers(1, min(n, m, 9)))
    condition = 10 ** draw_value(st.floats(0, 6))
    seed = draw_value(st.integers(0, 10**6))
    B = with_condition(n, r, condition, seed)
    A = with_condition(m, r, condition, seed + 2).T * 10 ** draw_value(st.floats(-3, 3))
    return B, A, condition, seed


@EXAMPLES
@given(factors())
def test_raw_gradients_give_the_truncated_riemannian_step(
    case: tuple[Tensor, Tensor, float, int],
) -> None:
    B, A, condition, seed = case
    G = draw(B.shape[0], A.shape[1], seed=seed + 4)
    W, r = B @ A, B.shape[1]
    lr = step_of_half_its_norm(W, algebra.riemannian_gradient(B, A, G), r)
    new_B, new_A, damped, _ = riemannian_step(B, A, G @ A.T, B.T @ G, lr)
    # Measured: 2e-13 at condition 1e3, and proportional to it from there to 1e6.
    expected = algebra.loro_exact_raw(B, A, G, lr)
    assert error(new_B, new_A, expected, W) < 1e-12 * max(1, condition / 1e3)
    assert_balanced(new_B, new_A)
    assert not damped


@EXAMPLES
@given(factors())
def test_any_directions_give_the_truncated_step_along_them(
    case: tuple[Tensor, Tensor, float, int],
) -> None:
    B, A, condition, seed = case
    W, r = B @ A, B.shape[1]
    D_B, D_A = draw(*B.shape, seed=seed + 4).tanh(), draw(*A.shape, seed=seed + 5).tanh()
    outside = torch.eye(B.shape[0], dtype=B.dtype) - B @ torch.linalg.pinv(B)
    tangent = torch.linalg.pinv(B).T @ D_A + outside @ D_B @ torch.linalg.pinv(A).T
    lr = step_of_half_its_norm(W, tangent, r)
    new_B, new_A, damped, _ = riemannian_step(B, A, D_B, D_A, lr)
    expected = algebra.loro_exact_directions(B, A, D_B, D_A, lr)
    # Both factors have the condition, so W has its square: 2.5e-12 was seen at 100.
    assert error(new_B, new_A, expected, W) < 1e-11 * max(1, condition / 1e3)
    assert_balanced(new_B, new_A)
    assert not damped


@pytest.mark.parametrize("n, m, r", [*SINGULAR_SHAPES, (1, 1, 1)])
def test_no_learning_rate_leaves_the_product(n: int, m: int, r: int) -> None:
    B, A = draw(n, r, seed=0), draw(r, m, seed=1)
    new_B, new_A, *_ = riemannian_step(B, A, draw(n, r, seed=2), draw(r, m, seed=3), 0.0)
    assert new_B.shape == B.shape and new_A.shape == A.shape
    assert error(new_B, new_A, B @ A, B @ A) < 1e-14
    assert_balanced(new_B, new_A)


def made_singular(B: Tensor, A: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    B, A = B.clone(), A.clone()
    if kind in ("B dependent", "both dependent"):
        B[:, -1] = B[:, 0] - 2 * B[:, 1]
    if kind in ("A dependent", "both dependent"):
        A[-1] = A[0] + 3 * A[1]
    if kind in ("B zero", "both zero"):
        B.zero_()
    if kind in ("A zero", "both zero"):
        A.zero_()
    if kind == "B zero column":
        B[:, 1] = 0
    return B, A


KINDS = ["B dependent", "A dependent", "both dependent", "B zero column", "B zero", "A zero"]


@pytest.mark.parametrize("kind", [*KINDS, "both zero"])
@pytest.mark.parametrize("n, m, r", SINGULAR_SHAPES)
def test_singular_factors_take_the_step_of_the_pseudo_inverse(
    n: int, m: int, r: int, kind: str
) -> None:
    """Not only without NaN: the same dense formula holds with B⁺ and A⁺, for Adam's directions
    too, which do not vanish in the directions that were lost."""
    for seed in range(0, 50, 10):
        B, A = made_singular(draw(n, r, seed=seed), draw(r, m, seed=seed + 1), kind)
        G = draw(n, m, seed=seed + 2)
        D_B, D_A = draw(n, r, seed=seed + 3).sign(), draw(r, m, seed=seed + 4).sign()
        raw, adam = (G @ A.T, B.T @ G), (D_B, D_A)
        for (G_B, G_A), expected in (
            (raw, algebra.loro_exact_raw(B, A, G, 0.1)),
            (raw, algebra.loro_exact_directions(B, A, *raw, 0.1)),
            (adam, algebra.loro_exact_directions(B, A, *adam, 0.1)),
        ):
            new_B, new_A, damped, _ = riemannian_step(B, A, G_B, G_A, 0.1)
            scale = float(norm(B @ A) + norm(expected)) + 1e-300
            assert float(norm(new_B @ new_A - expected)) < 3e-13 * scale
            assert_balanced(new_B, new_A)
            assert damped


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_damped_is_said_exactly_when_a_direction_is_lost(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps

    def damped(condition: float, n: int = 20, m: int = 15, r: int = 5) -> bool:
        B = with_condition(n, r, condition, 0).to(dtype)
        A, D_B = (draw(*shape, seed=7).to(dtype) for shape in ((r, m), (n, r)))
        new_B, new_A, said, _ = riemannian_step(B, A, D_B, A, 0.1)
        assert bool(new_B.isfinite().all() and new_A.isfinite().all())
        return bool(said)

    limit = 1 / (TOLERANCE * 5**0.5 * eps)
    assert not damped(1.0) and not damped(limit / 2) and damped(limit * 2) and damped(limit * 1e6)
    assert not damped(1.0, n=5) and not damped(1.0, r=15)  # r = min(n, m) is a full factor
    assert riemannian_step(draw(4, 6, seed=1), draw(6, 9, seed=2), *(draw(4, 6, seed=3),
                           draw(6, 9, seed=4)), 0.1)[2]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "n, r, draws", [(3, 2, 400), (8, 2, 400), (8, 3, 400), (64, 8, 40), (512, 16, 5), (512, 128, 2)]
)
def test_rounding_leaves_an_exact_zero_far_below_the_tolerance(
    n: int, r: int, draws: int, dtype: torch.dtype
) -> None:
    """Holds the measurement in TOLERANCE's docstring. Measured over thousands of draws, in units
    of sqrt(r) eps: 1.34 at r = 2, 0.98 at r = 3 and 4, under 0.6 from r = 8 to r = 512."""
    worst = 0.0
    for seed in range(draws):
        rank = 1 + seed % (r - 1)
        if seed % 2:  # one column that depends on the others
            rank, B = r - 1, draw(n, r, seed=seed).to(dtype)
            B[:, -1] = B[:, :-1] @ draw(r - 1, seed=seed + 1).to(dtype)
        else:  # many
            B = draw(n, rank, seed=seed).to(dtype) @ draw(rank, r, seed=seed + 1).to(dtype)
        sigma = svdvals(qr(B)[1])
        worst = max(worst, float(sigma[rank] / sigma[0]) / torch.finfo(dtype).eps / r**0.5)
    assert worst < (1.5 if r < 8 else 0.7) < TOLERANCE / 4


def test_single_precision_is_as_good_as_single_precision_can_be() -> None:
    for seed in range(0, 200, 10):
        B = with_condition(40, 6, 100, seed)
        A, G = with_condition(30, 6, 100, seed + 2).T, draw(40, 30, seed=seed + 4)
        lr = 0.5 * float(norm(B @ A) / norm(algebra.riemannian_gradient(B, A, G)))
        low = [x.float() for x in (B, A, G @ A.T, B.T @ G)]
        new_B, new_A, damped, _ = riemannian_step(*low, lr)
        assert new_B.dtype == new_A.dtype == torch.float32 and not damped
        sigma = svdvals(B @ A - lr * algebra.riemannian_gradient(B, A, G))
        gap = float(1 - sigma[6] / sigma[5])
        expected = algebra.loro_exact_raw(B, A, G, lr)
        assert error(new_B.double(), new_A.double(), expected, B @ A) < 2e-5 / max(gap, 1e-3)


def test_single_precision_survives_singular_factors_and_extreme_scales() -> None:
    for scale in (1e-30, 1e-15, 1.0, 1e15):
        for kind in KINDS:
            B, A = made_singular(draw(12, 4, seed=1) * scale, draw(4, 9, seed=2), kind)
            D_B, D_A = draw(12, 4, seed=3).sign(), draw(4, 9, seed=4).sign()
            low = [x.float() for x in (B, A, D_B, D_A)]
            lr = 0.01 * scale
            new_B, new_A, damped, _ = riemannian_step(*low, lr)
            assert damped and bool(new_B.isfinite().all() and new_A.isfinite().all())
            # Only D_A is divided by B: with B of norm `scale` it moves W by lr / scale.
            moved = float(norm(new_B.double() @ new_A.double() - B @ A))
            assert moved < 10 * max(1.0, scale * float(norm(A)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("condition", [1.0, 100.0])
@pytest.mark.parametrize("n, m, r", [(12, 9, 3), (9, 30, 9), (16, 40, 15), (30, 8, 8), (1, 5, 1)])
def test_a_cap_limits_the_step_of_each_pair(
    n: int, m: int, r: int, condition: float, dtype: torch.dtype
) -> None:
    """And the ratio is |W' - W| / |W| of the step that was made, in both forms."""
    B, A = with_condition(n, r, condition, 1), with_condition(m, r, 1.0, 3).T
    W, D_B, D_A = B @ A, draw(n, r, seed=5).sign(), draw(r, m, seed=6).sign()
    wide = (B, A, D_B, D_A)
    for lr, cap in ((1e-4, 0.5), (0.1, 0.5), (0.1, 0.02), (10.0, 0.5), (0.0, 0.5)):
        rate = algebra.loro_capped_rate(*wide, lr, cap)
        expected = algebra.loro_exact_directions(*wide, rate)
        low_B, low_A, _, of_one = riemannian_step(*(x.to(dtype) for x in wide), lr, cap)
        (new_B,), (new_A,), sound, of_many = gram_step(*(x[None] for x in wide), lr, cap)
        assert sound
        ratio, at = norm(expected - W) / norm(W), 1e3 * torch.finfo(dtype).eps
        for found in ((low_B.double(), low_A.double(), of_one), (new_B, new_A, of_many[0])):
            assert error(found[0], found[1], expected, W) < at * condition
            assert abs(float(found[2] - ratio)) < at * condition
        assert float(ratio) < 1.001 * cap


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n, m, r", [(9, 7, 12), (8, 30, 12), (30, 8, 12), (5, 5, 30), (1, 9, 2)])
def test_columns_beyond_the_rank_of_the_product_are_0(
    n: int, m: int, r: int, dtype: torch.dtype
) -> None:
    """After a first step and after others from there."""
    k, wide = min(n, m), (draw(n, r, seed=1), draw(r, m, seed=2))
    B, A = (x.to(dtype) for x in wide)
    for seed in range(3):
        D_B, D_A = draw(n, r, seed=seed + 3).sign(), draw(r, m, seed=seed + 4).sign()
        if seed:  # a zero column has no direction
            D_B[:, k:], D_A[k:] = 0, 0
        expected = algebra.loro_exact_directions(B.double(), A.double(), D_B, D_A, 0.1)
        old = B.double() @ A.double()
        B, A, _, ratio = riemannian_step(B, A, D_B.to(dtype), D_A.to(dtype), 0.1)
        assert B.shape == (n, r) and A.shape == (r, m)
        assert not B[:, k:].any() and not A[k:].any()
        at = 2e4 * torch.finfo(dtype).eps
        assert error(B.double(), A.double(), expected, expected) < at
        assert float(ratio) == pytest.approx(float(norm(expected - old) / norm(old)), rel=at)


def test_a_cap_leaves_a_zero_product_and_no_nan() -> None:
    B, A = torch.zeros(6, 2), draw(2, 5, seed=1).float()
    for D in (0.0, 1.0):
        new_B, new_A, _, ratio = riemannian_step(B, A, B + D, A * D, 0.1, 0.5)
        assert not (new_B @ new_A).any() and bool(new_A.isfinite().all()) and ratio == 0


# --- the same step from Gram matrices


@EXAMPLES
@given(factors(), st.sampled_from(["adam", "raw", "of rank 1", "zero"]))
def test_the_gram_form_is_more_exact_than_the_reference_in_single_precision(
    case: tuple[Tensor, Tensor, float, int], kind: str
) -> None:
    B, A, condition, seed = case
    assume(condition < 1e5)
    (n, r), m = B.shape, A.shape[1]
    G = draw(n, m, seed=seed + 4)
    D_B, D_A = {
        "adam": (draw(n, r, seed=seed + 5).tanh(), draw(r, m, seed=seed + 6).tanh()),
        "raw": (G @ A.T, B.T @ G),
        "of rank 1": (draw(n, 1, seed=seed) * draw(r, seed=seed), draw(r, 1, seed=seed) * A[:1]),
        "zero": (0 * B, 0 * A),
    }[kind]
    B, A, D_B, D_A = (x.float().double() for x in (B, A, D_B, D_A))
    outside = torch.eye(n, dtype=B.dtype) - B @ torch.linalg.pinv(B)
    tangent = torch.linalg.pinv(B).T @ D_A + outside @ D_B @ torch.linalg.pinv(A).T
    lr = step_of_half_its_norm(B @ A, tangent, r) if kind != "zero" else 0.1
    expected = algebra.loro_exact_directions(B, A, D_B, D_A, lr)
    low_B, low_A, *_ = riemannian_step(B.float(), A.float(), D_B.float(), D_A.float(), lr)
    (new_B,), (new_A,), sound, ratio = gram_step(*(x[None] for x in (B, A, D_B, D_A)), lr)
    of_reference = error(low_B.double(), low_A.double(), expected, B @ A)
    assert error(new_B, new_A, expected, B @ A) < max(of_reference, 1e-7)
    assert sound
    assert abs(float(ratio) - error(new_B, new_A, B @ A, B @ A)) < 1e-7
    # The paper's basis: B' = U Σ^½ and A' = Σ^½ Vᵀ, sigma in descending order.
    W, norms = new_B @ new_A, norm(new_B, dim=0)
    near = (1e-7 + 1e-15 * condition**2) * float(norm(W)) + 1e-300
    torch.testing.assert_close(norms.square(), norm(new_A, dim=1).square(), rtol=0, atol=near)
    torch.testing.assert_close(norms.square(), svdvals(W)[:r], rtol=0, atol=near)
    torch.testing.assert_close(new_B.T @ new_B, norms.diag().square(), rtol=0, atol=near)
    torch.testing.assert_close(new_A @ new_A.T, norms.diag().square(), rtol=0, atol=near)


def test_the_gram_form_takes_no_pair_that_may_be_singular() -> None:
    limit = 1 / (TOLERANCE * 5**0.5 * torch.finfo(torch.float32).eps)
    bound = 5**0.25
    for c, taken in ((1.0, True), (0.99 * limit / bound, True), (1.01 * limit, False)):
        for e in (c, 1.0):
            B, A = with_condition(20, 5, c, 0), with_condition(15, 5, c / e, 7).T
            assert gram_step(B[None], A[None], B[None], A[None], 0.1)[2] == taken
    for n, m, r in SINGULAR_SHAPES:
        for kind in [*KINDS, "both zero"]:
            B, A = made_singular(draw(n, r, seed=1), draw(r, m, seed=2), kind)
            for scale in (1e-30, 1.0, 1e15):
                low = [(x * scale).float().double()[None] for x in (B, A, B.sign(), A.sign())]
                assert not gram_step(*low, 0.1)[2]
    B, A = draw(20, 5, seed=1)[None], draw(5, 15, seed=2)[None]
    assert not gram_step(B, A, B * torch.nan, A, 0.1)[2]


@pytest.mark.parametrize("batch_bytes", [1, 2**30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_pairs_step_in_place_but_the_singular_ones(
    dtype: torch.dtype, batch_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(riemannian_gram, "BATCH_BYTES", batch_bytes)
    pairs, singular = [], {1, 4, 6}
    for i, (n, m) in enumerate([(12, 9), (12, 9), (9, 12), (12, 9), (9, 12), (7, 7), (3, 9)]):
        pair = made_singular(draw(n, 4, seed=i), draw(4, m, seed=-i), KINDS[i] if i == 4 else "")
        pairs.append((pair[0].to(dtype), pair[1].to(dtype)))
    pairs[1][0].zero_()
    before = [(B.clone(), A.clone()) for B, A in pairs]
    left, ratios = riemannian_gram.gram_steps_(pairs, torch.sin, 0.1)
    assert set(left) == singular and ratios.sort()[0][:3].tolist() == [0.0] * 3
    moved = []
    for i, ((B, A), (old_B, old_A)) in enumerate(zip(pairs, before, strict=True)):
        if i in singular:
            assert torch.equal(B, old_B) and torch.equal(A, old_A)
            continue
        wide = [x.double() for x in (old_B, old_A, old_B.sin(), old_A.sin())]
        expected = algebra.loro_exact_directions(*wide, 0.1)
        rounding = 2 * torch.finfo(dtype).eps
        assert B.dtype == A.dtype == dtype
        assert error(B.double(), A.double(), expected, expected) < rounding
        W = wide[0] @ wide[1]
        moved.append(norm(expected - W) / norm(W))
    torch.testing.assert_close(ratios.sort()[0][3:], torch.stack(moved).sort()[0])


@pytest.mark.parametrize("n, m, r", [(12, 9, 3), (9, 12, 3), (7, 9, 7), (9, 7, 12), (1, 5, 1)])
def test_balanced_factors_keep_the_product(n: int, m: int, r: int) -> None:
    for rank in {1, (r + 1) // 2, r}:
        B = draw(n, rank, seed=1) @ draw(rank, r, seed=2) * 100
        A = draw(r, m, seed=3) / 100
        new_B, new_A = balanced(B, A)
        assert new_B.shape == B.shape and new_A.shape == A.shape
        assert error(new_B, new_A, B @ A, B @ A) < 1e-14
        assert_balanced(new_B, new_A)
        gram_B, gram_A = new_B.T @ new_B, new_A @ new_A.T  # the same diagonal matrix
        torch.testing.assert_close(gram_B, gram_A, rtol=0, atol=1e-12)
        torch.testing.assert_close(gram_B, gram_B.diagonal().diag(), rtol=0, atol=1e-12)
    zero_B, zero_A = balanced(torch.zeros(n, r), torch.zeros(r, m))
    assert not zero_B.any() and not zero_A.any()


@EXAMPLES
@given(factors(), st.sampled_from([1e-6, 1e-3, 0.1]))
def test_the_preconditioned_step_is_the_dense_formula(
    case: tuple[Tensor, Tensor, float, int], eps: float
) -> None:
    B, A, _, seed = case
    G = draw(B.shape[0], A.shape[1], seed=seed + 4)
    G_B, G_A = G @ A.T, B.T @ G
    result = preconditioned_step(B, A, G_B, G_A, 0.1, eps)
    expected = algebra.precond_step(B, A, G_B, G_A, 0.1, eps)
    for new, right, old in zip(result, expected, (B, A), strict=True):
        moved = float(norm(right - old))
        # The damped Gram matrix has condition at most 1 + 1 / eps.
        assert float(norm(new - right)) < 1e-14 / eps * moved + 1e-15 * float(norm(old))


def test_the_preconditioned_step_without_damping_is_the_papers() -> None:
    B, A, G = draw(9, 3, seed=0), draw(3, 7, seed=1), draw(9, 7, seed=2)
    result = preconditioned_step(B, A, G @ A.T, B.T @ G, 0.1, 0.0)
    expected = algebra.precond_step(B, A, G @ A.T, B.T @ G, 0.1, 0.0)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [*KINDS, "both zero"])
def test_the_preconditioned_step_stays_finite(kind: str, dtype: torch.dtype) -> None:
    B, A = made_singular(draw(9, 3, seed=0), draw(3, 7, seed=1), kind)
    B, A, G = B.to(dtype), A.to(dtype), draw(9, 7, seed=2).to(dtype)
    new_B, new_A = preconditioned_step(B, A, G @ A.T, B.T @ G, 0.1, 1e-6)
    assert bool(new_B.isfinite().all() and new_A.isfinite().all())
    # eps bounds what a lost direction can do: the rest is lr ‖G‖ / ‖factor‖ or less.
    assert float(norm(new_B @ new_A)) < 100
    if kind == "both zero":
        assert not new_B.any() and not new_A.any()


@EXAMPLES
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 2**62))
def test_semi_orthogonal_frames(n: int, r: int, seed: int) -> None:
    Q = semi_orthogonal(n, r, torch.Generator().manual_seed(seed), dtype=torch.float64)
    gram = Q.T @ Q if n >= r else Q @ Q.T
    eye = torch.eye(min(n, r), dtype=torch.float64)
    torch.testing.assert_close(gram, eye, rtol=0, atol=1e-14)
    assert Q.shape == (n, r) and Q.is_contiguous()
    single = semi_orthogonal(n, r, torch.Generator().manual_seed(seed))
    assert torch.equal(single, Q.float())


@pytest.mark.parametrize("n, r", [(2, 1), (8, 4), (7, 4), (100, 50), (512, 64), (64, 64)])
def test_a_frame_spans_what_was_drawn_and_has_the_signs_of_a_positive_diagonal(
    n: int, r: int
) -> None:
    for seed in range(20):
        X = draw(n, r, seed=seed)
        Q = orthonormal(X)
        R = Q.T @ X
        torch.testing.assert_close(Q.T @ Q, torch.eye(r).double(), rtol=0, atol=1e-14)
        torch.testing.assert_close(Q @ R, X, rtol=0, atol=1e-12)
        torch.testing.assert_close(R.tril(-1), torch.zeros_like(R), rtol=0, atol=1e-12)
        assert bool((R.diagonal() > 0).all())


@pytest.mark.parametrize("n, r", [(6, 3), (3, 6), (4, 4)])
def test_semi_orthogonal_is_uniform(n: int, r: int) -> None:
    """Every entry has mean 0 and mean square 1 / max(n, r). QR without its signs mended leaves
    the diagonal's entries all of one sign."""
    draws = [semi_orthogonal(n, r, torch.Generator().manual_seed(s)) for s in range(2000)]
    frames = torch.stack(draws).double()
    spread = (1 / max(n, r) / 2000) ** 0.5
    assert float(frames.mean(0).abs().max()) < 4.5 * spread
    squares = frames.square().mean(0) * max(n, r)
    torch.testing.assert_close(squares, torch.ones_like(squares), rtol=0, atol=0.15)
