"""Student's t and the interval of a mean, against printed tables and the density."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peptrain.ops.student import half_width, student_t

PRINTED = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 30: 2.042,
           100: 1.984}  # fmt: skip
"""The two-sided 95 % points of Student's t as statistics books print them."""


@pytest.mark.parametrize("df", PRINTED)
def test_students_t_is_that_of_the_books(df: int) -> None:
    assert student_t(0.95, df) == pytest.approx(PRINTED[df], abs=5e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.floats(0.5, 0.99))
def test_students_t_holds_its_share_of_the_density(df: int, confidence: float) -> None:
    t = student_t(confidence, df)
    x = torch.linspace(-t, t, 200_001, dtype=torch.float64)
    constant = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - math.log(df * math.pi) / 2
    density = torch.exp(constant - (df + 1) / 2 * torch.log1p(x**2 / df))
    assert torch.trapezoid(density, x).item() == pytest.approx(confidence, abs=1e-6)


def test_the_interval_of_three_values_by_hand() -> None:
    # mean 2.2, deviations -0.2, 0, 0.2: s = 0.2; t(2) = 4.303; 4.303 * 0.2 / sqrt 3 = 0.4968
    assert half_width([2.0, 2.2, 2.4]) == pytest.approx(0.4968, abs=1e-4)
    assert half_width([2.0]) is None
