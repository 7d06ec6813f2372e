"""Newton-Schulz iterations against the polar factor of a float64 SVD."""

import pytest
import torch
from byhand import seeded
from oracles import muon as oracle
from torch import Tensor

from peptrain.ops.newton_schulz import COEFFICIENTS, polar, polars

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
as_on_a_gpu = pytest.mark.parametrize("products", [None, torch.float16])
SHAPES = [(24, 24), (16, 40), (40, 16), (20, 25), (1, 7), (7, 1)]


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


@every_dtype
@as_on_a_gpu
@pytest.mark.parametrize("n, m", [(64, 64), (32, 96), (96, 32)])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_singular_values_from_3e_3_to_1_come_near_to_1(
    n: int, m: int, dtype: torch.dtype, products: torch.dtype | None, size: float
) -> None:
    """Whatever the size of X, whose own rounding to bf16 mixes small singular values."""
    values = torch.logspace(0, -2.5, min(n, m), dtype=torch.float64)
    X = drawn(2, n, m, values / values.norm())
    found = torch.linalg.svdvals(polars([(X * size).to(dtype)], dtype=products)[0].double())
    assert found.max() < 1.2
    kept = values / values.norm() >= 3e-3
    assert found.sort(descending=True).values[:, : int(kept.sum())].min() > 0.8


@every_dtype
@as_on_a_gpu
@pytest.mark.parametrize("columns", [48, 160])
def test_one_large_singular_value_is_not_overshot(
    dtype: torch.dtype, products: torch.dtype | None, columns: int
) -> None:
    """Rank 1 has the singular value 1, at the end of the interval, above which rounding may lift
    it."""
    u, v = drawn(1, 1, 48)[0, 0], drawn(1, 1, columns)[0, 0]
    X = torch.stack([torch.outer(u, v) * s for s in range(1, 17)])
    largest = torch.linalg.svdvals(polars([X.to(dtype)], dtype=products)[0].double())[:, 0]
    assert 0.8 < largest.min() <= largest.max() < 1.2


def test_the_polar_factor_of_well_conditioned_matrices_is_near() -> None:
    X = drawn(2, 12, 20)
    wanted = torch.stack([oracle.through(x, ()) for x in X])
    apart = torch.linalg.matrix_norm(polar(X) - wanted, ord=2)
    assert apart.max() < 0.15


@pytest.mark.parametrize("values", [2.5, 4.0])
@pytest.mark.parametrize("n, m", [(64, 64), (64, 256), (256, 64)])
def test_products_in_fp16_are_within_an_eighth_of_float64(n: int, m: int, values: float) -> None:
    """In spectral norm, for singular values over 2.5 and 4 decades."""
    X = drawn(2, n, m, torch.logspace(0, -values, 64, dtype=torch.float64)).bfloat16()
    found = polars([X], dtype=torch.float16)[0].double()
    apart = torch.linalg.matrix_norm(found - polar(X.double()), ord=2)
    assert apart.max() < 0.125


@every_dtype
def test_a_transposed_matrix_has_the_transposed_factor_and_each_is_on_its_own(
    dtype: torch.dtype,
) -> None:
    X = drawn(3, 10, 30).to(dtype)
    found = polar(X)
    assert found.dtype == dtype
    near = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(polar(X.mT.contiguous()), found.mT, rtol=0, atol=near)
    alone = torch.cat([polar(x[None]) for x in X])
    torch.testing.assert_close(alone, found, rtol=0, atol=0 if dtype != torch.bfloat16 else 1e-2)


@every_dtype
def test_several_stacks_at_once_each_scaled_lie_in_memory_as_what_was_given(
    dtype: torch.dtype,
) -> None:
    stacks = [
        drawn(k, n, m).to(dtype) for k, n, m in ((3, 6, 9), (2, 20, 6), (1, 4, 30), (1, 6, 6))
    ]
    stacks.append(stacks[0].mT.contiguous().mT)
    scales = [torch.rand(len(X), generator=seeded()) for X in stacks]
    near = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 1e-2}[dtype]
    for X, scale, found in zip(stacks, scales, polars(stacks, scales=scales), strict=True):
        assert (found.stride(), found.dtype) == (X.stride(), X.dtype)
        wanted = polar(X.double()) * scale[:, None, None]
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=near)


@every_dtype
@as_on_a_gpu
def test_what_is_too_small_for_the_square_of_its_entries_is_not_overshot(
    dtype: torch.dtype, products: torch.dtype | None
) -> None:
    X = torch.stack([drawn(1, 64, 96)[0] * 10.0**-e for e in range(10, 45)])
    found = polars([X.to(dtype)], dtype=products)[0]
    assert torch.linalg.svdvals(found.double()).max() < 1.2


@every_dtype
def test_0_stays_0_and_what_is_not_finite_stays_in_its_matrix(dtype: torch.dtype) -> None:
    X = drawn(3, 6, 9).to(dtype)
    X[0] = 0
    X[1, 2, 3] = torch.nan
    found = polar(X)
    assert not found[0].any() and not found[1].isfinite().any() and found[2].isfinite().all()


def test_on_a_cpu_bf16_is_computed_in_fp32() -> None:
    X = drawn(2, 32, 48).bfloat16()
    assert torch.equal(polar(X), polar(X.float()).bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n, m", [(512, 512), (256, 1024), (1024, 256)])
def test_on_a_gpu_it_is_within_a_tenth_of_float64(n: int, m: int, dtype: torch.dtype) -> None:
    """In spectral norm, for singular values over 2.5 decades."""
    values = torch.logspace(0, -2.5, min(n, m), dtype=torch.float64)
    X = drawn(2, n, m, values).to("cuda", dtype)
    found = polar(X)
    assert (found.dtype, found.stride()) == (dtype, X.stride())
    apart = torch.linalg.matrix_norm(found.double() - polar(X.double()), ord=2)
    assert apart.max() < 0.1
