"""All figures by name. A new one is a function, and a line here."""

from __future__ import annotations

from collections.abc import Callable

from peptrain.figures import ablations, curves, dynamics, grids, line, spectra
from peptrain.figures.panel import Drawn
from peptrain.figures.source import Source, View

Figure = Callable[[Source, View], Drawn]

FIGURES: dict[str, Figure] = {
    "loss": curves.loss,
    "speed": curves.speed,
    "per": dynamics.per,
    "condition": dynamics.condition,
    "frobenius": dynamics.frobenius,
    "per-seeds": dynamics.per_seeds,
    "condition-seeds": dynamics.condition_seeds,
    "frobenius-seeds": dynamics.frobenius_seeds,
    "layers": dynamics.layers,
    "spectra": spectra.spectra,
    "singular-histogram": spectra.singular_histogram,
    "small-singular": spectra.small_singular,
    "spectrum-heatmap": spectra.spectrum_heatmap,
    "rates": grids.rates,
    "frontier": grids.frontier,
    "grid": ablations.grid,
    "scaling": ablations.scaling,
    "line": line.line,
}
