"""Fields for the sections of a configuration: unset values, intervals and checks."""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import Field, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from peptrain.errors import ConfigError

log = logging.getLogger("peptrain")
S = TypeVar("S")
MOST = 10**9
"""Largest number of steps, sequences and so on in a setting. A larger one is a slip."""
LARGEST = 3.4e38
"""Largest number that fp32 and bf16 can represent, in a setting that is not an integer."""


def shown(value: object) -> str:
    """Return `value` for a message, shortened if it is very long or deeply nested."""
    return _SHORT.repr(str(value) if isinstance(value, Path) else value)


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 256 else f"a number of {x.bit_length()} bits"


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = 300
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 20


def check(holds: bool, key: str, value: object, wanted: str) -> None:
    """Raise ConfigError unless `holds`. The message has the key, the requirement and the value."""
    if not holds:
        raise ConfigError(f"{key}: must be {wanted} (got {shown(value)})")


def check_whole(key: str, value: int | None, least: int, most: int = MOST) -> None:
    """Raise ConfigError unless `value` is None or a number from `least` to `most`."""
    check(value is None or isinstance(value, int), key, value, "a whole number")
    check(value is None or value >= least, key, value, f">= {least}")
    check(value is None or value <= most, key, value, f"<= {most}")


def check_positive(key: str, value: float | None, *, or_zero: bool = False) -> None:
    """Raise ConfigError unless `value` is None or a finite number > 0 that fits into fp32."""
    fits = value is None or 0 < value < math.inf or (or_zero and value == 0)
    check(fits, key, value, f"a finite number {'>= 0' if or_zero else '> 0'}")
    check(value is None or value <= LARGEST, key, value, f"<= {LARGEST}")


OF_STEP = re.compile(r"@\d{1,9}$")
"""The end of RUN@STEP, which is not a part of a file's name."""


def as_path(text: str, key: str = "path") -> Path:
    """Return `text` as a path, with `~` and `~user` expanded.

    Raises ConfigError, which names `key`, for a text that can't be a path.
    """
    if not text or "\0" in text:
        raise ConfigError(f"{key}: must be a path (got {text!r})")
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        why = str(error).rstrip(".")
        raise ConfigError(f"{key}: {shown(text)}: {why}; write the complete path") from error
    try:
        os.lstat(OF_STEP.sub("", str(path)))
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ConfigError(
                f"{key}: {shown(text)}: too long (a name of a file has at most 255 bytes, a path"
                " 4,095); give a shorter one"
            ) from error
    return path


LONGEST_NAME = 100
"""Characters of an unknown name that are compared. The time grows with their square."""


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return a hint with the known name nearest to `name`, or "" if none is similar.

    `prefix` is put before the name in the hint and is not compared.
    """
    near = get_close_matches(name[:LONGEST_NAME], list(known), n=1, cutoff=0.5)
    return f"did you mean {prefix + near[0]!r}? " if near else ""


@contextmanager
def quiet() -> Iterator[None]:
    """Disable peptrain's log, for example while several configurations are tried."""
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


@contextmanager
def each_line_once() -> Iterator[None]:
    """Log each message only once, for example over several phases or runs."""
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
    """Return a field for the steps between two events, by default `fraction` of the run.

    The default is at most `most`. It is rounded up, so it is at least 1, and below `most` the last
    event is not just before the end of the run, where it would be useless. 0 means never.
    """
    return field(default=None, metadata={"fraction": fraction, "most": most, "up": True})


def length(fraction: float, most: int | None = None, *, changeable: bool = False) -> Any:
    """Return a field for a number of consecutive steps, by default `fraction` of the run.

    The default is rounded and at most `most`. In a short run it may be 0.
    """
    rule = {"fraction": fraction, "most": most, "up": False, "changeable": changeable}
    return field(default=None, metadata=rule)


def changeable(default: Any) -> Any:
    """Return a field that may change when a run is resumed, like the learning rate."""
    return field(default=default, metadata={"changeable": True})


def added(default: Any, *, before: Any) -> Any:
    """Return a field that earlier versions don't have. `default` may be any field of this module.

    `before` is the value that describes those versions: their runs are resumed and replayed with
    it. It must never change, even if the default does. Unless `before` is None, the field must not
    be None once it is resolved, since TOML can't express None.
    """
    return _with(default, before=before)


