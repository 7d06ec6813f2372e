"""Fine-tuned runs on the command line: tune, compare, export, and commands that refuse them."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import as_toml, rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from tuned import tuning, write_encoder

from peptrain.analysis.analyze import analyze
from peptrain.cli.app import main
from peptrain.comparison.compare import compare
from peptrain.config import load
from peptrain.distributed.world import World
from peptrain.errors import ConfigError, Unsupported
from peptrain.estimation.estimate import estimate
from peptrain.eval.perplexity import unwatched
from peptrain.eval.run import evaluate
from peptrain.exporting.export import export
from peptrain.figures.read import read
from peptrain.figures.source import Source
from peptrain.reporting.report import report
from peptrain.reporting.tables import fine_tuned, shown, states
from peptrain.runs.build import build
from peptrain.runs.directory import RunDir
from peptrain.runs.init_from import with_inherited_model
from peptrain.tasks.subject import open_subject
from peptrain.training.loop import resume, train
from peptrain.tuning.objective import Labels
from peptrain.tuning.settle import with_task
from peptrain.tuning.weights import classifier_weights


def call(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str]:
    code = main([str(arg) for arg in args])
    said = capsys.readouterr()
    return code, re.sub(r"\s+", " ", said.out + said.err)


@pytest.fixture(scope="module")
def finished(encoder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder fine-tuned by relora, whose last row is the second evaluation."""
    run = tmp_path_factory.mktemp("tuned") / "run"
    train(tuning("relora", encoder, data, run, {"task": "rte"}, train={"keep_at": "3"}))
    return run


