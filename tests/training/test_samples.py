"""`train.sample_every`: text that the model writes during training, which changes no bit of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import ALONE, Killed, kill_at, rows, tiny, tiny_method, untimed

from peptrain.cli.app import main
from peptrain.config import essence, load, resolved
from peptrain.data import Corpus
from peptrain.errors import ConfigError, DataError, PeptrainError
from peptrain.execution.attention import attend_without_masks
from peptrain.execution.padding import pad_mlps
from peptrain.figures.read import read
from peptrain.generation.sample import Sampling, continuation
from peptrain.loggers.base import scalars
from peptrain.methods import METHODS
from peptrain.reporting.tables import samples
from peptrain.rng import Rng
from peptrain.runs.build import plain_model
from peptrain.runs.directory import RunDir
from peptrain.tasks.subject import open_subject
from peptrain.testing import differences, newest, startable
from peptrain.text import escaped
from peptrain.training.loop import resume, train
from peptrain.training.metrics import MetricsLog, silent
from peptrain.training.samples import PROMPTS, SamplesInTraining, read_prompts

EVERY = {"sample_every": 3, "seq_len": 32, "log_every": 2, "checkpoint_every": 4, "keep": 8}
NEVER = {**EVERY, "sample_every": 0}


def but_samples(run: Path) -> list[dict[str, Any]]:
    return [row for row in untimed(run) if row["event"] != "sample"]


def check_same_training(one: Path, other: Path) -> None:
    """Weights, moments and all other rows."""
    assert differences(newest(one), newest(other)) == []
    assert but_samples(one) == but_samples(other)


def with_dropout() -> Any:
    return tiny_method("lora", dropout=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_training_with_samples_is_the_same_to_the_bit(
    name: str, corpus: Path, tmp_path: Path
) -> None:
    """Of LoRA with dropout, whose numbers are those of PyTorch's own generator."""
    method = with_dropout() if name == "lora" else name
    for run, settings in (("with", EVERY), ("without", NEVER)):
        train(startable(tiny(method, corpus, tmp_path / run, train=settings)))
    check_same_training(tmp_path / "with", tmp_path / "without")
    found = rows(tmp_path / "with", "sample")
    assert [row["step"] for row in found] == [3, 3, 3, 6, 6, 6]
    assert [row["prompt"] for row in found] == [*PROMPTS, *PROMPTS]
    assert all(row["text"] for row in found)


@pytest.mark.slow
def test_a_killed_run_writes_the_samples_of_one_that_was_not(corpus: Path, tmp_path: Path) -> None:
    train(tiny(with_dropout(), corpus, tmp_path / "whole", train=EVERY))
    with pytest.raises(Killed):
        train(tiny(with_dropout(), corpus, tmp_path / "cut", train=EVERY), kill_at("sample", 6))
    resume(tmp_path / "cut")
    assert untimed(tmp_path / "cut") == untimed(tmp_path / "whole")
    assert differences(newest(tmp_path / "cut"), newest(tmp_path / "whole")) == []


@pytest.mark.slow
def test_a_sample_is_what_the_checkpoint_of_its_step_writes(corpus: Path, tmp_path: Path) -> None:
    """By its dense equivalent and with a cache."""
    given = {**EVERY, "checkpoint_every": 3}
    train(tiny("lowrank", corpus, tmp_path / "run", train=given))
    subject = open_subject(tmp_path / "run@6")
    ids = [subject.encoder.ids([p], special=False)[p] for p in PROMPTS]
    expected = [
        continuation(
            subject.model, subject.encoder, each, Sampling(), positions=32, precision="fp64",
            seed=Rng(0).integer(f"prompt {number}", 6, "sample"),
        )
        for number, each in enumerate(ids, 1)
    ]  # fmt: skip
    assert [row["text"] for row in rows(tmp_path / "run", "sample") if row["step"] == 6] == expected


def test_what_a_gpu_trains_with_writes_the_same(corpus: Path, tmp_path: Path) -> None:
    """MLPs padded from 24 to 64, and attention without masks."""
    config = tiny("full", corpus, train={**EVERY, "precision": "fp32"})
    config = resolved(config, world_size=1, on_gpu=False)
    samples = SamplesInTraining(config, Corpus.open(corpus), None, ALONE)
    found = []
    for run in ("plain", "padded"):
        model = plain_model(config)
        if run == "padded":
            pad_mlps(model)
            assert attend_without_masks(model, 32)
        model.train()
        (tmp_path / run).mkdir()
        samples.write(model, 3, MetricsLog(RunDir(tmp_path / run), ALONE, silent, 1))
        assert model.training
        found.append([row["text"] for row in rows(tmp_path / run, "sample")])
    assert found[0] == found[1] and len(found[0]) == len(PROMPTS)


