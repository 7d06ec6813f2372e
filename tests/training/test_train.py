"""The trainer: what it refuses, how it stops, and what it leaves."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ALONE, VECTORS, Killed, rows, tiny
from torch import Tensor

import peptrain.execution.loss
import peptrain.training.loop as trainer
import peptrain.training.objective
from peptrain.config import load
from peptrain.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Diverged,
    Interrupted,
    PeptrainError,
    Unsupported,
)
from peptrain.methods import METHODS
from peptrain.ops.cross_entropy import linear_cross_entropy
from peptrain.runs.build import open_run
from peptrain.runs.checkpoint import available
from peptrain.runs.directory import NEW, RunDir, first_free
from peptrain.testing import MODEL, STEPS, TRAIN, differences, losses, newest, small_corpus
from peptrain.training.loop import resume, train
from peptrain.training.metrics import MetricsLog, silent, throughput
from peptrain.training.state import all_finite

EACH = {"checkpoint_every": 1, "keep": 99}

# The run directory.


def test_a_run_directory_has_the_four_promised_things(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "deep" / "down" / "run"
    seen: list[dict[str, Any]] = []
    result = train(
        tiny("bpt", corpus, run, train={"eval_every": 4}), lambda row: seen.append(dict(row))
    )
    assert {"config.toml", "env.json", "metrics.jsonl", "checkpoints"} <= {
        p.name for p in run.iterdir()
    }
    told = [row for row in seen if row["event"] != "evaluating"]
    assert told[0]["event"] == "start" and told[1:] == list(RunDir(run).metrics())
    assert [row["step"] for row in rows(run, "eval")] == [4]
    (end,) = rows(run, "end")
    assert end["step"] == STEPS and end["held_out_loss"] == result.held_out.loss
    assert end["perplexity"] == pytest.approx(math.exp(end["held_out_loss"]))
    assert result.run == run and 0 < result.trainable < result.parameters
    last = rows(run)[-1]
    assert last["tokens"] == STEPS * TRAIN["batch_size"] * TRAIN["seq_len"]
    assert last["tokens_per_second"] > 0 and last["grad_norm"] > 0 and last["lr"] == 2e-3


def test_without_a_name_a_run_takes_the_first_free_number(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    taken = [train(tiny("full", corpus, train={"steps": 2})).run for _ in range(2)]
    assert taken == [Path("runs/full-1"), Path("runs/full-2")]
    assert all(path.is_dir() for path in taken)


def test_a_free_name_is_taken_at_once(tmp_path: Path) -> None:
    """Of runs that start together each has its own; seconds pass before one has files."""
    assert [first_free(tmp_path / "runs", "full").name for _ in range(2)] == ["full-1", "full-2"]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"file/full-1: can't be written: Not a directory"):
        first_free(tmp_path / "file", "full")


def test_of_two_processes_that_make_one_run_the_first_has_it(tmp_path: Path) -> None:
    path = tmp_path / "run"

    def second() -> None:
        with RunDir.create(path, "slower", lambda run: None):
            pass

    def while_the_first_fills(run: RunDir) -> None:
        with pytest.raises(CheckpointError, match=r"run: in use by process \d+ on .* since 20"):
            second()

    with RunDir.create(path, "quicker", while_the_first_fills):
        pass
    with pytest.raises(CheckpointError, match=r"--run .*run: exists and is never overwritten"):
        second()
    assert (path / "config.toml").read_text() == "quicker"
    assert {p.name for p in path.iterdir()} == {"config.toml", "checkpoints"}


def test_an_existing_directory_is_never_touched(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(CheckpointError, match=r"never overwritten; choose another$"):
        train(tiny("full", corpus, tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(CheckpointError, match="exists"):
        train(tiny("full", corpus, tmp_path / "mine.txt"))
    assert (tmp_path / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize("place", ["empty", "mounted", "link", "dangling"])
def test_an_empty_directory_is_filled_in_place(place: str, corpus: Path, tmp_path: Path) -> None:
    """A mount point can't be replaced, and ext4 puts lost+found into it."""
    run, made = tmp_path / place, tmp_path / "made"
    made.mkdir()
    if place == "mounted":
        (made / "lost+found").mkdir()
    elif place == "dangling":
        made.rmdir()
    run.symlink_to(made) if place in ("link", "dangling") else made.rename(run)
    before = run.stat().st_ino if run.exists() else None
    train(tiny("full", corpus, run, train={"steps": 1}))
    assert len(losses(run)) == 1 and before in (None, run.stat().st_ino)
    assert run.is_symlink() == (place in ("link", "dangling"))
    assert len(list(tmp_path.iterdir())) == 1 + run.is_symlink()


