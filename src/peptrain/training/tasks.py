"""Tasks that are measured during training, on a fixed subsample."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from peptrain.config import RunConfig
from peptrain.data import Corpus
from peptrain.data.tokenizer import load_tokenizer
from peptrain.distributed.world import World
from peptrain.methods.base import Method
from peptrain.tasks.files import items_of, read_rows, subsample
from peptrain.tasks.measure import Judge, checksum, finite, measure
from peptrain.tasks.spans import page_spans, plain_encoder, spans
from peptrain.tasks.table import Item, Task, chosen_tasks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("peptrain")
PASS = 3
"""Forward passes that a training step costs for each of its tokens."""


class TasksInTraining:
    """Measures `eval.tasks` on `eval.items` items each. Every process has one.

    Nothing of the training depends on it: the model is put into evaluation mode and back, and no
    random number is drawn.
    """

    def __init__(self, config: RunConfig[Method], corpus: Corpus, here: World) -> None:
        """Read the data. Raises ConfigError or DataError before anything is written."""
        asked, t = config.eval, config.train
        self._world, self._precision, self._seq_len = here, t.precision, t.seq_len
        self._tokens_per_step = t.batch_size * t.seq_len
        self._tasks: list[tuple[Task, list[tuple[int, Item]]]] = []
        if not asked.tasks.strip():
            return
        tokenizer = load_tokenizer(corpus.tokenizer_file)
        self._encoder = plain_encoder(tokenizer, corpus.eos_id, corpus.special_tokens)
        for task in chosen_tasks(asked.tasks, "eval.tasks"):
            rows = read_rows(task, asked.tasks_data)
            items = items_of(task, rows, rows.place)
            self._tasks.append((task, subsample(items, asked.items)))
        self._count()
        self._announce()

    def _count(self) -> None:
        """Count sequences and tokens. Raises DataError for a continuation that does not fit."""
        self._sequences = self._tokens = 0
        for task, chosen in self._tasks:
            requests = [request for _, item in chosen for request in item.requests]
            if task.kind == "page":
                texts = (text for _, text in requests)
                pages = (page_spans(text, self._encoder, self._seq_len) for text in texts)
                made = [span for page in pages for span in page]
            else:
                names = [f"{task.name}: item {n}" for n, item in chosen for _ in item.requests]
                made = spans(requests, self._encoder, self._seq_len, names)
            self._sequences += len(made)
            self._tokens += sum(len(span.tokens) - 1 for span in made)

    def _announce(self) -> None:
        """Log on rank 0 what an evaluation costs."""
        if self._world.main:
            names = ", ".join(task.name for task, _ in self._tasks)
            steps = self._tokens / (PASS * self._tokens_per_step)
            log.info("eval.tasks: %s: %s sequences of %s tokens at each held-out evaluation, the"
                     " work of about %.2g training steps", names, f"{self._sequences:,}",
                     f"{self._tokens:,}", steps)  # fmt: skip

    @property
    def data(self) -> dict[str, str]:
        """Checksums of the items, in which all processes must agree."""
        return {f"eval.tasks_data: items of {t.name}": checksum(c) for t, c in self._tasks}

    def measure(self, model: PreTrainedModel) -> dict[str, float | None]:
        """Return the results, named TASK_METRIC, and the seconds taken. Called on every rank."""
        if not self._tasks:
            return {}
        assert self._precision is not None
        begin = time.perf_counter()
        judge = Judge(model, self._encoder, self._seq_len, self._precision, self._world)
        found: dict[str, float | None] = {}
        for task, chosen in self._tasks:
            values = finite(measure(judge, task, chosen).values)
            found |= {f"{task.name}_{name}": value for name, value in values.items()}
        return found | {"tasks_seconds": time.perf_counter() - begin}
