"""Loggers: they get the rows of metrics.jsonl, and nothing that they do reaches the training."""

import threading
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest
from support import Killed, kill_at, rows, tiny, untimed, write_grid

import peptrain.loggers
import peptrain.loggers.sending as sending
from peptrain.comparison.compare import compare
from peptrain.comparison.grid import load_grid
from peptrain.errors import ConfigError, Diverged
from peptrain.loggers import LOGGERS, chosen, loggers
from peptrain.loggers.base import Logger, scalars
from peptrain.runs.directory import RunDir
from peptrain.sections import TrainConfig
from peptrain.testing import differences, newest
from peptrain.training.loop import resume, train

EVERY = {"checkpoint_every": 2, "eval_every": 2}


class Kept(Logger):
    """Keeps what it is told, and whether the row was written before."""

    name: ClassVar[str] = "kept"
    told: ClassVar[list[Any]] = []

    def open(self, run: Path, config: Mapping[str, Any], step: int) -> None:
        self.told.append(("open", run, config, step))
        self._run = RunDir(run)

    def log(self, row: Mapping[str, Any]) -> None:
        assert dict(row) in list(self._run.metrics())
        self.told.append(dict(row))
        row.clear()  # type: ignore[attr-defined]

    def close(self) -> None:
        self.told.append("closed")


class Failing(Logger):
    """Fails where it is told to."""

    name: ClassVar[str] = "failing"
    at: ClassVar[str] = ""
    error: ClassVar[BaseException] = RuntimeError("no\nroom")

    def open(self, run: Path, config: Mapping[str, Any], step: int) -> None:
        self._fail("open")

    def log(self, row: Mapping[str, Any]) -> None:
        self._fail("log")

    def close(self) -> None:
        self._fail("close")

    def _fail(self, at: str) -> None:
        if at == self.at:
            raise self.error


class Hanging(Failing):
    """Waits forever in the place of failing."""

    name: ClassVar[str] = "hanging"
    until: ClassVar[threading.Event] = threading.Event()

    def _fail(self, at: str) -> None:
        if at == self.at:
            self.until.wait()


@pytest.fixture(autouse=True)
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for cls in (Kept, Failing, Hanging):
        monkeypatch.setitem(LOGGERS, cls.name, cls)
    monkeypatch.setattr(Kept, "told", [])
    monkeypatch.setattr(Hanging, "until", threading.Event())


