"""The commands that read runs, text, methods and recipes, and train nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from rich.markup import escape
from rich.table import Table
from tyro.conf import Positional, UseAppendAction, arg

from peptrain import recipes
from peptrain.cli.parsing import UNSET
from peptrain.display.console import console, print_wide, say
from peptrain.display.training import count
from peptrain.errors import ConfigError
from peptrain.settings.fields import check
from peptrain.text import quoted


def eval_run(
    run: Positional[Path],
    data: Annotated[tuple[Path, ...], UseAppendAction, UNSET] = (),
    tasks: Annotated[str, UNSET] = "",
    tasks_data: Annotated[Path | None, UNSET] = None,
    limit: Annotated[int | None, UNSET] = None,
    positions: Annotated[int | None, UNSET] = None,
    against: Annotated[Path | None, UNSET] = None,
    harness: bool = False,
    out: Annotated[Path | None, UNSET] = None,
    batch_size: Annotated[int | None, UNSET] = None,
    legacy: bool = False,
    step: Annotated[str | None, UNSET] = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Compute the held-out perplexity of a run, per token, or judge a model by tasks.

    Args:
        run: Run directory, or RUN@STEP for the checkpoint of a step. With --tasks or --data also a
            Hugging Face directory.
        data: Prepared corpus whose held-out part to use; give it once per corpus for the perplexity
            of each and their macro mean. Unset: that of the run.
        tasks: Tasks such as blimp,piqa; bpt for nine accuracies and their mean; or all that the own
            scorer measures (docs/evaluation.md).
        tasks_data: Directory with copies of the data sets. None comes with peptrain.
        limit: Use only the first items of each task, of BLiMP of each paradigm. Unset: all.
        positions: Most tokens that the model reads at once. Unset: seq_len of a run, or what a
            config.json says.
        against: Another model, measured on the same items, for paired tests.
        harness: Measure by the lm-evaluation-harness (pip install 'peptrain[eval]'). Only it has
            swde, which was tested on made-up pages, not on the real data.
        out: Write the results of tasks to this JSON file. A run also keeps its own in eval.json.
        batch_size: Sequences per forward pass. Changes only speed and memory, except with legacy.
        legacy: Divide by batches + 1, as the papers' repositories do, to match their tables.
        step: Step of the checkpoint, or all that are kept. Unset: the latest.
        device: auto uses a GPU if there is one.
    """
    from peptrain.runs.select import check_done, chosen, may_vanish

    every = chosen(run, step)
    if tasks or len(data) > 1 or not is_of_run(run):
        from peptrain.cli.judging import judge

        for name, value in (("--batch-size", batch_size), ("--legacy", legacy)):
            check(not value, name, value, "left out with tasks, or several corpora")
        judge(every, tasks, tasks_data, limit=limit, positions=positions, against=against,
              harness=harness, out=out, data=data, device=device)  # fmt: skip
        return
    asked = (("--tasks-data", tasks_data), ("--limit", limit), ("--positions", positions),
             ("--against", against), ("--harness", harness or None), ("--out", out))  # fmt: skip
    for flag, given in asked:
        check(given is None, flag, str(given), "given with --tasks")
    done, damaged = list[Path](), list[str]()
    for one in every:
        with may_vanish(one, step == "all", damaged):
            _held_out(one, next(iter(data), None), batch_size, legacy, device)
            done.append(one)
    check_done(run, done, damaged)
    _advise_export(run)


def _advise_export(run: Path) -> None:
    from peptrain.runs.build import run_config
    from peptrain.runs.directory import RunDir
    from peptrain.runs.select import at

    form = run_config(RunDir.open(at(run)[0])).method.export_form
    flag = "" if form == "dense" else f" --form {form}"
    say(f"export the model with `peptrain export {quoted(run)} --out DIR{flag}`")


def is_of_run(path: Path) -> bool:
    """Return whether a path is not that of a Hugging Face directory, without importing PyTorch."""
    return (path / "config.toml").is_file() or not (path / "config.json").is_file()


