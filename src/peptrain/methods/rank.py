"""Base class of methods with a rank: its default, and the rule which matrices are adapted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from peptrain.errors import ConfigError
from peptrain.methods.targets import TargetedMethod, matches
from peptrain.models.sites import Site
from peptrain.settings.fields import check_whole, essential, of_width


@dataclass(frozen=True, kw_only=True)
class RankMethod(TargetedMethod):
    """A method with a rank that adapts the matrices whose `cost` is below n m."""

    saves: ClassVar[str] = "parameters"
    """What adapting a matrix saves, as named in errors: trainable parameters, by default."""

    rank: int | None = essential(of_width(0.25))
    """r, the inner dimension of the two factors. Unset: a quarter of the hidden size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("method.rank", self.rank, 1)

    @property
    def r(self) -> int:
        """Return the resolved rank."""
        if self.rank is None:
            raise ConfigError("method.rank: must be set to a rank >= 1 (got None)")
        return self.rank

    def cost(self, n: int, m: int, rank: int) -> int:
        """Return the trainable parameters of an adapted n x m matrix, which has n m when dense."""
        return rank * (n + m)

    def worthwhile(self, sites: Sequence[Site]) -> list[Site]:
        taken = [site for site in sites if self._takes(site)]
        if not taken:
            largest = self._largest_useful_rank(sites)
            hint = f"the largest useful rank is {largest}" if largest else "no rank does"
            raise ConfigError(
                f"method.rank: rank {self.r} saves no {self.saves} in any matrix; {hint}"
            )
        return taken

    def _takes(self, site: Site) -> bool:
        n, m = site.shape
        return matches(site, self.include) or self.cost(n, m, self.r) < n * m

    def _largest_useful_rank(self, sites: Sequence[Site]) -> int:
        """Return the largest rank at which `cost` is below n m for any of the sites, 0 if none."""

        def useful(rank: int) -> bool:
            return any(self.cost(*s.shape, rank) < s.shape[0] * s.shape[1] for s in sites)

        ranks = range(1, max(min(s.shape) for s in sites) + 1)
        return max((r for r in ranks if useful(r)), default=0)