@pytest.fixture(scope="module")
def without(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that no logger sees."""
    return train(tiny("loro", corpus, tmp_path_factory.mktemp("without") / "run")).run


def same_run(run: Path, other: Path) -> None:
    assert untimed(run) == untimed(other)
    assert differences(newest(run), newest(other)) == []


def test_it_gets_every_row_in_order_after_it_was_written(corpus: Path, tmp_path: Path) -> None:
    seen: list[Any] = []
    run = train(tiny("loro", corpus, tmp_path / "run", train={"log_to": "kept"}), seen.append).run
    (_, where, config, step), *told, closed = Kept.told
    assert (where, step, closed) == (run, 0, "closed")
    assert config["method"]["name"] == "loro" and config["train"]["log_to"] == "kept"
    assert told == list(RunDir(run).metrics()) and len(told) > 8
    assert [row for row in seen if row["event"] not in ("start", "evaluating")] == told
    resume(run)
    assert Kept.told[-1] == "closed" and len(Kept.told) == len(told) + 2, "it was only evaluated"


@pytest.mark.parametrize("at", ["open", "log", "close"])
@pytest.mark.parametrize("error", [RuntimeError("no\nroom"), SystemExit(3)], ids=["error", "exit"])
def test_one_that_fails_is_off_after_one_line_and_the_run_is_the_same(
    at: str,
    error: BaseException,
    corpus: Path,
    without: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(Failing, "at", at)
    monkeypatch.setattr(Failing, "error", error)
    run = train(tiny("loro", corpus, tmp_path / "run", train={"log_to": "failing,kept"})).run
    same_run(run, without)
    said = [record.getMessage() for record in caplog.records if "failing" in record.getMessage()]
    why = f"{type(error).__name__}: {error}"
    assert said == [f"train.log_to: failing is off and the run continues without it: {why}"]
    assert Kept.told[1:-1] == list(RunDir(run).metrics()), "the other one goes on"


@pytest.mark.parametrize("at", ["open", "log", "close"])
def test_one_that_hangs_is_left_behind(
    at: str,
    corpus: Path,
    without: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(sending, "OPENING" if at == "open" else "CLOSING", 0.05)
    monkeypatch.setattr(Hanging, "at", at)
    run = train(tiny("loro", corpus, tmp_path / "run", train={"log_to": "hanging"})).run
    Hanging.until.set()
    same_run(run, without)
    said = [record.getMessage() for record in caplog.records if "hanging" in record.getMessage()]
    assert len(said) == 1 and f"did not {'open' if at == 'open' else 'close'} within" in said[0]


def test_rows_do_not_pile_up_for_one_that_takes_none(
    corpus: Path,
    without: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(sending, "WAITING", 3)
    monkeypatch.setattr(Hanging, "at", "log")
    run = train(tiny("loro", corpus, tmp_path / "run", train={"log_to": "hanging"})).run
    Hanging.until.set()
    same_run(run, without)
    assert caplog.text.count("has not taken the last 3 rows") == 1


def test_a_run_that_diverges_closes_them(corpus: Path, tmp_path: Path) -> None:
    config = tiny(
        "full", corpus, tmp_path / "run", train={"log_to": "kept"}, optim={"lr": 1e30, "clip": 0}
    )
    with pytest.raises(Diverged):
        train(config)
    assert Kept.told[-2]["event"] == "diverged" and Kept.told[-1] == "closed"


@pytest.mark.parametrize(
    "names, message",
    [
        ("tensorbord", r"unknown logger 'tensorbord'; did you mean 'tensorboard'\? choose from"),
        ("kept,nothing-like-it", r"unknown logger 'nothing-like-it'; choose from tensorboard, .*"
                                 r"pip install 'peptrain\[NAME\]'"),
        ("wandb", r"wandb needs the package wandb; install it with `pip install 'peptrain\[wandb"),
    ],
)  # fmt: skip
def test_what_can_not_be_used_is_refused_before_anything_is_written(
    names: str, message: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peptrain.loggers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"^train\.log_to: {message}"):
        train(tiny("loro", corpus, tmp_path / "run", train={"log_to": names}))
    grid = write_grid(tmp_path, corpus, {"method.name": "full", "train.log_to": names})
    with pytest.raises(ConfigError, match=message):
        compare(grid, tmp_path / "out")
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()
    assert Kept.told == []


@pytest.mark.parametrize("given", ["a b", ",", "tensorboard,", "a;b", "../x"])
def test_a_list_of_names_is_one(given: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.log_to: must be names of loggers such as"):
        TrainConfig(log_to=given)


def test_names_are_separated_by_commas_and_count_once() -> None:
    assert chosen("") == []
    assert chosen("kept , failing,kept") == [Kept, Failing]


class NoName(Logger):
    """Has no name."""


class Bare(Logger):
    """Has a name and nothing else."""

    name: ClassVar[str] = "bare"


class Demanding(Kept):
    """Needs an argument."""

    name: ClassVar[str] = "demanding"

    def __init__(self, argument: str) -> None:
        raise AssertionError(argument)


class Own(Kept):
    """As another package would have it."""

    name: ClassVar[str] = "own"


class Impostor(Kept):
    """Has the name of a built-in one."""

    name: ClassVar[str] = "tensorboard"


def test_a_bad_plugin_is_named_and_takes_nothing_along(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    offered = {"own": "Own", "bare": "Bare", "none": "NoName", "demanding": "Demanding"}
    offered |= {"other": "Own", "tensorboard": "Impostor", "text": "EVERY", "gone": "Gone"}
    entries = [EntryPoint(k, f"{__name__}:{v}", "peptrain.loggers") for k, v in offered.items()]
    monkeypatch.setattr(peptrain.loggers, "entry_points", lambda group: entries)
    before = dict(LOGGERS)
    assert loggers() == {**before, "own": Own}
    assert loggers()["tensorboard"] is before["tensorboard"]
    said = caplog.text
    for name, why in {
        "bare": "must define `open` and `log`",
        "none": "its class has the name None",
        "demanding": "cannot be created without arguments",
        "other": "its class has the name 'own' and its entry point 'other'",
        "tensorboard": "already has a logger 'tensorboard'",
        "text": "not a subclass of peptrain.loggers.base.Logger",
        "gone": "cannot be imported: AttributeError",
    }.items():
        assert said.count(f"logger '{name}' ({__name__}:{offered[name]}) is skipped: ") == 1, name
        assert why in said, name


def test_it_may_change_at_a_resume(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Killed):
        train(tiny("loro", corpus, run, train=EVERY), kill_at("step", 5))
    file = run / "config.toml"
    file.write_text(file.read_text().replace('log_to = ""', 'log_to = "kept"'))
    resume(run)
    assert "train.log_to from '' to 'kept'" in caplog.text
    (_, _, _, step), *told, _ = Kept.told
    assert step == 4 and [r["step"] for r in told if r["event"] == "step"] == [5, 6, 7, 8]


def test_a_comparison_keeps_its_runs_when_a_logger_is_added(corpus: Path, tmp_path: Path) -> None:
    names = []
    for log_to in ("", "kept"):
        base = {"train.log_to": log_to} if log_to else {}
        grid = load_grid(write_grid(tmp_path, corpus, {"method.name": ["full", "loro"]}, **base))
        assert {run.config.train.log_to for run in grid.runs} == {log_to}
        names.append([run.name for run in grid.runs])
    assert names[0] == names[1]


def test_a_curve_has_the_name_of_its_value_and_what_is_no_number_none() -> None:
    clocks = {"time": 1.0, "seconds": 2.0, "device_hours": 3.0}
    step = {"event": "step", "step": 3, "loss": 1.5, "merges": 2, "odd": None, "on": True, **clocks}
    assert scalars(step) == {"train/loss": 1.5, "train/merges": 2.0, "train/seconds": 2.0,
                             "train/device_hours": 3.0}  # fmt: skip
    end = {"event": "end", "step": 3, "held_out_loss": 2.0, "trainable": 5, **clocks}
    assert scalars(end) == {"eval/held_out_loss": 2.0, "end/trainable": 5.0}
    seen = {"event": "dynamics", "step": 3, "layer": 0, "module": "q_proj", "what": "update"}
    assert scalars({**seen, "rank": 7, **clocks}) == {"dynamics/update/0.q_proj/rank": 7.0}
    assert scalars({"event": "phase", "step": 3, "trainable": 5}) == {}


def test_tensorboard_has_one_series_of_a_killed_and_resumed_run(
    corpus: Path, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, settings = tmp_path / "run", EVERY | {"log_to": "tensorboard"}
    for stop in (5, 7, 8):  # after the checkpoints of 4 and 6, and in the last evaluation
        with pytest.raises(Killed):
            if run.exists():
                resume(run, kill_at("checkpoint" if stop == 8 else "step", stop))
            else:
                train(tiny("loro", corpus, run, train=settings), kill_at("step", stop))
    resume(run)
    resume(run)
    assert len(list((run / "tensorboard").iterdir())) >= 4
    found = EventAccumulator(str(run / "tensorboard"), purge_orphaned_data=True)
    found.Reload()

    def series(tag: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in found.Scalars(tag)]

    def written(event: str, key: str) -> list[tuple[int, Any]]:
        return [(r["step"], pytest.approx(r[key], rel=1e-6)) for r in rows(run, event) if key in r]

    for key in ("loss", "lr", "grad_norm", "tokens", "exact_steps"):
        assert series(f"train/{key}") == written("step", key), key
    evaluated = [*written("eval", "held_out_loss"), *written("end", "held_out_loss")]
    assert series("eval/held_out_loss") == evaluated and len(evaluated) == 4
    assert len(found.Tags()["tensors"]) == 1, "the configuration, once"


def test_tensorboard_writes_through_no_link(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with pytest.raises(Killed):
        train(tiny("loro", corpus, run, train=EVERY | {"log_to": "kept"}), kill_at("step", 5))
    (run / "tensorboard").symlink_to(elsewhere)
    from peptrain.loggers.tensorboard import TensorBoard

    with pytest.raises(OSError, match="is a link, which is never followed"):
        TensorBoard().open(run, {}, 0)
    assert list(elsewhere.iterdir()) == []
