"""Which matrices a method takes, and what becomes of the others."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from peptrain.errors import ConfigError, Unsupported
from peptrain.methods.base import Method
from peptrain.models.sites import ReparamLinear, Site
from peptrain.rng import Rng
from peptrain.settings.fields import check

log = logging.getLogger("peptrain")

GROUPS = {
    "attention": ("*attn*", "*attention*"),
    "mlp": ("*mlp*", "*ffn*", "*feed_forward*"),
}
"""Names for the matrices of one kind of block, by what the models call these blocks."""


@dataclass(frozen=True, kw_only=True)
class TargetedMethod(Method):
    """A method that replaces matrices of one's choice.

    A list of matrices is comma-separated, each item a kind (q, k, v, o, gate, up, down), a block
    (attention, mlp) or a pattern of names ("k_proj", "model.layers.0.*").
    """

    targets: str = ""
    """Matrices that may be adapted: "q,v", "attention", "mlp", or patterns. Unset: all."""
    include: str = ""
    """Matrices to adapt whatever the rule says: kinds, blocks or patterns ("k,*.mlp.*")."""
    exclude: str = ""
    """Matrices to leave dense: kinds, blocks or patterns."""
    train_rest: bool = True
    """Whether all that is not adapted trains too, embeddings and norms among it. False is for
    fine-tuning a model that --init-from gave."""

    def layer(self, site: Site, rng: Rng) -> ReparamLinear:
        """What replaces an adapted matrix."""
        raise NotImplementedError

    def layers(self, sites: Sequence[Site], rng: Rng) -> Iterator[ReparamLinear]:
        """What replaces the adapted matrices, one after the other."""
        return (self.layer(site, rng) for site in sites)

    def worthwhile(self, sites: Sequence[Site]) -> list[Site]:
        """Those of the eligible sites that get fewer trainable parameters: all, for the methods
        that train vectors alone. Raises ConfigError when there is none."""
        return list(sites)

    def install(self, model: nn.Module, sites: Sequence[Site], rng: Rng, phase: int) -> None:
        chosen = self.chosen(sites)
        self._say_what_stays_dense(chosen, sites)
        if not self.train_rest:
            model.requires_grad_(False)
        for site, layer in zip(chosen, self.layers(chosen, rng), strict=True):
            site.replace(layer)

    def chosen(self, sites: Sequence[Site]) -> list[Site]:
        """The sites to adapt: those whose trainable parameters get fewer (methods' one rule).

        Raises Unsupported without any eligible layer, ConfigError when the rule takes none.
        """
        if not sites:
            raise Unsupported("the model has no nn.Linear inside its decoder layers to adapt")
        names = ", ".join(sorted({_leaf(site) for site in sites}))
        for key in ("targets", "include", "exclude"):
            for item in _split(getattr(self, key)):
                found = any(matches(site, item) for site in sites)
                wanted = f"a kind, block or pattern that matches a matrix; names end in {names}"
                check(found, f"method.{key}", item, wanted)
        open_to = [site for site in sites if self._may_take(site)]
        if not open_to:
            raise ConfigError(f"method.exclude: {self.exclude!r} leaves no matrix to adapt")
        return self.worthwhile(open_to)

    def _say_what_stays_dense(self, taken: Sequence[Site], sites: Sequence[Site]) -> None:
        if len(taken) < len(sites):
            dense = sorted({_leaf(s) for s in sites} - {_leaf(s) for s in taken})
            log.info("%s: %d of %d matrices adapted; dense and %s: %s", self.name, len(taken),
                     len(sites), "trainable" if self.train_rest else "frozen",
                     ", ".join(dense) or "some")  # fmt: skip

    def _may_take(self, site: Site) -> bool:
        if matches(site, self.exclude):
            return False
        return not _split(self.targets) or matches(site, f"{self.targets},{self.include}")


def matches(site: Site, listed: str) -> bool:
    """Whether a list of matrices names this one."""
    return any(_is(site, item) for item in _split(listed))


def _leaf(site: Site) -> str:
    return site.name.rpartition(".")[2]


def _split(patterns: str) -> list[str]:
    return [p.strip() for p in patterns.split(",") if p.strip()]


def _is(site: Site, item: str) -> bool:
    """Whether the item of a list names this matrix."""
    if item in GROUPS:
        return any(fnmatchcase(site.name, pattern) for pattern in GROUPS[item])
    leaf = _leaf(site)
    return leaf == f"{item}_proj" or fnmatchcase(leaf, item) or fnmatchcase(site.name, item)
