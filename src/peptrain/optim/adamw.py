"""Optimizer settings, parameter groups, and the reset of moments used by merging methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from peptrain.errors import ConfigError
from peptrain.models.named import of_kind
from peptrain.models.sites import reparametrized
from peptrain.settings.fields import added, check, check_positive, essential, fill

Kind = Literal["adamw", "sgd", "muon"]
ResetMode = Literal["zero", "magnitude", "random", "keep"]
SMALLEST_EPS, LARGEST_BETA = 1e-37, 0.9999999
NOT_OF = {
    "adamw": ("momentum", "muon_scale"),
    "sgd": ("beta1", "beta2", "eps", "muon_scale"),
    "muon": (),
}
"""Settings that an optimizer does not have. They are refused, as they would have no effect."""
OWN_RATES = {"embedding_lr": "embedding", "head_lr": "head"}
"""Learning rates that, where they are set, give some parameters a group, with this name."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Settings of the optimizer. An unset one takes the method's own default."""

    kind: Kind = added("adamw", before="adamw")
    """adamw; muon, for the matrices of decoder layers that a method leaves dense and trains, with
    adamw for all else; or, for method full, sgd, gradient descent without a second moment."""
    lr: float | None = essential(None)
    """Peak learning rate, with muon that of its matrices. Unset with sgd: 0.1; with muon: 1e-2."""
    embedding_lr: float | None = added(None, before=None)
    """Peak learning rate of embeddings, norms and biases, with muon of all that adamw trains, a
    method's factors too. Unset: that of all parameters; with muon or spectron:
    5e-3."""
    head_lr: float | None = added(None, before=None)
    """Peak learning rate of an output head that is not tied. Unset: embedding_lr where that is set,
    else that of all parameters."""
    momentum: float | None = added(None, before=None)
    """With sgd: decay of the summed gradient. Unset: 0, which needs no memory. With muon: decay of
    the averaged gradient. Unset: 0.95."""
    muon_scale: Literal["spectral", "moonlight"] | None = added(None, before=None)
    """With muon: a step is lr times sqrt(max(1, n/m)) (spectral) or 0.2 sqrt(max(n, m)) (moonlight,
    the size of adamw's) in spectral norm. Unset: spectral."""
    beta1: float | None = None
    """Decay of the first moment."""
    beta2: float | None = None
    """Decay of the second moment."""
    eps: float | None = None
    """Added to the square root of the second moment."""
    weight_decay: float | None = None
    """Decay of matrices, never of embeddings, norms, biases or diagonals: decoupled with adamw and
    muon, added to the gradient with sgd."""
    clip: float | None = None
    """Maximum global norm of the gradient; 0 is off."""

    def __post_init__(self) -> None:
        fits = self.momentum is None or 0 <= self.momentum < 1
        check(fits, "optim.momentum", self.momentum, "in [0, 1)")
        for name in ("lr", *OWN_RATES, "weight_decay", "clip"):
            check_positive(f"optim.{name}", getattr(self, name), or_zero=True)
        check_positive("optim.eps", self.eps)
        wanted = f">= {SMALLEST_EPS}, or fp32 rounds it to 0 and weights become NaN"
        check(self.eps is None or self.eps >= SMALLEST_EPS, "optim.eps", self.eps, wanted)
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            check(value is None or 0 <= value < 1, f"optim.{name}", value, "in [0, 1)")
            wanted = f"<= {LARGEST_BETA}, or fp32 rounds it to 1"
            check(value is None or value <= LARGEST_BETA, f"optim.{name}", value, wanted)

    def check_kind(self, own: Collection[str], method: str) -> None:
        """Raise ConfigError for a setting that an optimizer of this kind does not have.

        own: the settings of the `method`, which the message names where one was meant.
        """
        for name in NOT_OF[self.kind]:
            value = getattr(self, name)
            meant = f"; that of {method} is method.{name}" if name in own else ""
            wanted = f"unset with optim.kind {self.kind}{meant}"
            check(value is None, f"optim.{name}", value, wanted)

    def adam(self) -> dict[str, Any]:
        """Return the resolved lr, betas and eps as keyword arguments of an optimizer."""
        assert None not in (self.lr, self.beta1, self.beta2, self.eps), "unresolved settings"
        return {"lr": self.lr, "betas": (self.beta1, self.beta2), "eps": self.eps}


SGD_DEFAULTS = OptimConfig(kind="sgd", lr=0.1, momentum=0.0)
"""They replace a method's learning rate, which is one of AdamW."""
MUON_DEFAULTS = OptimConfig(
    kind="muon", lr=1e-2, embedding_lr=5e-3, momentum=0.95, muon_scale="spectral"
)
"""Likewise. What AdamW trains besides has the method's betas and eps."""


