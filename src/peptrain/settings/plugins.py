"""Classes that installed packages offer as entry points, such as methods. A bad one is skipped."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.metadata import EntryPoint
from typing import Any, TypeVar

log = logging.getLogger("peptrain")
T = TypeVar("T")


def with_plugins(
    builtin: Mapping[str, type[T]],
    base: type[T],
    entries: Iterable[EntryPoint],
    problem: Callable[[type[T]], str | None],
) -> dict[str, type[T]]:
    """Return the `builtin` classes by name, and the subclasses of `base` that `entries` offer.

    problem: why a class can't be used, or None. An entry point that can't be used, whose class has
    another name, or whose name is taken, is skipped with a warning that names it.
    """
    found = dict(builtin)
    for entry in sorted(entries, key=lambda e: (e.name, e.value)):
        cls = _offered(entry, base, problem)
        if cls is not None and found.setdefault(entry.name, cls) is not cls:
            kind = base.__name__.lower()
            why = f"peptrain or another package already has a {kind} {entry.name!r}"
            _refuse(entry, base, why)
    return found


@cache
def _offered(
    entry: EntryPoint, base: type[Any], problem: Callable[[type[Any]], str | None]
) -> type[Any] | None:
    """Return the class of an entry point, or None with a warning if it can't be used."""
    try:
        cls = entry.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # importing a module runs arbitrary code
        return _refuse(entry, base, f"cannot be imported: {type(error).__name__}: {error}")
    if not (isinstance(cls, type) and issubclass(cls, base)):
        return _refuse(entry, base, f"not a subclass of {base.__module__}.{base.__name__}")
    if (name := getattr(cls, "name", None)) != entry.name:
        return _refuse(
            entry,
            base,
            f"its class has the name {name!r} and its entry point {entry.name!r}, so runs could not"
            " be loaded again; give both the same name",
        )
    if (why := problem(cls)) is not None:
        return _refuse(entry, base, why)
    return cls


@cache
def _refuse(entry: EntryPoint, base: type[Any], why: str) -> None:
    kind = base.__name__.lower()
    package = f" of package {entry.dist.name}" if entry.dist else ""
    log.warning("%s %r (%s%s) is skipped: %s", kind, entry.name, entry.value, package, why)
