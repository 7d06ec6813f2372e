"""The names and the looks in the legends of figures."""

from pathlib import Path

from made import dynamics, run

from peptrain.figures.catalogue import FIGURES
from peptrain.figures.panel import LONGEST, told_apart
from peptrain.figures.read import read
from peptrain.figures.source import View

RELORA = "relora rank=32 warm_start_steps=0 merge_every=75"


def test_a_long_name_loses_what_all_of_its_method_share() -> None:
    names = ["full", "lora rank=32", *(f"{RELORA} restart_warmup={n}" for n in (0, 2))]
    expected = ["full", "lora rank=32", "relora restart_warmup=0", "relora restart_warmup=2"]
    assert told_apart(names) == expected


def test_a_long_name_that_is_the_only_one_of_its_method_loses_its_middle() -> None:
    full, short = told_apart(["full", RELORA])
    assert full == "full" and "…" in short and len(short) <= LONGEST
    assert short.startswith("relora rank=32") and short.endswith("merge_every=75")


def test_no_two_names_of_a_legend_are_alike() -> None:
    """Two that differ only in the middle keep it."""
    one, other = (f"relora-{'a' * 40}-{n}-{'b' * 40}" for n in (1, 2))
    assert told_apart([one, other]) == [one, other]


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
