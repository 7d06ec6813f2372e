"""The configuration of a run: its sections, their strict TOML form, and defaults filled in."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any, Generic, TypeVar, get_type_hints

from peptrain.distributed.launch import check_parallel
from peptrain.errors import ConfigError
from peptrain.methods import methods
from peptrain.methods.base import Method
from peptrain.models.hf import ModelConfig, hf_config
from peptrain.models.presets import DEFAULT_PRESET
from peptrain.optim.adamw import OptimConfig, filled
from peptrain.optim.schedule import ScheduleConfig
from peptrain.sections import DataConfig, EvalConfig, TrainConfig, TuneConfig
from peptrain.settings import toml
from peptrain.settings.fields import (
    added_section,
    as_before,
    check,
    essential,
    fill,
    quiet,
    resolve,
    shown,
)
from peptrain.settings.toml import HEADER

log = logging.getLogger("peptrain")
M = TypeVar("M", bound=Method)
TOKENS_IN_A_FORWARD = 16_384
"""Of the default micro-batch, unless one sequence has more."""


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

    def __post_init__(self) -> None:
        """Raise ConfigError for a section of another type. Paths may be strings."""
        wanted = "a method, such as LORO(rank=128)"
        check(isinstance(self.method, Method), "method", self.method, wanted)
        for key, hint in _hints().items():
            value = getattr(self, key)
            if isinstance(hint, type) and is_dataclass(hint):
                check(isinstance(value, hint), key, value, f"of type {hint.__name__}")
            elif hint == Path | None and isinstance(value, str):
                object.__setattr__(self, key, Path(value))


@cache
def _hints() -> dict[str, Any]:
    return get_type_hints(RunConfig)


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
    _check_used(config)
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


NEEDS = {
    "train.sample_prompts": "train.sample_every",
    "eval.tasks_data": "eval.tasks",
    **{f"tune.{key}": "tune.task" for key in ("tasks_data", "rows", "labels", "pad_token")},
}
"""Settings that are unset by default, and what must be set for them to have an effect."""


def _check_used(config: RunConfig[Any]) -> None:
    """Raise ConfigError for a setting without any effect, which somebody believes to have one."""
    for key, other in NEEDS.items():
        value, needed = (attrgetter(name)(config) for name in (key, other))
        check(value is None or bool(needed), key, value, f"unset without {other}")


IDLE: Mapping[str, tuple[str, Sequence[str]]] = {
    "schedule.decay": ("schedule.kind", ["wsd"]),
    "schedule.decay_shape": ("schedule.kind", ["wsd"]),
    "schedule.restart_warmup": ("schedule.restart_every", []),
    "method.reset_fraction": ("method.reset", ["magnitude", "random"]),
    "method.warm_start_lr": ("method.warm_start_steps", []),
    "method.warm_start_warmup": ("method.warm_start_steps", []),
    "method.warm_start_then": ("method.warm_start_steps", []),
    "train.observe_budget": ("train.observe", ["dynamics"]),
    "eval.items": ("eval.tasks", []),
    "tune.epochs": ("tune.task", []),
}
"""Settings that have a default, and the values of another one with which they have an effect: any
but 0 and none where the list is empty."""


def warn_of_idle(given: RunConfig[Any], made: RunConfig[Any]) -> None:
    """Log a warning for each setting of `given` that has no effect in `made`, which is `given`
    resolved. What has its default value may be unset, or be of a run's config.toml."""
    for key, (other, values) in IDLE.items():
        (of, name), needs = key.split("."), other.rpartition(".")[2]
        section = getattr(given, of)
        if not {name, needs} <= {f.name for f in fields(section)}:  # other methods
            continue
        value, needed = getattr(section, name), getattr(getattr(made, of), needs)
        used = needed in values if values else bool(needed)
        if not used and value not in (None, _usual(key, made)):
            wanted = " or ".join(f"{other} {one}" for one in values) or other
            log.warning("%s: %s has no effect, since %s is %s; leave it unset, or set %s",
                        key, value, other, needed or "unset", wanted)  # fmt: skip
    last = made.train.steps
    late = [step for step in made.train.kept_steps if step > last]
    if late:
        log.warning("train.keep_at: step %d is after the end of the run at %d", late[0], last)


def _usual(key: str, made: RunConfig[Any]) -> Any:
    """Return the value that a setting would have in `made` if it were unset."""
    name, _, item = key.partition(".")
    section = getattr(made, name)
    default = next(f.default for f in fields(section) if f.name == item)
    section = replace(section, **{item: default})
    if name == "schedule":
        section = fill(section, made.method.schedule_defaults, Method.schedule_defaults)
    with quiet():
        return getattr(resolve(section, name, made.train.steps), item)


def _resolved_model(model: ModelConfig) -> ModelConfig:
    preset = model.preset if model.config else model.preset or DEFAULT_PRESET
    return replace(model, config=_absolute(model.config), preset=preset)


def settled(
    method: M, optim: OptimConfig, schedule: ScheduleConfig, steps: int, width: int
) -> tuple[M, OptimConfig, ScheduleConfig]:
    """Resolve method, optimizer and schedule for `steps` steps at hidden size `width`.

    Raises ConfigError for an optimizer that the method does not implement, and for a setting that
    the optimizer does not have.
    """
    wanted = f"{' or '.join(method.optim_kinds)} for {method.name}"
    check(optim.kind in method.optim_kinds, "optim.kind", optim.kind, wanted)
    optim.check_kind([f.name for f in fields(method)], method.name)
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
    try:
        rest = {
            key: toml.parse_value(hint, table[key], key)
            for key, hint in _hints().items()
            if key in table and key != "method"
        }
        return RunConfig(method=_parse_method(table.get("method", {})), **rest)
    except ConfigError:
        _check_sections(table)
        raise


def _misplaced(key: str) -> str | None:
    """Return the message for a key written without its section, a frequent mistake."""
    found = next(iter(_sections_of(key)), None)
    return found and f"{key}: unknown key; did you mean '{found}.{key}'?"


def _check_sections(table: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key that only other sections have, such as train.lr."""
    for section in SECTIONS:
        given = table.get(section)
        for key in given if isinstance(given, Mapping) else ():
            found = _sections_of(key)
            if found and section not in found:
                raise ConfigError(f"{section}.{key}: unknown key; did you mean '{found[0]}.{key}'?")


def _sections_of(key: str) -> list[str]:
    """Return the sections that have the key, a method's first."""
    sections: list[tuple[str, Any]] = [("method", cls) for cls in methods().values()]
    sections += [(name, hint) for name, hint in _hints().items() if is_dataclass(hint)]
    return [name for name, cls in sections if key in {f.name for f in fields(cls)}]


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
