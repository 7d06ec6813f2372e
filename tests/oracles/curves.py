"""A slow trainer for one Hugging Face causal LM: the oracle for the library's loss curves.

No method has a module here. At every step each dense weight is formed from its factors, the
unmodified model is called with those weights (functional_call), and autograd runs through the
forming. The state is a flat dict of float64 tensors with the model's own parameter names, and at
an adapted site
    bpt           {site}.weight (frozen W), {site}.U, {site}.V, {site}.a, {site}.b
    lora, relora  {site}.weight (frozen W), {site}.B, {site}.A, and {site}.s if it is trained
    lowrank, loro {site}.B, {site}.A (no weight)
beside {site}.bias where the model has one. A tied lm_head.weight is absent. Which sites are adapted
is read from the keys; before the switch of a warm start none is. The Llama and Qwen2 of
transformers compute RMSNorm, the rotary tables and the eager softmax in float32 even when the model
is float64.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.func import functional_call

from . import algebra, relora

State = dict[str, Tensor]


class Options(TypedDict, total=False):
    """A period of 0 (the default) means never; steps are counted from the run's first."""

    # bpt, relora
    merge_every: int
    # bpt
    fresh_U: Callable[[str, int], Tensor]  # (site, completed steps) -> the U after that merge
    # lora, relora
    scale: float  # s, or where it is trained what it begins with
    fresh_A: Callable[[str, int], Tensor]  # the A after that merge, and at the switch
    reset_every: int  # default merge_every
    reset: str | relora.Reset  # "zero" (default), "keep" or a function
    reset_factors: str  # "both" (default), a trained s with them, or "A" alone
    warm: int  # steps of full training before the switch to adapters
    warm_lr: float  # their peak
    adapted: Sequence[str]  # the sites that get factors at the switch
    trained_scale: bool  # at the switch; without a warm start {site}.s in the state says so
    fresh: bool  # at the switch every parameter begins with new moments
    # loro, whose scale is c of the approximate step, default r / d
    exact_every: int  # K
    rank: int  # r
    width: int  # d, the model's hidden size
    direction: str  # of the exact step: "adam" (default) or "raw"
    refresh: str  # after every K-th step: "all" (default), "factors" or "none"


def sites(state: State) -> list[str]:
    """The adapted linear layers, named by their last factor (V of U V, A of B A)."""
    return [name.removesuffix(end) for end in (".V", ".A") for name in state if name.endswith(end)]


def factors(state: State, site: str) -> list[str]:
    """The trainable tensors that make up one adapted weight."""
    return [f"{site}.{letter}" for letter in "UVabBAs" if f"{site}.{letter}" in state]


