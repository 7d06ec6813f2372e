"""The vocabulary of a new run's model: the corpus's, unless the settings say which."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import tiny

from peptrain.comparison.compare import _tell_of_other_vocabularies
from peptrain.comparison.grid import GridRun, expand
from peptrain.config import RunConfig, load
from peptrain.data import Corpus
from peptrain.estimation.estimate import estimate
from peptrain.models.hf import ModelConfig
from peptrain.runs.init_from import compare_tokenizers, with_inherited_model
from peptrain.training.loop import resume, train

SMALL = {"hidden_size": 16, "intermediate_size": 24, "layers": 2, "heads": 2}


@pytest.fixture(scope="module")
def size(corpus: Path) -> int:
    return Corpus.open(corpus).vocab_size


def without(corpus: Path | None, run: Path | None = None, **model: Any) -> RunConfig[Any]:
    """A run that says of the model only what is in `model`."""
    config = tiny("full", corpus or Path(), run, train={"steps": 2})
    config = replace(config, model=ModelConfig(**model))
    return config if corpus else replace(config, data=replace(config.data, path=None))


def test_a_new_run_has_the_vocabulary_of_its_corpus(
    corpus: Path, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    made = train(without(corpus, run, **SMALL))
    model = load(run / "config.toml").model
    assert (model.preset, model.vocab_size) == ("tiny", size)
    assert made.parameters == estimate(without(corpus, **SMALL)).phases[-1].total_parameters

    def asked(config: Any) -> Any:
        raise AssertionError("a resume decides nothing")

    monkeypatch.setattr("peptrain.training.loop.with_inherited_model", asked)
    resume(run)
    assert load(run / "config.toml").model == model


@pytest.mark.parametrize(
    "model", [{"preset": "tiny"}, {"vocab_size": 400}, {"preset": "llama-60m", "vocab_size": 400}]
)
def test_who_names_a_preset_or_a_vocabulary_gets_it(model: dict[str, Any], corpus: Path) -> None:
    assert with_inherited_model(without(corpus, **model)).model == ModelConfig(**model)


def test_a_corpus_that_is_missing_or_the_default_one_leaves_the_preset_s(tmp_path: Path) -> None:
    """The preset is made for the default corpus, and an estimate needs no corpus."""
    for config in (without(None), without(tmp_path / "missing")):
        assert with_inherited_model(config) == config


def test_other_weights_keep_their_vocabulary(corpus: Path, tmp_path: Path) -> None:
    train(without(corpus, tmp_path / "run", vocab_size=400, **SMALL))
    started = replace(without(corpus), init_from=tmp_path / "run")
    assert with_inherited_model(started).model.vocab_size == 400


@pytest.mark.parametrize(
    "model, said",
    [({"preset": "llama-60m"}, True), ({"preset": "tiny"}, True),
     ({"preset": "tiny", "vocab_size": 4000}, False), ({"config": Path("x")}, False)],
)  # fmt: skip
def test_a_preset_with_more_tokens_than_the_corpus_is_told_in_one_line(
    model: dict[str, Any], said: bool, corpus: Path, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    compare_tokenizers(without(corpus, **model), Corpus.open(corpus))
    wanted = f"of which {corpus} uses {size}; --model.vocab-size {size} leaves out the rest"
    assert [wanted in message for message in caplog.messages] == ([True] if said else [])
    compare_tokenizers(without(None, **model), Corpus.open(corpus))
    assert len(caplog.messages) == said
    assert not said or ("32,000" if model["preset"] == "llama-60m" else "4,096") in caplog.text


def grid_of(corpus: Path | None, **model: Any) -> GridRun:
    data = {"path": str(corpus)} if corpus else {}
    (run,) = expand(
        {"base": {"data": data, "model": model}, "grid": [{"method.name": "full"}]}
    ).runs
    return run


def test_the_runs_of_a_grid_are_configured_as_train_configures_them(
    corpus: Path, size: int
) -> None:
    assert grid_of(corpus).config.model.vocab_size == size
    assert grid_of(corpus, preset="tiny").config.model.vocab_size is None
    # The default corpus has the preset's, and such a grid the names of 0.1.0.
    assert grid_of(None).digest == grid_of(None, preset="tiny").digest


def test_a_grid_tells_of_its_runs_of_0_1_0_and_how_to_keep_them(
    corpus: Path, size: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now, kept = grid_of(corpus), grid_of(corpus, preset="tiny")
    assert now.digest_of_0_1_0 == kept.digest == kept.digest_of_0_1_0 != now.digest
    _tell_of_other_vocabularies([now], tmp_path)
    assert not caplog.messages
    (tmp_path / "runs" / kept.name).mkdir(parents=True)
    _tell_of_other_vocabularies([kept], tmp_path)
    assert not caplog.messages
    with caplog.at_level(logging.WARNING, "peptrain"):
        _tell_of_other_vocabularies([now], tmp_path)
    (message,) = caplog.messages
    assert "found 1 run of peptrain 0.1.0" in message
    assert f"({size})" in message and 'model.preset = "tiny" in [base]' in message
    (tmp_path / "runs" / now.name).mkdir()
    _tell_of_other_vocabularies([now], tmp_path)
    assert len(caplog.messages) == 1
