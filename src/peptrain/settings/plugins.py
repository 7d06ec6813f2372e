"""Classes that installed packages offer as entry points, such as methods. A bad one is skipped."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.metadata import EntryPoint
from typing import TypeVar

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
    found, kind = dict(builtin), base.__name__.lower()
    for entry in sorted(entries, key=lambda e: (e.name, e.value)):
        try:
            cls = _offered(entry, base, problem)
            if found.setdefault(entry.name, cls) is not cls:
                raise _Bad(f"peptrain or another package already has a {kind} {entry.name!r}")
        except _Bad as bad:
            _refuse(kind, entry, str(bad))
    return found


class _Bad(Exception):
    """Why an entry point is skipped."""


def _offered(entry: EntryPoint, base: type[T], problem: Callable[[type[T]], str | None]) -> type[T]:
    """Return the class of an entry point. Raises _Bad if it can't be used."""
    cls = _loaded(entry)
    if isinstance(cls, _Bad):
        raise cls
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise _Bad(f"not a subclass of {base.__module__}.{base.__name__}")
    if (name := getattr(cls, "name", None)) != entry.name:
        raise _Bad(
            f"its class has the name {name!r} and its entry point {entry.name!r}, so runs could not"
            " be loaded again; give both the same name"
        )
    if (why := problem(cls)) is not None:
        raise _Bad(why)
    return cls


@cache
def _loaded(entry: EntryPoint) -> object:
    """Import an entry point. An error is returned as _Bad, so that it is not tried again."""
    try:
        return entry.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # importing a module runs arbitrary code
        return _Bad(f"cannot be imported: {type(error).__name__}: {error}")


@cache
def _refuse(kind: str, entry: EntryPoint, why: str) -> None:
    package = f" of package {entry.dist.name}" if entry.dist else ""
    log.warning("%s %r (%s%s) is skipped: %s", kind, entry.name, entry.value, package, why)