def filled(optim: OptimConfig, *defaults: OptimConfig) -> OptimConfig:
    """Return `optim` with each unset setting taken from the first of `defaults` that sets it.

    With sgd the learning rate and the momentum are `SGD_DEFAULTS`, and AdamW's settings stay unset.
    With muon those of `MUON_DEFAULTS` come first.
    """
    if optim.kind == "muon":
        defaults = (MUON_DEFAULTS, *defaults)
    if optim.kind == "sgd":
        no_adam: dict[str, Any] = dict.fromkeys(NOT_OF["sgd"])
        defaults = (SGD_DEFAULTS, *(replace(d, **no_adam) for d in defaults))
    return fill(optim, *defaults)


def decays(model: nn.Module) -> Callable[[nn.Parameter], bool]:
    """Return a function that tells whether weight decay applies to a parameter: only to matrices,
    and never to embeddings."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return lambda p: p.ndim >= 2 and id(p) not in tables


def parameter_groups(
    model: nn.Module, optim: OptimConfig, params: Iterable[nn.Parameter] | None = None
) -> list[dict[str, Any]]:
    """Split the trainable parameters (or `params`) into groups with and without weight decay.

    Those with a learning rate of their own follow, in the groups "embedding" and "head". Raises
    ConfigError for `head_lr` where the head is tied to the embeddings.
    """
    chosen = [p for p in (model.parameters() if params is None else params) if p.requires_grad]
    may_decay, kind = decays(model), _kinds(model, optim)
    decay = float(optim.weight_decay or 0)
    usual = [p for p in chosen if not kind(p)]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in usual if may_decay(p)], "weight_decay": decay},
        {"params": [p for p in usual if not may_decay(p)], "weight_decay": 0.0},
    ]
    head_lr = optim.embedding_lr if optim.head_lr is None else optim.head_lr
    for name, lr, own in (("embedding", optim.embedding_lr, 0.0), ("head", head_lr, decay)):
        theirs = [p for p in chosen if kind(p) == name]
        groups.append({"params": theirs, "weight_decay": own, "lr": lr, "name": name})
    return [g for g in groups if g["params"]]


def _kinds(model: nn.Module, optim: OptimConfig) -> Callable[[nn.Parameter], str]:
    """Return a function from a parameter to the name of its group, "" for one that has `optim.lr`.

    Norms and biases are with the embeddings, those of the head too. What a method's layers train,
    apart from biases, has `optim.lr`.
    """
    if optim.embedding_lr is None and optim.head_lr is None:
        return lambda p: ""
    tables, heads, biases, norms = (
        of_kind(model, kind) for kind in ("embedding", "head", "bias", "norm")
    )
    adapted = {id(p) for layer in reparametrized(model) for p in layer.parameters()}
    matrices = {id(p) for p in model.parameters() if p.ndim >= 2} - biases - adapted
    tied, heads = heads & tables, (heads & matrices) - tables
    wanted = "unset where the head is tied to the embeddings, which have optim.embedding_lr"
    check(optim.head_lr is None or bool(heads) or not tied, "optim.head_lr", optim.head_lr, wanted)
    small = tables | biases | norms if optim.embedding_lr is not None else set()

    def kind(p: nn.Parameter) -> str:
        return "head" if id(p) in heads else "embedding" if id(p) in small else ""

    return kind


def groups_around(
    model: nn.Module, optim: OptimConfig, own: Sequence[Tensor], **settings: Any
) -> list[dict[str, Any]]:
    """Return the groups of all trainable parameters except `own`, with one group of `own`, which
    has weight decay and the given `settings`, before those with a name."""
    mine = {id(p) for p in own}
    groups = parameter_groups(model, optim, (p for p in model.parameters() if id(p) not in mine))
    between = {"params": list(own), "weight_decay": float(optim.weight_decay or 0), **settings}
    named = [group for group in groups if "name" in group]
    return [*groups[: len(groups) - len(named)], between, *named]


def adamw(
    model: nn.Module, optim: OptimConfig, groups: list[dict[str, Any]] | None = None
) -> AdamW:
    """Return fused AdamW on all trainable parameters, or on `groups`. Also on a CPU, fused is 4-5
    times faster than the default."""
    if groups is None:
        groups = parameter_groups(model, optim)
    return AdamW(groups, **optim.adam(), fused=True)


def sgd(model: nn.Module, optim: OptimConfig) -> SGD:
    """Return fused SGD on all trainable parameters. On a CPU, fused is 5 times faster than the
    default. Without momentum it has no state."""
    assert optim.lr is not None and optim.momentum is not None, "unresolved settings"
    groups = parameter_groups(model, optim)
    return SGD(groups, lr=optim.lr, momentum=optim.momentum, fused=True)


def state_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of the optimizer's moments, without scalars."""
    tensors = (t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor))
    return sum(t.numel() * t.element_size() for t in tensors if t.ndim > 0)


