"""Each number of a figure is that of its CSV, and what figures do with rows of any kind."""

import csv
import io
import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from made import (
    RATES,
    TOKENS,
    ablation,
    analyzed,
    comparison,
    dynamics,
    end,
    finished,
    line,
    run,
    steps,
    with_circuits,
)

from peptrain.figures import grids
from peptrain.figures.catalogue import FIGURES
from peptrain.figures.panel import Drawn, sheet
from peptrain.figures.read import read
from peptrain.figures.source import NotMeasured, Source, View, marks
from peptrain.figures.style import COLOURS, DARK, FAINT, INK, PAPER, look, rendered, styled
from peptrain.ops.student import student_t

SEEDS = ("per-seeds", "condition-seeds", "frobenius-seeds")
OF_GRID = ("rates", "frontier", "grid", "scaling")
OF_SPECTRA = ("spectra", "spectrum-heatmap")
LOSSES = (3.0, 5.5, 9.25, 3.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of a run, another run, and a comparison of forty."""
    made = tmp_path_factory.mktemp("made")
    for seed in (0, 1):
        analyzed(finished(made / f"full-{seed}", train_seed=seed))
    finished(made / "other", method_name="other")
    comparison(made / "forty")
    line(made / "line", LOSSES)
    sizes = [{"model.hidden_size": d} for d in (64, 128)]
    ablation(made / "settings", [
        ("full", {}, {}),
        *[("bpt", {"method.rank": r, **d}, {}) for d in sizes for r in (4, 8)],
    ], non_embedding_trainable=[10**5, 10**4, 2 * 10**4, 10**5, 2 * 10**5],
        peak_bytes=[2**30 * n for n in (8, 4, 5, 6, 7)])  # fmt: skip
    return made


@pytest.fixture(scope="module")
def runs(folder: Path) -> Source:
    return read([folder / "full-0", folder / "full-1", folder / "other"])


@pytest.fixture(scope="module")
def forty(folder: Path) -> Source:
    return read([folder / "forty"])


@pytest.fixture(scope="module")
def draw(folder: Path, runs: Source, forty: Source) -> Callable[..., Drawn]:
    """Draw a figure by its name, of the source that has what it needs."""
    one, of = Source(runs.runs[:1]), {"line": read([folder / "line"])}
    of |= dict.fromkeys(("rates", "frontier"), forty) | dict.fromkeys(
        ("layers", OF_SPECTRA[1]), one
    )
    of |= dict.fromkeys(("grid", "scaling"), read([folder / "settings"]))

    def drawn(name: str) -> Drawn:
        what = "from_start" if name in OF_SPECTRA else "weight"
        return FIGURES[name](of.get(name, runs), View(what=what))

    return drawn


def points(artist: Any) -> list[tuple[float, ...]]:
    """What an artist of matplotlib draws, read from the artist."""
    kind = type(artist).__name__
    if kind == "Line2D":
        return list(zip(*map(list, artist.get_data()), strict=True))
    if kind == "FillBetweenPolyCollection":
        vertices = artist.get_paths()[0].vertices
        n = (len(vertices) - 3) // 2
        low, high = vertices[1 : n + 1], vertices[n + 2 : 2 * n + 2][::-1]
        return [(x, a, b) for (x, a), (_, b) in zip(low, high, strict=True)]
    if kind == "LineCollection":
        return [(s[0][0], s[0][1], s[1][1]) for s in artist.get_segments()]
    if kind == "StepPatch":
        values, edges, _ = artist.get_data()
        return list(zip(edges[:-1], values, strict=True))
    if kind == "Rectangle":
        return [(artist.get_x() + artist.get_width() / 2, artist.get_height())]
    assert kind == "AxesImage", kind
    data = np.ma.filled(artist.get_array(), math.nan)
    return [(value,) for row in data for value in row if not math.isnan(value)]


def drawn_numbers(drawn: Drawn) -> Iterator[tuple[str, str, str, tuple[float, ...]]]:
    for axes in drawn.figure.axes:
        for artist in (*axes.lines, *axes.collections, *axes.patches, *axes.images):
            mark, found, line = str(artist.get_label()).partition("|")
            if found:
                for point in points(artist):
                    yield str(axes.get_label()), mark, line, point


def of_csv(text: str) -> Iterator[tuple[str, str, str, tuple[float, ...]]]:
    for row in csv.DictReader(io.StringIO(text)):
        place = row["panel"], row["mark"], row["line"]
        if row["mark"] == "95 % over seeds" and row["panel"].endswith("_proj"):
            for key in ("low", "high"):  # two lines
                yield *place, (float(row["x"]), float(row[key]))
            continue
        keys = ("value",) if row["value"] else ("x", "y", "low", "high")
        yield *place, tuple(float(row[key]) for key in keys if row[key])


@pytest.mark.parametrize("name", FIGURES)
def test_each_number_that_is_drawn_is_one_of_the_csv(
    name: str, draw: Callable[[str], Drawn]
) -> None:
    drawn = draw(name)
    picture, table = sorted(drawn_numbers(drawn)), sorted(of_csv(drawn.csv()))
    assert picture and picture == table
    for axes in drawn.figure.axes:  # nothing else is drawn than what has a name
        for artist in (*axes.lines, *axes.collections, *axes.images):
            assert "|" in str(artist.get_label()) or axes.get_label() in ("", "<colorbar>")
    row = next(csv.DictReader(io.StringIO(drawn.csv())))
    assert row["x_axis"] and row["y_axis"] and drawn.title and drawn.caption


def test_the_loss_is_that_of_the_rows_on_each_axis(folder: Path, runs: Source) -> None:
    rows = [json.loads(line) for line in (folder / "other/metrics.jsonl").open()]
    wanted = [(r["step"], r["loss"], r["seconds"]) for r in rows if r["event"] == "step"]
    at = {"steps": 1, "tokens": TOKENS, "flops": TOKENS * 10.0}
    for x in ("steps", "tokens", "time", "flops"):
        drawn = FIGURES["loss"](runs, View(x=x))  # type: ignore[arg-type]
        found = [(n["x"], n["y"]) for n in drawn.numbers
                 if (n["mark"], n["line"]) == ("training", "other")]  # fmt: skip
        assert found == [(t if x == "time" else s * at[x], loss) for s, loss, t in wanted]


def test_merges_resets_and_phases_are_marked_at_their_rows(runs: Source) -> None:
    found = defaultdict(list)
    for event, x in marks(runs.runs[0], "steps"):
        found[event].append(x)
    assert found == {"merge": [6, 12, 18, 24, 30, 36], "reset": [12, 24, 36], "phase": [8]}


def test_bands_over_layers_and_over_seeds_are_students_and_never_mixed(
    draw: Callable[[str], Drawn],
) -> None:
    rows = [dynamics((10, 20, 40), seed=seed) for seed in (0, 1)]
    values = [
        [row["per"] for row in of if row["step"] == 20 and row["module"] == "mlp.down_proj"]
        for of in rows
    ]

    def numbers(name: str, mark: str) -> list[tuple[float, float]]:
        place = ("mlp.down_proj", mark, 20)
        return [(n["low"], n["high"]) for n in draw(name).numbers
                if (n["panel"], n["mark"], n["x"]) == place]  # fmt: skip

    def interval(of: list[float]) -> tuple[float, float]:
        half = student_t(0.95, len(of) - 1) * statistics.stdev(of) / math.sqrt(len(of))
        return statistics.fmean(of) - half, statistics.fmean(of) + half

    over_layers = numbers("per", "95 % over layers")[:2]
    assert over_layers == [pytest.approx(interval(of)) for of in values]
    over_seeds = numbers("per-seeds", "95 % over seeds")
    assert over_seeds == [pytest.approx(interval([statistics.fmean(of) for of in values]))]
    assert not numbers("per", "95 % over seeds") + numbers("per-seeds", "95 % over layers")
    styles = [{line.get_linestyle() for line in draw(name).figure.axes[0].lines}
              for name in ("per", "per-seeds")]  # fmt: skip
    assert styles == [{"-"}, {"--"}]


def test_two_seeds_are_dots_and_three_have_an_interval() -> None:
    with styled():
        made, rows = sheet([2.0])
        panel = made.panel(rows[0][0], "losses", "rank", "loss")
        points = [(4.0, [3.0]), (8.0, [3.0, 4.0]), (16.0, [1.0, 2.0, 3.0])]
        panel.over_seeds("bpt", points, look(0), ls="none")
    found: dict[str, list[list[float]]] = defaultdict(list)
    for n in made.numbers:
        found[n["mark"]].append([n[key] for key in ("x", "y", "low", "high") if key in n])
    assert found["mean over seeds"] == [[4.0, 3.0], [8.0, 3.5], [16.0, 2.0]]
    assert found["one seed"] == [[8.0, 3.0], [8.0, 4.0]]
    half = student_t(0.95, 2) / math.sqrt(3)
    assert found["95 % over seeds"] == [pytest.approx([16.0, 2 - half, 2 + half])]


def test_rates_that_are_near_one_another_have_one_text(forty: Source) -> None:
    (axes,) = FIGURES["rates"](forty, View()).figure.axes
    grids._rates_as_ticks(axes, [1e-3, 2e-3, 4e-3, 5e-3, 1e-2])
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0.001", "0.002", "0.004", "", "0.01"]


def test_the_best_rate_is_said_to_be_inside_or_at_the_edge(forty: Source) -> None:
    notes = FIGURES["rates"](forty, View()).notes
    assert "full: best at 0.002, inside the rates tried" in notes
    assert any(n.startswith("relora: best at 0.008, at the highest rate") for n in notes)
    assert any(n.startswith("loro: best at 0.001, at the lowest rate") for n in notes)
    assert sum(note.endswith("diverged") for note in notes) == 2


def test_the_frontier_has_what_nothing_beats(forty: Source) -> None:
    drawn = FIGURES["frontier"](forty, View())
    of = [n for n in drawn.numbers if n["panel"] == "trainable parameters"]
    every = {(n["x"], n["y"]) for n in of if n["mark"] == "mean over seeds"}
    best = {(n["x"], n["y"]) for n in of if n["mark"] == "frontier"}
    beaten = {p for p in every for q in every if q != p and q[0] <= p[0] and q[1] <= p[1]}
    assert best == every - beaten and len(every) == 5
    assert drawn.notes == []


def test_the_frontier_has_no_seconds_where_they_are_equal(forty: Source) -> None:
    def panels(equal: str) -> set[str]:
        drawn = FIGURES["frontier"](replace(forty, about={"equal": equal}), View())
        return {str(n["panel"]) for n in drawn.numbers}

    assert panels("tokens") - panels("time") == {"seconds of training"}


def test_a_peak_is_missed_only_where_others_have_one(tmp_path: Path) -> None:
    """On a CPU nothing has a peak, and nobody is warned of it."""
    two = [("full", {}, {}), *(("bpt", {"method.rank": r}, {}) for r in (4, 8))]
    gpu = [{**row, "peak_bytes": 2**30} for row in steps(8)]
    for peaks, partly in (([None] * 3, False), ([2**30, 2**30, None], True)):
        made = read([ablation(tmp_path / f"{partly}", two, peak_bytes=peaks)])
        for name, what in (("grid", "peak memory"), ("frontier", "peak bytes on the GPU")):
            notes = "; ".join(FIGURES[name](made, View()).notes)
            assert notes.startswith(f"{what}: not known of every") if partly else notes == ""
    cpu, on_gpu = run(tmp_path / "cpu", steps(8)), run(tmp_path / "gpu", gpu)
    drawn = FIGURES["speed"](read([cpu]), View())
    assert drawn.notes == [] and "emory" not in drawn.title + drawn.caption
    notes = FIGURES["speed"](read([cpu, on_gpu]), View()).notes
    assert notes == ["cpu: no peak memory, which is known on a GPU only"]


def test_a_spectrum_is_counted_in_bins_of_a_twentieth(
    folder: Path, draw: Callable[[str], Drawn]
) -> None:
    with (folder / "full-0/analysis/40.spectra.csv").open() as file:
        sigma = [float(s) for row in csv.DictReader(file) if row["module"] == "mlp.down_proj"
                 for s in row["sigma"].split()]  # fmt: skip
    found = {n["x"]: n["y"] for n in draw("spectra").numbers
             if n["panel"] == "mlp.down_proj" and n["line"] == "full-0"}  # fmt: skip
    assert sum(found.values()) == len(sigma) == 16
    for left, number in found.items():
        assert number == sum(left <= s < left + 0.05 for s in sigma)


def test_what_is_not_finite_is_left_out_of_the_mean_and_hollow(tmp_path: Path) -> None:
    rows = dynamics((2,), modules=("q_proj",))
    rows[1]["condition"] = None
    drawn = FIGURES["condition"](read([run(tmp_path / "run", rows)]), View())
    wanted = statistics.fmean(math.log10(rows[n]["condition"]) for n in (0, 2))
    found = {n["mark"]: n["y"] for n in drawn.numbers if "y" in n}
    assert found == {"mean over layers": wanted, "not finite in some layers": wanted}


def circuits(path: Path, name: str, values: tuple[str, ...] = ("0.5", "0.75")) -> Path:
    """A run with rows in training, and OV circuits in tables."""
    rows = dynamics((2, 4), layers=2, modules=("mlp.down_proj",))
    made = run(path / name, rows, train_seed=int(name))
    return with_circuits(made, {4: values}, seed=int(name))


@pytest.mark.parametrize(
    ("name", "wanted", "axis"),
    [("per", 0.625, "PER of weight over the structural rank"),
     ("condition", (math.log10(500) + math.log10(750)) / 2, "log10 condition of weight")],
)  # fmt: skip
def test_the_panel_of_ov_is_the_sum_over_heads_over_its_rank_beside_rows_in_training(
    name: str, wanted: float, axis: str, tmp_path: Path
) -> None:
    source = read([circuits(tmp_path, seed) for seed in ("0", "1")])
    for figure, mark in ((name, "mean over layers"), (f"{name}-seeds", "mean over seeds")):
        drawn = FIGURES[figure](source, View())
        of = [n for n in drawn.numbers if n["mark"] == mark]
        found = [(n["x"], n["y"], n["y_axis"]) for n in of if n["panel"] == "ov"]
        assert {place for place, *_ in found} == {4} and {label for *_, label in found} == {axis}
        assert [y for _, y, _ in found] == pytest.approx([wanted] * len(found))
        others = {(n["panel"], n["x"], n["y_axis"]) for n in of if n["panel"] != "ov"}
        label = axis.partition(" over the ")[0]
        assert others == {("mlp.down_proj", step, label) for step in (2, 4)}
        assert "Panel ov: the sum over heads" in drawn.caption


@pytest.mark.parametrize("what", ["update", "from_start"])
@pytest.mark.parametrize("name", ["per", "condition-seeds", "layers", "spectra", "spectrum-heatmap",
                                  "small-singular"])  # fmt: skip
def test_what_was_chosen_is_in_the_picture_and_in_its_numbers(
    name: str, what: str, tmp_path: Path
) -> None:
    rows = dynamics((2, 4), what=what)
    made = [analyzed(run(tmp_path / f"{n}", rows, train_seed=n), what) for n in (0, 1)]
    alone = name in ("layers", "spectrum-heatmap")
    drawn = FIGURES[name](read(made[:1] if alone else made), View(what=what))
    shown = "W_T - W_0" if (name, what) == ("small-singular", "from_start") else what
    drawing = ElementTree.fromstring(rendered(drawn.figure, "svg", "x"))
    assert any(shown in "".join(text.itertext()) for text in drawing.iter() if "text" in text.tag)
    assert all(shown in row["y_axis"] or shown in row["mark"] for row in drawn.numbers)


def test_the_columns_of_a_heat_map_have_their_own_steps(tmp_path: Path) -> None:
    """Panels share their axes, and OV circuits are measured at other steps and layers."""
    rows = dynamics((2, 4, 32), layers=1, modules=("mlp.down_proj",))
    made = with_circuits(run(tmp_path / "run", rows), {4: ("0.5", "0.75"), 64: ("0.25", "1")})
    axes = [a for a in FIGURES["layers"](read([made]), View()).figure.axes if a.images]
    for ax in axes:
        image = ax.images[0].get_array()
        assert list(ax.get_xticks()) == [0, 1, 2, 3] and image.shape == (2, 4)
        assert [label.get_text() for label in ax.get_xticklabels()] == ["2", "4", "32", "64"]
    assert [ax.get_xlabel() for ax in axes] == ["steps (not to scale)"] * 2
    circuits = axes[1].images[0].get_array().filled(-1).tolist()
    assert circuits == [[-1, 0.5, -1, 0.25], [-1, 0.75, -1, 1]]


def test_without_rows_in_training_all_panels_are_of_the_analysis(tmp_path: Path) -> None:
    made = with_circuits(run(tmp_path / "run"), {4: ("0.5", "0.75")})
    drawn = FIGURES["per"](read([made]), View())
    found = {n["panel"]: n["y"] for n in drawn.numbers if "y" in n}
    assert found == {"mlp.down_proj": 0.9, "ov": 0.625}


def test_circuits_that_are_not_finite_are_hollow_over_layers_and_over_seeds(
    tmp_path: Path,
) -> None:
    made = [circuits(tmp_path, "0", ("0.5", "nan")), circuits(tmp_path, "1", ("0.75", "0.75"))]
    for figure, lines in (("per", {"0": 0.5}), ("per-seeds", {"0 (2 seeds)": 0.625})):
        numbers = FIGURES[figure](read(made), View()).numbers
        hollow = [n for n in numbers if n["mark"] == "not finite in some layers"]
        assert {n["line"]: n["y"] for n in hollow} == lines
        assert {n["panel"] for n in hollow} == {"ov"}


def test_rows_in_training_are_not_mixed_with_those_of_an_analysis(tmp_path: Path) -> None:
    made = analyzed(run(tmp_path / "run", dynamics((2, 4), what="from_start")))
    drawn = FIGURES["per"](read([made]), View(what="from_start"))
    assert {n["x"] for n in drawn.numbers} == {2, 4}


def test_a_run_with_one_row_is_drawn_with_markers(tmp_path: Path) -> None:
    source = read([run(tmp_path / "run", steps(2))])
    drawn = FIGURES["loss"](source, View())
    (line,) = drawn.figure.axes[0].lines
    assert list(line.get_xdata()) == [2 * TOKENS] and line.get_marker() != "None"
    assert FIGURES["speed"](source, View()).notes == []


def test_a_row_of_another_version_lends_what_it_has(tmp_path: Path) -> None:
    rows = [{"event": "step", "step": 1, "loss": 3.0, "new": {"a": [1]}, "optim": "fast",
             "grad_norm": None, "tokens": 10**400, "seconds": True},
            {"event": "surprise", "step": 1, "value": 3}]  # fmt: skip
    source = read([run(tmp_path / "run", rows)])
    drawn = FIGURES["loss"](source, View())
    assert [(n["panel"], n["x"], n["y"]) for n in drawn.numbers] == [("loss", TOKENS, 3.0)]
    with pytest.raises(NotMeasured, match=r"--x time: no row tells it \(run\); take --x steps"):
        FIGURES["loss"](source, View(x="time"))
    with pytest.raises(NotMeasured, match="FLOPs are written at the end of a run, and none has"):
        FIGURES["loss"](source, View(x="flops"))
    with pytest.raises(NotMeasured, match="no row with a loss yet"):
        FIGURES["loss"](read([run(tmp_path / "empty")]), View(x="steps"))


def test_runs_on_different_text_are_said_to_be_no_comparison(tmp_path: Path) -> None:
    made = [run(tmp_path / name, steps(4), data=name) for name in ("a", "b")]
    assert "trained on different text" in read(made).warnings[0]
    assert read([made[0]]).warnings == []


@pytest.mark.parametrize("last, yet", [((end(4),), ""), ((), " yet")], ids=["ended", "training"])
def test_where_the_budget_allowed_no_measurement_the_budget_is_named(
    last: tuple[dict[str, Any], ...], yet: str, tmp_path: Path
) -> None:
    observed = {"train_observe": "dynamics", "train_observe_budget": 0.02}
    made = run(tmp_path / "run", [*steps(4), *last], **observed)
    with pytest.raises(NotMeasured) as caught:
        FIGURES["per"](read([made]), View())
    assert str(caught.value) == (
        f"per: not measured of weight (run); train.observe_budget 0.02 allowed no measurement{yet};"
        " train with a larger one, or run `peptrain analyze RUN`"
    )


def test_of_a_comparison_a_few_runs_are_named_and_how_to_analyze_all(folder: Path) -> None:
    source = read([folder / "forty"])
    runs = re.escape(f"{folder / 'forty' / 'runs'}/*")
    for name in ("per", "spectra"):
        with pytest.raises(NotMeasured, match=rf"and \d+ others\).* `peptrain analyze {runs}`$"):
            FIGURES[name](source, View())


def test_what_is_not_there_is_named_with_what_is(runs: Source, tmp_path: Path) -> None:
    with pytest.raises(NotMeasured, match="choose --what from weight, from_start"):
        FIGURES["per"](runs, View(what="nothing"))
    bare = read([run(tmp_path / "bare", [*steps(4), end(4)])])
    with pytest.raises(NotMeasured, match=r"train with --train\.observe dynamics, or run `pep"):
        FIGURES["condition"](bare, View())
    with pytest.raises(NotMeasured, match=r"spectra: .* \(bare\); run `peptrain analyze RUN`"):
        FIGURES["spectra"](bare, View())
    with pytest.raises(NotMeasured, match="differ in their seed alone"):
        FIGURES["per-seeds"](Source(runs.runs[:1]), View())
    with pytest.raises(NotMeasured, match="layers: shows one run"):
        FIGURES["layers"](runs, View())
    for name in OF_GRID:
        with pytest.raises(NotMeasured, match="is of a comparison"):
            FIGURES[name](runs, View())
    with pytest.raises(NotMeasured, match="no singular values of gradient"):
        FIGURES["spectra"](runs, View(what="gradient"))


def test_an_svg_is_the_same_each_time_with_its_text_as_text_and_dark_on_demand(
    tmp_path: Path,
) -> None:
    odd = tmp_path / "$x_1$ <script>alert(1)</script> & “\u001b”"
    source = read([run(Path(str(odd).replace("/script", "script")), steps(8, events=True))])
    first, again = (
        rendered(FIGURES["loss"](source, View()).figure, "svg", "loss").decode() for _ in range(2)
    )
    assert first == again and "date" not in first.lower() and "matplotlib v" not in first.lower()
    texts = [node.text or "" for node in ElementTree.fromstring(first).iter() if "text" in node.tag]
    assert any("$x_1$ <script>" in text and r"\x1b" in text for text in texts)
    used = set(re.findall(r"(?:fill|stroke): (#\w{6})", first))
    assert used <= set(DARK) and {INK, PAPER, FAINT, COLOURS[0]} <= used
    assert "prefers-color-scheme:dark" in first
    bare = re.sub(r'xmlns(:xlink)?="[^"]*"|<!DOCTYPE[^>]*>', "", first)
    assert "http" not in bare


def contrast(one: str, other: str) -> float:
    """WCAG's."""

    def luminance(colour: str) -> float:
        parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_every_colour_of_a_line_has_the_contrast_of_graphics_light_and_dark() -> None:
    assert set(DARK) == {INK, FAINT, PAPER, *COLOURS}
    for colour in COLOURS:
        assert contrast(colour, PAPER) >= 3 and contrast(DARK[colour], DARK[PAPER]) >= 3
    assert min(contrast(INK, PAPER), contrast(DARK[INK], DARK[PAPER])) > 7


def test_forty_runs_are_read_as_those_at_the_best_rates(forty: Source) -> None:
    assert len(forty.trials) == 40 and len(RATES) == 4
    assert len(forty.runs) == 10 and len(forty.groups) == 5
    assert {run.settings["optim.lr"] for run in forty.groups["relora"]} == {8e-3}
