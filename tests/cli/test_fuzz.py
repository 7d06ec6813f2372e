"""Mutated configurations, grids and command lines: one clear line, or a configuration that makes
sense. No traceback, no hang."""

import contextlib
import math
import random
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
from support import tiny, write_grid

import peptrain.comparison.compare
import peptrain.estimation.estimate
import peptrain.training.loop
from peptrain import recipes
from peptrain.cli.app import main
from peptrain.comparison.grid import Grid, expand
from peptrain.config import RunConfig, dump, parse, resolved
from peptrain.errors import Interrupted
from peptrain.methods import METHODS
from peptrain.optim.schedule import build
from peptrain.runs.init_from import with_inherited_model
from peptrain.settings import toml

SECONDS = 300
"""A case that takes longer hangs. Most take 20 ms."""
VALUES = ["0", "1", "-1", "3", "1e400", "-0.0", "nan", "inf", "-inf", "1e-300", "1e30", "true",
          '""', '"x"', "[]", "[1, 2]", "{a = 1}", '"\\u0000"', '"\\n"', "9" * 25, "9" * 5000,
          "2026-01-01", "0x" + "f" * 5000, "[" * 2000, '"~"', '"~nobody-at-all/x"', "1_000",
          "10**3", "'''", "0.5", "9223372036854775807", "1000000000", '"' + "a" * 2000 + '"',
          '"full"', '"bpt"']  # fmt: skip
ARGUMENTS = [*(value.strip('"')[:2000] for value in VALUES), "", "-", "--", "--help", "--x",
             "--train.steps", "--optim.lr=", "--method.rank", "\udcff", "\x1b[31m", "ä", "漢", " ",
             "--config", "--debug", "--recipe=x", "--json", "lora", "--train", "--train.compile",
             "--tyro-print-completion", "--model.preset=tiny", "--run=~", "-h", "@x",
             "--method.targets=q,,v", "\n"]  # fmt: skip


