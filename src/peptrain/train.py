"""The trainer: one explicit function that names no method."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from peptrain import checkpoint, schedule
from peptrain.build import build, phase_at, rebuild, run_config
from peptrain.config import RunConfig, dump, resolved
from peptrain.data import Corpus, default_corpus
from peptrain.distributed import World, world
from peptrain.environment import record_environment
from peptrain.errors import ConfigError, DataError, Diverged, Interrupted
from peptrain.eval.perplexity import Evaluation, evaluate
from peptrain.journal import Journal, Observer, silent
from peptrain.methods.base import Method
from peptrain.model import (
    NextTokenLoss,
    autocast,
    check_causal,
    checkpoint_activations,
    compile_layers,
    config_file,
    count_parameters,
    save_tokenizer,
    vocabulary_size,
)
from peptrain.optim import state_bytes
from peptrain.rng import Rng
from peptrain.rundir import RunDir, first_free, write_atomically
from peptrain.schedule import Schedule
from peptrain.signals import Stop, stop_on_signals


@dataclass(frozen=True)
class Result:
    """What a finished run leaves in memory; the rest is in its directory."""

    run: Path
    held_out: Evaluation
    parameters: int
    trainable: int
    state_bytes: int
    """Of the optimizer's moments."""
    tokens_per_second: float
    peak_bytes: int
    """Peak GPU memory, 0 on a CPU."""


@dataclass
class Trainee:
    """A model in one phase of its training, with all that moves it."""

    model: PreTrainedModel
    loss: nn.Module
    """The model with its loss, replicated over the ranks."""
    optimizer: Optimizer
    schedule: Schedule
    phase: int
    step: int
    """Completed optimizer steps."""
    end: int
    """The step at which the phase ends."""


def train(config: RunConfig[Any], observe: Observer = silent) -> Result:
    """Train what `config` describes in a new run directory, to the last step.

    Raises ConfigError, DataError, Unsupported before anything is written; CheckpointError when the
    run directory exists or the disk is full; Diverged; Interrupted after Ctrl-C or SIGTERM.
    """
    with world(config.train.device) as here:
        config = resolved(config, world_size=here.size, on_gpu=here.device.type == "cuda")
        return _train(config, None, here, observe)


def resume(path: Path, observe: Observer = silent) -> Result:
    """Go on with the run in `path` from its newest whole checkpoint, or from the start.

    On a CPU the result is the same, bit for bit, as that of an uninterrupted run.
    """
    run = RunDir.open(path)
    config = run_config(run)
    with world(config.train.device) as here:
        return _train(config, run, here, observe)


def _train(config: RunConfig[Method], run: RunDir | None, here: World, observe: Observer) -> Result:
    corpus = Corpus.open(config.data.path) if config.data.path else default_corpus()
    _check_corpus(corpus, config)
    identity = _identity(config, corpus)
    trainee = _restore(config, run, here, identity)
    _check_vocabulary(trainee.model, corpus)
    if config.model.config is not None:
        check_causal(trainee.model)
    run = run or _create(config, corpus, here)
    tokens_per_step = config.train.batch_size * config.train.seq_len
    journal = Journal(run, here, observe, tokens_per_step)
    if here.main:
        run.rewind(trainee.step)
        record_environment(run, here)
        observe(_start(config, run, trainee, corpus))
    with stop_on_signals() as stop:
        _loop(config, trainee, corpus, run, journal, stop, identity)
        while trainee.step < config.train.steps:
            trainee = _restore(config, run, here, identity)
            _loop(config, trainee, corpus, run, journal, stop, identity)
    held_out = _evaluate(config, trainee.model, corpus, here, limit=0)
    result = _result(run, trainee, held_out, journal)
    journal.end(trainee.step, held_out)
    return result