def test_the_time_of_samples_is_no_training_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("peptrain.training.metrics.time.perf_counter", lambda: now[0])
    log = MetricsLog(RunDir(tmp_path), ALONE, silent, tokens_per_step=30)
    log.add(1, {"lr": 0.1}, torch.ones(()), None, {})
    now[0] = 2.0
    with log.aside():
        now[0] = 7.0
    now[0] = 8.0
    log.flush()
    (row,) = rows(tmp_path)
    assert (row["seconds"], row["tokens_per_second"]) == (3.0, 10.0)


def test_a_run_keeps_its_prompts(corpus: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffeta\r\n\r\n nois \n".encode())
    asked = {**EVERY, "sample_prompts": file}
    with pytest.raises(Killed):
        train(tiny("full", corpus, tmp_path / "run", train=asked), kill_at("checkpoint", 4))
    file.unlink()
    assert (tmp_path / "run" / "prompts.txt").read_text("utf-8-sig") == "eta\n\n nois \n"
    resume(tmp_path / "run")
    found = rows(tmp_path / "run", "sample")
    assert [(row["step"], row["prompt"]) for row in found] == [
        (step, prompt) for step in (3, 6) for prompt in ("eta", " nois ")
    ]
    config = load(tmp_path / "run" / "config.toml")
    assert (config.train.sample_every, config.train.sample_prompts) == (3, file)
    with pytest.raises(ConfigError, match=r"train\.sample_prompts: must be a text file"):
        train(tiny("full", corpus, tmp_path / "again", train=asked))
    assert not (tmp_path / "again").exists()


def test_settings_that_nobody_gave_leave_a_configuration_as_it_was(corpus: Path) -> None:
    config = resolved(tiny("full", corpus), world_size=1, on_gpu=False)
    assert config.train.sample_every == 0
    assert "sample" not in essence(config)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "must be a text file with one prompt a line"),
        ("a directory", "must be a text file with one prompt a line"),
        (b"", r"must have 1 to 32 prompts, one a line \(got 0\)"),
        (b"\n \n", r"must have 1 to 32 prompts, one a line \(got 0\)"),
        (b"x\n" * 10_000, r"must have 1 to 32 prompts, one a line \(got 10,000\)"),
        (b"x" * ((1 << 20) + 1), "has more than 1,048,576 bytes"),
        (b"ab\xff", r"is not UTF-8 \(byte 2\)"),
    ],
)
def test_a_file_of_prompts_that_can_not_be_used_is_named(
    content: bytes | str | None, said: str, tmp_path: Path
) -> None:
    file = tmp_path / "prompts"
    if isinstance(content, str):
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"train\.sample_prompts: .*{said}"):
        read_prompts(file)


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_written(
    corpus: Path, tmp_path: Path
) -> None:
    file, run = tmp_path / "prompts.txt", tmp_path / "run"
    file.write_text("eta\n" + "noise " * 40)
    with pytest.raises(DataError, match=r"train\.sample_prompts: prompt 2, 'noise .* reads 32"):
        train(tiny("full", corpus, run, train={**EVERY, "sample_prompts": file}))
    small = {"vocab_size": 300}
    file.write_text("a")
    with pytest.raises(PeptrainError, match=r"train\.sample_every: must be >= 0"):
        tiny("full", corpus, run, train={**EVERY, "sample_every": -1}, model=small)
    assert not run.exists()


def test_whoever_reads_rows_reads_past_samples(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(tiny("full", corpus, run, train={**EVERY, "device": "cpu"}), show=True)
    text = rows(run, "sample")[0]["text"]
    assert f"step 3: sample: {PROMPTS[0]}|" in capsys.readouterr().out
    assert main(["watch", str(run)]) == 0
    assert "finished" in capsys.readouterr().out
    assert [scalars(row) for row in rows(run, "sample")] == [{}] * 6
    table = samples(read([run]))
    assert list(table.rows[0]) == ["run", "3", PROMPTS[0], escaped(text)] and len(table.rows) == 6
    assert main(["plot", str(run), "--out", str(tmp_path / "loss.svg")]) == 0
