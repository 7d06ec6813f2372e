"""The configuration of a run: its sections, their strict TOML form, and defaults filled in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_type_hints

from peptrain.distributed.launch import check_parallel
from peptrain.distributed.watchdog import LONGEST
from peptrain.errors import ConfigError
from peptrain.methods import methods
from peptrain.methods.base import Method
from peptrain.models.hf import ModelConfig, Precision, hf_config
from peptrain.models.presets import DEFAULT_PRESET
from peptrain.optim.adamw import OptimConfig, filled
from peptrain.optim.schedule import ScheduleConfig
from peptrain.settings import toml
from peptrain.settings.fields import (
    added,
    added_section,
    as_before,
    check,
    check_whole,
    essential,
    fill,
    interval,
    resolve,
    shown,
)
from peptrain.settings.toml import HEADER

M = TypeVar("M", bound=Method)
LARGEST_BATCH = 1 << 24
"""Sequences in a batch, and tokens in a sequence."""
TOKENS_IN_A_FORWARD = 16_384
"""Of the default micro-batch, unless one sequence has more."""


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
        if self.keep_at == "log":
            return step & (step - 1) == 0
        return step in map(int, re.findall(r"\d+", self.keep_at))


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training data."""

    path: Path | None = essential(None)
    """Directory written by `peptrain data prepare`. Unset: the corpus that comes with peptrain."""


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


@dataclass(frozen=True, kw_only=True)
class RunConfig(Generic[M]):
    """All settings of a run. `resolved` fills in the unset; the run directory stores the result."""

    method: M
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = added_section(EvalConfig)
    tune: TuneConfig = added_section(TuneConfig)
    init_from: Path | None = None
    """Start from the weights of this run or Hugging Face directory. If no model setting is given,
    the model is taken from it too. Unset: initialise the weights."""
    match_trainable: Path | None = None
    """For full: shrink the model to as many parameters as the run in this directory trains
    (ReLoRA's Control). If no model setting is given, the model is taken from that run."""
    continue_from: Path | None = None
    """Continue another run of the same method, RUN or RUN@STEP, as a new one: with its weights,
    moments and clocks after that step. On the command line its configuration holds where no flag
    says otherwise. Settings that the weights depend on must agree."""
    run: Path | None = essential(None)
    """Run directory to create. Unset: runs/METHOD-N, the first free N."""


def resolved(config: RunConfig[M], *, world_size: int, on_gpu: bool) -> RunConfig[M]:
    """Return `config` with the method's defaults filled in and every interval in steps.

    Raises ConfigError for settings that contradict each other.
    """
    method, steps = config.method, config.train.steps
    path = str(config.run or "")
    utf8 = not any("\ud800" <= c <= "\udfff" for c in path)
    check(utf8, "run", path, "UTF-8, which tokenizers and safetensors need")
    width = hf_config(config.model, config.train.seq_len).get_text_config().hidden_size
    method, optim, schedule = settled(method, config.optim, config.schedule, steps, width)
    fits = config.train.observe == "none" or method.has_dense_equivalent
    wanted = f"none for {method.name}, which has no dense equivalent"
    check(fits, "train.observe", config.train.observe, wanted)
    if config.tune.task:
        check(not config.train.cuda_graph, "train.cuda_graph", True,
              "false to fine-tune, since sequences differ in length")  # fmt: skip
        check(not config.eval.tasks.strip(), "eval.tasks", config.eval.tasks,
              "unset to fine-tune; tune.task is measured at each evaluation")  # fmt: skip
    return replace(
        config,
        model=_resolved_model(config.model),
        data=DataConfig(path=_absolute(config.data.path)),
        eval=replace(config.eval, tasks_data=_absolute(config.eval.tasks_data)),
        tune=replace(config.tune, tasks_data=_absolute(config.tune.tasks_data)),
        init_from=_absolute(config.init_from),
        continue_from=_absolute(config.continue_from),
        method=method,
        optim=optim,
        schedule=schedule,
        train=_resolved_train(resolve(config.train, "train", steps), world_size, on_gpu),
    )


def _resolved_model(model: ModelConfig) -> ModelConfig:
    preset = model.preset if model.config else model.preset or DEFAULT_PRESET
    return replace(model, config=_absolute(model.config), preset=preset)


def settled(
    method: M, optim: OptimConfig, schedule: ScheduleConfig, steps: int, width: int
) -> tuple[M, OptimConfig, ScheduleConfig]:
    """Resolve method, optimizer and schedule for `steps` steps at hidden size `width`.

    Raises ConfigError for an optimizer that the method does not implement.
    """
    wanted = f"{' or '.join(method.optim_kinds)} for {method.name}"
    check(optim.kind in method.optim_kinds, "optim.kind", optim.kind, wanted)
    schedule = fill(schedule, method.schedule_defaults, Method.schedule_defaults)
    return (
        resolve(method, "method", steps, width),
        filled(optim, method.optim_defaults, Method.optim_defaults),
        resolve(schedule, "schedule", steps),
    )


def _absolute(path: Path | None) -> Path | None:
    """Make a path absolute: a run may be opened from another working directory."""
    return path and path.resolve()


