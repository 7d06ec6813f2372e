"""Newton-Schulz iterations against the polar factor of a float64 SVD."""

import pytest
import torch
from byhand import seeded
from oracles import muon as oracle
from torch import Tensor

from peptrain.ops.newton_schulz import COEFFICIENTS, fast_polar, polar

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
SHAPES = [(24, 24), (16, 40), (40, 16), (1, 7), (7, 1)]


def drawn(k: int, n: int, m: int, values: Tensor | None = None) -> Tensor:
    """[k, n, m] in float64, with the given singular values or random ones."""
    X = torch.randn(k, n, m, dtype=torch.float64, generator=seeded(n * m))
    if values is None:
        return X
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    return U * values @ Vh


@pytest.mark.parametrize("n, m", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_is_the_polynomial_of_the_singular_values(n: int, m: int, dtype: torch.dtype) -> None:
    X = drawn(3, n, m)
    wanted = torch.stack([oracle.through(x, COEFFICIENTS) for x in X])
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(polar(X.to(dtype)).double(), wanted, rtol=0, atol=tolerance)


def test_the_polynomials_converge_beyond_1_where_rounding_may_take_a_value() -> None:
    x = torch.linspace(3e-3, 1.04, 10_001, dtype=torch.float64)
    for a, b, c in COEFFICIENTS:
        x = a * x + b * x**3 + c * x**5
    assert 0.85 < x.min() <= x.max() < 1.15


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, m", [(64, 64), (32, 96), (96, 32)])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_singular_values_from_3e_3_to_1_come_near_to_1(
    n: int, m: int, dtype: torch.dtype, size: float
) -> None:
    """Whatever the size of X, whose own rounding to bf16 mixes small singular values."""
    values = torch.logspace(0, -2.5, min(n, m), dtype=torch.float64)
    X = drawn(2, n, m, values / values.norm())
    found = torch.linalg.svdvals(polar((X * size).to(dtype)).double())
    assert found.max() < 1.2
    kept = values / values.norm() >= 3e-3
    assert found.sort(descending=True).values[:, : int(kept.sum())].min() > 0.8


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_large_singular_value_is_not_overshot(dtype: torch.dtype) -> None:
    """Rank 1 has the singular value 1, at the end of the interval, above which rounding may lift
    it."""
    X = torch.stack([torch.outer(*drawn(1, 2, 48).mul(s)[0]) for s in range(1, 17)])
    largest = torch.linalg.svdvals(polar(X.to(dtype)).double())[:, 0]
    assert 0.8 < largest.min() <= largest.max() < 1.2


def test_the_polar_factor_of_well_conditioned_matrices_is_near() -> None:
    X = drawn(2, 12, 20)
    wanted = torch.stack([oracle.through(x, ()) for x in X])
    apart = torch.linalg.matrix_norm(polar(X) - wanted, ord=2)
    assert apart.max() < 0.15


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_transposed_matrix_has_the_transposed_factor_and_each_is_on_its_own(
    dtype: torch.dtype,
) -> None:
    X = drawn(3, 10, 30).to(dtype)
    found = polar(X)
    assert found.dtype == dtype
    torch.testing.assert_close(polar(X.mT), found.mT, rtol=0, atol=0)
    alone = torch.cat([polar(x[None]) for x in X])
    torch.testing.assert_close(alone, found, rtol=0, atol=0 if dtype != torch.bfloat16 else 1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_0_stays_0_and_what_is_not_finite_stays_in_its_matrix(dtype: torch.dtype) -> None:
    X = drawn(3, 6, 9).to(dtype)
    X[0] = 0
    X[1, 2, 3] = torch.nan
    found = polar(X)
    assert not found[0].any() and not found[1].isfinite().any() and found[2].isfinite().all()


def test_on_a_cpu_bf16_is_computed_in_fp32() -> None:
    X = drawn(2, 32, 48, torch.ones(32))
    assert torch.equal(fast_polar(X), polar(X))
    half = fast_polar(X.bfloat16())
    assert torch.equal(half, polar(X.bfloat16().float()).bfloat16())
