"""Select the matrices that a method adapts, and freeze or train the others."""

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
"""Patterns for the matrices of one kind of block, from the names models give these blocks."""


@dataclass(frozen=True, kw_only=True)
class TargetedMethod(Method):
    """A method that replaces selected matrices.

    A list of matrices is comma-separated. Each item is a kind (q, k, v, o, gate, up, down), a block
    (attention, mlp) or a name pattern ("k_proj", "model.layers.0.*").
    """

    targets: str = ""
    """Matrices that may be adapted: "q,v", "attention", "mlp", or patterns. Unset: all."""
    include: str = ""
    """Matrices to adapt even if that saves nothing: kinds, blocks or patterns ("k,*.mlp.*")."""
    exclude: str = ""
    """Matrices to leave dense: kinds, blocks or patterns."""
    train_rest: bool = True
    """Whether everything that is not adapted trains too, including embeddings and norms. Use false
    to fine-tune a model given by --init-from."""

    def layer(self, site: Site, rng: Rng) -> ReparamLinear:
        """Return the layer that replaces an adapted matrix."""
        raise NotImplementedError

    def layers(self, sites: Sequence[Site], rng: Rng) -> Iterator[ReparamLinear]:
        """Yield the layers that replace the adapted matrices, in order."""
        return (self.layer(site, rng) for site in sites)

    def worthwhile(self, sites: Sequence[Site]) -> list[Site]:
        """Return the eligible sites where adapting saves parameters. By default that is all of
        them, as for methods that train only vectors. Raises ConfigError if there are none."""
        return list(sites)

    def install(self, model: nn.Module, sites: Sequence[Site], rng: Rng, phase: int) -> None:
        chosen = self.chosen(sites)
        self._say_what_stays_dense(chosen, sites)
        if not self.train_rest:
            model.requires_grad_(False)
        for site, layer in zip(chosen, self.layers(chosen, rng), strict=True):
            site.replace(layer)

    def chosen(self, sites: Sequence[Site]) -> list[Site]:
        """Return the sites to adapt: the selected ones where that saves trainable parameters.

        Raises Unsupported if the model has no eligible layer, ConfigError if no site is left.
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
    """Return whether a list of matrices includes this site."""
    return any(_is(site, item) for item in _split(listed))


def _leaf(site: Site) -> str:
    return site.name.rpartition(".")[2]


def _split(patterns: str) -> list[str]:
    return [p.strip() for p in patterns.split(",") if p.strip()]


def _is(site: Site, item: str) -> bool:
    """Return whether one item of a list matches this site."""
    if item in GROUPS:
        return any(fnmatchcase(site.name, pattern) for pattern in GROUPS[item])
    leaf = _leaf(site)
    return leaf == f"{item}_proj" or fnmatchcase(leaf, item) or fnmatchcase(site.name, item)
