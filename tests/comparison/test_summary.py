"""The numbers of a grid's table against values worked out by hand, and their exports."""

import csv
import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support import rows, tiny

from peptrain.comparison.grid import GridRun, expand
from peptrain.comparison.summary import Line, Outcome, outcome, summarize
from peptrain.comparison.table import Comparison, as_csv, latex, markdown, terminal
from peptrain.errors import Diverged
from peptrain.runs.directory import RunDir
from peptrain.training.loop import resume, train


def end(loss: float, **given: Any) -> dict[str, Any]:
    row = {"event": "end", "held_out_loss": loss, "trainable": 1_234_567, "state_bytes": 9_876_543}
    return row | {"tokens_per_second": 1000.0} | given


def planned(method: str = "bpt", **keys: Any) -> list[GridRun]:
    return list(expand({"grid": [{"method.name": method, **keys}]}).runs)


def outcomes(losses: dict[tuple[float, int], Any], **keys: Any) -> list[Outcome]:
    """By (learning rate, seed): a loss, an error, or None for what wasn't run."""
    runs = planned(**{"optim.lr": sorted({lr for lr, _ in losses}),
                      "train.seed": sorted({seed for _, seed in losses}), **keys})  # fmt: skip
    found = []
    for run in runs:
        got = losses[run.lr, run.seed]
        row = end(got, tokens_per_second=1000.0 * (1 + run.seed)) if type(got) is float else None
        error = got if isinstance(got, str) else ""
        diverged = error == DIVERGED
        found.append(Outcome(run, RunDir(Path("runs") / run.name), row, error, diverged))
    return found


def test_the_best_rate_has_the_lowest_mean_over_seeds() -> None:
    # 1e-3 has the lowest single loss, 2e-3 the lowest mean: (3.0 + 3.2) / 2 = 3.1 < 3.15.
    (line,) = summarize(outcomes({
        (1e-3, 0): 2.9, (1e-3, 1): 3.4, (2e-3, 0): 3.0, (2e-3, 1): 3.2,
        (4e-3, 0): 3.3, (4e-3, 1): 3.3,
    }))  # fmt: skip
    assert (line.lr, line.place, line.seeds) == (2e-3, "", 2)
    assert line.loss == pytest.approx(3.1)
    # s = 0.1 sqrt 2, t(1) = 12.706: 12.706 * 0.1 sqrt 2 / sqrt 2
    assert line.half_width == pytest.approx(1.2706, abs=1e-4)
    assert line.perplexity == pytest.approx(22.198, abs=1e-3)
    assert (line.trainable, line.state_bytes, line.tokens_per_second) == (
        1_234_567,
        9_876_543,
        1500,
    )
    assert (line.runs, line.finished, line.rates) == (6, 6, (1e-3, 2e-3, 4e-3))


DIVERGED = "step 2: the held-out loss is nan at a learning rate of 4e-3; there is no checkpoint"


@pytest.mark.parametrize(
    "losses, lr, place",
    [
        ([3.0, 3.1, 3.2], 1e-3, "lowest"),
        ([3.2, 3.1, 3.0], 4e-3, "highest"),
        ([3.2, 3.0, 3.1], 2e-3, ""),
        ([3.2, 3.0, DIVERGED], 2e-3, ""),  # a rate that diverged was tried
        ([3.2, 3.0, "ended by SIGKILL"], 2e-3, "highest"),  # and one that crashed was not
        ([3.2, 3.0, None], 2e-3, "highest"),
        ([None, 3.0, None], 2e-3, "only"),
        ([DIVERGED, DIVERGED, DIVERGED], None, ""),
        ([None, None, None], None, ""),
    ],
)
def test_a_best_rate_at_the_edge_is_marked(losses: Any, lr: float | None, place: str) -> None:
    of_rate = dict(zip((1e-3, 2e-3, 4e-3), losses, strict=True))
    (line,) = summarize(outcomes({(rate, 0): loss for rate, loss in of_rate.items()}))
    assert (line.lr, line.place) == (lr, place)
    assert line.loss == (of_rate[lr] if lr else None) and line.half_width is None