def _resolved_train(train: TrainConfig, world_size: int, on_gpu: bool) -> TrainConfig:
    rows, rest = divmod(train.batch_size, world_size)
    check(rest == 0, "train.batch_size", train.batch_size, f"a multiple of the {world_size} ranks")
    most = min(rows, TOKENS_IN_A_FORWARD // train.seq_len)
    fitting = [k for k in range(1, most + 1) if rows % k == 0]
    micro = train.micro_batch or max(fitting, default=1)
    check(rows % micro == 0, "train.micro_batch", micro, f"a divisor of the {rows} rows of a rank")
    precision = train.precision or ("bf16-mixed" if on_gpu else "fp32")
    check_parallel(train.parallel, world_size)
    prompts = _absolute(train.sample_prompts)
    filled = replace(train, micro_batch=micro, precision=precision, sample_prompts=prompts)
    return filled if train.eval_tokens is not None else _evaluating(filled, least=train.seq_len)


def _evaluating(train: TrainConfig, least: int) -> TrainConfig:
    """Set eval_tokens to half of the tokens trained between two evaluations.

    A forward pass costs a third of a training step, so evaluation adds a sixth of the time.
    """
    between = (train.eval_every or train.steps) * train.batch_size * train.seq_len
    return replace(train, eval_tokens=max(least, min(131_072, between // 2)))


def as_named(config: RunConfig[M], written: RunConfig[M]) -> RunConfig[M]:
    """Return `config` without loggers, and with the eval_tokens of 0.1.0 where `written`, as it was
    before it was resolved, has none.

    `compare` names its runs by this configuration, since neither affects the training. A run of
    0.1.0 evaluated at least 8,192 tokens at a time, more than a short run trains.
    """
    config = replace(config, train=replace(config.train, log_to=""))
    if written.train.eval_tokens is not None:
        return config
    return replace(config, train=_evaluating(config.train, least=8_192))


SECTIONS = ("method", "model", "optim", "schedule", "train", "data", "eval", "tune")


def parse(table: Mapping[str, Any]) -> RunConfig[Method]:
    """Read a configuration from a TOML table. Its [recipe] is for readers and is ignored.

    Raises ConfigError for an unknown key or a value of the wrong type.
    """
    sections = {f.name: f for f in fields(RunConfig)}
    for key in table:
        if key not in sections and key != HEADER:
            raise ConfigError(_misplaced(key) or toml.unknown(key, list(sections)))
    if not isinstance(table.get(HEADER, {}), Mapping):
        raise ConfigError(
            f"{HEADER}: must be a table, [{HEADER}] (got {shown(table[HEADER])}); it only describes"
            " the file; to use a recipe, copy the settings that `peptrain recipes NAME` prints"
        )
    rest = {
        key: toml.parse_value(hint, table[key], key)
        for key, hint in get_type_hints(RunConfig).items()
        if key in table and key != "method"
    }
    return RunConfig(method=_parse_method(table.get("method", {})), **rest)


def _misplaced(key: str) -> str | None:
    """Return the message for a key written without its section, a frequent mistake."""
    hints = get_type_hints(RunConfig)
    sections: list[tuple[str, Any]] = [("method", cls) for cls in methods().values()]
    sections += [(name, hint) for name, hint in hints.items() if is_dataclass(hint)]
    within = (name for name, cls in sections if key in {f.name for f in fields(cls)})
    found = next(within, None)
    return found and f"{key}: unknown key; did you mean '{found}.{key}'?"


def _parse_method(table: Mapping[str, Any]) -> Method:
    wanted = 'write name = "bpt" or another method in [method]'
    if not isinstance(table, Mapping):
        raise ConfigError(f"method: must be a table (got {shown(table)}); {wanted}")
    if "name" not in table:
        raise ConfigError(f"method.name: missing; {wanted}")
    name, known = table["name"], methods()
    if not isinstance(name, str) or name not in known:
        raise ConfigError(
            f"method.name: unknown method {shown(name)}; choose from {', '.join(known)}; for"
            " a method of your own install its package or set peptrain.METHODS[name] to its class"
        )
    return toml.parse(known[name], {k: v for k, v in table.items() if k != "name"}, "method.")


def load(path: Path, task: str = "") -> RunConfig[Method]:
    """Load a configuration from a TOML file, for a task of fine-tuning, if any (`toml.for_task`).

    In the config.toml of a run, a setting that did not exist when it was written takes the value
    that stands for the behaviour of that time (`fields.added`). Raises ConfigError, naming the
    file, for one that can't be read or is no configuration.
    """
    of_run = path.name == "config.toml" and (path.parent / "checkpoints").is_dir()
    given_as = "" if of_run else "--config "
    table = toml.read(path, given_as)
    try:
        config = parse(toml.for_task(table, task))
    except ConfigError as error:
        raise ConfigError(f"{given_as}{path}: {error}") from error
    return _as_written(config, table) if of_run else config


def _as_written(config: RunConfig[M], table: Mapping[str, Any]) -> RunConfig[M]:
    sections: dict[str, Any] = {
        name: as_before(getattr(config, name), table.get(name, {})) for name in SECTIONS
    }
    return replace(config, **sections)


def dump(config: RunConfig[M]) -> str:
    """Return `config` as TOML, without `run`: the file is stored in that directory."""
    return toml.dump(replace(config, run=None))


def essence(config: RunConfig[M]) -> str:
    """Return `dump` without settings equal to the behaviour before they existed.

    The text is the same for the same run, whichever version of peptrain resolved it.
    """

    def as_ever(leaf: Field[Any], value: object) -> bool:
        return value is None or ("before" in leaf.metadata and leaf.metadata["before"] == value)

    return toml.dump(replace(config, run=None), as_ever)
