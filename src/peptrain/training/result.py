"""What a training returns."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peptrain.eval.perplexity import Evaluation
from peptrain.runs.directory import RunDir


@dataclass(frozen=True)
class Result:
    """Summary of a finished run. Everything else is in the run directory."""

    run: Path
    held_out: Evaluation
    parameters: int
    trainable: int
    """Trainable parameters in the last phase."""
    state_bytes: int
    """Bytes of the optimizer's moments, in the phase that needs the most."""
    tokens_per_second: float
    peak_bytes: int
    """Peak GPU memory reserved by PyTorch, 0 on a CPU. Reserved and not allocated memory, because
    that of a captured CUDA graph does not count as allocated."""

    def metrics(self) -> Any:
        """Return the rows of metrics.jsonl: a pandas.DataFrame, or a list of dicts without pandas.

        A row has the values of its `event`. In a DataFrame the others are NaN.
        """
        rows = list(RunDir(self.run).metrics())
        return import_module("pandas").DataFrame(rows) if find_spec("pandas") else rows
