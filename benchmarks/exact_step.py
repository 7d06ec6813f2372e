"""Measure time and errors of LORO's exact step on the factors of a randomly initialized LLaMA.

    python benchmarks/exact_step.py [--device cuda] [--layers 24] [--width 2048] [--mlp 5461]
                                    [--rank 512] [--dtype float32] [--reference 1] [--streams 2 4 8]

The first table has a row for each form of the step: the one used in training, from Gram matrices,
for all pairs at once; the orthographic retraction, likewise; and the reference's SVDs and QRs, for
the pairs of --reference layers. The error is the relative error of W' = B'A' against the reference
in float64, the largest over one pair of each shape. That of the orthographic retraction is another
W', which differs in third order. Then come the optimizer's complete exact and ordinary steps, and
the slowest part of the Gram form, the eigendecomposition: in one call, one by one, and on several
CUDA streams at once.
"""

from __future__ import annotations

import argparse
import copy
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from peptrain.ops.orthographic import orthographic_step
from peptrain.ops.riemannian import riemannian_step
from peptrain.ops.riemannian_gram import eigenvectors, gram_step, gram_steps_
from peptrain.optim.loro import LOROOptimizer, LORORule

LR = 0.003  # lr_p of a first step at lr 0.01
RULE = LORORule(
    exact_every=1,
    refresh_every=0,
    retraction="riemannian",
    direction="adam",
    update="adam",
    precond_eps=0.0,
    refresh="none",
)
Pair = tuple[nn.Parameter, nn.Parameter]


def shapes(width: int, mlp: int) -> list[tuple[int, int]]:
    """Return (out, in) of q k v o gate up down."""
    return [(width, width)] * 4 + [(mlp, width)] * 2 + [(width, mlp)]


def factors(args: argparse.Namespace) -> list[Pair]:
    """Return B and A of every matrix, with Xavier initialization and random gradients."""
    generator = torch.Generator(args.device).manual_seed(0)
    given = {"device": args.device, "dtype": args.dtype}

    def parameter(rows: int, columns: int) -> nn.Parameter:
        p = nn.Parameter(torch.empty(rows, columns, **given))
        nn.init.xavier_normal_(p, generator=generator)
        p.grad = torch.randn(rows, columns, generator=generator, **given)
        return p

    layer = shapes(args.width, args.mlp)
    return [(parameter(n, args.rank), parameter(args.rank, m)) for n, m in layer * args.layers]


def direction(p: Tensor) -> Tensor:
    """Return Adam's direction after one step."""
    assert p.grad is not None
    return p.grad / (p.grad.abs() + 1e-6)


def milliseconds(
    work: Callable[[], object], device: str, warm_ups: int = 1, times: int = 1
) -> float:
    """Return the mean milliseconds of a call of `work`, including work on the device."""

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    for _ in range(warm_ups):
        work()
    wait()
    start = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return (time.perf_counter() - start) * 1e3 / times


