"""Grids of runs from a TOML file, in which any setting may be a list; a block is their product."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch

from peptrain.config import RunConfig, as_named, essence, parse, resolved
from peptrain.errors import ConfigError
from peptrain.methods.base import Method
from peptrain.runs.init_from import with_inherited_model
from peptrain.settings import toml
from peptrain.settings.fields import quiet, shown
from peptrain.settings.toml import HEADER
from peptrain.tuning.settle import with_task

Equal = Literal["tokens", "flops", "time"]
"""What all runs of a grid spend equally, so that their losses are comparable."""
NOT_SHOWN = ("method.name", "optim.lr", "train.seed")
"""Settings that are not listed in labels: a label starts with the method, seeds and learning rates
have columns."""
STEPS = "train.steps"
RATES = ("optim.embedding_lr", "optim.head_lr")
"""Learning rates that are listed in labels, but do not affect costs."""
LONGEST = 120
"""Maximum characters of a readable name, without the digest. File systems allow 255 bytes."""

MOST_RUNS = 10_000
"""In a block. To configure one takes 20 ms on a slow core, and a larger product is a slip."""


@dataclass(frozen=True)
class GridRun:
    """One run of a grid."""

    config: RunConfig[Method]
    """Resolved, as written to the run directory."""
    written: RunConfig[Method]
    """The same before resolution, with unset values."""
    settings: Mapping[str, Any]
    """Settings of its block, and its values from lists in [base], by dotted key. Without the
    method's name, learning rate and seed, and unless tokens are equal without the steps."""
    data: str = ""
    """Fingerprint of the corpus and of the files the run starts from, once they are read."""
    cost: float | None = None
    """FLOPs or seconds of the run; None at equal tokens."""
    takes_vocabulary: bool = False
    """The model has the vocabulary of the corpus. In 0.1.0 it had the preset's."""

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
        """Number of training tokens."""
        train = self.config.train
        return train.steps * train.batch_size * train.seq_len

    @property
    def steps(self) -> int:
        return self.config.train.steps

    def lasting(self, steps: int) -> GridRun:
        """The same run with `steps` steps, and with everything that scales with its length."""
        written = replace(self.written, train=replace(self.written.train, steps=steps))
        return replace(self, written=written, config=_resolved(written))

    @property
    def label(self) -> str:
        """The method with its settings, the same for all seeds and learning rates."""
        return " ".join((self.method, *_pairs(self.settings)))

    @property
    def named(self) -> RunConfig[Method]:
        """The configuration that names the run, the same in every version of peptrain."""
        return as_named(self.config, self.written)

    @property
    def digest(self) -> str:
        """Hash of all settings, the corpus and the files that are named. It identifies the run."""
        return _digest(essence(self.named) + self.data)

    def digest_at(self, path: Path) -> str:
        """The digest of this run if the same corpus were at `path`."""
        elsewhere = replace(self.named, data=replace(self.named.data, path=path))
        return _digest(essence(elsewhere) + self.data)

    @property
    def digest_of_0_1_0(self) -> str:
        """The digest that the same grid gave to its run in 0.1.0."""
        if not self.takes_vocabulary:
            return self.digest
        older = replace(self.named, model=replace(self.named.model, vocab_size=None))
        return _digest(essence(older) + self.data)

    @property
    def configuration(self) -> str:
        """Identifies the line of the table that the run belongs to."""
        return essence(_untuned(self.named))

    @property
    def family(self) -> RunConfig[Method]:
        """Identifies the runs that cost the same, before the number of steps is known."""
        return _priced(self.written)

    @property
    def name(self) -> str:
        """Readable name of the run, independent of the rest of the grid."""
        words = [self.method, *_pairs(self.settings), f"lr={self.lr:g}", f"seed={self.seed}"]
        return _file_name(words, self.digest)

    @property
    def costs_name(self) -> str:
        """Name of the file of costs, without learning rates and seed, which do not affect costs."""
        settings = {key: value for key, value in self.settings.items() if key not in RATES}
        words = [self.method, *_pairs(settings)]
        return _file_name(words, _digest(essence(_priced(self.named)) + self.data))


@dataclass(frozen=True)
class Grid:
    """The runs that a grid file describes."""

    runs: Sequence[GridRun]
    """In the order of the file. Unless tokens are equal, their final steps are not known yet."""
    equal: Equal

    @property
    def baseline(self) -> GridRun:
        """The first run of full training, or else the first run. Its cost is the budget of all."""
        return next((run for run in self.runs if run.method == "full"), self.runs[0])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _file_name(words: Sequence[str], digest: str) -> str:
    readable = re.sub(r"[^\w.=+-]+", "_", "-".join(words), flags=re.ASCII)
    return f"{readable[:LONGEST]}-{digest}"


