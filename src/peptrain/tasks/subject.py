"""Open what is judged, or writes a text: a run, a Hugging Face directory, a factorised export."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peptrain.analysis.source import is_run, pretrained
from peptrain.data import Corpus
from peptrain.data.tokenizer import load_tokenizer
from peptrain.errors import CheckpointError, DataError, PeptrainError
from peptrain.eval.run import refuse_tuned
from peptrain.exporting.factorised import check_tokenizer, holds_factors, load_factorised
from peptrain.models.hf import Precision, vocabulary_size
from peptrain.runs.build import open_run
from peptrain.runs.checkpoint import Checkpoint
from peptrain.runs.directory import RunDir
from peptrain.runs.tokenizer import load_run_tokenizer
from peptrain.tasks.measure import Judge
from peptrain.tasks.spans import Encoder, encoder_of_directory, encoder_of_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNLIMITED = 2048
"""Positions read of a model whose config.json names no limit, as in the harness."""


@dataclass(frozen=True)
class Subject:
    """A model with its tokenizer."""

    path: Path
    model: PreTrainedModel
    encoder: Encoder
    positions: int
    """Of a run the length of its training sequences; of a directory what its config.json says."""
    precision: Precision
    run: RunDir | None = None
    step: int | None = None
    weights: str = ""
    """A checksum of a run's checkpoint."""

    @property
    def name(self) -> str:
        return str(self.path) if self.run is None else f"{self.run.path}@{self.step}"

    def judge(self, device: torch.device, positions: int | None = None) -> Judge:
        """Return the judge of the model on `device`."""
        model: Any = self.model.to(device)  # type: ignore[arg-type]
        return Judge(model, self.encoder, positions or self.positions, self.precision)

    def tokens_of(self, data: Path) -> Corpus:
        """Open a prepared corpus. Raises DataError if it was prepared with another tokenizer."""
        corpus = Corpus.open(data)
        if load_tokenizer(corpus.tokenizer_file).get_vocab() != self.encoder.vocabulary:
            raise DataError(
                f"--data {data}: prepared with another tokenizer than that of {self.path};"
                f" prepare the text again with --tokenizer {self._tokenizer}"
            )
        if corpus.max_id >= vocabulary_size(self.model):
            raise DataError(
                f"--data {data}: contains token id {corpus.max_id}, but the vocabulary size of"
                f" {self.path} is {vocabulary_size(self.model)}"
            )
        return corpus

    @property
    def _tokenizer(self) -> Path:
        return self.path if self.run is None else self.run.tokenizer


def open_subject(path: Path) -> Subject:
    """Open RUN, RUN@STEP, or a Hugging Face directory, also a factorised export.

    A run's model is the dense equivalent, or the model itself without one. Raises CheckpointError
    for what can't be read.
    """
    if is_run(path):
        opened = open_run(path)
        refuse_tuned(opened.config, path)
        train, tokenizer = opened.config.train, load_run_tokenizer(opened.run)
        assert train.precision is not None
        encoder = encoder_of_run(opened.run.tokenizer, *tokenizer)
        return Subject(path, opened.evaluated(), encoder, train.seq_len, train.precision,
                       opened.run, opened.saved.step, _weights(opened.saved))  # fmt: skip
    if holds_factors(path):
        model = load_factorised(path)
        check_tokenizer(path)
    else:
        model = pretrained(path, "auto")
    try:
        encoder = encoder_of_directory(path)
    except PeptrainError as error:
        said = str(error).removeprefix("tokenizer: ")
        raise CheckpointError(f"{path}: no tokenizer to read texts with: {said}") from error
    return Subject(path, model, encoder, _positions(model), "fp32")


def _weights(saved: Checkpoint) -> str:
    return hashlib.sha256(saved.sums.encode()).hexdigest()[:16]


def _positions(model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    for key in ("n_positions", "max_position_embeddings", "n_ctx"):
        if isinstance(value := getattr(config, key, None), int) and value > 0:
            return value
    return UNLIMITED
