"""A console that shows control characters in names and texts escaped."""

from __future__ import annotations

from collections.abc import Iterable

import rich.console
from rich.console import ConsoleDimensions, ConsoleOptions, RenderableType
from rich.segment import Segment

from peptrain.text import UNSAFE, escaped

NARROWEST = 20
"""Columns. Below that lines of a table or of the help would be empty, and COLUMNS may say 0."""


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
