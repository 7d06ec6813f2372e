"""A slow trainer for one Hugging Face causal LM: the oracle for the library's loss curves.

No method has a module here. At every step each dense weight is formed from its factors, the
unmodified model is called with those weights (functional_call), and autograd runs through the
forming. The state is a flat dict of float64 tensors with the model's own parameter names, and at
an adapted site
    bpt           {site}.weight (frozen W), {site}.U, {site}.V, {site}.a, {site}.b
    lowrank, loro {site}.B, {site}.A (no weight)
beside {site}.bias where the model has one. A tied lm_head.weight is absent. Which sites are adapted
is read from the keys. The Llama and Qwen2 of transformers compute RMSNorm, the rotary tables and
the eager softmax in float32 even when the model is float64.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.func import functional_call

from . import algebra

State = dict[str, Tensor]


class Options(TypedDict, total=False):
    """bpt: merge_every, fresh_U. loro: the rest. A period of 0 (the default) means never."""

    merge_every: int
    fresh_U: Callable[[str, int], Tensor]  # (site, completed steps) -> the U after that merge
    exact_every: int  # K
    rank: int  # r
    width: int  # d, the model's hidden size
    direction: str  # of the exact step: "adam" (default) or "raw"
    refresh: str  # after every K-th step: "all" (default), "factors" or "none"
    scale: float  # c of the approximate step, default r / d


def sites(state: State) -> list[str]:
    """The adapted linear layers, named by their last factor (V of U V, A of B A)."""
    return [name.removesuffix(end) for end in (".V", ".A") for name in state if name.endswith(end)]


def factors(state: State, site: str) -> list[str]:
    """The trainable tensors that make up one adapted weight."""
    return [f"{site}.{letter}" for letter in "UVabBA" if f"{site}.{letter}" in state]


def dense_state(state: State) -> State:
    """The model's own parameters: diag(a)(W + U V)diag(b) or B A in place of the factors."""
    dense = dict(state)
    for site in sites(state):
        for name in factors(state, site):
            del dense[name]
        if f"{site}.V" in state:
            W, U, V, a, b = (state[f"{site}.{x}"] for x in ("weight", "U", "V", "a", "b"))
            dense[f"{site}.weight"] = algebra.bpt_effective(W, U, V, a, b)
        else:
            dense[f"{site}.weight"] = state[f"{site}.B"] @ state[f"{site}.A"]
    return dense


def token_loss(model: nn.Module, dense: State, window: Tensor) -> Tensor:
    """Mean over all tokens of log sum_j exp z_j - z_target; inputs [:, :-1], targets [:, 1:]."""
    names = {name for name, _ in model.named_parameters()}
    if names != set(dense):  # functional_call would silently use the model's own values
        raise ValueError(f"state and model differ in {sorted(names ^ set(dense))}")
    z = functional_call(model, dense, (window[:, :-1],), {"use_cache": False}).logits.double()
    target = z.gather(-1, window[:, 1:, None]).squeeze(-1)
    return (z.logsumexp(-1) - target).mean()


def clip_factor(grads: list[Tensor], clip: float | None) -> float:
    """clip / (norm + 1e-6) where the global L2 norm exceeds clip, as clip_grad_norm_ has it."""
    norm = math.sqrt(sum((g**2).sum().item() for g in grads))
    return 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))


def slow_curve(
    model: nn.Module,
    method: str,
    state: State,
    windows: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    clip: float | None,
    multipliers: Sequence[float],
    **options: Unpack[Options],
) -> tuple[list[float], State]:
    """Train on one window [rows, L + 1] a step; return each step's loss and the final state.

    full, lowrank, bpt: AdamW without decay on every trainable tensor. bpt also merges.
    loro: the LORO form of Adam on every tensor, factors scaled by c; every K-th step is exact.
    An SVD fixes B', A' only up to a sign per column. Adam is elementwise and odd, so after
    refresh "all" or "factors" the losses do not depend on those signs (compare B'A', not B'); with
    "none" the old moments meet new columns, and the losses after the first exact step do depend.
    """
    state = {name: x.detach().double().clone() for name, x in state.items()}
    frozen = {f"{site}.weight" for site in sites(state)}
    trainable = [name for name in state if name not in frozen]
    m = {name: torch.zeros_like(state[name]) for name in trainable}
    v = {name: torch.zeros_like(state[name]) for name in trainable}
    k = dict.fromkeys(trainable, 0)

    def forget(names: list[str]) -> None:
        for name in names:
            m[name], v[name], k[name] = m[name] * 0, v[name] * 0, 0

    losses: list[float] = []
    for t, window in enumerate(windows):
        leaves = {n: x.clone().requires_grad_(n not in frozen) for n, x in state.items()}
        dense = dense_state(leaves)
        for site in sites(state):
            dense[f"{site}.weight"].retain_grad()
        loss = token_loss(model, dense, window)
        loss.backward()
        losses.append(loss.item())

        shrink = clip_factor([gradient(leaves[n]) for n in trainable], clip)
        grads = {n: gradient(leaves[n]) * shrink for n in trainable}
        old, rate = dict(state), lr * multipliers[t]
        for name in trainable:
            k[name] += 1
            form, c = ("loro" if method == "loro" else "torch"), 1.0
            if method == "loro" and name.endswith((".B", ".A")):
                c = options["scale"] if "scale" in options else options["rank"] / options["width"]
            state[name], m[name], v[name] = algebra.adam_update(
                old[name], grads[name], m[name], v[name], k[name], rate * c, betas, eps, form
            )

        done = t + 1
        K, merge_every = options.get("exact_every", 0), options.get("merge_every", 0)
        if method == "loro" and K and done % K == 0:
            for site in sites(state):  # overwrites what the loop above did to B and A
                B, A, r = f"{site}.B", f"{site}.A", options["rank"]
                lr_p = algebra.loro_rate(rate, k[B], betas)
                if options.get("direction", "adam") == "raw":
                    G = gradient(dense[f"{site}.weight"]) * shrink
                    W = algebra.loro_exact_raw(old[B], old[A], G, lr_p)
                else:
                    D_B, D_A = (algebra.loro_direction(m[x], v[x], eps) for x in (B, A))
                    W = algebra.loro_exact_directions(old[B], old[A], D_B, D_A, lr_p)
                state[B], state[A] = algebra.factorised(W, r)
            refresh = options.get("refresh", "all")
            if refresh == "all":
                forget(trainable)
            elif refresh == "factors":
                forget([name for site in sites(state) for name in factors(state, site)])
        if method == "bpt" and merge_every and done % merge_every == 0 and done < len(windows):
            for site in sites(state):
                W, U, V = (state[f"{site}.{x}"] for x in ("weight", "U", "V"))
                state[f"{site}.weight"] = W + U @ V
                state[f"{site}.U"] = options["fresh_U"](site, done).double()
                state[f"{site}.V"] = torch.zeros_like(V)
                forget([f"{site}.U", f"{site}.V"])
    return losses, state


def gradient(x: Tensor) -> Tensor:
    """x.grad, which must be there: a tensor the loss does not reach is a mistake in the state."""
    if x.grad is None:
        raise ValueError("a trainable tensor is not part of the loss")
    return x.grad
