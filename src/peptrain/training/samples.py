"""Text that the model writes during training, at fixed intervals."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from peptrain.config import RunConfig
from peptrain.data import Corpus
from peptrain.data.tokenizer import load_tokenizer
from peptrain.distributed.world import World
from peptrain.errors import ConfigError
from peptrain.generation.sample import Sampling, check_prompt, continuation, prompt_tokens
from peptrain.methods.base import Method
from peptrain.rng import Rng
from peptrain.runs.directory import RunDir
from peptrain.settings.fields import check
from peptrain.tasks.spans import plain_encoder
from peptrain.training.metrics import MetricsLog

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPTS = ("The old house", "She said that", "There are many")
"""Continued where `train.sample_prompts` is unset: short, for windows of a few tokens too."""
MOST_PROMPTS, LONGEST_FILE = 32, 1 << 20
"""Prompts, and bytes of their file. Other processes wait while rank 0 continues them."""
KEY = "train.sample_prompts"


class SamplesInTraining:
    """Continues prompts every `train.sample_every` steps. Every process has one, and rank 0 writes.

    Nothing of the training depends on it. The model in training is run in evaluation mode, eagerly
    and without a cache, as `eval.tasks` are measured, which fused layers, padded MLPs and attention
    without masks allow. The random numbers of a prompt are those of (its number, step, "sample").
    """

    def __init__(
        self, config: RunConfig[Method], corpus: Corpus, run: RunDir | None, here: World
    ) -> None:
        """Read the prompts. Raises ConfigError or DataError before anything is written."""
        t = config.train
        self._train, self._world, self._every = t, here, t.sample_every
        self._prompts: list[tuple[str, list[int]]] = []
        if not self._every:
            return
        tokenizer = load_tokenizer(corpus.tokenizer_file)
        self._encoder = plain_encoder(tokenizer, corpus.eos_id, corpus.special_tokens)
        kept = run.prompts_file if run is not None and run.prompts_file.is_file() else None
        file = t.sample_prompts and (kept or t.sample_prompts)
        for number, prompt in enumerate(read_prompts(file) if file else PROMPTS, 1):
            ids = prompt_tokens(self._encoder, prompt, t.seq_len, _named(number, prompt))
            self._prompts.append((prompt, ids))

    def check(self, model: PreTrainedModel) -> None:
        """Raise DataError or Unsupported for a model that can't read a prompt or write a text."""
        for number, (prompt, ids) in enumerate(self._prompts, 1):
            check_prompt(model, ids, _named(number, prompt))

    def write(self, model: PreTrainedModel, step: int, log: MetricsLog) -> None:
        """After the step that is due write a row for each prompt. Called on every rank."""
        if not self._every or step % self._every:
            return
        with log.aside():
            for number, (prompt, ids) in enumerate(self._prompts if self._world.main else (), 1):
                text = self._continued(model, ids, number, step)
                log.write("sample", step=step, prompt=prompt, text=text)
            self._world.agree(None)  # rank 0 alone may take longer than a step

    def _continued(self, model: PreTrainedModel, ids: list[int], number: int, step: int) -> str:
        assert self._train.precision is not None
        return continuation(
            model,
            self._encoder,
            ids,
            Sampling(),
            positions=self._train.seq_len,
            precision=self._train.precision,
            seed=Rng(self._train.seed).integer(f"prompt {number}", step, "sample"),
            cache=False,
        )


def _named(number: int, prompt: str) -> str:
    return f"{KEY}: prompt {number}, {prompt[:40]!r}"


def read_prompts(file: Path) -> list[str]:
    """Return the prompts in a text file, one a line, without empty lines.

    Raises ConfigError for a file that can't be read, has none, or more than `MOST_PROMPTS`.
    """
    check(file.is_file(), KEY, file, "a text file with one prompt a line")
    try:
        with file.open("rb") as opened:
            content = opened.read(LONGEST_FILE + 1)
    except OSError as error:
        raise ConfigError(f"{KEY}: {file}: can't be read: {error.strerror}") from error
    if len(content) > LONGEST_FILE:
        raise ConfigError(
            f"{KEY}: {file}: has more than {LONGEST_FILE:,} bytes; give fewer prompts"
        )
    try:
        lines = content.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{KEY}: {file}: is not UTF-8 (byte {error.start}); convert it with iconv"
        ) from error
    found = [line for line in lines if line.strip()]
    if not 0 < len(found) <= MOST_PROMPTS:
        raise ConfigError(
            f"{KEY}: {file}: must have 1 to {MOST_PROMPTS} prompts, one a line (got {len(found):,})"
        )
    return found
