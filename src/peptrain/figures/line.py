"""The perplexity along the line between two models, from the tables of `analyze --line`."""

from __future__ import annotations

import math

from peptrain.figures.panel import Drawn, plain, sheet
from peptrain.figures.source import NotMeasured, Source, View, number
from peptrain.figures.style import imported, look, styled
from peptrain.text import one_line

MOST = 700.0
"""Largest loss whose exp is a float."""


def line(source: Source, view: View) -> Drawn:
    """LORO's Figure 3: perplexity over alpha, a line for each pair of models."""
    if not source.along:
        raise NotMeasured(
            "line: needs the directory that `peptrain analyze RUN RUN --line --out DIR` has written"
        )
    pairs: dict[str, list[tuple[float, float]]] = {}
    notes = []
    for row in source.along:
        name, alpha, loss = (
            one_line(str(row.get("pair"))),
            number(row, "alpha"),
            number(row, "loss"),
        )
        if alpha is None or loss is None or loss > MOST:
            notes.append(f"{name}: the loss at alpha {row.get('alpha')} is {row.get('loss')}")
        else:
            pairs.setdefault(name, []).append((alpha, math.exp(loss)))
    if not pairs:
        raise NotMeasured(f"line: no loss is finite ({'; '.join(notes)})")
    with styled():
        made, rows = sheet([2.8], legend=len(pairs))
        panel = made.panel(rows[0][0], "perplexity along the line", "alpha", "perplexity")
        for n, (name, points) in enumerate(pairs.items()):
            x, y = zip(*sorted(points), strict=True)
            panel.line("perplexity", name, x, y, look(n), marker=look(n).marker)
        panel.axes.set(yscale="log", xlabel="alpha", ylabel="perplexity")
        panel.axes.yaxis.set_major_locator(imported("matplotlib.ticker").LogLocator(subs=(1, 2, 5)))
        plain(panel.axes.yaxis)
        made.legend([(name, {"color": look(n).colour, "ls": look(n).dash, "marker": look(n).marker})
                     for n, name in enumerate(pairs)])  # fmt: skip
    ends = {one_line(str(row.get("pair"))): (row.get("one"), row.get("other"))
            for row in source.along}  # fmt: skip
    said = "; ".join(f"{name}: {one} to {other}" for name, (one, other) in ends.items())
    return Drawn(
        "Perplexity along the line between two models",
        "Of (1 - alpha) W_one + alpha W_other, all weights mixed, in fp32, over the held-out part."
        f" A pair of seeds of one method is the control. {one_line(said)}.",
        made.figure, made.numbers, notes,
    )  # fmt: skip
