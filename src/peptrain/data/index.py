"""The files of a prepared corpus, and index.json, which describes them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peptrain.errors import DataError
from peptrain.files import write_atomically

FORMAT = 1
INDEX, JOURNAL = "index.json", "journal.json"
TOKENIZER, HELD_OUT = "tokenizer.json", "held-out.bin"


def shard_name(number: int) -> str:
    """Return the file name of training shard `number`, counted from 0."""
    return f"train-{number:05d}.bin"


@dataclass(frozen=True)
class TokenFile:
    """A flat file of token ids, little-endian."""

    name: str
    tokens: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Index:
    """The content of index.json, which is written last: a directory that has one is complete."""

    format: int = FORMAT
    dtype: str
    """The numpy dtype of the ids: "<u2" or "<u4"."""
    vocab_size: int
    eos_id: int
    max_id: int
    """The largest id in any of the files."""
    documents: int
    held_out_documents: int
    text_bytes: int
    train: tuple[TokenFile, ...]
    held_out: TokenFile
    tokenizer_sha256: str
    settings: dict[str, Any]
    sources: list[dict[str, Any]] = field(default_factory=list)
    """For each source its description and its counts of documents, text bytes and tokens."""

    @property
    def train_tokens(self) -> int:
        return sum(file.tokens for file in self.train)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with any token, its position, and the tokenizer."""
        hashes = [self.tokenizer_sha256, *(f.sha256 for f in (*self.train, self.held_out))]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]

    def save(self, directory: Path) -> None:
        write_json(directory / INDEX, asdict(self))

    @classmethod
    def load(cls, directory: Path) -> Index:
        """Read and check index.json. Raise DataError if the directory isn't a finished corpus."""
        if not (directory / INDEX).exists():
            raise _not_prepared(directory)
        try:
            found = json.loads((directory / INDEX).read_bytes())
            if found["format"] == FORMAT:
                held_out = TokenFile(**found.pop("held_out"))
                train = tuple(TokenFile(**file) for file in found.pop("train"))
                return cls(**found, train=train, held_out=held_out)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{directory / INDEX}: damaged ({error}); delete {directory} and prepare it again"
            ) from error
        raise DataError(
            f"{directory}: prepared in format {found['format']}, but this version reads format"
            f" {FORMAT}; prepare it again"
        )


def _not_prepared(directory: Path) -> DataError:
    if (directory / JOURNAL).exists():
        return DataError(
            f"{directory}: its preparation was interrupted; run the same command again to resume it"
        )
    return DataError(
        f"{directory}: not a prepared corpus (no {INDEX});"
        f" make one with: peptrain data prepare TEXT --out {directory}"
    )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as JSON, atomically."""
    write_atomically(path, json.dumps(content, indent=1) + "\n")