def _untuned(c: RunConfig[Method]) -> RunConfig[Method]:
    return replace(c, optim=replace(c.optim, lr=None), train=replace(c.train, seed=0))


def _priced(c: RunConfig[Method]) -> RunConfig[Method]:
    """Of `RATES` only whether they are set matters to costs: each makes a group of its own."""
    embeddings, head = (rate and 1.0 for rate in (c.optim.embedding_lr, c.optim.head_lr))
    return _untuned(replace(c, optim=replace(c.optim, embedding_lr=embeddings, head_lr=head)))


def load_grid(path: Path) -> Grid:
    """Load the grid in a TOML file."""
    return expand(toml.read(path, given_as=""))


def expand(table: Mapping[str, Any]) -> Grid:
    """Expand the table of a grid into its runs.

    Both [base] and each [[grid]] block have the form of `peptrain train --config`, except that a
    value may be a list. A block's settings override those of [base], and the runs of a block are
    the product of its lists.

    Raises ConfigError for a table that is not a grid, for a run that can't be configured, and for
    runs that `check_comparable` refuses. Unless tokens are equal, only corpus, sequence length and
    steps set for other runs than the baseline are checked here; the rest is checked by `allot`,
    when the steps are known.
    """
    for key in table:
        if key not in (known := ["equal", "base", "grid"]):
            raise ConfigError(toml.unknown(key, known))
    equal: Equal = toml.parse_value(Equal, table.get("equal", "tokens"), "equal")
    base, blocks = table.get("base", {}), table.get("grid", [])
    if not isinstance(base, Mapping):
        raise ConfigError(f"base: must be a table, [base] (got {base!r})")
    if not isinstance(blocks, list) or not all(isinstance(b, Mapping) for b in blocks):
        raise ConfigError("grid: must be a list of blocks, each under [[grid]]")
    if not blocks:
        raise ConfigError('grid: empty; write a [[grid]] block with method.name = "bpt"')
    common, own = _flat(base), [_flat(block) for block in blocks]
    of_block: list[list[GridRun]] = []
    for number, block in enumerate(own, start=1):
        try:
            of_block.append(list(_of_block(common, block, equal)))
        except ConfigError as error:
            key = str(error).partition(":")[0]
            # A setting of [base] that a block's method does not have is named with that block.
            of_base = key in common and key not in block and not key.startswith("method.")
            where = "[base]" if of_base else f"[[grid]] {number}"
            raise ConfigError(f"{where}: {error}") from error
    grid = Grid([run for runs in of_block for run in runs], equal)
    if equal == "tokens":
        check_comparable(grid.runs, equal)
    else:
        at = next(n for n, runs in enumerate(of_block) if grid.baseline in runs)
        _check_steps(common, own, at, grid)
        _check_same(grid.runs, CONTEXT)
    return grid


