"""Recipes: the settings of the papers' tables, to pre-train and to fine-tune."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields
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
class Results:
    """What the source reports of a fine-tuning, in percent, by the name of the task."""

    cola: float | None = None
    stsb: float | None = None
    mrpc: float | None = None
    rte: float | None = None
    sst2: float | None = None
    mnli: float | None = None
    qnli: float | None = None
    qqp: float | None = None

    def by_task(self) -> dict[str, float]:
        """Return the results that there are."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {task: value for task, value in found.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class About:
    """The description of a recipe, from the table [recipe] of its file."""

    title: str
    """Model and method."""
    source: str
    """Paper, and the tables, sections and appendices that the settings come from."""
    data: str
    """Corpus and tokenizer, or the model to fine-tune and its data. The file sets no paths, which
    differ between machines."""
    tokens: int
    """Training tokens: steps x batch_size x seq_len. 0 for a fine-tuning, whose rows are padded."""
    parameters: int
    """Parameters of the model in its last phase, including frozen ones. Of a classifier: with two
    classes."""
    trainable: int
    """The number of these that are trained in that phase."""
    expected: str
    """The result that the source reports."""
    open: str
    """What the source leaves open or contradicts, and what was chosen instead."""
    results: Results = Results()
    """Of a fine-tuning: the result for each task."""

    @property
    def tunes(self) -> bool:
        """Whether it is for `peptrain tune` instead of `peptrain train`."""
        return bool(self.results.by_task())


def names() -> list[str]:
    """Return the names of all recipes, each PAPER-MODEL-METHOD."""
    entries = (entry.name for entry in files(__package__).iterdir())
    return sorted(name.removesuffix(".toml") for name in entries if name.endswith(".toml"))


def text(name: str) -> str:
    """Return the text of the recipe's file, which `--config` accepts.

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


def load(name: str, task: str = "") -> RunConfig[Method]:
    """Return the recipe's configuration, unresolved, for a task of fine-tuning if there is one.

    Raises ConfigError as `text` does, and for a task that the recipe has no settings for.
    """
    from peptrain.config import parse  # imports PyTorch, which listing recipes does not need

    return parse(toml.for_task(_table(name), task))


def listed() -> Iterator[tuple[str, str, About]]:
    """Yield each recipe's name, the name of its method, and its description."""
    for name in names():
        table = _table(name)
        yield name, table["method"]["name"], toml.parse(About, table[HEADER], f"{HEADER}.")


def _table(name: str) -> dict[str, Any]:
    return tomllib.loads(text(name))
