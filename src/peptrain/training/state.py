"""Build, restore, check and save the state of a model in training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from peptrain import __version__
from peptrain.config import RunConfig, load
from peptrain.distributed.world import World
from peptrain.errors import CheckpointError, ConfigError, Diverged
from peptrain.execution.forward_backward import ForwardBackward
from peptrain.execution.prepare import prepare
from peptrain.methods.base import Method
from peptrain.models.sites import reparametrized
from peptrain.ops.checksum import checksum
from peptrain.optim import schedule
from peptrain.optim.adamw import state_bytes
from peptrain.optim.schedule import Schedule
from peptrain.rng import Rng
from peptrain.runs import checkpoint
from peptrain.runs.build import build, phase_at, rebuild
from peptrain.runs.directory import RunDir
from peptrain.runs.ends import stable_steps
from peptrain.runs.identity import other_settings
from peptrain.runs.init_from import initial_weights
from peptrain.text import quoted
from peptrain.tuning.objective import best_evaluation
from peptrain.tuning.weights import classifier_weights


@dataclass
class TrainState:
    """The model, optimizer and schedule in one phase of the training."""

    model: PreTrainedModel
    forward_backward: ForwardBackward
    """Runs forward and backward through model and loss, replicated over the processes."""
    optimizer: Optimizer
    schedule: Schedule
    phase: int
    step: int
    """Completed optimizer steps."""
    end: int
    """The step at which the phase ends."""
    entered: bool = False
    """Whether this state was built at a phase boundary, from a checkpoint of an earlier phase."""
    state_bytes: tuple[int, ...] = ()
    """Bytes of the optimizer's moments in each phase, as of the latest checkpoint."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Those to record in checkpoints besides the identity."""
    rows: int | None = None
    """Rows of metrics when the latest checkpoint was written, if it is known."""
    keep: checkpoint.Keep = field(default_factory=lambda: checkpoint.Keep(1))
    """Which checkpoints are not deleted."""
    built: Mapping[str, Any] = field(default_factory=dict)
    """What a resume builds again (`rebuilt`), as it was built."""


def restore(
    config: RunConfig[Method], saved: checkpoint.Checkpoint | None, here: World
) -> TrainState:
    """Return the state at the checkpoint `saved`, or at step 0 without one.

    A new run, a resume and a phase boundary all go through this function.
    """
    step = saved.step if saved else 0
    phase, end = phase_at(config, step)
    entered = saved is not None and phase != saved.phase
    if saved:
        model = rebuild(config, saved, phase)
    else:
        initial = classifier_weights if config.tune.task else initial_weights
        model = build(config, phase, initial(config))
    optimizer, forward_backward = prepare(model, config, here, phase)
    built = rebuilt(model, optimizer)
    if saved:
        checkpoint.load_optimizer(model, optimizer, saved, same_phase=not entered)
        if entered:
            config.method.on_phase_start(model, optimizer, phase)
        elif step == saved.end < end:  # the run was extended: no longer the last step of a phase
            with here.within(here.slow), here.sharing():
                config.method.after_step(model, optimizer, step, Rng(config.train.seed))
    base = schedule.build(config.schedule, config.train.steps)
    moves = config.method.schedule(base)
    sizes = saved.state_bytes if saved else ()
    known = saved.rows if saved else None
    return TrainState(
        model, forward_backward, optimizer, moves, phase, step, end, entered, sizes,
        other_settings(config), known, built=built,
    )  # fmt: skip


def keep_of(config: RunConfig[Method], run: RunDir, best_by: str = "") -> checkpoint.Keep:
    """Return which checkpoints of a run are not deleted.

    best_by: the result whose best evaluation so far has a checkpoint to keep.
    """

    def kept(step: int) -> bool:
        if config.train.keeps(step):
            return True
        best = best_evaluation(run.metrics(), best_by) if best_by else None
        return best is not None and step == best[0]

    return checkpoint.Keep(config.train.keep, kept, stable_steps(config))


def check_ranks(config: RunConfig[Method], identity: Mapping[str, Any], here: World) -> None:
    """Raise ConfigError, on every rank, unless all have the same settings, data and versions."""
    asked = {"eval.tasks": config.eval.tasks, "eval.items": config.eval.items}
    versions = {"the version of peptrain": __version__, "that of torch": torch.__version__}
    own = {**other_settings(config), **identity, **asked, **versions}
    first = here.agree(own)
    steps_first = sorted(own.keys() | first.keys(), key=lambda key: (key != "train.steps", key))
    unlike = [
        f"{key}: {own.get(key)!r} on rank {here.rank}, {first.get(key)!r} on rank 0"
        for key in steps_first  # intervals follow from the steps
        if own.get(key) != first.get(key)
    ]
    found = [line for line in here.gather(unlike[0] if unlike else None) if line]
    if found:
        raise ConfigError(
            f"{found[0]}; start every process with the same command, on the same data, with the"
            " same versions"
        )