def test_the_command_has_short_flags_and_says_the_results(
    decoder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    code, said = call(
        capsys, "tune", "lora", "--init-from", decoder, "--task", "cola", f"--tasks-data={data}",
        "--epochs", 2, "--rows", 20, "--train.batch-size", 10, "--train.device", "cpu",
        "--method.rank", 2, "--run", run,
    )  # fmt: skip
    assert code == 0, said
    assert re.search(r"step 2: validation loss 0\.\d+, cola_matthews", said)
    assert "evaluating on all 10 validation rows" in said
    assert re.search(r"finished: validation loss [\d.]+, cola_matthews \S+; best at step", said)
    config = load(run / "config.toml")
    assert config.tune.rows == 20 and config.train.steps == 4 and config.optim.lr == 2e-4


def test_without_a_task_the_command_says_what_there_is(
    decoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = call(capsys, "tune", "lora", "--init-from", decoder)
    assert code == 1 and "--task: must be cola, sst2" in said
    code, said = call(capsys, "tune", "lora", "--init-from", decoder, "--task", "sst")
    assert code == 1 and "did you mean 'sst2'" in said


def test_the_help_shows_what_a_fine_tuning_needs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["tune", "lora", "--help"])
    said = capsys.readouterr().out
    for flag in ("--init-from", "--tune.task", "--tune.epochs", "--method.train"):
        assert f"{flag} " in said, flag
    assert "(default: 0.0002)" in said  # the learning rate


def test_a_longer_fine_tuning_is_a_new_one(finished: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.steps: follows from tune\.epochs"):
        resume(finished, steps=20)
    assert resume(finished).held_out.loss == rows(finished, "end")[0]["held_out_loss"]


def test_an_export_classifies_as_the_run_does(finished: Path, data: Path, tmp_path: Path) -> None:
    """By Hugging Face's own classes, of the same two texts."""
    out = export(Path(f"{finished}@3"), tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    texts = [json.loads(line) for line in (data / "rte" / "validation.jsonl").open()]
    one, two = ([row[key] for row in texts] for key in ("sentence1", "sentence2"))
    given = tokenizer(one, two, padding=True, truncation=True, max_length=24, return_tensors="pt")
    given.pop("token_type_ids", None)
    answers = model(**given).logits.argmax(1).tolist()
    correct = [answer == row["label"] for answer, row in zip(answers, texts, strict=True)]
    (evaluated,) = rows(finished, "eval")
    assert evaluated["step"] == 3 and sum(correct) / 10 == evaluated["rte_acc"]
    assert model.config.id2label == {0: "entailment", 1: "not_entailment"}


@pytest.mark.parametrize("kind, task", [("decoder", "cola"), ("decoder", "rte"), ("bert", "rte")])
def test_an_export_encodes_as_the_run_does(
    kind: str, task: str, decoder: Path, data: Path, tmp_path: Path
) -> None:
    """By `AutoTokenizer` alone, which parts, tells apart and fills up texts."""
    run, sped = tmp_path / "run", {"lr": 1e-2}
    start = decoder if kind == "decoder" else write_encoder(tmp_path / "bert", type_vocab_size=2)
    train(tuning("full", start, data, run, {"task": task}, optim=sped, train={"seq_len": 39}))
    out = export(run, tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    texts = [json.loads(line) for line in (data / task / "validation.jsonl").open()]
    columns = ["sentence"] if task == "cola" else ["sentence1", "sentence2"]
    given = ([row[key] for row in texts] for key in columns)
    inputs = tokenizer(*given, padding=True, truncation=True, max_length=39, return_tensors="pt")
    assert ("token_type_ids" in inputs) == (kind == "bert")
    loss = model(**inputs, labels=torch.tensor([row["label"] for row in texts])).loss.item()
    assert loss == pytest.approx(rows(run, "end")[0]["held_out_loss"], rel=1e-9)
    again = tmp_path / "again"  # its template is the same parting
    train(tuning("full", out, data, again, {"task": task}, optim=sped, train={"seq_len": 39}))
    assert rows(again)[0]["tokens"] == rows(run)[0]["tokens"]


def test_an_export_that_auto_tokenizer_reads_otherwise_is_warned_of(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    """As where it replaces a tokenizer by that of the model's type."""
    export(finished, tmp_path / "one")
    assert "AutoTokenizer" not in caplog.text
    monkeypatch.setattr("peptrain.exporting.encoding.load_tokenizer",
                        lambda out: lambda *texts: SimpleNamespace(input_ids=[0]))  # fmt: skip
    export(finished, tmp_path / "two")
    assert "AutoTokenizer replaces it" in caplog.text and "as the fine-tuning did" in caplog.text


def test_a_report_has_the_results_and_no_perplexity(finished: Path, tmp_path: Path) -> None:
    """Figures count the tokens of the texts, not those of full sequences."""
    (drawn,) = read([finished]).runs
    source = Source(runs=[drawn])
    (end,) = rows(finished, "end")
    (one,) = fine_tuned(source).rows
    told = end["rte_acc"], end["rte_best_acc"], end["rte_majority_acc"]
    assert [one[2], one[3], *one[5:]] == ["rte_acc", *map(shown, (*told, end["best_step"]))]
    (state,) = states(source).rows
    assert state[states(source).heads.index("ppl")] == "–"
    assert drawn.tokens_per_step == rows(finished)[-1]["tokens"] / 6 < 8 * 24
    page = report([finished], tmp_path / "report.html").read_text()
    assert "loss (per row)" in page and "nats per token" not in page
    assert "peptrain eval" not in page


def test_a_watch_counts_tokens_of_texts_and_says_no_perplexity(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, said = call(capsys, "watch", finished)
    tokens = rows(finished)[-1]["tokens"]
    assert f"{tokens:,} tokens {tokens // 6:,} a step" in said
    assert "perplexity" not in said and "held-out" not in said and "validation loss" in said
    file = RunDir(finished).metrics_file
    before = file.read_bytes()
    file.write_bytes(before.splitlines(keepends=True)[0])  # before the first evaluation
    _, said = call(capsys, "watch", finished)
    file.write_bytes(before)
    assert "loss" in said and "perplexity" not in said


def test_a_finished_fine_tuning_is_not_advised_to_be_longer(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, said = call(capsys, "resume", finished)
    assert "only evaluated" in said and "--train.steps" not in said


@pytest.mark.parametrize("kind", ["decoder", "t5"])
def test_other_kinds_are_exported_too(
    kind: str, data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = tmp_path / "run"
    train(tuning("full", request.getfixturevalue(kind), data, run, {"epochs": 1}))
    made = json.loads((export(run, tmp_path / "out") / "config.json").read_text())
    wanted = {"decoder": "LlamaForSequenceClassification", "t5": "T5ForConditionalGeneration"}
    assert made["architectures"] == [wanted[kind]]


def test_what_needs_a_language_model_refuses_a_fine_tuned_run(
    finished: Path, tmp_path: Path, encoder: Path, data: Path
) -> None:
    for refused in (evaluate, open_subject):
        with pytest.raises(ConfigError, match="fine-tuned on rte and is no language model"):
            refused(finished)
    with pytest.raises(Unsupported, match="--form factorised: is for language models"):
        export(finished, tmp_path / "out", "factorised")
    with pytest.raises(Unsupported, match=r"tune\.task: must be unset for an estimate"):
        estimate(tuning("lora", encoder, data))


def test_an_analysis_measures_all_but_gradients(finished: Path) -> None:
    (table,) = analyze([Path(f"{finished}@6")])
    found = json.loads(table.with_suffix(".json").read_text())
    assert "fine-tuned" in found["not_measured"]["gradient"]
    assert len(table.read_text().splitlines()) > 10


def test_an_encoders_observed_ranks_are_those_of_its_layers(
    encoder: Path, data: Path, tmp_path: Path
) -> None:
    observed = {"observe": "dynamics", "observe_budget": 1.0, "log_every": 1}
    train(tuning("full", encoder, data, tmp_path / "run", train=observed))
    assert {row["layer"] for row in rows(tmp_path / "run", "dynamics")} <= {0, 1}


def grid(folder: Path, start: Path, data: Path, **differs: Any) -> Path:
    """Full fine-tuning at two rates with two seeds."""
    base = {"init_from": str(start), "tune.task": "cola", "tune.tasks_data": str(data),
            "tune.epochs": 1, "train.device": "cpu", "train.batch_size": 11, "train.seq_len": 24,
            "optim.lr": [1e-4, 1e-2], "train.seed": [0, 1]}  # fmt: skip
    path = folder / "grid.toml"
    text = f"[[grid]]\n{as_toml({'method.name': 'full'})}"
    equal = differs.pop("equal", "tokens")
    path.write_text(f'equal = "{equal}"\n[base]\n{as_toml(base | differs)}{text}')
    return path


@pytest.mark.slow
def test_a_comparison_chooses_rates_by_the_result(
    decoder: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    made = compare(grid(tmp_path, decoder, data), out, 2)
    assert made.tuned == "cola_matthews" and "Fine-tuned for 1 epochs" in made.caption
    assert "ppl" not in made.columns and "cola_best_matthews" in made.columns
    (full,) = made.lines
    assert ",perplexity," in (out / "table.csv").read_text()
    assert json.loads((out / "runs.json").read_text())["configurations"][0]["perplexity"] is None
    ends = [rows(run, "end")[0] for run in sorted((out / "runs").glob("full-*"))]
    by_rate = [sum(end["cola_matthews"] for end in ends[k : k + 2]) / 2 for k in (0, 2)]
    assert full.tasks["cola_matthews"] == max(by_rate) and full.seeds == 2
    assert full.widths.keys() == full.tasks.keys()
    before = [run.stat().st_mtime_ns for run in sorted((out / "runs").glob("*/metrics.jsonl"))]
    assert compare(grid(tmp_path, decoder, data), out, 2) == made
    after = [run.stat().st_mtime_ns for run in sorted((out / "runs").glob("*/metrics.jsonl"))]
    assert after == before  # nothing is trained again


def test_a_comparison_of_fine_tunings_has_equal_epochs(
    decoder: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match='equal: must be "tokens" to fine-tune'):
        compare(grid(tmp_path, decoder, data, equal="flops"), tmp_path / "out")
    two = grid(tmp_path, decoder, data, **{"tune.rows": [11, 22]})
    with pytest.raises(ConfigError, match=r"must be the same in all runs"):
        compare(two, tmp_path / "out")


def test_a_model_is_judged_the_same_whatever_its_batch(encoder: Path, data: Path) -> None:
    """The evaluation has batches of its own, by length."""
    alone = World(0, 1, torch.device("cpu"))
    asked = tuning("full", encoder, data, tune={"task": "rte"})
    config = with_task(with_inherited_model(asked))
    model = build(config, 0, classifier_weights(config))
    found = Labels(config, None, alone).evaluate(model, 0, unwatched)
    other = replace(config, train=replace(config.train, batch_size=2, micro_batch=1))
    assert Labels(other, None, alone).evaluate(model, 0, unwatched) == found
