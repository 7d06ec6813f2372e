"""Fine-tuning: what trains, that it resumes bit for bit, and that two ranks are as one."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Killed, kill_at, rows, step_numbers, tiny_method, untimed
from tuned import SHORT, WORDS, tuning, write_encoder

from peptrain.distributed.world import World
from peptrain.execution.label_loss import NO_TARGET, Labelled, LabelLoss, text_scores
from peptrain.methods import METHODS
from peptrain.models.auto import new_classifier
from peptrain.models.classifier import classifier_config
from peptrain.models.hf import ModelConfig
from peptrain.models.sites import find_sites
from peptrain.runs.build import open_run
from peptrain.testing import differences, newest
from peptrain.training.loop import resume, train
from peptrain.tuning.encode import encode_targets, encode_texts
from peptrain.tuning.objective import Labels, best_evaluation
from peptrain.tuning.settle import with_task
from peptrain.tuning.tokenizer import words_of

ALONE = World(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("name", [n for n, cls in METHODS.items() if not cls.from_scratch_only])
def test_every_method_can_fine_tune(name: str, decoder: Path, data: Path, tmp_path: Path) -> None:
    given = {"around": "frozen"} if name == "loro" else {}
    train(tuning(tiny_method(name, **given), decoder, data, tmp_path / "run"))
    (end,) = rows(tmp_path / "run", "end")
    assert end["step"] == 6 and end["validation_rows"] == 10
    assert -1 <= end["cola_matthews"] <= 1 and end["cola_majority_matthews"] == 0
    assert [row["step"] for row in rows(tmp_path / "run", "eval")] == [3]


USUAL = {("decoder", "cola"), ("encoder", "rte"), ("t5", "stsb")}


@pytest.mark.parametrize(
    "kind, task",
    [
        pytest.param(kind, task, marks=[] if (kind, task) in USUAL else pytest.mark.slow)
        for kind in ("decoder", "encoder", "t5")
        for task in ("cola", "rte", "stsb")
    ],
)
def test_every_kind_of_model_reads_every_kind_of_task(
    kind: str, task: str, data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """One text or two, classes or a number; a T5 writes the answer."""
    start = request.getfixturevalue(kind)
    train(tuning("lora", start, data, tmp_path / "run", {"task": task}))
    (end,) = rows(tmp_path / "run", "end")
    metric = {"cola": "matthews", "rte": "acc", "stsb": "spearman"}[task]
    assert end[f"{task}_{metric}"] is None or -1 <= end[f"{task}_{metric}"] <= 1
    sites = [site.name for site in find_sites(open_run(tmp_path / "run").model)]
    assert any("decoder" in name for name in sites) == (kind == "t5")


@pytest.mark.parametrize(
    "name", ["spectron", *(pytest.param(n, marks=pytest.mark.slow) for n in ("lowrank", "sltrain"))]
)
def test_a_model_may_ask_a_layer_without_w_for_its_weight(
    name: str, t5: Path, data: Path, tmp_path: Path
) -> None:
    """As T5's MLPs do, for its dtype."""
    train(tuning(tiny_method(name), t5, data, tmp_path / "run", {"task": "cola"}))
    assert rows(tmp_path / "run", "end")


@pytest.mark.parametrize(
    "name, event, at",
    [
        ("relora", "step", 2),
        ("loro", "eval", 3),
        pytest.param("full", "checkpoint", 3, marks=pytest.mark.slow),
        pytest.param("relora", "eval", 3, marks=pytest.mark.slow),
        pytest.param("relora", "checkpoint", 3, marks=pytest.mark.slow),
        pytest.param("loro", "step", 4, marks=pytest.mark.slow),
    ],
)
def test_a_resume_is_bit_for_bit_the_uninterrupted_run(
    name: str, event: str, at: int, decoder: Path, data: Path, tmp_path: Path
) -> None:
    given = {"around": "frozen"} if name == "loro" else {}
    method = tiny_method(name, **given)
    kept = {"checkpoint_every": 2}
    train(tuning(method, decoder, data, tmp_path / "whole", train=kept))
    with pytest.raises(Killed):
        train(tuning(method, decoder, data, tmp_path / "parted", train=kept), kill_at(event, at))
    resume(tmp_path / "parted")
    assert untimed(tmp_path / "parted") == untimed(tmp_path / "whole")
    assert differences(newest(tmp_path / "whole"), newest(tmp_path / "parted")) == []


