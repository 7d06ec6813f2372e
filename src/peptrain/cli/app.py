"""The command: argv to one function call."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table
from tyro.conf import Positional, arg

from peptrain import __version__, recipes
from peptrain.cli.parsing import MARKERS, REGISTRY, check_names
from peptrain.errors import Interrupted, PeptrainError

if TYPE_CHECKING:
    from peptrain.config import RunConfig
    from peptrain.estimation.estimate import Estimate
    from peptrain.methods.base import Method

log = logging.getLogger("peptrain")
console = Console(quiet=os.environ.get("RANK", "0") != "0", emoji=False)
"""Of several ranks the first one speaks; errors come from all."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it worked, 1 for an error, 130 when a signal ended it.

    A command line that can't be parsed leaves by SystemExit(2), --help by SystemExit(0).
    """
    args = list(sys.argv[1:] if argv is None else argv)
    _set_up_output()
    if "--json" in args:
        _log_on(Console(stderr=True, emoji=False))
    if args == ["--version"]:
        console.print(__version__, highlight=False)
        return 0
    try:
        app, args = _app(args or ["--help"])
        app.cli(
            prog="peptrain", description=DESCRIPTION, args=args, config=MARKERS, registry=REGISTRY
        )
    except Interrupted as stop:
        console.print(f"[yellow]{escape(str(stop))}", highlight=False, soft_wrap=True)
        return 130
    except KeyboardInterrupt:
        console.print("[yellow]stopped")
        return 130
    except (PeptrainError, OSError) as error:
        message = f"[bold red]error:[/] {escape(str(error))}"
        Console(stderr=True, emoji=False).print(message, highlight=False, soft_wrap=True)
        return 1
    return 0


DESCRIPTION = f"""Parameter-efficient pre-training of language models ({__version__}).

Start with `peptrain demo`, or `peptrain train bpt`: both run as they are."""


def _set_up_output() -> None:
    """Our own log on the terminal, and the libraries' chatter off."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    _log_on(console)


def _log_on(console: Console) -> None:
    log.handlers[:] = [RichHandler(console=console, show_time=False, show_path=False)]
    log.setLevel(logging.INFO)


def _app(args: list[str]) -> tuple[tyro.extras.SubcommandApp, list[str]]:
    """The commands, and the arguments for them. Of those whose flags need PyTorch only the one that
    is called has its flags; the others are there to be listed."""
    app, data = tyro.extras.SubcommandApp(), tyro.extras.SubcommandApp()
    called = args[0]
    by_method: dict[str, Any] = {"train": _listed(TRAIN), "estimate": _listed(ESTIMATE)}
    if called in by_method:
        check_names(args)
        from peptrain.cli import flags

        args, given = flags.with_config_file(args)
        command, summary = (_train_by, TRAIN) if called == "train" else (_estimate_by, ESTIMATE)
        by_method[called] = flags.by_method(command, given, summary)
    data.__doc__ = "Prepare text for training."
    data.command(name="prepare")(_prepare_command() if called == "data" else _listed(""))
    app.command(by_method["train"], name="train")
    app.command(name="resume")(_resume)
    app.command(by_method["estimate"], name="estimate")
    app.command(name="demo")(_demo)
    app.command(name="compare")(_compare)
    app.command(name="eval")(_eval)
    app.command(name="export")(_export)
    app.command(data, name="data")
    app.command(name="methods")(_methods)
    app.command(name="recipes")(_recipes)
    return app, args


def _listed(summary: str) -> Callable[[], None]:
    """A command that is listed and not called."""

    def command() -> None:
        raise AssertionError("its flags were not built")

    command.__doc__ = summary
    return command


TRAIN = "Train a model by one of the methods, into a new run directory."
ESTIMATE = "Say what a run would take, in parameters, bytes and operations, without running it."


