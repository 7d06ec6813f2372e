"""Tests of whether two models differ in accuracy on the same items."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

EXACT = 25
"""Discordant pairs below which McNemar's test sums the binomial distribution."""


@dataclass(frozen=True)
class Paired:
    """Counts and tests of one task. p values are two-sided."""

    items: int
    both: int
    """Items that both models answer correctly."""
    only_a: int
    only_b: int
    neither: int
    mcnemar_p: float
    mcnemar: str
    """exact, or chi2 with the continuity correction."""
    z: float
    """Of two proportions as if the items were not the same; positive where A is better."""
    z_p: float

    @property
    def difference(self) -> float:
        """Return the accuracy of A minus that of B."""
        return (self.only_a - self.only_b) / self.items

    @property
    def difference_stderr(self) -> float:
        """Return the standard error of the difference, which knows that the items are the same."""
        n, d = self.items, self.difference
        return math.sqrt(max(0.0, (self.only_a + self.only_b) / n - d * d) / n)

    def entry(self) -> dict[str, Any]:
        """Return everything for JSON."""
        more = {"difference": self.difference, "difference_stderr": self.difference_stderr}
        return {**asdict(self), **more}


def paired(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> Paired:
    """Test two lists of rows of the same items, in the same order."""
    pairs = [(bool(x["correct"]), bool(y["correct"])) for x, y in zip(a, b, strict=True)]
    only_a, only_b = pairs.count((True, False)), pairs.count((False, True))
    both = pairs.count((True, True))
    z = z_of_proportions(both + only_a, both + only_b, len(pairs), len(pairs))
    return Paired(
        items=len(pairs),
        both=both,
        only_a=only_a,
        only_b=only_b,
        neither=pairs.count((False, False)),
        mcnemar_p=mcnemar(only_a, only_b),
        mcnemar="exact" if only_a + only_b < EXACT else "chi2",
        z=z,
        z_p=two_sided(z),
    )


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the two-sided p of McNemar's test, of the pairs in which one of two is correct.

    If neither model is better, only_a is binomial with probability 1/2. From 25 pairs on chi² =
    (|only_a - only_b| - 1)² / (only_a + only_b) with one degree of freedom is used.
    """
    n, less = only_a + only_b, min(only_a, only_b)
    if n < EXACT:
        return min(1.0, sum(math.comb(n, k) for k in range(less + 1)) / 2.0 ** (n - 1))
    return two_sided(max(0, abs(only_a - only_b) - 1) / math.sqrt(n))


def z_of_proportions(correct_a: int, correct_b: int, n_a: int, n_b: int) -> float:
    """Return z = (p_a - p_b) / sqrt(p (1 - p) (1 / n_a + 1 / n_b)), with the pooled p.

    0 where both are all right or all wrong.
    """
    p = (correct_a + correct_b) / (n_a + n_b)
    spread = math.sqrt(p * (1 - p) * (1 / n_a + 1 / n_b))
    return (correct_a / n_a - correct_b / n_b) / spread if spread else 0.0


def two_sided(z: float) -> float:
    """Return P(|Z| > |z|) for a standard normal Z."""
    return math.erfc(abs(z) / math.sqrt(2))