def unstated(runs: Sequence[GridRun]) -> list[str]:
    """List settings of optimizer and schedule that differ although the grid does not set them.

    They differ because each method has its own defaults. The learning rate and settings that are a
    fraction of the run's length are left out.
    """
    found = []
    for section in ("optim", "schedule"):
        for field in fields(getattr(runs[0].config, section)):
            if field.name == "lr" or "fraction" in field.metadata:
                continue
            values: dict[Any, dict[str, None]] = {}
            for run in runs:
                told, used = (
                    getattr(getattr(c, section), field.name) for c in (run.written, run.config)
                )
                if told is None and used is not None:
                    values.setdefault(used, {})[run.method] = None
            if len(values) > 1:
                each = "; ".join(f"{v} for {', '.join(names)}" for v, names in values.items())
                found.append(f"{section}.{field.name} differs by the methods' defaults: {each}")
    return found


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested tables into values and lists by dotted key."""
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
                raise ConfigError(
                    f"{key}: {section} must be a table, but is a value elsewhere in the grid"
                )
        inner[leaf] = value
    return table


def _of_block(common: Mapping[str, Any], own: Mapping[str, Any], equal: Equal) -> Iterator[GridRun]:
    given = {key: v for key, v in {**common, **own}.items() if not key.startswith(f"{HEADER}.")}
    if "run" in given:
        raise ConfigError("run: can't be set in a grid, since compare names the runs; use --out")
    if "equal" in given:
        raise ConfigError("equal: applies to all runs; write it above [base] and every [[grid]]")
    shown = {*own, *(key for key, value in common.items() if isinstance(value, list))}
    hidden = NOT_SHOWN if equal == "tokens" else (*NOT_SHOWN, STEPS)
    choices = [value if isinstance(value, list) else [value] for value in given.values()]
    for key, values in zip(given, choices, strict=True):
        if not values:
            raise ConfigError(f"{key}: must have at least one value (got [])")
        if any(isinstance(value, Mapping) for value in values):
            raise ConfigError(
                f"{key}: must not be a list of tables; write a [[grid]] block for each table"
            )
    _check_few(dict(zip(given, choices, strict=True)))
    for chosen in product(*choices):
        flat = dict(zip(given, chosen, strict=True))
        asked = parse(_nested(flat))
        written = with_task(with_inherited_model(asked))
        inherits = asked.init_from or asked.match_trainable or asked.continue_from
        takes = not inherits and asked.model != written.model
        settings = {k: v for k, v in flat.items() if k in shown and k not in hidden}
        # Warnings about steps would be wrong while the final number of steps is unknown.
        if asked.tune.task and equal != "tokens":
            raise ConfigError(
                f'equal: must be "tokens" to fine-tune (got "{equal}"); all runs have tune.epochs'
            )
        with nullcontext() if equal == "tokens" else quiet():
            config = _resolved(written)
        yield GridRun(config, written, settings, takes_vocabulary=takes)


def _check_few(choices: Mapping[str, Sequence[object]]) -> None:
    """Raise ConfigError, naming the lists and their lengths, for too many runs."""
    runs = math.prod(map(len, choices.values()))
    if runs > MOST_RUNS:
        counts = {key: len(values) for key, values in choices.items() if len(values) > 1}
        raise ConfigError(
            f"{', '.join(counts)}: {' x '.join(f'{n:,}' for n in counts.values())} values are"
            f" {shown(runs)} runs, and a block has at most {MOST_RUNS:,}; shorten a list"
        )


def _resolved(config: RunConfig[Method]) -> RunConfig[Method]:
    on_gpu = config.train.device != "cpu" and torch.cuda.is_available()
    return resolved(config, world_size=1, on_gpu=on_gpu)


def _pairs(settings: Mapping[str, Any]) -> Iterator[str]:
    for key, value in settings.items():
        spelt = str(value).lower() if isinstance(value, bool) else str(value)
        yield f"{key.removeprefix('method.')}={spelt}"


def check_comparable(runs: Sequence[GridRun], equal: Equal) -> None:
    """Raise ConfigError if runs whose steps are known are not comparable."""
    _check_different(runs)
    _check_same(runs, CONTEXT)
    if equal == "tokens":
        _check_same(runs, TOKENS)
    _check_seeds(runs)


def _check_different(runs: Sequence[GridRun]) -> None:
    seen: dict[str, GridRun] = {}
    for run in runs:
        if (other := seen.setdefault(run.digest, run)) is not run:
            both = f"{other.label!r} and {run.label!r}, both with lr={run.lr:g} seed={run.seed}"
            raise ConfigError(f"grid: two identical runs, {both}; remove one")


def _check_seeds(runs: Sequence[GridRun]) -> None:
    """Check that all learning rates of a line have the same seeds.

    The lowest of means over different seeds may be the lowest by chance.
    """
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


CONTEXT: dict[str, Callable[[GridRun], object]] = {
    "data.path": lambda run: run.config.data.path,
    "train.seq_len": lambda run: run.config.train.seq_len,
    "tune.task": lambda run: run.config.tune.task,
    "tune.tasks_data": lambda run: run.config.tune.tasks_data,
    "tune.rows": lambda run: run.config.tune.rows,
    "tune.epochs": lambda run: run.config.tune.epochs,
}
TOKENS: dict[str, Callable[[GridRun], object]] = {
    "train.steps x batch_size x seq_len": lambda run: run.tokens
}


def _check_same(runs: Sequence[GridRun], values: Mapping[str, Callable[[GridRun], object]]) -> None:
    """Check that `values` are equal for all runs, as comparable losses require."""
    first = runs[0]
    for run in runs:
        for key, value in values.items():
            if value(first) != value(run):
                raise ConfigError(
                    f"{key}: must be the same in all runs (got {value(first)} in {first.label!r}"
                    f" and {value(run)} in {run.label!r}); otherwise losses are not comparable"
                )


def _check_steps(
    common: Mapping[str, Any], blocks: Sequence[Mapping[str, Any]], at: int, grid: Grid
) -> None:
    """Refuse steps set for other runs than the baseline, which is in block `at`."""
    for number, block in enumerate(blocks):
        given = block.get(STEPS, common.get(STEPS))
        if isinstance(given, list) or (number != at and STEPS in block):
            raise ConfigError(
                f'[[grid]] {number + 1}: {STEPS}: with equal = "{grid.equal}" must be one number,'
                f" set only in [base] or in the block of {grid.baseline.label!r} (got {given}); the"
                " steps of all other runs follow from it"
            )