def test_a_training_that_diverges_is_told_from_one_that_crashes(
    corpus: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    with pytest.raises(Diverged) as error:
        train(tiny("full", corpus, path, optim={"lr": 1e30, "clip": 0.0}))
    (run,) = planned("full")
    found = outcome(run, RunDir(path), "exit code 1")
    assert (found.loss, found.state, found.error) == (math.inf, "diverged", str(error.value))
    other = outcome(run, RunDir(tmp_path / "other"), "out of memory")
    assert math.isnan(other.loss) and other.state == "failed"


def test_a_run_that_goes_on_after_diverging_has_not_diverged(corpus: Path, tmp_path: Path) -> None:
    """Its configuration was mended by hand."""
    path, (run,) = tmp_path / "run", planned("full")
    broken = tiny("full", corpus, path, optim={"lr": 1e30, "clip": 0.0})
    with pytest.raises(Diverged):
        train(broken)
    file = RunDir(path).config_file
    file.write_text(file.read_text().replace("lr = 1e+30", "lr = 0.001"))
    resume(path)
    assert outcome(run, RunDir(path)).state == "finished" and not rows(path, "diverged")


@pytest.mark.parametrize("broken", [DIVERGED, "crash", None])
def test_a_rate_with_an_unfinished_seed_is_not_chosen(broken: str | None) -> None:
    # The seed that is left has the lowest loss of all; taken alone it would flatter its rate.
    (line,) = summarize(outcomes({
        (1e-3, 0): 3.0, (1e-3, 1): 3.0, (2e-3, 0): 2.0, (2e-3, 1): broken,
    }))  # fmt: skip
    assert (line.lr, line.finished, line.runs) == (1e-3, 3, 4)


def test_a_line_has_the_losses_of_its_best_rate_by_seed() -> None:
    found = outcomes({(1e-3, 0): 3.0, (1e-3, 1): 3.1, (2e-3, 0): 2.0, (2e-3, 1): 2.5})
    (line,) = summarize(found)
    assert line.losses == {"0": 2.0, "1": 2.5}


def test_a_speed_whose_rows_are_lost_is_not_counted() -> None:
    """The last row of such a run, which was only evaluated again, has a speed of 0."""
    found = outcomes({(1e-3, 0): 3.0, (1e-3, 1): 3.1})
    found[0] = replace(found[0], end=end(3.0, tokens_per_second=0.0))
    assert summarize(found)[0].tokens_per_second == 2000.0
    assert summarize(found[:1])[0].tokens_per_second is None


def test_at_equal_time_a_speed_is_that_of_the_timing() -> None:
    """Runs that tune rates share a GPU, which slows them down and not what they are given."""
    found = [replace(one, planned=replace(one.planned, cost=64.0))
             for one in outcomes({(1e-3, 0): 3.0, (1e-3, 1): None})]  # fmt: skip
    tokens = found[0].planned.tokens
    (line,), (shared,) = summarize(found[:1], "time"), summarize(found[:1], "flops")
    assert (line.tokens_per_second, shared.tokens_per_second) == (tokens / 64, 1000.0)
    captions = [Comparison([line], equal, 1).caption for equal in ("time", "flops", "tokens")]
    assert ["at the same time" in caption for caption in captions] == [False, True, True]
    assert "Tokens/s and seconds: of training steps, timed before" in captions[0]


def test_configurations_have_a_line_each_in_the_grids_order() -> None:
    found = [*outcomes({(1e-3, 0): 3.0, (1e-3, 1): 3.1}, **{"method.rank": [8]}),
             *outcomes({(1e-3, 0): 2.0, (1e-3, 1): 2.1}, **{"method.rank": [4]})]  # fmt: skip
    assert [(line.label, line.runs) for line in summarize(found)] == [
        ("bpt rank=8", 2),
        ("bpt rank=4", 2),
    ]


LINE = Line(
    label="bpt init=a_b|c", method="bpt", runs=2, finished=2, steps=4, tokens=4096,
    rates=(1e-3, 2e-3),
    tried=(1e-3, 2e-3), lr=2e-3, place="highest", seeds=2, loss=2.0, half_width=0.25,
    trainable=1_234_567, state_bytes=9_876_543, tokens_per_second=12_345.6,
)  # fmt: skip
FAILED = Line(label="loro", method="loro", runs=1, finished=0, steps=4, tokens=4096,
              rates=(1e-2,), errors=("loro-1: out of memory; try less",))  # fmt: skip
BOTH = Comparison([LINE, FAILED], "tokens", epoch=1000)


DIVERGES = Line(label="full", method="full", runs=1, finished=0, steps=9, tokens=1024,
                rates=(1e-2,), cost=1.5e15, diverged=(f"full-1: {DIVERGED}",))  # fmt: skip


def test_a_budget_other_than_tokens_is_in_every_form_of_the_table() -> None:
    lines = [replace(LINE, cost=1.25e15), DIVERGES]
    flops, time = Comparison(lines, "flops", epoch=2000), Comparison(lines, "time", epoch=2000)
    begins = "Held-out loss in nats per token after training for"
    assert flops.caption.startswith(f"{begins} 1.5e+15 FLOPs, the cost of full in 9 steps: mean")
    assert "matrix products, as counted by `peptrain estimate`. An epoch of the" in flops.caption
    assert "corpus has 2,000 tokens." in flops.caption
    table = markdown(flops).splitlines()
    assert table[0].endswith(" seeds | tokens | FLOPs |")
    assert table[2].endswith(" 2 | 4,096 | 1.25e+15 |")
    assert table[3].startswith("| full | diverged |") and table[3].endswith("| 1,024 | 1.5e+15 |")
    assert table[-1] == (
        "- diverged: full-1: step 2: the held-out loss is nan at a learning rate of 4e-3"
    )
    one, other = csv.DictReader(io.StringIO(as_csv(flops)))
    assert (one["training_steps"], one["training_tokens"]) == ("4", "4096")
    assert (float(one["training_flops"]), one["training_seconds"]) == (1.25e15, "")
    assert other["errors"] == f"full-1: {DIVERGED}"
    assert r"seeds & tokens & FLOPs \\" in latex(flops) and "lrrrrrrrrr}" in latex(flops)

    lines[:] = [replace(LINE, cost=61.25), replace(DIVERGES, cost=1234.56)]
    assert time.caption.startswith(f"{begins} 1,234.6 seconds, the cost of full in 9 steps: mean")
    assert "and seconds: of training steps, timed before the runs, one" in time.caption
    assert markdown(time).splitlines()[2].endswith("| 4,096 | 61.2 |")
    (one, _) = csv.DictReader(io.StringIO(as_csv(time)))
    assert (one["training_flops"], one["training_seconds"]) == ("", "61.25")


def seeds(label: str, losses: dict[str, float], **given: Any) -> Line:
    mean = sum(losses.values()) / len(losses)
    return replace(LINE, label=label, method=label.split()[0], loss=mean, losses=losses, **given)


def test_differences_to_the_baseline_are_over_pairs_of_a_seed() -> None:
    """Seeds 0 and 2, which both have; the interval is that of two values a distance 0.02 apart."""
    ours = seeds("loro", {"0": 3.11, "1": 9.0, "2": 3.33})
    alone, apart = seeds("bpt", {"2": 3.0}), seeds("lora", {"7": 3.0})
    full = seeds("full", {"0": 3.0, "2": 3.2, "3": 1.0})
    made = Comparison([ours, full, alone, apart, FAILED], "tokens", epoch=1)
    table = [row.split(" | ") for row in markdown(made).splitlines()]
    assert table[0][2] == "difference"
    half = 12.7062 * 0.01  # t of one degree of freedom, times half of their distance
    assert [row[2] for row in table[2:7]] == [f"+0.120 ± {half:.3f}", "–", "-0.200", "–", "–"]
    assert "Difference: of that loss to full's, mean over the seeds that both have" in made.caption
    rows = list(csv.DictReader(io.StringIO(as_csv(made))))
    assert [float(rows[0][f"difference{end}"]) for end in ("", "_95_low", "_95_high")] == (
        pytest.approx([0.12, 0.12 - half, 0.12 + half], abs=1e-6)
    )
    assert [bool(row["difference"]) for row in rows[1:]] == [False, True, False, False]
    assert rows[2]["difference_95_low"] == ""
    assert "difference" not in Comparison([full, FAILED], "tokens", epoch=1).columns
    tuned = replace(made, tuned="cola_matthews", epochs=1)
    assert "difference" not in tuned.columns


def test_markdown() -> None:
    lines = markdown(BOTH).splitlines()
    assert lines[2] == (
        r"| bpt init=a_b\|c | 2.000 ± 0.250 | 7.39 | 1.23M | 9.9 | 12,346 | 0.002 (highest) | 2 |"
    )
    assert lines[3] == "| loro | failed | – | – | – | – | – | 0 |"
    assert lines[0].count("|") == lines[1].count("|") == lines[3].count("|")
    assert "after 4,096 training tokens" in lines[5]
    assert lines[7:] == ["- loro: 0 of 1 runs finished", "- failed: loro-1: out of memory"]


def test_csv_has_the_numbers_in_full() -> None:
    one, other = csv.DictReader(io.StringIO(as_csv(BOTH)))
    assert (one["held_out_loss"], one["interval_95_low"], one["interval_95_high"]) == (
        "2.0", "1.75", "2.25",
    )  # fmt: skip
    assert float(one["perplexity"]) == math.exp(2.0)
    assert (one["optimizer_state_bytes"], one["best_lr_place"]) == ("9876543", "highest")
    assert (other["held_out_loss"], other["runs_finished"]) == ("", "0")
    assert other["errors"] == "loro-1: out of memory; try less"


def test_latex_is_escaped() -> None:
    text = latex(BOTH)
    assert r"bpt init=a\_b|c & 2.000 $\pm$ 0.250 & 7.39 &" in text
    assert "95 \\%" in text and r"10\textasciicircum{}6" in text
    assert text.count(r"\\") == 3 and not set("–±") & set(text)


def test_the_terminal_shows_all_in_80_columns() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(terminal(BOTH))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    for cell in ("trainable", "held-out", "2.000 ±", "0.250", "9.9", "12,346", "(highest)"):
        assert cell in shown


def baseline(*lines: Line) -> str:
    return Comparison(lines, "tokens", epoch=1).caption.partition("tuned. ")[2]


def test_the_caption_says_how_the_baseline_was_tuned() -> None:
    def full(rates: tuple[float, ...], loss: float | None = 3.0) -> Line:
        given = {"label": "full", "method": "full", "rates": (1e-4, *rates), "tried": rates}
        return Line(**given, runs=2, finished=1, steps=1, tokens=1, loss=loss)

    assert baseline(LINE) == "There is no full-training baseline in this grid."
    assert baseline(full((1e-3, 2e-3)), LINE) == (
        "The full-training baseline is tuned by the same grid, over 0.001, 0.002."
    )
    assert baseline(full((1e-3, 2e-3, 4e-3)), LINE, FAILED) == (
        "The full-training baseline is tuned by the same grid, over 0.001, 0.002, 0.004"
        " (the other lines: 2 rates)."
    )
    assert baseline(full((1e-3,)), LINE) == (
        "The full-training baseline ran at one learning rate, 0.001: not tuned."
    )
    assert baseline(LINE, full((1e-3, 2e-3)), replace(LINE, tried=(1e-3,))) == (
        "The full-training baseline is tuned by the same grid, over 0.001, 0.002"
        " (the other lines: 1 to 2 rates)."
    )
    assert baseline(full((1e-3, 2e-3)), *(replace(LINE, tried=(1e-3,) * n) for n in (3, 4, 5))) == (
        "The full-training baseline is tuned by the same grid, over 0.001, 0.002"
        " (the other lines: 3 to 5 rates)."
    )
    # Other lines of full training, a smaller model say, are no baseline.
    assert baseline(full((1e-3, 2e-3)), full((4e-3,)), full((), None)) == (
        "The full-training baseline is tuned by the same grid, over 0.001, 0.002"
        " (the other lines: 1 rate)."
    )
    assert baseline(full((1e-3,), None)) == "The full-training baseline has no result."


def test_what_differs_unsaid_stands_under_the_table() -> None:
    made = Comparison([LINE], "tokens", epoch=1, unstated=["schedule.kind: a for full; b for bpt"])
    assert made.notes == ["schedule.kind: a for full; b for bpt"]
    assert "- schedule.kind: a for full; b for bpt\n" in markdown(made)
