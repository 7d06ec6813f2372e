"""Spectron's optimizer: spectral steps on pairs of factors, Muon and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peptrain.distributed.owners import owners
from peptrain.models.sites import Site
from peptrain.ops.factor_steps import (
    DAMPING,
    Pair,
    Steps,
    factor_steps,
    lora_muon_steps,
    spectron_steps,
    tangent_steps,
)
from peptrain.optim.adamw import OptimConfig, parameter_groups
from peptrain.optim.muon import MuonOptimizer, dense_matrices
from peptrain.settings.fields import check

Rule = Literal["spectron", "lora-muon", "tangent", "factors"]


class SpectronOptimizer(MuonOptimizer):
    """Groups with `factors`, which contain B, A, B, A, ..., by a spectral rule; groups with
    `matrices` by Muon, and the others by AdamW.

    With N_B and N_A as Muon's N of each factor and c = sqrt(max(1, n/m)) of W: n x m,
    B = (1 - lr decay) B - lr c dB and A likewise, where dB and dA are those of `rule`
    (ops/factor_steps.py). Of the rule factors c is that of each factor itself. The state is M, of
    the dtype of the factors, and for spectron a vector [r] of each, where the power iterations of
    its spectral norm go on. With several processes each computes the steps of its share of pairs.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        rule: Rule,
        damping: float = DAMPING,
        **muon: Any,
    ) -> None:
        """muon: momentum, coefficients, lr, betas and eps of MuonOptimizer."""
        check(damping >= 0, "damping", damping, ">= 0")
        self.rule, self.damping = rule, damping
        super().__init__(({"factors": False, **group} for group in groups), **muon)

    def step_group(self, group: dict[str, Any]) -> None:
        if group["factors"]:
            self._step_factors(group)
        else:
            super().step_group(group)

    def _step_factors(self, group: dict[str, Any]) -> None:
        every = zip(group["params"][::2], group["params"][1::2], strict=True)
        pairs = [(B, A) for B, A in every if B.grad is not None and A.grad is not None]
        if not pairs:
            return
        params: list[Tensor] = [p for pair in pairs for p in pair]
        N, vectors = self._follow(params), self._vectors(pairs)
        shares = owners([(B.shape[0] + A.shape[1]) * A.shape[0] ** 2 for B, A in pairs])
        for r in dict.fromkeys(A.shape[0] for _, A in pairs):
            own = [i for i in shares.own if pairs[i][1].shape[0] == r]
            if own:
                given = [Pair(*pairs[i], *N[2 * i : 2 * i + 2]) for i in own]
                steps = self._steps(given, [vectors[i] for i in own])
                for i, step in zip(own, steps, strict=True):
                    N[2 * i : 2 * i + 2] = step
        shares.send_([(*N[2 * i : 2 * i + 2], *vectors[i]) for i in range(len(pairs))])
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        shapes = [shape for pair in pairs for shape in self._shapes(*pair)]
        rates = [self._rate(group["lr"], *shape) for shape in shapes]
        for rate in dict.fromkeys(rates):
            where = [i for i, of_it in enumerate(rates) if of_it == rate]
            alike, changes = [params[i] for i in where], [N[i] for i in where]
            torch._foreach_add_(alike, changes, alpha=-rate)

    def _vectors(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, ...]]:
        """Return the vectors of the power iterations of each pair, if the rule has them."""
        if self.rule != "spectron":
            return [()] * len(pairs)
        for p, r in ((p, A.shape[0]) for B, A in pairs for p in (B, A)):
            if "vector" not in self.state[p]:
                self.state[p]["vector"] = p.new_full((r,), r**-0.5)
        return [(self.state[B]["vector"], self.state[A]["vector"]) for B, A in pairs]

    def _steps(self, pairs: Sequence[Pair], vectors: Sequence[tuple[Tensor, ...]]) -> Steps:
        """Return (dB, dA) of each pair, and move the vectors of the power iterations."""
        if self.rule == "factors":
            return factor_steps(pairs, self.coefficients)
        if self.rule == "lora-muon":
            return lora_muon_steps(pairs, self.damping, self.coefficients)
        if self.rule == "tangent":
            return tangent_steps(pairs, self.damping, self.coefficients)
        steps, moved = spectron_steps(pairs, vectors, self.coefficients)
        torch._foreach_copy_([v for both in vectors for v in both], [v for b in moved for v in b])
        return steps

    def _shapes(self, B: Tensor, A: Tensor) -> list[tuple[int, int]]:
        """Return the shapes that say c of B and of A."""
        (n, r), m = B.shape, A.shape[1]
        return [(n, r), (r, m)] if self.rule == "factors" else [(n, m)] * 2


def spectron(
    model: nn.Module,
    sites: Sequence[Site],
    factors: Sequence[Tensor],
    optim: OptimConfig,
    *,
    rule: Rule,
    momentum: float,
) -> SpectronOptimizer:
    """Return the rule on `factors` (B, A, B, A, ...) and Muon on the trained dense matrices of
    `sites`, both at `optim.lr`, and AdamW on all else, at `embedding_lr` and `head_lr`.

    A dense matrix is Muon's, since lr bounds the spectral norm of its steps as it does those of
    B A, whereas AdamW would need a third rate.
    """
    assert optim.embedding_lr is not None, "unresolved settings"
    matrices = dense_matrices(sites)
    mine = {id(p) for p in (*factors, *matrices)}
    rest = parameter_groups(model, optim, (p for p in model.parameters() if id(p) not in mine))
    own = {"weight_decay": float(optim.weight_decay or 0)}
    groups = [
        {"params": list(factors), "factors": True, **own},
        *([{"params": matrices, "matrices": True, **own}] if matrices else []),
        *({"lr": optim.embedding_lr, **group} for group in rest),
    ]
    return SpectronOptimizer(groups, rule=rule, momentum=momentum, **optim.adam())
