"""The demo: one small model trained with four methods, and the table of results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from peptrain.config import RunConfig
from peptrain.methods import BPT, LORO, Full, ReLoRA
from peptrain.sections import TrainConfig
from peptrain.training.loop import train
from peptrain.training.metrics import Observer
from peptrain.training.result import Result

DEMO_METHODS = (Full(), ReLoRA(), BPT(), LORO())


DEMO_TRAIN = TrainConfig(steps=120, batch_size=16, seq_len=128, log_every=5, device="cpu")
"""About 30 s per method on two cores."""


NEXT_STEPS = """
These results are from one seed, a quarter of a million tokens and a model of 2M parameters, each
method at its own default learning rate, which is not the best one at this size. They show that
the methods work and what each one stores. They do not rank the methods.

Try next:
  peptrain train loro --train.steps 1000           a longer run of one method
  peptrain train bpt --method.rank 16 --help       every setting
  peptrain export RUN --out DIR                    a plain Hugging Face model
  peptrain data prepare YOUR.jsonl --out DIR       your own text, then train --data.path DIR
"""


def demo(directory: Path) -> Iterator[Callable[[Observer], Result]]:
    """Yield the demo's training functions, to be called in turn.

    Model, seed and number of tokens are the same for all; only the method and its defaults differ.
    """
    for method in DEMO_METHODS:
        config: RunConfig[Any] = RunConfig(
            method=method, train=DEMO_TRAIN, run=directory / method.name
        )
        yield lambda observe, config=config: train(config, observe)  # type: ignore[misc]


def comparison(results: Sequence[Result]) -> Table:
    """Format a table of finished runs: parameters, optimizer state, loss and speed.

    State is the optimizer's moments. Parameters and bytes are in millions (10^6).
    """
    table = Table("method", box=None)
    for column in ("trainable", "total", "state MB", "held-out loss", "perplexity", "tokens/s"):
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(
            escape(result.run.name),
            f"{result.trainable / 1e6:.2f}M",
            f"{result.parameters / 1e6:.2f}M",
            f"{result.state_bytes / 1e6:.1f}",
            f"{result.held_out.loss:.3f}",
            f"{result.held_out.perplexity:.1f}",
            f"{result.tokens_per_second:,.0f}",
        )
    return table
