"""A console that shows control characters in names and texts escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable

import rich.console
from rich.console import ConsoleDimensions, ConsoleOptions, RenderableType
from rich.segment import Segment

UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but for tab and line feed
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # they change the direction of what follows
    "\u2028\u2029\ud800-\udfff]"  # other line ends, and the bytes of a path that is not UTF-8
)
NARROWEST = 20
"""Columns. Below that lines of a table or of the help would be empty, and COLUMNS may say 0."""


def escaped(text: str) -> str:
    r"""Return `text` with unsafe characters as Python writes them: ESC becomes \x1b."""
    return UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    r"""Return `text` with unsafe characters and line feeds escaped: a line feed becomes \n."""
    return escaped(text).replace("\n", r"\n")


class Console(rich.console.Console):
    """rich's console. All text printed on it passes `render`, also that of logs and displays."""

    @property
    def size(self) -> ConsoleDimensions:
        """The size of the terminal, or what COLUMNS says, but at least `NARROWEST` columns."""
        width, height = super().size
        return ConsoleDimensions(max(width, NARROWEST), height)

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        self._width, self._height = new_size

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control or not UNSAFE.search(segment.text):
                yield segment
            else:
                yield Segment(escaped(segment.text), segment.style)
