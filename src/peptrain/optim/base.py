"""Base class of GaLore's, LORO's and Muon's optimizers: steps by group, with fused AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw


class GroupwiseOptimizer(Optimizer):
    """An optimizer that steps one group at a time. Step counters are integers in the groups, so
    loading an optimizer state restores them."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        **own: Any,
    ) -> None:
        """own: defaults of further group entries."""
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
        """Step the parameters of a group that have gradients."""
        raise NotImplementedError


def gradients(params: Iterable[Tensor]) -> list[Tensor]:
    """Return the gradients that are not None."""
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
    """Do one step of PyTorch's fused AdamW on `params`, with the group's betas and eps. `steps` are
    the step counts for the bias correction; the kernel increments each first."""
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


def new_moments(like: Tensor) -> dict[str, Tensor]:
    """Return an initial Adam state with the keys of torch's AdamW."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=like.device),
        "exp_avg": torch.zeros_like(like),
        "exp_avg_sq": torch.zeros_like(like),
    }


def step_adamw(
    params: list[Tensor], state: MutableMapping[Tensor, dict[str, Any]], group: dict[str, Any]
) -> None:
    """Do a step of torch's AdamW on `params`, which have gradients, with the moments in `state`."""
    for p in params:
        if "exp_avg" not in state[p]:  # it may have Muon's momentum of an earlier phase
            state[p] = new_moments(p)
    states = [state[p] for p in params]
    fused_adamw(
        *(params, gradients(params), states, [s["step"] for s in states], group),
        lr=group["lr"],
        weight_decay=group["weight_decay"],
    )
