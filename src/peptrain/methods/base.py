"""What a method is: a frozen dataclass of hyperparameters with five optional hooks."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from peptrain.errors import ConfigError, Unsupported
from peptrain.optim import OptimConfig, adamw
from peptrain.rng import Rng
from peptrain.schedule import Schedule, ScheduleConfig
from peptrain.settings import check, of_width

log = logging.getLogger("peptrain")

Metrics = Mapping[str, Tensor | float]
"""Numbers for metrics.jsonl. Tensors are read when the next row is written, so that nothing
waits for the device. A name that ends in `_warning` is also logged when it is not zero."""


@dataclass(frozen=True)
class Site:
    """One nn.Linear that a method may replace."""

    name: str
    """As in the state dict: "model.layers.0.mlp.up_proj"."""
    parent: nn.Module
    width: int
    """The model's hidden size, d in the papers."""

    @property
    def linear(self) -> nn.Linear:
        module = getattr(self.parent, self.name.rpartition(".")[2])
        assert isinstance(module, nn.Linear)
        return module

    @property
    def shape(self) -> tuple[int, int]:
        """(n, m) = (out, in)."""
        return self.linear.out_features, self.linear.in_features

    def replace(self, new: ReparamLinear) -> None:
        setattr(self.parent, self.name.rpartition(".")[2], new)


class ReparamLinear(nn.Module):
    """y = x W_effᵀ + bias, with W_eff written in other parameters.

    A frozen base keeps the name `weight`, a bias the name `bias`, so Hugging Face's keys survive.
    """

    site: str

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site.name
        self.out_features, self.in_features = site.shape
        self.bias = site.linear.bias

    def effective_weight(self) -> Tensor:
        """W_eff, [out, in], in at least fp32, on unsharded tensors."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{k}={list(p.shape)}" for k, p in self.named_parameters())
        return f"in={self.in_features}, out={self.out_features}, {shapes}"


def reparametrized(model: nn.Module) -> Iterator[ReparamLinear]:
    """Every layer that a method replaced, in the model's order."""
    return (m for m in model.modules() if isinstance(m, ReparamLinear))


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of every method: the fields are the hyperparameters, no tensor and no counter.

    A hook left alone means: no rebuilds, no layer replaced, AdamW on all that is trainable, the
    schedule as configured, nothing between two steps.
    """

    name: ClassVar[str]
    equation: ClassVar[str]
    """One line for `peptrain methods`."""
    optim_defaults: ClassVar[OptimConfig] = OptimConfig(
        lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, clip=1.0
    )
    """The method's own defaults, the learning rate among them; a None falls back to these."""
    schedule_defaults: ClassVar[ScheduleConfig] = ScheduleConfig(
        kind="cosine", decay_shape="cosine", floor=0.1, restart_every=0, restart_warmup=50
    )

    def phases(self, steps: int) -> tuple[int, ...]:
        """The steps at which the model is rebuilt from its dense weights, ascending."""
        return ()

    def install(self, sites: Sequence[Site], rng: Rng, phase: int) -> None:
        """Replace layers of a freshly built model; the dense weights are in the sites."""

    def optimizer(self, model: nn.Module, optim: OptimConfig) -> Optimizer:
        return adamw(model, optim)

    def schedule(self, base: Schedule) -> Schedule:
        return base

    def after_step(self, model: nn.Module, optimizer: Optimizer, step: int, rng: Rng) -> Metrics:
        """Called between steps, `step` of them completed; never after the last of a phase."""
        return {}


@dataclass(frozen=True, kw_only=True)
class RankMethod(Method):
    """A method with a rank, and the one rule for which matrices it takes."""

    rank: int | None = of_width(0.25)
    """r, the inner dimension of the two factors. Unset: a quarter of the hidden size."""
    include: str = ""
    """Matrices to adapt whatever the rule says: comma-separated patterns ("k_proj,*.mlp.*")."""
    exclude: str = ""
    """Matrices to leave dense and trainable: comma-separated patterns."""

    def __post_init__(self) -> None:
        check(self.rank is None or self.rank >= 1, "method.rank", self.rank, "1 or more")

    @property
    def r(self) -> int:
        """The rank, once it is resolved."""
        if self.rank is None:
            raise ConfigError("method.rank: unset; give a rank of 1 or more")
        return self.rank

    def cost(self, n: int, m: int, rank: int) -> int:
        """Trainable parameters of an adapted n x m matrix."""
        return rank * (n + m)

    def chosen(self, sites: Sequence[Site]) -> list[Site]:
        """The sites to adapt: those whose trainable parameters get fewer (methods' one rule).

        Raises Unsupported without any eligible layer, ConfigError when the rule takes none.
        """
        if not sites:
            raise Unsupported("the model has no nn.Linear inside its decoder layers to adapt")
        for key, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in _split(patterns):
                found = any(_matches(site, pattern) for site in sites)
                check(found, f"method.{key}", pattern, "a pattern that some matrix's name matches")
        taken = [site for site in sites if self._takes(site)]
        if not taken and all(_matches(site, self.exclude) for site in sites):
            raise ConfigError(f"method.exclude: {self.exclude!r} leaves no matrix to adapt")
        if not taken:
            raise ConfigError(
                f"method.rank: at {self.r} no matrix gets fewer trainable parameters; the"
                f" largest useful rank of this model is {self._largest_useful_rank(sites)}"
            )
        if len(taken) < len(sites):
            dense = sorted({s.name.rpartition(".")[2] for s in sites} - {_leaf(s) for s in taken})
            log.info("%s: %d of %d matrices adapted; dense and trainable: %s", self.name,
                     len(taken), len(sites), ", ".join(dense) or "some")  # fmt: skip
        return taken

    def _takes(self, site: Site) -> bool:
        if _matches(site, self.exclude):
            return False
        n, m = site.shape
        return _matches(site, self.include) or self.cost(n, m, self.r) < n * m

    def _largest_useful_rank(self, sites: Sequence[Site]) -> int:
        def useful(rank: int) -> bool:
            return any(self.cost(*s.shape, rank) < s.shape[0] * s.shape[1] for s in sites)

        ranks = range(1, max(min(s.shape) for s in sites) + 1)
        return max((r for r in ranks if useful(r)), default=0)


def _leaf(site: Site) -> str:
    return site.name.rpartition(".")[2]


def _split(patterns: str) -> list[str]:
    return [p.strip() for p in patterns.split(",") if p.strip()]


def _matches(site: Site, patterns: str) -> bool:
    listed = _split(patterns)
    return any(fnmatchcase(site.name, p) or fnmatchcase(_leaf(site), p) for p in listed)
