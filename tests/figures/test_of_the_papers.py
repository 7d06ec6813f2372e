"""Figures of the papers: their values are those of the tables and rows that they are drawn from."""

import csv
import math
import statistics
from collections import defaultdict
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from made import Row, ablation, analyzed, comparison, finished, line, rewrite, run

from peptrain.errors import CheckpointError
from peptrain.figures.catalogue import FIGURES
from peptrain.figures.panel import Drawn
from peptrain.figures.read import read
from peptrain.figures.source import NotMeasured, Source, View
from peptrain.reporting.plot import plot


def spectra(path: Path, step: int, module: str) -> list[list[float]]:
    """The singular values in a table, by layer."""
    with (path / f"analysis/{step}.spectra.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["module"] == module]
    return [[float(s) for s in row["sigma"].split()] for row in rows]


def numbers(drawn: Drawn, **where: Any) -> list[dict[str, Any]]:
    return [n for n in drawn.numbers if all(n[key] == value for key, value in where.items())]


@pytest.fixture
def seeds(tmp_path: Path) -> list[Path]:
    """Two seeds of one run and another run, all analyzed."""
    made = [analyzed(finished(tmp_path / f"full-{n}", train_seed=n), seed=n) for n in (0, 1)]
    return [*made, analyzed(finished(tmp_path / "relora", method_name="relora"), seed=2)]


def test_a_histogram_of_what_was_learned_is_the_mean_over_seeds(seeds: list[Path]) -> None:
    drawn = FIGURES["singular-histogram"](read(seeds), View())
    assert "W_T - W_0" in drawn.title and drawn.notes == []
    assert {n["panel"] for n in drawn.numbers} == {"q", "down"}
    every = [list(chain(*spectra(path, 40, "self_attn.q_proj"))) for path in seeds]
    found = numbers(drawn, panel="q", line="full-0 (2 seeds)")
    assert found
    for n in found:
        counts = [sum(n["x"] <= s < n["x"] + 0.05 for s in sigmas) for sigmas in every[:2]]
        assert n["y"] == statistics.fmean(counts)
    assert sum(n["y"] for n in numbers(drawn, panel="q", line="relora")) == len(every[2]) == 16


def test_small_singular_values_are_counted_on_both_sides(seeds: list[Path]) -> None:
    drawn = FIGURES["small-singular"](read(seeds), View())
    assert {n["mark"] for n in drawn.numbers} == {"q", "down"}
    for side in ("above", "below"):
        each = [
            sum((s > 0.1) == (side == "above") for s in chain(*spectra(p, 40, "mlp.down_proj")))
            for p in seeds
        ]
        where = {"panel": f"{side} 0.1", "mark": "down"}
        (of_seeds,) = numbers(drawn, line="full-0 (2 seeds)", **where)
        (of_one,) = numbers(drawn, line="relora", **where)
        assert (of_seeds["y"], of_one["y"]) == (statistics.fmean(each[:2]), each[2])
        assert of_seeds["x"] < of_one["x"] and round(of_seeds["x"]) == round(of_one["x"])


def test_of_what_was_learned_all_runs_show_the_same(seeds: list[Path], tmp_path: Path) -> None:
    warm = analyzed(finished(tmp_path / "warm"), what="from_warm")
    both = analyzed(finished(tmp_path / "both"), what="from_warm")
    for step in (20, 40):
        head, *rows = (both / f"analysis/{step}.spectra.csv").read_text().splitlines()
        more = [row.replace("from_warm", "from_start") for row in rows]
        rewrite(both, "\n".join([head, *rows, *more]) + "\n", step)

    def said(paths: list[Path], what: str = "weight") -> tuple[str, list[str]]:
        drawn = FIGURES["small-singular"](read(paths), View(what=what))
        return drawn.title, list(drawn.notes)

    title, notes = said([both, *seeds])
    assert "W_T - W_0 " in title and notes == []
    title, notes = said([both, warm])
    assert "W_T - W_warm " in title and notes == []
    title, notes = said([warm, seeds[2]])
    assert "W_T - W_warm " in title and notes == ["relora: no singular values of from_warm"]
    title, notes = said([both, warm], "from_start")
    assert "W_T - W_0 " in title and notes == ["warm: no singular values of from_start"]


def test_a_heat_map_has_the_mean_over_layers_of_each_singular_value(seeds: list[Path]) -> None:
    drawn = FIGURES["spectrum-heatmap"](read(seeds[:1]), View(what="from_start"))
    assert {n["x"] for n in drawn.numbers} == {20, 40}
    assert {n["y"] for n in drawn.numbers} == set(range(1, 9))
    for step in (20, 40):
        layers = spectra(seeds[0], step, "mlp.down_proj")
        for n in numbers(drawn, panel="mlp.down_proj", x=step):
            logs = [math.log10(sigmas[n["y"] - 1]) for sigmas in layers]
            assert n["value"] == pytest.approx(statistics.fmean(logs))
    with pytest.raises(NotMeasured, match=r"spectrum-heatmap: shows one run \(got 3\)"):
        FIGURES["spectrum-heatmap"](read(seeds), View(what="from_start"))


def test_a_singular_value_of_zero_has_no_logarithm_and_no_cell(tmp_path: Path) -> None:
    made = analyzed(finished(tmp_path / "run"))
    head, first, *_ = (made / "analysis/40.spectra.csv").read_text().splitlines()
    rewrite(made, f"{head}\n{first.rpartition(',')[0]},1.0e+01 0.0e+00\n")
    drawn = FIGURES["spectrum-heatmap"](read([made]), View(what="from_start"))
    assert [(n["y"], n["value"]) for n in numbers(drawn, x=40)] == [(1, 1.0)]


def test_without_singular_values_a_figure_of_them_names_the_command(tmp_path: Path) -> None:
    source = read([finished(tmp_path / "run")])
    for name in ("singular-histogram", "small-singular", "spectrum-heatmap"):
        with pytest.raises(
            NotMeasured, match=rf"{name}: no singular .*; run `peptrain analyze RUN"
        ):
            FIGURES[name](source, View())
        with pytest.raises(NotMeasured, match="no run"):
            FIGURES[name](Source(), View())


def test_weights_are_not_offered_where_what_was_learned_is_missing(tmp_path: Path) -> None:
    """They are the default of --what, which such a figure takes for what was learned."""
    made = analyzed(finished(tmp_path / "run"))
    head, *lines = (made / "analysis/40.spectra.csv").read_text().splitlines()
    kinds = [line.replace("from_start", kind) for kind in ("weight", "gradient") for line in lines]
    rewrite(made, "\n".join([head, *kinds, ""]))
    with pytest.raises(NotMeasured, match=r"choose --what from .*gradient$") as refused:
        FIGURES["small-singular"](read([made]), View())
    assert "weight" not in str(refused.value)


def test_matrices_of_other_names_are_left_to_the_figure_of_all(tmp_path: Path) -> None:
    made = analyzed(finished(tmp_path / "run"))
    text = (made / "analysis/40.spectra.csv").read_text()
    rewrite(made, text.replace("self_attn.q_proj", "c_attn").replace("mlp.down_proj", "c_fc"))
    with pytest.raises(NotMeasured, match="the runs have c_attn, c_fc; take --figure spectra"):
        FIGURES["small-singular"](read([made]), View())


def test_a_line_is_exp_of_the_losses_of_each_pair(tmp_path: Path) -> None:
    losses = {"loro-full": (3.0, 9.0, 3.5), "full-full": (3.5, 8.0, 3.25)}
    made = [line(tmp_path / name, of) for name, of in losses.items()]
    drawn = FIGURES["line"](read(made), View())
    for name, of in losses.items():
        found = [(n["x"], n["y"]) for n in numbers(drawn, line=name)]
        assert found == [(n / 10, math.exp(loss)) for n, loss in enumerate(of)]
    assert "loro-full: a@1 to b@1" in drawn.caption
    written = plot(made, tmp_path / "fig.svg")
    assert "full-full" in written.with_suffix(".csv").read_text()


def test_a_loss_that_is_not_finite_is_left_out_of_a_line_and_named(tmp_path: Path) -> None:
    drawn = FIGURES["line"](read([line(tmp_path / "a", (3.0, math.nan, 3.5))]), View())
    assert [n["x"] for n in drawn.numbers] == [0.0, 0.2]
    assert drawn.notes == ["a: the loss at alpha 0.1 is nan"]
    with pytest.raises(NotMeasured, match="no loss is finite"):
        FIGURES["line"](read([line(tmp_path / "b", (math.inf,))]), View())


def test_a_line_is_drawn_with_lines_and_runs_have_none(tmp_path: Path) -> None:
    made = [line(tmp_path / "line", (3.0, 3.5)), run(tmp_path / "run")]
    with pytest.raises(CheckpointError, match="is a line between two models"):
        read(made)
    with pytest.raises(NotMeasured, match="line: needs the directory that `peptrain analyze"):
        FIGURES["line"](read(made[1:]), View())


DEFAULTS: Row = {"method.exact_every": 75, "method.rank": 32, "method.scale": "hidden",
                 "method.retraction": "riemannian"}  # fmt: skip


def loro(refresh: int = 75, **stated: Any) -> tuple[str, Row, Row]:
    """A configuration; its refresh interval follows `exact_every` where it is not stated."""
    settings = {f"method.{key}": value for key, value in stated.items()}
    return "loro", settings, DEFAULTS | {"method.refresh_every": refresh}


def ablations(folder: Path, **last: Any) -> Drawn:
    """Of K, the scale, the rank and the retraction, one after the other."""
    configurations = [
        ("full", {}, {}),
        *[loro(K, exact_every=K) for K in (15, 75, 150)],
        *[loro(exact_every=75, scale=c) for c in ("0.1", "0.01")],
        loro(exact_every=75, rank=8),
        *[loro(K, exact_every=K, retraction="svd") for K in (15, 75)],
        loro(exact_every=0, refresh_every=75, retraction="svd"),
    ]
    return FIGURES["grid"](read([ablation(folder / "out", configurations, **last)]), View())


def test_a_grid_has_a_panel_for_each_setting_that_varies_alone(tmp_path: Path) -> None:
    drawn = ablations(tmp_path)
    found = defaultdict(list)
    for n in numbers(drawn, mark="mean over seeds"):
        found[n["panel"].rpartition(" ")[2], n["line"]].append((n["x"], round(n["y"] - 3.0005, 6)))
    assert found == {
        ("exact_every", "loro"): [(15, 0.01), (75, 0.02), (150, 0.03)],
        ("exact_every", "loro retraction=svd"): [(15, 0.07), (75, 0.08)],
        ("scale", "loro"): [(0, 0.05), (1, 0.04), (2, 0.02)],  # of 0.01, 0.1 and the default
        ("rank", "loro"): [(8, 0.06), (32, 0.02)],
        ("retraction", "loro exact_every=15"): [(0, 0.01), (1, 0.07)],
        ("retraction", "loro exact_every=75"): [(0, 0.02), (1, 0.08)],
    }
    (axis,) = {n["x_axis"] for n in drawn.numbers if "over scale" in n["panel"]}
    assert axis == "scale (0: 0.01, 1: 0.1, 2: hidden)"
    for panel in {n["panel"] for n in drawn.numbers}:
        level = numbers(drawn, panel=panel, mark="full training")
        assert [n["y"] for n in level] == [pytest.approx(3.0005)] * 2
    assert drawn.notes == []


def test_a_grid_shows_peak_memory_where_all_rows_have_it(tmp_path: Path) -> None:
    drawn = ablations(tmp_path, peak_bytes=[n * 2**29 for n in range(1, 11)])
    found = numbers(drawn, panel="peak memory (GiB) over rank", mark="mean over seeds")
    assert [(n["x"], n["y"]) for n in found] == [(8, 3.5), (32, 1.5)] and drawn.notes == []
    level = numbers(drawn, panel="peak memory (GiB) over rank", mark="full training")
    assert [n["y"] for n in level] == [0.5, 0.5]


def test_a_grid_has_never_after_the_longest_interval(tmp_path: Path) -> None:
    made = ablation(tmp_path / "out", [loro(exact_every=K) for K in (0, 15, 75)])
    drawn = FIGURES["grid"](read([made]), View())
    (axis,) = {n["x_axis"] for n in drawn.numbers}
    assert axis == "exact_every (0: 15, 1: 75, 2: never)"
    (axes,) = drawn.figure.axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["15", "75", "never"]
    means = numbers(drawn, mark="mean over seeds")
    assert [(n["x"], round(n["y"] - 3.0005, 6)) for n in means] == [(0, 0.01), (1, 0.02), (2, 0)]


def test_a_grid_joins_no_number_with_a_name(tmp_path: Path) -> None:
    (axes,) = (ax for ax in ablations(tmp_path).figure.axes if ax.get_label().endswith("scale"))
    lines = [one for one in axes.lines if one.get_label() == "mean over seeds|loro"]
    assert [list(one.get_xdata()) for one in lines] == [[0, 1], [2]]  # hidden stands alone
    assert [one.get_marker() for one in lines] == ["o", "o"]


def test_a_grid_of_one_setting_each_has_no_such_figure(tmp_path: Path) -> None:
    source = read([comparison(tmp_path)])
    with pytest.raises(NotMeasured, match=r"grid: no two configurations .* differ in one setting"):
        FIGURES["grid"](source, View())
    with pytest.raises(NotMeasured, match="scaling: needs a method with models of two sizes"):
        FIGURES["scaling"](source, View())


def test_scaling_joins_the_sizes_of_a_method(tmp_path: Path) -> None:
    sizes = [{"model.hidden_size": d} for d in (256, 64)]
    warm = {"method.warm_start_steps": 0}
    configurations = [
        *[("full", size, {}) for size in sizes],
        *[("relora", size | warm | {"method.rank": r}, {})
          for size, r in zip(sizes, (64, 16), strict=True)],
        ("bpt", {}, {}),
    ]  # fmt: skip
    known = [10**6, 10**4, 10**5, 10**3, 0]
    made = ablation(tmp_path / "out", configurations, non_embedding_trainable=known)
    drawn = FIGURES["scaling"](read([made]), View())
    found = defaultdict(list)
    for n in numbers(drawn, mark="mean over seeds"):
        found[n["line"]].append((n["x"], round(n["y"] - 3.0005, 6)))
    assert found == {
        "full": [(4, 0.01), (6, 0.0)],
        "relora warm_start_steps=0": [(pytest.approx(3), 0.03), (5, 0.02)],
    }
    assert drawn.notes == ["bpt: non_embedding_trainable is not known"]


def test_ranks_of_one_model_are_no_sizes(tmp_path: Path) -> None:
    model = {"model.hidden_size": 64, "model.vocab_size": 300}
    ranks = [("bpt", {"method.rank": r}, model | {"model.vocab_size": 300 + r}) for r in (4, 8)]
    made = ablation(tmp_path / "out", ranks, non_embedding_trainable=[10**4, 10**5])
    with pytest.raises(NotMeasured, match="scaling: needs a method with models of two sizes"):
        FIGURES["scaling"](read([made]), View())
    FIGURES["grid"](read([made]), View())


@pytest.mark.parametrize("figure", ["per", "spectra"])
def test_a_run_that_was_not_measured_is_named(figure: str, tmp_path: Path) -> None:
    measured = analyzed(finished(tmp_path / "measured"))
    other = run(tmp_path / "other", [])
    drawn = FIGURES[figure](read([measured, other]), View(what="from_start"))
    assert list(drawn.notes) == ["other: not measured of from_start"]
