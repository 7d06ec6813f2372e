"""The commands that train, and the estimate of a training."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional

from peptrain import recipes
from peptrain.cli.parsing import UNSET
from peptrain.display.console import console, make, print_wide, say, stderr
from peptrain.errors import ConfigError, PeptrainError
from peptrain.text import quoted

if TYPE_CHECKING:
    from peptrain.config import RunConfig
    from peptrain.estimation.estimate import Estimate
    from peptrain.methods.base import Method

log = logging.getLogger("peptrain")
OF_A_RUN: dict[str, Any] = {
    "config": Annotated[Path | None, UNSET],
    "recipe": Annotated[str | None, UNSET],
    "go_on": bool,
    "return": None,
}
"""Flags of the commands that train, besides the settings."""


def train_by(options_type: Any, given: RunConfig[Method] | None) -> Callable[..., None]:
    """Build `peptrain train METHOD`, with the flags of `options_type` and `given` of a file."""

    def train(
        options: Any,
        config: Path | None = None,
        recipe: str | None = None,
        go_on: bool = False,
    ) -> None:
        """Train.

        Args:
            options: The settings of the run.
            config: TOML file with any of these settings. Flags override it. The config.toml of a
                run repeats that run.
            recipe: Use the settings of a row of a paper's table (`peptrain recipes` lists them).
                Flags override them.
            go_on: Resume the run in --run if it has begun with these settings, as after every
                restart by torchrun.
        """
        from peptrain.cli.flags import say_what_a_preset_leaves
        from peptrain.training.loop import train

        if recipe is not None and options.data.path is None:
            corpus = recipes.about(recipe).data
            log.warning("--recipe %s: made for %s; without --data.path it trains on the corpus"
                        " that comes with peptrain", recipe, corpus)  # fmt: skip
        say_what_a_preset_leaves(given, options)
        watched(lambda observe: train(options, observe, go_on=go_on))

    train.__annotations__ |= {"options": options_type, **OF_A_RUN}
    return train


def tune_by(options_type: Any, given: RunConfig[Method] | None) -> Callable[..., None]:
    """Build `peptrain tune METHOD`, as `train_by` does."""

    def tune(
        options: Any,
        config: Path | None = None,
        recipe: str | None = None,
        go_on: bool = False,
    ) -> None:
        """Fine-tune. --task, --tasks-data, --epochs and --rows stand for --tune.task and so on.

        Args:
            options: The settings of the run.
            config: TOML file with any of these settings. Flags override it.
            recipe: Use the settings of a row of a paper's table (`peptrain recipes` lists them),
                those for --task if they differ between tasks. Flags override them.
            go_on: Resume the run in --run if it has begun with these settings.
        """
        from peptrain.training.loop import train

        if not options.tune.task:
            raise ConfigError(
                "--task: must be cola, sst2, rte, mrpc, qnli, qqp, mnli, stsb or a TOML file"
                " (got nothing); `peptrain train` pre-trains without one"
            )
        result = recipe and recipes.about(recipe).results.by_task().get(options.tune.task)
        if result:
            log.info("--recipe %s: the source reports %.2f %%", recipe, result)
        watched(lambda observe: train(options, observe, go_on=go_on))

    tune.__annotations__ |= {"options": options_type, **OF_A_RUN}
    return tune


def estimate_by(options_type: Any, given: RunConfig[Method] | None) -> Callable[..., None]:
    """Build `peptrain estimate METHOD`, as `train_by` does."""

    def estimate(
        options: Any,
        config: Path | None = None,
        recipe: str | None = None,
        gpu_memory: str | None = None,
        ranks: int = 1,
        json: bool = False,
    ) -> None:
        """Estimate.

        Args:
            options: The settings of the run.
            config: TOML file with any of these settings. Flags override it.
            recipe: Use the settings of a row of a paper's table (`peptrain recipes` lists them).
            gpu_memory: GPU memory such as 24GiB. Adds the largest micro-batch and rank that fit.
            ranks: Number of processes (GPUs), each of which holds the whole model.
            json: Print JSON. Log messages go to stderr.
        """
        from peptrain.cli.flags import say_what_a_preset_leaves
        from peptrain.cli.progress import fitting
        from peptrain.data import configured_corpus
        from peptrain.estimation.estimate import estimate, memory

        say_what_a_preset_leaves(given, options)
        if options.data.path:  # it decides the vocabulary
            configured_corpus(options.data.path)
        budget = None if gpu_memory is None else memory(gpu_memory)
        with fitting(make(stderr, quiet=json)) as watch:
            made = estimate(options, ranks=ranks, gpu_memory=budget, watch=watch)
        _show(made, json)
        if not json:
            say(f"train it with the same settings: `peptrain train {options.method.name} ...`")

    flags: dict[str, Any] = {"config": Annotated[Path | None, UNSET], "ranks": int, "json": bool}
    flags |= dict.fromkeys(("recipe", "gpu_memory"), Annotated[str | None, UNSET])
    estimate.__annotations__ |= {"options": options_type, **flags, "return": None}
    return estimate


def _show(made: Estimate, as_json: bool) -> None:
    if as_json:
        text = json.dumps(made.as_dict(), indent=1)
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        return
    from peptrain.estimation.table import lines, table

    console.print(table(made))
    for line in lines(made):
        say(line)


def watched(training: Callable[[Any], Any]) -> Any:
    """Train with a progress display, and close it whatever happens."""
    from peptrain.display.training import observing
    from peptrain.training.metrics import silent

    with observing(silent) as observe:
        return training(observe)


@dataclass(frozen=True, kw_only=True)
class Longer:
    """A longer run."""

    steps: int | None = None
    """Make the run this long. With the schedule wsd it continues from the last checkpoint before
    the decay, with a constant rate from the last one. With other schedules give the settings of the
    new one too. What is taken back stays in RUN/ends."""


def resume_command() -> Callable[..., None]:
    """Return `resume`, whose flags are the settings that a longer run may change."""
    from peptrain.optim.schedule import ScheduleConfig

    same_length, same_schedule = Longer(), ScheduleConfig()

    def command(
        run: Positional[Path], train: Any = same_length, schedule: Any = same_schedule
    ) -> None:
        """Resume a run from its latest complete checkpoint, or make it longer.

        Args:
            run: Run directory.
            train: A longer run.
            schedule: The learning-rate schedule from here on. Unset values stay as they were.
        """
        from peptrain.training.loop import resume

        given = None if schedule == same_schedule else schedule
        watched(lambda observe: resume(run, observe, steps=train.steps, schedule=given))

    command.__annotations__ |= {"train": Longer, "schedule": ScheduleConfig}
    return command


def run_demo(run: Annotated[Path | None, UNSET] = None) -> None:
    """Compare full training, ReLoRA, BPT and LORO on a small model in two minutes.

    Args:
        run: Directory for the four runs. Unset: runs/demo-N, the first free N.
    """
    from peptrain.comparison.demo import NEXT_STEPS, comparison, demo
    from peptrain.runs.directory import first_free

    directory = run or first_free(Path("runs"), "demo")
    results = [watched(training) for training in demo(directory)]
    console.print(comparison(results))
    say(NEXT_STEPS)


def run_grid(
    grid: Positional[Path],
    out: Path,
    workers: Annotated[int | None, UNSET] = None,
    debug: bool = False,
) -> None:
    """Train a grid of runs at equal cost and tabulate the results.

    Args:
        grid: TOML file: [base] holds the settings of all runs, each [[grid]] block a set of runs.
            Any value may be a list. equal = "tokens", "flops" or "time".
        out: Directory for the runs, the table, as Markdown, CSV, LaTeX and JSON, and its figures.
            With an existing one the same command resumes unfinished runs and keeps finished ones.
        workers: Number of simultaneous runs. Unset: one per GPU, or one per CPU core.
        debug: Print the traceback of an error, also in the logs of the runs.
    """
    from peptrain.cli.progress import comparing
    from peptrain.comparison.compare import compare
    from peptrain.comparison.table import terminal

    with comparing(console) as watch:
        made = compare(grid, out, workers, watch, debug)
    print_wide(terminal(made))
    written = f"Written to {out}/table.md, .csv, .tex; the runs are in {out}/runs"
    say("\n".join(["", made.caption, *made.notes, written]))
    if failed := sum(len(line.errors) for line in made.lines):
        raise PeptrainError(
            f"{failed} of {sum(line.runs for line in made.lines)} runs failed (see {out}/logs);"
            " run the same command to try them again"
        )
    say(
        f"add runs in {grid} and repeat the command, or"
        f" `peptrain export {quoted(out)}/runs/NAME --out DIR`"
    )
