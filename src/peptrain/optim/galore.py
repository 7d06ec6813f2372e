"""GaLore's optimizer: AdamW, the moments of the matrices in a subspace of their gradients."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from peptrain.ops.precision import widened
from peptrain.ops.projection import add_back_, leading_directions, project, rotated
from peptrain.optim.base import GroupwiseOptimizer, fused_adamw, gradients


@dataclass(frozen=True)
class GaLoreRule:
    """How matrices are projected; the fields are GaLore's options of the same names."""

    rank: int
    gap: int
    scale: float
    moments: Literal["keep", "rotate"]


class GaLoreOptimizer(GroupwiseOptimizer):
    """AdamW; in groups that are `projected`, on R = Pᵀ G (or G P) in the place of G.

    There M̂ and V̂ are Adam's bias-corrected moments of R, N = M̂ / (√V̂ + eps), and
    W = (1 - lr decay) W - lr scale P N (or N Pᵀ) (GaLore, Algorithm 2). P is made anew from the
    gradient at the first step and at every `gap`-th after it; a gap of 0 is never again. P lies
    with the moments; the clock is an integer of the group, which a load of the optimizer's state
    overwrites.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], rule: GaLoreRule, **adam: Any) -> None:
        """adam: lr, betas and eps."""
        self.rule = rule
        # By `fused`, load_state_dict takes step counts to the weights' device, where the kernel is.
        super().__init__(groups, **adam, projected=False, clock=0, fused=True)

    def step_group(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = [p for p in group["params"] if p.grad is not None]
        if group["projected"]:
            for W in params:  # one by one, or all the N would be in memory together
                self._step_projected(W, group)
        elif params:
            self._step_whole(params, group)
        group["clock"] += 1

    def _step_whole(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p].update(_moments(p))
        states = [self.state[p] for p in params]
        _adam(params, gradients(params), states, group, group["lr"], group["weight_decay"])

    def _step_projected(self, W: Tensor, group: dict[str, Any]) -> None:
        assert W.grad is not None
        state, G, lr = self.state[W], W.grad, group["lr"]
        if "P" not in state:
            state["P"] = leading_directions(G, self.rule.rank)
            state.update(_moments(project(state["P"], G)))
        elif self.rule.gap > 0 and group["clock"] % self.rule.gap == 0:
            self._turn(state, G, group["betas"])
        R = project(state["P"], G)
        minus_N = torch.zeros_like(R)
        _adam([minus_N], [R], [state], group, 1.0, 0.0)
        kept = 1 - lr * group["weight_decay"]
        add_back_(W, state["P"], minus_N, beta=kept, alpha=lr * self.rule.scale)

    def _turn(self, state: dict[str, Any], G: Tensor, betas: tuple[float, float]) -> None:
        """A new P; the moments stay as they are, or come along into its basis."""
        old, state["P"] = state["P"], leading_directions(G, self.rule.rank)
        if self.rule.moments == "rotate":
            old, new, m, v = widened(old, state["P"], state["exp_avg"], state["exp_avg_sq"])
            on_left = G.shape[0] < G.shape[1]
            columns = (m, v) if on_left else (m.mT, v.mT)
            m, v = rotated(*columns, new.mT @ old, state["step"], betas)
            state["exp_avg"].copy_(m if on_left else m.mT)
            state["exp_avg_sq"].copy_(v if on_left else v.mT)


def _moments(like: Tensor) -> dict[str, Tensor]:
    """Adam's state at the start, as torch's AdamW keeps it."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=like.device),
        "exp_avg": torch.zeros_like(like),
        "exp_avg_sq": torch.zeros_like(like),
    }


def _adam(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Tensor]],
    group: dict[str, Any],
    lr: float,
    weight_decay: float,
) -> None:
    steps = [state["step"] for state in states]
    fused_adamw(params, grads, states, steps, group, lr=lr, weight_decay=weight_decay)
