"""Run by torchrun from test_replicas.py: train on every rank, and keep each rank's weights.

python -m torch.distributed.run --standalone --nproc-per-node N replicas.py CORPUS OUT CASE...
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from support import rows, tiny, tiny_method
from torch import nn

import peptrain.distributed.replicas as replicas
import peptrain.training.loop as trainer
from peptrain.distributed.world import world
from peptrain.errors import Unsupported

RANK = int(os.environ.get("RANK", "0"))
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "bpt": ("bpt", {"reset": "random", "reset_fraction": 0.5}, {}),
    "relora": ("relora", {}, {}),
    "loro": ("loro", {}, {}),
    "loro-svd": ("loro", {"retraction": "svd"}, {}),
    "loro-orthographic": ("loro", {"retraction": "orthographic"}, {}),
    "galore": ("galore", {"moments": "rotate"}, {}),
    "full": ("full", {}, {}),
    "full-bf16": ("full", {}, {"exchange": "bf16"}),
    "muon": ("full", {}, {}),
    "relora-muon": ("relora", {"exclude": "up"}, {}),
    "spectron": ("spectron", {"exclude": "k"}, {}),
    "lora-muon": ("spectron", {"rule": "lora-muon"}, {}),
    "tangent": ("spectron", {"rule": "tangent"}, {}),
}
"""Method, its settings, and those of the training."""
OPTIM: dict[str, dict[str, Any]] = {
    "muon": {"kind": "muon"},
    "relora-muon": {"kind": "muon"},
    "lora-muon": {"lr": 1e-2},
    "tangent": {"lr": 1e-2},
}
"""Settings of the optimizer, by case. At their own rates these rules enlarge rounding to 1e-12."""
TRAIN = {"micro_batch": 1, "batch_size": 6, "steps": 11, "checkpoint_every": 2}
"""Events at 3, 6 and 9, and a check of the replicas at every second step."""


def kept(out: Path, case: str, corpus: Path) -> None:
    """Train a case, and keep this rank's weights and its number of exchanges."""
    evaluate, total, calls = trainer._evaluate, replicas._sum, []

    def keeping(state: Any, *rest: Any, **named: Any) -> Any:
        weights = {n: p.detach().contiguous() for n, p in state.model.named_parameters()}
        save_file(weights, out / f"{case}-rank{RANK}.safetensors")
        return evaluate(state, *rest, **named)

    def counted(tensors: list[torch.Tensor]) -> None:
        calls.append(tensors[0].dtype)
        total(tensors)

    name, method, train = CASES[case]
    trainer._evaluate, replicas._sum = keeping, counted
    sections = {"train": TRAIN | train, "optim": OPTIM.get(case, {})}
    trainer.train(tiny(tiny_method(name, **method), corpus, out / case, **sections))
    trainer._evaluate, replicas._sum = evaluate, total
    assert rows(out / case, "end"), "rank 0 writes the last row before any process ends"
    (out / f"{case}-calls{RANK}").write_text(" ".join(map(str, calls)))


class Routed(nn.Module):
    """A loss that uses another weight on some ranks, or in some steps, as a router may."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))


def refused(out: Path) -> None:
    """Sum gradients of different weights: on the ranks, and in a later step."""
    with world("cpu") as here:
        module = Routed()
        with torch.no_grad():
            module.one += RANK  # rank 0's is sent
        made = replicas.Replicas(module, here, None)
        (module.other if RANK else module.one).sum().backward()
        said = []
        for _ in range(2):
            try:
                made.sum_gradients()
            except Unsupported as error:
                said.append(str(error))
            module.one.grad = module.other.grad = None
            module.one.sum().backward()
        module.other.sum().backward()
        try:
            made.sum_gradients()
        except Unsupported as error:
            said.append(str(error))
        (out / f"refused-{RANK}").write_text("\n".join([str(module.one.tolist()), *said]))


class Odd(nn.Module):
    """Parameters that backends of torch.distributed do not take as they are."""

    def __init__(self) -> None:
        super().__init__()
        held = torch.arange(12.0).view(3, 4) * (1 - RANK)  # rank 0's are sent
        self.columns = nn.Parameter(held[:, :2])
        self.scalar = nn.Parameter(held[2, 3].clone())
        self.empty = nn.Parameter(held[:0])
        self.short = nn.Parameter(held[0].to(torch.int16), requires_grad=False)
        self.beside = held[:, 2:]


def odd(out: Path) -> None:
    """Send odd parameters, then train one that was frozen, and one with a sparse gradient."""
    with world("cpu") as here:
        module, lookup = Odd(), nn.Embedding(5, 2, sparse=True)
        lookup.weight.requires_grad_(False)
        module.add_module("lookup", lookup)
        made = replicas.Replicas(module, here, None)
        said = [str([p.tolist() for n, p in module.named_parameters() if n != "lookup.weight"])]
        said.append(str(module.beside.tolist()))
        module.columns.sum().backward()
        made.sum_gradients()
        lookup.weight.requires_grad_(True)
        lookup(torch.tensor([1])).sum().backward()
        for _ in range(2):
            try:
                made.sum_gradients()
            except Unsupported as error:
                said.append(str(error))
            made.moved.clear()  # as in a first step
        (out / f"odd-{RANK}").write_text("\n".join(said))


if __name__ == "__main__":
    corpus, out, cases = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    for case in cases:
        kept(out, case, corpus)
    refused(out)
    odd(out)