TWO_RANKS = """
import sys
from pathlib import Path
from tuned import tuning
from peptrain.training.loop import train

start, data, out = map(Path, sys.argv[1:])
train(tuning("relora", start, data, out, train={"micro_batch": 1}))
"""


@pytest.mark.slow
def test_two_ranks_are_as_one(decoder: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(TWO_RANKS)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    subprocess.run(
        [*run, *map(str, (tmp_path / "ranks.py", decoder, data, tmp_path / "two"))],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        check=True,
        timeout=900,
    )
    train(tuning("relora", decoder, data, tmp_path / "one", train={"micro_batch": 1}))
    one, two = (newest(tmp_path / name) for name in ("one", "two"))
    for name, tensor in one.model.items():
        assert torch.allclose(tensor, two.model[name], rtol=0, atol=1e-12), name
    assert rows(tmp_path / "one", "end")[0]["held_out_loss"] == pytest.approx(
        rows(tmp_path / "two", "end")[0]["held_out_loss"], abs=1e-12
    )


def test_an_epoch_has_every_row_once(decoder: Path, data: Path) -> None:
    """22 rows in batches of 8: the third batch begins the second epoch."""
    config = with_task(tuning("full", decoder, data))
    objective = Labels(config, None, ALONE)
    drawn = [tuple(ids.tolist()) for step in range(6) for part in objective.batch(step)
             for ids in (part.ids[k][part.mask[k] == 1] for k in range(len(part)))]  # fmt: skip
    first, second = drawn[:22], drawn[22:44]
    assert sorted(first) == sorted(second) and first != second
    assert config.train.steps == 6 and config.train.eval_every == 3
    halves = [Labels(config, None, World(rank, 2, torch.device("cpu"))) for rank in (0, 1)]
    both = [part.labels.tolist() for half in halves for part in half.batch(1)]
    assert both == [part.labels.tolist() for part in objective.batch(1)]


@pytest.mark.parametrize("task, classes", [("cola", ["no", "yes"]), ("stsb", [])])
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_the_loss_is_hugging_faces(task: str, classes: list[str], kind: str, encoder: Path) -> None:
    given = ModelConfig(config=encoder) if kind == "encoder" else ModelConfig(
        hidden_size=16, layers=2, heads=2, intermediate_size=24, vocab_size=50)  # fmt: skip
    model = new_classifier(classifier_config(given, classes, 0, 24), torch.float64).eval()
    ids = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]])
    labels = torch.tensor([1, 0]) if classes else torch.tensor([2.5, 0.5], dtype=torch.float64)
    part = Labelled(ids, (ids > 0).long(), labels)
    wanted = model(**part.inputs(), labels=labels).loss
    assert LabelLoss(model)(part).item() == pytest.approx(wanted.item(), rel=1e-12)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_padding_changes_no_row(kind: str, encoder: Path) -> None:
    given = ModelConfig(config=encoder) if kind == "encoder" else ModelConfig(
        hidden_size=16, layers=2, heads=2, intermediate_size=24, vocab_size=50)  # fmt: skip
    model = new_classifier(classifier_config(given, ["no", "yes"], 0, 24), torch.float64).eval()
    alone = Labelled(torch.tensor([[8, 9]]), torch.ones(1, 2).long(), torch.tensor([1]))
    padded = Labelled(torch.tensor([[8, 9, 0, 0, 0]]), torch.tensor([[1, 1, 0, 0, 0]]),
                      torch.tensor([1]))  # fmt: skip
    loss = LabelLoss(model)
    assert loss(padded).item() == pytest.approx(loss(alone).item(), rel=1e-12)


