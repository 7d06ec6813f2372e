"""The command as a person calls it: what it prints, what it refuses, and its exit codes."""

import gzip
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from rich.console import Console
from support import rows, tiny

import peptrain.cli.app
import peptrain.cli.reading
import peptrain.cli.training
import peptrain.comparison.demo
import peptrain.data
import peptrain.display.console
import peptrain.display.training
from peptrain import recipes
from peptrain.cli.app import main
from peptrain.cli.parsing import COMMANDS as KNOWN
from peptrain.cli.progress import measuring, preparation_state, preparing
from peptrain.comparison.demo import DEMO_METHODS, comparison
from peptrain.config import RunConfig, load
from peptrain.data import Corpus, ProgressReport, embedded
from peptrain.display.training import TimeLeft, TrainingProgress, clock, count
from peptrain.eval.perplexity import Evaluation
from peptrain.exporting.factorised import load_factorised
from peptrain.methods import METHODS
from peptrain.methods.rank import RankMethod
from peptrain.methods.targets import TargetedMethod
from peptrain.models.presets import PRESETS
from peptrain.runs.directory import RunDir
from peptrain.testing import MODEL, SMALL
from peptrain.training.loop import train
from peptrain.training.result import Result

STEPS = 8
TINY = SMALL | {"merge_every": 3, "exact_every": 3, "gap": 3}


@dataclass(frozen=True)
class Said:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of an error that was expected."""
        assert self.code == 1 and not self.out, self
        assert self.err.startswith("error: ") and self.err.count("\n") == 1, self.err
        return self.err.removeprefix("error: ").rstrip("\n")


Command = Callable[..., Said]


@pytest.fixture
def peptrain_(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Command:
    """Calls the command line in an empty directory; without settings nothing trains for long."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEPTRAIN_CACHE", os.devnull)

    def call(line: str, *arguments: Any) -> Said:
        capsys.readouterr()
        try:
            code = main([*shlex.split(line), *map(str, arguments)])
        except SystemExit as left:
            assert isinstance(left.code, int)
            code = left.code
        said = capsys.readouterr()
        assert "Traceback" not in said.out + said.err
        return Said(code, said.out, said.err)

    return call


def flags(method: str, corpus: Path, **given: Any) -> list[str]:
    """The flags of a tiny run of any method."""
    known = {f.name for f in fields(METHODS[method])}
    values: dict[str, Any] = {f"model.{key}": value for key, value in MODEL.items()}
    values |= {f"method.{key}": value for key, value in TINY.items() if key in known}
    values |= {"train.steps": STEPS, "train.batch_size": 4, "train.seq_len": 16}
    values |= {"train.log_every": 1, "data.path": corpus}
    values |= {key.replace("__", "."): value for key, value in given.items()}
    return [part for k, v in values.items() for part in (f"--{k.replace('_', '-')}", str(v))]


def spaced(text: str) -> str:
    """The words of a table or a box, without its frame and line breaks."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", text)


every_method = pytest.mark.parametrize("name", METHODS)
COMMANDS = [
    "", *(f"{command}{name}" for command in ("train", "tune", "estimate") for name in
          ("", *(f" {name}" for name in METHODS))), "resume", "demo", "compare", "watch", "eval",
    "generate", "analyze", "plot", "report", "export", "data", "data prepare", "methods", "recipes",
]  # fmt: skip


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_explains_itself(line: str, peptrain_: Command) -> None:
    said = peptrain_(f"{line} --help")
    assert said.code == 0 and not said.err
    assert said.out.startswith(f"usage: peptrain {line}".rstrip())


def test_the_list_of_commands_above_is_whole(peptrain_: Command) -> None:
    def listed(line: str) -> list[str]:
        found = re.search(r"\{([\w,]+)\}", peptrain_(f"{line} --help").out)
        return found[1].split(",") if found else []

    assert {c.split()[0] for c in COMMANDS if c} == set(listed(""))
    assert listed("train") == listed("tune") == listed("estimate") == list(METHODS)


def settings_of(method: str) -> dict[str, Field[Any]]:
    """The settings of a run by their names on the command line."""
    sections = get_type_hints(RunConfig) | {"method": METHODS[method]}
    return {
        f"{section}.{f.name}".removeprefix(".").replace("_", "-"): f
        for section, cls in [("", RunConfig), *sections.items()]
        if is_dataclass(cls)
        for f in fields(cls)
        if cls is not RunConfig or not is_dataclass(sections[f.name])
    }


@every_method
def test_help_shows_the_settings_that_matter_and_help_all_all_of_them(
    name: str, peptrain_: Command
) -> None:
    known = settings_of(name)
    essential = {flag for flag, field in known.items() if "essential" in field.metadata}
    assert 9 <= len(essential) <= 12
    for line, shown in (("--help", essential), ("--help-all", set(known))):
        said = peptrain_(f"train {name} {line}").out
        flags = set(re.findall(r"^[│ ]+--([\w.-]+) (?:[A-Z]|\{)", said, re.MULTILINE))
        assert flags == shown | {"config", "recipe"}
        assert ("--help-all shows all of them" in said) == (line == "--help")
        method = METHODS[name]
        assert spaced((method.__doc__ or "").splitlines()[0]) in spaced(said)
        lr = re.search(r"--optim\.lr FLOAT .*?\(default: (\S+)\)", spaced(said))
        assert lr and float(lr[1]) == method.optim_defaults.lr


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(
    "line", ["train relora --help-all", "compare --help", "data prepare --help"]
)
def test_the_help_is_wrapped_to_the_terminal_and_not_as_its_source_is(
    line: str, width: int, peptrain_: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    usage, *said = peptrain_(line).out.splitlines()
    assert usage.startswith("usage: ") and all(len(row) <= width for row in said)
    column = next(row.index("show this help") for row in said if "show this help" in row)
    continued = 0
    for row, below in pairwise(said):
        text = row[:column].endswith("  ") and row[column:].strip(" │")
        if text and below[column:].strip(" │") and not below[:column].strip(" │"):
            continued += 1
            first = below[column:].split()[0]
            assert len(row.rstrip(" │")) + len(f" {first}") > width - 2, row
    assert continued >= 1


@every_method
def test_every_setting_of_a_method_is_explained(name: str, peptrain_: Command) -> None:
    text = spaced(peptrain_(f"train {name} --help-all").out)
    for field in fields(METHODS[name]):
        flag = rf"--method\.{field.name.replace('_', '-')}"
        explained = re.search(rf"{flag} \S+ (.*?)(?= --[a-z]|$)", text)
        assert explained and len(explained[1].split()) > 3, field.name


LIGHT = ["", "--help", "--version", "recipes", "recipes loro-60m-loro", "xyzzy", "resume --help"]
LIGHT += ["train bpt --model.preset llama-60", "train --recipe pico-tiny-fall"]


@pytest.mark.parametrize("line", LIGHT)
def test_what_needs_no_pytorch_does_not_wait_for_it(line: str, importable: None) -> None:
    code = f"""