def _train_by(options_type: Any, given: RunConfig[Method] | None) -> Callable[..., None]:
    def train(options: Any, config: Path | None = None, recipe: str | None = None) -> None:
        """Train.

        Args:
            options: Of the run.
            config: A TOML file with any of these settings; a flag overrides it. A run's own
                config.toml replays the run.
            recipe: The settings of a row of a paper's table instead (`peptrain recipes` lists
                them); a flag overrides them.
        """
        from peptrain.cli.flags import say_what_a_preset_leaves
        from peptrain.training.loop import train

        if recipe is not None and options.data.path is None:
            corpus = recipes.about(recipe).data
            log.warning("--recipe %s: is for %s; without --data.path it trains on the corpus that"
                        " comes with peptrain", recipe, corpus)  # fmt: skip
        say_what_a_preset_leaves(given, options)
        _watched(lambda observe: train(options, observe))

    train.__annotations__ |= {
        "options": options_type,
        "config": Path | None,
        "recipe": str | None,
        "return": None,
    }
    return train


def _estimate_by(options_type: Any, given: RunConfig[Method] | None) -> Callable[..., None]:
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
            options: Of the run.
            config: A TOML file with any of these settings; a flag overrides it.
            recipe: The settings of a row of a paper's table instead (`peptrain recipes`).
            gpu_memory: Such as 24GiB: say what fits into it, the largest micro-batch and rank.
            ranks: Processes that torchrun would start, each with a replica.
            json: Print JSON for programs; what is logged goes to standard error.
        """
        from peptrain.cli.flags import say_what_a_preset_leaves
        from peptrain.cli.progress import fitting
        from peptrain.estimation.estimate import estimate, memory

        say_what_a_preset_leaves(given, options)
        budget = None if gpu_memory is None else memory(gpu_memory)
        with fitting(Console(stderr=True, emoji=False, quiet=json)) as watch:
            made = estimate(options, ranks=ranks, gpu_memory=budget, watch=watch)
        _show(made, json)

    flags: dict[str, Any] = {"config": Path | None, "recipe": str | None, "gpu_memory": str | None}
    flags |= {"ranks": int, "json": bool}
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
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _print_wide(table: Table) -> None:
    """Where the width is nobody's, in a file or a pipe, a line for each row."""
    (console if console.is_terminal else Console(width=160, emoji=False)).print(table)


def _watched(training: Callable[[Any], Any]) -> Any:
    """Run a training under a progress display that never outlives it."""
    from peptrain.cli.progress import TrainingProgress

    progress = TrainingProgress(console)
    try:
        return training(progress)
    finally:
        progress.close()


def _resume(run: Positional[Path]) -> None:
    """Go on with a run that was stopped, from its newest whole checkpoint.

    Args:
        run: The run directory.
    """
    from peptrain.training.loop import resume

    _watched(lambda observe: resume(run, observe))


def _demo(run: Path | None = None) -> None:
    """Train one small model on real English by full training, ReLoRA, BPT and LORO: two minutes.

    Args:
        run: The directory for the four runs. Unset: runs/demo-N, the first N that is free.
    """
    from peptrain.comparison.demo import NEXT_STEPS, comparison, demo
    from peptrain.runs.directory import first_free

    directory = run or first_free(Path("runs"), "demo")
    results = [_watched(training) for training in demo(directory)]
    console.print(comparison(results))
    console.print(NEXT_STEPS, soft_wrap=True, highlight=False)


def _compare(grid: Positional[Path], out: Path, workers: int | None = None) -> None:
    """Train a grid of runs at equal tokens, FLOPs or time, and print their table; a second call
    goes on.

    Args:
        grid: A TOML file: [base] for all runs, a [[grid]] block per set of them; any value may be
            a list; equal = "tokens", "flops" or "time".
        out: The directory of the runs and of the table, as Markdown, CSV, LaTeX and JSON.
        workers: Runs at a time. Unset: one per GPU, or else one per core.
    """
    from peptrain.cli.progress import comparing
    from peptrain.comparison.compare import compare
    from peptrain.comparison.table import terminal

    with comparing(console) as watch:
        made = compare(grid, out, workers, watch)
    _print_wide(terminal(made))
    text = "\n".join(["", made.caption, *made.notes, f"Written to {out}/table.md, .csv, .tex"])
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    if failed := sum(len(line.errors) for line in made.lines):
        raise PeptrainError(
            f"{failed} of {sum(line.runs for line in made.lines)} runs failed, see {out}/logs;"
            " the same command tries them again"
        )