def _loop(
    config: RunConfig[Method],
    trainee: Trainee,
    corpus: Corpus,
    run: RunDir,
    journal: Journal,
    stop: Stop,
    identity: Mapping[str, Any],
) -> None:
    """Train to the end of the phase, and leave a checkpoint there."""
    t, method, here, rng = config.train, config.method, journal.world, Rng(config.train.seed)
    model, optimizer = trainee.model, trainee.optimizer
    while trainee.step < trainee.end:
        lr = _set_lr(optimizer, config.optim.lr, trainee.schedule(trainee.step))
        torch.manual_seed(rng.integer(f"rank {here.rank}", trainee.step, "dropout"))
        loss = _accumulate(trainee, corpus, config, here)
        norm = _clip(model, config.optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        trainee.step += 1
        between = trainee.step < trainee.end
        metrics = method.after_step(model, optimizer, trainee.step, rng) if between else {}
        journal.add(trainee.step, lr, loss, norm, metrics)

        stopping = _agreed(stop, here, trainee.step % t.log_every == 0)
        saving = not between or stopping or _due(t.checkpoint_every, trainee.step)
        evaluating = trainee.step < t.steps and _due(t.eval_every, trainee.step)
        if saving or evaluating or trainee.step % t.log_every == 0:
            _flush(journal, run)
        if evaluating:
            held_out = _evaluate(config, model, corpus, here, limit=t.eval_tokens)
            journal.evaluation(trainee.step, held_out)
        if saving:
            _save(trainee, run, here, identity, t.keep)
            journal.write("checkpoint", step=trainee.step)
        if saving or evaluating:
            journal.pause()
        if stopping and trainee.step < t.steps:
            raise Interrupted(
                f"stopped and saved at step {trainee.step} of {t.steps}; go on with"
                f" `peptrain resume {run.path}`"
            )


def _due(every: int | None, step: int) -> bool:
    return bool(every) and step % (every or 1) == 0


def _set_lr(optimizer: Optimizer, lr: float | None, multiplier: float) -> float:
    assert lr is not None
    for group in optimizer.param_groups:
        group["lr"] = lr * multiplier
    return lr * multiplier


def _accumulate(trainee: Trainee, corpus: Corpus, config: RunConfig[Method], here: World) -> Tensor:
    """Gradients of this rank's share of the batch, micro-batch by micro-batch; the mean loss.

    Replicas exchange gradients once, on the last micro-batch.
    """
    t = config.train
    assert t.micro_batch is not None and t.precision is not None
    windows = corpus.batch(
        seed=t.seed,
        step=trainee.step,
        rank=here.rank,
        world=here.size,
        batch_size=t.batch_size,
        seq_len=t.seq_len,
    ).to(here.device, non_blocking=True)
    parts = torch.split(windows, t.micro_batch)  # resumed on other ranks, the last may be shorter
    total = torch.zeros((), device=here.device)
    for i, part in enumerate(parts):
        with here.exchange(trainee.loss, i == len(parts) - 1):
            with autocast(t.precision, here.device):
                loss = trainee.loss(part) * (len(part) / len(windows))
            loss.backward()
        total = total + loss.detach()
    return total


def _clip(model: nn.Module, clip: float | None) -> Tensor:
    """The global gradient norm, after scaling the gradients down to `clip` unless that is 0."""
    params = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    if clip:
        nn.utils.clip_grads_with_norm_(params, clip, norm)
    return norm


def _agreed(stop: Stop, here: World, at_boundary: bool) -> bool:
    """Whether to stop: alone at once, several ranks together at the next row of metrics."""
    if here.size == 1:
        return stop.requested
    asked = torch.tensor(float(stop.requested), device=here.device)
    return at_boundary and here.sum(asked).item() > 0


def _flush(journal: Journal, run: RunDir) -> None:
    try:
        journal.flush()
    except Diverged as error:
        raise Diverged(f"{error}; {_last_good(run)}") from None


def _last_good(run: RunDir) -> str:
    found = checkpoint.available(run.checkpoints)
    last = f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
    return f"nothing was saved since, and {last}; try a lower optim.lr"


def _evaluate(
    config: RunConfig[Method], model: PreTrainedModel, corpus: Corpus, here: World, limit: int
) -> Evaluation:
    t = config.train
    assert t.micro_batch is not None and t.precision is not None
    # Compiled layers would be compiled anew for evaluation's mode and shapes.
    with torch.compiler.set_stance("force_eager"):
        return evaluate(
            model,
            corpus.held_out(),
            seq_len=t.seq_len,
            batch_size=t.micro_batch,
            precision=t.precision,
            world=here,
            limit=limit,
        )


def _save(
    trainee: Trainee, run: RunDir, here: World, identity: Mapping[str, Any], keep: int
) -> None:
    if here.main:
        finite = torch.stack([p.isfinite().all() for p in trainee.model.parameters()])
        if not finite.all():
            lr = trainee.optimizer.param_groups[0]["lr"]
            raise Diverged(
                f"step {trainee.step}: a weight is not finite at a learning rate of {lr:.3g};"
                f" {_last_good(run)}"
            )
        state = checkpoint.capture(
            trainee.model,
            trainee.optimizer,
            step=trainee.step,
            phase=trainee.phase,
            identity=identity,
        )
        checkpoint.save(run.checkpoints, state, keep)
    here.barrier()


def _restore(
    config: RunConfig[Method], run: RunDir | None, here: World, identity: Mapping[str, Any]
) -> Trainee:
    """The trainee at the newest checkpoint of `run`, or at the start.

    The one path for a start, a resume and a phase boundary.
    """
    saved = checkpoint.latest(run.checkpoints) if run else None
    step = saved.step if saved else 0
    phase, end = phase_at(config, step)
    if saved:
        checkpoint.agrees(saved, identity)
        model = rebuild(config, saved, phase)
    else:
        model = build(config, phase)
    model.to(here.device)  # type: ignore[arg-type]
    model.train()
    if config.train.checkpoint_activations:
        checkpoint_activations(model)
    if config.train.compile:
        compile_layers(model)
    optimizer = config.method.optimizer(model, config.optim)
    if saved:
        checkpoint.load_optimizer(model, optimizer, saved, same_phase=phase == saved.phase)
    base = schedule.build(config.schedule, config.train.steps)
    loss = here.parallelize(NextTokenLoss(model, compile=config.train.compile))
    return Trainee(model, loss, optimizer, config.method.schedule(base), phase, step, end)


def _check_corpus(corpus: Corpus, config: RunConfig[Method]) -> None:
    """Raise DataError now for what would end the training later."""
    corpus.windows(config.train.seq_len)
    if len(corpus.held_out()) < 2:
        raise DataError(
            f"{corpus.path}: the held-out part is empty, so there is nothing to evaluate on;"
            " prepare it with a larger --held-out, or with --held-out-inputs"
        )


def _check_vocabulary(model: PreTrainedModel, corpus: Corpus) -> None:
    vocabulary = vocabulary_size(model)
    if corpus.max_id >= vocabulary:
        raise ConfigError(
            f"model.vocab_size: {vocabulary}, and token id {corpus.max_id} occurs in {corpus.path};"
            f" set it to {corpus.vocab_size}, or prepare the data with the model's own tokenizer"
        )


def _create(config: RunConfig[Method], corpus: Corpus, here: World) -> RunDir:
    path = config.run or here.agree(first_free(Path("runs"), config.method.name))
    if here.main:
        RunDir.create(path, lambda run: _first_files(run, config, corpus))
    here.barrier()
    return RunDir(path)


def _first_files(run: RunDir, config: RunConfig[Method], corpus: Corpus) -> None:
    """All that resume, eval and export need beside the checkpoints and the corpus."""
    write_atomically(run.config_file, dump(config))
    save_tokenizer(corpus.tokenizer_file, corpus.eos_id, run.tokenizer)
    if file := config_file(config.model):
        shutil.copyfile(file, run.model_file)


def _identity(config: RunConfig[Method], corpus: Corpus) -> dict[str, Any]:
    """What a checkpoint and the run that continues from it must agree in.

    The learning rate, the schedule and the number of steps may change.
    """
    model = asdict(config.model)
    if file := config_file(config.model):
        model["config"] = hashlib.sha256(file.read_bytes()).hexdigest()
    train = {k: getattr(config.train, k) for k in ("precision", "seed", "batch_size", "seq_len")}
    sections = {
        "method": {"name": config.method.name, **asdict(config.method)},
        "model": model,
        "train": train,
    }
    flat = {f"{s}.{k}": v for s, values in sections.items() for k, v in values.items()}
    return {**flat, "data": corpus.fingerprint}


def _start(
    config: RunConfig[Method], run: RunDir, trainee: Trainee, corpus: Corpus
) -> dict[str, Any]:
    t = config.train
    return {
        "event": "start",
        "run": str(run.path),
        "method": config.method.name,
        "step": trainee.step,
        "steps": t.steps,
        "tokens_per_step": t.batch_size * t.seq_len,
        "train_tokens": corpus.train_tokens,
        "precision": t.precision,
        "parameters": count_parameters(trainee.model),
        "trainable": count_parameters(trainee.model, trainable=True),
    }


def _result(run: RunDir, trainee: Trainee, held_out: Evaluation, journal: Journal) -> Result:
    on_gpu = journal.world.device.type == "cuda"
    return Result(
        run=run.path,
        held_out=held_out,
        parameters=count_parameters(trainee.model),
        trainable=count_parameters(trainee.model, trainable=True),
        state_bytes=state_bytes(trainee.optimizer),
        tokens_per_second=journal.median_throughput(),
        peak_bytes=torch.cuda.max_memory_allocated() if on_gpu else 0,
    )
