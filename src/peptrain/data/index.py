"""The files of a prepared corpus, and index.json, which describes them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peptrain.errors import DataError
from peptrain.files import is_barred, read_json_object, write_atomically
from peptrain.text import quoted

FORMAT = 1
INDEX, JOURNAL = "index.json", "journal.json"
TOKENIZER, HELD_OUT = "tokenizer.json", "held-out.bin"
SPECIAL = ("bos_token", "pad_token", "unk_token", "chat_template")
DTYPES = ("<u2", "<u4")
CHECKSUM = "checksum"
MOST = 1 << 60  # no count is larger
SHOWN = 80  # characters of a wrong value
Rule = tuple[str, Any, bool, str]
"""A key, its value, whether it is valid, and what is valid."""


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
    def special_tokens(self) -> dict[str, str]:
        """What the tokenizer's directory configured, by SPECIAL, besides the end token."""
        found: dict[str, str] = self.settings.get("special_tokens", {})
        return found

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with any token, its position, and the tokenizer."""
        hashes = [self.tokenizer_sha256, *(f.sha256 for f in (*self.train, self.held_out))]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]

    def save(self, directory: Path) -> None:
        write_checked(directory / INDEX, asdict(self))

    @classmethod
    def load(cls, directory: Path) -> Index:
        """Read and check index.json. Raise DataError if the directory isn't a finished corpus."""
        path = directory / INDEX
        if not path.is_file():
            raise _not_prepared(directory)
        check_inside(path)
        found = read_checked(path)
        if (version := found.get("format", FORMAT)) != FORMAT:
            raise DataError(
                f"{directory}: prepared in format {_shown(version)}, but this version reads format"
                f" {FORMAT}; prepare it again"
            )
        try:
            held_out = TokenFile(**found.pop("held_out"))
            train = tuple(TokenFile(**file) for file in found.pop("train"))
            index = cls(**found, train=train, held_out=held_out)
        except (KeyError, TypeError) as error:
            raise damaged(path, f"damaged ({error})") from error
        check_rules(path, index._rules())
        return index

    def _rules(self) -> Iterator[Rule]:
        yield "dtype", self.dtype, self.dtype in DTYPES, " or ".join(DTYPES)
        ids = 1 << 8 * int(self.dtype[-1])
        yield count("vocab_size", self.vocab_size, 1, ids)
        yield count("eos_id", self.eos_id, 0, self.vocab_size - 1)
        yield count("max_id", self.max_id, 0, self.vocab_size - 1)
        yield count("documents", self.documents)
        yield count("held_out_documents", self.held_out_documents, 0, self.documents)
        yield count("text_bytes", self.text_bytes)
        yield _hash("tokenizer_sha256", self.tokenizer_sha256)
        yield "settings", self.settings, isinstance(self.settings, dict), "an object"
        tokens = self.special_tokens
        known = isinstance(tokens, dict) and all(type(v) is str for v in tokens.values())
        yield "special_tokens", tokens, known and set(tokens) <= set(SPECIAL), "strings"
        yield "sources", self.sources, isinstance(self.sources, list), "a list"
        yield "train", "none", len(self.train) > 0, "one file or more"
        names = [*map(shard_name, range(len(self.train))), HELD_OUT]
        for name, file in zip(names, (*self.train, self.held_out), strict=True):
            yield "name", file.name, file.name == name, name
            yield count(f"tokens of {name}", file.tokens)
            yield _hash(f"sha256 of {name}", file.sha256)


def check_rules(path: Path, rules: Iterable[Rule]) -> None:
    """Raise DataError at the first value in the file `path` that isn't valid."""
    for key, value, valid, wanted in rules:
        if not valid:
            raise damaged(path, f"damaged ({key}: must be {wanted}, got {_shown(value)})")


def count(key: str, value: Any, least: int = 0, most: int = MOST) -> Rule:
    """Return the rule for an integer."""
    valid = type(value) is int and least <= value <= most  # True is no count
    return key, value, valid, f"an integer from {least} to {most}"


def _hash(key: str, value: Any) -> Rule:
    valid = isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None
    return key, value, valid, "64 hex digits"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _not_prepared(directory: Path) -> DataError:
    if (directory / JOURNAL).exists():
        return DataError(
            f"{directory}: its preparation was interrupted; run the same command again to resume it"
        )
    if directory.is_file():
        text, out, what = directory, Path("data") / directory.name.partition(".")[0], "a file"
    else:
        other = directory.is_dir() and any(directory.iterdir())
        out = Path("data") / directory.name if other else directory
        text, what = Path("TEXT"), f"no {INDEX}"
    return DataError(
        f"{directory}: not a prepared corpus ({what}); make one with"
        f" `peptrain data prepare {quoted(text)} --out {quoted(out)}`"
    )


def damaged(path: Path, what: str) -> DataError:
    """Return the error for a file of a corpus that can't be used."""
    if is_barred(path):
        return DataError(f"{path}: can't be read: permission denied; change its permissions")
    return DataError(
        f"{path}: {what}; delete {path.parent} and prepare it again with `peptrain data prepare`"
    )


def check_inside(path: Path) -> None:
    """Raise DataError if `path` links to a file outside its directory."""
    if path.resolve().parent != path.parent.resolve():
        raise DataError(f"{path}: links to a file outside the corpus; copy that file here instead")


def write_checked(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as JSON, atomically, with its SHA-256 among its settings."""
    settings = content["settings"] | {CHECKSUM: _checksum(content)}
    write_atomically(path, json.dumps(content | {"settings": settings}, indent=1) + "\n")


def read_checked(path: Path) -> dict[str, Any]:
    """Read what `write_checked` wrote, or 0.1.0, without a checksum. Raise DataError if damaged."""
    try:
        found = read_json_object(path)
    except ValueError as error:
        raise damaged(path, f"damaged ({error})") from error
    settings = found.get("settings")
    expected = settings.pop(CHECKSUM, None) if isinstance(settings, dict) else None
    if expected not in (None, _checksum(found)):
        raise damaged(path, "damaged (its content differs from what was written)")
    return found


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
