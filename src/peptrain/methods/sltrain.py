"""SLTrain (Han et al., NeurIPS 2024): W = s B A + S, the sum of a low-rank and a sparse matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peptrain.methods.base import Method
from peptrain.methods.lora import fresh_A
from peptrain.methods.rank import RankMethod
from peptrain.models.sites import ReparamLinear, Site, reparametrized
from peptrain.ops.precision import at_least_fp32
from peptrain.ops.sparse import sparse_linear, sparse_weight
from peptrain.ops.spectral import best_factors
from peptrain.optim.adamw import Kind, OptimConfig, adamw, groups_around
from peptrain.optim.muon import muon
from peptrain.rng import Rng
from peptrain.settings.fields import check, check_positive, essential


class SLTrainLinear(ReparamLinear):
    """W = s B A + S, s = alpha / r; B: [out, r], A: [r, in], S: [out, in] sparse.

    S has trained `values` [nnz] at the flat `indices` [nnz], int32, ascending. This support is
    drawn once, uniformly, from the seed and the site's name, and does not change. It is a buffer:
    it is in the state dict but in no checkpoint, since the seed reproduces it. No dense W exists.
    A is kaiming_uniform, B = 0, the values are U(+-1/sqrt(in)). For a trained W, s B A is its best
    rank-r approximation, and S is the remainder on the support.
    """

    indices: Tensor

    def __init__(self, site: Site, rank: int, alpha: float, density: float, rng: Rng) -> None:
        super().__init__(site)
        n, m = site.shape
        W = site.linear.weight.detach()
        self.s = alpha / rank
        nnz = support_size(n, m, density)
        indices = support(n * m, nnz, rng(site.name, purpose="support"))
        if site.fresh:
            A, B = fresh_A(site.name, 0, rank, m, rng, W), W.new_zeros(n, rank)
            values = nn.init.uniform_(
                torch.empty(nnz, device="cpu"),
                -(m**-0.5),
                m**-0.5,
                generator=rng(site.name, purpose="S"),
            )
        else:
            wide = W.to(at_least_fp32(W.dtype))
            B, A = (factor / self.s**0.5 for factor in best_factors(wide, rank))
            values = (wide - self.s * B @ A).flatten()[indices.to(W.device)]
        self.B, self.A = nn.Parameter(B.to(W)), nn.Parameter(A.to(W))
        self.values = nn.Parameter(values.to(W))
        self.register_buffer("indices", indices.to(W.device))

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        places, wider = self.indices, self.A.shape[1] - self.in_features
        if wider:  # execution/padding.py appends columns of zeros, so rows are longer
            places = places + places // self.in_features * wider
        return self.B, self.A, self.values, places, self.s

    def forward(self, x: Tensor) -> Tensor:
        y = sparse_linear(x, *self.parts)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def effective_weight(self) -> Tensor:
        return sparse_weight(*self.parts, at_least_fp32(self.B.dtype))


def support_size(n: int, m: int, density: float) -> int:
    """Return nnz of an n x m matrix: density n m rounded down, at least 1."""
    return max(1, int(density * n * m))


def support(size: int, nnz: int, generator: torch.Generator) -> Tensor:
    """Draw `nnz` of the integers below `size` uniformly; [nnz], int32, ascending.

    Raises RuntimeError for a matrix of 2^31 entries or more.
    """
    drawn = torch.randperm(size, generator=generator, dtype=torch.int32, device="cpu")
    return drawn[:nnz].sort().values


@dataclass(frozen=True, kw_only=True)
class SLTrain(RankMethod):
    """Train W = s B A + S by AdamW, S sparse on a fixed random support."""

    name: ClassVar[str] = "sltrain"
    purpose: ClassVar[str] = "baseline: lowrank plus a sparse matrix"
    equation: ClassVar[str] = "W = s B A + S, S sparse on a fixed random support"
    keeps_function_with = None
    zero_factor = True
    optim_defaults = replace(Method.optim_defaults, lr=3e-3)
    optim_kinds: ClassVar[tuple[Kind, ...]] = ("adamw", "muon")

    alpha: float = 32.0
    """s = alpha / rank. The paper uses 32 at 60M, 16 at 130M and 350M, 8 at 1B."""
    density: float = essential(0.03)
    """Fraction of the entries of S that are trained; the others are 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("method.alpha", self.alpha)
        check(0 < self.density < 1, "method.density", self.density, "in (0, 1)")

    def cost(self, n: int, m: int, rank: int) -> int:
        return rank * (n + m) + support_size(n, m, self.density)

    def layer(self, site: Site, rng: Rng) -> SLTrainLinear:
        return SLTrainLinear(site, self.rank_of(site.name), self.alpha, self.density, rng)

    def optimizer(
        self, model: nn.Module, sites: Sequence[Site], optim: OptimConfig, phase: int
    ) -> Optimizer:
        """Decay `values` too: they are 1-D, but the entries of a matrix."""
        values = [m.values for m in reparametrized(model) if isinstance(m, SLTrainLinear)]
        groups = groups_around(model, optim, values)
        if optim.kind == "muon":
            return muon(model, sites, optim, phase, groups)
        return adamw(model, optim, groups)
