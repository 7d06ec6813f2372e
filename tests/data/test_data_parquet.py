"""Parquet files: every row in order, in bounded memory, and what can't be read is named."""

import random
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peptrain.data.sources.parquet import read_rows
from peptrain.errors import DataError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def write(path: Path, column, name: str = "text", **options) -> Path:
    pq.write_table(pa.table({"id": range(len(column)), name: column}), path, **options)
    return path


def read(path: Path, field: str = "text", errors: str = "strict") -> list[str]:
    pieces = list(read_rows(path, field, errors))
    assert all(piece.ends for piece in pieces)
    return [piece.text for piece in pieces]


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(st.none() | st.text(st.sampled_from("ab\n\0ö€😀"), max_size=9), max_size=30),
    row_group_size=st.integers(1, 40),
    kind=st.sampled_from(
        [*(pa.string(), pa.large_string(), pa.string_view()), pa.binary(), pa.large_binary()]
    ),
    dictionary=st.booleans(),
)
def test_rows_come_in_order_and_those_without_text_are_left_out(
    tmp_path_factory, texts, row_group_size, kind, dictionary
):
    column = pa.array(texts, kind)
    if dictionary and kind != pa.string_view():
        column = column.dictionary_encode()
    path = tmp_path_factory.mktemp("rows") / "a.parquet"
    assert read(write(path, column, row_group_size=row_group_size)) == [t for t in texts if t]


def test_the_bytes_read_grow_to_the_size_of_the_file(tmp_path):
    path = write(tmp_path / "a.parquet", ["x"] * 1000)
    counts = [piece.bytes_read for piece in read_rows(path, "text", "strict")]
    assert counts == sorted(counts) and counts[-1] == path.stat().st_size


def test_memory_does_not_grow_with_the_row_group(tmp_path):
    draw = random.Random(0)
    texts = [draw.randbytes(5000).hex() for _ in range(4000)]  # doesn't pack
    size = sum(map(len, texts))
    path = write(tmp_path / "a.parquet", texts, row_group_size=len(texts), use_dictionary=False)
    del texts
    before, most = pa.total_allocated_bytes(), 0
    for _ in read_rows(path, "text", "strict"):
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < size / 2


@pytest.mark.parametrize("dictionary", [False, True])
def test_memory_holds_one_of_few_giant_rows(tmp_path, dictionary, monkeypatch):
    """All in one row group, which is fewer rows than a batch of usual text has."""
    size, module = 1 << 20, sys.modules[read_rows.__module__]
    monkeypatch.setattr(module, "BATCH_BYTES", size)
    monkeypatch.setattr(module, "LARGEST_BATCH", size)
    texts = ["x" * size] * 16 if dictionary else [f"{n:x}" * size for n in range(16)]
    # pyarrow looks at the size of a page after so many rows.
    options = {"use_dictionary": dictionary, "write_batch_size": 1, "compression": None}
    path = write(tmp_path / "a.parquet", texts, row_group_size=99, **options)
    before, most, count = pa.total_allocated_bytes(), 0, 0
    for piece in read_rows(path, "text", "strict"):
        most = max(most, pa.total_allocated_bytes() - before)
        count += piece.text == texts[count]
    assert count == 16 and most < 6 * size


def test_another_column_and_missing_and_foreign_ones(tmp_path):
    path = write(tmp_path / "a.parquet", ["x"], "body")
    assert read(path, "body") == ["x"]
    with pytest.raises(
        DataError, match=r"a\.parquet: no field 'text' \(fields: 'id', 'body'\); .*--text-field"
    ):
        read(path)
    with pytest.raises(DataError, match=r"a\.parquet: 'id' is int64, not a string; choose"):
        read(path, "id")
    with pytest.raises(DataError, match=r"'body' is list<.*>, not a string"):
        read(write(path, [["x"]], "body"), "body")


@pytest.mark.parametrize("place", [8, 0.5, 0.98])
def test_truncated_and_foreign_files_are_named(tmp_path, place):
    path = write(tmp_path / "a.parquet", ["some text " * 50] * 500)
    whole = path.read_bytes()
    path.write_bytes(whole[: place if place == 8 else int(len(whole) * place)])
    with pytest.raises(DataError, match=r"a\.parquet: can't be read .*fetch it again"):
        read(path)


def test_damage_inside_is_named(tmp_path):
    path = write(tmp_path / "a.parquet", [f"text {n} " * 50 for n in range(500)])
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + b"\xff" * (len(whole) // 2) + whole[4 + len(whole) // 2 :])
    with pytest.raises(DataError, match=r"a\.parquet: can't be read"):
        read(path)


def test_broken_utf8_names_the_row(tmp_path):
    raw = pa.array([b"good", None, b"ab\xff"], pa.binary())
    path = write(tmp_path / "a.parquet", raw.view(pa.string()))
    with pytest.raises(DataError, match=r"row 3: invalid UTF-8 at byte 2 .*--on-bad-utf8 replace"):
        read(path)
    good, bad = read_rows(path, "text", "strict", skip_bad=True)
    assert good.text == "good" and not bad.text and "row 3: invalid UTF-8" in bad.bad
    assert read(path, errors="replace") == ["good", "ab\ufffd"]


def test_without_pyarrow_the_repair_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", ["x"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"a\.parquet: .*pip install 'peptrain\[data\]'"):
        read(path)