def _held_out(
    one: Path,
    data: Path | None,
    batch_size: int | None,
    legacy: bool,
    device: Literal["auto", "cpu", "cuda"],
) -> None:
    from peptrain.cli.progress import measuring
    from peptrain.distributed.world import world
    from peptrain.eval.run import evaluate
    from peptrain.runs.select import at

    note = " (legacy: divided by batches + 1, which flatters the model)" if legacy else ""
    with world(device) as here, measuring(console) as watch:
        result = evaluate(one, data=data, batch_size=batch_size, legacy=legacy, device=here.device,
                          watch=watch)  # fmt: skip
    number = at(one)[1]
    say(
        f"{'' if number is None else f'step {number}  '}"
        f"perplexity {result.perplexity:.3f}  loss {result.loss:.4f}"
        f"  over {count(result.tokens, 'token')}{note}"
    )


def analyze_runs(
    runs: Positional[tuple[Path, ...]],
    out: Annotated[Path | None, UNSET] = None,
    data: Annotated[Path | None, UNSET] = None,
    probe: int = 8,
    line: bool = False,
    tokens: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Measure spectra, ranks and condition numbers of every matrix, in float64.

    The tables are RUN/analysis/STEP.csv, beside a JSON that says what was measured. What was
    measured before is skipped.

    Args:
        runs: Run directories, RUN@STEP, or Hugging Face directories. Of a run without a step every
            checkpoint that it keeps is measured.
        out: Directory for the tables. Hugging Face directories and --line need it.
        data: Prepared corpus for gradients and losses. Unset: that of the run.
        probe: Held-out sequences in the batch on which gradients are measured; 0 for none.
        line: Measure the held-out loss along the line between two runs, and nothing else.
        tokens: With --line, the maximum number of held-out tokens; 0 is all.
        device: auto uses a GPU if there is one.
    """
    from peptrain.analysis.analyze import analyze
    from peptrain.cli.progress import counting
    from peptrain.distributed.world import world

    check(line or not tokens, "--tokens", tokens, "given with --line")
    with world(device) as here, counting(console, "analyzing") as show:
        if line:
            from peptrain.analysis.line import write_line

            written = [write_line(runs, out, data, tokens, here.device, show)]
        else:
            given: Any = {"out": out, "data": data, "probe": probe, "device": here.device}
            written = analyze(runs, **given, watch=show)
    for path in written:
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)


def plot_command() -> Callable[..., None]:
    """Return `plot`, whose flags have the names of the figures."""
    from peptrain.figures.catalogue import FIGURES

    def command(
        runs: Positional[tuple[Path, ...]],
        out: Annotated[Path, arg(aliases=["-o"])],
        figure: Any = None,
        x: Literal["tokens", "steps", "time", "flops"] = "tokens",
        what: str = "weight",
    ) -> None:
        """Draw a figure of runs or of a comparison, and write its numbers as CSV.

        The runs may be in training.

        Args:
            runs: Run directories, one directory of `peptrain compare`, or directories of `peptrain
                analyze --line`.
            out: File to write, .svg, .png or .pdf. The numbers go beside it, to .csv.
            figure: What to draw (docs/report.md). Unset: loss, rates of a comparison, or the line.
            x: x axis of loss and speed. time: seconds of training steps.
            what: Matrices of dynamics: weight, update, from_start and so on (docs/dynamics.md).
        """
        from peptrain.reporting.plot import plot

        written = plot(runs, out, figure=figure, x=x, what=what)
        for path in (written, written.with_suffix(".csv")):
            console.print(str(path), markup=False, highlight=False, soft_wrap=True)

    names = cast(Any, Literal)[tuple(FIGURES)]
    command.__annotations__["figure"] = Annotated[names | None, UNSET]
    return command


def write_report(
    runs: Positional[tuple[Path, ...]], out: Annotated[Path, arg(aliases=["-o"])]
) -> None:
    """Write a report of runs or of a comparison: one HTML file that opens offline.

    The runs may be in training.

    Args:
        runs: Run directories, or one directory of `peptrain compare`.
        out: HTML file to write.
    """
    from peptrain.reporting.report import report

    console.print(str(report(runs, out)), markup=False, highlight=False, soft_wrap=True)


def export_run(
    run: Positional[Path],
    out: Annotated[Path | None, UNSET] = None,
    form: Literal["dense", "factorised", "peft", "gguf"] = "dense",
    step: Annotated[str | None, UNSET] = None,
    push: Annotated[str | None, UNSET] = None,
) -> None:
    """Export a run to the Hugging Face format, and check its logits.

    Args:
        run: Run directory, or RUN@STEP for the checkpoint of a step.
        out: Directory to create. Needed unless --push is given.
        form: dense loads in transformers and other tools. factorised keeps the factors B and A
            (lowrank, loro, spectron, cola) as two nn.Linear: smaller, and loaded by transformers
            with trust_remote_code=True. peft: the adapter alone (lora, dora, vera around the model
            given by --init-from). gguf: one file for llama.cpp.
        step: Step of the checkpoint. all writes each that is kept to a directory OUT/STEP, and
            pushes each as a commit with the tag step-STEP. Unset: the latest.
        push: Upload the export to ORG/NAME on the hub, private if it is new.
    """
    from tempfile import TemporaryDirectory

    from peptrain.exporting.export import export, how_to_load
    from peptrain.exporting.push import check_push
    from peptrain.exporting.push import push as upload
    from peptrain.runs.select import at, check_done, chosen, may_vanish

    if out is None and push is None:
        raise ConfigError("--out: must be a directory to create (got nothing); or give --push")
    if push is not None:
        check_push(push)
    done, damaged = list[Path](), list[str]()
    with TemporaryDirectory() as unnamed:
        for one in chosen(run, step):
            place = (out or Path(unnamed) / "export") / (str(at(one)[1]) if step == "all" else "")
            with may_vanish(one, step == "all", damaged):
                export(one, place, form)
                call = how_to_load(run, form)
                if push is not None:
                    number = at(one)[1]
                    tag = f"step-{number}" if step == "all" else None
                    url = upload(place, push, f"{form} export by peptrain", tag)
                    say(f"{form} model pushed to {push}: {url}")
                if out is not None:
                    call = call.replace("DIR", repr(str(place)))
                    say(f"{form} model in {place}; load it in Python with `{call}`")
                done.append(one)
    check_done(run, done, damaged)


def watch_run(run: Positional[Path]) -> None:
    """Show a run in progress: steps, losses, rates, the time left, and the curve of the loss.

    It ends with the run, or after Ctrl-C, which does not stop the run. In a pipe or a file it
    prints the state once. The exit code is 1 if the run crashed, diverged, vanished or is not
    running.

    Args:
        run: Run directory.
    """
    from peptrain.cli.watching import watch

    watch(run)


def prepare_command() -> Callable[..., None]:
    """Build `peptrain data prepare`, whose flags need PyTorch."""
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
        skipped = f", {count(made.skipped, 'bad record')} skipped" if made.skipped else ""
        say(
            f"{made.path}: {count(made.documents, 'document')}, {made.train_tokens:,} training and"
            f" {made.held_out_tokens:,} held-out tokens, {made.bytes_per_token:.2f} bytes a token,"
            f" vocabulary {made.vocab_size:,} (largest id {made.max_id:,}),"
            f" {made.losses}, {count(made.shards, 'shard')}{skipped}"
            f"{', resumed' if made.resumed else ''}"
        )
        if made.can_be_evaluated:
            say(f"train on it with `peptrain train loro --data.path {quoted(made.path)}`")

    command.__annotations__["config"] = Annotated[Prepare, arg(name="")]
    return command


def list_methods() -> None:
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
    say("\n`peptrain train METHOD --model.preset PRESET` trains one.")


def list_recipes(name: Annotated[Positional[str | None], UNSET] = None) -> None:
    """List the settings of the papers' tables, with the results to expect.

    Args:
        name: Print this recipe as a TOML file for `--config`.
    """
    if name is not None:
        # No newline added, so that redirecting to a file copies the recipe byte for byte.
        console.print(recipes.text(name), markup=False, highlight=False, soft_wrap=True, end="")
        return
    table = Table("recipe", "method", "parameters", "trainable", "tokens", "expected", box=None)
    for known, method, about in recipes.listed():
        counts = (f"{n / 1e6:,.1f}M" for n in (about.parameters, about.trainable))
        tokens = "" if about.tunes else f"{about.tokens / 1e9:.1f}B"
        table.add_row(known, method, *counts, tokens, about.expected)
    print_wide(table)
    say(
        "\n`peptrain recipes NAME` prints one, `peptrain train --recipe NAME` runs it, and"
        " `peptrain tune --recipe NAME` one without tokens, which fine-tunes."
    )
