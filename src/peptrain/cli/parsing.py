"""How tyro reads arguments and shows help, and checks that need no PyTorch."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import docstring_parser
import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from peptrain import recipes
from peptrain.errors import ConfigError
from peptrain.models.presets import PRESETS, unknown_preset
from peptrain.settings.fields import as_path, check, nearest
from peptrain.text import UNSAFE

MARKERS = (
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.DisallowNone,
    tyro.conf.HelptextFromCommentsOff,
)
UNSET = tyro.conf.arg(help_behavior_hint="")
"""For an argument whose text says what happens without it: do not print `(default: None)`."""
TRUTHS = {"true": True, "false": False, "True": True, "False": False}
COMMANDS = ("train", "tune", "resume", "estimate", "demo", "compare", "watch", "eval", "generate",
            "analyze", "plot", "report", "export", "data", "methods", "recipes")  # fmt: skip
OF_TUNE = ("init_from", "task", "tasks_data", "epochs", "rows", "train")
"""Settings that `peptrain tune --help` shows besides the essential ones. `train`: of the method."""
COMPLETION = ("--tyro-print-completion", "--tyro-write-completion")
SHELLS = ("bash", "zsh", "fish")
Command = TypeVar("Command", bound=Callable[..., None])


def registry(args: Sequence[str], *, essential_only: bool) -> ConstructorRegistry:
    """Return tyro's rules for our types; `essential_only` leaves out all settings but those.

    args: the command line, in which an error names the flag.
    """

    def settings(info: StructTypeInfo) -> StructConstructorSpec | None:
        return _settings(info, OF_TUNE if args[0] == "tune" else (), essential_only)

    def path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
        return _path(info, args)

    made = ConstructorRegistry()
    made.primitive_rule(_bool)
    made.primitive_rule(path)
    made.struct_rule(settings)
    return made


def _settings(
    info: StructTypeInfo, besides: Sequence[str], essential_only: bool
) -> StructConstructorSpec | None:
    """The fields of a dataclass, each explained by its docstring.

    besides: names of fields that are essential for this command. In place of tyro's own rule, which
    keeps a docstring's line breaks and prints empty defaults.
    """
    if not is_dataclass(info.type) or info.type.__module__.startswith("tyro."):
        return None
    hints, texts = get_type_hints(info.type, include_extras=True), _docstrings(info.type)
    shown = []
    for field in fields(info.type):
        default, hint = _default(field, info.default), hints[field.name]
        if isinstance(hint, TypeVar):  # RunConfig's method
            hint = type(default)
        section = is_dataclass(hint)
        most_used = "essential" in field.metadata or field.name in besides
        if essential_only and not section and not most_used:
            hint = Annotated[hint, tyro.conf.Suppress]
        if default in (None, "", ()):  # its text says what that means
            hint = Annotated[hint, UNSET]
        shown.append(StructFieldSpec(field.name, hint, default, texts.get(field.name)))
    return StructConstructorSpec(instantiate=info.type, fields=tuple(shown))


def _default(field: Field[Any], given: Any) -> Any:
    if hasattr(given, field.name):
        return getattr(given, field.name)
    if field.default_factory is not MISSING:
        return field.default_factory()
    return tyro.MISSING if field.default is MISSING else field.default


@cache
def _docstrings(cls: type) -> dict[str, str]:
    """What stands under each field of a class and of its bases, without line breaks."""
    found = {}
    for base in reversed(cls.__mro__[:-1]):
        for field in docstring_parser.parse_from_object(base).params:
            found[field.arg_name] = " ".join((field.description or "").split())
    return found


def paragraphs(command: Command) -> Command:
    """Join the lines of each paragraph and argument of `command`'s docstring, for tyro to wrap."""
    text = inspect.cleandoc(command.__doc__ or "")
    command.__doc__ = re.sub(r"(?<=\S)\n(?: {8}|(?! ))(?=\S)", " ", text)
    return command


def _bool(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[bool] | None:
    """Read booleans as configuration files spell them, true and false, or as Python does."""
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


def _path(info: PrimitiveTypeInfo, args: Sequence[str]) -> PrimitiveConstructorSpec[Path] | None:
    """Read paths as configuration files do."""
    if info.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda given: as_path(given[0], _flag(given[0], args)),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    )


def _flag(value: str, args: Sequence[str]) -> str:
    """Return the flag that was given `value`, or "path" for an argument without one."""
    for before, arg in zip(["", *args], args, strict=False):
        flag, equals, given = arg.partition("=")
        if arg == value and before.startswith("--"):
            return before
        if equals and given == value and flag.startswith("--"):
            return flag
    return "path"


SHORT = {
    "--task": "--tune.task",
    "--tasks-data": "--tune.tasks-data",
    "--epochs": "--tune.epochs",
    "--rows": "--tune.rows",
}
"""Flags of `peptrain tune` and what they stand for."""


def spelt_out(args: Sequence[str]) -> list[str]:
    """Return the arguments of `peptrain tune` with `SHORT` replaced."""
    found = []
    for arg in args:
        flag, equals, value = arg.partition("=")
        found.append(SHORT.get(flag.replace("_", "-"), flag) + equals + value)
    return found


def check_command(args: Sequence[str]) -> None:
    """Raise ConfigError for an unknown command, naming the nearest known one.

    Also for an unknown shell after tyro's flags that print a completion script.
    """
    name = args[0]
    if name.replace("_", "-") in COMPLETION and args[1:]:
        check(args[1] in SHELLS, name, args[1], f"one of {', '.join(SHELLS)}")
    if not name.startswith("-") and name not in COMMANDS:
        hint = nearest(name, COMMANDS) or f"choose from {', '.join(COMMANDS)}; "
        raise ConfigError(f"command {name!r}: unknown; {hint}see `peptrain --help`")


def check_directory() -> None:
    """Raise ConfigError if the working directory was deleted. PyTorch's MKL ends the process then,
    without a word of the reason."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ConfigError(
            "the working directory was deleted; change to one that exists with `cd`"
        ) from None


@contextlib.contextmanager
def refusing_control_characters(args: Sequence[str]) -> Iterator[bool]:
    """Yield whether tyro may print its messages, which repeat the arguments as they are.

    It may not if an argument contains control characters, as the name of a file may. Then an error
    of tyro's raises ConfigError, which names that argument.
    """
    odd = next((arg for arg in args if UNSAFE.search(arg)), None)
    try:
        yield odd is None
    except SystemExit as left:
        if odd is None or not left.code:
            raise
        raise ConfigError(
            f"argument {odd!r}: the command can't be parsed, and its message would repeat control"
            " characters; remove them to see the message"
        ) from None


def named(args: Sequence[str]) -> argparse.Namespace:
    """Return the values of the flags that name other settings, or that these depend on."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for path in ("--config", "--model.config", "--continue-from"):
        as_given = partial(as_path, key=path)
        parser.add_argument(path, type=as_given, nargs="?")  # tyro reports a missing value
    for name in ("--recipe", "--model.preset", "--optim.kind", "--tune.task"):
        parser.add_argument(name, nargs="?")
    return parser.parse_known_args(args)[0]


def check_names(args: Sequence[str]) -> None:
    """Raise ConfigError for an unknown recipe or preset, before PyTorch is imported."""
    given = vars(named(args))
    if given["recipe"] is not None:
        recipes.text(given["recipe"])
    preset = given["model.preset"]
    if preset is not None and preset not in PRESETS and given["model.config"] is None:
        raise ConfigError(unknown_preset(preset))
