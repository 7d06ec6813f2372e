"""The registry of methods. Add one as a file here with an import below, or as an entry point in
the group `peptrain.methods` of another package (docs/new-method.md)."""
# ruff: noqa: I001  (`peptrain methods` lists the methods in the order of these imports)

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
from peptrain.settings.toml import untypable

log = logging.getLogger("peptrain")


def _is_method(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, Method) and "name" in vars(found)


METHODS: dict[str, type[Method]] = {
    found.name: found for found in list(globals().values()) if _is_method(found)
}
"""The built-in methods by name: the classes imported above."""


def methods() -> dict[str, type[Method]]:
    """Return the built-in methods and those that installed packages register as entry points.

    An entry point that cannot be used is skipped with a warning that names it.
    """
    found = dict(METHODS)
    for entry in sorted(entry_points(group="peptrain.methods"), key=lambda e: (e.name, e.value)):
        cls = _offered(entry)
        if cls is not None and found.setdefault(entry.name, cls) is not cls:
            _refuse(entry, f"peptrain or another package already has a method {entry.name!r}")
    return found


@cache
def _offered(entry: EntryPoint) -> type[Method] | None:
    """Return the class of an entry point, or None with a warning if it is not a usable method."""
    try:
        cls = entry.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # importing a module runs arbitrary code
        return _refuse(entry, f"cannot be imported: {type(error).__name__}: {error}")
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        return _refuse(entry, "not a subclass of peptrain.methods.base.Method")
    if (name := getattr(cls, "name", None)) != entry.name:
        return _refuse(
            entry,
            f"its class has the name {name!r} and its entry point {entry.name!r}, so runs could not"
            " be loaded again; give both the same name",
        )
    if not (is_dataclass(cls) and isinstance(getattr(cls, "equation", None), str)):
        return _refuse(entry, "not a dataclass with an `equation`")
    try:
        if (field := untypable(cls)) is not None:
            return _refuse(
                entry,
                f"its field {field!r} must be a str, int, float, bool or Literal, perhaps | None,"
                " because config.toml can't contain anything else",
            )
        cls()
    except Exception as error:  # raised by the method's own checks
        return _refuse(entry, f"cannot be created with its defaults: {error}")
    return cls


@cache
def _refuse(entry: EntryPoint, why: str) -> None:
    package = f" of package {entry.dist.name}" if entry.dist else ""
    log.warning("method %r (%s%s) is skipped: %s", entry.name, entry.value, package, why)
