"""An estimate as a table and lines of text."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from peptrain.estimation.dry_run import KINDS, Event
from peptrain.estimation.estimate import Estimate
from peptrain.estimation.memory_fit import GIB, MemoryFit, in_units
from peptrain.estimation.phases import PhaseEstimate


def table(made: Estimate) -> Table:
    """Format the estimate, with a column for each phase.

    GB is 10^9 bytes, GiB 2^30. A multiply-add is two FLOPs.
    """
    model = made.config.model
    shown = Table(f"{made.config.method.name}, {model.config or model.preset}", box=None)
    for phase in made.phases:
        steps = f"steps {phase.first:,} to {phase.last:,}" if len(made.phases) > 1 else ""
        shown.add_column(steps, justify="right")
    columns = [_cells(phase, made.ranks) for phase in made.phases]
    for label in columns[0]:
        shown.add_row(label, *(column[label] for column in columns))
    return shown


def _cells(phase: PhaseEstimate, ranks: int) -> dict[str, str]:
    """The cells of a column, by row label."""
    spared = 100 * phase.non_embedding_reduction
    sizes = {
        "weights": phase.weight_bytes,
        "gradients": phase.gradient_bytes,
        "optimizer state": phase.state_bytes,
        **({"copies to exchange": phase.exchange_bytes} if ranks > 1 else {}),
        "peak": phase.peak_bytes,
    }
    flops = {
        "forward": sum(phase.forward_flops.values()),
        "forward and backward": phase.flops_per_token,
        **{f"  {kind.replace('_', '-')}": phase.training_flops[kind] for kind in KINDS},
    }
    return {
        "parameters": f"{phase.total_parameters / 1e6:,.2f}M",
        "trainable": f"{phase.trainable_parameters / 1e6:,.2f}M",
        "non-embedding reduction": f"{spared:.2f} %",
        "weights and moments, as in papers": f"{phase.paper_bytes / 1e9:.3f} GB",
        **{label: f"{size / GIB:.3f} GiB" for label, size in sizes.items()},
        **{f"{label}, per token": f"{each / 1e6:,.1f} MFLOP" for label, each in flops.items()},
    }


def lines(made: Estimate) -> Iterator[str]:
    """Yield lines on the complete run: what the peak is of, totals, events, and what fits."""
    t = made.config.train
    again = ", activations recomputed" if t.checkpoint_activations else ""
    each = f" on each of {made.ranks} processes" if made.ranks > 1 else ""
    where = "a GPU" if made.on_gpu else "a CPU"
    yield (
        f"peak: micro-batch of {t.micro_batch} x {t.seq_len} tokens{each}, {t.precision} on"
        f" {where}, uncompiled{again}"
    )
    passes = f"{made.run_flops:.3g} FLOPs in forward and backward"
    yield f"run: {t.steps:,} steps, {made.tokens:,} tokens, {passes}"
    for phase in made.phases:
        for event in phase.events:
            yield _event(event)
    if made.fit is not None:
        yield _fit(made.fit, made)


def _event(event: Event) -> str:
    counts = [f"{n:,} x {kind}" for kind, n in event.decompositions.items()]
    work = ", ".join([f"{event.flops / 1e9:,.1f} GFLOP in products", *counts])
    peak = f"peak {event.peak_bytes / GIB:.3f} GiB"
    return f"{event.what.replace('_', ' ')}: {event.times:,} times, each {work}, {peak}"


def _fit(fit: MemoryFit, made: Estimate) -> str:
    t, rank = made.config.train, getattr(made.config.method, "rank", None)
    at_rank = f" at rank {rank}" if rank else ""
    said = "fits" if fit.fits else "does not fit"
    micro_batch = fit.micro_batch or "none"
    parts = [
        f"micro-batch {t.micro_batch}{at_rank} {said} in {in_units(fit.gpu_memory)}",
        f"largest micro-batch{at_rank}: {micro_batch}",
    ]
    if fit.rank:
        parts.append(f"largest rank at micro-batch {fit.rank_micro_batch}: {fit.rank}")
    return "; ".join(parts)
