"""Choose matrices and parameters of a model by kind, block or name pattern."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from peptrain.errors import ConfigError
from peptrain.settings.fields import nearest

BLOCKS = {
    "attention": ("*attn*", "*attention*"),
    "mlp": ("*mlp*", "*ffn*", "*feed_forward*"),
}
"""Patterns for the modules of one kind of block, from the names models give these blocks."""
KINDS = ("norm", "bias", "embedding", "head", "classifier")
"""Kinds of parameters; head and classifier are the same."""
HEADS = frozenset({"lm_head", "score", "classifier", "head"})
"""Names that models give their output head. It is also found by `get_output_embeddings`."""


def items(listed: str) -> list[str]:
    """Return the items of a comma-separated list."""
    return [item.strip() for item in listed.split(",") if item.strip()]


def leaf(name: str) -> str:
    """Return the last part of a module's name."""
    return name.rpartition(".")[2]


def is_named(name: str, item: str) -> bool:
    """Return whether an item of a list, such as q, mlp or "*.0.*", matches the module `name`."""
    if item in BLOCKS:
        return any(fnmatchcase(name, pattern) for pattern in BLOCKS[item])
    last = leaf(name)
    return last == f"{item}_proj" or fnmatchcase(last, item) or fnmatchcase(name, item)


@dataclass(frozen=True)
class Held:
    """A parameter under one of its names."""

    p: nn.Parameter
    name: str
    """Of the parameter in its module: "weight"."""
    module: nn.Module
    path: str
    """Of the module in the model: "model.layers.0.mlp.up_proj"."""
    in_head: bool

    def is_one_of(self, item: str) -> bool:
        """Return whether an item of a list, a kind or what `is_named` takes, includes it."""
        if item == "norm":
            return "norm" in type(self.module).__name__.lower() and self.p.ndim <= 1
        if item == "bias":
            return self.name.endswith("bias")
        if item == "embedding":
            return isinstance(self.module, nn.Embedding)
        if item in KINDS:
            return self.in_head
        path = self.path
        if item in BLOCKS and self.is_one_of("norm"):  # post_attention_layernorm is outside
            path = path.rpartition(".")[0]
        return is_named(path, item)


def named_parameters(
    model: nn.Module, listed: str, key: str, besides: Collection[Tensor] = ()
) -> list[nn.Parameter]:
    """Return the parameters that a comma-separated list names, except those in `besides`.

    An item is a kind (norm, bias, embedding, head or classifier), or what `is_named` takes, and
    then means all parameters of the modules that it matches. A parameter with several names, such
    as tied embeddings, is included under each. Raises ConfigError, naming the setting `key`, for an
    item that includes none.
    """
    excluded = {id(p) for p in besides}
    held = [h for h in _held(model) if id(h.p) not in excluded]
    chosen = []
    for item in items(listed):
        found = [h.p for h in held if h.is_one_of(item)]
        if not found:
            leaves = sorted({leaf(h.path) for h in held} - {""})
            kinds = [kind for kind in KINDS if any(h.is_one_of(kind) for h in held)]
            raise ConfigError(
                f"{key}: {item!r} names no parameter of the model that the method doesn't adapt;"
                f" {nearest(item, [*kinds, *leaves])}kinds in the model are"
                f" {', '.join(kinds) or 'none'}, names of modules end in {', '.join(leaves)}"
            )
        chosen += found
    return chosen


def of_kind(model: nn.Module, kind: str) -> set[int]:
    """Return the ids of all parameters of a kind (`KINDS`), by any of their names."""
    return {id(h.p) for h in _held(model) if h.is_one_of(kind)}


def _held(model: nn.Module) -> Iterator[Held]:
    output = getattr(model, "get_output_embeddings", lambda: None)()
    heads = set() if output is None else {id(module) for module in output.modules()}
    for path, module in model.named_modules():
        in_head = id(module) in heads or not HEADS.isdisjoint(path.split("."))
        for name, p in module.named_parameters(recurse=False):
            yield Held(p, name, module, path, in_head)
