"""Read the text column of one Parquet file, a document per row, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peptrain.data.sources.base import (
    PIECE_BYTES,
    BadRecord,
    Piece,
    check_length,
    imported,
    not_a_string,
    type_of,
)
from peptrain.data.sources.text import unreadable
from peptrain.errors import DataError

BATCH_ROWS = 256  # about 1 MB of web text
BATCH_BYTES = 1 << 24  # of rows that are longer, if they are all alike
LARGEST_BATCH = 1 << 30
STRINGS = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")


def read_rows(path: Path, text_field: str, errors: str, skip_bad: bool = False) -> Iterator[Piece]:
    """Yield one document per row, without rows that are null or empty.

    Pages are read as needed, so memory doesn't grow with the file or its row groups. Only a page
    must fit into it. `errors` is how to decode invalid UTF-8: "strict" or "replace". Raises
    DataError for a file or column that can't be read, and BadRecord for a row. With `skip_bad` that
    is a piece instead.
    """
    pyarrow, parquet = imported("pyarrow", str(path)), imported("pyarrow.parquet", str(path))
    try:
        # The defaults would buffer a complete row group, which may be the complete file.
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=PIECE_BYTES) as file:
            check_column(pyarrow, file.schema_arrow, text_field, str(path))
            size, rows, done = path.stat().st_size, max(file.metadata.num_rows, 1), 0
            for column in _columns(file, text_field):
                for row, piece in documents(column, done, str(path), errors, skip_bad):
                    yield piece._replace(bytes_read=size * row // rows)
                done += len(column)
    except (OSError, pyarrow.ArrowException) as error:
        raise unreadable(path, error) from error


def _columns(file: Any, field: str) -> Iterator[Any]:
    """Yield the column `field` of a ParquetFile in batches of about BATCH_BYTES.

    A value of a dictionary may be as long as its part of the file, and repeated in every row.
    """
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        chunks = map(group.column, range(group.num_columns))
        chunk = next(chunk for chunk in chunks if chunk.path_in_schema == field)
        size = max(1, chunk.total_uncompressed_size)
        rows = BATCH_BYTES * group.num_rows // size
        if chunk.has_dictionary_page:
            rows = min(rows, LARGEST_BATCH // size)
        batches = file.iter_batches(
            max(1, min(rows, BATCH_ROWS)), row_groups=[number], columns=[field]
        )
        for batch in batches:
            yield batch.column(field)


def check_column(pyarrow: Any, schema: Any, field: str, where: str) -> None:
    """Raise DataError unless an Arrow schema has one column `field`, of strings."""
    kind = type_of({column.name: column.type for column in schema}, field, where)
    values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if str(values) not in STRINGS:
        raise not_a_string(where, field, str(kind))
    if schema.names.count(field) > 1:
        raise DataError(
            f"{where}: several columns are named {field!r}; choose another --text-field"
        )


def documents(
    column: Any, done: int, where: str, errors: str, skip_bad: bool
) -> Iterator[tuple[int, Piece]]:
    """Yield (row, document or bad record) of an Arrow column after `done` rows, counted from 1.

    Read as bytes, because pyarrow doesn't check that a string is UTF-8. Raises BadRecord unless
    `skip_bad`.
    """
    for row, value in enumerate(column.cast("large_binary"), start=done + 1):
        if not (content := value.as_py()):
            continue
        try:
            yield row, Piece(_decoded(content, f"{where}: row {row}", errors), True)
        except BadRecord as error:
            if not skip_bad:
                raise
            yield row, error.piece


def _decoded(content: bytes, where: str, errors: str) -> str:
    check_length(content, where)
    try:
        return content.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise BadRecord(
            where,
            f"invalid UTF-8 at byte {error.start} ({content[error.start :][:4]!r})",
            "fix it, replace it by U+FFFD with --on-bad-utf8 replace",
        ) from error
