"""Base class of methods with a rank: its default, and the rule which matrices are adapted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from peptrain.errors import ConfigError
from peptrain.methods.targets import TargetedMethod, matches
from peptrain.models.named import BLOCKS, is_named, items, leaf
from peptrain.models.sites import Site
from peptrain.settings.fields import added, check, check_whole, essential, nearest, of_width


@dataclass(frozen=True, kw_only=True)
class RankMethod(TargetedMethod):
    """A method with a rank that adapts the matrices whose `cost` is below n m."""

    saves: ClassVar[str] = "parameters"
    """What adapting a matrix saves, as named in errors: trainable parameters, by default."""

    rank: int | None = essential(of_width(0.25))
    """r, the inner dimension of the two factors. Unset: a quarter of the hidden size."""
    ranks: str | None = added(None, before=None)
    """Ranks of some matrices in place of rank, by kinds, blocks or patterns as in targets:
    "q=64,mlp=128". Unset: all have method.rank."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("method.rank", self.rank, 1)
        if self.ranks is not None:
            parsed(self.ranks)

    @property
    def r(self) -> int:
        """Return the resolved rank, the same in all matrices.

        Raises ConfigError with `ranks`, which a method that reads this does not know of.
        """
        if self.ranks is not None:
            raise ConfigError(
                f"method.ranks: {self.name} has one rank for all matrices (got {self.ranks!r});"
                " leave it out, or let the method use `rank_of`"
            )
        return self._rank

    @property
    def _rank(self) -> int:
        if self.rank is None:
            raise ConfigError("method.rank: must be set to a rank >= 1 (got None)")
        return self.rank

    def rank_of(self, name: str) -> int:
        """Return the rank of the matrix with this name, such as "model.layers.0.mlp.up_proj"."""
        own = (r for item, r in self._own.items() if is_named(name, item))
        return next(own, self._rank)

    @property
    def _own(self) -> dict[str, int]:
        return {} if self.ranks is None else parsed(self.ranks)

    def cost(self, n: int, m: int, rank: int) -> int:
        """Return the trainable parameters of an adapted n x m matrix, which has n m when dense."""
        return rank * (n + m)

    def chosen(self, sites: Sequence[Site]) -> list[Site]:
        for item in self._own if sites else ():
            if not any(is_named(site.name, item) for site in sites):
                leaves = sorted({leaf(site.name) for site in sites})
                kinds = [name.removesuffix("_proj") for name in leaves]
                raise ConfigError(
                    f"method.ranks: {item!r} matches no matrix;"
                    f" {nearest(item, [*kinds, *BLOCKS, *leaves])}give a kind, block or pattern;"
                    f" names end in {', '.join(leaves)}"
                )
        return super().chosen(sites)

    def worthwhile(self, sites: Sequence[Site]) -> list[Site]:
        self._check_ranks(sites)
        taken = [site for site in sites if self._takes(site)]
        if not taken:
            raise ConfigError(f"method.rank: rank {self._rank} {self._saves_nothing(sites)}")
        return taken

    def _check_ranks(self, sites: Sequence[Site]) -> None:
        """Raise ConfigError for an item of `ranks` that means none of the `sites`, which may be
        adapted, one that another means too, or one whose rank is too large."""
        for item, r in self._own.items():
            named = [site for site in sites if is_named(site.name, item)]
            if not named:
                raise ConfigError(
                    f"method.ranks: {item}={r} is of matrices that method.targets or method.exclude"
                    " leaves dense; leave out one of the two"
                )
            for other in self._own:
                both = [site.name for site in named if is_named(site.name, other)]
                if other != item and both:
                    raise ConfigError(
                        f"method.ranks: {item!r} and {other!r} both give {both[0]} a rank; give"
                        " each matrix one"
                    )
            taken = [site for site in named if self._takes(site)]
            if not taken:
                raise ConfigError(f"method.ranks: {item}={r} {self._saves_nothing(named)}")
            for site in taken:
                (n, m), key = site.shape, f"method.ranks: {item}"
                check(r <= min(n, m), key, r, f"<= {min(n, m)}, since {site.name} is {n} x {m}")

    def _takes(self, site: Site) -> bool:
        n, m = site.shape
        return matches(site, self.include) or self.cost(n, m, self.rank_of(site.name)) < n * m

    def _saves_nothing(self, sites: Sequence[Site]) -> str:
        largest = self._largest_useful_rank(sites)
        hint = f"the largest useful rank is {largest}" if largest else "no rank does"
        return f"saves no {self.saves} in any matrix; {hint}"

    def _largest_useful_rank(self, sites: Sequence[Site]) -> int:
        """Return the largest rank at which `cost` is below n m for any of the sites, 0 if none."""

        def useful(rank: int) -> bool:
            return any(self.cost(*s.shape, rank) < s.shape[0] * s.shape[1] for s in sites)

        ranks = range(1, max(min(s.shape) for s in sites) + 1)
        return max((r for r in ranks if useful(r)), default=0)


def parsed(ranks: str) -> dict[str, int]:
    """Return the ranks in a list such as "q=64,mlp=128" by their items.

    Raises ConfigError unless each item is given once, with a whole number >= 1.
    """
    wanted = "a list such as q=64,mlp=128"
    check(bool(items(ranks)), "method.ranks", ranks, wanted)
    found: dict[str, int] = {}
    for part in items(ranks):
        item, equals, number = (text.strip() for text in part.partition("="))
        check(bool(item and equals), "method.ranks", part, wanted)
        key = f"method.ranks: {item}"
        check(re.fullmatch(r"[+-]?[0-9]{1,20}", number) is not None, key, number, "a whole number")
        check_whole(key, int(number), 1)
        check(item not in found, key, ranks, "given once")
        found[item] = int(number)
    return found
