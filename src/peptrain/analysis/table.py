"""The files of an analysis: tables of rows and spectra, and a JSON that says what was measured."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peptrain.analysis.measures import EXTRA, Row
from peptrain.errors import CheckpointError
from peptrain.files import no_links, read_json_object, sha256sums, write_atomically

SPECTRA = ("run", "step", "layer", "module", "what", "head", "sigma")
CHECKSUM = "sha256"
"""Key in the JSON of the checksums of the CSV files. It is written last."""


@dataclass(frozen=True)
class Output:
    """The files of one analysis, which differ in their suffix: DIRECTORY/STEM.csv and so on."""

    directory: Path
    stem: str

    @property
    def json(self) -> Path:
        return self.directory / f"{self.stem}.json"

    def finished(self, asked: Mapping[str, Any]) -> bool:
        """Return whether the same was measured before, and its tables are as they were written.

        Without a probe batch the gradients of an earlier one stay.
        """
        try:
            found = read_json_object(self.json)
            tables = [f"{self.stem}.csv", f"{self.stem}.spectra.csv"]
            if not all((self.directory / name).is_file() for name in tables):
                return False
            sums = sha256sums(self.directory, tables)
        except (OSError, ValueError):
            return False
        if found.get(CHECKSUM, sums) != sums:  # 0.1.0 had none
            return False
        wanted = {key: v for key, v in asked.items() if (key, v) != ("probe", None)}
        return all(found.get(key) == value for key, value in wanted.items())

    def write(self, rows: Sequence[Row], run: str, step: int | None, about: dict[str, Any]) -> None:
        """Write STEM.csv, STEM.spectra.csv, STEM.parquet where pyarrow is, and then STEM.json.

        Raises CheckpointError if a file can't be written.
        """
        named = {"run": run, "step": step}
        table = [named | row.values() for row in rows]
        columns = list(dict.fromkeys([*(key for line in table for key in line), *EXTRA]))
        spectra = [_spectrum(named, row) for row in rows]
        texts: dict[str, str | memoryview] = {
            "csv": as_csv(columns, table),
            "spectra.csv": as_csv(SPECTRA, spectra),
        }
        if find_spec("pyarrow") is not None:
            texts["parquet"] = _as_parquet(columns, table)
        write_tables(self.directory, self.stem, texts, about)


def write_tables(
    directory: Path, stem: str, files: Mapping[str, str | memoryview], about: Mapping[str, Any]
) -> Path:
    """Write DIRECTORY/STEM.SUFFIX for each suffix in `files`, then STEM.json; return the first.

    Raises CheckpointError if a file can't be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for suffix, content in files.items():
            given = content if isinstance(content, str) else [content]
            write_atomically(directory / f"{stem}.{suffix}", given)
        tables = (f"{stem}.{suffix}" for suffix in files if suffix.endswith("csv"))
        said = {**about, CHECKSUM: sha256sums(directory, tables)}
        write_atomically(directory / f"{stem}.json", json.dumps(said, indent=1) + "\n")
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or directory}: can't be written: {error.strerror}; choose another"
            " directory with --out"
        ) from error
    return directory / f"{stem}.{next(iter(files))}"


def _spectrum(named: Mapping[str, Any], row: Row) -> dict[str, Any]:
    """Return a line with all singular values, 7 digits each, separated by spaces."""
    about = {"layer": row.layer, "module": row.module, "what": row.what, "head": row.head}
    return {**named, **about, "sigma": " ".join(f"{s:.6e}" for s in row.sigma.tolist())}


def as_csv(columns: Sequence[str], lines: Sequence[Mapping[str, Any]]) -> str:
    """Return CSV with a header. NaN and infinity are nan and inf; what is missing is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if v is None else v for k, v in line.items()} for line in lines)
    return text.getvalue()


def _as_parquet(columns: Sequence[str], lines: Sequence[Mapping[str, Any]]) -> memoryview:
    pyarrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")  # no types
    made = pyarrow.table({name: [line.get(name) for line in lines] for name in columns})
    buffer = io.BytesIO()
    parquet.write_table(made, buffer)
    return buffer.getbuffer()


def check_table(path: Path, stem: str, weights: str | None) -> None:
    """Raise ValueError unless a CSV is as the STEM.json beside it says.

    weights: the checksums of the checkpoint that is there now, None if it is not kept.
    """
    about = read_json_object(path.with_name(f"{stem}.json"))
    line = sha256sums(path.parent, [path.name])
    if line not in str(about.get(CHECKSUM, line)):  # 0.1.0 had none
        raise ValueError(f"not the table that {stem}.json describes")
    if weights not in (None, about.get("weights", weights)):
        raise ValueError("of other weights than the checkpoint of that step has now")


def read_table(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a CSV written here: whole numbers, numbers, texts, None where empty."""
    with open(path, newline="", encoding="utf-8", opener=no_links) as file:
        return [{key: _value(text) for key, text in line.items()} for line in csv.DictReader(file)]


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None


def count_nan(rows: Sequence[Row]) -> int:
    """Return how many rows have singular values that are NaN."""
    return sum(math.isnan(row.sigma[0].item()) for row in rows)
