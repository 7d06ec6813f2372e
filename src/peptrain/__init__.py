"""peptrain: parameter-efficient pre-training of language models.

    import peptrain as pt

    result = pt.train(pt.RunConfig(method=pt.LORO(rank=128)))

Every name is imported when it is first used, so that `import peptrain` is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peptrain.adaptation import adapt as adapt
    from peptrain.comparison.compare import compare as compare
    from peptrain.config import RunConfig as RunConfig
    from peptrain.data import Corpus as Corpus
    from peptrain.estimation.estimate import estimate as estimate
    from peptrain.eval.run import evaluate as evaluate
    from peptrain.exporting.export import export as export
    from peptrain.exporting.factorised import load_factorised as load_factorised
    from peptrain.generation.generate import generate as generate
    from peptrain.methods import *  # noqa: F403
    from peptrain.models.hf import ModelConfig as ModelConfig
    from peptrain.optim.adamw import OptimConfig as OptimConfig
    from peptrain.optim.schedule import ScheduleConfig as ScheduleConfig
    from peptrain.reporting.plot import plot as plot
    from peptrain.reporting.report import report as report
    from peptrain.sections import DataConfig as DataConfig
    from peptrain.sections import EvalConfig as EvalConfig
    from peptrain.sections import TrainConfig as TrainConfig
    from peptrain.sections import TuneConfig as TuneConfig
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
    "generate": "generation.generate",
    "plot": "reporting.plot",
    "report": "reporting.report",
    "Corpus": "data",
    "RunConfig": "config",
    "ModelConfig": "models.hf",
    "OptimConfig": "optim.adamw",
    "ScheduleConfig": "optim.schedule",
    "DataConfig": "sections",
    "EvalConfig": "sections",
    "TrainConfig": "sections",
    "TuneConfig": "sections",
    "METHODS": "methods",
}
"""The module that each name is imported from. The method classes are added from METHODS."""


def __getattr__(name: str) -> Any:
    """Import and return the named function or class."""
    if name in FACE:
        found = getattr(import_module(f"{__name__}.{FACE[name]}"), name)
    elif name == "__all__":
        found = sorted([*FACE, *_classes()])
    elif name[:1].isupper() and name in _classes():  # don't import methods for subpackages
        found = _classes()[name]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def _classes() -> dict[str, Any]:
    """Return the method classes by name."""
    return {cls.__name__: cls for cls in import_module(f"{__name__}.methods").METHODS.values()}


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
