"""Write a report of runs or of a comparison: one HTML file that needs nothing else."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from peptrain.errors import ConfigError
from peptrain.figures.catalogue import FIGURES
from peptrain.figures.panel import Drawn
from peptrain.figures.read import read
from peptrain.figures.source import Axis, NotMeasured, Source, View, how_to_measure, listed
from peptrain.figures.style import dark_css, imported, rendered
from peptrain.files import write_atomically
from peptrain.reporting.tables import (
    Table,
    by_domain,
    common,
    compared,
    differing,
    evaluations,
    fine_tuned,
    in_pairs,
    judged,
    samples,
    shown,
    states,
)
from peptrain.settings.fields import check

log = logging.getLogger("peptrain")
SUFFIXES = (".html", ".htm")
MOST_HEAT_MAPS = 3
"""A report has those of the first runs only."""
DYNAMICS = (
    *((name, "weight") for name in ("per", "condition", "frobenius")),
    *((name, what) for what in ("update", "from_start") for name in ("per", "frobenius")),
    ("per", "gradient"),
)
"""What a report shows of what was measured. `peptrain plot` shows all."""


@dataclass
class Section:
    """A part of the report: tables, figures, and what it lacks."""

    title: str
    text: str = ""
    tables: list[Table] = field(default_factory=list)
    folded: dict[str, Table] = field(default_factory=dict)
    """Tables behind a summary."""
    figures: list[tuple[Drawn, str]] = field(default_factory=list)
    """With their SVG."""
    missing: list[str] = field(default_factory=list)

    def draw(self, name: str, source: Source, view: View, *, silent: bool = False) -> None:
        """Add a figure, or why it can't be drawn unless `silent`."""
        try:
            drawn = FIGURES[name](source, view)
        except NotMeasured as error:
            self.missing += [] if silent else [str(error)]
            return
        unique = re.sub(r"\W+", "-", f"{self.title}-{len(self.figures)}").lower()
        svg = rendered(drawn.figure, "svg", unique).decode()
        self.figures.append((drawn, _inline(svg)))


def report(paths: Sequence[Path], out: Path) -> Path:
    """Write a report of runs, or of a directory of `compare`, to the HTML file `out`; return it.

    It contains its figures and their numbers, opens offline and has no scripts. The runs may be in
    training. Raises ConfigError if `out` can't be written or is not named .html, CheckpointError
    for what can't be read, PeptrainError where matplotlib or jinja2 is missing.
    """
    jinja = imported("jinja2")
    imported("matplotlib")
    check(out.suffix in SUFFIXES, "--out", out, "a name that ends in .html")
    source = read(paths)
    for note in source.warnings:
        log.warning("%s", note)
    environment = jinja.Environment(autoescape=True, undefined=jinja.StrictUndefined)
    template = environment.from_string(
        files("peptrain.reporting").joinpath("report.html").read_text(encoding="utf-8")
    )
    html = template.render(
        title=_title(source, paths), warnings=source.warnings, sections=list(_sections(source)),
        dark=dark_css(),
    )  # fmt: skip
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, html)
    except OSError as error:
        raise ConfigError(
            f"--out {out}: can't be written: {error.strerror}; choose another place"
        ) from error
    return out


def _title(source: Source, paths: Sequence[Path]) -> str:
    if source.trials:
        return f"Comparison {shown(paths[0].resolve().name)}"
    names = [run.name for run in source.runs] or [shown(path.resolve().name) for path in paths]
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} runs"


