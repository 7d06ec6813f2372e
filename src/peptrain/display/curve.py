"""Small curves in text: blocks, or ASCII where the encoding lacks them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

BLOCKS, ASCII = "▁▂▃▄▅▆▇█", "_.-~=+*#"


def has_blocks(encoding: str) -> bool:
    """Return whether an encoding has the characters of the curves."""
    try:
        f"{BLOCKS}│┤".encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def sparkline(values: Sequence[float], width: int, *, blocks: bool) -> str:
    """Return `values` as at most `width` characters, the lowest and the highest value at the ends.

    A character is the mean of its values. blocks: whether block characters may be used.
    """
    signs = BLOCKS if blocks else ASCII
    return "".join(signs[n] for n in _levels(_means(values, min(width, len(values))), len(signs)))


def curve(values: Sequence[float], width: int, height: int, *, blocks: bool) -> list[str]:
    """Return lines of an area chart of `values`, with the largest and the smallest mean beside it.

    width: characters, with the labels.
    """
    highest, lowest = (f"{pick(values):.3f}" for pick in (max, min))
    margin = max(len(highest), len(lowest))
    means = _means(values, max(1, width - margin - 2))
    highest, lowest = (f"{pick(means):.3f}".rjust(margin) for pick in (max, min))
    levels = [n + 1 for n in _levels(means, 8 * height)]
    signs = [" ", *(BLOCKS if blocks else "....####")]
    tick, axis = "┤│" if blocks else "+|"
    lines = []
    for row in reversed(range(height)):
        label = highest if row == height - 1 else lowest if row == 0 else " " * margin
        cells = "".join(signs[min(8, max(0, n - 8 * row))] for n in levels)
        lines.append(f"{label} {tick if label.strip() else axis}{cells}".rstrip())
    return lines


def _means(values: Sequence[float], width: int) -> list[float]:
    """Return `width` means of consecutive values, which repeat if there are fewer."""
    starts = [n * len(values) // width for n in range(width + 1)]
    parts = [values[a : max(b, a + 1)] for a, b in pairwise(starts)]
    return [sum(part) / len(part) for part in parts]


def _levels(values: Sequence[float], count: int) -> list[int]:
    """Return each value as a level from 0, of the smallest, to count - 1, of the largest."""
    low, span = min(values), max(values) - min(values)
    return [round((v - low) / span * (count - 1)) if span > 0 else 0 for v in values]
