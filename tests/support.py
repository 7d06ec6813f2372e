"""What the tests share: a tiny corpus, tiny settings for any method, and ways to look at a run."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from oracles import algebra
from torch import Tensor, nn
from transformers import PretrainedConfig

from peptrain.config import RunConfig, load
from peptrain.data import PrepareConfig, prepare
from peptrain.data.writer import Writer
from peptrain.distributed.world import World
from peptrain.methods import METHODS
from peptrain.methods.base import Method, Metrics
from peptrain.methods.rank import RankMethod
from peptrain.models.sites import ReparamLinear, Site
from peptrain.rng import Rng
from peptrain.runs.checkpoint import available, step_of
from peptrain.runs.directory import RunDir
from peptrain.testing import MODEL, TRAIN, newest, small, small_run
from peptrain.training.metrics import MEASURED
from peptrain.training.state import TrainState, restore

ALONE = World(0, 1, torch.device("cpu"))
VECTORS = (".a", ".b", ".m", ".lambda_d", ".lambda_b")
"""How the names of diagonals and magnitudes end; they stay fp32 in bf16."""
DENSE = [name for name, cls in METHODS.items() if cls.has_dense_equivalent]
"""The methods whose layers have a matrix."""
SPREAD = {"micro_batch": 1}
"""Of two ranks each accumulates twice."""


def tiny_method(name: str, **given: Any) -> Method:
    """Any method at rank 2 with an event at every third step."""
    return small(METHODS[name], **given)


def tiny(method: Method | str, corpus: Path, run: Path | None = None, **sections: Any) -> RunConfig:
    """8 steps in float64 at a constant learning rate; `sections` are dicts of what differs."""
    chosen = tiny_method(method) if isinstance(method, str) else method
    return small_run(chosen, corpus, run, **sections)


def rows(run: Path, event: str = "step") -> list[dict[str, Any]]:
    return [row for row in RunDir(run).metrics() if row["event"] == event]


def step_numbers(run: Path) -> list[int]:
    """The steps of a run's checkpoints."""
    return [step_of(path) for path in available(RunDir(run).checkpoints)]


def untimed(run: Path) -> list[dict[str, Any]]:
    """All rows, without what depends on the machine and the moment."""
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in RunDir(run).metrics()]


class Killed(BaseException):
    """Like SIGKILL: nothing in the library catches it, so nothing is saved on its way."""


def kill_at(event: str, step: int) -> Any:
    """An observer that kills the training when it is told of `event` at `step`."""

    def observe(row: Any) -> None:
        if row["event"] == event and row["step"] == step:
            raise Killed

    return observe


def killed_after_commit(number: int, config: PrepareConfig) -> bool:
    """Prepare, and be killed after commit `number`; False if there are no more commits."""
    calls, commit = iter(range(10**9)), Writer.commit

    def struck(self: Writer) -> None:
        commit(self)
        if next(calls) == number:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "commit", struck)
        patch.setattr(sys.modules[prepare.__module__], "BATCH_CHARACTERS", 100)
        try:
            prepare(config)
        except Killed:
            return True
    return False


def as_toml(sections: Mapping[str, Any]) -> str:
    return "".join(f"{key} = {value!r}\n".replace("'", '"') for key, value in sections.items())


def write_grid(folder: Path, corpus: Path, *blocks: Mapping[str, Any], **base: Any) -> Path:
    """A grid of tiny runs on a CPU."""
    common = {f"model.{k}": v for k, v in MODEL.items()} | {
        f"train.{k}": v for k, v in TRAIN.items()
    }
    common |= {"data.path": str(corpus), "train.seed": [0, 1], "optim.lr": [1e-3, 2e-3]}
    common |= {"train.precision": "fp64", "train.device": "cpu", "schedule.kind": "constant"}
    common |= {"schedule.warmup": 0, "method.name": "full"}
    common |= {key.replace("__", "."): value for key, value in base.items()}
    path = folder / "grid.toml"
    text = "".join(f"[[grid]]\n{as_toml(block)}" for block in blocks or [{}])
    path.write_text(f"[base]\n{as_toml(common)}{text}")
    return path


def train_state_at(run: Path, step: int, scratch: Path) -> TrainState:
    """What training goes on from after `step` steps, made as every resume makes it."""
    shutil.copytree(run, scratch)
    for path in available(RunDir(scratch).checkpoints):
        if path.name > f"step-{step:08d}":
            shutil.rmtree(path)
    config = load(RunDir(run).config_file)
    return restore(config, newest(scratch), ALONE)


class AddedLinear(ReparamLinear):
    """W_eff = W + B A; W frozen."""

    def __init__(self, site: Site, rank: int, rng: Rng) -> None:
        super().__init__(site)
        n, m = site.shape
        self.weight = site.linear.weight.requires_grad_(False)
        A = nn.init.xavier_normal_(torch.empty(rank, m), generator=rng(site.name))
        self.A = nn.Parameter(A.to(self.weight))
        self.B = nn.Parameter(self.weight.new_zeros(n, rank))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.A), self.B)

    def effective_weight(self) -> Tensor:
        return self.weight + self.B @ self.A


@dataclass(frozen=True, kw_only=True)
class Toy(RankMethod):
    """Full training, then low-rank additions to frozen weights, and full again after `cool`."""

    name: ClassVar[str] = "toy"
    equation: ClassVar[str] = "W_eff = W, then W + B A"

    warm: int = 4
    cool: int | None = None

    def phases(self, steps: int) -> tuple[int, ...]:
        return (self.warm,) if self.cool is None else (self.warm, self.cool)

    def install(self, model: nn.Module, sites: Sequence[Site], rng: Rng, phase: int) -> None:
        for site in self.chosen(sites) if phase == 1 else []:
            site.replace(AddedLinear(site, self.r, rng))

    def after_step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, rng: Rng
    ) -> Metrics:
        return {"after_step": float(step)}


def arch_of(hf: PretrainedConfig) -> algebra.Arch:
    """The sizes of a model, for closed forms."""
    return algebra.Arch(
        family=hf.model_type,
        V=hf.vocab_size,
        d=hf.hidden_size,
        f=hf.intermediate_size,
        L=hf.num_hidden_layers,
        heads=hf.num_attention_heads,
        kv=hf.num_key_value_heads,
        tied=hf.tie_word_embeddings,
    )
