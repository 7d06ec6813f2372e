"""What a run trains for: its data, how a model is judged, and the tokenizer that it keeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from peptrain.config import RunConfig
from peptrain.data import Corpus, configured_corpus
from peptrain.data.tokenizer import load_tokenizer
from peptrain.distributed.world import World
from peptrain.errors import ConfigError, DataError
from peptrain.eval.perplexity import Evaluation, Watch, held_out_loss
from peptrain.methods.base import Method
from peptrain.models.hf import vocabulary_size
from peptrain.models.probe import check_causal
from peptrain.runs.directory import RunDir
from peptrain.runs.init_from import compare_tokenizers
from peptrain.runs.tokenizer import restore_run_tokenizer, write_run_tokenizer
from peptrain.training.metrics import MetricsLog
from peptrain.training.samples import SamplesInTraining
from peptrain.training.tasks import TasksInTraining
from peptrain.tuning.objective import Labels

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Objective(Protocol):
    """Data, and evaluations of a model. Every process has one. The loss that belongs to it is
    chosen in `execution/prepare.py`, since the estimate needs it without data."""

    @property
    def best_by(self) -> str:
        """Name of the result whose largest value chooses a checkpoint to keep; empty for none."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identifies the training data in checkpoints."""
        ...

    @property
    def data(self) -> Mapping[str, str]:
        """Checksums of other data, in which all processes must agree."""
        ...

    @property
    def train_tokens(self) -> int:
        """Tokens of the training data."""
        ...

    @property
    def tokens_per_step(self) -> int: ...

    def check(self, model: PreTrainedModel) -> None:
        """Raise ConfigError or Unsupported for a model that does not suit the data."""
        ...

    def batch(self, step: int) -> Sequence[Any]:
        """Return this process's micro-batches of a step, on its device: a pure function of it."""
        ...

    def evaluate(
        self, model: PreTrainedModel, limit: int, watch: Watch
    ) -> tuple[Evaluation, Mapping[str, float | None]]:
        """Return the held-out loss and other results. Called on every rank.

        limit: the largest number of tokens of the loss, 0 for all.
        """
        ...

    def sample(self, model: PreTrainedModel, step: int, log: MetricsLog) -> None:
        """After each step write the rows of `train.sample_every`, if due. Called on every rank."""
        ...

    def write_tokenizer(self, run: RunDir) -> None:
        """Write the tokenizer into a new run. Raises OSError if that fails."""
        ...

    def restore_tokenizer(self, run: RunDir) -> None:
        """Write the tokenizer again if it is damaged. Raises CheckpointError if that fails."""
        ...

    def last(self, rows: Iterable[Mapping[str, Any]]) -> Mapping[str, float]:
        """Return what the last row of a run says about its evaluations, all in `rows`."""
        ...


class NextTokens:
    """Predicts the next token of a corpus, measures `eval.tasks` and writes samples of text."""

    best_by = ""

    def __init__(self, config: RunConfig[Method], run: RunDir | None, here: World) -> None:
        """Open the corpus, the data of tasks and the prompts of samples.

        run: one to resume, which verifies the shards again and has prompts of its own. Raises
        DataError or ConfigError for what is missing or damaged.
        """
        self._config, self._here = config, here
        self.corpus = configured_corpus(config.data.path, verify_again=run is not None)
        _check_corpus(self.corpus, config)
        self._tasks = TasksInTraining(config, self.corpus, here)
        self._samples = SamplesInTraining(config, self.corpus, run, here)

    @property
    def fingerprint(self) -> str:
        return self.corpus.fingerprint

    @property
    def data(self) -> Mapping[str, str]:
        return self._tasks.data

    @property
    def train_tokens(self) -> int:
        return self.corpus.train_tokens

    @property
    def tokens_per_step(self) -> int:
        return self._config.train.batch_size * self._config.train.seq_len

    def check(self, model: PreTrainedModel) -> None:
        check_vocabulary(model, self.corpus)
        self._samples.check(model)
        if self._config.model.config is not None:
            check_causal(model)

    def batch(self, step: int) -> Sequence[torch.Tensor]:
        return windows(self._config, self.corpus, step, self._here)

    def evaluate(
        self, model: PreTrainedModel, limit: int, watch: Watch
    ) -> tuple[Evaluation, Mapping[str, float | None]]:
        t = self._config.train
        assert t.precision is not None
        found = held_out_loss(
            model,
            self.corpus.held_out(),
            seq_len=t.seq_len,
            precision=t.precision,
            world=self._here,
            limit=limit,
            watch=watch,
        )
        return found, self._tasks.measure(model)

    def sample(self, model: PreTrainedModel, step: int, log: MetricsLog) -> None:
        self._samples.write(model, step, log)

    def write_tokenizer(self, run: RunDir) -> None:
        write_run_tokenizer(run, self.corpus)
        compare_tokenizers(self._config, self.corpus)

    def restore_tokenizer(self, run: RunDir) -> None:
        restore_run_tokenizer(run, self.corpus)

    def last(self, rows: Iterable[Mapping[str, Any]]) -> Mapping[str, float]:
        return {}


def objective_of(config: RunConfig[Method], run: RunDir | None, here: World) -> Objective:
    """Return what a new run, or one to resume, trains for."""
    if config.tune.task:
        return Labels(config, run, here)
    return NextTokens(config, run, here)


def windows(
    config: RunConfig[Method], corpus: Corpus, step: int, here: World
) -> Sequence[torch.Tensor]:
    """Return this process's micro-batches of windows [rows, seq_len + 1] of a step, on its
    device."""
    t = config.train
    assert t.micro_batch is not None
    rows = corpus.batch(
        seed=t.seed,
        step=step,
        rank=here.rank,
        world=here.size,
        batch_size=t.batch_size,
        seq_len=t.seq_len,
    ).to(here.device, non_blocking=True)
    return torch.split(rows, t.micro_batch)


def _check_corpus(corpus: Corpus, config: RunConfig[Method]) -> None:
    """Raise DataError early for a corpus that would make the training fail later."""
    corpus.windows(config.train.seq_len)
    load_tokenizer(corpus.tokenizer_file)
    if len(corpus.held_out()) < 2:
        raise DataError(
            f"{corpus.path}: the held-out set has fewer than 2 tokens, so there is nothing to"
            " evaluate on; prepare it with a larger --held-out, or with --held-out-inputs"
        )


def check_vocabulary(model: PreTrainedModel, corpus: Corpus) -> None:
    """Raise ConfigError unless the model has an embedding for every token id in the corpus."""
    vocabulary = vocabulary_size(model)
    if corpus.max_id >= vocabulary:
        raise ConfigError(
            f"model.vocab_size: too small for token id {corpus.max_id} in {corpus.path} (got"
            f" {vocabulary}); set it to {corpus.vocab_size}, or prepare the data with the model's"
            " own tokenizer"
        )
