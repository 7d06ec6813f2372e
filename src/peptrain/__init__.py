"""peptrain: parameter-efficient pre-training of language models.

    import peptrain as pt

    result = pt.train(pt.RunConfig(method=pt.LORO(rank=128)))

What is offered here is imported when it is first used, so that `import peptrain` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peptrain.adaptation import adapt as adapt
    from peptrain.comparison.compare import compare as compare
    from peptrain.config import RunConfig as RunConfig
    from peptrain.config import TrainConfig as TrainConfig
    from peptrain.data import Corpus as Corpus
    from peptrain.estimation.estimate import estimate as estimate
    from peptrain.eval.run import evaluate as evaluate
    from peptrain.exporting.export import export as export
    from peptrain.exporting.factorised import load_factorised as load_factorised
    from peptrain.methods import *  # noqa: F403
    from peptrain.training.loop import resume as resume
    from peptrain.training.loop import train as train

__version__ = "0.1.0"

FACE = {
    "train": "training.loop",
    "resume": "training.loop",
    "adapt": "adaptation",
    "estimate": "estimation.estimate",
    "compare": "comparison.compare",
    "evaluate": "eval.run",
    "export": "exporting.export",
    "load_factorised": "exporting.factorised",
    "Corpus": "data",
    "RunConfig": "config",
    "TrainConfig": "config",
    "METHODS": "methods",
}
"""Where each name is from. The method classes come on top, from METHODS."""


def __getattr__(name: str) -> Any:
    """The named function or class, imported now."""
    if name in FACE:
        found = getattr(import_module(f"{__name__}.{FACE[name]}"), name)
    elif name == "__all__":
        found = sorted([*FACE, *_classes()])
    elif name[:1].isupper() and name in _classes():  # rooms, in lower case, cost no import here
        found = _classes()[name]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def _classes() -> dict[str, Any]:
    """The method classes, by their own names."""
    return {cls.__name__: cls for cls in import_module(f"{__name__}.methods").METHODS.values()}


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