class Hangs(BaseException):
    """Not an error that anything would catch."""


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    def strike(*_: object) -> NoReturn:
        raise Hangs

    before = signal.signal(signal.SIGALRM, strike)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def mutated_file(text: str, rng: random.Random) -> bytes:
    """One or a few changes of a TOML file."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        text = rng.choice(CHANGES)(text, rng)
    data = text.encode("utf-8", "surrogateescape")
    if rng.random() < 0.05:
        at = rng.randrange(len(data) + 1)
        data = data[:at] + rng.randbytes(rng.choice((1, 8, 100))) + data[at + 1 :]
    return data


def _lines(change: Callable[[list[str], int, random.Random], None]) -> Callable[..., str]:
    def changed(text: str, rng: random.Random) -> str:
        lines = text.splitlines() or [""]
        change(lines, rng.randrange(len(lines)), rng)
        return "\n".join(lines)

    return changed


@_lines
def _delete(lines: list[str], at: int, rng: random.Random) -> None:
    del lines[at]


@_lines
def _duplicate(lines: list[str], at: int, rng: random.Random) -> None:
    lines.insert(rng.randrange(len(lines)), lines[at])


@_lines
def _swap(lines: list[str], at: int, rng: random.Random) -> None:
    other = rng.randrange(len(lines))
    lines[at], lines[other] = lines[other], lines[at]


@_lines
def _rename(lines: list[str], at: int, rng: random.Random) -> None:
    key, equals, value = lines[at].partition("=")
    lines[at] = (
        rng.choice((key[1:], key * 2, key.upper(), "a." + key, "ä", '"a b"')) + equals + value
    )


@_lines
def _other_value(lines: list[str], at: int, rng: random.Random) -> None:
    lines[at] = f"{lines[at].partition('=')[0]}= {rng.choice(VALUES)}"


@_lines
def _nest(lines: list[str], at: int, rng: random.Random) -> None:
    key, _, value = lines[at].partition("=")
    depth = rng.choice((1, 3, 40, 5000))
    lines[at] = rng.choice((f"{key}= {'[' * depth}{value}{']' * depth}",
                            f"{key.strip()}{'.a' * depth} = 1", f"[{'a.' * depth}a]"))  # fmt: skip


def _truncate(text: str, rng: random.Random) -> str:
    return text[: rng.randrange(len(text) + 1)]


def _insert(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text) + 1)
    return (
        text[:at] + rng.choice(("\0", "\x1b", '"', "[", "=", "\n", "#", "\udcff", "é")) + text[at:]
    )


CHANGES = [_delete, _duplicate, _swap, _rename, _other_value, _other_value, _other_value, _nest,
           _truncate, _insert]  # fmt: skip


def mutated_line(args: list[str], rng: random.Random) -> list[str]:
    """One or a few changes of a command line."""
    args = [*args]
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(args) + 1)
        what = rng.choice(("drop", "double", "swap", "value", "value", "insert", "cut", "mark"))
        if what == "insert" or at == len(args):
            args.insert(at, rng.choice(ARGUMENTS))
        elif what == "drop":
            del args[at]
        elif what == "double":
            args.insert(rng.randrange(len(args)), args[at])
        elif what == "swap":
            other = rng.randrange(len(args))
            args[at], args[other] = args[other], args[at]
        elif what == "value":
            args[at] = rng.choice(ARGUMENTS)
        elif what == "cut":
            args[at] = args[at][: rng.randrange(len(args[at]) + 1)]
        else:
            args[at] += rng.choice(("=", "\0", "é", "x", ".", "=1", "\x9b"))
    return args


class Accepted(Interrupted):
    """Where training, an estimate or a comparison would begin, with what it was given."""

    def __init__(self, given: Any) -> None:
        super().__init__("accepted", 99)
        self.given = given


def check_sense(config: RunConfig[Any]) -> None:
    """What must be true of a configuration that is trained, apart from peptrain's own checks."""
    assert parse(toml.tomllib.loads(dump(config))) == resolved_without_run(config)
    for name, value in numbers(config):
        most = 2**63 - 1 if type(value) is int else 3.4e38
        assert math.isfinite(value) and 0 <= value <= most, name
    train, optim = config.train, config.optim
    assert train.steps * train.batch_size * train.seq_len > 0 and train.keep > 0
    assert train.batch_size % train.micro_batch == 0 < train.micro_batch <= 2**24
    assert optim.eps > 0 and optim.beta1 < 1 and optim.beta2 < 1
    steps = train.steps
    if config.schedule.warmup < steps:
        schedule = build(config.schedule, steps)
        assert all(0 <= schedule(t) <= 1 for t in {0, 1, steps // 2, steps - 1})


def resolved_without_run(config: RunConfig[Any]) -> RunConfig[Any]:
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    return RunConfig(**values | {"run": None})


def numbers(section: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            yield from numbers(value, f"{field.name}.")
        elif type(value) in (int, float):
            yield prefix + field.name, value


@pytest.fixture
def outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[list[str]], str]:
    """Calls the command, but nothing is trained; returns accepted, refused, usage or help."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    given: list[Any] = []

    def accept(config: Any, *_: Any, **__: Any) -> NoReturn:
        config = with_inherited_model(config)
        given.append(resolved(config, world_size=1, on_gpu=False))
        raise Accepted(config)

    def accept_grid(table: Any) -> Grid:
        grid = expand(table)
        given.extend(run.config for run in grid.runs)
        raise Accepted(grid)

    monkeypatch.setattr(peptrain.training.loop, "train", accept)
    monkeypatch.setattr(peptrain.estimation.estimate, "estimate", accept)
    monkeypatch.setattr(peptrain.comparison.grid, "expand", accept_grid)

    def call(args: list[str]) -> str:
        given.clear()
        capsys.readouterr()
        with limited(SECONDS):
            try:
                code = main(args)
            except SystemExit as left:
                assert left.code in (0, 2)
                return "help" if left.code == 0 else "usage"
        said = capsys.readouterr()
        assert "Traceback" not in said.out + said.err or "--debug" in args
        assert "hit a bug" not in said.err, said.err
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", said.out + said.err)
        if code == 99:
            for config in given:
                check_sense(config)
            return "accepted"
        if code == 0:
            return "help"
        assert code == 1 and "error: " in said.err, (code, said)
        *_, line = said.err.splitlines()
        assert line.startswith("error: ") and 10 < len(line) < 3000
        assert re.search(r"[\w-]: |'", line), line
        return "refused"

    return call


def files(corpus: Path, folder: Path) -> list[tuple[str, str]]:
    """(command, text) of valid files: recipes, the config.toml of runs, a grid."""
    texts = [("train", recipes.text(name)) for name in recipes.names()]
    for name in METHODS:
        config = resolved(tiny(name, corpus), world_size=1, on_gpu=False)
        texts += [("train", dump(config))] * 2
    grid = write_grid(folder, corpus, {"method.name": "bpt", "method.rank": [2, 4]}, {})
    return texts + [("compare", grid.read_text())] * 12


LINES = [
    "train bpt --method.rank 4 --train.steps 8 --train.batch-size 4 --optim.lr 1e-3 --run r",
    "train relora --method.merge-every 3 --schedule.kind cosine --model.layers 2 --train.seed 3",
    "train loro --config=c.toml --optim.beta2 0.95 --train.compile true",
    "train --recipe loro-60m-loro --train.precision fp32 --data.path x",
    "train lora --method.targets q,v --method.dropout 0.1 --init-from x --train.micro-batch 2",
    "estimate galore --method.gap 5 --gpu-memory 24GiB --ranks 2 --json",
    "estimate sltrain --method.density 0.1 --model.preset llama-60m --train.seq-len 64",
    "eval run --batch-size 4 --legacy --data x --device cpu", "resume run", "recipes loro-60m-loro",
    "export run --out x --form factorised", "compare c.toml --out x --workers 2", "methods",
    "data prepare x --out y --vocab-size 300 --held-out 0.1 --weights 1", "train vera --help",
]  # fmt: skip


def run_files(outcome: Callable[[list[str]], str], corpus: Path, folder: Path, n: int, seed: int
              ) -> Counter[str]:  # fmt: skip
    rng, found = random.Random(seed), Counter[str]()
    known, path = files(corpus, folder), folder / "f.toml"
    for case in range(n):
        command, text = rng.choice(known)
        path.write_bytes(mutated_file(text, rng))
        rest = ["--out", "x"] if command == "compare" else []
        named = ["--config", str(path)] if command == "train" else [str(path)]
        try:
            found[outcome([command, *named, *rest])] += 1
        except (Exception, Hangs) as error:
            raise AssertionError(f"seed {seed}, case {case}: {path.read_bytes()!r}") from error
    return found


def run_lines(outcome: Callable[[list[str]], str], n: int, seed: int) -> Counter[str]:
    rng, found = random.Random(seed), Counter[str]()
    for case in range(n):
        args = mutated_line(rng.choice(LINES).split(), rng)
        try:
            found[outcome(args)] += 1
        except (Exception, Hangs) as error:
            raise AssertionError(f"seed {seed}, case {case}: {args!r}") from error
    return found


def test_mutated_files_and_lines(
    outcome: Callable[[list[str]], str], corpus: Path, tmp_path: Path
) -> None:
    assert len(run_files(outcome, corpus, tmp_path, 24, seed=0)) == 2
    assert run_lines(outcome, 6, seed=0)["refused"] >= 1


@pytest.mark.slow
def test_two_hundred_mutated_files_and_fifty_lines(
    outcome: Callable[[list[str]], str], corpus: Path, tmp_path: Path
) -> None:
    assert sum(run_files(outcome, corpus, tmp_path, 200, seed=2).values()) == 200
    assert sum(run_lines(outcome, 50, seed=2).values()) == 50


@pytest.mark.slow
def test_a_thousand_mutated_files(
    outcome: Callable[[list[str]], str], corpus: Path, tmp_path: Path
) -> None:
    found = run_files(outcome, corpus, tmp_path, 1000, seed=1)
    assert found["accepted"] + found["refused"] == 1000 and min(found.values()) >= 100


@pytest.mark.slow
def test_five_hundred_mutated_lines(outcome: Callable[[list[str]], str]) -> None:
    found = run_lines(outcome, 500, seed=1)
    assert found["refused"] >= 100 and found["accepted"] >= 1
