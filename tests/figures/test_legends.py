"""The names and the looks in the legends of figures."""

from pathlib import Path

import pytest
from made import dynamics, run

from peptrain.figures.catalogue import FIGURES
from peptrain.figures.panel import LINE, LONGEST, sheet, told_apart, wrapped
from peptrain.figures.read import read
from peptrain.figures.source import View
from peptrain.figures.style import styled

RELORA = "relora rank=32 warm_start_steps=0 merge_every=75"


def test_a_long_name_loses_what_all_of_its_method_share() -> None:
    names = ["full", "lora rank=32", *(f"{RELORA} restart_warmup={n}" for n in (0, 2))]
    expected = ["full", "lora rank=32", "relora restart_warmup=0", "relora restart_warmup=2"]
    assert told_apart(names) == expected


def test_of_settings_that_differ_together_a_long_name_keeps_the_first() -> None:
    sizes = ((64, 3, 2), (128, 4, 4), (256, 6, 4))
    names = [f"{of} model.hidden_size={d} model.layers={n} model.heads={h}"
             for of in ("full", "bpt") for d, n, h in sizes]  # fmt: skip
    short = [f"{of} model.hidden_size={d}" for of in ("full", "bpt") for d, *_ in sizes]
    assert told_apart(names) == short
    other = f"{names[0]} model.kv_heads=1"
    assert told_apart([*names[:3], other]) == [*short[:3], f"{short[0]} model.kv_heads=1"]


def test_a_long_name_that_is_the_only_one_of_its_method_loses_its_middle() -> None:
    full, short = told_apart(["full", RELORA])
    assert full == "full" and "…" in short and len(short) <= LONGEST
    assert short.startswith("relora rank=32") and short.endswith("merge_every=75")


def test_no_two_names_of_a_legend_are_alike() -> None:
    """Two that differ only in the middle keep it."""
    one, other = (f"relora-{'a' * 40}-{n}-{'b' * 40}" for n in (1, 2))
    assert told_apart([one, other]) == [one, other]


def test_a_long_name_has_lines_of_settings_and_makes_its_figure_higher() -> None:
    heights = []
    for given in (["relora"], ["relora " + " ".join(f"{'c' * 20}{n}={n}" for n in range(4))]):
        with styled():
            made, _ = sheet([2.0], legend=1)
            made.legend([(name, {}) for name in given])
        (legend,) = made.figure.legends
        heights.append(made.figure.get_figheight())
        for text in legend.get_texts():
            lines = text.get_text().split("\n")
            assert max(map(len, lines)) <= LINE and " ".join(lines) == given[0]
    assert heights[1] == pytest.approx(heights[0] + 0.18)


def test_a_name_without_settings_is_broken_where_a_line_ends() -> None:
    """As that of a run of a comparison, whose settings are joined by hyphens."""
    name = "loro-update=precond-exact_every=75-refresh_every=75-lr=0.01-seed=0-5b0c21f4 (3 seeds)"
    lines = wrapped(name).split("\n")
    assert len(lines) == 2 and max(map(len, lines)) == LINE and "".join(lines) == name


def test_the_legend_over_seeds_has_the_looks_of_its_lines(tmp_path: Path) -> None:
    rows = [(rank, seed, dynamics((2, 4), seed=seed)) for rank in (4, 8) for seed in (0, 1)]
    made = [
        run(tmp_path / f"{rank}-{seed}", of, train_seed=seed, method_rank=rank)
        for rank, seed, of in rows
    ]
    figure = FIGURES["per-seeds"](read(made), View()).figure
    means = [one for one in figure.axes[0].lines if one.get_label().startswith("mean")]
    (legend,) = figure.legends
    for drawn, named in zip(means, legend.get_lines(), strict=True):
        assert drawn.get_color() == named.get_color()
        assert drawn.get_marker() == named.get_marker() != "None"
        assert drawn.get_linestyle() == named.get_linestyle() == "--"
    assert len(means) == 2
