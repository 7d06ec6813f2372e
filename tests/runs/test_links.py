"""A run of a stranger: links in it are neither read nor written through."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support import tiny

from peptrain.errors import CheckpointError
from peptrain.eval.run import evaluate
from peptrain.exporting.export import export
from peptrain.runs.directory import RunDir
from peptrain.training.loop import resume, train


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny("full", corpus, tmp_path_factory.mktemp("runs") / "run")).run


def newest(run: Path) -> Path:
    return max((run / "checkpoints").iterdir())


ENTRIES: dict[str, Callable[[Path], Path]] = {
    "configuration": lambda run: run / "config.toml",
    "rows": lambda run: run / "metrics.jsonl",
    "tokenizer's file": lambda run: run / "tokenizer" / "tokenizer.json",
    "tokenizer's own": lambda run: run / "tokenizer" / "chat_template.jinja",
    "tokenizer": lambda run: run / "tokenizer",
    "checkpoints": lambda run: run / "checkpoints",
    "checkpoint": newest,
    "weights": lambda run: newest(run) / "model.safetensors",
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_link_out_of_a_run_is_refused_and_its_target_left_alone(
    entry: str, run: Path, tmp_path: Path
) -> None:
    copy, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(run, copy)
    linked = ENTRIES[entry](copy)
    if linked.exists():
        linked.rename(elsewhere)
    else:
        elsewhere.write_text("secret")
    linked.symlink_to(elsewhere)
    before = sorted((p, p.lstat().st_mtime_ns) for p in [elsewhere, *elsewhere.rglob("*")])
    for command in (resume, evaluate, lambda path: export(path, tmp_path / "out")):
        with pytest.raises(
            CheckpointError, match=rf"{linked.name}.*: a link out of the run.*cp -rL"
        ):
            command(copy)
    assert before == sorted((p, p.lstat().st_mtime_ns) for p in [elsewhere, *elsewhere.rglob("*")])
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_reached_by_a_link_is_a_run(run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run)
    assert RunDir.open(tmp_path / "link").config_file.is_file()


def test_rows_are_not_appended_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    (tmp_path / "metrics.jsonl").symlink_to("precious")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: can't be written"):
        RunDir(tmp_path).record({"event": "step"})
    assert not (tmp_path / "precious").read_text()


def test_every_file_of_a_run_has_the_permissions_of_the_umask(run: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    modes = {
        str(p.relative_to(run)): p.stat().st_mode & 0o777 for p in run.rglob("*") if p.is_file()
    }
    assert len(modes) > 6 and {*modes.values()} == {0o666 & ~umask}, modes


def test_what_a_kill_left_of_a_checkpoint_is_deleted_by_the_next(
    run: Path, corpus: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for name in (".step-00000600.tmp", ".step-00000004.0123456789abcdef.peptrain-tmp"):
        (copy / "checkpoints" / name).mkdir()  # the first is one of version 0.1.0
    shutil.rmtree(newest(copy))
    resume(copy)
    assert all(p.name.startswith("step-") for p in (copy / "checkpoints").iterdir())
