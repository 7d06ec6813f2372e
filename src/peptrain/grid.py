"""A grid of runs from one TOML file: any setting may be a list, a block is their product."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from peptrain import toml
from peptrain.config import HEADER, RunConfig, dump, parse, resolved
from peptrain.errors import ConfigError
from peptrain.initial import adopting
from peptrain.methods.base import Method

NOT_SHOWN = ("method.name", "optim.lr", "train.seed")
"""What a label leaves to other columns."""
LONGEST = 120
"""Characters of a readable name; the digest comes on top, and file systems take 255 bytes."""


@dataclass(frozen=True)
class GridRun:
    """One run of a grid."""

    config: RunConfig[Method]
    """Resolved: what the run directory will hold."""
    settings: Mapping[str, Any]
    """What its block says, and the lists of [base], by dotted key; but for the method's name, the
    learning rate and the seed."""
    data: str = ""
    """The corpus' fingerprint, once it is opened."""

    @property
    def method(self) -> str:
        return self.config.method.name

    @property
    def lr(self) -> float:
        assert self.config.optim.lr is not None
        return self.config.optim.lr

    @property
    def seed(self) -> int:
        return self.config.train.seed

    @property
    def tokens(self) -> int:
        """What it trains on."""
        train = self.config.train
        return train.steps * train.batch_size * train.seq_len

    @property
    def label(self) -> str:
        """The method with its settings, the same for all seeds and learning rates."""
        return " ".join((self.method, *_pairs(self.settings)))

    @property
    def digest(self) -> str:
        """Of every setting and the corpus: a run with another digest is another run."""
        return hashlib.sha256((dump(self.config) + self.data).encode()).hexdigest()[:8]

    @property
    def configuration(self) -> str:
        """What the runs of a line of the table have in common."""
        c = self.config
        return dump(replace(c, optim=replace(c.optim, lr=None), train=replace(c.train, seed=0)))

    @property
    def name(self) -> str:
        """Readable, and the same whatever else is in the grid."""
        words = [self.method, *_pairs(self.settings), f"lr={self.lr:g}", f"seed={self.seed}"]
        readable = re.sub(r"[^\w.=+-]+", "_", "-".join(words), flags=re.ASCII)
        return f"{readable[:LONGEST]}-{self.digest}"


def load_grid(path: Path) -> list[GridRun]:
    """The runs of the grid in a file."""
    return expand(toml.read(path, given_as=""))


def expand(table: Mapping[str, Any]) -> list[GridRun]:
    """The runs that the table of a grid describes, in its order.

    Both [base] and each [[grid]] block have the form of `peptrain train --config`, except that a
    value may be a list. A block's settings go before those of [base]; the runs of a block are the
    product of its lists. Raises ConfigError for what is no grid, for a run that can't be
    configured, for two identical ones, and for runs that differ in their tokens.
    """
    for key in table:
        if key not in ("base", "grid"):
            raise ConfigError(toml.unknown(key, ["base", "grid"]))
    base, blocks = table.get("base", {}), table.get("grid", [])
    if not isinstance(base, Mapping):
        raise ConfigError(f"base: {base!r} must be a table, [base]")
    if not isinstance(blocks, list) or not all(isinstance(b, Mapping) for b in blocks):
        raise ConfigError("grid: must be blocks, each under [[grid]]")
    if not blocks:
        raise ConfigError('grid: empty; write a [[grid]] block with method.name = "bpt"')
    common, runs = _flat(base), list[GridRun]()
    for number, block in enumerate(blocks, start=1):
        try:
            runs.extend(_of_block(common, _flat(block)))
        except ConfigError as error:
            raise ConfigError(f"[[grid]] {number}: {error}") from error
    _check_different(runs)
    _check_equal(runs)
    _check_seeds(runs)
    return runs


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves and lists by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, leaf = key.split(".")
        inner = table
        for section in sections:
            inner = inner.setdefault(section, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{key}: {section} is a value elsewhere in the grid")
        inner[leaf] = value
    return table


def _of_block(common: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[GridRun]:
    given = {key: v for key, v in {**common, **own}.items() if not key.startswith(f"{HEADER}.")}
    if "run" in given:
        raise ConfigError("run: compare names the runs itself; give --out")
    shown = {*own, *(key for key, value in common.items() if isinstance(value, list))}
    choices = [value if isinstance(value, list) else [value] for value in given.values()]
    for key, values in zip(given, choices, strict=True):
        if not values:
            raise ConfigError(f"{key}: [] makes no run; give one value or more")
        if any(isinstance(value, Mapping) for value in values):
            raise ConfigError(f"{key}: a list of tables; write a [[grid]] block for each of them")
    for chosen in product(*choices):
        flat = dict(zip(given, chosen, strict=True))
        config = adopting(parse(_nested(flat)))
        on_gpu = config.train.device != "cpu" and torch.cuda.is_available()
        settings = {k: v for k, v in flat.items() if k in shown and k not in NOT_SHOWN}
        yield GridRun(resolved(config, world_size=1, on_gpu=on_gpu), settings)


def _pairs(settings: Mapping[str, Any]) -> Iterator[str]:
    for key, value in settings.items():
        spelt = str(value).lower() if isinstance(value, bool) else str(value)
        yield f"{key.removeprefix('method.')}={spelt}"


def _check_different(runs: Sequence[GridRun]) -> None:
    seen: dict[str, GridRun] = {}
    for run in runs:
        if (other := seen.setdefault(run.digest, run)) is not run:
            both = f"{other.label!r} and {run.label!r}, both lr={run.lr:g} seed={run.seed}"
            raise ConfigError(f"grid: two identical runs, {both}; remove one")


def _check_seeds(runs: Sequence[GridRun]) -> None:
    """A mean over fewer seeds would be chosen for their luck."""
    groups: dict[str, dict[float, set[int]]] = {}
    for run in runs:
        groups.setdefault(run.configuration, {}).setdefault(run.lr, set()).add(run.seed)
    for run in runs:
        seeds = groups[run.configuration]
        for lr, given in seeds.items():
            if given != seeds[run.lr]:
                raise ConfigError(
                    f"train.seed: {run.label!r} has {sorted(seeds[run.lr])} at lr={run.lr:g} and"
                    f" {sorted(given)} at lr={lr:g}; give all learning rates the same seeds"
                )


def _check_equal(runs: Sequence[GridRun]) -> None:
    """Losses compare after equal tokens of one corpus, with equal contexts."""
    first = runs[0]
    for run in runs:
        pairs = {
            "data.path": (first.config.data.path, run.config.data.path),
            "train.seq_len": (first.config.train.seq_len, run.config.train.seq_len),
            "train.steps x batch_size x seq_len": (first.tokens, run.tokens),
        }
        for key, (one, other) in pairs.items():
            if one != other:
                raise ConfigError(
                    f"{key}: {one} in {first.label!r} and {other} in {run.label!r}; a comparison"
                    " is at equal tokens, so give all runs the same"
                )
