"""Stochastic rounding: unbiased, between neighbours, and what it saves in a bf16 weight."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peptrain.ops.rounding import add_, to_bfloat16

EXAMPLES = settings(max_examples=200, deadline=None, derandomize=True)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest bf16 numbers to fp32 x toward zero and away from it, by cutting its bits."""
    toward = (x.view(torch.int32) >> 16 << 16).view(torch.float32)
    away = ((x.view(torch.int32) >> 16) + 1 << 16).view(torch.float32)
    return toward, torch.where(toward == x, toward, away)


@EXAMPLES
@given(st.floats(width=32, min_value=-(2.0**126), max_value=2.0**126), st.integers(0, 2**62))
def test_a_number_goes_to_one_of_its_two_neighbours(value: float, seed: int) -> None:
    x = torch.full((64,), value)
    toward, away = neighbours(x)
    assert abs(float(toward[0])) <= abs(value) <= abs(float(away[0]))
    rounded = to_bfloat16(x, seeded(seed))
    assert rounded.dtype == torch.bfloat16
    assert bool(((rounded.float() == toward) | (rounded.float() == away)).all())


@EXAMPLES
@given(st.floats(width=32, allow_nan=False), st.integers(0, 2**62))
def test_a_bf16_number_is_not_changed(value: float, seed: int) -> None:
    x = torch.full((64,), value).bfloat16()
    assert torch.equal(to_bfloat16(x.float(), seeded(seed)), x)


@pytest.mark.parametrize("value", [0.02, -0.02, 1.001, -3.14159, 1e-20, -7e20])
def test_the_mean_is_the_number_itself(value: float) -> None:
    count = 200_000
    x = torch.full((count,), value)
    toward, away = (float(t[0]) for t in neighbours(x))
    share = (float(x[0]) - toward) / (away - toward)
    rounded = to_bfloat16(x, seeded(1)).double()
    up = float((rounded == away).double().mean())
    assert up == pytest.approx(share, abs=5 * (share * (1 - share) / count) ** 0.5)


def kept(add: Callable[[Tensor, Tensor, int], None], dtype: torch.dtype, sign: float) -> float:
    """How much of 200 merges of about 1e-5 arrives in weights of about 0.02: the change, projected
    onto the change that was asked for."""
    W = (torch.randn(60_000, generator=seeded(0)) * 0.02).to(dtype)
    start, asked = W.double(), torch.zeros(60_000, dtype=torch.float64)
    for merge in range(200):
        delta = sign * torch.randn(60_000, generator=seeded(1 + merge)) * 1e-5
        add(W, delta, merge)
        asked += delta.double()
    return float((W.double() - start) @ asked / (asked @ asked))


def to_nearest(W: Tensor, delta: Tensor, seed: int) -> None:
    W.copy_(W.float() + delta)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rounding_to_nearest_loses_three_quarters_of_small_merges(sign: float) -> None:
    assert kept(to_nearest, torch.bfloat16, sign) == pytest.approx(0.25, abs=0.1)
    assert kept(add_, torch.bfloat16, sign) == pytest.approx(1.0, abs=0.05)
    assert kept(add_, torch.float32, sign) == pytest.approx(1.0, abs=1e-3)


def test_add_draws_from_its_seed_alone() -> None:
    W = torch.randn(5, 7, generator=seeded(0)).bfloat16()
    delta = torch.randn(5, 7, generator=seeded(1)) * 1e-3

    def sum_with(seed: int) -> Tensor:
        total = W.clone()
        torch.rand(1)  # so that the generator that all share is elsewhere each time
        add_(total, delta, seed)
        return total

    assert torch.equal(sum_with(3), sum_with(3))
    assert not torch.equal(sum_with(3), sum_with(4))
    assert torch.equal(sum_with(2**63 - 1), sum_with(2**63 - 1))  # what Rng.integer may give


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_wider_dtypes_it_is_plain_addition(dtype: torch.dtype) -> None:
    W, delta = torch.ones(3, 4, dtype=dtype), torch.full((3, 4), 0.1, dtype=dtype)
    add_(W, delta, 0)
    assert torch.equal(W, torch.ones(3, 4, dtype=dtype) + delta)


def test_the_layout_of_the_weight_does_not_matter() -> None:
    W = torch.randn(6, 4, generator=seeded(0)).bfloat16()
    delta = torch.randn(6, 4, generator=seeded(1)) * 1e-3
    transposed = W.t().contiguous().t()
    assert not transposed.is_contiguous()
    add_(W, delta, 5)
    add_(transposed, delta, 5)
    assert torch.equal(W, transposed)
