"""The `peptrain` command: parse arguments and call one function."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.markup import escape
from rich.table import Table
from tyro.conf import Positional, arg

from peptrain import __version__, recipes
from peptrain.cli.console import (
    log_on,
    make,
    may_be_lost,
    print_wide,
    silence_libraries,
    stderr,
    stdout,
)
from peptrain.cli.failures import report
from peptrain.cli.parsing import (
    MARKERS,
    UNSET,
    check_command,
    check_names,
    paragraphs,
    refusing_control_characters,
    registry,
)
from peptrain.distributed.launch import speaks
from peptrain.errors import PeptrainError

if TYPE_CHECKING:
    from peptrain.config import RunConfig
    from peptrain.estimation.estimate import Estimate
    from peptrain.methods.base import Method

log = logging.getLogger("peptrain")
console = make(stdout, quiet=not speaks())
"""Only rank 0 prints. Errors are printed by every rank, to stderr."""


@may_be_lost()
def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Return 0 on success, 1 on an error, 130 after Ctrl-C, and 75 (EX_TEMPFAIL)
    when SIGTERM, SIGHUP or SIGUSR1 stopped a training, which is saved.

    When standard output fails (a closed pipe, a full disk) the command continues. It returns 1 if
    it has no other result. `--debug` anywhere in `argv` adds the traceback of an error. Raises
    SystemExit(2) for a command line that can't be parsed, SystemExit(0) after --help.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    args = [arg for arg in given if arg != "--debug"] or ["--help"]
    essential_only = args[0] in ("train", "estimate") and bool({"-h", "--help"} & {*args})
    args = ["--help" if arg == "--help-all" else arg for arg in args]
    silence_libraries()
    log_on(make(stderr) if "--json" in args else console)
    if args == ["--version"]:
        console.print(__version__, highlight=False)
        return 0
    try:
        check_command(args)
        app, args = _app(args, essential_only)
        with refusing_control_characters(args) as printed:
            app.cli(prog="peptrain", description=DESCRIPTION, args=args, console_outputs=printed,
                    config=MARKERS, registry=registry(essential_only=essential_only))  # fmt: skip
    except (Exception, KeyboardInterrupt) as error:
        return report(error, console, debug="--debug" in given)
    stdout.flush()
    return 1 if stdout.lost and args[0] in PRINTS_ONLY else 0


PRINTS_ONLY = ("estimate", "eval", "methods", "recipes")
"""Commands that have failed when nobody could read what they print."""
DESCRIPTION = f"""Parameter-efficient pre-training of language models ({__version__}).

