"""What the optimizers of GaLore and LORO share: they step group by group, by a fused AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw


class GroupwiseOptimizer(Optimizer):
    """Steps one group after the other. Clocks are integers of the groups, which a load of the
    optimizer's state overwrites."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        **own: Any,
    ) -> None:
        """own: defaults of what else a group has."""
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, **own})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self.step_group(group)
        return loss

    def step_group(self, group: dict[str, Any]) -> None:
        """One step of the group's parameters that have gradients."""
        raise NotImplementedError


def gradients(params: Iterable[Tensor]) -> list[Tensor]:
    """Those that are there."""
    return [p.grad for p in params if p.grad is not None]


def fused_adamw(
    params: list[Tensor],
    grads: list[Tensor],
    states: Sequence[dict[str, Tensor]],
    steps: list[Tensor],
    group: dict[str, Any],
    *,
    lr: float,
    weight_decay: float,
) -> None:
    """One step of PyTorch's fused AdamW on `params`, with the group's betas and eps. `steps` counts
    them for the bias correction; the kernel adds 1 to each before."""
    adamw(
        *(params, grads, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]),
        max_exp_avg_sqs=[],
        state_steps=steps,
        fused=True,
        amsgrad=False,
        maximize=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=lr,
        weight_decay=weight_decay,
        eps=group["eps"],
    )
