"""What lies in a prepared directory: its file names, and index.json that describes them."""

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
    """The file of a shard of training tokens, numbered from 0."""
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
    sources: list[dict[str, Any]] = field(default_factory=list)
    """What describes each source, in order, and its documents, bytes of text and tokens."""

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
                f"{directory / INDEX}: damaged ({error}); delete {directory}, prepare it again"
            ) from error
        raise DataError(
            f"{directory}: prepared in format {found['format']}, but this version reads format"
            f" {FORMAT}; prepare it again"
        )


def _not_prepared(directory: Path) -> DataError:
    if (directory / JOURNAL).exists():
        return DataError(
            f"{directory}: its preparation was interrupted; give the same command again"
        )
    return DataError(
        f"{directory}: not a prepared corpus (no {INDEX} in it);"
        f" make one with: peptrain data prepare TEXT --out {directory}"
    )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as JSON, whole or not at all."""
    write_atomically(path, json.dumps(content, indent=1) + "\n")
