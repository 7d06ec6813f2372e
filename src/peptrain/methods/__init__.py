"""The registry of methods. Add one as a file here with an import below, or as an entry point in
the group `peptrain.methods` of another package (docs/new-method.md)."""
# ruff: noqa: I001  (`peptrain methods` lists the methods in the order of these imports)

from __future__ import annotations

from dataclasses import is_dataclass
from importlib.metadata import entry_points

from peptrain.methods.base import Method
from peptrain.methods.full import Full as Full
from peptrain.methods.bpt import BPT as BPT
from peptrain.methods.lora import LoRA as LoRA
from peptrain.methods.relora import ReLoRA as ReLoRA
from peptrain.methods.lowrank import LowRank as LowRank
from peptrain.methods.loro import LORO as LORO
from peptrain.methods.spectron import Spectron as Spectron
from peptrain.methods.dora import DoRA as DoRA
from peptrain.methods.vera import VeRA as VeRA
from peptrain.methods.hyperadapt import HyperAdapt as HyperAdapt
from peptrain.methods.galore import GaLore as GaLore
from peptrain.methods.sltrain import SLTrain as SLTrain
from peptrain.methods.cola import CoLA as CoLA
from peptrain.settings.plugins import with_plugins
from peptrain.settings.toml import untypable


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
    return with_plugins(METHODS, Method, entry_points(group="peptrain.methods"), _problem)


def _problem(cls: type[Method]) -> str | None:
    if not (is_dataclass(cls) and isinstance(getattr(cls, "equation", None), str)):
        return "not a dataclass with an `equation`"
    try:
        if (field := untypable(cls)) is not None:
            return (
                f"its field {field!r} must be a str, int, float, bool or Literal, perhaps | None,"
                " because config.toml can't contain anything else"
            )
        cls()
    except Exception as error:  # raised by the method's own checks
        return f"cannot be created with its defaults: {error}"
    return None
