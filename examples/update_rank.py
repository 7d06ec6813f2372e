"""Measure the rank of an MLP's update by method, batch size and step (BPT, Figure 2).

    python examples/update_rank.py [--cifar DIR] [--steps 200] [--out update-rank.csv]

Trains a three-layer MLP by SGD, Adam, BPT and ReLoRA, and measures the numerical rank of the second
layer's W_t - W_0 at two tolerances, relative to its largest singular value. Prints the table and
writes all ranks to the CSV and, where matplotlib is installed, the three panels of the figure to an
SVG beside it. The data are scikit-learn's digits (`pip install scikit-learn`), or CIFAR-10's binary
version in DIR (data_batch_1.bin to data_batch_5.bin and test_batch.bin).

Two things to know when reading it: the first update of Adam at batch 1 has rank 1, because the sign
of an outer product is an outer product; and a rank depends on its tolerance.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peptrain as pt
from peptrain.errors import PeptrainError
from peptrain.figures.panel import sheet
from peptrain.figures.style import imported, look, rendered, styled
from peptrain.methods.base import Method
from peptrain.ops.singular import numerical_rank, singular_values
from peptrain.optim.adamw import OptimConfig
from peptrain.optim.schedule import ScheduleConfig

WIDTH, RANK, CLASSES, MERGES = 256, 16, 10, 4
BATCHES, EVOLUTION = (1, 2, 4, 8, 16, 32, 64, 128), 16
"""EVOLUTION: the batch size at which ranks are measured over all of training."""
TOLERANCES = (1e-2, 1e-3)
CONSTANT = ScheduleConfig(kind="constant", warmup=0)
Data = tuple[Tensor, Tensor, Tensor, Tensor]
"""x [rows, inputs] in [0, 1] and classes y [rows] of the training part, then of the test part."""
Row = dict[str, Any]


def digits() -> Data:
    """Return scikit-learn's 1,797 images of 8 x 8 pixels, the last 297 as the test part."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise SystemExit("needs scikit-learn (pip install scikit-learn), or --cifar DIR") from error
    found = load_digits()
    x, y = torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)
    return x[:1500], y[:1500], x[1500:], y[1500:]


def cifar(folder: Path) -> Data:
    """Read CIFAR-10's binary files: rows of one byte for the class and 3 x 32 x 32 for pixels."""
    parts: list[Tensor] = []
    for names in ([f"data_batch_{n}.bin" for n in range(1, 6)], ["test_batch.bin"]):
        content = bytearray(b"".join((folder / name).read_bytes() for name in names))
        rows = torch.frombuffer(content, dtype=torch.uint8).view(-1, 1 + 3 * 32 * 32)
        parts += [rows[:, 1:].float() / 255, rows[:, 0].long()]
    return parts[0], parts[1], parts[2], parts[3]


def methods(steps: int) -> dict[str, tuple[Method, OptimConfig]]:
    """Return each line of the figure with its optimizer. "4", the output layer, stays dense."""
    low = {"rank": RANK, "exclude": "4", "merge_every": max(1, steps // MERGES)}
    adam = OptimConfig(lr=1e-3)
    return {
        "sgd": (pt.Full(), OptimConfig(kind="sgd", lr=0.1)),
        "adam": (pt.Full(), adam),
        "bpt": (pt.BPT(**low), adam),
        "relora": (pt.ReLoRA(**low, warm_start_steps=0, restart_warmup=0), adam),
    }


def weight(layer: Any) -> Tensor:
    found = layer.effective_weight() if hasattr(layer, "effective_weight") else layer.weight
    return found.detach().double().clone()


def measure(data: Data, name: str, batch: int, steps: int) -> list[Row]:
    """Train once; return a row for each step at which the rank of W_t - W_0 was measured."""
    x, y, test_x, test_y = data
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(x.shape[1], WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(),
        nn.Linear(WIDTH, CLASSES),
    )  # fmt: skip
    method, optim = methods(steps)[name]
    training = pt.adapt(model, method, steps=steps, optim=optim, schedule=CONSTANT, fresh=True)
    W_0, rows = weight(model[2]), list[Row]()
    often = max(1, steps // 50) if batch == EVOLUTION else steps
    for step in range(1, steps + 1):
        drawn = torch.randint(len(x), (batch,), generator=torch.Generator().manual_seed(step))
        F.cross_entropy(model(x[drawn]), y[drawn]).backward()
        training.step()
        if step == 1 or step % often == 0 or step == steps:
            sigma = singular_values(weight(model[2]) - W_0)
            ranks = {f"rank_{t:g}": int(numerical_rank(sigma, t)) for t in TOLERANCES}
            rows.append({"method": name, "batch": batch, "step": step, **ranks})
    with torch.no_grad():
        right = training.dense()(test_x).argmax(1) == test_y
    return [row | {"test_accuracy": right.float().mean().item()} for row in rows]


def draw(rows: Sequence[Row], steps: int) -> bytes:
    """Return the three panels: over the batch after the first step and the last, and over steps."""
    first, last = ([r for r in rows if r["step"] == step] for step in (1, steps))
    of_one = [r | {"share": r["step"] / steps} for r in rows if r["batch"] == EVOLUTION]
    panels = (("rank of W_1 - W_0", "batch", first), ("rank of W_T - W_0", "batch", last),
              (f"rank at batch {EVOLUTION}", "share", of_one))  # fmt: skip
    names = dict.fromkeys(row["method"] for row in rows)
    with styled():
        made, axes = sheet([1.7] * 3, legend=3)
        for (ax,), (title, x, shown) in zip(axes, panels, strict=True):
            label = {"batch": "batch size", "share": "step / T"}[x]
            panel = made.panel(ax, title, label, "numerical rank")
            for n, name in enumerate(names):
                mine = [row for row in shown if row["method"] == name]
                for tolerance, dash in zip(TOLERANCES, (":", "-"), strict=True):
                    at, ranks = [r[x] for r in mine], [r[f"rank_{tolerance:g}"] for r in mine]
                    panel.line(f"{tolerance:g}", name, at, ranks, look(n), ls=dash)
            ax.set(title=title, xlabel=label, ylabel=panel.y_axis)
            if x == "batch":
                ax.set_xscale("log", base=2)
                ax.set_xticks(BATCHES, [str(batch) for batch in BATCHES])
        lines = [(name, {"color": look(n).colour}) for n, name in enumerate(names)]
        dashes = [(f"at {t:g}", {"ls": d}) for t, d in zip(TOLERANCES, (":", "-"), strict=True)]
        made.legend([*lines, *dashes])
        return rendered(made.figure, "svg", "update-rank")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cifar", type=Path, help="directory of CIFAR-10's binary version")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("update-rank.csv"))
    given = parser.parse_args(arguments)
    data, steps = cifar(given.cifar) if given.cifar else digits(), given.steps
    rows: list[Row] = []
    print("rank of the second layer's W_t - W_0 at 1e-2 | 1e-3, first step -> last (test accuracy)")
    for batch in BATCHES:
        for name in methods(steps):
            rows += (found := measure(data, name, batch, steps))
            ends = " -> ".join(f"{r['rank_0.01']:3d} | {r['rank_0.001']:3d}"
                               for r in (found[0], found[-1]))  # fmt: skip
            print(f"batch {batch:3d}  {name:6s}  {ends}  ({found[0]['test_accuracy']:.2f})")
    with given.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    try:
        imported("matplotlib")
        given.out.with_suffix(".svg").write_bytes(draw(rows, steps))
    except PeptrainError as error:
        print(f"no figure: {error}")


if __name__ == "__main__":
    main()
