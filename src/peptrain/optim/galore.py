"""GaLore's optimizer: AdamW with the moments of matrices in a subspace of the gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from peptrain.distributed.owners import owners, sharers
from peptrain.ops.precision import widened
from peptrain.ops.projection import add_back_, leading_directions, project, rotated
from peptrain.optim.base import (
    GroupwiseOptimizer,
    fused_adamw,
    gradients,
    new_moments,
    step_adamw,
)


@dataclass(frozen=True)
class GaLoreRule:
    """How gradients are projected: the fields are GaLore's options of the same names."""

    gap: int
    scale: float
    moments: Literal["keep", "rotate"]


class GaLoreOptimizer(GroupwiseOptimizer):
    """AdamW that in `projected` groups uses R = Pᵀ G (or G P) instead of the gradient G.

    With M̂ and V̂ Adam's bias-corrected moments of R and N = M̂ / (√V̂ + eps), the step is
    W = (1 - lr decay) W - lr scale P N (or N Pᵀ) (GaLore, Algorithm 2). P is computed from the
    gradient of the first step and of every `gap`-th step after it; with a gap of 0 it is never
    recomputed. P is stored with the moments. The step counter is an integer in the group, so
    loading an optimizer state restores it.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        rule: GaLoreRule,
        ranks: Mapping[Tensor, int],
        **adam: Any,
    ) -> None:
        """ranks: r of each matrix in `projected` groups. adam: lr, betas and eps."""
        self.rule, self.ranks = rule, ranks
        # `fused` makes load_state_dict move step counts to the device of the weights, as the kernel
        # needs them.
        super().__init__(groups, **adam, projected=False, clock=0, fused=True)

    def step_group(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = [p for p in group["params"] if p.grad is not None]
        if group["projected"]:
            # One at a time, to have only one N in memory, and one new P for each process.
            size = sharers()
            for first in range(0, len(params), size):
                some = params[first : first + size]
                for W, P in zip(some, self._new_directions(some, group), strict=True):
                    self._step_projected(W, P, group)
        elif params:
            step_adamw(params, self.state, group)
        group["clock"] += 1

    def _new_directions(self, some: list[Tensor], group: dict[str, Any]) -> list[Tensor | None]:
        """Return the new P of those that get one, each computed by one process."""
        turning = self.rule.gap > 0 and group["clock"] % self.rule.gap == 0
        due = [W for W in some if turning or "P" not in self.state[W]]
        shares = owners([min(W.shape) ** 3 for W in due])
        found: dict[Tensor, Tensor] = {}
        for i, (W, G) in enumerate(zip(due, gradients(due), strict=True)):
            short, r = min(W.shape), min(self.ranks[W], *W.shape)
            found[W] = leading_directions(G, r) if shares.owns(i) else G.new_empty(short, r)
        shares.send_([[P] for P in found.values()])
        return [found.get(W) for W in some]

    def _step_projected(self, W: Tensor, P: Tensor | None, group: dict[str, Any]) -> None:
        """P: set where it is new."""
        assert W.grad is not None
        state, G, lr = self.state[W], W.grad, group["lr"]
        if P is not None and "P" in state:
            self._turn(state, P, G, group["betas"])
        elif P is not None:
            state["P"] = P
            state.update(new_moments(project(P, G)))
        R = project(state["P"], G)
        minus_N = torch.zeros_like(R)
        fused_adamw([minus_N], [R], [state], [state["step"]], group, lr=1.0, weight_decay=0.0)
        kept = 1 - lr * group["weight_decay"]
        add_back_(W, state["P"], minus_N, beta=kept, alpha=lr * self.rule.scale)

    def _turn(
        self, state: dict[str, Any], P: Tensor, G: Tensor, betas: tuple[float, float]
    ) -> None:
        """Replace P; keep the moments, or rotate them to its basis."""
        old, state["P"] = state["P"], P
        if self.rule.moments == "rotate":
            old, new, m, v = widened(old, state["P"], state["exp_avg"], state["exp_avg_sq"])
            on_left = G.shape[0] < G.shape[1]
            columns = (m, v) if on_left else (m.mT, v.mT)
            m, v = rotated(*columns, new.mT @ old, state["step"], betas)
            state["exp_avg"].copy_(m if on_left else m.mT)
            state["exp_avg_sq"].copy_(v if on_left else v.mT)
