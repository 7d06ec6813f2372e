"""A run that was killed and resumed is, bit for bit, the run that never was."""

import hashlib
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Killed, kill_at, rows, tiny, tiny_method, untimed

import peptrain.runs.checkpoint
import peptrain.training.loop as trainer
from peptrain.cli.app import main
from peptrain.config import RunConfig
from peptrain.data import Corpus
from peptrain.errors import CheckpointError, DataError
from peptrain.methods import METHODS
from peptrain.runs.checkpoint import Checkpoint, Keep, available, save, step_of
from peptrain.runs.directory import RunDir
from peptrain.testing import EVENT, MODEL, STEPS, differences, losses, newest
from peptrain.training.loop import resume, train
from peptrain.training.state import TrainState

EACH = {"checkpoint_every": 1, "keep": 99, "micro_batch": 2}


@pytest.fixture(scope="module")
def with_dropout(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A `model` section for a config.json with attention dropout."""
    sizes = {
        "vocab_size": MODEL["vocab_size"],
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    folder = tmp_path_factory.mktemp("model")
    config = {"model_type": "llama", "attention_dropout": 0.2, **sizes}
    (folder / "config.json").write_text(json.dumps(config))
    return dict.fromkeys(MODEL) | {"config": folder}


@pytest.fixture(scope="module")
def configured(corpus: Path, with_dropout: dict[str, Any]) -> Callable[[str, Path], RunConfig]:
    """Dropout, accumulation, a schedule that moves, clipping, and a checkpoint of every step."""

    def config(name: str, run: Path) -> RunConfig:
        schedule = {"kind": "cosine", "warmup": 2}
        optim = {"clip": 0.5, "weight_decay": 0.01}
        return tiny(
            name, corpus, run, model=with_dropout, schedule=schedule, optim=optim, train=EACH
        )

    return config


@pytest.fixture(scope="module")
def whole(
    configured: Callable[[str, Path], RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The uninterrupted run of a method, trained once."""
    folder = tmp_path_factory.mktemp("whole")

    def run(name: str) -> Path:
        if not (folder / name).exists():
            train(configured(name, folder / name))
        return folder / name

    return run


def rewound(run: Path, copy: Path, step: int) -> Path:
    """A copy of `run` as a kill right after the checkpoint of `step` would leave it."""
    shutil.copytree(run, copy)
    for path in available(RunDir(copy).checkpoints):
        if path.name > f"step-{step:08d}":
            shutil.rmtree(path)
    return copy


def fingerprint(run: Path) -> str:
    """A hash of the final weights and moments."""
    end = newest(run)
    digest = hashlib.sha256()
    for n, tensor in sorted({**end.model, **end.optimizer}.items()):
        digest.update(n.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize(
    "step", [pytest.param(EVENT - 1, marks=pytest.mark.slow), EVENT, EVENT + 1]
)
@pytest.mark.parametrize("name", METHODS)
def test_a_kill_around_an_event_changes_no_bit(
    name: str,
    step: int,
    configured: Callable[[str, Path], RunConfig],
    whole: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Killed):
        train(configured(name, run), kill_at("checkpoint", step))
    assert newest(run).step == step
    resume(run)
    assert differences(newest(run), newest(whole(name))) == []
    assert losses(run) == losses(whole(name))
    ours, theirs = (rows(r, "end")[0]["held_out_loss"] for r in (run, whole(name)))
    assert ours == theirs


def test_the_runs_above_have_dropout(
    whole: Callable[[str], Path], corpus: Path, tmp_path: Path
) -> None:
    train(tiny("full", corpus, tmp_path / "dry", schedule={"kind": "cosine", "warmup": 2}))
    dry, wet = losses(tmp_path / "dry")[0][1], losses(whole("full"))[0][1]
    assert dry != wet and dry == pytest.approx(wet, abs=0.1)


def test_a_run_survives_a_kill_at_every_step(
    configured: Callable[[str, Path], RunConfig], whole: Callable[[str], Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Killed):
        train(configured("bpt", run), kill_at("checkpoint", 1))
    for step in range(2, STEPS):
        with pytest.raises(Killed):
            resume(run, kill_at("checkpoint", step))
    resume(run)
    assert differences(newest(run), newest(whole("bpt"))) == []
    assert losses(run) == losses(whole("bpt"))
    assert len(json.loads((run / "env.json").read_text())) == STEPS


def test_a_kill_before_the_first_checkpoint_starts_again(
    configured: Callable[[str, Path], RunConfig], whole: Callable[[str], Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Killed):
        train(configured("bpt", run), kill_at("step", 1))
    assert available(RunDir(run).checkpoints) == []
    resume(run)
    assert differences(newest(run), newest(whole("bpt"))) == []
    assert losses(run) == losses(whole("bpt"))


def test_a_run_whose_checkpoints_are_gone_keeps_its_rows_and_names_the_way_out(
    configured: Callable[[str, Path], RunConfig], tmp_path: Path
) -> None:
    """As in a copy that was made while the training deleted one, or where somebody made room."""
    run = tmp_path / "run"
    train(configured("bpt", run))
    last = step_of(available(RunDir(run).checkpoints)[-1])
    before = (run / "metrics.jsonl").read_bytes()
    shutil.rmtree(run / "checkpoints")
    wanted = rf"checkpoints: is empty, but .* step {last}; .*`peptrain train bpt --config .*toml"
    with pytest.raises(CheckpointError, match=wanted):
        resume(run)
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("half", [True, False])
def test_a_kill_while_a_checkpoint_is_written_falls_back_to_the_one_before(
    half: bool,
    configured: Callable[[str, Path], RunConfig],
    whole: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    run, real = tmp_path / "run", peptrain.runs.checkpoint._write

    def killed(directory: Path, saved: Checkpoint) -> None:
        if half and saved.step == EVENT:
            (directory / "model.safetensors").write_bytes(b"half")
            raise Killed
        real(directory, saved)
        if saved.step == EVENT:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(peptrain.runs.checkpoint, "_write", killed)
        train(configured("loro", run))
    assert newest(run).step == EVENT - 1
    resume(run)
    assert differences(newest(run), newest(whole("loro"))) == []
    assert losses(run) == losses(whole("loro"))
    assert [p.name[:5] for p in RunDir(run).checkpoints.iterdir()] == ["step-"] * STEPS


def test_each_step_has_one_row_after_a_kill_between_a_row_and_its_checkpoint(
    configured: Callable[[str, Path], RunConfig], whole: Callable[[str], Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    sparse = configured("bpt", run)
    sparse = replace(sparse, train=replace(sparse.train, checkpoint_every=4))
    with pytest.raises(Killed):
        train(sparse, kill_at("step", 7))
    assert [step for step, _ in losses(run)] == list(range(1, 8)) and newest(run).step == 4
    resume(run)
    assert losses(run) == losses(whole("bpt"))
    assert [row["step"] for row in rows(run, "checkpoint")] == [4, 8]
    assert len(rows(run, "end")) == 1


def test_a_last_line_that_a_kill_cut_off_is_passed_over(
    configured: Callable[[str, Path], RunConfig], whole: Callable[[str], Path], tmp_path: Path
) -> None:
    run = rewound(whole("bpt"), tmp_path / "run", 5)
    metrics = RunDir(run).metrics_file
    whole_rows = list(RunDir(run).metrics())
    metrics.write_text(metrics.read_text() + '{"event": "step", "step": 9, "lo')
    assert list(RunDir(run).metrics()) == whole_rows
    resume(run)
    assert losses(run) == losses(whole("bpt"))
    assert all(json.loads(line) for line in metrics.read_text().splitlines())


DAMAGES = [b"\x0b", b"\x0c", b"\x1c", b"\x85", b"\0\0", b"[" * 10**5, b"9" * 5000]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_line_of_metrics_is_kept_aside_and_later_rows_stay(
    damage: bytes,
    whole: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = RunDir(tmp_path)
    shutil.copyfile(RunDir(whole("bpt")).metrics_file, run.metrics_file)
    rows = list(run.metrics())
    lines = run.metrics_file.read_bytes().split(b"\n")
    lines[1] = lines[1].replace(b' "', b" " + damage + b'"', 1)  # before the event's name
    run.metrics_file.write_bytes(b"\n".join(lines))
    assert list(run.metrics()) == [rows[0], *rows[2:]]
    assert "metrics.jsonl:2: damaged, skipped" in caplog.text
    run.rewind(STEPS)
    assert list(run.metrics()) == [row for row in [rows[0], *rows[2:]] if row["event"] != "end"]
    assert (tmp_path / "metrics.damaged").read_bytes() == lines[1] + b"\n"
    assert "lines 2 are damaged; moved to" in caplog.text


@pytest.mark.parametrize(
    "line",
    ["null", "[]", "7", "{}", '{"event": "step", "step": 3}', '{"event": 1, "step": 3}',
     '{"event": "step", "step": "3", "loss": 1.0}',
     '{"event": "end", "step": 8, "held_out_loss": NaN}', '{"event": "diverged", "step": 3}'],
)  # fmt: skip
def test_a_row_that_lacks_what_is_read_is_damaged(line: str, tmp_path: Path) -> None:
    run, row = RunDir(tmp_path), {"event": "eval", "step": 4}
    run.metrics_file.write_text(f"{line}\n\n{json.dumps(row)}\n")
    assert list(run.metrics()) == [row] and run.newest("end") is run.newest("diverged") is None


def test_a_kill_between_a_checkpoint_and_its_row_loses_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also not the size of the optimizer's state in the warm start, which is the largest."""
    method = tiny_method("relora", warm_start_steps=4)
    settings = {"eval_every": 2, "checkpoint_every": 2}
    whole, run, real = tmp_path / "whole", tmp_path / "run", trainer.save
    result = train(tiny(method, corpus, whole, train=settings))

    def killed(state: TrainState, *rest: Any) -> None:
        real(state, *rest)
        raise Killed

    for step in (2, 4, 6, 8):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(trainer, "save", killed)
            train(tiny(method, corpus, run, train=settings)) if step == 2 else resume(run)
        assert newest(run).step == step
    last = rows(run, "checkpoint")[-1]["state_bytes"]
    assert resume(run).state_bytes == result.state_bytes > last
    assert untimed(run) == untimed(whole)


def test_the_clocks_of_a_run_go_on_after_kills(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step is a second, evaluations and checkpoints take a minute, and a kill takes back two."""
    now = 1e9

    def passing(seconds: float) -> Any:
        def clock() -> float:
            nonlocal now
            now += seconds
            return now

        return clock

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(time, "time", lambda: now)
    real, second, minute = trainer.advance, passing(1), passing(60)
    monkeypatch.setattr(trainer, "advance", lambda *given: (second(), real(*given))[1])
    for name in ("save", "_evaluate"):
        slow = getattr(trainer, name)
        patched = lambda *given, slow=slow, **named: (minute(), slow(*given, **named))[1]  # noqa: E731
        monkeypatch.setattr(trainer, name, patched)
    settings = {"eval_every": 2, "checkpoint_every": 4}
    with pytest.raises(Killed):
        train(tiny("full", corpus, tmp_path / "run", train=settings), kill_at("step", 6))
    resume(tmp_path / "run")
    found = list(RunDir(tmp_path / "run").metrics())
    assert [row["seconds"] for row in found] == [row["step"] for row in found]
    assert all(row["device_hours"] == pytest.approx(row["step"] / 3600) for row in found)
    assert [row["time"] for row in found] == sorted(row["time"] for row in found)
    assert not any("peak_bytes" in row for row in found)
    start, again = json.loads((tmp_path / "run" / "env.json").read_text())
    assert start["data"] == Corpus.open(corpus).fingerprint == again["data"]
    assert start["command"] == shlex.join(sys.argv) and start["host"]
    assert start["commit"] is None or len(start["commit"]) == 40


def test_a_kill_before_older_checkpoints_were_deleted_leaves_no_more_than_asked_for(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at the last step, after which nothing is saved."""
    config = tiny("full", corpus, tmp_path / "run", train={"checkpoint_every": 2, "keep": 2})

    def killed(directory: Path, step: int, keep: Keep) -> None:
        if step == STEPS:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(peptrain.runs.checkpoint, "delete_old", killed)
        train(config)
    kept = RunDir(config.run).checkpoints  # type: ignore[arg-type]
    assert len(available(kept)) == 4
    resume(kept.parent)
    assert [path.name for path in available(kept)] == ["step-00000006", "step-00000008"]


def test_resuming_a_finished_run_evaluates_it_again_and_changes_nothing(
    whole: Callable[[str], Path], tmp_path: Path
) -> None:
    run = rewound(whole("bpt"), tmp_path / "run", STEPS)
    before = untimed(run)
    events: list[str] = []
    result = resume(run, lambda row: events.append(row["event"]))
    assert [event for event in events if event != "evaluating"] == ["start", "end"]
    assert untimed(run) == before
    assert fingerprint(run) == fingerprint(whole("bpt"))
    assert result.held_out.loss == rows(run, "end")[0]["held_out_loss"]
    assert result.tokens_per_second == rows(run, "end")[0]["tokens_per_second"] > 0


def without_first_moments(saved: Checkpoint) -> Checkpoint:
    zeroed = {k: v * 0 if k.endswith("exp_avg") else v for k, v in saved.optimizer.items()}
    return replace(saved, optimizer=zeroed)


def without_second_moments(saved: Checkpoint) -> Checkpoint:
    zeroed = {k: v * 0 if k.endswith("exp_avg_sq") else v for k, v in saved.optimizer.items()}
    return replace(saved, optimizer=zeroed)


def without_moments(saved: Checkpoint) -> Checkpoint:
    return replace(saved, optimizer={})


def without_clocks(saved: Checkpoint) -> Checkpoint:
    zeroed = {k: v * 0 if k.endswith("/step") else v for k, v in saved.optimizer.items()}
    groups = [dict.fromkeys(group, 0) for group in saved.groups]
    return replace(saved, optimizer=zeroed, groups=groups)


def without_one_bit_of_a_weight(saved: Checkpoint) -> Checkpoint:
    name = min(n for n in saved.model if "layers.1" in n)
    weight = saved.model[name].clone()
    weight.view(-1)[0] = torch.nextafter(weight.view(-1)[0], torch.tensor(9.0).double())
    return replace(saved, model={**saved.model, name: weight})


def without_a_step(saved: Checkpoint) -> Checkpoint:
    return replace(saved, step=saved.step - 1)


def unchanged(saved: Checkpoint) -> Checkpoint:
    return saved


@pytest.mark.parametrize("name", ["bpt", "loro"])
@pytest.mark.parametrize(
    "spoil",
    [
        unchanged,
        without_first_moments,
        without_second_moments,
        without_moments,
        without_clocks,
        without_one_bit_of_a_weight,
        without_a_step,
    ],
)
def test_nothing_in_a_checkpoint_can_be_left_out(
    spoil: Callable[[Checkpoint], Checkpoint],
    name: str,
    whole: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    run = rewound(whole(name), tmp_path / "run", EVENT + 1)
    saved = newest(run)
    for path in available(RunDir(run).checkpoints):
        shutil.rmtree(path)
    save(RunDir(run).checkpoints, spoil(saved), Keep(99))
    resume(run)
    kept = fingerprint(run) == fingerprint(whole(name))
    assert kept if spoil is unchanged else not kept


def test_a_resume_verifies_the_shards_again(
    corpus: Path, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(corpus, data)
    shutil.copytree(whole("full"), run)
    written = (run / "config.toml").read_text()
    (run / "config.toml").write_text(written.replace(str(corpus), str(data)))
    Corpus.open(data)
    shard, changed = data / "train-00000.bin", bytearray((data / "train-00000.bin").read_bytes())
    changed[0] ^= 1
    times = shard.stat()
    shard.write_bytes(changed)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    Corpus.open(data)  # not noticed by size and time
    with pytest.raises(DataError, match=r"train-00000\.bin: damaged: .*peptrain data prepare"):
        resume(run)


def test_what_is_resumed_must_be_a_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a run directory \(config\.toml is missing\)"):
        resume(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere: not a run directory"):
        resume(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "command",
    ["analyze {}", "eval {}", "export {} --out x", "resume {}", "watch {}",
     *(f"train full --{flag} {{}}" for flag in ("init-from", "continue-from", "match-trainable"))],
)  # fmt: skip
def test_a_comparison_is_refused_where_a_run_is_wanted_saying_where_its_runs_are(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (made := tmp_path / "grid").mkdir()
    (made / "runs.json").write_text("{}")
    assert main(command.format(made).split()) == 1
    assert "".join(capsys.readouterr().err.split("\n")) == (
        f"error: {made}: is a comparison, not a run; give its runs, {made}/runs/*, or one of them"
    )


def test_a_resume_under_another_number_of_ranks_weighs_every_row_alike(
    corpus: Path, tmp_path: Path
) -> None:
    """12 rows in micro-batches of 4 on one rank are 6 rows on each of two: 4 and 2."""
    runs = [tmp_path / "even", tmp_path / "uneven"]
    for run, micro in zip(runs, (6, 4), strict=True):
        train(tiny("full", corpus, run, train={"batch_size": 6, "micro_batch": 6, "steps": 4}))
        shutil.rmtree(RunDir(run).checkpoints / "step-00000004")
        config = (run / "config.toml").read_text()
        (run / "config.toml").write_text(
            config.replace("micro_batch = 6", f"micro_batch = {micro}")
        )
        resume(run)
    even, uneven = (newest(run).model for run in runs)
    for n in even:
        torch.testing.assert_close(uneven[n], even[n], rtol=0, atol=1e-9)
    for (_, one), (_, other) in zip(*(losses(run) for run in runs), strict=True):
        assert one == pytest.approx(other, abs=1e-9)


def test_a_resume_reads_the_runs_own_configuration(
    whole: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The current directory, say, changes nothing."""
    run = rewound(whole("full"), tmp_path / "run", EVENT)
    monkeypatch.chdir(tmp_path)
    asked: list[int] = []
    real = trainer._loop
    monkeypatch.setattr(
        trainer, "_loop", lambda c, t, *rest: (asked.append(t.step), real(c, t, *rest))
    )
    resume(Path("run"))
    assert asked == [EVENT] and fingerprint(run) == fingerprint(whole("full"))
