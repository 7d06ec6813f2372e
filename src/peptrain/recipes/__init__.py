"""The settings of the papers' tables, each a configuration that trains: `peptrain recipes`."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from peptrain.errors import ConfigError
from peptrain.settings import toml
from peptrain.settings.fields import nearest
from peptrain.settings.toml import HEADER

if TYPE_CHECKING:
    from peptrain.config import RunConfig
    from peptrain.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class About:
    """What a recipe says of itself, in the table [recipe] of its file."""

    title: str
    """Model and method."""
    source: str
    """Paper, and the tables, sections and appendices that the settings are from."""
    data: str
    """Corpus and tokenizer. The file has no data.path: nobody else's disk has it there."""
    tokens: int
    """Trained on: steps x batch_size x seq_len."""
    parameters: int
    """Of the model in its last phase, frozen ones too."""
    trainable: int
    """Of these, what that phase trains."""
    expected: str
    """The result that the source prints."""
    open: str
    """What the source leaves open or contradicts, and what was chosen."""


def names() -> list[str]:
    """Every recipe: PAPER-MODEL-METHOD."""
    entries = (entry.name for entry in files(__package__).iterdir())
    return sorted(name.removesuffix(".toml") for name in entries if name.endswith(".toml"))


def text(name: str) -> str:
    """The recipe's file, which `peptrain train --config` takes.

    Raises ConfigError, with the nearest name, when there is no such recipe.
    """
    known = names()
    if name not in known:
        hint = nearest(name, known)
        raise ConfigError(f"recipe {name!r}: unknown; {hint}`peptrain recipes` lists them")
    return (files(__package__) / f"{name}.toml").read_text(encoding="utf-8")


def about(name: str) -> About:
    """What the recipe says of itself. Raises ConfigError as `text` does."""
    return toml.parse(About, _table(name)[HEADER], f"{HEADER}.")


def load(name: str) -> RunConfig[Method]:
    """The recipe's configuration, unresolved. Raises ConfigError as `text` does."""
    from peptrain.config import parse  # and with it PyTorch, which a list of recipes needs not

    return parse(_table(name))


def listed() -> Iterator[tuple[str, str, About]]:
    """Each recipe's name, the name of its method, and what it says of itself."""
    for name in names():
        table = _table(name)
        yield name, table["method"]["name"], toml.parse(About, table[HEADER], f"{HEADER}.")


def _table(name: str) -> dict[str, Any]:
    return tomllib.loads(text(name))
