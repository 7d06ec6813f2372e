"""LORO's optimizer: Adam on everything, with periodic exact steps on the rank-r manifold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from peptrain.distributed.owners import Owners, owners
from peptrain.ops.orthographic import orthographic_step
from peptrain.ops.precision import widened
from peptrain.ops.riemannian import preconditioned_step, riemannian_step
from peptrain.ops.riemannian_gram import gram_step, gram_steps_
from peptrain.ops.spectral import balanced
from peptrain.optim.base import GroupwiseOptimizer, fused_adamw, gradients

LARGE = 0.5
"""Largest |dW| / |W| of an exact step that is not reported as a warning."""


@dataclass(frozen=True)
class LORORule:
    """How the factors are updated: the fields are LORO's options of the same names."""

    exact_every: int
    refresh_every: int
    retraction: Literal["riemannian", "orthographic", "svd"]
    direction: Literal["adam", "raw"]
    update: Literal["adam", "precond"]
    precond_eps: float
    refresh: Literal["all", "factors", "none"]
    exact_cap: float | None = None


class LOROOptimizer(GroupwiseOptimizer):
    """Adam with D = m / (sqrt v + eps) and lr_p = lr sqrt(1 - beta2^k) / (1 - beta1^k).

    k counts steps since the last refresh. Groups with `factors` contain B, A, B, A, ... and in
    `scales` the c = r/d of each. There the step is lr_p c D, and every `exact_every`-th step is
    exact, with lr_p and without c (LORO, Algorithm 1). A refresh follows directly after its step.
    The step counters are integers in the groups, so loading an optimizer state restores them.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], rule: LORORule, **adam: Any) -> None:
        """adam: lr, betas and eps."""
        self.rule = rule
        self.damped: Tensor | int = 0
        """Number of pairs B, A with a singular factor at the last exact step."""
        self.largest_ratio: Tensor | float = 0.0
        """Largest |dW| / |W| (Frobenius) of a pair at the last exact step."""
        self.large_ratios: Tensor | int = 0
        """Number of pairs whose |dW| / |W| was above `LARGE` at the last exact step."""
        super().__init__(groups, **adam, factors=False, scales=[], clock=0, age=0)

    def step_group(self, group: dict[str, Any]) -> None:
        group["clock"] += 1
        group["age"] += 1
        self._update(group)
        if self._refresh_due(group):
            self._refresh(group)

    def _update(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        for p in params:
            if not self.state[p]:
                self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        if not group["factors"]:
            self._adam(params, group, 1.0)
            return
        assert len(params) == len(group["params"]), "every factor must have a gradient"
        due = self._due(group, self.rule.exact_every)
        if due and self.rule.retraction != "svd":
            self._moments(params, group)
            self._exact(params, group)
            self._forget_surplus(params)
            return
        if self.rule.update == "precond":
            self._moments(params, group)
            self._precondition(params, group["lr"])
        else:
            for c in dict.fromkeys(group["scales"]):
                chosen = zip(params, group["scales"], strict=True)
                self._adam([p for p, scale in chosen if scale == c], group, c)
        if due:
            pairs = _pairs(params)
            shares = _shares(pairs)
            _assign([pairs[i] for i in shares.own], lambda *pair: balanced(*widened(*pair)))
            shares.send_(pairs)
            self._forget_surplus(params)

    def _forget_surplus(self, params: list[Tensor]) -> None:
        """Zero the moments of the columns of B and rows of A beyond min(n, m), which an exact step
        or a balanced SVD set to 0. There they have no gradients, so only old moments move them."""
        for B, A in _pairs(params):
            rank = min(*B.shape, A.shape[1])
            for key in ("exp_avg", "exp_avg_sq") if rank < B.shape[1] else ():
                self.state[B][key][:, rank:].zero_()
                self.state[A][key][rank:].zero_()

    def _adam(self, params: list[Tensor], group: dict[str, Any], c: float) -> None:
        """Set p = (1 - lr decay) p - lr_p c D and update the moments, in one kernel.

        The kernel is AdamW's. A step count of infinity makes its bias correction 1, so that eps is
        added where LORO adds it and the learning rate can be lr_p c. The kernel multiplies decay
        by its learning rate, LORO by lr, hence the division.
        """
        rate = c * _correction(group)
        for_ever = [params[0].new_full((), math.inf, dtype=torch.float32)] * len(params)
        states = [self.state[p] for p in params]
        fused_adamw(
            *(params, gradients(params), states, for_ever, group),
            lr=group["lr"] * rate,
            weight_decay=group["weight_decay"] / rate,
        )

    def _moments(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Apply weight decay and update m and v, for steps that replace Adam's own update."""
        (m, v), grads, (beta1, beta2) = self._state(params), gradients(params), group["betas"]
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(m, grads, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, value=1 - beta2)

    def _state(self, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        m = [self.state[p]["exp_avg"] for p in params]
        return m, [self.state[p]["exp_avg_sq"] for p in params]

    def _exact(self, params: list[Tensor], group: dict[str, Any]) -> None:
        lr_p, pairs = group["lr"] * _correction(group), _pairs(params)
        # Of each pair: whether a factor is singular, and |dW| / |W|.
        facts = params[0].new_zeros(len(pairs), 2, dtype=torch.float64)
        of_reference: list[Tensor] = []

        def direction(p: Tensor) -> Tensor:
            if self.rule.direction == "raw":
                return gradients([p])[0]
            (m,), (v,) = self._state([p])
            D: Tensor = m / (v.sqrt() + group["eps"])
            return D

        def reference(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
            given = widened(B, A, direction(B), direction(A))
            whole = _finite(given)
            B, A, D_B, D_A = (torch.where(whole, t, 0.0) for t in given)
            B, A, singular, ratio = riemannian_step(B, A, D_B, D_A, lr_p, self.rule.exact_cap)
            found = singular.double(), torch.where(whole, ratio, torch.nan).double()
            of_reference.append(torch.stack(found))
            return torch.where(whole, B, torch.nan), torch.where(whole, A, torch.nan)

        shares = _shares(pairs)
        left = shares.own
        step = orthographic_step if self.rule.retraction == "orthographic" else gram_step
        # Of float64 factors Gram matrices are imprecise. The orthographic step has no other form.
        if left and (params[0].dtype != torch.float64 or step is orthographic_step):
            own = [pairs[i] for i in left]
            refused, ratios = gram_steps_(own, direction, lr_p, self.rule.exact_cap, step)
            for i, ratio in zip(left, ratios, strict=True):
                facts[i, 1] = ratio
            left = [left[i] for i in refused]
        _assign([pairs[i] for i in left], reference)
        for i, found in zip(left, of_reference, strict=True):
            facts[i] = found
        shares.send_([(*pair, facts[i]) for i, pair in enumerate(pairs)])
        self.damped, self.largest_ratio = facts[:, 0].sum().long(), facts[:, 1].max()
        self.large_ratios = (facts[:, 1] > LARGE).sum()

    def _precondition(self, params: list[Tensor], lr: float) -> None:
        def step(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
            B, A, G_B, G_A = widened(B, A, *gradients([B, A]))
            return preconditioned_step(B, A, G_B, G_A, lr, self.rule.precond_eps)

        _assign(_pairs(params), step)

    def _due(self, group: dict[str, Any], every: int) -> bool:
        return every > 0 and group["clock"] % every == 0

    def _refresh_due(self, group: dict[str, Any]) -> bool:
        wanted = self.rule.refresh == "all" or (self.rule.refresh == "factors" and group["factors"])
        return wanted and self._due(group, self.rule.refresh_every)

    def _refresh(self, group: dict[str, Any]) -> None:
        states = [s for p in group["params"] if (s := self.state[p])]
        if states:
            torch._foreach_zero_([t for s in states for t in s.values()])
        group["age"] = 0


def _correction(group: dict[str, Any]) -> float:
    """Return lr_p / lr = sqrt(1 - beta2^k) / (1 - beta1^k)."""
    (beta1, beta2), k = group["betas"], group["age"]
    rate: float = math.sqrt(1 - beta2**k) / (1 - beta1**k)
    return rate


def _pairs(params: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(params[::2], params[1::2], strict=True))


def _shares(pairs: list[tuple[Tensor, Tensor]]) -> Owners:
    """Divide the decompositions of the pairs, of O((n + m) r²) operations, among the processes."""
    return owners([(B.shape[0] + A.shape[1]) * B.shape[1] ** 2 for B, A in pairs])


def _finite(tensors: Iterable[Tensor]) -> Tensor:
    """Return whether all values are finite. An SVD of NaN or infinity raises an error that does not
    name the step, whereas a NaN in the weights reaches the loss, which the trainer checks."""
    return torch.stack([t.isfinite().all() for t in tensors]).all()


def _assign(
    pairs: list[tuple[Tensor, Tensor]],
    step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> None:
    """Replace each pair (B, A) in place by step(B, A), but keep A where the new B is 0.

    B = 0 is the start around a frozen W, and a step at a learning rate of 0 leaves B A = 0, whose
    balanced factors are both 0. Then neither would ever get a gradient.
    """
    for B, A in pairs:
        new_B, new_A = step(B, A)
        B.copy_(new_B)
        A.copy_(torch.where(new_B.any(), new_A, A))
