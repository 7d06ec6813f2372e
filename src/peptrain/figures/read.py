"""Read run directories and comparisons as rows, without a lock, also while they are written."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peptrain.analysis.table import check_table, read_table
from peptrain.errors import CheckpointError
from peptrain.figures.source import Row, RunRows, Source
from peptrain.files import leading_out, read_json, read_json_object
from peptrain.runs.directory import COMPARISON, RunDir, is_comparison
from peptrain.runs.select import checksums
from peptrain.settings import toml
from peptrain.text import one_line, quoted

LINE = "line.csv"
SPECTRA = ".spectra"


def read(paths: Sequence[Path]) -> Source:
    """Read runs, one directory of `compare`, or directories of `analyze --line`.

    Of a comparison the runs at the best rates are taken.

    Raises CheckpointError for a path that is neither, for the same run twice, and for damaged
    tables; ConfigError for a config.toml that is not TOML.
    """
    if not paths:
        raise CheckpointError("no run is given; give run directories or one of `peptrain compare`")
    compared = [path for path in paths if is_comparison(path)]
    if compared and len(paths) > 1:
        raise CheckpointError(
            f"{compared[0]}: is a comparison, which is drawn alone; leave out the other paths"
        )
    if compared:
        return _comparison(compared[0])
    lines = [path for path in paths if is_line(path)]
    if lines and len(paths) > len(lines):
        raise CheckpointError(
            f"{lines[0]}: is a line between two models, which is drawn with other lines only; leave"
            " out the other paths"
        )
    twice = [str(path) for path, n in Counter(p.resolve() for p in paths).items() if n > 1]
    if twice:
        raise CheckpointError(f"{twice[0]}: given twice; leave out one of them")
    named = list(zip(paths, _names(paths), strict=True))
    if lines:
        tables = [(name, _line(path / LINE)) for path, name in named]
        return Source(along=[{"pair": name, **row} for name, rows in tables for row in rows])
    return Source([read_run(path, name) for path, name in named])


def is_line(path: Path) -> bool:
    """Return whether a directory is one that `analyze --line` has written."""
    return (path / LINE).is_file() and not (path / "config.toml").exists()


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    longest = max(map(len, parts))
    for length in range(1, longest + 1):
        names = [one_line("/".join(part[-length:])) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def read_run(path: Path, name: str, configuration: str = "") -> RunRows:
    """Read what a run directory contains."""
    run, left_out = RunDir.open(path), list[str]()
    analysis, spectra = (
        [row for step in _steps(path / "analysis", suffix)
         for row in _table(run, step, suffix, left_out)]
        for suffix in ("", SPECTRA)
    )  # fmt: skip
    return RunRows(
        name=name,
        rows=list(run.metrics()),
        settings=_flat(toml.read(run.config_file, "")),
        analysis=analysis,
        spectra=spectra,
        evaluations=_entries(path / "eval.json"),
        data=next((str(e["data"]) for e in _entries(path / "env.json") if "data" in e), ""),
        configuration=configuration,
        left_out=left_out,
    )


def _flat(table: Row, before: str = "") -> dict[str, Any]:
    """Return the values of nested tables by dotted key."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= (
            _flat(value, f"{before}{key}.") if isinstance(value, dict) else {before + key: value}
        )
    return found


def _steps(folder: Path, suffix: str) -> list[int]:
    """Return the steps of which there are tables STEP.csv or STEP.spectra.csv, ascending."""
    ends = f"{suffix}.csv"
    stems = (path.name.removesuffix(ends) for path in folder.glob(f"*{ends}"))
    return sorted(int(stem) for stem in stems if stem.isdecimal())


def _table(run: RunDir, step: int, suffix: str, left_out: list[str]) -> list[dict[str, Any]]:
    """Return the lines of a table of an analysis; none, with a note, if it is not as written.

    It may be damaged, of other weights, or about to be written again by `peptrain analyze`.
    """
    path = run.path / "analysis" / f"{step}{suffix}.csv"
    try:
        check_table(path, f"{step}", _checksums(run, step))
        return read_table(path)
    except (OSError, ValueError, TypeError, csv.Error) as error:
        why = error.strerror if isinstance(error, OSError) else error
        left_out.append(
            f"{path}: left out: {why}; repeat `peptrain analyze {quoted(run.path)}`, or delete it"
        )
        return []


def _checksums(run: RunDir, step: int) -> str | None:
    """Return the checksums of the checkpoint of a step, None if it is not kept."""
    try:
        return checksums(run, step)
    except CheckpointError:
        return None


def _line(path: Path) -> list[dict[str, Any]]:
    """Return the lines of the table of `analyze --line`."""

    def read_line() -> list[dict[str, Any]]:
        check_table(path, path.stem, None)
        return read_table(path)

    found: list[dict[str, Any]] = _sound(path, read_line)
    return found


def _entries(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a JSON list; none if there is no such file."""
    if not path.exists():
        return []
    return [entry for entry in _sound(path, lambda: read_json(path, list)) if type(entry) is dict]


def _sound(path: Path, reading: Callable[[], Any]) -> Any:
    try:
        return reading()
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise CheckpointError(
            f"{path}: damaged ({error}); delete it, or restore it from a copy of the run"
        ) from error


def _comparison(path: Path) -> Source:
    file = path / COMPARISON
    content = _sound(file, lambda: read_json_object(file))
    trials, lines = (
        [entry for entry in content.get(key, []) if type(entry) is dict]
        if isinstance(content.get(key, []), list)
        else []
        for key in ("runs", "configurations")
    )
    about = {key: value for key, value in content.items() if key not in ("runs", "configurations")}
    return from_comparison(path, trials, lines, about)


def from_comparison(path: Path, trials: Sequence[Row], lines: Sequence[Row], about: Row) -> Source:
    """Return the entries of a comparison, and its runs.

    Of each configuration they are those at the best rate, or all while that is not known.
    """
    best = {line.get("label"): line.get("lr") for line in lines}
    runs, left_out = [], []
    for trial in trials:
        label = trial.get("configuration")
        if best.get(label) not in (None, trial.get("lr")):
            continue
        name = Path(str(trial.get("run"))).name
        place = path / "runs" / name
        if leading_out(path, [f"runs/{name}"]) is not None:
            left_out.append(f"{name}: leads out of {path}, and is not read")
        elif (place / "config.toml").is_file():
            runs.append(read_run(place, one_line(name), one_line(str(label))))
        else:
            left_out.append(f"{name}: not there yet")
    return Source(runs, trials, lines, about, left_out, path=path)
