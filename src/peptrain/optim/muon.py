"""Muon: matrices follow the polar factor of their momentum, and AdamW trains everything else."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peptrain.distributed.owners import owners
from peptrain.models.sites import ReparamLinear, Site
from peptrain.ops.newton_schulz import COEFFICIENTS, Polynomial, polar
from peptrain.optim.adamw import OptimConfig, parameter_groups
from peptrain.optim.base import GroupwiseOptimizer, gradients, step_adamw
from peptrain.settings.fields import LARGEST, check

log = logging.getLogger("peptrain")
Scale = Literal["spectral", "moonlight"]


class MuonOptimizer(GroupwiseOptimizer):
    """Groups with `matrices` by Muon, the others by AdamW.

    M = μ M + (1 - μ) G, N = (1 - μ) G + μ M, and W = (1 - lr decay) W - lr c polar(N), with
    c = sqrt(max(1, n/m)) (spectral: Jordan et al., Muon, 2024) or 0.2 sqrt(max(n, m)) (moonlight:
    the size of AdamW's steps; Liu et al., 2025). Matrices of one shape are done at once, in fp16
    on a GPU (`polar`). M, of the dtype of W, is the only state. With several
    processes each computes the polar factors of its share.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        momentum: float,
        scale: Scale = "spectral",
        coefficients: Sequence[Polynomial] = COEFFICIENTS,
        **adam: Any,
    ) -> None:
        """adam: lr, betas and eps. coefficients: a polynomial for each Newton-Schulz step."""
        usable = bool(coefficients) and all(c for *_, c in coefficients)
        check(usable, "coefficients", coefficients, "one polynomial or more, with c other than 0")
        check(0 <= momentum < 1, "momentum", momentum, "in [0, 1)")
        self.momentum, self.scale, self.coefficients = momentum, scale, coefficients
        # `fused` makes load_state_dict move AdamW's step counts to the device of the weights.
        super().__init__(groups, **adam, matrices=False, fused=True)

    def step_group(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = [p for p in group["params"] if p.grad is not None]
        if group["matrices"] and params:
            self._step_matrices(params, group)
        elif params:
            step_adamw(params, self.state, group)

    def _follow(self, params: list[Tensor]) -> list[Tensor]:
        """Update M of each matrix and return its N."""
        for p in params:
            if "momentum" not in self.state[p]:  # it may have AdamW's moments of an earlier phase
                self.state[p] = {"momentum": torch.zeros_like(p)}
        M, grads = [self.state[p]["momentum"] for p in params], gradients(params)
        torch._foreach_lerp_(M, grads, 1 - self.momentum)
        return list(torch._foreach_lerp(grads, M, self.momentum))

    def _step_matrices(self, params: list[Tensor], group: dict[str, Any]) -> None:
        N = self._follow(params)
        shares = owners([max(p.shape) * min(p.shape) ** 2 for p in params])
        for where in _alike([params[i] for i in shares.own], shares.own):
            found = polar(torch.stack([N[i] for i in where]), self.coefficients)
            for i, step in zip(where, found.unbind(), strict=True):
                N[i] = step
        shares.send_([[n] for n in N])
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        for where in _alike(params, range(len(params))):
            rate = self._rate(group["lr"], *params[where[0]].shape)
            torch._foreach_add_([params[i] for i in where], [N[i] for i in where], alpha=-rate)

    def _rate(self, lr: float, n: int, m: int) -> float:
        """Return lr c, at most the largest number that the operations take."""
        moonlight = self.scale == "moonlight"
        c = 0.2 * math.sqrt(max(n, m)) if moonlight else math.sqrt(max(1.0, n / m))
        return min(lr * c, LARGEST)


def _alike(matrices: Iterable[Tensor], numbers: Iterable[int]) -> list[list[int]]:
    """Return the numbers of matrices of each shape."""
    found: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for matrix, number in zip(matrices, numbers, strict=True):
        found[tuple(matrix.shape)].append(number)
    return list(found.values())


def dense_matrices(sites: Iterable[Site]) -> list[Tensor]:
    """Return the matrices of `sites` that are dense and trained, each once."""
    dense = (site.linear.weight for site in sites if not isinstance(site.module, ReparamLinear))
    return list(dict.fromkeys(W for W in dense if W.requires_grad))


def muon(
    model: nn.Module,
    sites: Sequence[Site],
    optim: OptimConfig,
    phase: int,
    groups: Iterable[dict[str, Any]] | None = None,
    factors: Sequence[Tensor] = (),
) -> MuonOptimizer:
    """Return Muon on `dense_matrices(sites)`, at `optim.lr`, and AdamW on all else: a head that is
    not tied at `head_lr`, and embeddings, norms, biases and factors at `embedding_lr`.

    groups: those of AdamW, by default `parameter_groups`; the matrices are taken out of them.
    factors: those that Muon moves too, each as a matrix of its own. A later phase may have no
    matrix, as after the warm start of ReLoRA, and is AdamW's alone. Raises ConfigError if the first
    has none.
    """
    assert optim.momentum is not None and optim.muon_scale is not None, "unresolved settings"
    matrices = [*dense_matrices(sites), *factors]
    wanted = (
        "adamw, since no dense matrix inside the model's layers is trained,"
        " unless method.targets or method.exclude leave some that method.train and train_rest"
        " do not freeze"
    )
    check(phase > 0 or bool(matrices), "optim.kind", optim.kind, wanted)
    if not matrices:
        log.info("muon: no dense matrix is trained in this phase; adamw has all at"
                 " optim.embedding_lr and head_lr")  # fmt: skip
    mine = {id(W) for W in matrices}
    decay = float(optim.weight_decay or 0)
    made: list[dict[str, Any]] = [{"params": matrices, "weight_decay": decay, "matrices": True}]
    for group in parameter_groups(model, optim) if groups is None else groups:
        rest = [p for p in group["params"] if id(p) not in mine]
        made.append({"lr": optim.embedding_lr, **group, "params": rest})
    used = [group for group in made if group["params"]]
    return MuonOptimizer(used, momentum=optim.momentum, scale=optim.muon_scale, **optim.adam())
