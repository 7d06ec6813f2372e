"""What methods with a rank share: which matrices they take, and what becomes of the others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

from torch import nn

from peptrain.errors import ConfigError, Unsupported
from peptrain.methods.base import Method, ReparamLinear, Site
from peptrain.rng import Rng
from peptrain.settings import check, of_width

log = logging.getLogger("peptrain")

GROUPS = {
    "attention": ("*attn*", "*attention*"),
    "mlp": ("*mlp*", "*ffn*", "*feed_forward*"),
}
"""Names for the matrices of one kind of block, by what the models call these blocks."""


@dataclass(frozen=True, kw_only=True)
class RankMethod(Method):
    """A method with a rank, and the one rule for which matrices it takes.

    A list of matrices is comma-separated, each item a kind (q, k, v, o, gate, up, down), a block
    (attention, mlp) or a pattern of names ("k_proj", "model.layers.0.*").
    """

    saves: ClassVar[str] = "fewer trainable parameters"
    """What a matrix gets by being adapted, as the errors name it."""

    rank: int | None = of_width(0.25)
    """r, the inner dimension of the two factors. Unset: a quarter of the hidden size."""
    targets: str = ""
    """Matrices that may be adapted: "q,v", "attention", "mlp", or patterns. Unset: all."""
    include: str = ""
    """Matrices to adapt whatever the rule says: kinds, blocks or patterns ("k,*.mlp.*")."""
    exclude: str = ""
    """Matrices to leave dense: kinds, blocks or patterns."""
    train_rest: bool = True
    """Whether all that is not adapted trains too, embeddings and norms among it. False is for
    fine-tuning a model that --init-from gave."""

    def __post_init__(self) -> None:
        check(self.rank is None or self.rank >= 1, "method.rank", self.rank, "1 or more")

    @property
    def r(self) -> int:
        """The rank, once it is resolved."""
        if self.rank is None:
            raise ConfigError("method.rank: unset; give a rank of 1 or more")
        return self.rank

    def layer(self, site: Site, rng: Rng) -> ReparamLinear:
        """What replaces an adapted matrix."""
        raise NotImplementedError

    def cost(self, n: int, m: int, rank: int) -> int:
        """Trainable parameters of an adapted n x m matrix, whose n m it would have dense."""
        return rank * (n + m)

    def install(self, model: nn.Module, sites: Sequence[Site], rng: Rng, phase: int) -> None:
        chosen = self.chosen(sites)
        self._say_what_stays_dense(chosen, sites)
        if not self.train_rest:
            model.requires_grad_(False)
        for site in chosen:
            site.replace(self.layer(site, rng))

    def chosen(self, sites: Sequence[Site]) -> list[Site]:
        """The sites to adapt: those whose `cost` is below n m (methods' one rule).

        Raises Unsupported without any eligible layer, ConfigError when the rule takes none.
        """
        if not sites:
            raise Unsupported("the model has no nn.Linear inside its decoder layers to adapt")
        names = ", ".join(sorted({_leaf(site) for site in sites}))
        for key in ("targets", "include", "exclude"):
            for item in _split(getattr(self, key)):
                found = any(_matches(site, item) for site in sites)
                wanted = f"a kind, block or pattern that matches some matrix; these end in {names}"
                check(found, f"method.{key}", item, wanted)
        open_to = [site for site in sites if self._may_take(site)]
        if not open_to:
            raise ConfigError(f"method.exclude: {self.exclude!r} leaves no matrix to adapt")
        taken = [site for site in open_to if self._takes(site)]
        if not taken:
            raise ConfigError(
                f"method.rank: at {self.r} no matrix gets {self.saves}; the largest useful"
                f" rank of this model is {self._largest_useful_rank(open_to)}"
            )
        return taken

    def _say_what_stays_dense(self, taken: Sequence[Site], sites: Sequence[Site]) -> None:
        if len(taken) < len(sites):
            dense = sorted({_leaf(s) for s in sites} - {_leaf(s) for s in taken})
            log.info("%s: %d of %d matrices adapted; dense and %s: %s", self.name, len(taken),
                     len(sites), "trainable" if self.train_rest else "frozen",
                     ", ".join(dense) or "some")  # fmt: skip

    def _may_take(self, site: Site) -> bool:
        if _matches(site, self.exclude):
            return False
        return not _split(self.targets) or _matches(site, f"{self.targets},{self.include}")

    def _takes(self, site: Site) -> bool:
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


def _matches(site: Site, listed: str) -> bool:
    return any(_is(site, item) for item in _split(listed))


def _is(site: Site, item: str) -> bool:
    """Whether the item of a list names this matrix."""
    if item in GROUPS:
        return any(fnmatchcase(site.name, pattern) for pattern in GROUPS[item])
    leaf = _leaf(site)
    return leaf == f"{item}_proj" or fnmatchcase(leaf, item) or fnmatchcase(site.name, item)
