"""The methods. A new one is a file here and its import below, or an entry point
`peptrain.methods` of another package (docs/new-method.md)."""
# ruff: noqa: I001  (the order of the imports is that of `peptrain methods`)

from __future__ import annotations

import logging
from dataclasses import is_dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from peptrain.methods.base import Method
from peptrain.methods.full import Full as Full
from peptrain.methods.bpt import BPT as BPT
from peptrain.methods.lora import LoRA as LoRA
from peptrain.methods.relora import ReLoRA as ReLoRA
from peptrain.methods.lowrank import LowRank as LowRank
from peptrain.methods.loro import LORO as LORO
from peptrain.methods.dora import DoRA as DoRA
from peptrain.methods.vera import VeRA as VeRA
from peptrain.methods.hyperadapt import HyperAdapt as HyperAdapt
from peptrain.methods.galore import GaLore as GaLore
from peptrain.methods.sltrain import SLTrain as SLTrain

log = logging.getLogger("peptrain")


def _is_method(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, Method) and "name" in vars(found)


METHODS: dict[str, type[Method]] = {
    found.name: found for found in list(globals().values()) if _is_method(found)
}
"""Ours, by name: the classes imported above."""


def methods() -> dict[str, type[Method]]:
    """Ours and those that installed packages offer under `peptrain.methods`.

    A package whose entry point can't be used is named in a warning and left out.
    """
    found = dict(METHODS)
    for entry in sorted(entry_points(group="peptrain.methods"), key=lambda e: (e.name, e.value)):
        cls = _offered(entry)
        if cls is not None and found.setdefault(entry.name, cls) is not cls:
            _refuse(entry, f"peptrain or another package has a method {entry.name!r} already")
    return found


@cache
def _offered(entry: EntryPoint) -> type[Method] | None:
    """The class of an entry point; None, with a warning, if it is no method of that name."""
    try:
        cls = entry.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # importing it runs whatever code it has
        return _refuse(entry, f"can't be imported: {type(error).__name__}: {error}")
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        return _refuse(entry, "is no subclass of peptrain.methods.base.Method")
    if (name := getattr(cls, "name", None)) != entry.name:
        return _refuse(
            entry,
            f"its class calls itself {name!r} and its entry point {entry.name!r}, so a run"
            " could not be read again; give both one name",
        )
    if not (is_dataclass(cls) and isinstance(getattr(cls, "equation", None), str)):
        return _refuse(entry, "is no dataclass with an `equation`")
    try:
        cls()
    except Exception as error:  # what its own checks say to its own defaults
        return _refuse(entry, f"can't be made with its defaults: {error}")
    return cls


@cache
def _refuse(entry: EntryPoint, why: str) -> None:
    package = f" of package {entry.dist.name}" if entry.dist else ""
    log.warning("method %r (%s%s) is left out: %s", entry.name, entry.value, package, why)
