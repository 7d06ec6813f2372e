"""The look of all figures, and how they are saved: the same bytes each time, light and dark."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from peptrain.errors import PeptrainError

WIDTH = 4.5
"""Inches of a figure: 324 units, so that letters of 9 have 10 pixels on a phone 400 wide."""
INK, FAINT, PAPER = "#1f2328", "#d8dce2", "#ffffff"
COLOURS = ("#0072b2", "#d55e00", "#008a65", "#aa4499", "#9a6b00", "#5f6670", "#882255")
"""From those of Okabe and Ito and of Tol, with a contrast of at least 3 to 1 on white."""
DARK = {
    INK: "#e6edf3", FAINT: "#3a414b", PAPER: "#14171c",
    "#0072b2": "#56b4e9", "#d55e00": "#ff8f4a", "#008a65": "#2bc79a", "#aa4499": "#e394d6",
    "#9a6b00": "#f0c24b", "#5f6670": "#b3bac4", "#882255": "#e0709c",
}  # fmt: skip
"""The same colours on a dark page."""
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
MARKERS = "osD^vPX<>*"
SETTINGS = {
    "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": FAINT, "grid.linewidth": 0.6, "axes.axisbelow": True, "axes.titlesize": 9,
    "axes.titlelocation": "left", "font.size": 9, "legend.fontsize": 9, "legend.frameon": False,
    "legend.handlelength": 2.6, "lines.linewidth": 1.4, "lines.markersize": 3.5,
    "figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER,
    "axes.linewidth": 0.7, "xtick.major.width": 0.7, "ytick.major.width": 0.7,
    "font.family": ["DejaVu Sans"], "svg.fonttype": "none",
    # Names are from strangers: a dollar is no formula.
    "text.parse_math": False,
}  # fmt: skip
FONTS = "'DejaVu Sans', Verdana, system-ui, sans-serif"


def imported(module: str) -> Any:
    """Import a module of the extra `report`. Raise PeptrainError if it isn't installed."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise PeptrainError(
            f"figures and reports need the package {error.name}; install it with: pip install"
            " 'peptrain[report]'"
        ) from error


@dataclass(frozen=True)
class Look:
    """Colour, dashes and marker: no two lines differ in colour alone."""

    colour: str
    dash: Any
    marker: str


def look(n: int) -> Look:
    """Return the look of line number `n`, 28 different ones."""
    return Look(
        COLOURS[n % len(COLOURS)],
        DASHES[n // len(COLOURS) % len(DASHES)],
        MARKERS[n % len(MARKERS)],
    )


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Draw with our settings, whatever the user's are."""
    matplotlib = imported("matplotlib")
    # A family of fonts may lack the letters of a name: a viewer has its own.
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        yield


def rendered(figure: Any, suffix: str, name: str) -> bytes:
    """Return the figure as svg, png or pdf, without a date. name: unique in a page of several."""
    file = io.BytesIO()
    about = {
        "svg": dict.fromkeys(("Date", "Creator", "Format", "Type")),
        "pdf": {"CreationDate": None},
    }
    with styled():
        imported("matplotlib").rcParams["svg.hashsalt"] = "peptrain"
        figure.savefig(file, format=suffix, dpi=200, metadata=about.get(suffix))
    if suffix != "svg":
        return file.getvalue()
    text = file.getvalue().decode()
    # References by id must not meet those of another figure in the same page.
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = text.replace("'DejaVu Sans'", FONTS)
    return text.replace("<defs>", f"<style>{dark_css()}</style>\n <defs>", 1).encode()


def dark_css() -> str:
    """Return the rules that recolour an SVG of ours on a dark page.

    They select by the colours themselves, so that a viewer without CSS shows the light figure.
    """
    rules = (
        f'[style*="{key}: {light}"]{{{key}:{dark}!important}}'
        for light, dark in DARK.items()
        for key in ("fill", "stroke")
    )
    return f"@media screen and (prefers-color-scheme:dark){{{''.join(rules)}}}"
