"""Metrics of predictions, as scikit-learn and scipy compute them, with standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from peptrain.rng import Rng
from peptrain.tuning.tasks import TuningTask

Numbers = NDArray[np.float64]
RESAMPLES = 1000
"""Of the bootstrap. The standard error then has a relative error of about 2 %."""


def value(
    name: str, predicted: Sequence[float] | Numbers, gold: Sequence[float] | Numbers
) -> float:
    """Return the metric `name` of `NAMES` for predictions of `gold`: class numbers, or numbers.

    acc: the share of equal ones. f1: 2 TP / (2 TP + FP + FN) of class 1, 0 without any. matthews:
    the correlation of the classes, 0 if one side is constant. pearson, spearman: the correlation
    of the numbers and of their ranks, NaN if one side is constant or not finite.
    """
    assert len(predicted) == len(gold) > 0, (len(predicted), len(gold))
    return _METRICS[name](np.asarray(predicted, np.float64), np.asarray(gold, np.float64))


def stderr(
    name: str, predicted: Sequence[float] | Numbers, gold: Sequence[float] | Numbers
) -> float | None:
    """Return the standard error of a metric over draws of the rows, None if it has none.

    acc: sqrt(p (1 - p) / (n - 1)). Others: the standard deviation over `RESAMPLES` resamples of
    the rows (bootstrap), always the same ones for as many rows. Resamples whose metric is NaN are
    left out, so the value is None where the metric itself is NaN.
    """
    x, y = np.asarray(predicted, np.float64), np.asarray(gold, np.float64)
    n, found = len(x), value(name, x, y)
    if n < 2 or math.isnan(found):
        return None
    if name == "acc":
        return math.sqrt(found * (1 - found) / (n - 1))
    draw = np.random.default_rng(Rng(0).integer("bootstrap"))
    drawn = (draw.integers(n, size=n) for _ in range(RESAMPLES))
    values = np.array([_METRICS[name](x[rows], y[rows]) for rows in drawn])
    return float(np.std(values[~np.isnan(values)], ddof=1))


def majority(task: TuningTask, gold: Sequence[float]) -> dict[str, float]:
    """Return the task's metrics of always predicting the most frequent label.

    The lowest is taken of equally frequent ones. Of numbers, whose correlation with a constant is
    undefined, they are NaN.
    """
    labels, counts = np.unique(np.asarray(gold), return_counts=True)
    constant = np.full(len(gold), labels[counts.argmax()])
    return {name: value(name, constant, gold) for name in task.metrics}


def _accuracy(x: Numbers, y: Numbers) -> float:
    return float(np.mean(x == y))


def _f1(x: Numbers, y: Numbers) -> float:
    right = 2 * np.sum((x == 1) & (y == 1))
    wrong = np.sum((x == 1) != (y == 1))
    return float(right / (right + wrong)) if right else 0.0


def _matthews(x: Numbers, y: Numbers) -> float:
    """Return cov(x, y) / sqrt(cov(x, x) cov(y, y)), the covariances summed over the classes.

    n² cov(x, y) = n (number of equal ones) - sum over classes k of #(x = k) #(y = k), in integers.
    """
    classes, both = np.unique(np.concatenate([x, y]), return_inverse=True)
    n = len(x)
    in_x = [int(c) for c in np.bincount(both[:n], minlength=len(classes))]
    in_y = [int(c) for c in np.bincount(both[n:], minlength=len(classes))]
    xy = n * int(np.sum(x == y)) - sum(a * b for a, b in zip(in_x, in_y, strict=True))
    xx, yy = (n * n - sum(c * c for c in counts) for counts in (in_x, in_y))
    return xy / math.sqrt(xx * yy) if xx and yy else 0.0


def _pearson(x: Numbers, y: Numbers) -> float:
    # By comparison: the mean of equal numbers may differ from them by a rounding.
    if not (np.isfinite(x).all() and np.isfinite(y).all()) or any(
        (z == z[0]).all() for z in (x, y)
    ):
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    x, y = x / np.abs(x).max(), y / np.abs(y).max()  # squares of tiny numbers would be 0
    return float(np.clip(x @ y / math.sqrt((x @ x) * (y @ y)), -1, 1))


def _spearman(x: Numbers, y: Numbers) -> float:
    if np.isnan(x).any() or np.isnan(y).any():
        return math.nan
    return _pearson(_ranks(x), _ranks(y))


def _ranks(x: Numbers) -> Numbers:
    """Return the ranks from 1; equal numbers have the mean of theirs."""
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Numbers = (last - (counts - 1) / 2)[place]
    return ranks


_METRICS: dict[str, Callable[[Numbers, Numbers], float]] = {
    "acc": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}
NAMES = tuple(_METRICS)
