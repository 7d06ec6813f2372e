"""Checkpoints: whole or not there, found again when one is damaged, refused when they don't fit."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import VECTORS, Killed, kill_at, tiny
from torch import nn

import peptrain.runs.checkpoint
from peptrain.config import load, resolved
from peptrain.distributed.world import World
from peptrain.errors import CheckpointError
from peptrain.files import no_links, sha256sums
from peptrain.methods import METHODS
from peptrain.runs.build import rebuild
from peptrain.runs.checkpoint import (
    SUMMED,
    Checkpoint,
    Keep,
    agrees,
    at_step,
    available,
    capture,
    latest,
    load_model,
    load_optimizer,
    save,
    step_of,
)
from peptrain.runs.directory import RunDir
from peptrain.testing import differences, losses, newest, small_corpus
from peptrain.training.loop import resume, train
from peptrain.training.state import restore

IDENTITY = {"method.name": "full", "data": "0123"}


def checkpoint_of(step: int) -> Checkpoint:
    """A small one whose numbers depend on the step."""
    torch.manual_seed(step)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return capture(model, optimizer, step=step, phase=0, identity=IDENTITY)


def test_checkpoints_are_told_apart_by_their_steps_and_not_their_names(tmp_path: Path) -> None:
    """From step 100,000,000 on names are longer."""
    for step in (99_999_998, 99_999_999, 100_000_000):
        save(tmp_path, checkpoint_of(step), Keep(2))
    assert [step_of(path) for path in available(tmp_path)] == [99_999_999, 100_000_000]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The checkpoints of steps 1, 2 and 3 of a run."""
    for step in (1, 2, 3):
        save(tmp_path / "run" / "checkpoints", checkpoint_of(step), Keep(3))
    return tmp_path / "run" / "checkpoints"


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def test_what_is_read_is_what_was_written(directory: Path) -> None:
    found = latest(directory)
    assert found is not None and differences(found, checkpoint_of(3)) == []
    assert found.identity == IDENTITY and (found.step, found.phase) == (3, 0)
    assert latest(directory / "nothing here") is None


def test_a_checkpoint_is_json_and_safetensors(directory: Path) -> None:
    files = sorted(p.name for p in available(directory)[0].iterdir())
    assert files == ["SHA256SUMS", "model.safetensors", "optimizer.safetensors", "state.json"]


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_the_newest_are_kept(keep: int, directory: Path) -> None:
    for step in (4, 5, 100_000_000):
        save(directory, checkpoint_of(step), Keep(keep))
    kept = ["step-00000002", "step-00000003", "step-00000004", "step-00000005"]
    assert names(directory)[-keep:] == [*kept, "step-100000000"][-keep:]
    assert len(names(directory)) == keep


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_at_call(real: Callable[..., Any], number: int) -> Callable[..., Any]:
    """`real`, until the disk is full at call `number`, when half of the file has been written."""
    calls = iter(range(1, 100))

    def write(content: Any, path: Path) -> None:
        if next(calls) == number:
            path.write_bytes(b"half of it")
            full()
        real(content, path)

    return write


def break_save_file(patch: pytest.MonkeyPatch, number: int) -> None:
    module = peptrain.runs.checkpoint
    patch.setattr(module, "save_file", full_at_call(module.save_file, number))


FAILURES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "making the directory": lambda patch: patch.setattr(Path, "mkdir", full),
    "the model": lambda patch: break_save_file(patch, 1),
    "the moments": lambda patch: break_save_file(patch, 2),
    "state.json": lambda patch: patch.setattr(Path, "write_text", full),
    "syncing": lambda patch: patch.setattr(os, "fsync", full),
    "renaming": lambda patch: patch.setattr(Path, "replace", full),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_full_disk_leaves_the_earlier_checkpoint_and_no_rubbish(
    failure: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = names(directory)
    with monkeypatch.context() as patch, pytest.raises(CheckpointError) as caught:
        FAILURES[failure](patch)
        save(directory, checkpoint_of(4), Keep(3))
    assert names(directory) == before
    found = latest(directory)
    assert found is not None and differences(found, checkpoint_of(3)) == []
    message = str(caught.value)
    assert "step-00000004: could not be written" in message and "No space left" in message
    assert "the last good checkpoint is" in message and "step-00000003" in message
    assert f"`peptrain resume {directory.parent}`" in message


def test_a_full_disk_at_the_first_checkpoint_says_that_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="there is no earlier checkpoint"):
        save(tmp_path / "checkpoints", checkpoint_of(1), Keep(3))
    assert names(tmp_path / "checkpoints") == []


