"""The methods. A new one is a file here and a line in METHODS, or an entry point
`peptrain.methods` of another package."""

from __future__ import annotations

from importlib.metadata import entry_points

from peptrain.methods.base import Method
from peptrain.methods.bpt import BPT
from peptrain.methods.dora import DoRA
from peptrain.methods.full import Full
from peptrain.methods.galore import GaLore
from peptrain.methods.hyperadapt import HyperAdapt
from peptrain.methods.lora import LoRA
from peptrain.methods.loro import LORO
from peptrain.methods.lowrank import LowRank
from peptrain.methods.relora import ReLoRA
from peptrain.methods.sltrain import SLTrain
from peptrain.methods.vera import VeRA

__all__ = [
    "BPT",
    "LORO",
    "METHODS",
    "DoRA",
    "Full",
    "GaLore",
    "HyperAdapt",
    "LoRA",
    "LowRank",
    "ReLoRA",
    "SLTrain",
    "VeRA",
    "methods",
]

METHODS: dict[str, type[Method]] = {
    m.name: m
    for m in (Full, BPT, LoRA, ReLoRA, LowRank, LORO, DoRA, VeRA, HyperAdapt, GaLore, SLTrain)
}


def methods() -> dict[str, type[Method]]:
    """Ours and those that installed packages offer under `peptrain.methods`."""
    found = {e.name: e.load() for e in entry_points(group="peptrain.methods")}
    return {**METHODS, **found}
