"""Fine-tuning as a training objective: labelled rows, their loss, and the metrics of a task."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peptrain.config import RunConfig
from peptrain.data.corpus import order
from peptrain.distributed.world import World
from peptrain.errors import ConfigError
from peptrain.eval.perplexity import Evaluation, Watch
from peptrain.execution.label_loss import Labelled, row_losses, text_scores
from peptrain.methods.base import Method
from peptrain.models.hf import autocast, hf_config, positions_of, vocabulary_size
from peptrain.models.probe import evaluating
from peptrain.runs.directory import RunDir
from peptrain.runs.tokenizer import keep_tokenizer
from peptrain.settings.fields import check
from peptrain.tuning import metrics
from peptrain.tuning.encode import Encoded, encode_targets, encode_texts
from peptrain.tuning.settle import training_rows
from peptrain.tuning.tasks import (
    Example,
    read_examples,
    target_word,
    target_words,
    text_form,
    tuning_task,
)
from peptrain.tuning.tokenizer import check_vocabulary, words_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("peptrain")
ROWS_IN_A_FORWARD = 32
"""Of an evaluation. Fixed, so that the training's micro-batch does not change what is measured."""


@dataclass(frozen=True)
class ValidationLoss(Evaluation):
    """The mean loss of validation rows. `tokens` is their number."""

    def row(self) -> dict[str, float | None]:
        return {"held_out_loss": self.loss, "validation_rows": self.tokens}


