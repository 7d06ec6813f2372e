"""A method on the tiny model, stepped by hand: no trainer, no directory."""

from pathlib import Path
from typing import Any

import torch
from support import tiny
from torch import Tensor, nn
from torch.optim import Optimizer

from peptrain.config import RunConfig, resolved
from peptrain.execution.loss import NextTokenLoss
from peptrain.methods.base import Method
from peptrain.models.sites import find_sites
from peptrain.runs.build import build


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def configured(method: Method, **sections: Any) -> RunConfig[Any]:
    return resolved(tiny(method, Path("unused"), **sections), world_size=1, on_gpu=False)


def made(method: Method, **sections: Any) -> tuple[nn.Module, Optimizer, RunConfig[Any]]:
    """A model in the method's last phase, and what steps it."""
    config = configured(method, **sections)
    last = len(config.method.phases(config.train.steps))
    model = build(config, last)
    optimizer = config.method.optimizer(model, find_sites(model), config.optim, last)
    return model, optimizer, config


def back(model: nn.Module, seed: int) -> None:
    """New gradients of a random batch."""
    model.zero_grad()
    windows = torch.randint(320, (2, 9), generator=seeded(seed))
    NextTokenLoss(model)(windows).backward()  # type: ignore[arg-type]


def walk(model: nn.Module, optimizer: Optimizer, steps: int, start: int = 0) -> None:
    for seed in range(start, start + steps):
        back(model, seed)
        optimizer.step()


def zero_gradients(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moments(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Copies of all optimizer state, by "parameter/key"."""
    named = {name: optimizer.state.get(p, {}) for name, p in model.named_parameters()}
    return {f"{n}/{k}": v.clone() for n, state in named.items() for k, v in state.items()}
