"""Test whether LLaMA-7B trains within 24 GiB, with a merge or an exact step among the steps.

    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python benchmarks/budget.py \\
        [--cap-gib 24] [--tokens 256] [ROW ...] [--json FILE]

The allocator may hold at most the cap minus --context-gib, which is for CUDA's own memory. Each row
takes --steps steps at a constant learning rate. Halfway through it does its method's periodic
event: a merge, or LORO's exact step. After a merge, W' is compared with W + delta in fp32 for a few
matrices: `arrived` is <W' - W, delta> / <delta, delta>, 1 if nothing is lost, and the bias is the
mean error in standard errors, within about 2 if rounding is unbiased.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from common import (
    GIB,
    Training,
    announce,
    base_config,
    configured,
    described,
    device_of,
    free,
    gib,
    model_of,
    parser,
    peaks,
    random_windows,
    reset_peak,
    start,
    step,
    table,
    waited,
    write,
)
from torch import Tensor

from peptrain.config import RunConfig
from peptrain.methods.base import Method
from peptrain.methods.bpt import BPTLinear
from peptrain.methods.lora import LoRALinear
from peptrain.models.sites import ReparamLinear, reparametrized
from peptrain.rng import Rng

ROWS = ("full", "bpt:rank=256", "bpt:rank=512", "relora:rank=256", "loro:rank=512",
        "loro:rank=1024")  # fmt: skip
HEADER = ("row", "peak GiB", "allocator GiB", "ms/step", "tokens/s", "event, ms", "event",
          "trainable / total")  # fmt: skip
EVENTS = {"bpt": "merge_every", "relora": "merge_every", "loro": "exact_every"}


def with_events(row: str, every: int) -> str:
    """Return the row with its method's periodic event set to every `every` steps."""
    own = EVENTS.get(row.split(":")[0])
    return f"{row}:{own}={every}:restart_warmup=0" if own else row


def measured(
    row: str, config: RunConfig[Method], device: torch.device, every: int
) -> dict[str, Any]:
    """Measure one row; "ms" is absent if it ran out of memory."""
    found: dict[str, Any] = {"row": row, **described(config)}
    try:
        training = start(config, device)
        reset_peak()
        found |= training.sizes() | trained(training, every)
    except torch.OutOfMemoryError:
        pass
    return found | peaks()


def trained(training: Training, every: int) -> dict[str, Any]:
    """Take 2 * `every` steps, with the method's event after step `every`."""
    windows, device = random_windows(training, 1)[0], training.here.device
    ms = [waited(lambda: step(training, windows), device) for _ in range(every)]
    between, errors = event(training)
    ms += [waited(lambda: step(training, windows), device) for _ in range(every)]
    usual = [t for i, t in enumerate(ms, 1) if i > 2 and i % every]  # the first ones compile
    return {"ms": usual, "event_step_ms": ms[-1], "between_ms": between, "errors": errors}


def event(training: Training) -> tuple[float, list[dict[str, float]]]:
    """Run the method's `after_step`; return its milliseconds and the errors of a few merges."""
    train_state, rng = training.train_state, Rng(training.config.train.seed)
    watched = some(list(reparametrized(train_state.model)))
    before = [(on_host(layer.weight), summed(layer)) for layer in watched]
    after_step = training.config.method.after_step
    ms = waited(
        lambda: after_step(train_state.model, train_state.optimizer, train_state.step, rng),
        training.here.device,
    )
    after = [on_host(layer.weight) for layer in watched]
    return ms, [error(W, wanted, new) for (W, wanted), new in zip(before, after, strict=True)]


