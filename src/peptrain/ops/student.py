"""Student's t: quantiles, and the interval of a mean."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

CONFIDENCE = 0.95


def half_width(values: Sequence[float]) -> float | None:
    """Half width t s / sqrt(n) of the mean's 95 % interval; None for one value."""
    n = len(values)
    if n < 2:
        return None
    return student_t(CONFIDENCE, n - 1) * statistics.stdev(values) / math.sqrt(n)


def student_t(confidence: float, df: int) -> float:
    """Return the t with P(-t < T < t) = confidence, for Student's T of `df` degrees of freedom.

    Bisects theta = arctan(t / sqrt(df)), in which the probability is a finite sum (Abramowitz and
    Stegun 26.7.3 and 26.7.4).
    """
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        theta = (low + high) / 2
        low, high = (theta, high) if _within(theta, df) < confidence else (low, theta)
    return math.sqrt(df) * math.tan(low)


def _within(theta: float, df: int) -> float:
    """P(|T| < sqrt(df) tan theta)."""
    odd = df % 2
    term, total = (math.cos(theta) if odd else 1.0), 0.0
    for k in range(1 + odd, df, 2):
        total += term
        term *= k / (k + 1) * math.cos(theta) ** 2
    if odd:
        return 2 / math.pi * (theta + math.sin(theta) * total)
    return math.sin(theta) * total
