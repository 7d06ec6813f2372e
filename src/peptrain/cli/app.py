"""The `peptrain` command: parse arguments and call one function."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from peptrain import __version__
from peptrain.cli.failures import report
from peptrain.cli.generating import generate_text
from peptrain.cli.parsing import (
    MARKERS,
    check_command,
    check_directory,
    check_names,
    paragraphs,
    refusing_control_characters,
    registry,
    spelt_out,
)
from peptrain.cli.reading import (
    analyze_runs,
    eval_run,
    export_run,
    list_methods,
    list_recipes,
    plot_command,
    prepare_command,
    watch_run,
    write_report,
)
from peptrain.cli.training import (
    estimate_by,
    resume_command,
    run_demo,
    run_grid,
    train_by,
    tune_by,
)
from peptrain.display.console import (
    console,
    log_on,
    make,
    may_be_lost,
    silence_libraries,
    stderr,
    stdout,
    widen,
)


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
    args += ["--debug"] * ("--debug" in given and args[0] == "compare")
    essential_only = args[0] in ("train", "tune", "estimate") and bool({"-h", "--help"} & {*args})
    args = ["--help" if arg == "--help-all" else arg for arg in args]
    silence_libraries()
    widen()
    told = make(stderr) if "--json" in args or args[0] == "generate" else console
    log_on(told)
    if args == ["--version"]:
        console.print(__version__, highlight=False)
        return 0
    try:
        check_command(args)
        check_directory()
        app, args = _app(args, essential_only)
        with refusing_control_characters(args) as printed:
            app.cli(prog="peptrain", description=DESCRIPTION, args=args, console_outputs=printed,
                    config=MARKERS,
                    registry=registry(args, essential_only=essential_only))  # fmt: skip
    except (Exception, KeyboardInterrupt) as error:
        return report(error, told, debug="--debug" in given)
    stdout.flush()
    return 1 if stdout.lost and args[0] in PRINTS_ONLY else 0


PRINTS_ONLY = ("estimate", "eval", "generate", "methods", "recipes", "watch")
"""Commands that have failed when nobody could read what they print."""
DESCRIPTION = f"""Parameter-efficient pre-training of language models ({__version__}).

Start with `peptrain demo` or `peptrain train loro`: neither needs settings."""


def _app(args: list[str], essential_only: bool) -> tuple[tyro.extras.SubcommandApp, list[str]]:
    """Build the subcommands, and complete `args` by the method that a configuration file names.

    Flags that need PyTorch are built only for the command that `args` calls.
    """
    app, data = tyro.extras.SubcommandApp(), tyro.extras.SubcommandApp()
    called = args[0]
    by_method: dict[str, Any] = {name: _listed(text) for name, text in BY_METHOD.items()}
    if called in by_method:
        args = spelt_out(args) if called == "tune" else args
        check_names(args)
        from peptrain.cli import flags

        args, given = flags.with_config_file(args)
        command = {"train": train_by, "tune": tune_by, "estimate": estimate_by}[called]
        note = SHORT_HELP if essential_only else ""
        by_method[called] = flags.by_method(command, given, BY_METHOD[called], args, note)
    data.__doc__ = "Prepare text for training."
    data.command(name="prepare")(prepare_command() if called == "data" else _listed(""))
    app.command(by_method["train"], name="train")
    app.command(by_method["tune"], name="tune")
    resume = resume_command() if called == "resume" else _listed(RESUME)
    app.command(name="resume")(paragraphs(resume))
    app.command(by_method["estimate"], name="estimate")
    app.command(name="demo")(paragraphs(run_demo))
    app.command(name="compare")(paragraphs(run_grid))
    app.command(name="watch")(paragraphs(watch_run))
    app.command(name="eval")(paragraphs(eval_run))
    app.command(name="generate")(paragraphs(generate_text))
    app.command(name="analyze")(paragraphs(analyze_runs))
    app.command(name="plot")(paragraphs(plot_command()))
    app.command(name="report")(paragraphs(write_report))
    app.command(name="export")(paragraphs(export_run))
    app.command(data, name="data")
    app.command(name="methods")(paragraphs(list_methods))
    app.command(name="recipes")(paragraphs(list_recipes))
    return app, args


def _listed(summary: str) -> Callable[[], None]:
    """A command that only appears in the list of commands."""

    def command() -> None:
        raise AssertionError("its flags were not built")

    command.__doc__ = summary
    return command


BY_METHOD = {
    "train": "Train a model from scratch with one of the methods.",
    "tune": "Fine-tune a model on a task with labels, such as those of GLUE.",
    "estimate": "Estimate parameters, memory and FLOPs without running.",
}
"""Commands with a subcommand for each method, and what they do."""
RESUME = "Resume a run from its latest complete checkpoint, or make it longer."
SHORT_HELP = "These are the most used settings. --help-all shows all of them."
