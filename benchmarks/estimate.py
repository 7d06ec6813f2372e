"""Compare the memory predicted by `peptrain estimate` with an uncompiled step on a GPU.

    python benchmarks/estimate.py [ROW ...] [--presets llama-60m qwen-0.5b] [--rows-of-step 16] \\
        [--set train.KEY=VALUE] [--json FILE]

The second step of a run is measured, because the optimizer's moments exist by then. Merges and
exact steps are left out. The prediction counts tensors only. PyTorch's peak also contains the
workspaces of cuBLAS and of kernels. Between steps there are weights and optimizer state. On a CPU
nothing is measured.
"""

from __future__ import annotations

from typing import Any

import torch
from common import (
    Training,
    announce,
    base_config,
    configured,
    described,
    device_of,
    free,
    gib,
    parser,
    peaks,
    random_windows,
    reset_peak,
    start,
    table,
    write,
)

from peptrain.config import RunConfig
from peptrain.estimation.estimate import estimate
from peptrain.methods import METHODS
from peptrain.methods.base import Method
from peptrain.models.hf import ModelConfig
from peptrain.optim.adamw import clip_gradients

KEYS = ("checkpoint_activations=true", "micro_batch=4", "precision=bf16")
ROWS = (*METHODS, *(f"{name}:train.{key}" for name in ("full", "bpt") for key in KEYS))
HEADER = ("row", "predicted peak, GiB", "measured", "ratio", "predicted between steps", "measured")


def predicted(config: RunConfig[Method]) -> dict[str, int]:
    """Predict bytes of the first phase; a row has a warm start only if it sets one."""
    phase = estimate(config).phases[0]
    between = phase.weight_bytes + phase.state_bytes
    return {"predicted_peak": phase.step_peak_bytes, "predicted_between": between}


def step(training: Training) -> None:
    """Take one step, in micro-batches as configured."""
    train_state, t = training.train_state, training.config.train
    assert t.micro_batch is not None
    train_state.forward_backward(torch.split(random_windows(training, 1)[0], t.micro_batch))
    clip_gradients(train_state.model, training.config.optim.clip)
    train_state.optimizer.step()
    train_state.optimizer.zero_grad()


def measured(config: RunConfig[Method], device: torch.device) -> dict[str, int]:
    """Measure bytes; return nothing if it ran out of memory."""
    try:
        training = start(config, device)
        step(training)
        reset_peak()
        between = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        step(training)
    except torch.OutOfMemoryError:
        return {}
    return {"measured_peak": peaks()["peak_bytes"], "measured_between": between}


def cells(row: dict[str, Any]) -> list[str]:
    peak, between = row.get("measured_peak"), row.get("measured_between")
    said = "out of memory" if peak is None else "not measured"
    return [
        row["row"],
        gib(row["predicted_peak"]),
        gib(peak) if peak else said,
        f"{row['predicted_peak'] / peak:.3f}" if peak else "",
        gib(row["predicted_between"]),
        gib(between) if between else said,
    ]


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__, precision="bf16-mixed")
    made.add_argument("rows", nargs="*", default=ROWS, metavar="ROW")
    made.add_argument("--presets", nargs="+", default=["llama-60m", "qwen-0.5b"])
    made.add_argument("--rows-of-step", type=int, default=16)
    made.add_argument("--seq-len", type=int, default=512)
    args = made.parse_intermixed_args(argv)
    device = device_of(args.device)
    tokens = f"{args.rows_of_step} x {args.seq_len}"
    announce(device, {"precision": args.precision, "tokens": tokens, "set": args.set})
    found: list[dict[str, Any]] = []
    for preset in args.presets:
        model = ModelConfig(
            preset=preset, intermediate_size=args.intermediate_size, layers=args.layers
        )
        base = base_config(model, args.rows_of_step, args.seq_len, precision=args.precision)
        of_preset = []
        for row in args.rows:
            config = configured(row, base, args.set, device=device)
            sizes = predicted(config) | measured(config, device)
            of_preset.append({"row": row, "preset": preset, **described(config), **sizes})
            free()
        print(preset)
        table(HEADER, [cells(row) for row in of_preset])
        found += of_preset
        write(args, device, found)


if __name__ == "__main__":
    main()