def _eval(
    run: Positional[Path],
    data: Path | None = None,
    batch_size: int | None = None,
    legacy: bool = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Held-out perplexity of a run, weighted by tokens.

    Args:
        run: The run directory.
        data: Another prepared corpus whose held-out part to use. Unset: the run's own.
        batch_size: Sequences at a time; changes nothing but speed and memory, except with legacy.
        legacy: Divide by batches + 1 like the older repositories, to match their tables.
        device: auto takes a GPU if there is one.
    """
    from peptrain.distributed.world import world
    from peptrain.eval.run import evaluate

    with world(device) as here:
        result = evaluate(run, data=data, batch_size=batch_size, legacy=legacy, device=here.device)
    note = " (legacy: divided by batches + 1, which flatters the model)" if legacy else ""
    console.print(
        f"perplexity {result.perplexity:.3f}  loss {result.loss:.4f}"
        f"  over {result.tokens:,} tokens{note}",
        highlight=False,
        soft_wrap=True,
    )


def _export(
    run: Positional[Path], out: Path, form: Literal["dense", "factorised"] = "dense"
) -> None:
    """Write a run as a Hugging Face directory, checked by comparing logits.

    Args:
        run: The run directory.
        out: The directory to make.
        form: dense loads anywhere; factorised is smaller (lowrank, loro), for load_factorised.
    """
    from peptrain.exporting.export import export

    export(run, out, form)
    console.print(f"{form} model in {out}", markup=False, highlight=False, soft_wrap=True)


def _prepare_command() -> Callable[..., None]:
    from peptrain.cli.progress import preparing
    from peptrain.data import PrepareConfig, prepare

    @dataclass(frozen=True, kw_only=True)
    class Prepare(PrepareConfig):
        inputs: Positional[tuple[str, ...]]
        """Text, JSON Lines or Parquet files, directories of them, or hf:ID[:CONFIG[:SPLIT]]."""
        held_out_inputs: tuple[str, ...] = ()
        """Inputs to hold out instead; those that are also among the inputs are not trained on."""

    def command(config: Any) -> None:
        """Turn text into token shards."""
        with preparing(console) as on_progress:
            made = prepare(config, on_progress)
        console.print(
            f"{made.path}: {made.documents:,} documents, {made.train_tokens:,} training and"
            f" {made.held_out_tokens:,} held-out tokens, {made.bytes_per_token:.2f} bytes a token,"
            f" vocabulary {made.vocab_size:,} (largest id {made.max_id:,}),"
            f" {made.shards} shards{', resumed' if made.resumed else ''}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

    command.__annotations__["config"] = Annotated[Prepare, arg(name="")]
    return command


def _methods() -> None:
    """List the methods with their equations and learning rates, and the model presets."""
    from peptrain.methods import methods
    from peptrain.methods.base import Method
    from peptrain.models.presets import PRESETS

    table = Table("method", "weight", "default lr", box=None)
    for name, cls in methods().items():
        table.add_row(
            name, escape(cls.equation), f"{cls.optim_defaults.lr or Method.optim_defaults.lr:g}"
        )
    console.print(table)
    console.print(f"\npresets: {', '.join(PRESETS)}", highlight=False, soft_wrap=True)


def _recipes(name: Positional[str | None] = None) -> None:
    """List the recipes: the settings of the papers' tables, with what each should come to.

    Args:
        name: A recipe to print in full, as the file that `peptrain train --config` takes.
    """
    if name is not None:
        # No end of its own, so that a file written from it is the recipe's, byte for byte.
        console.print(recipes.text(name), markup=False, highlight=False, soft_wrap=True, end="")
        return
    table = Table("recipe", "method", "parameters", "trainable", "tokens", "expected", box=None)
    for known, method, about in recipes.listed():
        counts = (f"{n / 1e6:,.1f}M" for n in (about.parameters, about.trainable))
        tokens = f"{about.tokens / 1e9:.1f}B"
        table.add_row(known, method, *counts, tokens, about.expected)
    _print_wide(table)
    console.print("\n`peptrain recipes NAME` prints one, `peptrain train --recipe NAME` runs it.")
