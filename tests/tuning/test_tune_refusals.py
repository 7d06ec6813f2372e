"""What can't be fine-tuned is refused by name, before anything is written."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support import Killed, kill_at, tiny
from transformers import RobertaConfig, RobertaForSequenceClassification
from tuned import ROBERTA, WORDS, tuning, write_encoder, write_rows, write_t5

from peptrain.config import load
from peptrain.errors import CheckpointError, ConfigError, DataError
from peptrain.exporting.export import export
from peptrain.models.hf import ModelConfig
from peptrain.training.loop import resume, train
from peptrain.tuning.settle import with_task
from peptrain.tuning.tokenizer import words_of


@pytest.mark.parametrize(
    "differs, error, said",
    [
        ({"init_from": None}, ConfigError, "init_from: must be a run or a Hugging Face directory"),
        ({"tune": {"task": "colla"}}, ConfigError, "tune.task: unknown task 'colla'.*'cola'"),
        ({"tune": {"tasks_data": None}}, DataError, "--tasks-data: must be given"),
        ({"tune": {"task": "mrpc"}}, DataError, "mrpc.*is missing"),
        ({"tune": {"rows": 23}}, ConfigError, r"tune.rows: must be <= 22.*\(got 23\)"),
        ({"tune": {"labels": "a,b,c"}}, ConfigError, "tune.labels: must be unset for cola"),
        ({"data": True}, ConfigError, "data.path: must be unset to fine-tune"),
        ({"train": {"sample_every": 2}}, ConfigError, "train.sample_every: must be 0 to fine-tune"),
        ({"train": {"cuda_graph": True}}, ConfigError, "train.cuda_graph: must be false"),
        ({"continue_from": True}, ConfigError, "continue_from"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    differs: dict[str, Any], error: type[Exception], said: str, decoder: Path, data: Path,
    corpus: Path, tmp_path: Path,
) -> None:  # fmt: skip
    sections = {key: value for key, value in differs.items() if isinstance(value, dict)}
    config = tuning("full", decoder, data, tmp_path / "run", **sections)
    if "init_from" in differs:
        config = replace(config, init_from=None)
    if "data" in differs:
        config = replace(config, data=replace(config.data, path=corpus))
    if "continue_from" in differs:
        config = replace(config, continue_from=decoder)
    with pytest.raises(error, match=f"(?s){said}"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_a_method_that_keeps_no_given_weights_is_refused_with_a_repair_that_helps(
    decoder: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="; choose another method, such as lowrank"):
        train(tuning("cola", decoder, data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_head_for_other_classes_is_refused(data: Path, tmp_path: Path) -> None:

    start = write_encoder(tmp_path / "start")
    RobertaForSequenceClassification(RobertaConfig(**ROBERTA, num_labels=3)).save_pretrained(start)
    with pytest.raises(ConfigError, match=r"has a head for 3 classes, but tune\.task cola has 2"):
        train(tuning("full", start, data, tmp_path / "run"))


def test_a_head_for_classes_of_other_names_is_refused(data: Path, tmp_path: Path) -> None:
    """As many classes do not make it the same task. LABEL_0 may be any class."""
    start = write_encoder(tmp_path / "start")
    names = {0: "entailment", 1: "not_entailment"}
    saved = RobertaForSequenceClassification(RobertaConfig(**ROBERTA, id2label=names))
    saved.save_pretrained(start)
    with pytest.raises(ConfigError, match="a head for the classes entailment, not_entailment, but"):
        train(tuning("full", start, data, tmp_path / "run"))
    train(tuning("full", start, data, tmp_path / "rte", {"task": "rte", "epochs": 1}))
    RobertaForSequenceClassification(RobertaConfig(**ROBERTA)).save_pretrained(start)
    train(tuning("full", start, data, tmp_path / "unnamed", {"epochs": 1}))


@pytest.mark.parametrize(
    "kind, lost",
    [
        ("encoder", "roberta.embeddings.position_embeddings.weight"),
        ("t5", "encoder.final_layer_norm.weight"),
    ],
)
def test_a_model_without_some_weights_is_refused(
    kind: str, lost: str, data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Also those outside the layers. Only a head and a pooler are drawn."""
    start = shutil.copytree(request.getfixturevalue(kind), tmp_path / "start")
    weights = load_file(start / "model.safetensors")
    del weights[lost]
    save_file(weights, start / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=rf"has nothing for {lost}.*give a complete model"):
        train(tuning("full", start, data, tmp_path / "run"))