class Labels:
    """Trains and judges a model on a task with labels. Every process has one."""

    def __init__(self, config: RunConfig[Method], run: RunDir | None, here: World) -> None:
        """Read the data. Raises ConfigError or DataError before anything is written."""
        t, tune = config.train, config.tune
        assert t.micro_batch is not None and t.precision is not None and config.init_from
        self._here, self._train, self._pad = here, t, tune.pad_token or 0
        self._precision = t.precision
        self.task = tuning_task(tune.task, "tune.task")
        self._own = tune.task.endswith(".toml")
        names = ",".join(self.task.labels)
        if names != tune.labels:
            raise ConfigError(f"tune.labels: {tune.labels!r} in this run, but {tune.task} now has"
                              f" {names!r}; restore that file")  # fmt: skip
        self._words = words_of(config.init_from if run is None else run.path)
        made = hf_config(config.model, t.seq_len)
        self._writes_text = bool(made.is_encoder_decoder)
        self._typed = (getattr(made, "type_vocab_size", None) or 0) > 1
        self._model_pad = made.pad_token_id
        if self._writes_text:
            words = target_words(self.task)
            self._targets = encode_targets(self._words.tokenizer, words, self._words.end)
        self._rows = self._encoded(training_rows(tune.task, tune.tasks_data, tune.rows))
        self._validation, self._gold = dict[str, Encoded](), dict[str, list[float]]()
        for suffix, splits in self.task.validation.items():
            examples = read_examples(self.task, tune.tasks_data, splits)
            self._validation[suffix] = self._encoded(examples)
            self._gold[suffix] = [example.label for example in examples]
        self._say_what_is_cut()

    def _encoded(self, examples: Sequence[Example]) -> Encoded:
        task, words, seq_len = self.task, self._words, self._train.seq_len
        if self._writes_text:
            texts: list[tuple[str, ...]] = [(text_form(task, example),) for example in examples]
        else:
            texts = [example.texts for example in examples]
        ids, types, cut = encode_texts(words.tokenizer, texts, seq_len, words.end)
        return Encoded(ids, types, self._labels(examples), cut, seq_len)

    def _labels(self, examples: Sequence[Example]) -> Tensor:
        if self._writes_text:
            words = [target_word(self.task, example) for example in examples]
            return self._targets[[self.task.words.index(word) for word in words]]
        values = torch.tensor([example.label for example in examples], dtype=torch.float64)
        return values.long() if self.task.labels else values

    def _say_what_is_cut(self) -> None:
        validation = {f"validation{suffix}": part for suffix, part in self._validation.items()}
        for name, part in {"training": self._rows, **validation}.items():
            if part.cut and self._here.main:
                log.warning(
                    "train.seq_len %d: cuts %s of %s %s texts (%.3g %%); raise it to keep them",
                    self._train.seq_len, f"{part.cut:,}", f"{len(part):,}", name,
                    100 * part.cut / len(part),
                )  # fmt: skip

    @property
    def fingerprint(self) -> str:
        """16 hex digits that identify the data in checkpoints."""
        sums = [part.checksum() for part in (self._rows, *self._validation.values())]
        sums += self.task.metrics if self._own else ()  # they may be edited before a resume
        return sha256(" ".join(sums).encode()).hexdigest()[:16]

    @property
    def data(self) -> dict[str, str]:
        """Checksums of other data, in which all processes must agree: none."""
        return {}

    @property
    def train_tokens(self) -> int:
        return self._rows.tokens

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step without padding, on average."""
        return round(self._train.batch_size * self._rows.tokens / len(self._rows))

    @property
    def best_by(self) -> str:
        """Name of the result whose largest value chooses the best checkpoint."""
        return self.task.best_by

    def check(self, model: PreTrainedModel) -> None:
        """Raise ConfigError unless the model can read the data."""
        parts = (self._rows, *self._validation.values())
        largest = max(part.largest for part in parts)
        check_vocabulary(self._words, largest, vocabulary_size(model))
        start = getattr(model.config, "decoder_start_token_id", None)
        check(not self._writes_text or start is not None,
              "init_from: decoder_start_token_id in config.json", start,
              "the id that a text begins with, of T5 that of the padding")  # fmt: skip
        positions, seq_len = positions_of(model), self._train.seq_len
        wanted = f"at most the model's {positions} positions"
        check(positions is None or seq_len <= positions, "train.seq_len", seq_len, wanted)
        wanted = f"unset or {self._model_pad}, from which the model counts positions"
        fits = positions is None or self._pad == self._model_pad
        check(fits, "tune.pad_token", self._pad, wanted)

    def batch(self, step: int) -> list[Labelled]:
        """Return this process's micro-batches of a step, on its device.

        Sample i = step * batch_size + row is row order[i % n] of epoch i // n, where `order` is a
        permutation given by (seed, epoch), so the last step may begin one more epoch.
        """
        t, n = self._train, len(self._rows)
        share = t.batch_size // self._here.size
        first = step * t.batch_size + self._here.rank * share
        places = (divmod(first + row, n) for row in range(share))
        numbers = [int(order(t.seed, epoch, n)[place]) for epoch, place in places]
        assert t.micro_batch is not None
        parts = (numbers[at : at + t.micro_batch] for at in range(0, share, t.micro_batch))
        return [self._rows.rows(part, self._pad, self._here.device, self._typed) for part in parts]

    @torch.no_grad()
    def evaluate(
        self, model: PreTrainedModel, limit: int, watch: Watch
    ) -> tuple[Evaluation, dict[str, float | None]]:
        """Return the validation loss and the results, named TASK_METRIC. Called on every rank.

        limit: not used, since all rows are always measured. The rows are shared among the
        processes. The loss is that of the first split.
        """
        total = sum(map(len, self._validation.values()))
        done, found, losses = 0, dict[str, float | None](), []
        with evaluating(model):
            for suffix, part in self._validation.items():
                loss, predicted = self._predicted(
                    model, part, lambda n, done=done: watch(done + n, total)
                )
                losses.append(ValidationLoss(loss, len(part)))
                done += len(part)
                found |= self._values(suffix, predicted)
        return losses[0], found

    def _values(self, suffix: str, predicted: Sequence[float]) -> dict[str, float | None]:
        gold, found = self._gold[suffix], dict[str, float | None]()
        for name in self.task.metrics:
            key = f"{self.task.name}{suffix}_{name}"
            found[key] = metrics.value(name, predicted, gold)
            found[f"{key}_stderr"] = metrics.stderr(name, predicted, gold)
        return {k: v if v is not None and math.isfinite(v) else None for k, v in found.items()}

    def _predicted(
        self, model: PreTrainedModel, part: Encoded, watch: Any
    ) -> tuple[float, list[float]]:
        """Return the mean loss, and the predicted class or number of every row."""
        here, every = self._here, range(len(part))
        table = torch.zeros(2, len(part), dtype=torch.float64, device=here.device)
        # By length, so that little is padding; a row is in the same batch on any number of ranks.
        by_length = sorted(every, key=lambda n: len(part.ids[n]))
        groups = [by_length[at : at + ROWS_IN_A_FORWARD] for at in every[::ROWS_IN_A_FORWARD]]
        for number, group in enumerate(groups[here.rank :: here.size]):
            rows = part.rows(group, self._pad, here.device, self._typed)
            with autocast(self._precision, here.device):
                losses, predicted = self._judged(model, rows)
            table[:, torch.tensor(group)] = torch.stack([losses.double(), predicted.double()])
            watch(min(len(part), (number + 1) * ROWS_IN_A_FORWARD * here.size))
        losses, predicted = here.sum(table)
        return losses.mean().item(), predicted.tolist()

    def _judged(self, model: PreTrainedModel, rows: Labelled) -> tuple[Tensor, Tensor]:
        losses, logits = row_losses(model, rows)
        if self._writes_text:
            best = text_scores(model, rows, self._targets.to(rows.ids.device)).argmax(1)
            return losses, best if self.task.labels else self._numbers(best)
        return losses, logits.argmax(1) if self.task.labels else logits[:, 0]

    def _numbers(self, best: Tensor) -> Tensor:
        values = torch.tensor([float(word) for word in self.task.words], device=best.device)
        return values[best]

    def sample(self, model: PreTrainedModel, step: int, log: object) -> None:
        """Do nothing: `train.sample_every` is for pre-training."""

    def write_tokenizer(self, run: RunDir) -> None:
        """Write the tokenizer into a new run. Raises OSError if that fails."""
        end = None if self._writes_text else self._words.end
        keep_tokenizer(self._words.directory, run, end, self._pad, self._typed)

    def restore_tokenizer(self, run: RunDir) -> None:
        """Do nothing: the run's own tokenizer has been read."""

    def last(self, rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Return what the last row says besides: the best evaluation, and where it was.

        Also the result of always predicting the most frequent class.
        """
        found: dict[str, float] = {}
        if best := best_evaluation(rows, self.best_by):
            found = {"best_step": best[0], f"{_best_name(self.best_by)}": best[1]}
        return found | self._majority()

    def _majority(self) -> dict[str, float]:
        suffix = next(iter(self.task.validation))
        values = metrics.majority(self.task, self._gold[suffix])
        made = {f"{self.task.name}{suffix}_majority_{name}": v for name, v in values.items()}
        return {key: value for key, value in made.items() if math.isfinite(value)}


def _best_name(name: str) -> str:
    task, _, metric = name.rpartition("_")
    return f"{task}_best_{metric}"


def best_evaluation(rows: Iterable[Mapping[str, Any]], by: str) -> tuple[int, float] | None:
    """Return (step, value) of the evaluation with the largest value, the first of equal ones."""
    values = [(row[by], -row["step"]) for row in rows if row.get(by) is not None]
    value, step = max(values, default=(math.nan, 0))
    return None if math.isnan(value) else (-step, value)