@pytest.mark.parametrize("killed", ["start", "tokenizer", "the end"])
def test_a_creation_that_was_killed_is_no_hindrance(
    killed: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def struck(*_: Any) -> None:
        raise Killed

    def fill(made: RunDir) -> None:
        if killed == "start":
            raise Killed
        made.tokenizer.mkdir()
        if killed == "tokenizer":
            raise Killed
        made.model_file.touch()
        monkeypatch.setattr(Path, "replace", struck)

    with pytest.raises(Killed), RunDir.create(run, "[method]", fill):
        pass
    monkeypatch.undo()
    (run / "lock").write_text("")
    assert not (run / "config.toml").exists()
    train(tiny("full", corpus, run, train={"steps": 1}))
    assert len(losses(run)) == 1 and not list(run.glob(".*"))


def test_a_run_is_not_created_past_a_directory_that_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "missing" / ".." / "run"
    with (
        pytest.raises(CheckpointError, match=r"--run .*run: .*missing is not a directory"),
        RunDir.create(path, "", lambda run: None),
    ):
        pass
    assert not list(tmp_path.iterdir())
    (tmp_path / "missing").mkdir()
    with RunDir.create(path, "", lambda run: None):
        pass
    assert (tmp_path / "run" / "config.toml").is_file()


def test_what_is_not_ours_is_kept_after_a_killed_creation(corpus: Path, tmp_path: Path) -> None:
    for name in (NEW, "mine.txt"):
        (tmp_path / name).write_text("precious")
    with pytest.raises(CheckpointError, match="exists and is never overwritten"):
        train(tiny("full", corpus, tmp_path))
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == dict.fromkeys(
        (NEW, "mine.txt"), "precious"
    )


def test_a_directory_that_cannot_be_made_is_named(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"--run .*file/run: can't be written: Not a dir"):
        train(tiny("full", corpus, tmp_path / "file" / "run"))
    assert (tmp_path / "file").read_text() == "in the way"


def small_data(folder: Path) -> Path:
    return small_corpus(folder, words=40)


REFUSED: dict[str, tuple[dict[str, Any], type[PeptrainError], str]] = {
    "a vocabulary too small": (
        {"model": {"vocab_size": 290}},
        ConfigError,
        r"model\.vocab_size: too small for token id 299 in .* \(got 290\); set it to 300",
    ),
    "sequences too long": (
        {"train": {"seq_len": 100_000}},
        DataError,
        r"training tokens don't fill one window of 100000 \+ 1",
    ),
    "a micro-batch that doesn't divide": (
        {"train": {"micro_batch": 3}},
        ConfigError,
        r"train\.micro_batch: must be a divisor of the 4 rows",
    ),
    "a warm-up as long as the run": (
        {"schedule": {"warmup": STEPS}},
        ConfigError,
        r"schedule\.warmup: must be less than the 8 steps of the run \(got 8\)",
    ),
    "heads that don't divide": (
        {"model": {"heads": 3}},
        ConfigError,
        r"model\.hidden_size: must be an even multiple of the 3 attention heads",
    ),
    "key heads that don't divide": (
        {"model": {"heads": 4, "kv_heads": 3}},
        ConfigError,
        r"model\.kv_heads: must be a divisor .*got 3",
    ),
    "no key heads": ({"model": {"kv_heads": 0}}, ConfigError, r"model\.kv_heads: .*got 0"),
    "heads of odd width": (
        {"model": {"hidden_size": 18, "heads": 2}},
        ConfigError,
        r"model\.hidden_size: must be an even multiple of the 2 attention heads",
    ),
    "an absent config.json": (
        {"model": dict.fromkeys(MODEL) | {"config": Path("/nowhere")}},
        ConfigError,
        r"model\.config: /nowhere does not exist",
    ),
    "no GPU": ({"train": {"device": "cuda"}}, Unsupported, r"train\.device: cuda .* no GPU"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_refused_leaves_no_run_directory(
    why: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections, error, message = REFUSED[why]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(error, match=message):
        train(tiny("full", corpus, tmp_path / "run", **sections))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "broken",
    [
        "not JSON",
        '{"model_type": "no-such-model"}',
        '{"model_type": "llama", "hidden_size": 18, "num_attention_heads": 2}',
        '{"model_type": "llama", "hidden_size": "wide"}',
        '{"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 3}',
        '{"model_type": "gpt2", "n_embd": 16, "n_head": 2, "n_positions": 8}',
    ],
)
def test_a_broken_config_json_is_an_error_for_the_user(
    broken: str, corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(broken)
    model = dict.fromkeys(MODEL) | {"config": tmp_path}
    with pytest.raises(ConfigError, match=r"model\.(config|kv_heads): |train\.seq_len: must "):
        train(tiny("full", corpus, tmp_path / "run", model=model))
    assert not (tmp_path / "run").exists()


BERT = {"model_type": "bert", "hidden_size": 16, "intermediate_size": 24, "vocab_size": 320}
BERT |= {"num_hidden_layers": 2, "num_attention_heads": 2}


def test_a_model_that_sees_later_tokens_is_refused(corpus: Path, tmp_path: Path) -> None:
    """Its loss would be low, and worth nothing."""
    file = tmp_path / "bert.json"
    model = dict.fromkeys(MODEL) | {"config": file}
    file.write_text(json.dumps(BERT))
    with pytest.raises(Unsupported, match="lets a token see those after it"):
        train(tiny("full", corpus, tmp_path / "run", model=model))
    assert not (tmp_path / "run").exists()
    file.write_text(json.dumps(BERT | {"is_decoder": True}))
    train(tiny("full", corpus, tmp_path / "run", model=model))


def test_a_run_keeps_its_own_config_json(corpus: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    shape = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "vocab_size": 320}
    file.write_text(json.dumps(shape | {"num_hidden_layers": 1, "num_attention_heads": 2}))
    model = dict.fromkeys(MODEL) | {"config": file}
    run = tmp_path / "run"
    train(tiny("full", corpus, run, model=model))
    file.unlink()
    resume(run)
    assert open_run(run).model.config.num_hidden_layers == 1
    own = RunDir(run).model_file
    own.write_text(own.read_text().replace("24", "32"))
    with pytest.raises(CheckpointError, match=r"model\.config: "):
        resume(run)


def test_a_kill_while_a_run_directory_is_made_leaves_no_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("full", corpus, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(peptrain.training.objective, "write_run_tokenizer", kill)
        train(config)
    with pytest.raises(CheckpointError, match="not a run directory"):
        RunDir.open(tmp_path / "run")
    train(config)
    assert RunDir(tmp_path / "run").tokenizer.is_dir()


def kill(*ignored: object) -> None:
    raise Killed


def test_data_that_is_not_there_leaves_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a prepared corpus"):
        train(tiny("full", tmp_path / "nothing", tmp_path / "run"))
    with pytest.raises(DataError, match=r"training tokens don't fill one window"):
        train(tiny("full", small_data(tmp_path), tmp_path / "run", train={"seq_len": 400}))
    assert not (tmp_path / "run").exists()


def test_a_run_of_one_step_needs_no_settings(corpus: Path, tmp_path: Path) -> None:
    defaults = {"kind": None, "warmup": None}
    config = tiny("bpt", corpus, tmp_path / "run", schedule=defaults, train={"steps": 1})
    assert train(config).held_out.tokens > 0
    assert losses(tmp_path / "run")[0][0] == 1


# Divergence.


def spoiled(step: int, spoil: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """The loss, spoiled at the `step`-th batch."""
    calls = iter(range(1, 100))

    def loss(*arguments: Any, **named: Any) -> Tensor:
        value = linear_cross_entropy(*arguments, **named)
        return spoil(value) if next(calls) == step else value

    return loss


def no_number(loss: Tensor) -> Tensor:
    return loss * math.nan


def infinite(loss: Tensor) -> Tensor:
    return loss + math.inf


def no_gradient(loss: Tensor) -> Tensor:
    """Finite, with a NaN for its gradient: 0 * infinity, the slope of the root at 0."""
    return loss + (loss * 0).sqrt()


def assert_all_finite(run: Path) -> None:
    for path in available(RunDir(run).checkpoints):
        saved = peptrain.runs.checkpoint.read(path)
        for n, tensor in {**saved.model, **saved.optimizer}.items():
            assert tensor.isfinite().all(), (path.name, n)


@pytest.mark.parametrize("spoil", [no_number, infinite, no_gradient])
@pytest.mark.parametrize("log_every", [1, 100])
def test_divergence_names_the_step_the_rate_and_the_last_good_checkpoint(
    log_every: int,
    spoil: Callable[[Tensor], Tensor],
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peptrain.execution.loss, "linear_cross_entropy", spoiled(6, spoil))
    run, often = tmp_path / "run", {"checkpoint_every": 4, "log_every": log_every}
    with pytest.raises(Diverged) as caught:
        train(tiny("bpt", corpus, run, train=often))
    message = str(caught.value)
    assert message.startswith("step 6: the loss is ") and "learning rate of 0.002" in message
    assert f"the last good checkpoint is {run / 'checkpoints' / 'step-00000004'}" in message
    assert f"--continue-from {run}@4 --optim.lr LR" in message
    assert newest(run).step == 4
    assert_all_finite(run)
    assert all(math.isfinite(row["loss"]) for row in rows(run))
    monkeypatch.undo()
    resume(run)
    assert [step for step, _ in losses(run)][-1] == STEPS


def steep(loss: Tensor) -> Tensor:
    """The same loss with 1e25 times its gradient, whose square is infinite in fp32."""
    return loss.detach() + 1e25 * (loss - loss.detach())


@pytest.mark.parametrize("name", ["full", "galore"])
def test_moments_that_are_not_finite_are_never_saved(
    name: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between rows and without clipping, loss and weights stay finite: v is infinite, m / sqrt(v)
    is 0, and the elements of v never move again."""
    monkeypatch.setattr(peptrain.execution.loss, "linear_cross_entropy", spoiled(6, steep))
    run, rarely = tmp_path / "run", {"checkpoint_every": 4, "log_every": 100, "precision": "fp32"}
    with pytest.raises(Diverged, match=r"step 8: a moment is not finite at a learning rate of \d"):
        train(tiny(name, corpus, run, train=rarely, optim={"clip": 0.0}))
    assert newest(run).step == 4
    assert_all_finite(run)
    assert [row["step"] for row in rows(run, "diverged")] == [8]


def test_finite_is_told_for_every_dtype() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        good = [torch.full((3, 2), torch.finfo(dtype).max, dtype=dtype), torch.zeros(0), 3, "text"]
        assert all_finite([*good, torch.tensor([7]), torch.ones((), dtype=torch.bool)])
        for bad in (math.nan, math.inf, -math.inf):
            for where in range(6):
                spoilt = good[0].clone()
                spoilt.view(-1)[where] = bad
                assert not all_finite([*good, spoilt])
    assert all_finite([])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("lr", [1e30, 3e38])
def test_an_absurd_learning_rate_leaves_no_broken_checkpoint(
    lr: float, name: str, corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = {"optim": {"lr": lr}, "train": {**EACH, "precision": "fp32"}}
    with pytest.raises(Diverged, match=r"step \d: .*rate of \d.*checkpoint.*optim\.lr"):
        train(tiny(name, corpus, run, **settings))
    assert_all_finite(run)


def test_an_absurd_learning_rate_of_muon_is_told_too(corpus: Path, tmp_path: Path) -> None:
    settings = {"optim": {"kind": "muon", "lr": 3e38}, "train": {**EACH, "precision": "fp32"}}
    with pytest.raises(Diverged, match=r"step \d: .*rate of \d.*checkpoint.*optim\.lr"):
        train(tiny("full", corpus, tmp_path / "run", **settings))
    assert_all_finite(tmp_path / "run")


# Stopping.

WAITING = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from support import tiny
from peptrain.errors import Interrupted
from peptrain.training.loop import train

def observe(row):
    print(row["event"], flush=True)
    if row["event"] == "step" and row["step"] == 1:
        sys.stdin.readline()  # until the signal has been sent

corpus, *runs = map(Path, sys.argv[1:])
for run in runs:
    try:
        train(tiny("bpt", corpus, run, train={"checkpoint_every": 0}), observe)
    except Interrupted as stopped:
        print(stopped, stopped.code, flush=True)
"""


@pytest.mark.usefixtures("signals")
def test_signals_save_first(corpus: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    train(tiny("bpt", corpus, whole, train={"checkpoint_every": 0}))
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    wishes = {number: tmp_path / number.name for number in numbers}
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, str(corpus), *map(str, wishes.values())],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stdout
    for number, run in wishes.items():
        heard = iter(process.stdout.readline, "")
        assert "step\n" in heard
        process.send_signal(number)
        print(file=process.stdin, flush=True)
        said = next(line for line in heard if line.startswith("stopped"))
        step = newest(run).step
        assert step == 2, "after the step that follows"
        assert said.startswith(f"stopped and saved at step {step} of {STEPS}")
        code = 130 if number == signal.SIGINT else os.EX_TEMPFAIL
        assert said.endswith(f"`peptrain resume {run}` {code}\n")
    assert process.wait(900) == 0
    for run in wishes.values():
        resume(run)
        assert differences(newest(run), newest(whole)) == []
        assert losses(run) == losses(whole)


def at_step(step: int, act: Callable[[], None]) -> Callable[[Any], None]:
    return lambda row: act() if row["event"] == "step" and row["step"] == step else None


def asked_to_stop(loss: Tensor) -> Tensor:
    signal.raise_signal(signal.SIGTERM)
    return loss


@pytest.mark.parametrize("step", [STEPS - 1, STEPS])
def test_a_wish_to_stop_in_the_last_step_is_no_interruption(
    step: int, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = spoiled(step, asked_to_stop)
    monkeypatch.setattr(peptrain.execution.loss, "linear_cross_entropy", loss)
    config = tiny("full", corpus, tmp_path / "run", train={"checkpoint_every": 0})
    if step < STEPS:
        with pytest.raises(Interrupted, match=f"saved at step {step} of"):
            train(config)
    else:
        assert train(config).held_out.tokens > 0
    assert newest(tmp_path / "run").step == step


@pytest.mark.usefixtures("signals")
def test_the_handlers_come_back_and_a_second_ctrl_c_acts_at_once(
    corpus: Path, tmp_path: Path
) -> None:
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tiny("full", corpus, tmp_path / "run"), at_step(3, twice))
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    once = at_step(3, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted):
        train(tiny("full", corpus, tmp_path / "other"), once)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.usefixtures("signals")
def test_ctrl_c_is_answered_before_the_step_ends(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step may take minutes. Other signals are the system's, which reads no answer."""
    real, said = trainer.advance, list[str]()

    def advance(state: Any, *given: Any) -> Any:
        if state.step == 2:
            signal.raise_signal(number)
            said.append(capfd.readouterr().err)
        return real(state, *given)

    monkeypatch.setattr(trainer, "advance", advance)
    for number in (signal.SIGINT, signal.SIGTERM):
        with pytest.raises(Interrupted, match="stopped and saved at step 3"):
            train(tiny("full", corpus, tmp_path / f"{number}"))
    assert said == [f"\n{trainer.STOPPING}\n", ""]


@pytest.mark.usefixtures("signals")
def test_a_signal_that_is_ignored_or_used_by_others_is_left_alone(
    corpus: Path, tmp_path: Path
) -> None:
    """As under nohup, and in a program that has a handler."""
    called: list[int] = []
    before = [signal.signal(signal.SIGHUP, signal.SIG_IGN)]
    before += [signal.signal(signal.SIGUSR1, lambda number, frame: called.append(number))]

    def both() -> None:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGUSR1)

    try:
        train(tiny("full", corpus, tmp_path / "run"), at_step(3, both))
    finally:
        for number, handler in zip((signal.SIGHUP, signal.SIGUSR1), before, strict=True):
            signal.signal(number, handler)
    assert len(losses(tmp_path / "run")) == STEPS and called == [signal.SIGUSR1]


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.parametrize("where", ["_evaluate", "restore"])
def test_a_signal_outside_of_the_steps_stops_at_once(
    where: str, number: int, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(trainer, where)

    def struck(*given: Any, **named: Any) -> Any:
        signal.raise_signal(number)
        return real(*given, **named)

    monkeypatch.setattr(trainer, where, struck)
    with pytest.raises(Interrupted, match="stopped before") as stopped:
        train(tiny("full", corpus, tmp_path / "run", train={"steps": 1}))
    assert stopped.value.code == os.EX_TEMPFAIL
    monkeypatch.undo()
    if where == "_evaluate":
        assert newest(tmp_path / "run").step == 1
        resume(tmp_path / "run")
    assert len(rows(tmp_path / "run", "end")) == (where == "_evaluate")


def test_a_training_runs_in_a_thread_too(corpus: Path, tmp_path: Path) -> None:
    config = tiny("full", corpus, tmp_path / "run", train={"steps": 1})
    thread = threading.Thread(target=train, args=(config,))
    thread.start()
    thread.join()
    assert len(rows(tmp_path / "run", "end")) == 1


# The arithmetic of a run.


def final(run: Path) -> dict[str, Tensor]:
    return newest(run).model


@pytest.mark.parametrize("name", METHODS)
def test_accumulation_is_one_big_batch(name: str, corpus: Path, tmp_path: Path) -> None:
    ends = {}
    for micro in (1, 2, 4):
        train(tiny(name, corpus, tmp_path / str(micro), train={"micro_batch": micro}))
        ends[micro] = final(tmp_path / str(micro))
    for n, weight in ends[4].items():
        for micro in (1, 2):
            torch.testing.assert_close(ends[micro][n], weight, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", METHODS)
def test_the_configuration_of_a_run_replays_it(name: str, corpus: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    schedule = {"kind": None, "warmup": None}
    train(tiny(name, corpus, one, schedule=schedule, train={"precision": None}))
    shutil.move(one / "config.toml", tmp_path / "saved.toml")
    replay = load(tmp_path / "saved.toml")
    assert replay.run is None
    object.__setattr__(replay, "run", other)
    train(replay)
    assert differences(newest(one), newest(other)) == []
    assert losses(one) == losses(other)
    assert (other / "config.toml").read_text() == (tmp_path / "saved.toml").read_text()


def test_the_seed_decides(corpus: Path, tmp_path: Path) -> None:
    for i, seed in enumerate((0, 0, 1)):
        torch.manual_seed(i)  # the caller's own stream doesn't
        train(tiny("bpt", corpus, tmp_path / str(i), train={"seed": seed}))
    assert losses(tmp_path / "0") == losses(tmp_path / "1") != losses(tmp_path / "2")


@pytest.mark.parametrize("name", METHODS)
def test_looking_at_a_training_changes_no_bit(name: str, corpus: Path, tmp_path: Path) -> None:
    often = {"eval_every": 1, "eval_tokens": 64, "checkpoint_every": 1, "log_every": 1}
    never = {"eval_every": 0, "checkpoint_every": 0, "log_every": 100}
    for train_settings, run in ((often, "often"), (never, "never")):
        train(tiny(name, corpus, tmp_path / run, train=train_settings))
    assert differences(newest(tmp_path / "often"), newest(tmp_path / "never")) == []


def test_an_observer_is_told_how_far_an_evaluation_is(corpus: Path, tmp_path: Path) -> None:
    """Which no row of metrics.jsonl says."""
    seen: list[Mapping[str, Any]] = []
    settings = {"eval_every": 4, "eval_tokens": 64, "seq_len": 16}
    train(tiny("full", corpus, tmp_path / "run", train=settings), seen.append)
    told = [row for row in seen if row["event"] == "evaluating"]
    assert [row["step"] for row in told[:2]] == [4, 8]
    assert (told[0]["tokens_done"], told[0]["tokens_total"]) == (64, 64)
    (end,) = rows(tmp_path / "run", "end")
    assert told[-1]["tokens_done"] == told[-1]["tokens_total"] == end["held_out_tokens"]
    events = [row["event"] for row in seen if row["event"] not in ("start", "evaluating")]
    assert [row["event"] for row in RunDir(tmp_path / "run").metrics()] == events


@pytest.mark.parametrize("name", METHODS)
def test_recomputed_activations_change_no_loss(name: str, corpus: Path, tmp_path: Path) -> None:
    for recompute in (False, True):
        settings = {"checkpoint_activations": recompute}
        train(tiny(name, corpus, tmp_path / str(recompute), train=settings))
    assert losses(tmp_path / "True") == losses(tmp_path / "False")


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_low_precision_trains_on_a_cpu(
    name: str, precision: str, corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(tiny(name, corpus, run, optim={"lr": 1e-2}, train={"precision": precision, "steps": 16}))
    means = [loss for _, loss in losses(run)]
    assert sum(means[-4:]) < sum(means[:4])
    stored = torch.bfloat16 if precision == "bf16" else torch.float32
    for n, weight in final(run).items():
        assert weight.dtype == (torch.float32 if n.endswith(VECTORS) else stored), n


def test_an_exact_step_that_ends_a_run_is_counted(corpus: Path, tmp_path: Path) -> None:
    train(tiny("loro", corpus, tmp_path / "run", train={"steps": 6}))
    counts = {r["step"]: r["exact_steps"] for r in rows(tmp_path / "run") if "exact_steps" in r}
    assert counts == {3: 1, 6: 2}
    last = rows(tmp_path / "run")[-1]
    assert last["exact_step_ratio"] > 0 and last["singular_factor_pairs_warning"] == 0


def test_a_row_is_the_mean_of_its_steps(corpus: Path, tmp_path: Path) -> None:
    for every in (1, 3):
        settings = {"log_every": every, "checkpoint_every": 0}
        train(tiny("full", corpus, tmp_path / str(every), train=settings))
    each = [loss for _, loss in losses(tmp_path / "1")]
    assert losses(tmp_path / "3") == [
        (3, pytest.approx(sum(each[:3]) / 3)),
        (6, pytest.approx(sum(each[3:6]) / 3)),
        (8, pytest.approx(sum(each[6:]) / 2)),
    ]


def test_clipping_bounds_what_the_optimizer_sees(corpus: Path, tmp_path: Path) -> None:
    from peptrain.optim.adamw import clip_gradients

    weights = torch.nn.ParameterList([torch.zeros(2), torch.zeros(1), torch.zeros(3)])
    for clip, length in ((1.0, 1.0), (0.0, 13.0), (20.0, 13.0)):
        weights[0].grad, weights[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([12.0])
        assert clip_gradients(weights, clip).item() == pytest.approx(13.0)
        total = sum(p.grad.square().sum() for p in weights if p.grad is not None)
        assert math.sqrt(total) == pytest.approx(length, rel=1e-5)


def test_the_seconds_of_a_run_begin_with_its_first_step(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with the checkpoint of step 0, nor with what is set up before."""
    save, clock, more = trainer.save, time.perf_counter, [0.0]

    def slow(*args: Any) -> None:
        more[0] += 1e4
        save(*args)

    monkeypatch.setattr(trainer, "save", slow)
    monkeypatch.setattr("peptrain.training.metrics.time.perf_counter", lambda: clock() + more[0])
    train(tiny("full", corpus, tmp_path / "run", train={"keep_at": "0", "log_every": 1}))
    assert more[0] >= 1e4 and rows(tmp_path / "run")[0]["seconds"] < 1e4


def test_a_warning_is_not_hidden_by_a_later_event_without_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = MetricsLog(RunDir(tmp_path), ALONE, silent, tokens_per_step=1)
    for step, found in enumerate((0, torch.tensor(7), torch.tensor(2), 0), start=1):
        metrics = {"bad_pairs_warning": found, "merges": step}
        log.add(step, {"lr": 0.1}, torch.ones(()), None, metrics)
    log.flush()
    log.add(5, {"lr": 0.1}, torch.ones(()), None, {"bad_pairs_warning": 0.0})
    log.flush()
    first, second = rows(tmp_path)
    assert (first["bad_pairs_warning"], first["merges"], second["bad_pairs_warning"]) == (7, 4, 0)
    assert "step 4: 7 bad pairs" in caplog.text


def test_the_peak_of_memory_is_that_of_all_processes_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is resumed for its last evaluation alone has not trained in little memory."""
    gpu, written = replace(ALONE, device=torch.device("cuda")), []
    for reserved in (5, 2, 9, 1):
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device, now=reserved: now)
        log = MetricsLog(RunDir(tmp_path), gpu, silent, tokens_per_step=1)
        log.continue_clocks()
        log.write("checkpoint", step=1)
        written.append(log.peak_bytes())
    found = [row["peak_bytes"] for row in RunDir(tmp_path).metrics()]
    assert found == written == [5, 5, 9, 9]


def test_throughput_is_tokens_over_seconds() -> None:
    assert throughput(600, 2.0) == 300.0
    assert throughput(600, 0.0) == 0.0
