"""A damaged or edited file of a run is named, kept aside, or makes no difference."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import rows, tiny

from peptrain.cli.app import main
from peptrain.errors import CheckpointError, ConfigError, DataError
from peptrain.eval.run import evaluate
from peptrain.runs.checkpoint import Keep, available, latest, save
from peptrain.runs.directory import RunDir, as_row
from peptrain.testing import newest, small_corpus
from peptrain.training.loop import resume, train

STEPS = 3


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("damage") / "run"
    settings = {"steps": STEPS, "checkpoint_every": 2}
    train(tiny("lora", corpus, run, train=settings, optim={"lr": 1e-3}))
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))


def put(file: Path, content: str | None) -> None:
    file.unlink()
    if content is None:
        file.mkdir()
    else:
        file.write_text(content)


# Settings.


@pytest.mark.parametrize(
    "old, new, key",
    [("alpha = ", "alpha = 1", r"method\.alpha"), ("seq_len = 16", "seq_len = 8", "train.seq_len"),
     ("seed = 0", "seed = 8", "train.seed"), ("heads = 2", "heads = 1", r"model\.heads")],
)  # fmt: skip
@pytest.mark.parametrize("command", [evaluate, resume])
def test_another_setting_of_the_identity_is_refused(
    command: Callable[[Path], Any], old: str, new: str, key: str, run: Path
) -> None:
    """Also by eval, export and --init-from, which have no use for the corpus."""
    edit(run / "config.toml", f"\n{old}", f"\n{new}")
    with pytest.raises(CheckpointError, match=rf"^{key}: .*step 3 .*original config\.toml$"):
        command(run)


@pytest.mark.parametrize("command", [evaluate, resume])
def test_a_setting_that_may_change_is_reported(
    command: Callable[[Path], Any], run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command(run)
    assert "config.toml" not in caplog.text
    edit(run / "config.toml", "\nkeep = 2", "\nkeep = 3")
    edit(run / "config.toml", "\nlog_every = 1", "\nlog_every = 2")
    command(run)
    changed = "since step 3: train.log_every from 1 to 2, train.keep from 2 to 3"
    assert caplog.text.count(changed) == 1


def test_the_settings_of_an_older_checkpoint_are_not_known(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Apart from the number of steps, at which its phase was to end."""
    save(RunDir(run).checkpoints, replace(newest(run), settings={}), Keep(2))
    edit(run / "config.toml", "\nlr = 0.001", "\nlr = 0.003")
    resume(run)
    assert "has changed" not in caplog.text
    edit(run / "config.toml", "\nsteps = 3", "\nsteps = 5")
    with pytest.raises(CheckpointError, match=r"^train\.steps: .* with 3, .* --train\.steps 5"):
        resume(run)


def test_a_configuration_that_lost_its_end_is_refused(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text[: text.index("[train]")])
    with pytest.raises(CheckpointError, match=r"config\.toml: incomplete \(train\.precision is"):
        resume(run)


def test_an_error_in_a_runs_configuration_names_its_file(run: Path) -> None:
    for text, said in (("", "method.name: missing"), ("[]", "not TOML")):
        (run / "config.toml").write_text(text)
        with pytest.raises(ConfigError, match=f"^{re.escape(str(run / 'config.toml'))}: {said}"):
            resume(run)


