"""What the sections of a configuration share: values left unset, intervals, and checks."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import Field, field, fields, replace
from difflib import get_close_matches
from typing import Any, TypeVar

from peptrain.errors import ConfigError

log = logging.getLogger("peptrain")
S = TypeVar("S")


def check(holds: bool, key: str, value: object, wanted: str) -> None:
    """Refuse a setting that can't be: the error names the key, the value and what is wanted."""
    if not holds:
        raise ConfigError(f"{key}: must be {wanted} (got {value!r})")


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """A hint for the error of an unknown `name`; empty if no known one is like it. `prefix`: what
    stands before each of them, which makes none more alike."""
    near = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {prefix + near[0]!r}? " if near else ""


@contextmanager
def quiet() -> Iterator[None]:
    """Log nothing: what is said of one configuration need not be said of each that is tried."""
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


@contextmanager
def each_line_once() -> Iterator[None]:
    """What is said of one phase, or of one run of several, need not be said of the next."""
    said: set[str] = set()

    def new(record: logging.LogRecord) -> bool:
        before = len(said)
        said.add(record.getMessage())
        return len(said) > before

    log.addFilter(new)
    try:
        yield
    finally:
        log.removeFilter(new)


def interval(fraction: float, most: int | None = None) -> Any:
    """A field for steps between two events; unset it is `fraction` of the run, at most `most`.

    Rounded up, so that 1 is the least and, below `most`, the last event is not just before the end
    of the run, where there is no time left for it. An interval of 0 means never.
    """
    return field(default=None, metadata={"fraction": fraction, "most": most, "up": True})


def length(fraction: float, most: int | None = None, *, changeable: bool = False) -> Any:
    """A field for so many steps on end; unset it is `fraction` of the run, rounded, at most `most`.

    In a short run that may be 0.
    """
    rule = {"fraction": fraction, "most": most, "up": False, "changeable": changeable}
    return field(default=None, metadata=rule)


def changeable(default: Any) -> Any:
    """A field that may change when a run goes on, as the learning rate and its schedule may."""
    return field(default=default, metadata={"changeable": True})


def added(default: Any, *, before: Any) -> Any:
    """A field that earlier versions don't have; `default` may be any field of this module.

    `before` is what they did: a run that one of them began resumes and replays with it. It
    stands for the past, so it stays when the default changes. Unless it is None, the field must be
    resolved to something else than None, which TOML can't say.
    """
    return _with(default, before=before)


def essential(default: Any) -> Any:
    """A field that `--help` shows; `--help-all` shows the others too.

    `default` may be any field of this module.
    """
    return _with(default, essential=True)


def _with(default: Any, **rule: Any) -> Any:
    made = default if isinstance(default, Field) else field(default=default)
    return field(default=made.default, metadata={**made.metadata, **rule})


def as_before(section: S, written: Iterable[str]) -> S:
    """`section`, read from where only the fields `written` stand, with the past's value in those
    that were `added` since."""
    missing = {name: value for name, value in before(section).items() if name not in written}
    return replace(section, **missing)  # type: ignore[type-var]


def before(section: Any) -> dict[str, Any]:
    """What the fields of `section` that were `added` count as where they are missing."""
    rules = {f.name: f.metadata for f in fields(section)}
    return {name: rule["before"] for name, rule in rules.items() if "before" in rule}


def same_as(other: str) -> Any:
    """An interval that, unset, is the one of the field `other`."""
    return field(default=None, metadata={"same_as": other})


def of_width(fraction: float) -> Any:
    """A size that, unset, is `fraction` of the model's hidden size, at least 1."""
    return field(default=None, metadata={"of_width": fraction})


def intervals(section: Any) -> dict[str, int]:
    """The intervals among the fields of a resolved `section`, but for those that mean never."""
    rules = {f.name: f.metadata for f in fields(section)}
    return {
        name: every
        for name, rule in rules.items()
        if (rule.get("up") or "same_as" in rule) and (every := getattr(section, name))
    }


def resolve(section: S, name: str, steps: int, width: int = 0) -> S:
    """`section` with every number of steps and size that was left unset as an absolute number."""
    absolute: dict[str, int] = {}
    for item in fields(section):  # type: ignore[arg-type]
        rule, given = item.metadata, getattr(section, item.name)
        if given is None and "fraction" in rule:
            part = steps * rule["fraction"]
            whole = math.ceil(part - 1e-9) if rule["up"] else round(part)  # 30 * 0.1 is above 3
            absolute[item.name] = min(whole, rule["most"] or steps)
        elif given is None and "same_as" in rule:
            other = rule["same_as"]
            absolute[item.name] = absolute.get(other, getattr(section, other))
        elif given is None and "of_width" in rule:
            absolute[item.name] = max(1, int(width * rule["of_width"]))
        elif given is not None and ("fraction" in rule or "same_as" in rule) and given > steps:
            log.warning(
                "%s.%s: %d is longer than the run of %d steps", name, item.name, given, steps
            )
    return replace(section, **absolute)  # type: ignore[type-var]


def fill(section: S, *defaults: S) -> S:
    """`section` with what is unset taken from the first of `defaults` that sets it."""
    chosen = {}
    for item in fields(section):  # type: ignore[arg-type]
        values = (getattr(s, item.name) for s in (section, *defaults))
        chosen[item.name] = next((v for v in values if v is not None), None)
    return replace(section, **chosen)  # type: ignore[type-var]
