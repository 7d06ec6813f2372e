"""A run's configuration as flags of a command, for tyro."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import arg

from peptrain import recipes
from peptrain.cli.parsing import named
from peptrain.config import RunConfig, load
from peptrain.errors import ConfigError
from peptrain.methods import methods
from peptrain.methods.base import Method
from peptrain.optim.adamw import OptimConfig
from peptrain.optim.schedule import ScheduleConfig
from peptrain.settings.fields import fill, nearest

log = logging.getLogger("peptrain")


def with_config_file(args: list[str]) -> tuple[list[str], RunConfig[Method] | None]:
    """What --config or --recipe names, and the arguments with its method in them if they name none:
    those of `train` or `estimate`.

    The file has to be read before tyro parses, because its values are the flags' defaults. Raises
    ConfigError for an unknown method, recipe or file.
    """
    method = args[1] if args[1:] and not args[1].startswith("-") else None
    if method is not None and method not in methods():
        hint = nearest(method, methods())
        raise ConfigError(f"method {method!r}: unknown; {hint}`peptrain methods` lists them")
    wanted = named(args)
    if wanted.config is None and wanted.recipe is None:
        return args, None
    given, source = _configuration(wanted.config, wanted.recipe)
    if method is None:
        return [args[0], given.method.name, *args[1:]], given
    if method != given.method.name:
        raise ConfigError(
            f"{source}: configures {given.method.name}, and {method} was asked for; leave the"
            " method out of the command or change [method] in the file"
        )
    return args, given


def _configuration(file: Path | None, recipe: str | None) -> tuple[RunConfig[Method], str]:
    """What is in the file or the recipe, and the flag that named it."""
    if file is None:
        assert recipe is not None
        return recipes.load(recipe), f"--recipe {recipe}"
    if recipe is not None:
        raise ConfigError(
            f"--config {file}: comes with --recipe {recipe}; give one of them, or print the recipe"
            f" with `peptrain recipes {recipe}` and change it"
        )
    return load(file), f"--config {file}"


def say_what_a_preset_leaves(given: RunConfig[Method] | None, wanted: RunConfig[Any]) -> None:
    """Of the sizes that the file `given` sets: a --model.preset that was `wanted` changes none."""
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
            "--model.preset %s: the sizes that the recipe or file sets stay (%s); each has a flag",
            wanted.model.preset,
            ", ".join(f"{name} {value}" for name, value in sizes.items()),
        )


def by_method(
    command: Callable[[Any, RunConfig[Method] | None], Callable[..., None]],
    given: RunConfig[Method] | None,
    summary: str,
) -> tyro.extras.SubcommandApp:
    """A subcommand for each method, whose flags are those of a run with the method's own fields."""
    app = tyro.extras.SubcommandApp()
    app.__doc__ = summary
    for name, cls in methods().items():
        chosen = given is not None and given.method.name == name
        default = given if chosen else _with_own_defaults(cls)
        # true and false are written out here: a configuration file may set either.
        spelt_out = tyro.conf.FlagConversionOff
        options = Annotated[RunConfig[cls], arg(name="", default=default), spelt_out]  # type: ignore[valid-type]
        app.command(name=name, help=_summary(cls))(command(options, given if chosen else None))
    return app


def _with_own_defaults(cls: type[Method]) -> RunConfig[Any]:
    """A configuration in which the help shows the method's own defaults."""
    return RunConfig(
        method=cls(),
        optim=fill(OptimConfig(), cls.optim_defaults, Method.optim_defaults),
        schedule=fill(ScheduleConfig(), cls.schedule_defaults, Method.schedule_defaults),
    )


def _summary(cls: type[Method]) -> str:
    return (cls.__doc__ or cls.name).splitlines()[0]