def _inline(svg: str) -> str:
    """Return an SVG without what only a file of its own needs."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r' xmlns(:xlink)?="[^"]*"| version="1.1"', "", svg, count=3)


def _sections(source: Source) -> Iterator[Section]:
    """Return what there is to show. Why something is missing is said where first."""
    if source.along:
        yield _between(source)
        return
    made = [_settings(source), _curves(source), _dynamics(source), _speed(source),
            _held_out(source), _samples(source)]  # fmt: skip
    if source.trials:
        made.append(_comparison(source))
    said: set[str] = set()
    for section in made:
        section.missing = [why for why in dict.fromkeys(section.missing) if why not in said]
        said.update(section.missing)
        if section.text or section.tables or section.figures or section.missing:
            yield section


def _between(source: Source) -> Section:
    made = Section("Between two models")
    made.draw("line", source, View())
    return made


def _settings(source: Source) -> Section:
    made = Section("What differs" if len(source.runs) > 1 else "Run")
    differ = differing(source)
    if len(source.runs) > 1:
        if len(differ.heads) > 1 and differ.rows:
            made.tables.append(differ)
            if (whole := differing(source, whole=True)) != differ:
                made.folded["What differs, with whole values"] = whole
        else:
            made.text = "The settings of the runs are the same."
    if source.runs:
        made.tables.append(states(source))
        made.folded["Settings that all runs share" if source.runs[1:] else "Settings"] = common(
            source
        )
    return made


def _curves(source: Source) -> Section:
    made = Section("Curves")
    over: tuple[Axis, ...] = ("tokens", "time")
    for x in over:
        made.draw("loss", source, View(x=x))
    return made


def _speed(source: Source) -> Section:
    made = Section("Memory and throughput")
    made.draw("speed", source, View())
    return made


def _dynamics(source: Source) -> Section:
    made = Section("Learning dynamics")
    rows = [row for run in source.runs for row in (*run.of("dynamics"), *run.analysis)]
    found = {str(row.get("what")) for row in rows}
    if not found:
        made.missing.append(f"not measured: {how_to_measure(source)}")
        return made
    over_seeds = any(group[1:] for group in source.groups.values())
    for name, what in DYNAMICS:
        if what in found:
            made.draw(name, source, View(what=what))
            if over_seeds:
                made.draw(f"{name}-seeds", source, View(what=what))
    for run in source.runs[:MOST_HEAT_MAPS]:
        made.draw("layers", replace(source, runs=[run]), View())
    if left := [run.name for run in source.runs[MOST_HEAT_MAPS:]]:
        made.missing.append(
            f"layer by layer: shown of the first {MOST_HEAT_MAPS} runs; of {listed(left)} with"
            " `peptrain plot RUN --figure layers`"
        )
    spectra = {str(row.get("what")) for run in source.runs for row in run.spectra}
    for what in ("from_warm", "from_start", "weight"):
        if what in spectra:
            made.draw("spectra", source, View(what=what))
            break
    return made


def _held_out(source: Source) -> Section:
    made = Section("Held-out results and tasks")
    if (tuned := fine_tuned(source)).rows:
        made.text = (
            "Of fine-tuning, on the validation rows. Best: the largest value of the result that"
            " chooses the checkpoint. Majority: always the most frequent class. "
        )
        made.tables.append(tuned)
    tables = (each(source) for each in (evaluations, by_domain, judged, in_pairs))
    given = [table for table in tables if table.rows]
    made.tables += given
    if given:
        made.text += (
            "Of `peptrain eval`. Losses of different corpora can't be compared. Standard errors are"
            " over items, and contain no spread between seeds."
        )
    elif not made.tables:
        made.missing.append("no run was evaluated with `peptrain eval`")
    return made


def _samples(source: Source) -> Section:
    """Return the texts of the last step of each run that wrote some, with the earlier ones."""
    made, every = Section("Samples"), samples(source)
    last = {row[0]: row[1] for row in every.rows}
    latest = [row for row in every.rows if row[1] == last[row[0]]]
    if latest:
        made.text = "Written during training (train.sample_every)."
        made.tables.append(replace(every, rows=latest))
    if earlier := [row for row in every.rows if row[1] != last[row[0]]]:
        made.folded["Earlier samples"] = replace(every, rows=earlier)
    return made


def _comparison(source: Source) -> Section:
    made = Section("Comparison", text=shown(source.about.get("caption") or ""))
    if source.lines:
        made.tables.append(compared(source))
    notes: Any = source.about.get("notes")
    made.missing += [shown(note) for note in notes] if isinstance(notes, list) else []
    for name in ("rates", "frontier"):
        made.draw(name, source, View())
    for name in ("grid", "scaling"):  # of those that vary settings or sizes
        made.draw(name, source, View(), silent=True)
    return made
