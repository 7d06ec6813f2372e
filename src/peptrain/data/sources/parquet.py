"""Read the text column of one Parquet file, a document per row, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peptrain.data.sources.base import PIECE_BYTES, Piece, field_of, imported, not_a_string
from peptrain.data.sources.text import unreadable
from peptrain.errors import DataError

PARQUET_SUFFIX = ".parquet"
BATCH_ROWS = 256  # about 1 MB of web text


def read_rows(path: Path, text_field: str, errors: str) -> Iterator[Piece]:
    """Yield one document per row, without rows that are null or empty.

    Pages are read as needed, so memory doesn't grow with the file or its row groups.
    `errors` is how to decode invalid UTF-8: "strict" (DataError) or "replace".
    """
    pyarrow, parquet = imported("pyarrow", str(path)), imported("pyarrow.parquet", str(path))
    try:
        # The defaults would buffer a complete row group, which may be the complete file.
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=PIECE_BYTES) as file:
            _check_column(pyarrow, file.schema_arrow, text_field, str(path))
            yield from _pieces(file, text_field, path, errors)
    except (OSError, pyarrow.ArrowException) as error:
        raise unreadable(path, error) from error


def _check_column(pyarrow: Any, schema: Any, field: str, where: str) -> None:
    kind = field_of({name: schema.field(name).type for name in schema.names}, field, where)
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise not_a_string(where, field, str(kind))


def _pieces(file: Any, field: str, path: Path, errors: str) -> Iterator[Piece]:
    """Yield the rows, read as bytes because pyarrow doesn't check that a string is UTF-8."""
    size, rows, number = path.stat().st_size, max(file.metadata.num_rows, 1), 0
    for batch in file.iter_batches(BATCH_ROWS, columns=[field]):
        for content in batch.column(0).cast("large_binary").to_pylist():
            number += 1
            if content:
                text = _decoded(content, f"{path}: row {number}", errors)
                yield Piece(text, True, size * number // rows)


def _decoded(content: bytes, where: str, errors: str) -> str:
    try:
        return content.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: invalid UTF-8 at byte {error.start};"
            " fix it, or replace it by U+FFFD with --on-bad-utf8 replace"
        ) from error
