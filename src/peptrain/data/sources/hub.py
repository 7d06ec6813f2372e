"""Hugging Face datasets: streamed from the hub, or saved on disk by `save_to_disk`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from time import sleep
from typing import Any

from peptrain.data.sources.base import (
    BadRecord,
    Piece,
    bad_position,
    first_characters,
    imported,
    text_in,
)
from peptrain.data.sources.files import describe_files, size_of
from peptrain.data.sources.parquet import check_column, documents
from peptrain.data.sources.text import unreadable
from peptrain.errors import ConfigError, DataError
from peptrain.files import read_json_object

SCHEME = "hf:"
WAITS = (5.0, 20.0, 80.0)  # seconds; `datasets` itself has retried each read for minutes by then
ROWS_AT_ONCE = 256
STATE, DATASET_INFO, SAVED_SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
log = logging.getLogger("peptrain")


class HubStream:
    """A dataset that is streamed from the hub. A position is the state dict of the stream.

    The commit is fixed when the dataset is opened, and `describe` includes it: a dataset that
    changed is a different input.
    """

    size = None

    def __init__(self, name: str, key: str, text_field: str, skip_bad: bool = False):
        self.name, self._text_field, self._skip_bad = name, text_field, skip_bad
        self._id, revision, self._config, self._split = parse(name, key)
        datasets, hub = imported("datasets", name), imported("huggingface_hub", name)
        refused = (
            *(ValueError, RuntimeError, datasets.exceptions.DatasetNotFoundError),
            *(hub.errors.RepositoryNotFoundError, hub.errors.RevisionNotFoundError),
        )
        try:
            self._commit = hub.HfApi().dataset_info(self._id, revision=revision).sha
            self._stream = datasets.load_dataset(
                f"hf://datasets/{self._id}",  # never a local directory of the same name
                self._config,
                split=self._split,
                revision=self._commit,
                streaming=True,
            )
        except refused as error:
            raise DataError(f"{key}: {name} can't be opened: {error}") from error
        except Exception as error:  # a failing network raises errors of four libraries
            raise DataError(
                f"{key}: {name} can't be reached ({_briefly(error)}); without a network,"
                f" download it elsewhere with `hf download --repo-type dataset {self._id}"
                " --local-dir DIR` (--include PATTERN for a part of it) and give the directory of"
                " its files as an input"
            ) from error
        self._start = self._stream.state_dict()

    def describe(self) -> str:
        """Return hf:ID@COMMIT:CONFIG:SPLIT, which can itself be given as an input."""
        return f"{SCHEME}{self._id}@{self._commit}:{self._config or ''}:{self._split}"

    def pieces(self, position: Any) -> Iterator[Piece]:
        """Yield one document per row, without rows that are null or empty.

        A stream that breaks is reopened at its position, after increasing waits.
        """
        position, failures = position or self._start, 0
        if not isinstance(position, dict):
            raise bad_position(self.name, position)
        rows = self._rows(position)
        while True:
            try:
                row = next(rows, None)
            except Exception as error:  # a file that the network cut short looks damaged
                failures += 1
                self._wait(failures, error)
                rows = self._rows(position)
                continue
            if row is None:
                return
            position, failures = self._stream.state_dict(), 0
            try:
                if text := text_in(row, self._text_field, self.name):
                    yield Piece(text, True, position=position)
            except BadRecord as error:
                if not self._skip_bad:
                    raise
                yield error.piece._replace(position=position)

    def sample(self, characters: int) -> Iterator[str]:
        """Yield the beginning of the stream."""
        return first_characters(self.pieces(None), characters)

    def _rows(self, position: Any) -> Iterator[dict[str, Any]]:
        self._stream.load_state_dict(position)
        return iter(self._stream)

    def _wait(self, failures: int, error: Exception) -> None:
        if failures > len(WAITS):
            raise DataError(
                f"{self.name}: the stream broke {failures} times at one position"
                f" ({_briefly(error)}); finished shards are kept: run the same command again to"
                " resume"
            ) from error
        seconds = WAITS[failures - 1]
        log.warning("%s: %s; retrying in %g s", self.name, _briefly(error), seconds)
        sleep(seconds)


def parse(name: str, key: str) -> tuple[str, str | None, str | None, str]:
    """Split hf:ID[@REVISION][:CONFIG[:SPLIT]] into id, revision, configuration and split."""
    identifier, *rest = name.removeprefix(SCHEME).split(":")
    repository, _, revision = identifier.partition("@")
    if not repository or len(rest) > 2:
        raise ConfigError(f"{key}: must be hf:ID or hf:ID:CONFIG:SPLIT (got {name!r})")
    config, split = (*rest, "", "")[:2]
    return repository, revision or None, config or None, split or "train"


def _briefly(error: Exception) -> str:
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


class SavedDataset:
    """A directory made by `Dataset.save_to_disk`. A position is the number of rows read."""

    def __init__(
        self, directory: Path, text_field: str, errors: str = "strict", skip_bad: bool = False
    ):
        self.name, self._text_field = str(directory), text_field
        self._errors, self._skip_bad = errors, skip_bad
        self._files = sorted(directory.glob("*.arrow"))
        self.size = sum(map(size_of, self._files))
        datasets = imported("datasets", self.name)
        try:
            self._check_names(directory)
            self._rows = datasets.load_from_disk(self.name).with_format("arrow")
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise unreadable(directory, error) from error

    def _check_names(self, directory: Path) -> None:
        """Raise ValueError if its files can't be read, or name data outside of it."""
        known = {path.name for path in self._files}
        read_json_object(directory / DATASET_INFO)
        named = {file["filename"] for file in read_json_object(directory / STATE)["_data_files"]}
        if not named <= known:
            raise ValueError(f"{STATE} names {min(named - known)!r}, which isn't in the directory")

    def describe(self) -> str:
        return describe_files(self._files)

    def pieces(self, position: int | None) -> Iterator[Piece]:
        """Yield one document per row, without rows that are null or empty."""
        pyarrow, field, total = imported("pyarrow", self.name), self._text_field, len(self._rows)
        check_column(pyarrow, self._rows.features.arrow_schema, field, self.name)
        if not (position is None or (isinstance(position, int) and 0 <= position <= total)):
            raise bad_position(self.name, position)
        rows = self._rows.select_columns([field])
        for start in range(position or 0, total, ROWS_AT_ONCE):
            column = rows[start : start + ROWS_AT_ONCE][field]
            pieces = documents(column, start, self.name, self._errors, self._skip_bad)
            for row, piece in pieces:
                yield piece._replace(bytes_read=self.size * row // total, position=row)

    def sample(self, characters: int) -> Iterator[str]:
        """Yield the first rows."""
        return first_characters(self.pieces(None), characters)


def is_saved_dataset(directory: Path, key: str) -> bool:
    """Return whether `save_to_disk` made it. Raise DataError if it contains several splits."""
    splits = sorted(path.parent for path in directory.glob(f"*/{STATE}"))
    if (directory / SAVED_SPLITS).is_file() and splits:
        choices = " or ".join(map(str, splits))
        raise DataError(f"{key}: {directory} contains several splits; give {choices}")
    described = (directory / STATE).is_file() and (directory / "dataset_info.json").is_file()
    return described and any(directory.glob("*.arrow"))