def test_a_training_goes_on_after_room_was_made(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [tmp_path / "roomy", tmp_path / "full"]
    configs = [tiny("bpt", corpus, run, train={"checkpoint_every": 2}) for run in runs]
    train(configs[0])
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="peptrain resume"):
        break_save_file(patch, 6)  # the moments of the third checkpoint
        train(configs[1])
    assert newest(runs[1]).step == 4
    resume(runs[1])
    assert differences(*(newest(run) for run in runs)) == []
    assert losses(runs[0]) == losses(runs[1])


def test_a_disk_too_full_for_a_row_of_metrics_is_an_error_for_the_user(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def opened(path: str, flags: int) -> int:
        if newest_step(run) >= 2:
            full()
        return no_links(path, flags)

    config = tiny("bpt", corpus, run, train={"checkpoint_every": 1})
    with monkeypatch.context() as patch, pytest.raises(CheckpointError) as caught:
        patch.setattr("peptrain.runs.directory.no_links", opened)
        train(config)
    assert "metrics.jsonl" in str(caught.value) and "No space left" in str(caught.value)
    assert f"`peptrain resume {run}`" in str(caught.value)
    resume(run)
    assert [step for step, _ in losses(run)] == list(range(1, 9))


def newest_step(run: Path) -> int:
    found = available(RunDir(run).checkpoints)
    return int(found[-1].name.removeprefix("step-")) if found else 0


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def no_json(path: Path) -> None:
    path.write_text("[1, 2]")


def lose_a_key(path: Path) -> None:
    state = json.loads(path.read_text())
    del state["groups"]
    path.write_text(json.dumps(state))


def another_step(path: Path) -> None:
    path.write_text(path.read_text().replace('"step": ', '"step": 1'))


DAMAGES = [
    ("model.safetensors", truncate),
    ("model.safetensors", flip_a_bit),
    ("model.safetensors", empty),
    ("model.safetensors", Path.unlink),
    ("optimizer.safetensors", truncate),
    ("optimizer.safetensors", flip_a_bit),
    ("optimizer.safetensors", Path.unlink),
    ("state.json", truncate),
    ("state.json", empty),
    ("state.json", no_json),
    ("state.json", lose_a_key),
    ("state.json", another_step),
    ("state.json", Path.unlink),
    ("SHA256SUMS", truncate),
    ("SHA256SUMS", Path.unlink),
]


@pytest.mark.parametrize("file, damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over(
    file: str, damage: Callable[[Path], None], directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(available(directory)[-1] / file)
    found = latest(directory)
    assert found is not None and differences(found, checkpoint_of(2)) == []
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert f"{directory / 'step-00000003'} is damaged" in warning and "falling back" in warning
    damage(available(directory)[-2] / file)
    found = latest(directory)
    assert found is not None and found.step == 1
    damage(available(directory)[0] / file)
    with pytest.raises(CheckpointError, match=r"none of the 3 checkpoints can be read"):
        latest(directory)


@pytest.mark.parametrize("by_torch", [True, False])
def test_one_that_the_training_deletes_while_it_is_read_has_a_later_one_in_its_place(
    by_torch: bool,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """PyTorch opens the files a second time, and has an error of its own where one is gone."""
    real, step = peptrain.runs.checkpoint.load_file, 3

    def training(file: Path) -> Any:
        nonlocal step
        if step < 5:
            save(directory, checkpoint_of(step := step + 1), Keep(1))
            if by_torch:
                raise RuntimeError(f"unable to open file <{file}> in read-only mode")
        return real(file)

    monkeypatch.setattr(peptrain.runs.checkpoint, "load_file", training)
    found = latest(directory)
    assert found is not None and differences(found, checkpoint_of(5)) == [] and step == 5
    step = 4
    save(directory, checkpoint_of(4), Keep(1))
    with pytest.raises(CheckpointError, match=r"step-00000004: the training deleted it before"):
        at_step(directory, 4)
    assert not caplog.records


@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "SHA256SUMS", "."])
def test_one_that_may_not_be_read_is_no_damaged_one(
    file: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The earlier ones would be used, and it would be deleted. Root may read everything, so the
    answer of the system is replaced."""
    barred, real = (available(directory)[-1] / file).resolve(), sha256sums

    def refusing(path: Path, names: Any) -> str:
        if barred.is_relative_to(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(barred))
        return real(path, names)

    monkeypatch.setattr(peptrain.runs.checkpoint, "sha256sums", refusing)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).resolve() != barred)
    said = rf"{re.escape(str(barred))}: can't be read: permission denied; change"
    with pytest.raises(CheckpointError, match=said):
        latest(directory)


def test_what_pytorch_can_not_read_of_a_whole_checkpoint_is_no_damage(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as for lack of memory: an earlier checkpoint would be another model."""

    def full_of(file: Path) -> Any:
        raise RuntimeError("can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(peptrain.runs.checkpoint, "load_file", full_of)
    with pytest.raises(RuntimeError, match="allocate memory"):
        latest(directory)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_checkpoint_never_takes_the_place_of_a_whole_one(
    keep: int, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training went on from step 1, because 2 and 9 are damaged, and is stopped at step 2."""
    save(directory, checkpoint_of(9), Keep(4))
    for path in available(directory)[1:]:
        truncate(path / "model.safetensors")
    save(directory, checkpoint_of(2), Keep(keep))
    found = latest(directory)
    assert found is not None and differences(found, checkpoint_of(2)) == []
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(CheckpointError, match=r"the last good checkpoint is .*step-00000002"):
        save(directory, checkpoint_of(10), Keep(keep))


def test_training_goes_on_from_the_checkpoint_before_a_damaged_one(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs = [tmp_path / "whole", tmp_path / "damaged"]
    train(tiny("loro", corpus, runs[0], train={"checkpoint_every": 1, "keep": 9}))
    shutil.copytree(*runs)
    for path in available(RunDir(runs[1]).checkpoints)[4:]:
        flip_a_bit(path / "optimizer.safetensors")
    resume(runs[1])
    assert caplog.text.count("is damaged") == 4
    assert differences(*(newest(run) for run in runs)) == []
    assert losses(runs[0]) == losses(runs[1])


def test_another_format_is_named_with_ours(directory: Path) -> None:
    state = available(directory)[-1] / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"format": 7}))
    with pytest.raises(
        CheckpointError, match=r"step-00000003: written in format 7, .* reads format 2"
    ):
        latest(directory)


@pytest.mark.parametrize(
    "key, value",
    [("step", 2), ("step", -1), ("step", 3.0), ("step", True), ("step", 10**30), ("phase", -1),
     ("phase", "0"), ("end", None), ("end", -5), ("groups", None), ("groups", [1]),
     ("groups", [{"age": 1.5}]), ("state_bytes", [-1]), ("state_bytes", "abc"), ("rows", -1),
     ("rows", True), ("identity", []), ("settings", None)],
)  # fmt: skip
def test_a_value_of_the_state_that_none_has_is_damage(
    key: str, value: object, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also with the right checksum."""
    newest = available(directory)[-1]
    state = json.loads((newest / "state.json").read_text()) | {key: value}
    (newest / "state.json").write_text(json.dumps(state))
    (newest / "SHA256SUMS").write_text(sha256sums(newest, SUMMED))
    found = latest(directory)
    assert found is not None and found.step == 2
    assert f"step-00000003 is damaged (state.json: {key} is " in caplog.text


def test_a_state_of_another_phase_or_of_other_groups_is_refused(
    corpus: Path, tmp_path: Path
) -> None:
    config = tiny("full", corpus, tmp_path / "run", train={"steps": 1})
    train(config)
    saved = newest(tmp_path / "run")
    with pytest.raises(CheckpointError, match="step 1 is of phase 1, but the last phase of full"):
        rebuild(config, replace(saved, phase=1), 0)
    model = rebuild(config, saved, 0)
    optimizer = config.method.optimizer(
        model, [], resolved(config, world_size=1, on_gpu=False).optim, 0
    )
    more = replace(saved, groups=[*saved.groups, {}])
    with pytest.raises(CheckpointError, match="groups: 3 in the checkpoint of step 1, but 2 in"):
        load_optimizer(model, optimizer, more, same_phase=True)


def test_a_checkpoint_of_other_parameters_is_refused() -> None:
    saved = checkpoint_of(1)
    with pytest.raises(CheckpointError, match=r"the parameters of the checkpoint .* differ: bias"):
        load_model(nn.Linear(3, 2, bias=False), saved.model)
    with pytest.raises(CheckpointError, match=r"weight: \[2, 3\] in the checkpoint, \[2, 4\]"):
        load_model(nn.Linear(4, 2), saved.model)


@pytest.mark.parametrize("same_phase, age", [(True, 7), (False, 0)])
def test_the_clocks_of_groups_end_with_their_phase(same_phase: bool, age: int) -> None:
    saved, model = replace(checkpoint_of(1), groups=[{"age": 7}]), nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    optimizer.param_groups[0]["age"] = 0
    load_optimizer(model, optimizer, saved, same_phase=same_phase)
    assert optimizer.param_groups[0]["age"] == age
    assert len(optimizer.state) == 2


def test_the_first_setting_that_differs_is_named_with_both_values() -> None:
    saved = replace(checkpoint_of(5), identity={"method.name": "bpt", "method.rank": 4})
    agrees(saved, dict(saved.identity))
    with pytest.raises(CheckpointError, match=r"method\.rank: .* step 5 .* 4, .* has 8"):
        agrees(saved, {"method.name": "bpt", "method.rank": 8})
    with pytest.raises(CheckpointError, match=r"method\.name: .* 'bpt', .* has 'full'"):
        agrees(saved, {"method.name": "full"})


OTHERS = {
    "rank = 2": ("rank = 3", r"method\.rank: .* written with 2, .* has 3"),
    'init = "kaiming_uniform"': (
        'init = "model"',
        r"method\.init: .* with 'kaiming_uniform', .* has 'model'",
    ),
    "hidden_size = 16": ("hidden_size = 32", r"model\.hidden_size: .* with 16, .* has 32"),
    "seed = 0": ("seed = 1", r"train\.seed: .* with 0, .* has 1"),
    'precision = "fp64"': (
        'precision = "fp32"',
        r"train\.precision: .* with 'fp64', .* has 'fp32'",
    ),
}


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    train(tiny("bpt", corpus, run, train={"steps": 2}))
    return run


@pytest.mark.parametrize("written", OTHERS)
def test_a_run_goes_on_only_as_what_it_was(written: str, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    said, message = OTHERS[written]
    config = RunDir(run).config_file
    assert config.read_text().count(written) == 1
    config.write_text(config.read_text().replace(written, said))
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=message):
        resume(run)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_run_goes_on_only_by_the_method_and_on_the_data_that_it_had(
    finished: Path, corpus: Path, tmp_path: Path
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(finished, run)
    full_run = tmp_path / "full"
    train(tiny("full", corpus, full_run, train={"steps": 2}))
    shutil.copy(RunDir(full_run).config_file, RunDir(run).config_file)
    with pytest.raises(CheckpointError, match=r"method\.name: .* 'bpt', .* has 'full'"):
        resume(run)
    other.mkdir()
    theirs = str(small_corpus(other, words=5000))
    config = RunDir(finished).config_file.read_text().replace(str(corpus), theirs)
    RunDir(run).config_file.write_text(config)
    with pytest.raises(CheckpointError, match=r"data: .* with '[0-9a-f]{16}', .* '[0-9a-f]{16}'"):
        resume(run)


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16", "fp64"])
@pytest.mark.parametrize("name", METHODS)
def test_moments_come_back_in_the_dtype_that_they_had(
    name: str, precision: str, corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = {"precision": precision, "checkpoint_every": 1, "keep": 9}
    with pytest.raises(Killed):
        train(tiny(name, corpus, run, train=settings), kill_at("checkpoint", 4))
    saved, config = newest(run), load(RunDir(run).config_file)
    alone = World(0, 1, torch.device("cpu"))
    train_state = restore(config, saved, alone)
    state = {"step": 4, "phase": train_state.phase, "identity": saved.identity}
    back = capture(train_state.model, train_state.optimizer, **state)
    assert differences(back, saved) == []
    wanted = {"bf16": torch.bfloat16, "fp64": torch.float64}.get(precision, torch.float32)
    for n, moment in saved.optimizer.items():
        weight = saved.model[n.rpartition("/")[0]]
        diagonal = n.rpartition("/")[0].endswith(VECTORS)
        assert weight.dtype == (torch.promote_types(wanted, torch.float32) if diagonal else wanted)
        assert n.endswith("/step") or moment.dtype == weight.dtype