def dense_state(state: State, scale: float | None = None) -> State:
    """The model's own parameters: diag(a)(W + U V)diag(b), W + s B A or B A for the factors.

    scale is the s of a site with W, B and A that has none of its own."""
    dense = dict(state)
    for site in sites(state):
        W, B, A, s = (state.get(f"{site}.{x}") for x in ("weight", "B", "A", "s"))
        for name in factors(state, site):
            del dense[name]
        if f"{site}.V" in state:
            W, U, V, a, b = (state[f"{site}.{x}"] for x in ("weight", "U", "V", "a", "b"))
            dense[f"{site}.weight"] = algebra.bpt_effective(W, U, V, a, b)
        elif W is None:
            dense[f"{site}.weight"] = B @ A
        elif s is None and scale is None:
            raise ValueError(f"{site} has W, B and A but no scale was given")
        else:
            dense[f"{site}.weight"] = algebra.relora_effective(W, B, A, scale if s is None else s)
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

    full, lowrank, bpt, lora, relora: AdamW without decay on every trainable tensor. bpt and relora
    also merge. lora and relora may begin with full training of the plain state (warm steps, at
    warm_lr), then switch to adapters (at lr); the multipliers hold for either.
    loro: the LORO form of Adam on every tensor, factors scaled by c; every K-th step is exact.
    An SVD fixes B', A' only up to a sign per column. Adam is elementwise and odd, so after
    refresh "all" or "factors" the losses do not depend on those signs (compare B'A', not B'); with
    "none" the old moments meet new columns, and the losses after the first exact step do depend.
    """
    state = {name: x.detach().double().clone() for name, x in state.items()}
    frozen = {f"{site}.weight" for site in sites(state)}
    moments = {n: algebra.reset_zero(x, x) for n, x in state.items() if n not in frozen}
    warm, scale = options.get("warm", 0), options.get("scale")
    merge_every = options.get("merge_every", 0)
    if warm and frozen:
        raise ValueError("before the switch of a warm start there are no factors")

    def due(period: int, done: int) -> bool:
        return period > 0 and done % period == 0 and warm < done < len(windows)

    def forget(names: Iterable[str]) -> None:
        moments.update({name: algebra.reset_zero(state[name], state[name]) for name in names})

    losses: list[float] = []
    for t, window in enumerate(windows):
        if t == warm > 0:
            begun = relora.switch(
                state, options["adapted"], lambda site, t=t: options["fresh_A"](site, t)
            )
            if options.get("trained_scale"):
                begun |= {f"{site}.s": torch.tensor(scale).double() for site in sites(begun)}
            state |= begun
            for site in sites(state):
                del moments[f"{site}.weight"]
            forget([*moments, *begun] if options.get("fresh") else begun)

        leaves = {n: x.clone().requires_grad_(n in moments) for n, x in state.items()}
        dense = dense_state(leaves, scale)
        for site in sites(state):
            dense[f"{site}.weight"].retain_grad()
        loss = token_loss(model, dense, window)
        loss.backward()
        losses.append(loss.item())

        shrink = clip_factor([gradient(leaves[n]) for n in moments], clip)
        old, rate = dict(state), (options["warm_lr"] if t < warm else lr) * multipliers[t]
        for name, (m, v, k) in moments.items():
            form, c = ("loro" if method == "loro" else "torch"), 1.0
            if method == "loro" and name.endswith((".B", ".A")):
                c = options["rank"] / options["width"] if scale is None else scale
            g = gradient(leaves[name]) * shrink
            state[name], m, v = algebra.adam_update(
                old[name], g, m, v, k + 1, rate * c, betas, eps, form
            )
            moments[name] = m, v, k + 1

        done, K = t + 1, options.get("exact_every", 0)
        if method == "loro" and K and done % K == 0:
            for site in sites(state):  # overwrites what the loop above did to B and A
                B, A, r = f"{site}.B", f"{site}.A", options["rank"]
                lr_p = algebra.loro_rate(rate, moments[B][2], betas)
                if options.get("direction", "adam") == "raw":
                    G = gradient(dense[f"{site}.weight"]) * shrink
                    W = algebra.loro_exact_raw(old[B], old[A], G, lr_p)
                else:
                    D_B, D_A = (algebra.loro_direction(*moments[x][:2], eps) for x in (B, A))
                    W = algebra.loro_exact_directions(old[B], old[A], D_B, D_A, lr_p)
                state[B], state[A] = algebra.factorised(W, r)
            refresh = options.get("refresh", "all")
            if refresh == "all":
                forget([*moments])
            elif refresh == "factors":
                forget([name for site in sites(state) for name in factors(state, site)])
        if method == "bpt" and due(merge_every, done):
            for site in sites(state):
                W, U, V = (state[f"{site}.{x}"] for x in ("weight", "U", "V"))
                state[f"{site}.weight"] = W + U @ V
                state[f"{site}.U"] = options["fresh_U"](site, done).double()
                state[f"{site}.V"] = torch.zeros_like(V)
                forget([f"{site}.U", f"{site}.V"])
        if method == "relora":
            how, of = options.get("reset", "zero"), options.get("reset_factors", "both")
            for site in sites(state):
                if due(merge_every, done):
                    relora.merge(state, site, scale, options["fresh_A"](site, done))
                if due(options.get("reset_every", merge_every), done):
                    relora.reset(moments, site, done, how, of)
    return losses, state


def gradient(x: Tensor) -> Tensor:
    """x.grad, which must be there: a tensor the loss does not reach is a mistake in the state."""
    if x.grad is None:
        raise ValueError("a trainable tensor is not part of the loss")
    return x.grad