def save(state: TrainState, run: RunDir, here: World, identity: Mapping[str, Any]) -> None:
    """Write a checkpoint from rank 0.

    Raises Diverged instead if a parameter, or a moment of the optimizer, is not finite, and
    CheckpointError, on every rank, if the replicas differ.
    """
    check_replicas(state, run, here)
    check_rebuilt(state)
    earlier = (*state.state_bytes, *[0] * state.phase)[: state.phase]
    state.state_bytes = (*earlier, state_bytes(state.optimizer))

    def write() -> None:
        moments = [t for s in state.optimizer.state.values() for t in s.values()]
        for kind, values in (("weight", state.model.parameters()), ("moment", moments)):
            if not all_finite(values):
                lr = state.optimizer.param_groups[0]["lr"]
                what = f"step {state.step}: a {kind} is not finite at a learning rate of {lr:.3g}"
                raise diverged(what, run)
        captured = checkpoint.capture(
            state.model,
            state.optimizer,
            step=state.step,
            phase=state.phase,
            end=state.end,
            identity=identity,
            state_bytes=state.state_bytes,
            settings=state.settings,
            rows=run.count(),
        )
        checkpoint.save(run.checkpoints, captured, state.keep)

    here.on_main(write)


def rebuilt(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return, by name, what a checkpoint does not contain because a resume builds it again.

    That is the buffers of the method's layers, as checksums, and the settings of the optimizer's
    groups that are not integers, apart from the learning rate, which follows from the step.
    """
    groups = optimizer.param_groups
    found: dict[str, Any] = {"the number of the optimizer's groups": len(groups)}
    for number, group in enumerate(groups):
        for key, value in group.items():
            if type(value) is not int and key not in ("params", "lr", "initial_lr"):
                found[f"{key!r} of the optimizer's group {number}"] = _comparable(value)
    for layer in reparametrized(model):
        for name, buffer in layer.named_buffers():
            found[f"the buffer {layer.site}.{name}"] = _comparable(buffer)
    return found


def _comparable(value: Any) -> Any:
    return int(checksum(value)) if isinstance(value, Tensor) else value


def check_rebuilt(state: TrainState) -> None:
    """Raise CheckpointError if something has changed that a resume would not restore."""
    now = rebuilt(state.model, state.optimizer)
    for name in [*state.built, *(now.keys() - state.built.keys())]:
        if now.get(name) != state.built.get(name):
            raise CheckpointError(
                f"step {state.step}: {name} has changed, and a resumed run would not have the new"
                " value; keep it in a parameter, in the optimizer's state of one, or as an integer"
                " in a group"
            )


def check_replicas(state: TrainState, run: RunDir, here: World) -> None:
    """Raise CheckpointError, on every rank, unless all have the same bits in model and optimizer.

    Ranks get the same gradients and compute the same step, so only a fault of the hardware, or a
    method that draws different numbers, makes them differ. Rank 0's state would hide it.
    """
    if here.size == 1:
        return
    names: dict[Tensor, str] = {p: name for name, p in state.model.named_parameters()}
    held: dict[str, Tensor] = {name: p.detach() for p, name in names.items()}
    held |= dict(state.model.named_buffers())
    for p, moments in state.optimizer.state.items():
        tensors = ((key, value) for key, value in moments.items() if isinstance(value, Tensor))
        held |= {f"{names[p]}/{key}": value for key, value in tensors}
    sums = [checksum(tensor).to(here.device) for tensor in held.values()]
    differing = here.differing(torch.stack(sums).tolist())
    if differing:
        raise CheckpointError(
            f"step {state.step}: the processes differ in {len(differing)} of {len(held)} tensors,"
            f" first in {list(held)[differing[0]]}; the state of rank 0 was not saved;"
            f" {checkpoint.last_good(run.checkpoints)}; if it happens again, test the GPUs"
        )


@torch.no_grad()
def all_finite(values: Iterable[Any]) -> bool:
    """Return whether every number in the floating-point tensors among `values` is finite."""
    given = (t for t in values if isinstance(t, Tensor))
    tensors = [t for t in given if t.is_floating_point() and t.numel()]
    if not tensors:
        return True
    # The maximum of |t| is NaN or infinite if a number is, and needs no temporary the size of t.
    largest = torch._foreach_norm(tensors, math.inf)
    return bool(torch.stack([x.double().to(tensors[0].device) for x in largest]).isfinite().all())


def diverged(what: str, run: RunDir) -> Diverged:
    """Return the error for `what`, with the last good checkpoint and advice."""
    lower = "with a lower --optim.lr (or, in a warm start, the method's own learning rate)"
    found = checkpoint.available(run.checkpoints)
    if not found:
        return Diverged(f"{what}; there is no earlier checkpoint; train again {lower}")
    method = load(run.config_file).method.name
    point = quoted(f"{run.path}@{checkpoint.step_of(found[-1])}")
    return Diverged(
        f"{what}; the last good checkpoint is {found[-1]}, nothing was saved since; start a run"
        f" from it {lower}: `peptrain train {method} --continue-from {point} --optim.lr LR`"
    )
