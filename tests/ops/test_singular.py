"""Singular values and their measures against closed forms, and against rotations in loops."""

import math

import pytest
import torch
from oracles import spectra
from torch import Tensor
from torch.linalg import qr

from peptrain.ops.linear import bpt_weight
from peptrain.ops.singular import (
    condition,
    count_above,
    effective_rank,
    numerical_rank,
    ov_singular_values,
    ov_sum_factors,
    per,
    product_singular_values,
    singular_values,
    stable_rank,
    subspace_overlap,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_spectrum(n: int, m: int, sigma: Tensor, seed: int = 0) -> Tensor:
    left, right = qr(draw(n, len(sigma), seed=seed))[0], qr(draw(m, len(sigma), seed=seed + 1))[0]
    return left * sigma @ right.mT


def measures(sigma: Tensor, n: int, m: int, rank: int) -> dict[str, float]:
    """All of them, of one matrix."""
    made = {
        "effective": effective_rank(sigma),
        "per": per(sigma, (n, m)),
        "stable": stable_rank(sigma),
        "numerical": numerical_rank(sigma, 1e-3),
        "above": count_above(sigma),
        "condition": condition(sigma, rank, max(n, m)),
    }
    return {name: value.item() for name, value in made.items()}


@pytest.mark.parametrize("n, m", [(6, 6), (6, 9), (9, 6)])
def test_of_the_identity_everything_is_its_size_or_one(n: int, m: int) -> None:
    found = measures(singular_values(torch.eye(n, m)), n, m, 6)
    wanted = {"effective": 6, "per": 1, "stable": 6, "numerical": 6, "above": 6, "condition": 1}
    assert found == pytest.approx(wanted, rel=1e-14)


def test_a_matrix_of_rank_one_has_rank_one_by_every_measure() -> None:
    W = 3 * draw(8, 1) @ draw(1, 12, seed=1)
    found = measures(singular_values(W), 8, 12, 1)
    wanted = {"effective": 1, "per": 1 / 8, "stable": 1, "numerical": 1, "above": 1}
    assert found == pytest.approx(wanted | {"condition": 1}, rel=1e-12)
    assert condition(singular_values(W), 2, 12) == math.inf
    assert per(singular_values(W), (8, 12), "rank", 1) == pytest.approx(1, rel=1e-12)
    assert per(singular_values(W), (8, 12), "inter") == pytest.approx(1 / 12, rel=1e-12)


@pytest.mark.parametrize("q, k", [(0.9, 7), (0.3, 9), (0.05, 8)])
@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
def test_a_geometric_spectrum_has_its_closed_forms(
    q: float, k: int, shape: tuple[int, int]
) -> None:
    """sigma_i = 2 q^i: p_i = (1 - q) q^i / (1 - q^k), with the mean E i of that distribution."""
    wanted = 2 * q ** torch.arange(k, dtype=torch.float64)
    sigma = singular_values(with_spectrum(*shape, wanted))
    torch.testing.assert_close(sigma[:k], wanted, rtol=1e-9, atol=1e-15)
    mean = q / (1 - q) - k * q**k / (1 - q**k)
    entropy = -math.log((1 - q) / (1 - q**k)) - mean * math.log(q)
    found = measures(sigma, *shape, rank=k)
    assert found == pytest.approx(
        {
            "effective": math.exp(entropy),
            "per": math.exp(entropy) / 9,
            "stable": (1 - q ** (2 * k)) / (1 - q**2),
            "numerical": sum(q**i > 1e-3 for i in range(k)),
            "above": sum(2 * q**i > 0.1 for i in range(k)),
            "condition": q ** (1 - k),
        },
        rel=1e-5,
    )


def test_ranks_of_the_zero_matrix_are_zero_and_ratios_undefined() -> None:
    found = measures(singular_values(torch.zeros(4, 6)), 4, 6, 4)
    undefined = {name for name, value in found.items() if math.isnan(value)}
    assert undefined == {"effective", "per", "stable", "condition"}
    assert found["numerical"] == found["above"] == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_or_infinity_makes_all_values_nan_of_that_matrix_only(value: float) -> None:
    W = draw(3, 5, 4)
    W[1, 2, 3] = value
    sigma = singular_values(W)
    assert sigma.isnan().all(1).tolist() == [False, True, False]
    torch.testing.assert_close(sigma[2], singular_values(W[2]))
    assert all(math.isnan(v) for v in measures(sigma[1], 5, 4, 4).values())
    assert product_singular_values(W[1], draw(4, 7)).isnan().all()


@pytest.mark.parametrize("smallest", [1e-2, 1e-9, 0.0])
@pytest.mark.parametrize("n, m", [(7, 11), (11, 7), (8, 8)])
def test_singular_values_are_those_of_rotations(n: int, m: int, smallest: float) -> None:
    sigma = torch.linspace(1, smallest, min(n, m), dtype=torch.float64)
    W = with_spectrum(n, m, sigma, seed=3)
    wanted = torch.tensor(spectra.singular_values(W), dtype=torch.float64)
    torch.testing.assert_close(singular_values(W), wanted, rtol=1e-9, atol=1e-15)
    assert effective_rank(wanted).item() == pytest.approx(spectra.effective_rank(wanted.tolist()))
    assert stable_rank(wanted).item() == pytest.approx(spectra.stable_rank(wanted.tolist()))


def test_gram_matrices_serve_well_conditioned_matrices_and_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In one batch: the SVD gets only those whose smallest values a square would lose."""
    spectrum = torch.stack([torch.tensor([1.0, s], dtype=torch.float64) for s in (0.5, 1e-8, 0.1)])
    W = torch.stack([with_spectrum(5, 2, sigma, seed=i) for i, sigma in enumerate(spectrum)])
    given, svdvals = [], torch.linalg.svdvals

    def watched(matrices: Tensor) -> Tensor:
        given.append(len(matrices))
        return svdvals(matrices)

    monkeypatch.setattr(torch.linalg, "svdvals", watched)
    torch.testing.assert_close(singular_values(W), spectrum, rtol=1e-7, atol=0)
    assert given == [1]


@pytest.mark.parametrize("n, r, m", [(9, 3, 7), (9, 8, 7), (4, 9, 7), (6, 6, 6)])
def test_a_product_has_the_singular_values_of_its_dense_form(n: int, r: int, m: int) -> None:
    B, A = draw(n, r), draw(r, m, seed=1)
    wanted = spectra.singular_values(spectra.product(B, A))[: min(n, r, m)]
    found = product_singular_values(B, A)
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-10, atol=0)


@pytest.mark.parametrize("d, heads, kv_heads, width", [(8, 4, 2, 2), (8, 4, 4, 2), (6, 6, 1, 3)])
def test_ov_circuits_of_grouped_queries_are_those_of_a_loop_over_heads(
    d: int, heads: int, kv_heads: int, width: int
) -> None:
    W_O, W_V = draw(d, heads * width), draw(kv_heads * width, d, seed=1)
    each = spectra.head_products(W_O, W_V, heads, kv_heads)
    wanted = [spectra.singular_values(product)[:width] for product in each]
    found = ov_singular_values(W_O, W_V, heads, kv_heads)
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=0)
    B, A = ov_sum_factors(W_O, W_V, heads, kv_heads)
    torch.testing.assert_close(B @ A, sum(each, torch.zeros(d, d, dtype=torch.float64)))


def test_the_condition_of_an_ov_circuit_over_all_dimensions_is_a_division_by_rounding() -> None:
    """pico-tiny's shapes: 12 heads and 4 value heads of dimension 8 in a width of 96."""
    W_O, W_V = draw(96, 96), draw(32, 96, seed=1)
    sigma = singular_values(torch.matmul(*ov_sum_factors(W_O, W_V, 12, 4)))
    assert sigma[0] / sigma[-1] > 1e14
    assert condition(sigma, 96, 96) == math.inf
    assert 1 < condition(sigma, 32, 96) < 100


def test_overlap_is_one_in_a_subspace_and_zero_across() -> None:
    frame, turn = qr(draw(9, 6))[0], qr(draw(3, 3, seed=1))[0]
    assert subspace_overlap(frame[:, :3], frame[:, :3] @ turn).item() == pytest.approx(1)
    assert subspace_overlap(frame[:, :3], frame[:, 3:]).item() == pytest.approx(0, abs=1e-15)
    assert subspace_overlap(frame[:, :3], frame[:, 1:4]).item() == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "n, m, R, r", [(12, 9, 2, 1), (9, 12, 2, 3), (12, 12, 4, 3), (12, 9, 4, 3), (9, 12, 9, 2)]
)
def test_bpts_lemma_3_1_holds_with_equality_for_random_diagonals(
    n: int, m: int, R: int, r: int
) -> None:
    """rank(diag(a) (W + U V) diag(b) - W) = min(n, m, 2R + r), R = rank W, r = rank(U V)."""
    W = draw(n, R) @ draw(R, m, seed=1)
    U, V, a, b = draw(n, r, seed=2), draw(r, m, seed=3), draw(n, seed=4), draw(m, seed=5)
    rank = numerical_rank(singular_values(bpt_weight(W, U, V, a, b) - W), 1e-10)
    assert rank == min(n, m, 2 * R + r)
    ones = (torch.ones(n, dtype=torch.float64), torch.ones(m, dtype=torch.float64))
    assert numerical_rank(singular_values(bpt_weight(W, U, V, *ones) - W), 1e-10) == r
