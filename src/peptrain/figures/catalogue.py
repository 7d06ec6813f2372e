"""All figures by name. A new one is a function, and a line here."""

from __future__ import annotations

from collections.abc import Callable

from peptrain.figures import curves, dynamics, grids
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
    "spectra": dynamics.spectra,
    "rates": grids.rates,
    "frontier": grids.frontier,
}
