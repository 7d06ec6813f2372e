"""Curves in text: they are as wide as asked for, and have the shape of their values."""

import math
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peptrain.display.curve import ASCII, BLOCKS, curve, has_blocks, sparkline

LOSSES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300)


def test_it_has_the_shape_of_its_values() -> None:
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1], 8, blocks=True) == BLOCKS[::-1]
    assert sparkline([1, 3, 5, 7], 2, blocks=True) == "▁█"
    assert sparkline([2.0, 2.0, 2.0], 8, blocks=False) == "___"
    assert curve([4.0, 4.0, 3.0, 1.0], 11, 2, blocks=True) == [
        "4.000 ┤██▃",
        "1.000 ┤███▁",
    ]
    assert curve([4.0, 4.0, 3.0, 1.0], 11, 2, blocks=False) == ["4.000 +##.", "1.000 +###."]


@given(LOSSES, st.integers(1, 40), st.booleans())
def test_a_sparkline_is_no_wider_than_asked_for(
    values: list[float], width: int, blocks: bool
) -> None:
    line = sparkline(values, width, blocks=blocks)
    assert len(line) == min(width, len(values))
    assert set(line) <= set(BLOCKS if blocks else ASCII)
    assert blocks or line.isascii()


@given(LOSSES, st.integers(30, 120), st.integers(2, 9), st.booleans())
def test_a_curve_fits_and_every_column_is_full_to_the_bottom(
    values: list[float], width: int, height: int, blocks: bool
) -> None:
    lines = curve(values, width, height, blocks=blocks)
    assert len(lines) == height and all(len(line) <= width for line in lines)
    assert len(lines[-1]) == width, "a column with the lowest value is seen too"
    full = "█" if blocks else "#"
    for upper, lower in pairwise(re.split("[┤│+|]", line, maxsplit=1)[1] for line in lines):
        assert all(b == full for a, b in zip(upper, lower, strict=False) if a != " ")
    assert blocks or "".join(lines).isascii()


@pytest.mark.parametrize(
    "encoding, has", [("utf-8", True), ("ascii", False), ("latin-1", False), ("no-such", False)]
)
def test_an_encoding_has_the_characters_or_not(encoding: str, has: bool) -> None:
    assert has_blocks(encoding) is has


def test_labels_are_the_highest_and_lowest_mean() -> None:
    values = [math.exp(-n / 100) for n in range(1000)]
    first, *_, last = curve(values, 57, 8, blocks=True)
    means = [sum(values[n : n + 20]) / 20 for n in range(0, 1000, 20)]
    assert first.startswith(f"{means[0]:.3f} ┤█") and last.startswith(f"{means[-1]:.3f} ┤█")


def test_values_with_labels_wider_than_the_terminal_are_drawn() -> None:
    lines = curve([1e308, -1e308], 40, 3, blocks=False)
    assert len(lines) == 3 and all(line.count("|") + line.count("+") <= 2 for line in lines)