Start with `peptrain demo` or `peptrain train loro`: neither needs settings."""


def _app(args: list[str], essential_only: bool) -> tuple[tyro.extras.SubcommandApp, list[str]]:
    """Build the subcommands, and complete `args` by the method that a configuration file names.

    Flags that need PyTorch are built only for the command that `args` calls.
    """
    app, data = tyro.extras.SubcommandApp(), tyro.extras.SubcommandApp()
    called = args[0]
    by_method: dict[str, Any] = {"train": _listed(TRAIN), "estimate": _listed(ESTIMATE)}
    if called in by_method:
        check_names(args)
        from peptrain.cli import flags

        args, given = flags.with_config_file(args)
        command, summary = (_train_by, TRAIN) if called == "train" else (_estimate_by, ESTIMATE)
        method, note = next(iter(args[1:]), None), SHORT_HELP if essential_only else ""
        by_method[called] = flags.by_method(command, given, summary, method, note)
    data.__doc__ = "Prepare text for training."
    data.command(name="prepare")(_prepare_command() if called == "data" else _listed(""))
    app.command(by_method["train"], name="train")
    app.command(name="resume")(paragraphs(_resume))
    app.command(by_method["estimate"], name="estimate")
    app.command(name="demo")(paragraphs(_demo))
    app.command(name="compare")(paragraphs(_compare))
    app.command(name="eval")(paragraphs(_eval))
    app.command(name="export")(paragraphs(_export))
    app.command(data, name="data")
    app.command(name="methods")(paragraphs(_methods))
    app.command(name="recipes")(paragraphs(_recipes))
    return app, args


def _listed(summary: str) -> Callable[[], None]:
    """A command that only appears in the list of commands."""

    def command() -> None:
        raise AssertionError("its flags were not built")

    command.__doc__ = summary
    return command


TRAIN = "Train a model from scratch with one of the methods."
ESTIMATE = "Estimate parameters, memory and FLOPs without running."
SHORT_HELP = "These are the most used settings. --help-all shows all of them."


def _train_by(options_type: Any, given: RunConfig[Method] | None) -> Callable[..., None]:
    def train(options: Any, config: Path | None = None, recipe: str | None = None) -> None:
        """Train.

        Args:
            options: The settings of the run.
            config: TOML file with any of these settings. Flags override it. The config.toml of a
                run repeats that run.
            recipe: Use the settings of a row of a paper's table (`peptrain recipes` lists them).
                Flags override them.
        """
        from peptrain.cli.flags import say_what_a_preset_leaves
        from peptrain.training.loop import train

        if recipe is not None and options.data.path is None:
            corpus = recipes.about(recipe).data
            log.warning("--recipe %s: made for %s; without --data.path it trains on the corpus"
                        " that comes with peptrain", recipe, corpus)  # fmt: skip
        say_what_a_preset_leaves(given, options)
        _watched(lambda observe: train(options, observe))

    train.__annotations__ |= {
        "options": options_type,
        "config": Annotated[Path | None, UNSET],
        "recipe": Annotated[str | None, UNSET],
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
            options: The settings of the run.
            config: TOML file with any of these settings. Flags override it.
            recipe: Use the settings of a row of a paper's table (`peptrain recipes` lists them).
            gpu_memory: GPU memory such as 24GiB. Adds the largest micro-batch and rank that fit.
            ranks: Number of DDP processes (GPUs), each with a full replica.
            json: Print JSON. Log messages go to stderr.
        """
        from peptrain.cli.flags import say_what_a_preset_leaves
        from peptrain.cli.progress import fitting
        from peptrain.estimation.estimate import estimate, memory

        say_what_a_preset_leaves(given, options)
        budget = None if gpu_memory is None else memory(gpu_memory)
        with fitting(make(stderr, quiet=json)) as watch:
            made = estimate(options, ranks=ranks, gpu_memory=budget, watch=watch)
        _show(made, json)

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
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _watched(training: Callable[[Any], Any]) -> Any:
    """Train with a progress display, and close it whatever happens."""
    from peptrain.cli.progress import TrainingProgress

    progress = TrainingProgress(console)
    try:
        return training(progress)
    finally:
        progress.close()


def _resume(run: Positional[Path]) -> None:
    """Resume a run from its latest complete checkpoint.

    Args:
        run: Run directory.
    """
    from peptrain.training.loop import resume

    _watched(lambda observe: resume(run, observe))


def _demo(run: Annotated[Path | None, UNSET] = None) -> None:
    """Compare full training, ReLoRA, BPT and LORO on a small model in two minutes.

    Args:
        run: Directory for the four runs. Unset: runs/demo-N, the first free N.
    """
    from peptrain.comparison.demo import NEXT_STEPS, comparison, demo
    from peptrain.runs.directory import first_free

    directory = run or first_free(Path("runs"), "demo")
    results = [_watched(training) for training in demo(directory)]
    console.print(comparison(results))
    console.print(NEXT_STEPS, soft_wrap=True, highlight=False)


def _compare(
    grid: Positional[Path], out: Path, workers: Annotated[int | None, UNSET] = None
) -> None:
    """Train a grid of runs at equal cost and tabulate the results.

    Args:
        grid: TOML file: [base] holds the settings of all runs, each [[grid]] block a set of runs.
            Any value may be a list. equal = "tokens", "flops" or "time".
        out: Directory for the runs and the table, as Markdown, CSV, LaTeX and JSON. With an
            existing one the same command resumes unfinished runs and keeps finished ones.
        workers: Number of simultaneous runs. Unset: one per GPU, or one per CPU core.
    """
    from peptrain.cli.progress import comparing
    from peptrain.comparison.compare import compare
    from peptrain.comparison.table import terminal

    with comparing(console) as watch:
        made = compare(grid, out, workers, watch)
    print_wide(console, terminal(made))
    text = "\n".join(["", made.caption, *made.notes, f"Written to {out}/table.md, .csv, .tex"])
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    if failed := sum(len(line.errors) for line in made.lines):
        raise PeptrainError(
            f"{failed} of {sum(line.runs for line in made.lines)} runs failed (see {out}/logs);"
            " run the same command to try them again"
        )