def reference(pair: Pair, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    B, A, D_B, D_A = (x.detach().to(dtype) for x in (*pair, direction(pair[0]), direction(pair[1])))
    return riemannian_step(B, A, D_B, D_A, LR)[:2]


def error(found: tuple[Tensor, Tensor], right: Tensor) -> float:
    W = found[0].detach().double() @ found[1].detach().double()
    return float(torch.linalg.norm(W - right) / torch.linalg.norm(right))


def clones(pairs: list[Pair]) -> list[Pair]:
    """Return copies with the same gradients."""
    copied = copy.deepcopy(pairs)
    for new, old in zip(copied, pairs, strict=True):
        new[0].grad, new[1].grad = old[0].grad, old[1].grad
    return copied


@torch.no_grad()
def forms(pairs: list[Pair], args: argparse.Namespace) -> None:
    """Print one row for the Gram form, one for the orthographic step, one for the reference."""
    gpu = args.device.startswith("cuda")
    place = f"{torch.cuda.get_device_name() if gpu else platform.machine()}"
    place += f" | {str(args.dtype).removeprefix('torch.')} | {torch.__version__}"
    samples = [pairs[i] for i in (0, 4, 6)]
    right = [B @ A for B, A in (reference(pair, torch.float64) for pair in samples)]

    print("\n| form | device | dtype | torch | ms per pair | error |\n|---|---|---|---|---|---|")
    peaks = {}
    for name, step in {"Gram": gram_step, "orthographic": orthographic_step}.items():
        first = clones(samples)
        refused, _ = gram_steps_(first, direction, LR, step=step)
        assert refused == [], "random factors are not singular"
        worst = max(error(pair, W) for pair, W in zip(first, right, strict=True))
        moved = clones(pairs)
        if gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        work = partial(gram_steps_, moved, direction, LR, step=step)
        ms = milliseconds(work, args.device) / len(pairs)
        print(f"| {name} | {place} | {ms:.2f} | {worst:.1e} |")
        if gpu:
            peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
    wide = torch.promote_types(args.dtype, torch.float32)
    rounded = [[x.to(args.dtype) for x in reference(pair, wide)] for pair in samples]
    worst = max(error((B, A), W) for (B, A), W in zip(rounded, right, strict=True))
    chosen = [pair for i in range(args.reference) for pair in pairs[7 * i : 7 * i + 7]]
    if chosen:
        each = [partial(reference, pair, wide) for pair in chosen]
        ms = sum(milliseconds(one, args.device, warm_ups=0) for one in each) / len(each)
        print(f"| reference | {place} | {ms:.2f} | {worst:.1e} |")
    for name, peak in peaks.items():
        print(f"\nTemporaries of the {name} form: {peak:.2f} GiB at the most.")


def whole_steps(pairs: list[Pair], args: argparse.Namespace) -> None:
    """Time the optimizer's exact steps, by both retractions, and its ordinary step of all pairs."""
    params = [p for pair in pairs for p in pair]
    group = {"params": params, "factors": True, "scales": [0.25] * len(params)}
    optimizer = LOROOptimizer([group], RULE, lr=1e-4, betas=(0.9, 0.999), eps=1e-6)
    exact = milliseconds(optimizer.step, args.device)
    optimizer.rule = replace(RULE, retraction="orthographic")
    orthographic = milliseconds(optimizer.step, args.device)
    optimizer.rule = replace(RULE, exact_every=0)
    ordinary = milliseconds(optimizer.step, args.device, times=5)
    numbers = sum(p.numel() for p in params)
    print(f"\n| step of {len(pairs)} pairs, {numbers / 1e6:.0f} M numbers | ms |\n|---|---|")
    print(f"| exact | {exact:.0f} |\n| exact, orthographic | {orthographic:.1f} |")
    print(f"| ordinary | {ordinary:.2f} |")


def eigendecompositions(args: argparse.Namespace) -> None:
    """Time several ways to decompose a batch of 2r x 2r matrices."""
    size, count = 2 * args.rank, 16
    X = torch.randn(count, size, size, device=args.device, dtype=torch.float64)
    H = X @ X.mT / size
    ways: dict[str, Callable[[], object]] = {
        "one call": lambda: torch.linalg.eigh(H),
        "one by one": lambda: [torch.linalg.eigh(h) for h in H],
    }
    if args.device.startswith("cuda"):
        for k in args.streams:
            ways[f"{k} streams"] = lambda k=k: eigenvectors(H, k)
            V = eigenvectors(H, k)
            lost = V.mT @ (V @ (V.mT @ H @ V).diagonal(dim1=1, dim2=2).diag_embed() @ V.mT - H) @ V
            assert float(lost.abs().max()) < 1e-10, "the streams got in each other's way"
    print(f"\n| eigh of {count} {size} x {size} | ms each |\n|---|---|")
    for name, way in ways.items():
        print(f"| {name} | {milliseconds(way, args.device) / count:.2f} |")


def main(argv: list[str] | None = None) -> None:
    plain = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--mlp", type=int, default=5461)
    parser.add_argument("--rank", type=int, default=512)
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--reference", type=int, default=1, help="layers to time the reference on")
    parser.add_argument("--streams", type=int, nargs="*", default=[2, 4, 8])
    args = parser.parse_args(argv)
    pairs = factors(args)
    forms(pairs, args)
    whole_steps(pairs, args)
    eigendecompositions(args)


if __name__ == "__main__":
    main()
