"""Metrics against scikit-learn's and scipy's, and their standard errors against known ones."""

import math
import statistics
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from peptrain.tuning.metrics import NAMES, majority, stderr, value
from peptrain.tuning.tasks import OF_CLASSES, OF_NUMBERS, TASKS

THEIRS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "acc": lambda x, y: accuracy_score(y, x),
    "f1": lambda x, y: f1_score(y, x, zero_division=0.0),
    "matthews": lambda x, y: matthews_corrcoef(y, x),
    "pearson": lambda x, y: pearsonr(x, y).statistic,
    "spearman": lambda x, y: spearmanr(x, y).statistic,
}
draw = np.random.default_rng(3)
NOISE = draw.normal(size=97)
CLASSES = {
    "random": (draw.integers(2, size=200), draw.integers(2, size=200)),
    "mostly right": (np.tile([0, 1, 1, 0, 1], 20), np.tile([0, 1, 1, 1, 1], 20)),
    "right": (np.array([0, 1, 1]), np.array([0, 1, 1])),
    "wrong": (np.array([0, 1, 1]), np.array([1, 0, 0])),
    "always 1": (np.ones(7), np.array([0, 1, 1, 1, 0, 1, 0])),
    "always 0": (np.zeros(7), np.array([0, 1, 1, 1, 0, 1, 0])),
    "gold is constant": (np.array([0, 1, 1]), np.ones(3)),
    "both are constant": (np.zeros(3), np.ones(3)),
    "one row": (np.array([1]), np.array([1])),
}
THREE = {
    "random": (draw.integers(3, size=200), draw.integers(3, size=200)),
    "a class never predicted": (np.array([0, 0, 1, 1, 0]), np.array([0, 2, 1, 2, 1])),
}
NUMBERS = {
    "random": (draw.normal(size=97), NOISE),
    "correlated": (NOISE + draw.normal(size=97), NOISE),
    "tied": (draw.integers(6, size=200) / 5, draw.integers(6, size=200) / 5),
    "equal": (NOISE, NOISE),
    "reversed": (-NOISE, NOISE),
    "monotonic": (np.exp(3 * NOISE), NOISE),
    "nearly constant": (1e6 + 1e-3 * NOISE, NOISE),
    "tiny": (1e-200 * (NOISE + draw.normal(size=97)), NOISE),
    "huge": (1e200 * (NOISE + draw.normal(size=97)), NOISE),
    "constant": (np.full(97, 0.1), NOISE),
    "gold is constant": (NOISE, np.full(97, 0.1)),
    "not finite": (np.where(NOISE > 1, np.nan, NOISE), NOISE),
}
PAIRS = [
    *((metric, *pair) for metric in OF_CLASSES for pair in CLASSES.items()),
    *((metric, *pair) for metric in ("acc", "matthews") for pair in THREE.items()),
    *((metric, *pair) for metric in OF_NUMBERS for pair in NUMBERS.items()),
]


@pytest.mark.parametrize("metric, what, pair", PAIRS, ids=[f"{m}, {w}" for m, w, _ in PAIRS])
def test_a_metric_is_that_of_scikit_learn_or_scipy(
    metric: str, what: str, pair: tuple[np.ndarray, np.ndarray]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constant input, at which theirs warn
        expected = THEIRS[metric](*pair)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = value(metric, [float(x) for x in pair[0]], [float(y) for y in pair[1]])
    assert found == pytest.approx(expected, rel=1e-7, abs=1e-9, nan_ok=True)
    assert math.isnan(found) == (metric in OF_NUMBERS and what.endswith(("constant", "finite"))
                                 and what != "nearly constant")  # fmt: skip


@pytest.mark.filterwarnings("error")
def test_an_infinite_prediction_has_a_rank_and_no_covariance() -> None:
    assert math.isnan(value("pearson", [1, math.inf, 2], [1, 3, 2]))
    assert value("spearman", [1, math.inf, 2], [1, 3, 2]) == 1


def test_the_tasks_know_every_metric() -> None:
    assert {*NAMES} == {*OF_CLASSES, *OF_NUMBERS} == {*THEIRS}


def test_the_standard_error_of_an_accuracy_is_that_of_a_mean() -> None:
    right = [1.0, 0, 1, 1, 0, 1, 1]
    found = stderr("acc", right, [1.0] * 7)
    assert found == pytest.approx(statistics.stdev(right) / math.sqrt(7), rel=1e-12)


def pair_of(metric: str, rows: int, draws: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw gold and predictions: right with probability 0.8, or with a correlation of 0.6."""
    if metric in OF_NUMBERS:
        gold = draws.normal(size=rows)
        return 0.6 * gold + 0.8 * draws.normal(size=rows), gold
    gold = (draws.random(rows) < 0.3).astype(float)
    return np.where(draws.random(rows) < 0.8, gold, 1 - gold), gold


@pytest.mark.parametrize("metric", ["f1", "matthews", "pearson", "spearman"])
def test_the_bootstrap_finds_the_deviation_of_other_draws(metric: str) -> None:
    """The reference draws new rows, as a population of data sets would have them."""
    draws = np.random.default_rng(5)
    values = [value(metric, *pair_of(metric, 400, draws)) for _ in range(300)]
    found = statistics.fmean(stderr(metric, *pair_of(metric, 400, draws)) or 0 for _ in range(2))
    assert found == pytest.approx(statistics.stdev(values), rel=0.2)


def test_a_standard_error_is_the_same_every_time() -> None:
    pair = pair_of("f1", 50, np.random.default_rng(1))
    assert stderr("f1", *pair) == stderr("f1", *pair)


def test_resamples_without_a_value_are_left_out() -> None:
    found = stderr("pearson", [1, 2, 2], [1, 2, 4])
    assert found is not None and 0 < found < 1


@pytest.mark.parametrize("metric", NAMES)
def test_one_row_and_an_undefined_metric_have_no_standard_error(metric: str) -> None:
    assert stderr(metric, [1], [1]) is None
    assert metric not in OF_NUMBERS or stderr(metric, [2, 2, 2], [1, 2, 3]) is None


def test_the_majority_is_the_most_frequent_class() -> None:
    most = majority(TASKS["mrpc"], [1, 0, 1, 1])
    assert most == pytest.approx({"acc": 3 / 4, "f1": 6 / 7})
    assert majority(TASKS["mnli"], [2, 1, 2, 1, 0]) == {"acc": 0.4}
    assert majority(TASKS["cola"], [1, 0, 1]) == {"matthews": 0}
    assert all(math.isnan(v) for v in majority(TASKS["stsb"], [0.5, 2, 3]).values())
