"""The table of a grid, for the terminal and as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from peptrain.comparison.grid import Equal
from peptrain.comparison.summary import Line

LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
LATEX |= {sign: f"\\{sign}" for sign in "&%$#_{}"}
LATEX |= {"±": r"$\pm$", "–": "--"}
UNKNOWN = "–"


@dataclass(frozen=True)
class Comparison:
    """The lines of a table and what its caption and notes need."""

    lines: Sequence[Line]
    equal: Equal
    epoch: int
    """Tokens of one pass over the corpus."""
    unstated: Sequence[str] = ()
    """Settings that differ between lines although the grid does not set them."""
    tuned: str = ""
    """Of a fine-tuning, the result by which learning rates are chosen, such as cola_matthews."""
    epochs: int = 0
    """Of a fine-tuning."""

    @property
    def baseline(self) -> Line:
        """The first line of full training, or else the first one. Its cost is the budget of all."""
        return next((line for line in self.lines if line.method == "full"), self.lines[0])

    @property
    def columns(self) -> dict[str, Callable[[Line], str]]:
        """Formatters of the columns, by header."""
        left_out = {"ppl"} if self.tuned else set()
        if not any(map(self.difference, self.lines)):
            left_out.add(DIFFERENCE)
        shown = COLUMNS | {DIFFERENCE: lambda line: _difference(self.difference(line))}
        usual = {k: shown[k] for k in COLUMNS if k not in left_out}
        return usual | {name: _task(name) for name in self.tasks} | COSTS[self.equal]

    def difference(self, line: Line) -> tuple[float, float | None] | None:
        """Return the loss of `line` minus the baseline's, with its interval; None if unknown."""
        return None if line is self.baseline or self.tuned else line.difference(self.baseline)

    @property
    def tasks(self) -> list[str]:
        """The results of tasks that some line has."""
        return list(dict.fromkeys(name for line in self.lines for name in line.tasks))

    @property
    def caption(self) -> str:
        """What the values are, and how the baseline was tuned."""
        if self.tuned:
            return (
                f"Fine-tuned for {self.epochs} epochs. The results are those on the validation rows"
                " after the last one: means over seeds with their 95 % intervals (Student's t; none"
                " for one seed). (best): of the best epoch of each run, which the same rows chose."
                " (majority): of always answering with the most frequent class. Held-out loss: of"
                " the validation rows. State: the optimizer's moments, 10^6 bytes. Each line is at"
                f" the learning rate with the highest mean {self.tuned} of those tried. (lowest)"
                " and (highest) mark a rate at the edge of those tried; (only) marks a rate that"
                " was not tuned. " + _tuned(self)
            )
        return (
            f"Held-out loss in nats per token {_budget(self)}: mean over seeds with its 95 %"
            f" interval (Student's t; none for one seed). {self._differences}Ppl: exp of that"
            f" mean. State: the optimizer's moments, 10^6 bytes. {_counted(self)}Each line is at"
            " the learning rate with the lowest mean held-out loss of those tried. (lowest) and"
            " (highest) mark a rate at the edge of those tried, where a better one may lie beyond;"
            " (only) marks a rate that was not tuned. " + _tuned(self)
        )

    @property
    def _differences(self) -> str:
        if DIFFERENCE not in self.columns:
            return ""
        return (
            f"Difference: of that loss to {self.baseline.label}'s, mean over the seeds that both"
            " have, with the interval of that mean. "
        )

    @property
    def notes(self) -> list[str]:
        """Other differences between lines, and missing runs with their errors."""
        found = list(self.unstated)
        for line in self.lines:
            if line.finished < line.runs:
                found.append(f"{line.label}: {line.finished} of {line.runs} runs finished")
            # What follows a semicolon is advice, which is also in the run's log.
            found += [f"diverged: {error.split('; ')[0]}" for error in line.diverged]
            found += [f"failed: {error.split('; ')[0]}" for error in line.errors]
        return found


def _budget(made: Comparison) -> str:
    """The budget after which losses are measured."""
    base = made.baseline
    if made.equal == "tokens":
        return f"after {base.tokens:,} training tokens"
    *_, (unit, amount) = COSTS[made.equal].items()
    whose = f"the cost of {base.label} in {base.steps:,} steps"
    return f"after training for {amount(base)} {unit}, {whose}"


def _counted(made: Comparison) -> str:
    """How speeds and costs were measured."""
    beside = "Tokens/s: measured with one run per worker at the same time. "
    if made.equal == "tokens":
        return beside
    how = {
        "flops": f"{beside}FLOPs: of matrix products, as counted by `peptrain estimate`.",
        "time": "Tokens/s and seconds: of training steps, timed before the runs, one configuration"
        " at a time.",
    }
    return f"{how[made.equal]} An epoch of the corpus has {made.epoch:,} tokens. "


def _tuned(made: Comparison) -> str:
    base = made.baseline
    if base.method != "full":
        return "There is no full-training baseline in this grid."
    if base.loss is None:
        return "The full-training baseline has no result."
    listed = ", ".join(f"{rate:g}" for rate in base.tried)
    if len(base.tried) < 2:
        return f"The full-training baseline ran at one learning rate, {listed}: not tuned."
    whole = [line for line in made.lines if line is not base and line.loss is not None]
    counts = sorted({len(line.tried) for line in whole})
    others = ""
    if counts and counts != [len(base.tried)]:
        ends = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
        others = f" (the other lines: {ends} rate{'s' if counts[-1] > 1 else ''})"
    return f"The full-training baseline is tuned by the same grid, over {listed}{others}."