def test_each_row_of_target_texts_counts_the_same(t5: Path, data: Path) -> None:
    """A row's loss is the mean over its target's tokens, and Hugging Face's own for one row."""
    model = new_classifier(classifier_config(ModelConfig(config=t5), [], 0, 24),
                           torch.float64).eval()  # fmt: skip
    ids, mask = torch.tensor([[5, 6, 1], [7, 1, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    labels = torch.tensor([[12, 14, 1], [13, 1, NO_TARGET]])
    each = [model(input_ids=ids[k : k + 1, :n], labels=labels[k : k + 1, :t]).loss.item()
            for k, n, t in ((0, 3, 3), (1, 2, 2))]  # fmt: skip
    assert LabelLoss(model)(Labelled(ids, mask, labels)).item() == pytest.approx(sum(each) / 2)
    scores = text_scores(model, Labelled(ids, mask, labels[:, 0]), labels)
    assert scores.diag().tolist() == pytest.approx([-3 * each[0], -2 * each[1]])


def test_a_template_adds_its_tokens_and_the_longer_text_is_cut(encoder: Path) -> None:
    words = words_of(encoder)
    texts = [("a cat", "a dog sat ."), ("a", "no")]
    ids, types, cut = encode_texts(words.tokenizer, texts, 8, words.end)
    said = [" ".join(WORDS[n] for n in one) for one in ids]
    assert said == ["<s> a cat </s> </s> a dog </s>", "<s> a </s> </s> no </s>"]
    assert cut == 1 and not any(one.any() for one in types)


def test_without_a_template_the_end_token_parts_two_texts(decoder: Path) -> None:
    words = words_of(decoder)
    a, b = (words.tokenizer.encode(text).ids for text in ("ab", "cdefgh"))
    for room in (len(a) + len(b) + 1, len(a) + 3):
        (ids,), (types,), cut = encode_texts(words.tokenizer, [("ab", "cdefgh")], room, words.end)
        assert ids.tolist() == [*a, words.end, *b][:room]
        assert types.tolist() == [*[0] * (len(a) + 1), *[1] * len(b)][:room]
        assert cut == (room < len(a) + len(b) + 1)


def test_padding_stays_within_the_length(data: Path, tmp_path: Path) -> None:
    """A model of 11 positions reads texts of 11 tokens, which are no multiple of 8."""
    start = write_encoder(tmp_path / "start", max_position_embeddings=12)
    train(tuning("full", start, data, tmp_path / "run", {"epochs": 1}, train={"seq_len": 11}))
    assert rows(tmp_path / "run", "end")


def test_texts_are_encoded_alike_in_parts(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = words_of(encoder)
    texts = [("a cat sat",), ("a dog",), ("no",), ("a cat sat . a dog ran",), ("yes",)]
    whole = encode_texts(words.tokenizer, texts, 5, words.end)
    monkeypatch.setattr("peptrain.tuning.encode.AT_ONCE", 2)
    parts = encode_texts(words.tokenizer, texts, 5, words.end)
    assert [one.tolist() for one in parts[0]] == [one.tolist() for one in whole[0]]
    assert len(parts[1]) == len(texts) and parts[2] == whole[2] == 1


def test_an_empty_text_is_the_end_token(decoder: Path) -> None:
    words = words_of(decoder)
    ids, _, cut = encode_texts(words.tokenizer, [("",), ("ab",)], 5, words.end)
    assert ids[0].tolist() == [words.end] and cut == 0


def test_target_texts_have_one_end(t5: Path) -> None:
    words = words_of(t5)
    table = encode_targets(words.tokenizer, ["yes", "not good"], words.end)
    assert table.tolist() == [
        [WORDS.index("yes"), words.end, NO_TARGET],
        [WORDS.index("not"), WORDS.index("good"), words.end],
    ]


def test_texts_that_are_cut_are_counted(
    decoder: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Labels(with_task(tuning("full", decoder, data, train={"seq_len": 4})), None, ALONE)
    said = [record.getMessage() for record in caplog.records]
    assert any("train.seq_len 4: cuts" in text and "of 22 training texts" in text for text in said)
    assert any("of 10 validation texts (" in text for text in said)
    caplog.clear()
    Labels(with_task(tuning("full", decoder, data, train={"seq_len": 200})), None, ALONE)
    assert not [r for r in caplog.records if "cuts" in r.getMessage()]


@pytest.mark.parametrize("values, best", [([0.1, 0.9, 0.5, 0.2], 6), ([0.3, 0.3, 0.1, 0.3], 3)])
def test_the_best_checkpoint_is_kept(
    values: list[float], best: int, decoder: Path, data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The first of equal ones, besides the latest."""
    given = iter(values)
    monkeypatch.setattr("peptrain.tuning.metrics.value", lambda *rest: next(given, 0.0))
    monkeypatch.setattr("peptrain.tuning.metrics.stderr", lambda *rest: None)
    run = tmp_path / "run"
    train(tuning("full", decoder, data, run, {"epochs": 4}, train={"keep": 1}))
    (end,) = rows(run, "end")
    assert [row["cola_matthews"] for row in (*rows(run, "eval"), end)] == values
    assert end["best_step"] == best and end["cola_best_matthews"] == max(values)
    assert step_numbers(run) == [best, 11]


def test_what_has_no_value_is_not_the_best() -> None:
    found = [{"step": 1, "x": None}, {"step": 2, "x": -0.5}, {"step": 3, "y": 1.0}]
    assert best_evaluation(found, "x") == (2, -0.5)
    assert best_evaluation(found[:1], "x") is None


def test_the_body_is_the_runs_and_the_head_is_the_seeds(
    decoder: Path, data: Path, tmp_path: Path
) -> None:
    made = {}
    for name, seed in (("one", 0), ("two", 1)):
        config = tuning("full", decoder, data, tmp_path / name,
                        train={"seed": seed, "keep_at": "0"})  # fmt: skip
        train(config)
        made[name] = open_run(Path(f"{tmp_path / name}@0")).model.state_dict()
    given = open_run(decoder).model.state_dict()
    for name, tensor in made["one"].items():
        if name.startswith("score."):
            assert not torch.equal(tensor, made["two"][name])
        else:
            assert torch.equal(tensor, given[name]) and torch.equal(tensor, made["two"][name])


def test_a_model_that_was_not_trained_is_step_0_of_its_run(
    decoder: Path, data: Path, tmp_path: Path
) -> None:
    start = Path(f"{decoder}@0")
    train(tuning("full", start, data, tmp_path / "run", train={"keep_at": "0"}))
    first = open_run(Path(f"{tmp_path / 'run'}@0")).model.state_dict()
    given = open_run(start).model.state_dict()
    assert all(torch.equal(p, given[n]) for n, p in first.items() if not n.startswith("score."))


def test_a_fine_tuned_run_can_be_fine_tuned_again(
    decoder: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With its head for the same classes, and with a new one for others."""
    train(tuning("full", decoder, data, tmp_path / "cola"))
    given = open_run(tmp_path / "cola").model.state_dict()
    for task, same in (("cola", True), ("rte", False)):
        run = tmp_path / f"then-{task}"
        train(tuning("full", tmp_path / "cola", data, run, {"task": task}, train={"keep_at": "0"}))
        first = open_run(Path(f"{run}@0")).model.state_dict()
        assert torch.equal(first["score.weight"], given["score.weight"]) == same
    assert "its head is replaced" in caplog.text


def test_frozen_parameters_stay(decoder: Path, data: Path, tmp_path: Path) -> None:
    method = tiny_method("lora", train="classifier", targets="q,k", warm_start_steps=0)
    train(tuning(method, decoder, data, tmp_path / "run", train={"keep_at": "0"}))
    first, last = (open_run(Path(f"{tmp_path / 'run'}@{n}")).model.state_dict() for n in (0, 6))
    moved = {name for name in last if not torch.equal(first[name], last[name])}
    assert {name.rpartition(".")[2] for name in moved} == {"A", "B", "weight"}
    assert all("q_proj" in n or "k_proj" in n or n == "score.weight" for n in moved)


def test_bf16_trains(decoder: Path, data: Path, tmp_path: Path) -> None:
    assert SHORT["precision"] == "fp64"
    for precision in ("bf16", "bf16-mixed"):
        run = tmp_path / precision
        train(tuning("relora", decoder, data, run, train={"precision": precision}))
        assert rows(run, "end")[0]["held_out_loss"] > 0


def test_the_pace_counts_tokens_without_padding(
    decoder: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Any] = []
    with caplog.at_level(logging.WARNING):
        train(tuning("full", decoder, data, tmp_path / "run"), seen.append)
    start = next(row for row in seen if row["event"] == "start")
    objective = Labels(with_task(tuning("full", decoder, data)), None, ALONE)
    assert start["task"] == "cola" and start["train_tokens"] == objective.train_tokens
    assert start["tokens_per_step"] == round(8 * objective.train_tokens / 22)
