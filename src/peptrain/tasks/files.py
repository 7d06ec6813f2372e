"""Read local copies of the data sets, in the columns that they have at Hugging Face."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from peptrain.data.sources.base import imported
from peptrain.data.sources.names import JSON_SUFFIXES, PARQUET_SUFFIX, TEXT_SUFFIXES, split_name
from peptrain.data.sources.text import read_bytes, read_lines, unreadable
from peptrain.errors import DataError
from peptrain.rng import Rng
from peptrain.tasks.table import Item, NoAnswer, Row, Task
from peptrain.text import one_line

log = logging.getLogger("peptrain")

SUFFIXES = (*JSON_SUFFIXES, PARQUET_SUFFIX, *TEXT_SUFFIXES)
NAMED = 5
"""Files of a folder that a message names."""
MOST = 1_000_000
"""Rows of a data set. The largest here has 67,000."""
HEADING = re.compile(r"^ = [^=\n](?:.*[^=\n])? = ?$", re.MULTILINE)
"""The title of a page in the raw text of WikiText. Sections have two or more signs."""


class Stored(Protocol):
    """A data set with local copies."""

    @property
    def name(self) -> str:
        """Return the name of the task, for messages."""

    @property
    def folder(self) -> str:
        """Return the folder below the directory of all, an absolute one for files of one's own."""

    def copy_of(self, split: str) -> str:
        """Return in words what the file of a split is a copy of."""


class Rows(list[Row]):
    """The rows of one or several files."""

    def __init__(self, located: Iterable[tuple[str, Row]]) -> None:
        super().__init__()
        self._places: list[str] = []
        for place, row in located:
            self.append(row)
            self._places.append(place)

    def place(self, number: int) -> str:
        """Return file and line of the row with a number."""
        return self._places[number]


def read_rows(task: Task, directory: Path | None) -> Rows:
    """Return the rows of a task's data.

    Raises DataError if there is no such file, saying where to get it, or if it can't be read.
    """
    return Rows(located_rows(task, directory, task.splits))


def located_rows(
    data: Stored, directory: Path | None, splits: Sequence[str]
) -> Iterator[tuple[str, Row]]:
    """Yield the rows of the first split that is there, each with its place, FILE:LINE.

    Raises DataError as `read_rows` does.
    """
    read = 0
    for file in data_files(data, directory, splits):
        for where, row in _rows(file):
            yield where, row
            read += 1
            if read > MOST:
                raise DataError(f"{file}: more than {MOST:,} rows; give a file of the data set")


def data_files(data: Stored, directory: Path | None, splits: Sequence[str]) -> list[Path]:
    """Return the files of the first split that is there, in several parts or one.

    A split may be the name of a file too, with its suffix.
    """
    own = Path(data.folder).is_absolute()
    wanted = f"{data.folder}/{splits[0]}.jsonl"
    if directory is None and not own:
        raise DataError(
            f"--tasks-data: must be given for {data.name} (got None); it is the directory of"
            f" {wanted}, a copy of {data.copy_of(splits[0])}"
        )
    folder, there = (directory or Path()) / data.folder, ""
    if folder.is_dir():
        names = sorted(p for p in folder.iterdir() if split_name(p)[0] in SUFFIXES)
        for split in splits:
            if (exact := folder / split).is_file() and split_name(exact)[0] in SUFFIXES:
                return [exact]
            if found := [p for p in names if re.match(rf"{re.escape(split)}[-.]", p.name)]:
                return _of_one_kind(found)
        others = sorted(one_line(p.name) for p in folder.iterdir())
        more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
        there = f"; the folder has {', '.join(others[:NAMED])}{more}" if others else ""
    if own:
        raise DataError(
            f"{data.name}: {folder / splits[0]} is missing{there}; names of files in a task's TOML"
            f" are relative to it and end in {', '.join(SUFFIXES)} or these and .gz, .xz"
        )
    raise DataError(
        f"--tasks-data: {folder / splits[0]}.jsonl (or .jsonl.gz, .jsonl.xz, .parquet) is missing,"
        f" for {data.name}{there}; save {data.copy_of(splits[0])} there"
    )


