"""VeRA (Kopiczko et al., 2024) from scratch: trained diagonals, one shared frozen random pair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peptrain.methods.base import Method
from peptrain.methods.bpt import BPT
from peptrain.methods.targets import TargetedMethod
from peptrain.models.sites import ReparamLinear, Site
from peptrain.ops.precision import at_least_fp32
from peptrain.rng import Rng
from peptrain.settings.fields import check_whole, essential


class VeRALinear(ReparamLinear):
    """W_eff = W + diag(lambda_b) B diag(lambda_d) A, with the first rows of B and columns of A.

    W is frozen, and so are A: [r, max in] and B: [max out, r], the same Parameters in every layer.
    lambda_d: [r] starts at 0.1, lambda_b: [out] at 0, so lambda_b is the first to receive a
    gradient. Both are at least fp32, like BPT's diagonals.
    """

    def __init__(self, site: Site, A: nn.Parameter, B: nn.Parameter) -> None:
        super().__init__(site)
        W = site.linear.weight
        wide = at_least_fp32(W.dtype)
        self.weight = W.requires_grad_(False)
        self.A, self.B = A, B
        self.lambda_d = nn.Parameter(W.new_full((len(A),), 0.1, dtype=wide))
        self.lambda_b = nn.Parameter(W.new_zeros(self.out_features, dtype=wide))

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """Return the parts of A and B that the layer uses, [r, in] and [out, r], padded if W is."""
        n, m = self.weight.shape
        return self.A[:, :m], self.B[:n]

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.pair
        z = F.linear(x, A)
        z = F.linear((self.lambda_d * z).to(z.dtype), B)
        y = F.linear(x, self.weight, self.bias)
        return y + (self.lambda_b * z).to(y.dtype)

    def effective_weight(self) -> Tensor:
        dtype = self.lambda_b.dtype
        A, B = (p.to(dtype) for p in self.pair)
        added = (self.lambda_b[:, None] * B) @ (self.lambda_d[:, None] * A)
        return self.weight.to(dtype) + added


def frozen_pair(sites: Sequence[Site], rank: int, rng: Rng) -> tuple[nn.Parameter, nn.Parameter]:
    """Draw A [r, max in] and B [max out, r], uniform in +-sqrt(6 / fan in) (kaiming, gain sqrt 2).

    They depend only on the seed and are shared by all layers. A checkpoint contains each once,
    under its name in the first layer.
    """
    n, m = (max(sizes) for sizes in zip(*(site.shape for site in sites), strict=True))
    like = sites[0].linear.weight

    def drawn(rows: int, columns: int, purpose: str) -> nn.Parameter:
        fresh = torch.empty(rows, columns, device="cpu")
        nn.init.kaiming_uniform_(fresh, generator=rng("vera", purpose=purpose))
        return nn.Parameter(fresh.to(like), requires_grad=False)

    return drawn(rank, m, "A"), drawn(n, rank, "B")


@dataclass(frozen=True, kw_only=True)
class VeRA(TargetedMethod):
    """Train the diagonals of W + diag(lambda_b) B diag(lambda_d) A, all else frozen."""

    name: ClassVar[str] = "vera"
    purpose: ClassVar[str] = "baseline: few parameters, shared factors"
    equation: ClassVar[str] = "W_eff = W + diag(lambda_b) B diag(lambda_d) A, A and B shared"
    # BPT reports VeRA in Table 2 but no learning rate for it in Table 5: ten times full training's,
    # the general rule of Appendix E.
    optim_defaults = replace(Method.optim_defaults, lr=2e-3)
    schedule_defaults = BPT.schedule_defaults

    rank: int = essential(128)
    """r, the inner dimension of the frozen pair. It may exceed a matrix's dimensions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("method.rank", self.rank, 1)

    def layers(self, sites: Sequence[Site], rng: Rng) -> Iterator[ReparamLinear]:
        A, B = frozen_pair(sites, self.rank, rng)
        return (VeRALinear(site, A, B) for site in sites)