import sys
from peptrain.cli.app import main
try:
    main({line.split()!r})
finally:
    print(sorted({{"torch", "transformers", "numpy", "pyarrow"}} & {{*sys.modules}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr[-2000:]


def test_without_a_command_it_helps(peptrain_: Command) -> None:
    assert peptrain_("").out == peptrain_("--help").out
    assert peptrain_("--version").out.strip() == peptrain.__version__


def test_a_misspelt_preset_is_answered_with_the_nearest(peptrain_: Command) -> None:
    for line in ("train bpt --model.preset llama-60", "estimate loro --model.preset=llama-60"):
        said = "model.preset: 'llama-60' is unknown; did you mean 'llama-60m'? or set model.config"
        assert peptrain_(line).error.startswith(said)


# Recipes.


def test_recipes_are_listed_with_what_they_should_come_to(peptrain_: Command) -> None:
    said = peptrain_("recipes")
    assert said.code == 0
    table = {line.split()[0]: line.split() for line in said.out.splitlines() if line.strip()}
    assert set(recipes.names()) <= table.keys()
    row = " ".join(table["loro-130m-sltrain"])
    assert row == "loro-130m-sltrain sltrain 96.5M 96.5M 2.6B perplexity 26.04"
    assert table["relora-1.3b-relora"][1:5] == ["relora", "1,458.6M", "250.7M", "23.6B"]


def test_a_printed_recipe_is_its_file(peptrain_: Command) -> None:
    for name in recipes.names():
        assert peptrain_(f"recipes {name}").out == recipes.text(name)


def test_an_unknown_recipe_is_an_error_with_the_nearest(peptrain_: Command) -> None:
    for line in ("recipes pico-tiny-fall", "train --recipe pico-tiny-fall"):
        error = "recipe 'pico-tiny-fall': unknown; did you mean 'pico-tiny-full'?"
        assert peptrain_(line).error.startswith(error)


RECIPE = "loro-130m-loro-slim-mlp"


def test_a_recipe_trains_as_its_printed_file_does(corpus: Path, peptrain_: Command) -> None:
    Path("file.toml").write_text(peptrain_(f"recipes {RECIPE}").out)
    given = [*flags("loro", corpus), "--schedule.warmup", "2", "--train.device", "cpu"]
    lines = ("--recipe " + RECIPE, "loro --recipe=" + RECIPE, "--config file.toml")
    for n, line in enumerate(lines):
        said = peptrain_(f"train {line} --run run-{n}", *given)
        assert said.code == 0 and "without --data.path" not in said.out
    written = [path.read_text() for path in Path().glob("*/config.toml")]
    assert len(written) == 3 and len(set(written)) == 1
    config = load(next(Path().glob("*/config.toml")))
    assert isinstance(config.method, TargetedMethod) and config.method.targets == "attention"
    assert (config.optim.lr, config.train.precision) == (1e-2, "bf16")
    assert config.train.steps == STEPS


def test_a_recipe_without_data_says_what_it_is_for(
    peptrain_: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peptrain.cli.training, "watched", lambda training: None)
    said = peptrain_("train --recipe bpt-olmo2-1b-full")
    assert said.code == 0
    assert "--recipe bpt-olmo2-1b-full: made for FineWeb-Edu, OLMo 2's tokenizer" in spaced(
        said.out
    )


@pytest.mark.parametrize(
    "line, error",
    [
        (f"full --recipe {RECIPE}", f"--recipe {RECIPE}: is for loro, but the command says full"),
        (
            f"--recipe {RECIPE} --config x.toml",
            f"--config x.toml: can't be combined with --recipe {RECIPE};",
        ),
    ],
)
def test_a_recipe_and_another_wish_are_an_error(line: str, error: str, peptrain_: Command) -> None:
    assert peptrain_(f"train {line}").error.startswith(error)


def test_an_unknown_command_is_an_error_with_the_nearest(peptrain_: Command) -> None:
    said = peptrain_("trian bpt --train.steps 3").error
    assert said == "command 'trian': unknown; did you mean 'train'? see `peptrain --help`"
    assert peptrain_("xyzzy").error.startswith("command 'xyzzy': unknown; choose from train, tune")
    listed = re.search(r"\{([\w,]+)\}", peptrain_("--help").out)
    assert listed and tuple(listed[1].split(",")) == KNOWN


@pytest.mark.parametrize("command", ["train", "estimate"])
def test_an_unknown_method_is_an_error_with_the_nearest(command: str, peptrain_: Command) -> None:
    for name, near in (("rellora", "relora"), ("btp", "bpt"), ("Full", "full")):
        for rest in ("", " --train.steps 3", f" --recipe {RECIPE}"):
            said = peptrain_(f"{command} {name}{rest}")
            hint = f"did you mean {near!r}? `peptrain methods` lists all"
            assert said.error == f"method {name!r}: unknown; {hint}"
    assert "unknown; `peptrain methods` lists all" in peptrain_(f"{command} xyzzy").error


SLIM = "--recipe loro-130m-slim --model.vocab-size 64 --train.batch-size 2"


@pytest.mark.parametrize(
    "flags, sizes",
    [
        pytest.param("", None, marks=pytest.mark.slow),
        ("--model.layers 2", None),
        # the recipe's own
        pytest.param("--model.preset llama-130m", None, marks=pytest.mark.slow),
        ("--model.preset tiny", "hidden_size 640, intermediate_size 1450, heads 10"),
        ("--model.preset tiny --model.hidden-size 320", "intermediate_size 1450, heads 10"),
    ],
)
def test_a_preset_says_which_sizes_of_a_recipe_it_leaves(
    flags: str, sizes: str | None, peptrain_: Command
) -> None:
    said = peptrain_(f"estimate {SLIM} --json {flags}")
    assert said.code == 0 and json.loads(said.out)
    if sizes is None:
        assert "--model.preset" not in said.err
    else:
        kept = f"--model.preset tiny: keeps the sizes set by the recipe or file ({sizes})"
        assert kept in spaced(said.err)


def test_methods_and_presets_are_listed_with_what_they_are(
    peptrain_: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peptrain.cli.reading, "console", Console(width=200))
    said = peptrain_("methods")
    table = {line.split()[0]: spaced(line) for line in said.out.splitlines() if line.strip()}
    for name, method in METHODS.items():
        lr = f"{method.optim_defaults.lr:g}"
        assert f"{name} {method.purpose} {method.equation} {lr}" in table[name]
        assert len(method.purpose.split()) > 3
    for name, shape in PRESETS.items():
        assert table[name].startswith(f" {name} {shape.family} {shape.parameters / 1e6:,.1f}M ")


# From training to export.


@every_method
def test_a_method_trains_and_its_run_is_evaluated_and_exported(
    name: str, corpus: Path, peptrain_: Command
) -> None:
    dense = METHODS[name].has_dense_equivalent
    form = "" if dense else " --form factorised"
    said = peptrain_(f"train {name} --run run", *flags(name, corpus))
    assert said.code == 0 and not said.err
    (end,) = rows(Path("run"), "end")
    assert said.out.endswith(
        f"finished: held-out perplexity {end['perplexity']:,.2f} (loss {end['held_out_loss']:.4f});"
        f" evaluate with `peptrain eval run`, export with `peptrain export run --out DIR{form}`\n"
    )
    config = load(Path("run/config.toml"))
    assert config.method.name == name and config.model.hidden_size == MODEL["hidden_size"]

    measured = peptrain_("eval run")
    result, advice = measured.out.splitlines()
    found = re.fullmatch(r"perplexity (\S+)  loss (\S+)  over ([\d,]+) tokens", result)
    assert advice == f"export the model with `peptrain export run --out DIR{form}`"
    assert found and float(found[2]) == pytest.approx(end["held_out_loss"], abs=1e-4)
    assert int(found[3].replace(",", "")) == end["held_out_tokens"]

    exported = peptrain_("export run --out dense")
    if dense:
        assert exported.code == 0 and exported.out.endswith(
            "dense model in dense; load it in Python with"
            " `transformers.AutoModelForCausalLM.from_pretrained('dense')`\n"
        )
        assert Path("dense/model.safetensors").is_file()
    else:
        assert exported.error == (
            f"--form dense: {name} has no dense equivalent; use --form factorised"
        )
    small = peptrain_("export run --out small --form factorised")
    if name in ("lowrank", "loro", "spectron", "cola"):
        assert small.code == 0 and small.out.endswith(
            "factorised model in small; load it in Python with"
            " `transformers.AutoModelForCausalLM.from_pretrained('small',"
            " trust_remote_code=True)`\n"
        )
        assert load_factorised(Path("small")).dtype == torch.float32
    else:
        assert small.error.startswith(f"--form factorised: {name} is not of the form W = B A")
    made = "dense" if dense else "small"
    assert "exists and is never overwritten" in peptrain_(f"export run --out {made}").error


def test_a_run_takes_the_first_free_name(corpus: Path, peptrain_: Command) -> None:
    for n in (1, 2):
        said = peptrain_("train full", *flags("full", corpus, train__steps=1))
        assert said.out.endswith(f"`peptrain export runs/full-{n} --out DIR`\n")
    assert "--run runs/full-1: exists and is never" in peptrain_(
        "train full --run runs/full-1", *flags("full", corpus)
    ).error  # fmt: skip


def test_a_run_replays_from_its_own_configuration(corpus: Path, peptrain_: Command) -> None:
    assert peptrain_("train loro --run first", *flags("loro", corpus)).code == 0
    for line in (
        "train --config first/config.toml --run again",
        "train loro --run after --config first/config.toml",
        "train --config=first/config.toml --run equals",
    ):
        assert peptrain_(line).code == 0
    ends = [
        rows(Path(run), "end")[0]["held_out_loss"] for run in ("first", "again", "after", "equals")
    ]
    assert len(set(ends)) == 1
    assert Path("again/config.toml").read_text() == Path("first/config.toml").read_text()


SETTINGS = """
[method]
name = "bpt"
rank = 3
[train]
steps = 4
batch_size = 2
seq_len = 16
[model]
vocab_size = 320
hidden_size = 16
intermediate_size = 24
layers = 1
heads = 2
[data]
path = "{corpus}"
"""


def test_a_flag_overrides_the_file(corpus: Path, peptrain_: Command) -> None:
    Path("settings.toml").write_text(SETTINGS.format(corpus=corpus))
    assert peptrain_("train --config settings.toml --run file").code == 0
    assert peptrain_(
        "train bpt --run flag --train.steps 2 --method.rank 2 --config settings.toml"
    ).code == 0  # fmt: skip
    file, flag = (load(Path(run) / "config.toml") for run in ("file", "flag"))
    assert (file.train.steps, file.method.rank) == (4, 3)
    assert (flag.train.steps, flag.method.rank, flag.train.batch_size) == (2, 2, 2)
    assert rows(Path("flag"), "end")[0]["step"] == 2


def test_a_file_for_another_method_is_refused(corpus: Path, peptrain_: Command) -> None:
    Path("settings.toml").write_text(SETTINGS.format(corpus=corpus))
    said = peptrain_("train loro --config settings.toml --run run")
    assert re.match(r"--config settings.toml: is for bpt, but the command says loro", said.error)


@pytest.mark.parametrize(
    "content, message",
    [
        ('[method]\nname = "bpt"\nmerge_evry = 3', "method.merge_evry: unknown key; did you mean"),
        ('[method]\nname = "bpt"\n[trian]\nsteps = 3', "trian: unknown key; did you mean 'train'?"),
        ('[method]\nname = "btp"', "method.name: unknown method 'btp'; choose from full, bpt"),
        ('[method]\nname = "bpt"\nrank = "4"', "method.rank: '4' has the wrong type or value"),
        ('[train]\nsteps = 3', "method.name: missing"),
        ("steps: 3", "not TOML"),
        (None, "No such file"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_named(
    content: str | None, message: str, peptrain_: Command
) -> None:
    if content is not None:
        Path("settings.toml").write_text(content)
    said = peptrain_("train --config settings.toml")
    assert said.error.startswith(f"--config settings.toml: {message}")
    assert not Path("runs").exists()


@pytest.mark.parametrize("spelt, value", [("true", True), ("false", False), ("False", False)])
def test_truth_is_spelt_as_in_a_configuration_file(
    spelt: str, value: bool, corpus: Path, peptrain_: Command
) -> None:
    given = flags("lora", corpus, method__train_rest=spelt, train__steps=3)
    assert peptrain_("train lora --run run", *given).code == 0
    method = load(Path("run/config.toml")).method
    assert isinstance(method, TargetedMethod) and method.train_rest is value


def test_what_trains_may_be_named_over_the_settings_of_a_run(
    corpus: Path, peptrain_: Command
) -> None:
    """Whose file says that all does. A file or command that says both is refused."""
    assert peptrain_("train lora --run run", *flags("lora", corpus, train__steps=3)).code == 0
    written = Path("run/config.toml").read_text()
    assert "train_rest = true" in written
    again = "train --config run/config.toml --run other --method.train norm"
    assert peptrain_(again).code == 0
    method = load(Path("other/config.toml")).method
    assert isinstance(method, TargetedMethod)
    assert (method.train_rest, method.train) == (None, "norm")
    said = peptrain_(f"{again} --method.train-rest false")
    assert said.error.startswith("method.train_rest: false can't be combined with method.train")


# What a command line can get wrong.


@pytest.mark.parametrize(
    "line, message",
    [
        ("train bpt --method.rnak 2", r"Unrecognized .*--method\.rnak.*meant: --method\.rank"),
        ("train bpt --trian.steps 2", r"Unrecognized .*--trian\.steps.*meant: --train\.steps"),
        ("train loro --method.merge-every 2", r"Unrecognized .*in peptrain train bpt --help"),
        ("train bpt --method.rank two", r"parsing --method\.rank: .*INT .*'two'"),
        ("train bpt --method.rank 2.5", r"parsing --method\.rank: .*INT .*'2\.5'"),
        ("train bpt --method.reset all", r"'all' .*--method\.reset.*'zero', 'magnitude'"),
        ("train bpt --train.compile yes", r"--train\.compile.*True"),
        ("train bpt --method.rank", r"--method\.rank"),
        ("train bpt --config", r"--config"),
        ("train", r"Expected one of \{full,"),
        ("export", r"Run directory, or RUN@STEP .*\(required\)"),
        ("resume", r"Run directory. \(required\)"),
        ("data prepare text.txt", r"--out PATH"),
    ],
)  # fmt: skip
def test_a_mistyped_command_line_is_answered(line: str, message: str, peptrain_: Command) -> None:
    said = peptrain_(line)
    assert said.code == 2 and not said.out
    assert re.search(message, spaced(said.err)), said.err
    assert "usage:" not in said.err  # argparse, which only looks for --config
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    "method, given, message",
    [
        ("bpt", {"method__rank": 0}, "method.rank: must be >= 1 (got 0)"),
        ("bpt", {"method__reset_fraction": 2}, "method.reset_fraction: must be in [0, 1] (got"),
        ("loro", {"method__scale": "wide"}, "method.scale: must be "),
        ("full", {"optim__lr": -1}, "optim.lr: must be a finite number >= 0 (got -1.0)"),
        ("full", {"train__steps": 0}, "train.steps: must be >= 1 (got 0)"),
        ("full", {"model__preset": "huge"}, "model.preset: 'huge' is unknown; known are tiny"),
        ("full", {"model__vocab_size": 100}, "model.vocab_size: too small for token id 299 in"),
        ("full", {"data__path": "nothing"}, "data.path: {cwd}/nothing: not a prepared corpus"),
        ("full", {"model__config": "nothing"}, "model.config: nothing does not exist"),
    ],
)  # fmt: skip
def test_an_impossible_setting_is_one_line_that_names_it(
    method: str, given: Mapping[str, Any], message: str, corpus: Path, peptrain_: Command
) -> None:
    said = peptrain_(f"train {method} --run run", *flags(method, corpus, **given))
    assert said.error.startswith(message.replace("{cwd}", str(Path.cwd())))
    assert not Path("run").exists()


@pytest.mark.parametrize("name", [n for n in METHODS if issubclass(METHODS[n], RankMethod)])
def test_a_rank_too_large_names_the_largest_useful_one(
    name: str, corpus: Path, peptrain_: Command
) -> None:
    error = peptrain_(f"train {name} --run run", *flags(name, corpus, method__rank=100)).error
    largest = re.search(r"method.rank: rank 100 saves .*the largest useful rank is (\d+)", error)
    assert largest
    for rank, code in ((int(largest[1]), 0), (int(largest[1]) + 1, 1)):
        given = flags(name, corpus, method__rank=rank, train__steps=3)
        assert peptrain_(f"train {name} --run run-{rank}", *given).code == code


@pytest.mark.parametrize("line", ["eval nothing", "resume nothing", "export nothing --out out"])
def test_what_is_no_run_is_named(line: str, peptrain_: Command) -> None:
    said = "nothing: not a run directory (there is no such directory)"
    assert peptrain_(line).error.startswith(said)


def test_a_place_in_the_way_of_a_run_is_named(corpus: Path, peptrain_: Command) -> None:
    Path("file").touch()
    said = peptrain_("train full --run file/run", *flags("full", corpus))
    assert said.error.startswith("--run file/run: can't be written")


# Preparing data.


def test_text_and_packed_json_lines_are_prepared(peptrain_: Command) -> None:
    Path("a.txt").write_text("tea in a tin, rain on a rose. " * 50)
    with gzip.open("b.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"body": f"line {n} of a rose"}) + "\n" for n in range(40))
    said = peptrain_(
        "data prepare a.txt b.jsonl.gz --out made --vocab-size 280 --held-out 0.2 --text-field body"
    )
    assert said.code == 0 and not said.err
    corpus = Corpus.open(Path("made"))
    assert said.out.startswith("made: 41 documents, ") and said.out.count("\n") == 2
    assert said.out.endswith("train on it with `peptrain train loro --data.path made`\n")
    assert f" {corpus.train_tokens:,} training and {len(corpus.held_out()):,} held-out" in said.out
    assert f"vocabulary {corpus.vocab_size:,} (largest id {corpus.max_id:,})" in said.out
    trained = peptrain_("train full --run run", *flags("full", Path("made"), train__steps=1))
    assert trained.code == 0
    without = peptrain_("data prepare a.txt --out none --vocab-size 280 --held-out 0")
    assert without.code == 0 and "train on it" not in without.out  # where it would be refused


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("junk.txt", bytes(range(256)) * 20, r"junk\.txt: does not look like text"),
        ("bad.txt", b"fine \xff\xfe then", r"bad\.txt: invalid UTF-8 at byte 5 .*--on-bad-utf8"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', r"bad\.jsonl:2: not JSON"),
        ("other.jsonl", b'{"txt": "a"}\n', r"other\.jsonl:1: no field 'text' .*'txt'"),
        ("list.jsonl", b"[1]\n", r"list\.jsonl:1: a JSON array, but each line must be one object"),
        ("cut.txt.gz", gzip.compress(b"tea " * 999, mtime=0)[:-20], r"cut\.txt\.gz: can't be read"),
        ("empty.txt", b"", r"inputs: no text in empty\.txt"),
        ("missing.txt", None, r"inputs: missing\.txt: no such file"),
    ],
)  # fmt: skip
def test_what_cannot_be_prepared_is_named(
    name: str, content: bytes | None, message: str, peptrain_: Command
) -> None:
    if content is not None:
        Path(name).write_bytes(content)
    assert re.match(message, peptrain_(f"data prepare {name} --out made").error)
    assert not Path("made", "index.json").exists()


@pytest.mark.parametrize(
    "given, message",
    [
        ("--vocab-size 10", "vocab_size: must be between 257 and 16777216 (got 10)"),
        ("--held-out 1", "held_out: must be in [0, 1) (got 1.0)"),
        ("--tokenizer nothing", "tokenizer: nothing: no such file"),
        ("--eos-token <no> --tokenizer TOKENIZER", "eos_token: '<no>' is not in the tokenizer"),
    ],
)
def test_settings_that_cannot_prepare_are_named(
    given: str, message: str, corpus: Path, peptrain_: Command
) -> None:
    Path("a.txt").write_text("tea in a tin")
    given = given.replace("TOKENIZER", str(corpus / "tokenizer.json"))
    assert peptrain_(f"data prepare a.txt --out made {given}").error.startswith(message)


def test_a_message_about_a_missing_corpus_gives_a_command_that_works(peptrain_: Command) -> None:
    Path("TEXT").write_text("tea in a tin, rain on a rose. " * 50)
    error = peptrain_("train full --data.path made").error
    (command,) = re.findall("make one with `peptrain (.*)`", error)
    assert peptrain_(command).code == 0
    assert Corpus.open(Path("made")).train_tokens


def test_a_text_file_for_a_corpus_is_answered_with_how_to_prepare_it(peptrain_: Command) -> None:
    Path("READ ME.md").write_text("tea in a tin, rain on a rose. " * 50)
    said = peptrain_("train full --data.path 'READ ME.md'").error
    text = Path("READ ME.md").resolve()
    command = f"data prepare '{text}' --out 'data/READ ME'"
    wanted = f"not a prepared corpus (a file); make one with `peptrain {command}`"
    assert wanted in spaced(peptrain_(f"estimate full --data.path '{text}'").err)
    assert said == f"data.path: {text}: {wanted}"
    assert peptrain_(command).code == 0 and Corpus.open(Path("data/READ ME")).train_tokens


# Signals and exit codes.


def test_ctrl_c_saves_and_resume_goes_on(
    corpus: Path, peptrain_: Command, monkeypatch: pytest.MonkeyPatch, signals: None
) -> None:
    show = TrainingProgress.__call__

    def interrupt(self: TrainingProgress, row: Mapping[str, Any]) -> None:
        show(self, row)
        if row["event"] == "step" and row["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    assert peptrain_("train bpt --run whole", *flags("bpt", corpus)).code == 0
    with monkeypatch.context() as patch:
        patch.setattr(TrainingProgress, "__call__", interrupt)
        stopped = peptrain_("train bpt --run parted", *flags("bpt", corpus))
    assert stopped.code == 130 and not stopped.err
    said = re.search(
        r"stopped and saved at step (\d) of 8; resume with `peptrain (.+)`", stopped.out
    )
    assert said and 3 <= int(said[1]) < STEPS
    resumed = peptrain_(said[2])
    assert resumed.code == 0 and f"in fp32 from step {said[1]}\n" in resumed.out
    ends = [rows(Path(run), "end")[0]["held_out_loss"] for run in ("whole", "parted")]
    assert ends[0] == ends[1]


def test_a_finished_run_says_so_and_what_can_be_done(corpus: Path, peptrain_: Command) -> None:
    assert peptrain_("train full --run 'my run'", *flags("full", corpus, train__steps=1)).code == 0
    first, evaluating, end = peptrain_("resume 'my run'").out.splitlines()
    assert first == (
        "full  my run is finished at step 1 of 1 and only evaluated; to train longer,"
        " `peptrain resume 'my run' --train.steps N`"
    )
    assert evaluating.startswith("full  evaluating on all ")
    assert end.endswith("export with `peptrain export 'my run' --out DIR`")


@pytest.mark.parametrize(
    "line", ["data prepare a.txt --out made", "eval run", "export run --out out"]
)
def test_ctrl_c_elsewhere_is_no_traceback(
    line: str, peptrain_: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    for place in (
        "peptrain.data.prepare",
        "peptrain.eval.run.evaluate",
        "peptrain.exporting.export.export",
    ):
        monkeypatch.setattr(place, interrupted)
    said = peptrain_(line)
    assert said.code == 130 and said.out == "stopped\n" and not said.err


# Nobody reads what is shown.


def unwritable(how: str) -> Any:
    if how == "full":
        return open("/dev/full", "w")
    if how == "closed":
        return None
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@pytest.mark.parametrize("how", ["full", "closed", "pipe"])
def test_a_training_outlives_its_display(
    how: str, corpus: Path, peptrain_: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = unwritable(how)
    monkeypatch.setattr(sys, "stdout", stream)
    said = peptrain_("train bpt --run run", *flags("bpt", corpus))
    reason = {"full": "No space left on device", "closed": "closed", "pipe": "Broken pipe"}[how]
    assert (said.code, said.err) == (
        0, f"standard output can't be written ({reason}); the command continues without it\n"
    )  # fmt: skip
    assert len(rows(Path("run"))) == STEPS and len(rows(Path("run"), "end")) == 1
    if stream:
        stream.close()  # what is buffered fails no more


def test_a_command_that_only_prints_fails_with_its_output(
    peptrain_: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", unwritable("full"))
    said = peptrain_("recipes")
    assert said.code == 1 and said.err.count("\n") == 1
    monkeypatch.undo()
    assert peptrain_("recipes").code == 0


@pytest.mark.parametrize("stderr", ["pipe", "closed"])
def test_without_any_output_it_trains_too(
    stderr: str, corpus: Path, peptrain_: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, unwritable(stderr))
    assert peptrain_("train full --run run", *flags("full", corpus)).code == 0
    assert len(rows(Path("run"), "end")) == 1


# What is seen while training.

NUMBERS = r"lr \d\.\de-\d\d  [\d,]+ tokens/s"
BEFORE = rf"loss \d\.\d{{3}}  perplexity [\d,]+\.\d\d  {NUMBERS}"
AFTER = rf"loss \d\.\d{{3}}  held-out perplexity [\d,]+\.\d\d  {NUMBERS}"
TIME = r"\d:\d\d"


def test_a_file_gets_a_line_for_each_row_and_none_twice(
    corpus: Path, peptrain_: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = flags("bpt", corpus, train__eval_every=2, train__checkpoint_every=4, train__log_every=2)
    said = peptrain_("train bpt --run run", *given)
    start, *lines, evaluating, curves, end = said.out.splitlines()
    assert start == "bpt  run: 0.01M of 0.02M parameters trainable, 8 steps of 64 tokens in fp32"
    evals = {row["step"]: row for row in rows(Path("run"), "eval")}
    for step in (2, 4, 6, 8):
        numbers, left = BEFORE if step == 2 else AFTER, rf"  left {TIME}" if step < 8 else ""
        merges = {2: "", 4: "  1 merge", 6: "  2 merges", 8: "  2 merges"}[step]
        wanted = rf"bpt  step {step} of 8  {numbers}{merges}  elapsed {TIME}{left}"
        assert re.fullmatch(wanted, lines.pop(0))
        if step < 8:
            loss, perplexity = (evals[step][key] for key in ("held_out_loss", "perplexity"))
            assert lines.pop(0) == (
                f"bpt  step {step}: held-out perplexity {perplexity:,.2f} (loss {loss:.3f})"
                " over 64 tokens"
            )
        if step in (4, 8):
            assert lines.pop(0) == f"bpt  step {step}: checkpoint saved"
    assert not lines
    (last,) = rows(Path("run"), "end")
    assert evaluating == f"bpt  evaluating on all {last['held_out_tokens']} held-out tokens"
    first, least = rows(Path("run"))[0]["loss"], rows(Path("run"))[-1]["loss"]
    before, after = evals[2]["perplexity"], last["perplexity"]
    wanted = (
        rf"loss {first:.3f} █.*▁ {least:.3f}  held-out perplexity {before:.2f} █..▁ {after:.2f}"
    )
    assert re.fullmatch(rf"bpt  {wanted}", curves) and len(curves) < 80
    assert end.startswith("bpt  finished: held-out perplexity ")


def test_the_time_left_is_that_of_the_pace_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations and checkpoints are a part of it."""
    now = 0.0
    monkeypatch.setattr(peptrain.display.training.time, "monotonic", lambda: now)
    out = io.StringIO()
    progress = TrainingProgress(Console(file=out, width=80))
    progress(start_row(step=10, steps=110))
    now = 240.0
    progress(step_row(50))
    now = 300.0
    progress({"event": "eval", "step": 50, "held_out_loss": 2.5, "held_out_tokens": 1})
    progress(step_row(60))
    progress(step_row(110))
    *_, first, evaluated, second, last = out.getvalue().splitlines()
    assert first.endswith("elapsed 4:00  left 6:00")
    assert second.endswith("elapsed 5:00  left 5:00") and "held-out perplexity 12.18" in second
    assert last.endswith("elapsed 5:00")
    assert evaluated.endswith("held-out perplexity 12.18 (loss 2.500) over 1 token")


def test_little_time_left_is_a_second_and_none_is_not_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(peptrain.display.training.time, "monotonic", lambda: now)
    left = TimeLeft(0)
    assert left.words == []
    now = 1.0
    left.update(100, 101)
    assert left.words == ["left 0:01"]
    now = 1.5  # nothing was reported since, and the estimate is used up
    assert left.words == []
    left.update(101, 101)
    assert left.words == []


def test_numbers_and_times_are_written_out() -> None:
    assert [count(n, "merge") for n in (0, 1, 2.0, 1234)] == [
        "0 merges", "1 merge", "2 merges", "1,234 merges",
    ]  # fmt: skip
    assert [clock(s) for s in (0, 59.9, 83, 3600, 86_399)] == [
        "0:00", "0:59", "1:23", "1:00:00", "23:59:59",
    ]  # fmt: skip


def start_row(**given: Any) -> dict[str, Any]:
    row = {"event": "start", "run": "runs/x", "method": "lowrank", "step": 0, "steps": 10_000}
    row |= {"tokens_per_step": 8192, "train_tokens": 10**9, "precision": "bf16-mixed"}
    return row | {"parameters": 10**9, "trainable": 10**8} | given


def step_row(step: int, **given: Any) -> dict[str, Any]:
    row = {"event": "step", "step": step, "loss": 3.25, "lr": 1e-3, "grad_norm": 1.0}
    return row | {"tokens": step * 8192, "tokens_per_second": 1_234_567.0} | given


def shown(console: Console) -> str:
    """What stands on a terminal in the end: the last of what was written over."""
    file = console.file
    assert isinstance(file, io.StringIO)
    last = file.getvalue().split("\x1b[2K")[-1]
    return re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", last)


def frame(console: Console) -> list[str]:
    """The lines of the live display as it was drawn last."""
    return [line.rstrip() for line in shown(console).splitlines() if line.strip()]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_terminal_shows_it_all_with_what_each_is(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(peptrain.display.training.time, "monotonic", lambda: now)
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    progress = TrainingProgress(console)
    progress(start_row())
    for step in (9_000, 9_500):
        now = step / 20
        progress(step_row(step, exact_steps=19.0))
    progress({"event": "eval", "step": 9_500, "held_out_loss": 3.5, "held_out_tokens": 2})
    progress({"event": "evaluating", "step": 9_500, "tokens_done": 2, "tokens_total": 4_000})
    assert progress._live is not None
    progress._live.refresh()
    found = frame(console)
    progress.close()
    bar = "━" if width > 60 else ""
    wanted = rf"lowrank  step 9,500 of 10,000 .*{bar}.*  elapsed 7:55  left 0:25"
    assert re.search(wanted, found[0]), found
    numbers = (
        "loss 3.250  held-out perplexity 33.12  lr 1.0e-03  1,234,567 tokens/s  19 exact steps"
    )
    assert " ".join(found[1:-1]).split() == numbers.split()
    assert not re.search(r"(exact|held-out|lr|loss)$", "\n".join(found), re.M)
    assert found[-1].startswith("evaluating: 2 of 4,000 held-out tokens")
    assert max(map(len, found)) <= width and "…" not in "".join(found)
    assert width < 120 or len(found) == 3


def test_training_on_a_terminal_draws_a_live_display_and_takes_it_away(
    corpus: Path, tmp_path: Path
) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=400)
    config = tiny("bpt", corpus, tmp_path / "run", train={"eval_every": 2})
    train(config, TrainingProgress(console))
    written = console.file.getvalue()  # type: ignore[attr-defined]
    plain = re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", written)
    assert re.search(rf"bpt  step 8 of 8 +━+ +elapsed {TIME}\s+{AFTER}  2 merges", plain)
    assert "bpt  step 6: held-out perplexity" in plain and "bpt  step 4: checkpoint saved" in plain
    assert plain.rstrip().endswith(f"`peptrain export {tmp_path / 'run'} --out DIR`")
    assert frame(console)[-1].startswith("bpt  finished: held-out perplexity ")
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") == 1  # the cursor came back


ABSURD = {"optim__lr": 1e30, "optim__clip": 0}


@pytest.mark.parametrize("every", [0, 1, 2])
def test_the_bar_goes_when_training_diverges(
    every: int, corpus: Path, peptrain_: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(peptrain.display.training, "console", console)
    said = peptrain_(
        "train full --run run", *flags("full", corpus, train__eval_every=every, **ABSURD)
    )
    assert re.match(r"step \d: .* not finite|step \d: the (held-out )?loss is nan", said.error)
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") == 1


def test_names_with_brackets_are_printed_as_they_are(corpus: Path, peptrain_: Command) -> None:
    long = "a-name-that-is-longer-than-a-line-" * 3 + "[red]of[/red]"
    assert f"`peptrain export '{long}/run' --out DIR`\n" in peptrain_(
        f"train full --run {long}/run", *flags("full", corpus, train__steps=1)
    ).out  # fmt: skip
    assert f"in {long}/out; load" in peptrain_(f"export {long}/run --out {long}/out").out
    Path("a.txt").write_text("tea in a tin, rain on a rose")
    said = peptrain_(f"data prepare a.txt --out {long}/data --vocab-size 260")
    assert said.out.startswith(f"{long}/data: ") and said.out.count("\n") == 2
    assert f"{long}/nothing: not a run" in peptrain_(f"eval {long}/nothing").error


# The demo.


def test_the_demo_trains_each_method_on_the_same_tokens(
    peptrain_: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PEPTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "_sotu_texts", list)
    monkeypatch.setattr(embedded, "_source_roots", lambda: [Path(json.__file__).parent])
    demo = peptrain.comparison.demo
    short = replace(demo.DEMO_TRAIN, steps=4, batch_size=2, seq_len=32, log_every=1)
    monkeypatch.setattr(demo, "DEMO_TRAIN", short)
    said = peptrain_("demo")
    assert said.code == 0 and "Try next:" in said.out
    names = [method.name for method in DEMO_METHODS]
    assert names == ["full", "relora", "bpt", "loro"]
    runs = {name: Path("runs/demo-1") / name for name in names}
    configs = [load(run / "config.toml") for run in runs.values()]
    assert len({(c.model, c.data, c.train) for c in configs}) == 1
    assert {rows(run)[-1]["tokens"] for run in runs.values()} == {4 * 2 * 32}
    assert len({rows(run, "end")[0]["held_out_tokens"] for run in runs.values()}) == 1
    lines = said.out.splitlines()
    start = next(i for i, line in enumerate(lines) if "trainable" in line and "state" in line)
    header, *table = lines[start : start + 1 + len(names)]
    assert spaced(header).strip() == (
        "method trainable total state MB held-out loss perplexity tokens/s"
    )
    for line, (name, run) in zip(table, runs.items(), strict=True):
        (end,) = rows(run, "end")
        cells = line.split()
        assert cells[0] == name
        assert cells[4:6] == [f"{end['held_out_loss']:.3f}", f"{end['perplexity']:.1f}"]
    assert list(RunDir(runs["bpt"]).checkpoints.iterdir())
    assert peptrain_("demo --run runs/demo-1").error.startswith("--run runs/demo-1/full: exists")


def test_the_comparison_shows_what_each_run_trains_and_stores() -> None:
    held_out = Evaluation(loss=2.0, tokens=1000)
    one = Result(
        run=Path("runs/demo-1/[b]pt"), held_out=held_out, parameters=2_500_000, trainable=1_234_567,
        state_bytes=9_876_543, tokens_per_second=12_345.6, peak_bytes=0,
    )  # fmt: skip
    console = Console(file=io.StringIO(), width=80)
    console.print(comparison([one]))
    assert isinstance(console.file, io.StringIO)
    header, row = (line.rstrip() for line in console.file.getvalue().splitlines())
    assert row.split() == ["[b]pt", "1.23M", "2.50M", "9.9", "2.000", "7.4", "12,346"]
    assert "…" not in header and header.split()[-1] == "tokens/s"


def test_preparing_shows_a_bar_on_a_terminal(
    peptrain_: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    for place in (peptrain.cli.reading, peptrain.display.console):
        monkeypatch.setattr(place, "console", console)
    Path("a.txt").write_text("tea in a tin, rain on a rose. " * 50)
    assert peptrain_("data prepare a.txt --out made --vocab-size 260").code == 0
    frame = shown(console)
    assert (
        re.search(r"preparing .*\n1 document  [\d,]+ tokens", frame)
        and "made: 1 document," in frame
    )


def test_an_evaluation_shows_its_tokens_and_the_time_left() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with measuring(console) as watch:
        watch(2_048, 136_483)
        watch(65_536, 136_483)
    written = console.file.getvalue()  # type: ignore[attr-defined]
    drawn = re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", written)
    assert re.search(r"evaluating .*65,536 of 136,483 tokens left (\d:\d\d:\d\d|-:--:--)", drawn)
    assert shown(console).strip() == ""


def test_preparing_a_stream_shows_the_pace_and_no_end() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with preparing(console) as show:
        for batch in range(3):
            show(ProgressReport(documents=1000 * batch, tokens=10**6 * batch, share=None))
    assert re.search(r"preparing \S+ *\n2,000 documents  2,000,000 tokens", shown(console))
    of_this_call = preparation_state(ProgressReport(7, 5_000, None), seconds=2.0, before=1_000)
    assert of_this_call == "7 documents  5,000 tokens  2,000 tokens/s"


def test_a_mixture_is_prepared_and_its_end_explained(peptrain_: Command) -> None:
    Path("a.txt").write_text("tea in a tin, rain on a rose. " * 50)
    Path("b.txt").write_text("rain on a rose")
    command = "data prepare a.txt b.txt --out made --vocab-size 280"
    error = peptrain_(f"{command} --weights 2 3").error
    assert error.startswith("weights: [2.0, 3.0] sum to 5, not 1; give --weights 0.4 0.6")
    said = peptrain_(f"{command} --weights 0.4 0.6 --max-tokens 9000")
    assert said.code == 0 and "made: 2 documents" in said.out
    assert "weights: b.txt ended after 14 bytes" in re.sub(r"\s+", " ", said.out)


def test_a_dataset_that_cannot_be_reached_is_no_traceback(peptrain_: Command) -> None:
    error = peptrain_("data prepare hf:some/texts --out made").error
    assert error.startswith("inputs: hf:some/texts can't be reached")
    assert "hf download --repo-type dataset some/texts" in error


@pytest.mark.slow
def test_the_readme_s_line_for_several_ranks(corpus: Path, tmp_path: Path) -> None:
    """`-m --` because torchrun takes --run for an abbreviation of a flag of its own."""
    tail = flags("full", corpus, train__steps=2)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    line = ["-m", "--", "peptrain", "train", "full", "--run", str(tmp_path / "run"), *tail]
    done = subprocess.run(
        [*torchrun, *line],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("finished: ") == 1