def test_another_function_with_the_same_shapes_is_refused(
    decoder: Path, encoder: Path, data: Path, tmp_path: Path
) -> None:
    """Another number of heads, say. Dropout is no part of the function."""
    config = tuning("full", decoder, data, tmp_path / "run")
    heads = replace(load(decoder / "config.toml").model, heads=4)
    with pytest.raises(ConfigError, match="has head_dim 8, but the model of this run"):
        train(replace(config, model=heads))
    given = json.loads((encoder / "config.json").read_text())
    file = tmp_path / "config.json"
    file.write_text(json.dumps(given | {"hidden_act": "relu"}))
    config = tuning("full", encoder, data, tmp_path / "run", {"epochs": 1})
    with pytest.raises(ConfigError, match="has hidden_act 'gelu', but the model of this run"):
        train(replace(config, model=ModelConfig(config=file)))
    file.write_text(json.dumps(given | {"hidden_dropout_prob": 0.0}))
    train(replace(config, model=ModelConfig(config=file)))


def test_a_factorised_export_is_refused_by_name(corpus: Path, data: Path, tmp_path: Path) -> None:
    train(tiny("lowrank", corpus, tmp_path / "lowrank", train={"device": "cpu"}))
    out = export(tmp_path / "lowrank", tmp_path / "out", "factorised")
    for config in (tuning("full", out, data), tiny("full", corpus)):
        with pytest.raises(ConfigError, match=r"config\.json: a factorised export; give the run"):
            train(replace(config, init_from=out, run=tmp_path / "run"))


def test_a_tokenizer_of_another_model_is_refused(data: Path, tmp_path: Path) -> None:
    start = write_encoder(tmp_path / "start", vocab_size=9)
    with pytest.raises(ConfigError, match=r"model.vocab_size: too small .* \(got 9\)"):
        train(tuning("full", start, data, tmp_path / "run"))
    (start / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"init_from: .* has no tokenizer.json"):
        train(tuning("full", start, data, tmp_path / "run"))


def test_a_tokenizer_may_have_ids_that_no_text_has(data: Path, tmp_path: Path) -> None:
    """T5's has 32,100, and models with 32,000 are trained on its texts."""
    known = WORDS.index("no") + 1  # the last word of the texts of CoLA
    start = write_encoder(tmp_path / "start", vocab_size=known)
    train(tuning("full", start, data, tmp_path / "run", {"epochs": 1}))
    start = write_encoder(tmp_path / "smaller", vocab_size=known - 1)
    with pytest.raises(ConfigError, match=rf"token id {known - 1} in the data"):
        train(tuning("full", start, data, tmp_path / "another"))
    start = write_t5(tmp_path / "t5", vocab_size=WORDS.index("0.4"))  # of a target, 0.4 to 4.4
    with pytest.raises(ConfigError, match=rf"token id {WORDS.index('4.4')} in the data"):
        train(tuning("full", start, data, tmp_path / "third", {"task": "stsb"}))


def renamed(start: Path, copy: Path, **words: str) -> Path:
    """Copy a model with other names for some tokens of its tokenizer."""
    shutil.copytree(start, copy)
    content = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {words.get(w, w): number for w, number in vocabulary.items()}
    (copy / "tokenizer.json").write_text(json.dumps(content))
    return copy