def set_lr(optimizer: Optimizer, multiplier: float) -> None:
    """Set every group's learning rate to its initial one times `multiplier`."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * multiplier


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """Return the first group's learning rate as "lr" and that of each named group as "lr_NAME"."""
    groups = optimizer.param_groups
    named = {f"lr_{group['name']}": group["lr"] for group in groups if "name" in group}
    return {"lr": groups[0]["lr"], **named}


def check_groups(
    optimizer: Optimizer, model: nn.Module, optim: OptimConfig, usual: OptimConfig
) -> None:
    """Raise ConfigError if a trainable parameter is in no group, since nothing would train it and
    its gradient would grow from step to step, if two groups have the same name, since the rows
    would have one rate, or if a learning rate of their own is set for parameters that no group has.

    usual: the method's defaults. A rate that is one may be of parameters that are frozen.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    left = [name for name, p in trainable if id(p) not in held]
    if left:
        raise ConfigError(
            f"the method's optimizer has no group with {len(left)} of the trainable parameters,"
            f" such as {left[0]}; give it all of them, or freeze what is not to be trained"
            " (requires_grad_(False) in install)"
        )
    names = [group["name"] for group in optimizer.param_groups if "name" in group]
    for name in names:
        check(names.count(name) == 1, "name of an optimizer group", name, "unique")
    defaults = filled(OptimConfig(kind=optim.kind), usual)
    rates = {group["lr"] for group in optimizer.param_groups if "name" not in group}
    for key, name in OWN_RATES.items():
        lr, default = getattr(optim, key), getattr(defaults, key)
        # One that has a default is also the rate of whatever else AdamW trains beside matrices.
        used = name in names or lr == default or (default is not None and lr in rates)
        wanted = f"unset, as no {name} is trained in a group of its own"
        check(lr is None or used, f"optim.{key}", lr, wanted)


def clip_gradients(model: nn.Module, clip: float | None) -> Tensor:
    """Return the global gradient norm and scale the gradients so that it is at most `clip`, unless
    `clip` is 0 or None. The returned norm is the one before scaling."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(grads)
    if clip:
        scale = (clip / (norm + 1e-6)).clamp(max=1.0)
        for dtype, device in {(g.dtype, g.device) for g in grads}:
            alike = [g for g in grads if (g.dtype, g.device) == (dtype, device)]
            # With mixed dtypes PyTorch's own clipping falls back to one tensor at a time.
            torch._foreach_mul_(alike, scale.to(device, dtype))
    return norm


@torch.no_grad()
def reset_moments(
    optimizer: Optimizer,
    p: nn.Parameter,
    mode: ResetMode,
    fraction: float,
    rng: torch.Generator,
    *,
    step: Literal["restart", "keep"] = "restart",
    pico_compat: bool = False,
) -> None:
    """Zero the Adam moments of one parameter in place and, unless `step` is keep, restart its bias
    correction.

    mode zero: all elements. magnitude: the `fraction` of elements with the smallest |m|. random: a
    random `fraction`. keep: leave moments and step count unchanged. Both moments share one mask,
    because an m kept without its v would be divided by nearly zero. The state is changed in place,
    because a removed state would be missing from a checkpoint taken at the merge.

    The bias correction is right for zeroed moments after a restart, and for kept moments if the
    count is kept too. In a partial reset and at a constant gradient (betas 0.9 and 0.999), restart
    moves elements with kept moments by 0.15 to 0.4 times the learning rate, and keep moves zeroed
    ones by up to 6.57 times it.

    pico_compat reproduces ReLoRA's released code and its forks: a separate mask for each moment (by
    its own magnitudes), and the step count is kept.
    """
    state = optimizer.state.get(p, {})
    if mode == "keep" or not state:
        return
    m, v = state["exp_avg"], state["exp_avg_sq"]
    if step == "restart" and not pico_compat:
        state["step"].zero_()
    if mode == "zero":
        m.zero_()
        v.zero_()
        return
    kept = keep_mask(m, mode, fraction, rng, pico_compat=pico_compat)
    m.mul_(kept)
    v.mul_(keep_mask(v, mode, fraction, rng, pico_compat=True) if pico_compat else kept)


def keep_mask(
    m: Tensor, mode: ResetMode, fraction: float, rng: torch.Generator, *, pico_compat: bool = False
) -> Tensor:
    """Return a 0/1 mask like m with exactly round(fraction * size) zeros, ties broken by index.

    pico_compat: by magnitude floor(fraction * (size - 1)) + 1 zeros, as many as are not above the
    released code's quantile.
    """
    zeros = round(fraction * m.numel())
    if pico_compat and mode == "magnitude":
        zeros = math.floor(fraction * (m.numel() - 1)) + 1
    if mode == "magnitude":
        score = m.abs().flatten()
    else:
        score = torch.rand(m.numel(), generator=rng, device="cpu").to(m.device)
    pruned = torch.argsort(score, stable=True)[:zeros]
    mask = torch.ones(m.numel(), dtype=m.dtype, device=m.device)
    mask[pruned] = 0
    return mask.view_as(m)
