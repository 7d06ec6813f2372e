"""Compare forward time and memory of a factorised and a dense model, over batch and length.

    python benchmarks/inference.py --preset llama-1b --intermediate-size 5504 --rank 512 \\
        [--cuda-graph] [--logits last] [--cells 512x128 64x1024] [--json FILE]

The default cells are those of LORO's Table 3. All models are in memory and take turns. A model's
peak consists of its weights and the memory added by its forward pass. If f is odd models are padded
with zeros to a multiple of 64, because tensor cores are inefficient otherwise. "factorised" is what
`load_factorised` returns, "two nn.Linear" what transformers alone loads of the same export, which
is neither fused nor padded.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import (
    announce,
    base_config,
    configured,
    device_of,
    drawn_on,
    free,
    gib,
    model_of,
    module_bytes,
    parser,
    peaks,
    reset_peak,
    spread,
    table,
    times,
    write,
)
from torch import Tensor
from transformers import PreTrainedModel

from peptrain.execution.attention import attend_without_masks
from peptrain.execution.compile import compile_layers
from peptrain.execution.padding import widen_mlps
from peptrain.exporting.factorised import plain_form
from peptrain.models.hf import count_parameters, vocabulary_size
from peptrain.runs.build import build

CELLS = ("512x128", "512x64", "512x32", "256x256", "256x128", "256x64",
         "128x512", "128x256", "128x128", "64x1024", "64x512", "64x256")  # fmt: skip
HEADER = ("batch x length", "dense, ms", "factorised, ms", "times as fast", "two nn.Linear, ms",
          "times as fast", "dense GiB", "factorised GiB", "of dense")  # fmt: skip


@dataclass
class Runner:
    """A model and its peak memory in the last cell."""

    model: PreTrainedModel
    kept: int
    """Number of last tokens with logits; 0 means all."""
    peak: int = 0

    def prepared(self, ids: Tensor, graphed: bool) -> Callable[[], object]:
        """Warm up the forward pass on `ids`, record its peak memory and return it.

        It is captured in a CUDA graph if `graphed`.
        """
        before = peaks_now()
        reset_peak()

        def forward() -> Tensor:
            logits: Tensor = self.model(ids, use_cache=False, logits_to_keep=self.kept).logits
            return logits

        for _ in range(3):
            forward()
        self.peak = module_bytes(self.model) + peaks()["peak_bytes"] - before
        return captured(forward) if graphed else forward


def peaks_now() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def captured(forward: Callable[[], Tensor]) -> Callable[[], object]:
    """Capture `forward` in one CUDA graph, which keeps the memory of its output."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        output = forward()

    def replay(output: Tensor = output) -> Tensor:
        graph.replay()
        return output

    return replay


def runner(row: str, args: Any, device: torch.device, *, plain: bool = False) -> Runner:
    """Build the model of a row as a run does, for inference.

    plain: in the form that transformers loads of a factorised export.
    """
    base = base_config(model_of(args), 1, longest(args.cells), precision=args.precision)
    config = configured(row, base, args.set, device=device)
    with drawn_on(device):
        model = build(config, phase=0)
    model.to(device).eval()
    if plain:
        model = plain_form(model, config.method)
    else:
        widen_mlps(model)
        config.method.fuse(model)  # as load_factorised does
    if device.type == "cuda":
        attend_without_masks(model, longest(args.cells))
    if args.compile:
        compile_layers(model)
    return Runner(model, 1 if args.logits == "last" else 0)


def longest(cells: list[str]) -> int:
    return max(int(cell.split("x")[1]) for cell in cells)


def measured(cell: str, runners: dict[str, Runner], args: Any, device: torch.device) -> Any:
    """Measure all models on one cell, in turns; no times if one ran out of memory."""
    batch, length = map(int, cell.split("x"))
    vocabulary = vocabulary_size(runners["dense"].model)
    ids = torch.randint(vocabulary, (batch, length), device=device)
    found: dict[str, Any] = {"batch": batch, "length": length}
    try:
        calls = {name: r.prepared(ids, args.cuda_graph) for name, r in runners.items()}
        ms: dict[str, list[float]] = {name: [] for name in runners}
        for _ in range(args.rounds):
            for name, call in calls.items():
                ms[name] += times(call, args.repeat, device)
    except torch.OutOfMemoryError:
        return found
    for name, r in runners.items():
        found[name] = {"ms": ms[name], "peak_bytes": r.peak}
    return found


def cells(found: dict[str, Any]) -> list[str]:
    cell = f"{found['batch']} x {found['length']}"
    if "dense" not in found:
        return [cell, "out of memory", *[""] * 7]
    dense, small, plain = found["dense"], found["factorised"], found["plain"]
    usual = statistics.median(dense["ms"])
    ratios = [f"{usual / statistics.median(one['ms']):.2f}" for one in (small, plain)]
    size = small["peak_bytes"] / dense["peak_bytes"]
    return [cell, spread(dense["ms"]), spread(small["ms"]), ratios[0], spread(plain["ms"]),
            ratios[1], gib(dense["peak_bytes"]), gib(small["peak_bytes"]),
            f"{size:.2f}"]  # fmt: skip


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__, intermediate_size=5504)
    made.add_argument("--rank", type=int, default=512)
    made.add_argument("--cells", nargs="+", default=CELLS, metavar="BATCHxLENGTH")
    made.add_argument("--logits", choices=["all", "last"], default="all",
                      help="tokens to compute logits for")  # fmt: skip
    made.add_argument("--cuda-graph", action="store_true")
    made.add_argument("--no-compile", dest="compile", action="store_false")
    made.add_argument("--rounds", type=int, default=5, help="turns of each model per cell")
    made.add_argument("--repeat", type=int, default=4, help="forward passes per turn")
    args = made.parse_args(argv)
    device = device_of(args.device)
    rows = {"dense": "full", "factorised": f"loro:rank={args.rank}"}
    runners = {name: runner(row, args, device) for name, row in rows.items()}
    runners["plain"] = runner(rows["factorised"], args, device, plain=True)
    sizes = {n: f"{count_parameters(r.model) / 1e6:.1f}M" for n, r in runners.items()}
    announce(device, {"preset": args.preset, "f": args.intermediate_size, "rank": args.rank,
                      "precision": args.precision, "logits": args.logits, "parameters": sizes,
                      "compiled": args.compile, "CUDA graph": args.cuda_graph})  # fmt: skip
    found = []
    for cell in args.cells:
        found.append(measured(cell, runners, args, device))
        print(" | ".join(cells(found[-1])), flush=True)
        write(args, device, found)
        free()
    print()
    table(HEADER, [cells(one) for one in found])


if __name__ == "__main__":
    main()
