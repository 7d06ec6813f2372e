"""Causal language models whose matrices are two nn.Linear, with torch and transformers alone.

FactorisedLlamaForCausalLM is transformers' LlamaForCausalLM in which each matrix that `ranks` of
config.json names computes y = B f(A x) + bias. A [r, in] and B [out, r] are plain nn.Linear, called
`q_proj.A` and `q_proj.B`. f is `factor_activation`, or the identity if that is null. The same holds
for any other family of transformers: its classes are made when they are first asked for.

`AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)` runs this file, and
`save_pretrained` copies it.
"""

import re
from collections import OrderedDict
from typing import Any, ClassVar

import transformers
from torch import nn
from transformers.activations import ACT2FN

PREFIX = "Factorised"


def every_layer(name: str) -> str:
    """Return "layers.*.mlp.up_proj" for "layers.3.mlp.up_proj"."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


class FactorisedConfig:
    """What the configuration of a factorised model has besides its family's settings."""

    ranks: ClassVar[dict[str, int]] = {}
    """r by the matrix's name in the base model, or in every layer: "layers.*.mlp.up_proj"."""
    factor_activation: ClassVar[str | None] = None
    """f by its name in transformers, such as "silu"."""

    @property
    def base_model_tp_plan(self) -> dict[str, str] | None:
        """Shard B where the family shards the rows of W, and A where it shards the columns."""
        plan: dict[str, str] = super().base_model_tp_plan or {}  # type: ignore[misc]
        if any(every_layer(name) in plan and name not in plan for name in self.ranks):
            return None  # one matrix is factorised in some layers only
        return {
            f"{name}.{'A' if 'rowwise' in how else 'B'}" if name in self.ranks else name: how
            for name, how in plan.items()
        }


class FactorisedModel:
    """What replaces the matrices of a model when it is built."""

    def __init__(self, config: Any, *args: Any, **settings: Any) -> None:
        super().__init__(config, *args, **settings)  # type: ignore[call-arg]
        factorise(self.base_model, config.ranks, config.factor_activation)  # type: ignore[attr-defined]


def factorise(model: nn.Module, ranks: dict[str, int], activation: str | None) -> None:
    """Replace each nn.Linear that `ranks` names by A, the activation if any, and B.

    Raises ValueError for a name in `ranks` that no nn.Linear has, and for impossible values.
    """
    if not isinstance(ranks, dict) or not ranks:
        raise ValueError(f"ranks: must be an object with r by the matrix's name (got {ranks!r})")
    for name, r in ranks.items():
        if type(r) is not int or r < 1:
            raise ValueError(f"ranks: {name!r} must have an integer >= 1 (got {r!r})")
    if activation is not None and activation not in list(ACT2FN):
        raise ValueError(f"factor_activation: transformers has no {activation!r}")
    found = set()
    for name, linear in list(model.named_modules()):
        key = name if name in ranks else every_layer(name)
        if key not in ranks or not isinstance(linear, nn.Linear):
            continue
        found.add(key)
        like: Any = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        parts = OrderedDict[str, nn.Module]()
        parts["A"] = nn.Linear(linear.in_features, ranks[key], bias=False, **like)
        if activation is not None:
            parts["f"] = ACT2FN[activation]
        parts["B"] = nn.Linear(ranks[key], linear.out_features, linear.bias is not None, **like)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Sequential(parts))
    if lacking := sorted(ranks.keys() - found):
        raise ValueError(f"ranks: {type(model).__name__} has no nn.Linear {lacking[0]!r}")


def __getattr__(name: str) -> Any:
    """Make FactorisedX of the class X of transformers: a configuration, or a model."""
    of = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if not isinstance(of, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    inside: dict[str, Any] = {"__module__": __name__, "__doc__": of.__doc__}
    if issubclass(of, transformers.PretrainedConfig):
        # A model_type of its own: with the family's, transformers without this file would build
        # the dense model, find no weights for its matrices and go on with random ones.
        inside["model_type"] = f"peptrain_{of.model_type}"
        made: Any = type(name, (FactorisedConfig, of), inside)
        made.register_for_auto_class()
    else:
        own: Any = of
        config = PREFIX + own.config_class.__name__
        inside["config_class"] = globals().get(config) or __getattr__(config)
        made = type(name, (FactorisedModel, of), inside)
        made.register_for_auto_class("AutoModelForCausalLM" if "Causal" in name else "AutoModel")
    globals()[name] = made
    return made