def _of_one_kind(files: list[Path]) -> list[Path]:
    """Return the files. Raise DataError if they are copies of each other in several formats."""
    for file in files[1:]:
        if split_name(file) != split_name(files[0]):
            raise DataError(
                f"--tasks-data: {files[0]} and {file.name} are both there, and their rows would"
                " count twice; delete one of them"
            )
    return files


def _rows(file: Path) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a file, each with its place."""
    suffix, packer = split_name(file)
    if suffix == PARQUET_SUFFIX and packer:
        raise DataError(f"{file}: Parquet within {packer} can't be read; unpack the file")
    if suffix == PARQUET_SUFFIX:
        yield from ((f"{file}: row {n}", row) for n, row in enumerate(_of_parquet(file), 1))
    elif suffix in TEXT_SUFFIXES:
        text = _text(file)
        if text and HEADING.search(text) is None:
            log.warning("%s: no line is the title of a page, such as ' = Title = ', so the whole"
                        " file counts as one page; give the raw text of WikiText, with its titles",
                        file)  # fmt: skip
        found = enumerate(pages(text), 1)
        yield from ((f"{file}: page {n}", {"page": page}) for n, page in found)
    else:
        for number, line in enumerate(read_lines(file), 1):
            if line.strip():
                yield (where := f"{file}:{number}"), _object(line, where)


def _text(file: Path) -> str:
    """Return a text with the line ends of WikiText, which some copies have as \\r\\n."""
    try:
        return read_bytes(file).decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 at byte {error.start}; fetch it again") from error


def pages(text: str) -> list[str]:
    """Split the raw text of WikiText at the titles of its pages."""
    starts = [match.start() for match in HEADING.finditer(text)]
    if not starts:
        return [text] if text else []
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]


def _object(line: bytes, where: str) -> Row:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); fetch the file again") from error
    if not isinstance(found, dict):
        raise DataError(f"{where}: a JSON {type(found).__name__}, but each line must be an object")
    return found


def _of_parquet(file: Path) -> Iterator[Row]:
    pyarrow, parquet = imported("pyarrow", str(file)), imported("pyarrow.parquet", str(file))
    try:
        with parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(1024):
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise unreadable(file, error) from error


def items_of(
    task: Task, rows: Iterable[Row], place: Callable[[int], str] = "row {}".format
) -> list[Item]:
    """Return the items of a task. place: how to name the row of a number.

    Raises DataError, naming the row, for one that lacks a column, or whose answer is no choice.
    """
    items = []
    for number, row in enumerate(rows):
        try:
            items.append(_checked(task.item(row)))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            what = f"no column {error}" if isinstance(error, KeyError) else str(error)
            repair = f"it must have {task.columns}, as in the Hugging Face data set {task.source}"
            if isinstance(error, NoAnswer):
                repair = f"take {task.copy_of(task.splits[0])}, which has the answers"
            raise DataError(f"{task.name}: {place(number)}: {what}; {repair}") from error
    if not items:
        raise DataError(f"{task.name}: the data have no rows; fetch {task.source} again")
    return items


def _checked(item: Item) -> Item:
    for text in (text for request in item.requests for text in request):
        text.encode()  # ValueError for half a surrogate pair, which JSON can spell
    return item


def first(items: list[Item], limit: int | None) -> list[tuple[int, Item]]:
    """Return the first `limit` items with their numbers; None is all.

    Of BLiMP they are the first of each paradigm.
    """
    seen: dict[str, int] = {}
    kept = []
    for number, item in enumerate(items):
        part = item.groups[0] if item.groups else ""
        seen[part] = seen.get(part, 0) + 1
        if limit is None or seen[part] <= limit:
            kept.append((number, item))
    return kept


def subsample(items: Sequence[Any], count: int) -> list[tuple[int, Any]]:
    """Return `count` items with their numbers: a fixed random choice, the same for all runs."""
    draw = Rng(0)
    order = sorted(range(len(items)), key=lambda number: draw.integer("item", number))
    return [(number, items[number]) for number in sorted(order[:count])]