def _known(show: Callable[[float], str], value: float | None) -> str:
    return UNKNOWN if value is None else show(value)


def _loss(line: Line) -> str:
    if line.loss is None:
        return "failed" if line.errors else "diverged" if line.diverged else "unfinished"
    interval = "" if line.half_width is None else f" ± {line.half_width:.3f}"
    return f"{line.loss:.3f}{interval}"


def _difference(found: tuple[float, float | None] | None) -> str:
    if found is None:
        return UNKNOWN
    mean, half = found
    return f"{mean:+.3f}" + ("" if half is None else f" ± {half:.3f}")


def _task(name: str) -> Callable[[Line], str]:
    def show(line: Line) -> str:
        width = line.widths.get(name)
        interval = "" if width is None else f" ± {width:.4f}"
        return _known(lambda value: f"{value:.4f}{interval}", line.tasks.get(name))

    return show


def _rate(line: Line) -> str:
    place = f" ({line.place})" if line.place else ""
    return _known(lambda lr: f"{lr:g}{place}", line.lr)


DIFFERENCE = "difference"
COLUMNS: dict[str, Callable[[Line], str]] = {
    "method": lambda line: line.label,
    "held-out loss": _loss,
    DIFFERENCE: lambda line: UNKNOWN,
    "ppl": lambda line: _known(lambda ppl: f"{ppl:.2f}", line.perplexity),
    "trainable": lambda line: _known(lambda count: f"{count / 1e6:.2f}M", line.trainable),
    "state MB": lambda line: _known(lambda size: f"{size / 1e6:.1f}", line.state_bytes),
    "tokens/s": lambda line: _known(lambda speed: f"{speed:,.0f}", line.tokens_per_second),
    "best lr": _rate,
    "seeds": lambda line: str(line.seeds),
}


TOKENS: dict[str, Callable[[Line], str]] = {"tokens": lambda line: f"{line.tokens:,}"}
COSTS: dict[Equal, dict[str, Callable[[Line], str]]] = {
    "tokens": {},
    "flops": TOKENS | {"FLOPs": lambda line: _known(lambda cost: f"{cost:.3g}", line.cost)},
    "time": TOKENS | {"seconds": lambda line: _known(lambda cost: f"{cost:,.1f}", line.cost)},
}
"""Columns of what each line spends; the last one is the budget."""


def _rows(comparison: Comparison) -> Iterator[list[str]]:
    shown = comparison.columns.values()
    return ([show(line) for show in shown] for line in comparison.lines)


def terminal(comparison: Comparison) -> Table:
    """Format the table for the terminal, without the caption."""
    table = Table(box=None)
    for n, column in enumerate(comparison.columns):
        table.add_column(column, justify="right" if n else "left", overflow="fold")
    for row in _rows(comparison):
        table.add_row(*map(escape, row))
    return table


def markdown(comparison: Comparison) -> str:
    """Format table, caption and notes as Markdown."""
    heads = list(comparison.columns)
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *_rows(comparison)]
    table = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in lines]
    notes = [f"- {note}" for note in comparison.notes]
    return "\n".join([*table, "", comparison.caption, *([""] if notes else []), *notes, ""])


def latex(comparison: Comparison) -> str:
    """Format a LaTeX table environment, which needs the package booktabs."""
    rows = [" & ".join(map(_tex, row)) + r" \\" for row in _rows(comparison)]
    caption = _tex(" ".join([comparison.caption, *(f"{note}." for note in comparison.notes)]))
    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{caption}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(comparison.columns) - 1)}}}",
            r"\toprule",
            " & ".join(map(_tex, comparison.columns)) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _tex(text: str) -> str:
    return "".join(LATEX.get(sign, sign) for sign in text)


def as_csv(comparison: Comparison) -> str:
    """Format a CSV row per configuration, in full precision and base units; empty if unknown."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["configuration", "method", "held_out_loss", "interval_95_low", "interval_95_high",
         "difference", "difference_95_low", "difference_95_high", "perplexity",
         "trainable_parameters", "optimizer_state_bytes", "tokens_per_second",
         "training_steps", "training_tokens", "training_flops", "training_seconds",
         "best_lr", "best_lr_place", "seeds", "runs_finished", "runs", "errors", *comparison.tasks]
    )  # fmt: skip
    for line in comparison.lines:
        mean, half = comparison.difference(line) or (None, None)
        ppl = None if comparison.tuned else line.perplexity
        writer.writerow(
            [line.label, line.method, line.loss, *_interval(line.loss, line.half_width),
             mean, *_interval(mean, half), ppl, line.trainable, line.state_bytes,
             line.tokens_per_second, line.steps, line.tokens,
             line.cost if comparison.equal == "flops" else None,
             line.cost if comparison.equal == "time" else None,
             line.lr, line.place, line.seeds, line.finished, line.runs,
             "; ".join((*line.diverged, *line.errors)),
             *(line.tasks.get(name) for name in comparison.tasks)]
        )  # fmt: skip
    return out.getvalue()


def _interval(mean: float | None, half: float | None) -> tuple[float | None, float | None]:
    """Return the ends of an interval; None if unknown."""
    return (None, None) if mean is None or half is None else (mean - half, mean + half)
