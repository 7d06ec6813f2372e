"""The settings of a run as command-line flags."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, get_args

import tyro
from tyro.conf import arg

from peptrain import recipes
from peptrain.cli.parsing import named, paragraphs
from peptrain.config import RunConfig, load
from peptrain.errors import ConfigError
from peptrain.methods import methods
from peptrain.methods.base import Method
from peptrain.optim.adamw import Kind, OptimConfig, filled
from peptrain.optim.schedule import ScheduleConfig
from peptrain.runs.build import read_run
from peptrain.settings.fields import fill, nearest, reopened
from peptrain.tuning.settle import tuned

log = logging.getLogger("peptrain")


def with_config_file(args: list[str]) -> tuple[list[str], RunConfig[Method] | None]:
    """Read the settings that --config, --recipe or --continue-from name, and complete `args`.

    `args` get the method of the settings if they have none. The settings are read before tyro
    parses `args` because they are the defaults of the flags. Raises ConfigError for an unknown
    method, recipe or file.
    """
    method = args[1] if args[1:] and not args[1].startswith("-") else None
    if method is not None and method not in methods():
        hint = nearest(method, methods())
        raise ConfigError(f"method {method!r}: unknown; {hint}`peptrain methods` lists all")
    wanted = named(args)
    sources = {
        f"--{key.replace('_', '-')}": value
        for key in SETTINGS
        if (value := getattr(wanted, key)) is not None
    }
    if not sources:
        return args, None
    if len(sources) > 1:
        first, second = (f"{flag} {value}" for flag, value in list(sources.items())[:2])
        raise ConfigError(
            f"{first}: can't be combined with {second}; give one of them, and change what differs"
            " by flags"
        )
    [(flag, value)] = sources.items()
    if flag == "--recipe":
        _check_purpose(args[0], value)
    given, source = READ[flag](value, vars(wanted)["tune.task"] or ""), f"{flag} {value}"
    given = replace(given, method=reopened(given.method))
    if method is None:
        return [args[0], given.method.name, *args[1:]], given
    if method != given.method.name:
        repair = f"leave it out of the command, or train the weights by {method} with --init-from"
        if flag != "--continue-from":
            repair = "leave the method out of the command or change [method] in the file"
        raise ConfigError(
            f"{source}: is for {given.method.name}, but the command says {method}; {repair}"
        )
    return args, given


def _check_purpose(command: str, recipe: str) -> None:
    """Raise ConfigError for a recipe to fine-tune where one to pre-train is due, or conversely."""
    tunes = recipes.about(recipe).tunes
    if tunes != (command == "tune"):
        of = "fine-tunes" if tunes else "pre-trains"
        flags = " --init-from DIR --task TASK --tasks-data DIR" if tunes else ""
        raise ConfigError(
            f"--recipe {recipe}: {of} a model; give it to `peptrain {'tune' if tunes else 'train'}"
            f" --recipe {recipe}{flags}`"
        )


def _of_run(path: Path, task: str) -> RunConfig[Method]:
    """Return the settings with which a new run continues RUN or RUN@STEP."""
    _, config, _ = read_run(path)
    return replace(config, init_from=None, match_trainable=None)


SETTINGS = ("config", "recipe", "continue_from")
READ: dict[str, Callable[[Any, str], RunConfig[Method]]] = {
    "--config": load,
    "--recipe": recipes.load,
    "--continue-from": _of_run,
}
"""The flags that name a complete set of settings, and how it is read, for a task if there is one.
"""


def say_what_a_preset_leaves(given: RunConfig[Method] | None, wanted: RunConfig[Any]) -> None:
    """Warn that --model.preset leaves those sizes alone that the configuration file sets."""
    if given is None or given.model.preset == wanted.model.preset:
        return
    sizes = {
        field.name: value
        for field in fields(given.model)
        if field.name not in ("preset", "config")
        and (value := getattr(given.model, field.name)) is not None
        and value == getattr(wanted.model, field.name)
    }
    if sizes:
        log.warning(
            "--model.preset %s: keeps the sizes set by the recipe or file (%s); change them by"
            " their own flags",
            wanted.model.preset,
            ", ".join(f"{name} {value}" for name, value in sizes.items()),
        )


def by_method(
    command: Callable[[Any, RunConfig[Method] | None], Callable[..., None]],
    given: RunConfig[Method] | None,
    summary: str,
    args: list[str],
    note: str,
) -> tyro.extras.SubcommandApp:
    """Build one subcommand per method, with the settings of a run as flags.

    The help of the method that `args` calls ends with `note`.
    """
    called, kind = next(iter(args[1:]), None), vars(named(args))["optim.kind"]
    optim = OptimConfig(kind=kind) if kind in get_args(Kind) else OptimConfig()
    tuning = args[0] == "tune"
    app = tyro.extras.SubcommandApp()
    app.__doc__ = summary
    for name, cls in methods().items():
        chosen = given is not None and given.method.name == name
        default = given if chosen else _with_own_defaults(cls, optim, tuning)
        # Flags take true or false, since a configuration file may set either.
        spelt_out = tyro.conf.FlagConversionOff
        options = Annotated[RunConfig[cls], arg(name="", default=default), spelt_out]  # type: ignore[valid-type]
        run = paragraphs(command(options, given if chosen else None))
        text = f"{_summary(cls)}\n\n{note}" if note and name == called else _summary(cls)
        app.command(name=name, help=text)(run)
    return app


def _with_own_defaults(cls: type[Method], optim: OptimConfig, tuning: bool) -> RunConfig[Any]:
    """The defaults of a run by this method, for the help to show."""
    rates = tuned(optim, cls) if tuning else optim
    return RunConfig(
        method=cls(),
        optim=filled(rates, cls.optim_defaults, Method.optim_defaults),
        schedule=fill(ScheduleConfig(), cls.schedule_defaults, Method.schedule_defaults),
    )


def _summary(cls: type[Method]) -> str:
    return (cls.__doc__ or cls.name).splitlines()[0]