def test_an_encoder_may_name_a_separator_and_no_end(
    encoder: Path, data: Path, tmp_path: Path
) -> None:
    """As BERT does."""
    start = shutil.copytree(encoder, tmp_path / "start")
    content = (start / "tokenizer.json").read_text()
    (start / "tokenizer.json").write_text(content.replace("</s>", "[SEP]"))
    config = start / "tokenizer_config.json"
    config.write_text('{"pad_token": "<pad>"}')
    with pytest.raises(ConfigError, match="name one of its tokens as eos_token or sep_token in"):
        train(tuning("full", start, data, tmp_path / "run"))
    config.write_text('{"pad_token": "<pad>", "sep_token": "[SEP]"}')
    train(tuning("full", start, data, tmp_path / "run", {"epochs": 1}))
    assert words_of(start).end == WORDS.index("</s>")


def test_a_text_without_tokens_is_refused(encoder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data")
    start = renamed(encoder, tmp_path / "start")
    content = json.loads((start / "tokenizer.json").read_text())
    del content["model"]["vocab"]["<unk>"]
    (start / "tokenizer.json").write_text(json.dumps(content))
    with (data / "cola" / "train.jsonl").open("a") as file:
        file.write('{"sentence": "zebra", "label": 1}\n')
    with pytest.raises(DataError, match=r"can.t encode the text.*with an unknown token"):
        train(tuning("full", start, data, tmp_path / "run"))


def test_answers_that_a_text_model_can_not_tell_apart_are_refused(
    t5: Path, data: Path, tmp_path: Path
) -> None:
    start = renamed(t5, tmp_path / "start", acceptable="x", unacceptable="y")
    with pytest.raises(ConfigError, match="'unacceptable' and 'acceptable' are the same tokens"):
        train(tuning("full", start, data, tmp_path / "run"))
    train(tuning("full", start, data, tmp_path / "run", {"task": "rte", "epochs": 1}))


def test_a_text_model_needs_words_and_a_first_token(t5: Path, data: Path, tmp_path: Path) -> None:
    task = write_rows(tmp_path / "own") / "stsb" / "own.toml"
    task.write_text('texts = ["sentence1"]\nlabels = []\n')
    with pytest.raises(ConfigError, match=r"own\.toml: words: must be given"):
        train(tuning("full", t5, data, tmp_path / "run", {"task": str(task)}))
    start = shutil.copytree(t5, tmp_path / "start")
    given = json.loads((start / "config.json").read_text())
    del given["decoder_start_token_id"]
    (start / "config.json").write_text(json.dumps(given))
    with pytest.raises(ConfigError, match=r"init_from: decoder_start_token_id in config\.json"):
        train(tuning("full", start, data, tmp_path / "run"))


def test_other_rows_are_noticed_at_a_resume(decoder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data")
    with pytest.raises(Killed):
        train(tuning("full", decoder, data, tmp_path / "run"), kill_at("checkpoint", 3))
    file = data / "cola" / "train.jsonl"
    first, *rest = file.read_text().splitlines()
    changed = json.dumps(json.loads(first) | {"sentence": "no no no"})
    file.write_text("\n".join([changed, *rest]) + "\n")
    with pytest.raises(CheckpointError, match="data"):
        resume(tmp_path / "run")


@pytest.mark.parametrize(
    "was, now, error, said",
    [
        ('"yes"]', '"maybe"]', ConfigError, "tune.labels: 'no,yes' in this run, but .* restore"),
        ('"acc"', '"matthews"', CheckpointError, "data: .* restore the run's original data"),
        ('"sentence1"', '"sentence2"', CheckpointError, "data: .*restore the run's original data"),
    ],
)
def test_an_edited_task_is_noticed_at_a_resume(
    was: str, now: str, error: type[Exception], said: str, decoder: Path, tmp_path: Path
) -> None:
    task = write_rows(tmp_path) / "rte" / "own.toml"
    task.write_text('texts = ["sentence1"]\nlabels = ["no", "yes"]\nmetrics = ["acc"]\n')
    config = tuning("full", decoder, tmp_path, tmp_path / "run", {"task": str(task)})
    with pytest.raises(Killed):
        train(config, kill_at("checkpoint", 3))
    task.write_text(task.read_text().replace(was, now))
    with pytest.raises(error, match=said):
        resume(tmp_path / "run")


def test_settings_that_a_fine_tuning_determines_are_not_silently_replaced(
    decoder: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of the run's own config.toml are the same, and the defaults were not given."""
    config = tuning("full", decoder, data, train={"steps": 100, "eval_tokens": 5})
    settled = with_task(config)
    for said in ("train.steps: 100 is not used", "train.eval_tokens: 5 is not used"):
        assert said in caplog.text
    caplog.clear()
    with_task(settled)
    with_task(replace(config, train=replace(config.train, steps=300, eval_tokens=None)))
    assert "not used" not in caplog.text


def test_a_pre_training_does_not_start_from_a_classifier(
    decoder: Path, encoder: Path, data: Path, corpus: Path, tmp_path: Path
) -> None:
    for start in (decoder, encoder):
        train(tuning("full", start, data, run := tmp_path / start.name, {"epochs": 1}))
        config = replace(tiny("full", corpus), init_from=run, model=ModelConfig())
        with pytest.raises(ConfigError, match=rf"fine-tuned on cola and is no.* give .*{start}"):
            train(config)


def test_a_damaged_tokenizer_is_noticed_at_a_resume(
    decoder: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        train(tuning("full", decoder, data, tmp_path / "run"), kill_at("checkpoint", 3))
    file = tmp_path / "run" / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace("e", "f", 1))
    with pytest.raises(CheckpointError, match=r"differs from what the run wrote.*init_from"):
        resume(tmp_path / "run")


def test_an_encoder_has_fewer_positions_than_its_table_has_rows(data: Path, tmp_path: Path) -> None:
    """RoBERTa's first position is that after the padding's id, which may be 0."""
    for pad in (0, 1):
        start = write_encoder(tmp_path / f"start{pad}", pad_token_id=pad)
        config = tuning("full", start, data, tmp_path / f"run{pad}", train={"seq_len": 40 - pad})
        with pytest.raises(ConfigError, match=rf"seq_len: must be at most .* {39 - pad} positions"):
            train(config)
        train(replace(config, train=replace(config.train, seq_len=39 - pad)))


@pytest.mark.parametrize("kind, most", [("encoder", 4), ("decoder", 1)])
def test_a_length_without_room_for_text_is_refused(
    kind: str, most: int, data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """<s>, </s> and </s> </s>, or the end token between two texts."""
    start = request.getfixturevalue(kind)
    config = tuning("full", start, data, tmp_path / "run", {"task": "rte"}, train={"seq_len": most})
    with pytest.raises(ConfigError, match=rf"train\.seq_len: must be > {most}, .*\(got {most}\)"):
        train(config)
    train(replace(config, train=replace(config.train, seq_len=most + 1)))


def test_the_padding_is_an_id_of_the_model_and_moves_no_position(
    encoder: Path, decoder: Path, data: Path, tmp_path: Path
) -> None:
    config = tuning("full", decoder, data, tmp_path / "run", {"pad_token": 320})
    with pytest.raises(ConfigError, match=r"tune\.pad_token: must be < 320, .*\(got 320\)"):
        train(config)
    config = tuning("full", encoder, data, tmp_path / "run", {"pad_token": 3})
    with pytest.raises(ConfigError, match=r"tune\.pad_token: must be unset or 0, .*\(got 3\)"):
        train(config)


def test_a_fine_tuned_encoder_keeps_its_padding(data: Path, tmp_path: Path) -> None:
    """Also where only its config.json names it."""
    start = write_encoder(tmp_path / "start", pad_token_id=3)
    (start / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    for name in ("one", "two"):
        train(tuning("full", start, data, tmp_path / name, {"epochs": 1}))
        assert load(tmp_path / name / "config.toml").tune.pad_token == 3
        start = tmp_path / "one"
