"""The training loop, written once for all methods."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peptrain.config import RunConfig, resolved, warn_of_idle
from peptrain.distributed.world import World, world
from peptrain.errors import Diverged, Interrupted
from peptrain.estimation.phases import flops_per_token
from peptrain.eval.perplexity import Evaluation
from peptrain.loggers import chosen
from peptrain.methods.base import Method, Metrics
from peptrain.models.hf import count_non_embedding, count_parameters
from peptrain.optim.adamw import clip_gradients, learning_rates, set_lr, state_bytes
from peptrain.optim.schedule import ScheduleConfig
from peptrain.rng import Rng, seed_default
from peptrain.runs.build import run_config
from peptrain.runs.directory import RunDir
from peptrain.runs.environment import record_environment
from peptrain.runs.identity import identity_of
from peptrain.runs.init_from import with_inherited_model
from peptrain.training.begin import (
    check_shared,
    checkpoint_row,
    create_run,
    first_checkpoint,
    how_to_resume,
    latest,
    loggers_of,
    make_longer,
    resumed_config,
    take_back_later,
    to_resume,
)
from peptrain.training.go_on import begun, goes_on
from peptrain.training.instruments import Instrument, instrument
from peptrain.training.metrics import MetricsLog, Observer, silent
from peptrain.training.objective import Objective, objective_of
from peptrain.training.result import Result
from peptrain.training.signals import Agreement, stop_on_signals
from peptrain.training.state import (
    TrainState,
    check_ranks,
    diverged,
    keep_of,
    restore,
    save,
)
from peptrain.tuning.settle import with_task

log = logging.getLogger("peptrain")
STOPPING = "stopping after this step, with a checkpoint; Ctrl-C again stops at once, without one"


def train(
    config: RunConfig[Any],
    observe: Observer = silent,
    *,
    go_on: bool = False,
    show: bool = False,
) -> Result:
    """Train the model described by `config` to the last step, in a new run directory.

    observe: called with every row of metrics. go_on: resume the run in that directory if it has
    begun with the same settings. After a restart by `torchrun` it is always resumed. show: print
    the progress that the command prints.

    Raises ConfigError, DataError or Unsupported before anything is written. Two cases of
    Unsupported appear only during training: a CUDA graph that cannot be captured, and metrics of
    the method that cannot be logged. Raises CheckpointError when the run directory exists or the
    disk is full, Diverged when the loss is not finite, Interrupted after a
    signal (`stop_on_signals`).
    """
    go_on = goes_on(config, go_on)
    with (
        _observing(observe, show) as observe,
        world(config.train.device, config.train.timeout) as here,
        contextlib.ExitStack() as held,
    ):
        wanted = with_task(with_inherited_model(config))
        wanted = replace(wanted, continue_from=here.agree(wanted.continue_from))
        given = wanted
        wanted = resolved(given, world_size=here.size, on_gpu=here.device.type == "cuda")
        if go_on and (run := begun(config, wanted, here)) is not None:
            return _resumed(run, here, observe, held)
        warn_of_idle(given, wanted)
        return _train(wanted, None, here, observe, held)


def resume(
    path: Path,
    observe: Observer = silent,
    *,
    steps: int | None = None,
    schedule: ScheduleConfig | None = None,
    show: bool = False,
) -> Result:
    """Resume the run in `path` from its latest complete checkpoint, or from step 0 without one.

    On a CPU the result is bit for bit that of an uninterrupted run. With `steps` the run gets that
    many, and with `schedule` those of its settings that are not None (`lengthen` says from which
    step, and what becomes of the old end). observe, show: those of `train`. Raises CheckpointError
    while another process trains the run, and otherwise what `train` raises.
    """
    run = to_resume(path)
    now = run_config(run).train
    with (
        _observing(observe, show) as observe,
        world(now.device, now.timeout) as here,
        contextlib.ExitStack() as held,
    ):
        return _resumed(run, here, observe, held, steps, schedule)


def _resumed(
    run: RunDir,
    here: World,
    observe: Observer,
    held: contextlib.ExitStack,
    steps: int | None = None,
    schedule: ScheduleConfig | None = None,
) -> Result:
    here.on_main(lambda: held.enter_context(run.lock()))
    here.on_main(lambda: make_longer(run, steps, schedule))
    return _train(here.on_all(lambda: resumed_config(run)), run, here, observe, held)


def _observing(observe: Observer, show: bool) -> contextlib.AbstractContextManager[Observer]:
    """Return what is called with each row. The display, which needs rich, is imported if wanted."""
    if not show:
        return contextlib.nullcontext(observe)
    from peptrain.display.training import observing

    return observing(observe)


def _train(
    config: RunConfig[Method],
    run: RunDir | None,
    here: World,
    observe: Observer,
    held: contextlib.ExitStack,
) -> Result:
    stop = held.enter_context(stop_on_signals())
    stop.at_once = "stopped before the first step" + (f"; {how_to_resume(run)}" if run else "")
    here.on_main(lambda: chosen(config.train.log_to))
    objective, again = here.on_all(lambda: objective_of(config, run, here)), run is not None
    identity = identity_of(config, objective.fingerprint)
    check_ranks(config, {**identity, **objective.data}, here)
    saved = first_checkpoint(config, run, identity, here)
    state = restore(config, saved, here)
    objective.check(state.model)
    if run is None:
        run = create_run(config, objective, here, held, saved)
    check_shared(run, here)
    if again and here.main:
        objective.restore_tokenizer(run)
    state.keep = keep_of(config, run, objective.best_by)
    if here.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    metrics_log = MetricsLog(run, here, observe, objective.tokens_per_step)
    tool = instrument(config.train, run, here)
    if here.main:
        metrics_log.loggers = held.enter_context(loggers_of(config, run, state.step))
        take_back_later(config, run, state, metrics_log)
        record_environment(run, here, objective.fingerprint)
        observe(_start(config, run, state, objective))
    _announce(state, metrics_log)
    try:
        stop.at_once, agreement = None, Agreement(stop, here)
        stop.answer = STOPPING if here.main else ""
        if saved is None and config.train.keeps(0):
            _save(state, run, here, identity, metrics_log)
        del saved
        metrics_log.pause()
        _loop(config, state, objective, run, metrics_log, agreement, identity, tool)
        while state.step < config.train.steps:
            del state  # so that the moments of both phases are never in memory at once
            state = restore(config, latest(run, here), here)
            state.keep = keep_of(config, run, objective.best_by)
            _announce(state, metrics_log)
            metrics_log.pause()
            _loop(config, state, objective, run, metrics_log, agreement, identity, tool)
        stop.answer = ""
        stop.at_once = f"stopped before the end of the last evaluation; {how_to_resume(run)}"
        held_out, judged = _evaluate(state, objective, run, metrics_log, limit=0)
    except Diverged as error:
        metrics_log.write("diverged", step=state.step, error=str(error))
        raise
    result = _result(run, state, held_out, metrics_log)
    counts = _counts(config, state, here) if here.main else {}
    stop.at_once = None
    counts |= objective.last([*run.metrics(), {"step": state.step, **judged}])
    metrics_log.end(state.step, held_out, **counts, **judged, state_bytes=result.state_bytes)
    here.agree(None)  # the others leave the process group when rank 0 has counted and written
    return result


def _save(
    state: TrainState,
    run: RunDir,
    here: World,
    identity: Mapping[str, Any],
    metrics_log: MetricsLog,
) -> None:
    save(state, run, here, identity)
    metrics_log.write("checkpoint", **checkpoint_row(state))


def _announce(state: TrainState, metrics_log: MetricsLog) -> None:
    if state.entered:
        metrics_log.write("phase", step=state.step, phase=state.phase, **_sizes(state))


def _loop(
    config: RunConfig[Method],
    state: TrainState,
    objective: Objective,
    run: RunDir,
    metrics_log: MetricsLog,
    agreement: Agreement,
    identity: Mapping[str, Any],
    tool: Instrument,
) -> None:
    """Train to the end of the current phase and save a checkpoint there."""
    t, here, optimizer = config.train, metrics_log.world, state.optimizer
    tool.due(state.model, state.step)
    slow_until = state.step + 2  # the wait in a step is for the one before, which may compile
    while state.step < state.end:
        limit = here.slow if state.step < slow_until else float(t.timeout)
        with here.within(limit):
            loss, norm, metrics = advance(state, config, objective.batch(state.step), here)
            stopping = agreement.code()
        metrics_log.add(state.step, learning_rates(optimizer), loss, norm, metrics)

        due = _due(t.checkpoint_every, state.step) or t.keeps(state.step)
        evaluating = state.step < t.steps and _due(t.eval_every, state.step)
        due = due or (evaluating and bool(objective.best_by))
        saving = state.step == state.end or stopping or due
        observing = tool.due(state.model, state.step)
        if saving or evaluating or observing or state.step % t.log_every == 0:
            with here.within(limit):
                _flush(metrics_log, run)
        objective.sample(state.model, state.step, metrics_log)
        if observing:
            measure = partial(tool.measure, state.model, state.step)
            metrics_log.observation(t.observe, state.step, measure)
            here.agree(None)  # what rank 0 alone measures may take longer than a step
        if evaluating:
            assert t.eval_tokens is not None
            found = _evaluate(state, objective, run, metrics_log, limit=t.eval_tokens)
            metrics_log.evaluation(state.step, *found)
        if saving:
            _save(state, run, here, identity, metrics_log)
        if saving or evaluating or observing:
            metrics_log.pause()
        if stopping and state.step < t.steps:
            said = f"stopped and saved at step {state.step} of {t.steps}; {how_to_resume(run)}"
            raise Interrupted(said, stopping)


def advance(
    state: TrainState, config: RunConfig[Method], parts: Sequence[Any], here: World
) -> tuple[Tensor, Tensor | None, Metrics]:
    """Run one optimizer step and, unless the phase ends with it, the method's `after_step`.

    One that only reports is called at the end of a phase too.

    parts: this process's micro-batches of the step. Returns the mean loss before the step, the
    gradient norm (None where neither clipping nor a row of metrics needs it) and the method's
    metrics.
    """
    t, rng = config.train, Rng(config.train.seed)
    model, optimizer = state.model, state.optimizer
    set_lr(optimizer, state.schedule(state.step))
    seed_default(rng.integer(f"rank {here.rank}", state.step, "dropout"), here.device)
    loss = state.forward_backward(parts)
    wanted = config.optim.clip or _due(t.log_every, state.step + 1)
    norm = clip_gradients(model, config.optim.clip) if wanted else None
    with here.sharing():
        optimizer.step()
        optimizer.zero_grad()
        state.step += 1
        if state.step == state.end and not config.method.only_reports:
            return loss, norm, {}
        return loss, norm, config.method.after_step(model, optimizer, state.step, rng)


def _due(every: int | None, step: int) -> bool:
    return bool(every) and step % (every or 1) == 0


def _flush(metrics_log: MetricsLog, run: RunDir) -> None:
    try:
        metrics_log.flush()
    except Diverged as error:
        raise diverged(str(error), run) from None


def _evaluate(
    state: TrainState, objective: Objective, run: RunDir, metrics_log: MetricsLog, limit: int
) -> tuple[Evaluation, Mapping[str, float | None]]:
    """Return the held-out loss and other results.

    Raises Diverged, on every process, if the loss is not finite.
    """
    watch = metrics_log.evaluating(state.step)
    held_out, judged = objective.evaluate(state.model, limit, watch)
    if not math.isfinite(held_out.loss):
        lr = state.optimizer.param_groups[0]["lr"]
        what = f"step {state.step}: the held-out loss is {held_out.loss}"
        raise diverged(f"{what} at a learning rate of {lr:.3g}", run)
    return held_out, judged


def _start(
    config: RunConfig[Method], run: RunDir, state: TrainState, objective: Objective
) -> dict[str, Any]:
    t = config.train
    return {
        "event": "start",
        "run": str(run.path),
        "method": config.method.name,
        "form": config.method.export_form,
        "step": state.step,
        "steps": t.steps,
        "tokens_per_step": objective.tokens_per_step,
        "train_tokens": objective.train_tokens,
        "precision": t.precision,
        "task": config.tune.task,
        **_sizes(state),
    }


def _sizes(state: TrainState) -> dict[str, int]:
    return {
        "parameters": count_parameters(state.model),
        "trainable": count_parameters(state.model, trainable=True),
    }


def _counts(config: RunConfig[Method], state: TrainState, here: World) -> dict[str, float]:
    counts: dict[str, float] = {**_sizes(state)}
    counts["non_embedding_trainable"] = count_non_embedding(state.model)
    flops = flops_per_token(config, here.size, on_gpu=here.device.type == "cuda")
    return counts if flops is None else {**counts, "flops_per_token": flops}


def _result(
    run: RunDir, state: TrainState, held_out: Evaluation, metrics_log: MetricsLog
) -> Result:
    # Checkpoints of 0.1.0 do not contain the sizes, but every phase ends with a row that does.
    held = [row.get("state_bytes", 0) for row in run.metrics() if row["event"] == "checkpoint"]
    return Result(
        run=run.path,
        held_out=held_out,
        **_sizes(state),
        state_bytes=max([state_bytes(state.optimizer), *state.state_bytes, *held]),
        tokens_per_second=metrics_log.median_throughput(),
        peak_bytes=metrics_log.peak_bytes(),
    )
