"""Select the matrices that a method adapts, and freeze or train the others."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from peptrain.errors import ConfigError, Unsupported
from peptrain.methods.base import Method
from peptrain.models.named import is_named, items, leaf, named_parameters
from peptrain.models.sites import ReparamLinear, Site
from peptrain.rng import Rng
from peptrain.settings.fields import added, check, unless

log = logging.getLogger("peptrain")


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
    train_rest: bool | None = unless("train", True)
    """Whether everything that is not adapted trains too, including embeddings and norms. Use false
    to fine-tune a model given by --init-from. Unset: true, or what method.train names."""
    train: str = added("", before="")
    """What else trains, all the rest being frozen: norm, bias, embedding, head (or classifier), and
    blocks or patterns of modules ("norm,classifier"). Unset: what train_rest says."""

    def __post_init__(self) -> None:
        if items(self.train) and self.train_rest is not None:
            given = str(self.train_rest).lower()
            raise ConfigError(
                f"method.train_rest: {given} can't be combined with method.train {self.train!r},"
                " which says what else trains; leave out one of the two"
            )

    @property
    def freezes(self) -> bool:
        """Whether anything besides the adapted matrices is frozen."""
        return self.train_rest is False or bool(items(self.train))

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
        self.freeze(model, chosen)
        self._say_what_stays_dense(chosen, sites)
        for site, layer in zip(chosen, self.layers(chosen, rng), strict=True):
            site.replace(layer)

    def freeze(self, model: nn.Module, chosen: Sequence[Site]) -> None:
        """Freeze all but what trains besides the method's own parameters, if anything is frozen.

        `chosen` are the sites to adapt, whose matrices no item of `train` means. Raises ConfigError
        for an item that names nothing.
        """
        if self.freezes:
            adapted = [site.linear.weight for site in chosen]
            trained = named_parameters(model, self.train, "method.train", adapted)
            model.requires_grad_(False)
            for p in trained:
                p.requires_grad_(True)

    def chosen(self, sites: Sequence[Site]) -> list[Site]:
        """Return the sites to adapt: the selected ones where that saves trainable parameters.

        Raises Unsupported if the model has no eligible layer, ConfigError if no site is left.
        """
        if not sites:
            raise Unsupported("the model has no nn.Linear inside its decoder layers to adapt")
        names = ", ".join(sorted({leaf(site.name) for site in sites}))
        for key in ("targets", "include", "exclude"):
            for item in items(getattr(self, key)):
                found = any(matches(site, item) for site in sites)
                wanted = f"a kind, block or pattern that matches a matrix; names end in {names}"
                check(found, f"method.{key}", item, wanted)
        open_to = [site for site in sites if self._may_take(site)]
        if not open_to:
            raise ConfigError(f"method.exclude: {self.exclude!r} leaves no matrix to adapt")
        return self.worthwhile(open_to)

    def _say_what_stays_dense(self, taken: Sequence[Site], sites: Sequence[Site]) -> None:
        if len(taken) < len(sites):
            names = {s.name for s in taken}
            trained = [s.linear.weight.requires_grad for s in sites if s.name not in names]
            words = "trainable" if all(trained) else "partly frozen" if any(trained) else "frozen"
            dense = sorted({leaf(s.name) for s in sites} - {leaf(s.name) for s in taken})
            log.info("%s: %d of %d matrices adapted; dense and %s: %s", self.name, len(taken),
                     len(sites), words, ", ".join(dense) or "some")  # fmt: skip

    def _may_take(self, site: Site) -> bool:
        if matches(site, self.exclude):
            return False
        return not items(self.targets) or matches(site, f"{self.targets},{self.include}")


def matches(site: Site, listed: str) -> bool:
    """Return whether a list of matrices includes this site."""
    return any(is_named(site.name, item) for item in items(listed))
