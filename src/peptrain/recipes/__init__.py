"""Recipes: training configurations with the settings of the papers' tables."""

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
    """The description of a recipe, from the table [recipe] of its file."""

    title: str
    """Model and method."""
    source: str
    """Paper, and the tables, sections and appendices that the settings come from."""
    data: str
    """Corpus and tokenizer. The file sets no data.path, which differs between machines."""
    tokens: int
    """Training tokens: steps x batch_size x seq_len."""
    parameters: int
    """Parameters of the model in its last phase, including frozen ones."""
    trainable: int
    """The number of these that are trained in that phase."""
    expected: str
    """The result that the source reports."""
    open: str
    """What the source leaves open or contradicts, and what was chosen instead."""


def names() -> list[str]:
    """Return the names of all recipes, each PAPER-MODEL-METHOD."""
    entries = (entry.name for entry in files(__package__).iterdir())
    return sorted(name.removesuffix(".toml") for name in entries if name.endswith(".toml"))


def text(name: str) -> str:
    """Return the text of the recipe's file, which `peptrain train --config` accepts.

    Raises ConfigError, with the nearest name, if there is no such recipe.
    """
    known = names()
    if name not in known:
        hint = nearest(name, known)
        raise ConfigError(f"recipe {name!r}: unknown; {hint}`peptrain recipes` lists them")
    return (files(__package__) / f"{name}.toml").read_text(encoding="utf-8")


def about(name: str) -> About:
    """Return the recipe's description. Raises ConfigError as `text` does."""
    return toml.parse(About, _table(name)[HEADER], f"{HEADER}.")


def load(name: str) -> RunConfig[Method]:
    """Return the recipe's configuration, unresolved. Raises ConfigError as `text` does."""
    from peptrain.config import parse  # imports PyTorch, which listing recipes does not need

    return parse(_table(name))


def listed() -> Iterator[tuple[str, str, About]]:
    """Yield each recipe's name, the name of its method, and its description."""
    for name in names():
        table = _table(name)
        yield name, table["method"]["name"], toml.parse(About, table[HEADER], f"{HEADER}.")


def _table(name: str) -> dict[str, Any]:
    return tomllib.loads(text(name))