def test_a_run_is_evaluated_on_its_own_corpus_unless_told(run: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = small_corpus(tmp_path / "other", words=5000)
    shutil.copyfile(run / "tokenizer" / "tokenizer.json", tmp_path / "tokenizer.json")
    shutil.rmtree(other)
    words = ["data", "prepare", str(tmp_path / "other" / "text.txt"), "--out", str(other),
             "--tokenizer", str(tmp_path / "tokenizer.json"), "--held-out=0.02"]  # fmt: skip
    assert main(words) == 0
    config = run / "config.toml"
    ours = next(line for line in config.read_text().splitlines() if line.startswith("path = "))
    edit(config, ours, f'path = "{other}"')
    with pytest.raises(DataError, match=r"^data\.path: .* not the corpus .* --data "):
        evaluate(run)
    evaluate(run, data=other)


# Rows.


def test_a_changed_digit_of_a_row_is_noticed(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in the value that a comparison's table shows; also in the checksum or its key."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    whole = list(RunDir(run).metrics())
    at = lines[-1].index('"held_out_loss": ') + len('"held_out_loss": ')
    digit = str((int(lines[-1][at]) + 1) % 10)
    damaged = [
        f"{lines[-1][:at]}{digit}{lines[-1][at + 1 :]}",
        lines[-1].replace("crc32", "crc42"),
        lines[-1].replace('32": "', '32": "0'),
    ]
    for line in damaged:
        (run / "metrics.jsonl").write_text("\n".join([*lines[:-1], line, ""]))
        assert list(RunDir(run).metrics()) == whole[:-1]
    assert caplog.text.count(f"metrics.jsonl:{len(lines)}: damaged, skipped") == 3
    resume(run)
    assert rows(run, "end")[0]["held_out_loss"] == whole[-1]["held_out_loss"]
    assert (run / "metrics.damaged").read_text() == damaged[-1] + "\n"


def test_rows_without_checksums_are_those_of_an_older_version(run: Path) -> None:
    """A resume adds them."""
    whole = list(RunDir(run).metrics())
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in whole))
    assert list(RunDir(run).metrics()) == whole
    resume(run)
    assert '"crc32": "' in (run / "metrics.jsonl").read_text().splitlines()[0]
    assert list(RunDir(run).metrics())[:-1] == whole[:-1]


@pytest.mark.parametrize("number", ["1e999", "9" * 400, "9" * 5000, "NaN", "true"])
def test_a_value_that_is_no_finite_number_damages_the_row(number: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"event": "step", "step": 1, "loss": {number}}}\n')
    assert list(RunDir(tmp_path).metrics()) == []


@pytest.mark.parametrize("kept", [0, 2])
def test_missing_rows_are_counted(kept: int, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    resume(run)
    assert "missing" not in caplog.text
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:kept]))
    resume(run)
    before = sum(json.loads(line)["event"] in ("step", "phase") for line in lines) + 1
    assert (
        f"metrics.jsonl: {before - kept} of {before} rows up to step 3 are missing" in caplog.text
    )


def test_damaged_rows_are_not_appended_to_a_link(run: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (run / "metrics.damaged").symlink_to(tmp_path / "precious")
    with (run / "metrics.jsonl").open("a") as file:
        file.write("null\n")
    with pytest.raises(OSError, match=r"metrics\.damaged"):
        RunDir(run).rewind(STEPS)
    assert (tmp_path / "precious").read_text() == "mine"


# The other files.


@pytest.mark.parametrize("content", [None, "", "null", "{}", "[" * 10**5, "9" * 5000, '[{"a": 1'])
def test_a_resume_keeps_a_damaged_env_json_aside(
    content: str | None, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(run / "env.json", content)
    RunDir(run).append("env.json", {"torch": "3"})
    assert json.loads((run / "env.json").read_text()) == [{"torch": "3"}]
    aside = run / "env.damaged"
    assert aside.is_dir() if content is None else aside.read_text() == content
    assert "env.json: damaged (" in caplog.text


@pytest.mark.parametrize("content", [None, "", "null", "[]", "[" * 10**5, "9" * 5000])
@pytest.mark.parametrize("name", ["state.json", "SHA256SUMS", "model.safetensors"])
def test_a_damaged_checkpoint_is_skipped(
    name: str, content: str | None, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(available(RunDir(run).checkpoints)[-1] / name, content)
    found = latest(RunDir(run).checkpoints)
    assert found is not None and found.step == 2
    assert "step-00000003 is damaged (" in caplog.text


def test_the_command_says_it_in_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in available(RunDir(run).checkpoints):
        put(path / "state.json", "[" * 10**5)
    for command in (["eval", str(run)], ["export", str(run), "--out", str(run / "out")]):
        assert main(command) == 1
        assert capsys.readouterr().err.startswith(f"error: {run}/checkpoints: none of the 2 ")


@pytest.mark.parametrize("key", ["lr", "lr_embeddings"])
@pytest.mark.parametrize("value", ['"x"', "null", "[]"])
def test_a_row_whose_rate_is_no_number_is_damaged(key: str, value: str) -> None:
    """Rows of 0.1.0 have no checksum, and `peptrain watch` formats the rates."""
    row = f'{{"event": "step", "step": 1, "loss": 2.0, "{key}": %s}}'
    assert as_row((row % value).encode()) is None
    assert as_row((row % "0.1").encode()) is not None
