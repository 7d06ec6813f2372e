"""The registry of loggers, which `train.log_to` names. Those of other packages are entry points in
the group `peptrain.loggers` (docs/loggers.md)."""

from __future__ import annotations

from importlib.metadata import entry_points
from importlib.util import find_spec

from peptrain.errors import ConfigError
from peptrain.loggers.base import Logger
from peptrain.loggers.tensorboard import TensorBoard
from peptrain.loggers.trackio import Trackio
from peptrain.loggers.wandb import WandB
from peptrain.settings.fields import nearest, shown
from peptrain.settings.plugins import with_plugins

LOGGERS: dict[str, type[Logger]] = {cls.name: cls for cls in (TensorBoard, Trackio, WandB)}
"""The built-in loggers by name. Each has an extra of its name."""


def loggers() -> dict[str, type[Logger]]:
    """Return the built-in loggers and those that installed packages register as entry points.

    An entry point that cannot be used is skipped with a warning that names it.
    """
    return with_plugins(LOGGERS, Logger, entry_points(group="peptrain.loggers"), _problem)


def _problem(cls: type[Logger]) -> str | None:
    if cls.open is Logger.open or cls.log is Logger.log:
        return "must define `open` and `log`"
    try:
        cls()
    except Exception as error:
        return f"cannot be created without arguments: {error}"
    return None


def chosen(names: str) -> list[type[Logger]]:
    """Return the loggers that the setting `train.log_to` names.

    Raises ConfigError for an unknown name and for a logger whose package is not installed.
    """
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    known = loggers() if wanted else {}
    for name in wanted:
        if name not in known:
            near = nearest(name, known)
            raise ConfigError(
                f"train.log_to: unknown logger {shown(name)}; {near}choose from {', '.join(known)}"
                " (`pip install 'peptrain[NAME]'`), or install the package that offers it"
            )
        package = known[name].package
        if package and find_spec(package) is None:
            extra = f"peptrain[{name}]" if name in LOGGERS else package
            raise ConfigError(
                f"train.log_to: {name} needs the package {package}; install it with"
                f" `pip install '{extra}'`, or leave {name} out"
            )
    return [known[name] for name in wanted]