def some(layers: list[ReparamLinear]) -> list[BPTLinear | LoRALinear]:
    """Return the first, middle and last of the layers that merge into a W."""
    merging = [layer for layer in layers if isinstance(layer, BPTLinear | LoRALinear)]
    return [merging[0], merging[len(merging) // 2], merging[-1]] if merging else []


def on_host(W: Tensor) -> Tensor:
    """Return a copy on the host, which does not use the budget."""
    return W.detach().to("cpu", copy=True)


@torch.no_grad()
def summed(layer: BPTLinear | LoRALinear) -> Tensor:
    """Return W after an exact merge, in fp32, computed on the host."""
    B, A = (layer.U, layer.V) if isinstance(layer, BPTLinear) else (layer.sB(), layer.A)
    return on_host(layer.weight).float() + on_host(B).float() @ on_host(A).float()


def error(W: Tensor, wanted: Tensor, merged: Tensor) -> dict[str, float]:
    """Measure the error of `merged` against `wanted` = W + delta, and the share of delta in it."""
    W, wanted, merged = W.double(), wanted.double(), merged.double()
    difference, delta = merged - wanted, wanted - W
    scatter = difference.square().mean().sqrt().item()
    return {
        "relative": scatter / wanted.square().mean().sqrt().item(),
        "bias": difference.mean().item() * math.sqrt(difference.numel()) / (scatter or 1.0),
        "arrived": ((merged - W) * delta).sum().item() / (delta.square().sum().item() or 1.0),
        "delta": delta.square().mean().sqrt().item() / W.square().mean().sqrt().item(),
    }


def cells(row: dict[str, Any], cap: int, tokens: int) -> list[str]:
    held = gib(row["reserved_bytes"]) + (" (over the cap)" if row["reserved_bytes"] > cap else "")
    if "ms" not in row:
        return [row["row"], "out of memory", held, "", "", "", "", ""]
    usual = statistics.median(row["ms"])
    extra = row["event_step_ms"] - usual if row["method"] == "loro" else row["between_ms"]
    has_event = row["method"] in EVENTS
    return [
        row["row"],
        "" if row["recorded"] else gib(row["peak_bytes"]),
        held,
        f"{usual:.0f}",
        f"{tokens / usual * 1e3:,.0f}",
        f"{extra:.0f}" if has_event else "",
        happened(row),
        f"{row['trainable'] / 1e6:.0f}M / {row['parameters'] / 1e6:.0f}M",
    ]


def happened(row: dict[str, Any]) -> str:
    if row["method"] == "loro":
        return "exact step"
    if not row["errors"]:
        return "none"
    means = {k: statistics.mean(e[k] for e in row["errors"]) for k in row["errors"][0]}
    return (f"merge: delta {means['delta']:.2%} of W, error {means['relative']:.2%}, arrived"
            f" {means['arrived']:.4f}, bias {means['bias']:+.1f} s.e.")  # fmt: skip


def limit(device: torch.device, cap: float) -> None:
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap * GIB / total))


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__, preset="llama-7b")
    made.add_argument("rows", nargs="*", default=ROWS, metavar="ROW")
    made.add_argument("--cap-gib", type=float, default=24.0)
    made.add_argument("--context-gib", type=float, default=0.5)
    made.add_argument("--tokens", type=int, default=256)
    made.add_argument("--seq-len", type=int, default=256)
    made.add_argument("--steps", type=int, default=12)
    args = made.parse_intermixed_args(argv)
    device, every = device_of(args.device), args.steps // 2
    cap = args.cap_gib - args.context_gib
    limit(device, cap)
    announce(device, {"preset": args.preset, "layers": args.layers or "all", "tokens": args.tokens,
                      "precision": args.precision, "cap": f"{args.cap_gib} GiB less"
                      f" {args.context_gib} for CUDA", "set": args.set})  # fmt: skip
    found: list[dict[str, Any]] = []
    base = base_config(model_of(args), args.tokens // args.seq_len, args.seq_len,
                       precision=args.precision, compile=True)  # fmt: skip
    constant = ["schedule.kind=constant", "schedule.warmup=0"]
    for row in args.rows:
        given = [*constant, *args.set]
        config = configured(with_events(row, every), base, given, device=device)
        found.append(measured(row, config, device, every))
        print(" | ".join(cells(found[-1], int(cap * GIB), args.tokens)), flush=True)
        write(args, device, found)
        free()
    print()
    table(HEADER, [cells(row, int(cap * GIB), args.tokens) for row in found])


if __name__ == "__main__":
    main()
