"""The sections of a configuration that are the same for every method and model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from peptrain.distributed.watchdog import LONGEST
from peptrain.models.hf import Precision
from peptrain.settings.fields import added, check, check_whole, essential, interval

LARGEST_BATCH = 1 << 24
"""Sequences in a batch, and tokens in a sequence."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training steps, batches, precision, logging and checkpoints."""

    steps: int = essential(300)
    """Optimizer steps."""
    batch_size: int = essential(32)
    """Sequences per optimizer step, over all processes and micro-batches."""
    micro_batch: int | None = None
    """Sequences per forward pass on each process. Unset: up to 16,384 tokens."""
    seq_len: int = essential(256)
    """Tokens per sequence."""
    seed: int = essential(0)
    """Random seed of initialisation, data order and everything else that is random."""
    precision: Precision | None = None
    """fp32, bf16-mixed (fp32 parameters, bf16 compute), bf16 (parameters and optimizer state
    too) or fp64 (to check mathematics). Unset: bf16-mixed on a GPU, fp32 on a CPU."""
    compile: bool = essential(False)
    """Compile each decoder layer and the loss with torch.compile."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass (gradient checkpointing): slower, less memory."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """Linear maps of bpt, lora and relora: plain PyTorch or fused Triton kernels. auto uses Triton
    together with cuda_graph: without it, launching the kernels costs more than they save."""
    cuda_graph: bool | None = None
    """Capture the forward and backward pass as a CUDA graph and replay it, which removes Python
    overhead. Unset: with compile, on a GPU, unless attention needs masks (sliding window)."""
    memory_budget: float = 1.0
    """With compile: fraction of the activations to keep, in [0, 1]. The compiler recomputes the
    rest, the cheapest first. Attention is recomputed only at 0."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses a GPU if there is one."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl and between checks that the loss is finite."""
    eval_every: int | None = interval(0.1)
    """Steps between held-out evaluations; 0: only at the end. Unset: a tenth of the run."""
    eval_tokens: int | None = None
    """Maximum number of held-out tokens per evaluation during training; 0: all. The evaluation at
    the end always uses all. Unset: half of the tokens trained between two evaluations, at most
    131,072 and at least one sequence."""
    checkpoint_every: int | None = interval(0.25, most=1000)
    """Steps between checkpoints; 0: only at the end. Unset: a quarter of the run, at most 1000."""
    keep: int = 2
    """Number of checkpoints to keep. Older ones are deleted, but for those of keep_at and, with the
    schedule wsd, the last one before the decay, from which a longer run can continue."""
    keep_at: str = added("", before="")
    """Steps whose checkpoints are saved and kept, such as 0,1,5000; log: 0, 1, 2, 4, 8 and so on.
    Unset: none."""
    observe: Literal["none", "dynamics"] = added("none", before="none")
    """dynamics: write ranks and condition numbers of weights and updates to metrics.jsonl, of as
    many layers and as often as the budget allows (docs/dynamics.md)."""
    observe_budget: float = added(0.02, before=0.02)
    """Largest share of the training time that train.observe may take, above 0 and at most 1."""
    sample_every: int = added(0, before=0)
    """Steps between texts that the model writes, into metrics.jsonl; 0: none (docs/guide.md)."""
    sample_prompts: Path | None = added(None, before=None)
    """Text file with up to 32 prompts to continue, one a line. Unset: three of peptrain's own."""
    log_to: str = added("", before="")
    """Loggers that get the rows of metrics.jsonl too, such as tensorboard,trackio: tensorboard,
    trackio, wandb, or one of another package (docs/loggers.md). Unset: none."""
    parallel: Literal["none", "ddp"] | None = added(None, before=None)
    """none: one process. ddp: several, each of which holds the whole model and takes its share of
    every batch. Unset: what fits their number."""
    exchange: Literal["fp32", "bf16"] | None = added(None, before=None)
    """Of several processes: dtype in which they sum gradients. Unset: that of the gradients."""
    timeout: int = added(120, before=120)
    """Of several processes: seconds that a step may take before a process that waits for another
    one ends, with an error. At least 600 in the first two steps of a phase and where they evaluate
    or save."""

    def __post_init__(self) -> None:
        fits = 0 < self.observe_budget <= 1
        check(fits, "train.observe_budget", self.observe_budget, "above 0 and at most 1")
        for key in ("steps", "log_every", "keep"):
            check_whole(f"train.{key}", getattr(self, key), 1)
        for key in ("batch_size", "micro_batch", "seq_len"):
            check_whole(f"train.{key}", getattr(self, key), 1, LARGEST_BATCH)
        for key in ("eval_every", "checkpoint_every", "sample_every"):
            check_whole(f"train.{key}", getattr(self, key), 0)
        check_whole("train.timeout", self.timeout, 10, LONGEST)
        for key in ("seed", "eval_tokens"):
            check_whole(f"train.{key}", getattr(self, key), 0, 2**63 - 1)
        listed = re.fullmatch(r"|log|\d{1,9}( *, *\d{1,9})*", self.keep_at)
        check(bool(listed), "train.keep_at", self.keep_at, "log, or steps such as 0,1,5000")
        listed = re.fullmatch(r"|[\w.-]+( *, *[\w.-]+)*", self.log_to)
        wanted = "names of loggers such as tensorboard,trackio"
        check(bool(listed), "train.log_to", self.log_to, wanted)
        fits = self.memory_budget == 1 or (0 <= self.memory_budget < 1 and self.compile)
        wanted = "in [0, 1], and 1 without train.compile"
        check(fits, "train.memory_budget", self.memory_budget, wanted)

    def keeps(self, step: int) -> bool:
        """Return whether the checkpoint of `step` is kept by `keep_at`."""
        return step & (step - 1) == 0 if self.keep_at == "log" else step in self.kept_steps

    @property
    def kept_steps(self) -> list[int]:
        """The steps that `keep_at` lists."""
        return [int(step) for step in re.findall(r"\d+", self.keep_at)]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training data."""

    path: Path | None = essential(None)
    """Directory written by `peptrain data prepare`. Unset: the corpus that comes with peptrain."""

    def __post_init__(self) -> None:
        if isinstance(self.path, str):
            object.__setattr__(self, "path", Path(self.path))


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Tasks that are measured at each held-out evaluation (docs/evaluation.md)."""

    tasks: str = added("", before="")
    """Tasks such as blimp or blimp,piqa. Unset: none."""
    tasks_data: Path | None = added(None, before=None)
    """Directory with copies of their data sets."""
    items: int = added(1000, before=1000)
    """Items of each task, a fixed random choice that is the same in all runs."""

    def __post_init__(self) -> None:
        check_whole("eval.items", self.items, 1)
        given = not self.tasks.strip() or self.tasks_data is not None
        wanted = f"the directory with the data of eval.tasks {self.tasks}"
        check(given, "eval.tasks_data", self.tasks_data, wanted)


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Fine-tuning on a task with labels instead of pre-training (docs/tune.md)."""

    task: str = added("", before="")
    """cola, sst2, rte, mrpc, qnli, qqp, mnli, stsb, or a TOML file that describes a task. Unset:
    pre-training."""
    tasks_data: Path | None = added(None, before=None)
    """Directory with copies of the data sets, as cola/train.jsonl."""
    epochs: int = added(3, before=3)
    """Passes over the training rows. They determine train.steps."""
    rows: int | None = added(None, before=None)
    """Training rows to use, a fixed random choice that is the same in all runs. Unset: all."""
    labels: str | None = added(None, before=None)
    """Names of the classes, comma-separated, empty for a number. Unset: those of the task."""
    pad_token: int | None = added(None, before=None)
    """Id that fills up short sequences. Unset: the tokenizer's, or its end token."""

    def __post_init__(self) -> None:
        check_whole("tune.epochs", self.epochs, 1)
        check_whole("tune.rows", self.rows, 1)
        check_whole("tune.pad_token", self.pad_token, 0)

    @property
    def classes(self) -> list[str]:
        """Names of the classes; none where the label is a number."""
        return [name for name in (self.labels or "").split(",") if name]
