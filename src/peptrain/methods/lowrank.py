"""Plain low-rank training: W = B A, both factors trained by AdamW; LORO's layer and baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peptrain.errors import ConfigError
from peptrain.methods.base import Method
from peptrain.methods.rank import RankMethod
from peptrain.models.sites import ReparamLinear, Site
from peptrain.ops.precision import at_least_fp32
from peptrain.ops.spectral import best_factors, semi_orthogonal
from peptrain.rng import Rng
from peptrain.settings.fields import added, check_positive, essential

Init = Literal["xavier", "normal", "orthogonal"]
INIT_STD = 0.01
"""Of `normal` where none is given: the middle of the three that LORO's Figure 5 tries, 0.1, 0.01
and 0.001. The paper names none of them as the best."""
STD = 0.02
"""Of the entries of B A from orthogonal factors: that of a dense W in the models' own
initialisation."""


class LowRankLinear(ReparamLinear):
    """W = B A, so y = x Aᵀ Bᵀ. B: [out, r], A: [r, in]; no dense W exists.

    The factors are initialised by `fresh_factors`, or by the truncated SVD of a trained W.
    """

    def __init__(
        self, site: Site, rank: int, rng: Rng, init: Init = "xavier", std: float = INIT_STD
    ) -> None:
        super().__init__(site)
        W = site.linear.weight.detach()
        if site.fresh:
            B, A = fresh_factors(site, rank, rng, init, std)
        else:
            B, A = best_factors(W.to(at_least_fp32(W.dtype)), rank)
        self.B, self.A = nn.Parameter(B.to(W)), nn.Parameter(A.to(W))

    @classmethod
    def of(
        cls, site: str, B: nn.Parameter, A: nn.Parameter, bias: nn.Parameter | None
    ) -> LowRankLinear:
        """Return a layer with these factors, where `__init__` would draw new ones."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.site, layer.B, layer.A = site, B, A
        layer.register_parameter("bias", bias)
        layer.out_features, layer.in_features = B.shape[0], A.shape[1]
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.A), self.B, self.bias)

    def effective_weight(self) -> Tensor:
        dtype = at_least_fp32(self.B.dtype)
        return self.B.to(dtype) @ self.A.to(dtype)


def fresh_factors(
    site: Site, rank: int, rng: Rng, init: Init, std: float = INIT_STD
) -> tuple[Tensor, Tensor]:
    """Draw B [n, r] and A [r, m] on the CPU, in fp32.

    xavier: N(0, 2 / (n + r)) and N(0, 2 / (r + m)), so that an entry of B A has the variance
    4 r / ((n + r)(r + m)). normal: N(0, std²), and r std⁴. orthogonal: B = g Q_B and A = g Q_A,
    with orthonormal columns of Q_B and rows of Q_A, both uniform, and g² = 0.02 √(n m / r), so that
    every singular value of B A is g² and the mean square of its entries is 0.02².

    Raises ConfigError for orthogonal factors with r > min(n, m). Source of the first two: LORO,
    Appendices A.1 and C.1.1.
    """
    (n, m), r = site.shape, rank
    for_B, for_A = (rng(site.name, purpose=factor) for factor in "BA")
    if init == "orthogonal":
        if r > min(n, m):
            raise ConfigError(
                f"method.init: orthogonal needs a rank of at most min(n, m) = {min(n, m)} in"
                f" {site.name}, {n} x {m} (got rank {r}); lower the rank, or take xavier"
            )
        g = (STD * (n * m / r) ** 0.5) ** 0.5
        return g * semi_orthogonal(n, r, for_B), g * semi_orthogonal(r, m, for_A)
    B, A = (torch.empty(shape, device="cpu") for shape in ((n, r), (r, m)))
    for factor, generator in ((B, for_B), (A, for_A)):
        if init == "normal":
            nn.init.normal_(factor, std=std, generator=generator)
        else:
            nn.init.xavier_normal_(factor, generator=generator)
    return B, A


@dataclass(frozen=True, kw_only=True)
class LowRank(RankMethod):
    """Train W = B A by AdamW on both factors."""

    name: ClassVar[str] = "lowrank"
    purpose: ClassVar[str] = "baseline: plain low-rank factors"
    equation: ClassVar[str] = "W = B A, both factors trained by AdamW"
    keeps_function_with: ClassVar[Mapping[str, Any] | None] = None
    # The best of 5e-4, 1e-3, 3e-3 and 1e-2 at llama-60m (docs/first-table.md).
    optim_defaults = replace(Method.optim_defaults, lr=1e-3)

    init: Init = essential(added("xavier", before="xavier"))
    """Initialisation of both factors, unless --init-from gives W. normal: N(0, init_std²).
    orthogonal: orthonormal columns of B and rows of A, scaled so that W has entries of std 0.02."""
    init_std: float | None = added(None, before=None)
    """Standard deviation of the entries of B and A with init normal. Unset: 0.01."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("method.init_std", self.init_std)
        if self.init_std is not None and self.init != "normal":
            raise ConfigError(
                f"method.init_std: is of method.init normal only (got {self.init_std} with"
                f" {self.init}); set method.init to normal, or leave it unset"
            )

    def layer(self, site: Site, rng: Rng) -> ReparamLinear:
        std = INIT_STD if self.init_std is None else self.init_std
        return LowRankLinear(site, self.rank_of(site.name), rng, self.init, std)

    def fuse(self, model: nn.Module) -> None:
        from peptrain.kernels.llama_layer import fuse_layers  # Triton is not everywhere
        from peptrain.kernels.swiglu_mlp import LowRankMLP, fuse_mlps

        fuse_mlps(model, LowRankLinear, LowRankMLP)
        fuse_layers(model)
