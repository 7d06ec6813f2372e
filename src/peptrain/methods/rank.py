"""What methods with a rank share: the rank, and the rule for which matrices it is worth it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from peptrain.errors import ConfigError
from peptrain.methods.targets import TargetedMethod, matches
from peptrain.models.sites import Site
from peptrain.settings.fields import check, essential, of_width


@dataclass(frozen=True, kw_only=True)
class RankMethod(TargetedMethod):
    """A method with a rank, which takes the matrices whose `cost` is below n m."""

    saves: ClassVar[str] = "fewer trainable parameters"
    """What a matrix gets by being adapted, as the errors name it."""

    rank: int | None = essential(of_width(0.25))
    """r, the inner dimension of the two factors. Unset: a quarter of the hidden size."""

    def __post_init__(self) -> None:
        check(self.rank is None or self.rank >= 1, "method.rank", self.rank, ">= 1")

    @property
    def r(self) -> int:
        """The rank, once it is resolved."""
        if self.rank is None:
            raise ConfigError("method.rank: unset; give a rank of 1 or more")
        return self.rank

    def cost(self, n: int, m: int, rank: int) -> int:
        """Trainable parameters of an adapted n x m matrix, whose n m it would have dense."""
        return rank * (n + m)

    def worthwhile(self, sites: Sequence[Site]) -> list[Site]:
        taken = [site for site in sites if self._takes(site)]
        if not taken:
            raise ConfigError(
                f"method.rank: at {self.r} no matrix gets {self.saves}; the largest useful"
                f" rank of this model is {self._largest_useful_rank(sites)}"
            )
        return taken

    def _takes(self, site: Site) -> bool:
        n, m = site.shape
        return matches(site, self.include) or self.cost(n, m, self.r) < n * m

    def _largest_useful_rank(self, sites: Sequence[Site]) -> int:
        def useful(rank: int) -> bool:
            return any(self.cost(*s.shape, rank) < s.shape[0] * s.shape[1] for s in sites)

        ranks = range(1, max(min(s.shape) for s in sites) + 1)
        return max((r for r in ranks if useful(r)), default=0)
