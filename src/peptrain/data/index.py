"""What lies in a prepared directory: its file names, and index.json that describes them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from peptrain.errors import DataError

FORMAT = 1
INDEX, JOURNAL = "index.json", "journal.json"
TOKENIZER, HELD_OUT = "tokenizer.json", "held-out.bin"


def shard_name(number: int) -> str:
    return f"train-{number:05d}.bin"


@dataclass(frozen=True)
class TokenFile:
    """A flat file of token ids, little-endian."""

    name: str
    tokens: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Index:
    """index.json: written last, so a directory that has one is finished."""

    format: int = FORMAT
    dtype: str
    """numpy's name of the ids' type: "<u2" or "<u4"."""
    vocab_size: int
    eos_id: int
    max_id: int
    """The largest id that occurs."""
    documents: int
    held_out_documents: int
    text_bytes: int
    train: tuple[TokenFile, ...]
    held_out: TokenFile
    tokenizer_sha256: str
    settings: dict[str, Any]

    @property
    def train_tokens(self) -> int:
        return sum(file.tokens for file in self.train)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change when a token, its place, or the tokenizer does."""
        hashes = [self.tokenizer_sha256, *(f.sha256 for f in (*self.train, self.held_out))]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]

    def save(self, directory: Path) -> None:
        write_json(directory / INDEX, asdict(self))

    @classmethod
    def load(cls, directory: Path) -> Index:
        """Read and check index.json; DataError if the directory isn't a finished corpus."""
        found = _read_index(directory)
        if found.get("format") != FORMAT:
            raise DataError(
                f"{directory}: prepared in format {found.get('format')}, this version reads"
                f" format {FORMAT}; prepare it again"
            )
        try:
            files = {"train": tuple(TokenFile(**f) for f in found["train"])}
            return cls(**{**found, **files, "held_out": TokenFile(**found["held_out"])})
        except (KeyError, TypeError) as error:
            raise _damaged(directory, error) from error


def _read_index(directory: Path) -> dict[str, Any]:
    if (directory / JOURNAL).exists() and not (directory / INDEX).exists():
        raise DataError(f"{directory}: its preparation isn't finished; give the same command again")
    try:
        found = json.loads((directory / INDEX).read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"{directory}: not a prepared corpus (no {INDEX});"
            f" make one: peptrain data prepare --inputs TEXT --out {directory}"
        ) from error
    except ValueError as error:
        raise _damaged(directory, error) from error
    if not isinstance(found, dict):
        raise _damaged(directory, TypeError("no JSON object"))
    return found


def _damaged(directory: Path, error: Exception) -> DataError:
    return DataError(f"{directory / INDEX}: damaged ({error}); delete {directory}, prepare again")


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomic(path, [json.dumps(content, indent=1).encode() + b"\n"])


def write_atomic(path: Path, chunks: Iterable[bytes | NDArray[Any]]) -> None:
    """Write a file that is there whole or not at all, whenever the process or machine stops."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