def _eval(
    run: Positional[Path],
    data: Annotated[Path | None, UNSET] = None,
    batch_size: Annotated[int | None, UNSET] = None,
    legacy: bool = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Compute the held-out perplexity of a run, per token.

    Args:
        run: Run directory.
        data: Prepared corpus whose held-out part to use. Unset: that of the run.
        batch_size: Sequences per forward pass. Changes only speed and memory, except with legacy.
        legacy: Divide by batches + 1, as the papers' repositories do, to match their tables.
        device: auto uses a GPU if there is one.
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
    """Export a run to the Hugging Face format, and check its logits.

    Args:
        run: Run directory.
        out: Directory to create.
        form: dense loads in transformers and other tools. factorised keeps the factors B and A
            (lowrank, loro): smaller, loaded with peptrain.load_factorised.
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
        """Inputs to hold out, in place of a share of the documents. If they are also among the
        inputs, they are not trained on."""

    def command(config: Any) -> None:
        """Tokenize text into shards for training."""
        with preparing(console) as on_progress:
            made = prepare(config, on_progress)
        skipped = f", {made.skipped:,} bad records skipped" if made.skipped else ""
        console.print(
            f"{made.path}: {made.documents:,} documents, {made.train_tokens:,} training and"
            f" {made.held_out_tokens:,} held-out tokens, {made.bytes_per_token:.2f} bytes a token,"
            f" vocabulary {made.vocab_size:,} (largest id {made.max_id:,}),"
            f" {made.losses}, {made.shards} shards{skipped}{', resumed' if made.resumed else ''}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

    command.__annotations__["config"] = Annotated[Prepare, arg(name="")]
    return command


def _methods() -> None:
    """List the methods, what each is for, and the model presets."""
    from peptrain.methods import methods
    from peptrain.methods.base import Method
    from peptrain.models.presets import PRESETS

    table = Table("method", "use it for", "weight of a layer", "default lr", box=None)
    for name, cls in methods().items():
        lr = f"{cls.optim_defaults.lr or Method.optim_defaults.lr:g}"
        table.add_row(name, escape(cls.purpose), escape(cls.equation), lr)
    console.print(table)
    presets = Table("preset", "family", box=None)
    for column in ("parameters", "d", "f", "layers", "heads", "kv heads", "vocab"):
        presets.add_column(column, justify="right")
    for name, shape in PRESETS.items():
        sizes = (shape.d, shape.f, shape.L, shape.heads, shape.kv, shape.V)
        millions = f"{shape.parameters / 1e6:,.1f}M"
        presets.add_row(name, shape.family, millions, *map(str, sizes))
    console.print("", presets)
    console.print("\n`peptrain train METHOD --model.preset PRESET` trains one.", highlight=False)


def _recipes(name: Annotated[Positional[str | None], UNSET] = None) -> None:
    """List the settings of the papers' tables, with the results to expect.

    Args:
        name: Print this recipe as a TOML file for `peptrain train --config`.
    """
    if name is not None:
        # No newline added, so that redirecting to a file copies the recipe byte for byte.
        console.print(recipes.text(name), markup=False, highlight=False, soft_wrap=True, end="")
        return
    table = Table("recipe", "method", "parameters", "trainable", "tokens", "expected", box=None)
    for known, method, about in recipes.listed():
        counts = (f"{n / 1e6:,.1f}M" for n in (about.parameters, about.trainable))
        tokens = f"{about.tokens / 1e9:.1f}B"
        table.add_row(known, method, *counts, tokens, about.expected)
    print_wide(console, table)
    console.print("\n`peptrain recipes NAME` prints one, `peptrain train --recipe NAME` runs it.")
