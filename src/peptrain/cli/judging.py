"""`peptrain eval --tasks`: judge models and print the results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table

from peptrain.cli.progress import counting, measuring
from peptrain.display.console import console, print_wide, say
from peptrain.distributed.world import world
from peptrain.errors import ConfigError
from peptrain.eval.perplexity import Evaluation
from peptrain.runs.select import check_done, may_vanish
from peptrain.settings.fields import check_whole
from peptrain.tasks.domains import domain_entry, domain_losses, macro_loss
from peptrain.tasks.measure import Measured, Values, exp
from peptrain.tasks.record import record_more, write_out
from peptrain.tasks.run import Against, Questions, average, compared, evaluate_tasks, read_tasks
from peptrain.tasks.subject import Subject, open_subject
from peptrain.tasks.table import GROUPS, chosen_tasks


def judge(
    paths: Sequence[Path],
    tasks: str,
    tasks_data: Path | None,
    *,
    limit: int | None,
    positions: int | None,
    against: Path | None,
    harness: bool,
    out: Path | None,
    data: Sequence[Path],
    device: Literal["auto", "cpu", "cuda"],
) -> None:
    """Measure tasks, or the perplexity of several corpora, of each model; print and write them."""
    check_whole("--limit", limit, 1)
    check_whole("--positions", positions, 1)
    if not tasks and not data:
        raise ConfigError(f"--tasks: must be given for {paths[0]}, or --data (got none)")
    if against is not None and not tasks:
        raise ConfigError("--against: needs --tasks")
    chosen = chosen_tasks(tasks, "--tasks", harness) if tasks else []
    questions = read_tasks(chosen, tasks_data, limit)
    entries: list[dict[str, Any]] = []
    done, damaged = list[Path](), list[str]()
    with world(device) as here:
        other = None if against is None else open_subject(against)  # before anything is measured
        for path in paths:
            subject = None
            with may_vanish(path, len(paths) > 1, damaged):
                subject = open_subject(path)
            if subject is None:
                continue
            if len(paths) > 1:
                say(f"{subject.name}:")
            given: Any = {"positions": positions, "device": here.device}
            if data:
                with measuring(console) as tokens:
                    losses = domain_losses(subject, data, **given, watch=tokens)
                entries.append(_about(subject) | domain_entry(losses))
                _keep(subject, entries[-1])
                print_wide(domain_table(losses))
            found = _measured(subject, questions, harness, given)
            entries += [_about(subject) | one.entry() for one in found]
            if found:
                print_wide(table(found))
            for name, mean in _averages(found):
                say(f"{name}: mean accuracy {mean:.4f} of {len(GROUPS[name])} tasks")
            if other is not None:
                of_b = _measured(other, questions, harness, given)
                tests = compared(subject, found, other, of_b)
                entries.append(_about(subject) | tests.entry())
                _keep(subject, entries[-1])
                say(f"A is {subject.name}, B is {other.name}")
                print_wide(paired_table(tests))
            done.append(path)
    if out is not None and done:
        write_out(out, entries)
        say(f"written to {out}")
    check_done(paths[0], done, damaged)


def _measured(
    subject: Subject, questions: Sequence[Questions], harness: bool, given: Mapping[str, Any]
) -> list[Measured]:
    with counting(console, "judging") as show:
        return evaluate_tasks(subject, questions, harness=harness, **given, show=show)


def _about(subject: Subject) -> dict[str, Any]:
    return {"model": str(subject.path), "step": subject.step}


def _keep(subject: Subject, entry: Mapping[str, Any]) -> None:
    if subject.run is not None:
        record_more(subject.run, {k: v for k, v in entry.items() if k != "model"})


def _averages(found: Sequence[Measured]) -> Iterator[tuple[str, float]]:
    for name in GROUPS:
        if (mean := average(found, name)) is not None:
            yield name, mean


def table(found: Iterable[Measured]) -> Table:
    """Format the values with their standard errors, and BLiMP's categories, worst first."""
    made = Table("task", "metric", box=None)
    for column in ("value", "± stderr", "items"):
        made.add_column(column, justify="right")
    for one in found:
        for name, value in _metrics(one.values):
            error = one.values.get(f"{name}_stderr")
            shown = "" if error is None else _number(name, error)
            made.add_row(one.task, name, _number(name, value), shown, f"{one.items:,}")
        for part, values in _categories(one):
            error = values.get("acc_stderr")
            shown = "" if error is None else _number("acc", error)
            made.add_row(f"  {escape(part)}", "acc", _number("acc", values["acc"]), shown, "")
    return made


def _metrics(values: Values) -> Iterator[tuple[str, float]]:
    return ((k, v) for k, v in values.items() if not k.endswith("_stderr"))


MOST = 12
"""Groups that are printed: the categories come first, and paradigms are in eval.json."""


def _categories(one: Measured) -> list[tuple[str, Values]]:
    names = {row["groups"][1]: None for row in one.rows if len(row.get("groups", ())) > 1}
    parts = [(name, dict(one.groups[name])) for name in names if name in one.groups]
    return sorted(parts, key=lambda part: part[1]["acc"])[:MOST]


def _number(name: str, value: float) -> str:
    return f"{value:.4f}" if name.startswith(("acc", "bits")) else f"{value:,.3f}"


def domain_table(found: Mapping[Path, Evaluation]) -> Table:
    """Format the perplexity of each corpus and the macro mean."""
    made = Table("domain", box=None)
    for column in ("perplexity", "loss", "tokens"):
        made.add_column(column, justify="right")
    for path, one in found.items():
        row = (f"{one.perplexity:,.3f}", f"{one.loss:.4f}", f"{one.tokens:,}")
        made.add_row(escape(str(path)), *row)
    if len(found) > 1:
        loss = macro_loss(dict(found))
        made.add_row("macro mean", f"{exp(loss):,.3f}", f"{loss:.4f}", "")
    return made


def paired_table(tests: Against) -> Table:
    """Format the counts and p values of the paired tests."""
    made = Table("task", box=None)
    for column in ("A - B", "± stderr", "only A", "only B", "McNemar p", "z", "z's p"):
        made.add_column(column, justify="right")
    for task, one in tests.tests.items():
        counts = (f"{one.only_a:,}", f"{one.only_b:,}")
        p = f"{one.mcnemar_p:.2g}"
        made.add_row(task, f"{one.difference:+.4f}", f"{one.difference_stderr:.4f}", *counts, p,
                     f"{one.z:+.2f}", f"{one.z_p:.2g}")  # fmt: skip
    return made
