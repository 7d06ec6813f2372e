"""How arguments are spelt, for tyro, and names that can be checked before PyTorch is imported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from peptrain import recipes
from peptrain.errors import ConfigError
from peptrain.models.presets import PRESETS, unknown_preset

MARKERS = (
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.DisallowNone,
    tyro.conf.HelptextFromCommentsOff,
)
REGISTRY = ConstructorRegistry()
TRUTHS = {"true": True, "false": False, "True": True, "False": False}


@REGISTRY.primitive_rule
def _truth(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[bool] | None:
    """Values of bool are spelt as in a configuration file; Python's spelling is taken too."""
    if info.type is not bool:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{true,false}",
        instance_from_str=lambda given: TRUTHS[given[0]],
        is_instance=lambda value: isinstance(value, bool),
        str_from_instance=lambda value: [str(value).lower()],
        choices=tuple(TRUTHS),
    )


def named(args: Sequence[str]) -> argparse.Namespace:
    """What --config, --recipe, --model.config and --model.preset give; the rest is tyro's."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for path in ("--config", "--model.config"):
        parser.add_argument(path, type=Path, nargs="?")  # a missing value is tyro's to report
    for name in ("--recipe", "--model.preset"):
        parser.add_argument(name, nargs="?")
    return parser.parse_known_args(args)[0]


def check_names(args: Sequence[str]) -> None:
    """Raise ConfigError for a recipe or preset that doesn't exist, before anything is imported."""
    given = vars(named(args))
    if given["recipe"] is not None:
        recipes.text(given["recipe"])
    preset = given["model.preset"]
    if preset is not None and preset not in PRESETS and given["model.config"] is None:
        raise ConfigError(unknown_preset(preset))