def added_section(factory: Callable[[], S]) -> S:
    """Return a field for a section that earlier versions don't have, with `added` fields only."""
    made: S = field(default_factory=factory, metadata={"added": True})
    return made


def essential(default: Any) -> Any:
    """A field that `--help` shows; `--help-all` shows the others too.

    `default` may be any field of this module.
    """
    return _with(default, essential=True)


def _with(default: Any, **rule: Any) -> Any:
    made = default if isinstance(default, Field) else field(default=default)
    return field(default=made.default, metadata={**made.metadata, **rule})


def as_before(section: S, written: Iterable[str]) -> S:
    """Return `section`, read from a file with the fields `written`, as its writer understood it.

    Fields that were `added` since get their value `before`.
    """
    missing = {name: value for name, value in before(section).items() if name not in written}
    return replace(section, **missing)  # type: ignore[type-var]


def before(section: Any) -> dict[str, Any]:
    """Return the value that each `added` field of `section` has where it is missing."""
    rules = {f.name: f.metadata for f in fields(section)}
    return {name: rule["before"] for name, rule in rules.items() if "before" in rule}


def same_as(other: str) -> Any:
    """Return a field for an interval that defaults to the value of the field `other`."""
    return field(default=None, metadata={"same_as": other})


def unless(other: str, default: Any) -> Any:
    """Return a field with a `default` that it has unless the field `other` is given. Then it stays
    unset."""
    return field(default=None, metadata={"unless": other, "otherwise": default})


def reopened(section: S) -> S:
    """Return a resolved `section` with its `unless` fields unset again where they had defaulted, so
    that the other field may be given."""
    rules = {f.name: f.metadata for f in fields(section)}  # type: ignore[arg-type]
    defaulted = [
        name
        for name, rule in rules.items()
        if "unless" in rule and getattr(section, name) == rule["otherwise"]
    ]
    return replace(section, **dict.fromkeys(defaulted))  # type: ignore[type-var]


def of_width(fraction: float) -> Any:
    """Return a field for a size, by default `fraction` of the hidden size, at least 1."""
    return field(default=None, metadata={"of_width": fraction})


def intervals(section: Any) -> dict[str, int]:
    """Return the intervals in the resolved `section`, without those that are 0 (never)."""
    rules = {f.name: f.metadata for f in fields(section)}
    return {
        name: every
        for name, rule in rules.items()
        if (rule.get("up") or "same_as" in rule) and (every := getattr(section, name))
    }


def resolve(section: S, name: str, steps: int, width: int = 0) -> S:
    """Return `section` with a value for every unset number of steps, size and `unless` field.

    Logs a warning for a number of steps that is longer than the run.
    """
    absolute: dict[str, Any] = {}
    for item in fields(section):  # type: ignore[arg-type]
        rule, given = item.metadata, getattr(section, item.name)
        if given is None and "fraction" in rule:
            part = steps * rule["fraction"]
            whole = math.ceil(part - 1e-9) if rule["up"] else round(part)  # as floats, 30 * 0.1 > 3
            absolute[item.name] = min(whole, rule["most"] or steps)
        elif given is None and "same_as" in rule:
            other = rule["same_as"]
            absolute[item.name] = absolute.get(other, getattr(section, other))
        elif given is None and "of_width" in rule:
            absolute[item.name] = max(1, int(width * rule["of_width"]))
        elif given is None and "unless" in rule and not getattr(section, rule["unless"]):
            absolute[item.name] = rule["otherwise"]
        elif given is not None and ("fraction" in rule or "same_as" in rule) and given > steps:
            log.warning(
                "%s.%s: %d is longer than the run of %d steps", name, item.name, given, steps
            )
    return replace(section, **absolute)  # type: ignore[type-var]


def fill(section: S, *defaults: S) -> S:
    """Return `section` with each unset field taken from the first of `defaults` that sets it."""
    chosen = {}
    for item in fields(section):  # type: ignore[arg-type]
        values = (getattr(s, item.name) for s in (section, *defaults))
        chosen[item.name] = next((v for v in values if v is not None), None)
    return replace(section, **chosen)  # type: ignore[type-var]
