"""The tokenizer of a fine-tuned run: that of the model it starts from, as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peptrain.data.tokenizer import configured, end_id, load_tokenizer
from peptrain.errors import ConfigError, DataError
from peptrain.files import read_json_object
from peptrain.runs.directory import RunDir
from peptrain.runs.select import at
from peptrain.runs.tokenizer import check_run_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Words:
    """A tokenizer, the ids that part and fill up texts, and where it lies."""

    tokenizer: Tokenizer
    end: int
    pad: int
    directory: Path


def words_of(path: Path) -> Words:
    """Return the tokenizer of a run or of a Hugging Face directory.

    Raises ConfigError or DataError if there is none that can be read.
    """
    run = RunDir(at(path)[0])
    directory = run.tokenizer if run.config_file.is_file() else path
    if directory != path:
        check_run_tokenizer(run)
    if not (directory / "tokenizer.json").is_file():
        raise DataError(
            f"init_from: {directory} has no tokenizer.json, and without it the task can't be read;"
            " give a directory that has one, such as `AutoTokenizer.from_pretrained(...)` saves"
        )
    tokenizer, named = load_tokenizer(directory), configured(directory)
    # BERT has no end token, and parts texts by [SEP].
    end = _end(tokenizer, named, directory)
    # An encoder counts its positions from it on.
    pad = _padding(run.model_file if directory != path else directory / "config.json")
    if pad is None and "pad_token" in named:
        pad = tokenizer.token_to_id(named["pad_token"])
    return Words(tokenizer, end, end if pad is None else pad, directory)


def _end(tokenizer: Tokenizer, named: Mapping[str, str], directory: Path) -> int:
    try:
        return end_id(tokenizer, named.get("eos_token") or named.get("sep_token"))
    except ConfigError as error:  # it advises a flag that prepares a corpus
        said = str(error).partition(";")[0]
        raise ConfigError(
            f"init_from: {said}; name one of its tokens as eos_token or sep_token in"
            f" {directory / 'tokenizer_config.json'}"
        ) from error


def _padding(file: Path) -> int | None:
    """Return the pad_token_id in a config.json, if there is one."""
    try:
        found = read_json_object(file).get("pad_token_id") if file.is_file() else None
    except ValueError as error:
        raise ConfigError(f"init_from: {file}: {error}") from error
    return found if type(found) is int and found >= 0 else None


def check_vocabulary(words: Words, largest: int, rows: int) -> None:
    """Raise ConfigError unless an embedding with so many rows has an id as large as `largest`.

    A tokenizer may have more ids than the model: T5's has a hundred that mark gaps in a text.
    """
    if largest >= rows:
        raise ConfigError(
            f"model.vocab_size: too small for token id {largest} in the data, by the tokenizer in"
            f" {words.directory} (got {rows}); give the tokenizer that belongs to the model"
        )
