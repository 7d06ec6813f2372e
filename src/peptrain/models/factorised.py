"""Factorised models as classes of transformers: their model types, and their form of a model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peptrain.errors import Unsupported
from peptrain.files import read_json_object

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

KIND = "peptrain_"
"""Begins the model_type of a factorised model: "peptrain_llama"."""


def family_of(config: Mapping[str, Any]) -> str | None:
    """Return "llama" for the config.json of a factorised Llama, None for any other model's."""
    kind = config.get("model_type")
    return kind.removeprefix(KIND) if isinstance(kind, str) and kind.startswith(KIND) else None


def is_factorised(directory: Path) -> bool:
    """Return whether the config.json in `directory` is that of a factorised model."""
    return family_of(read_json_object(directory / "config.json")) is not None


@cache
def register(family: str) -> None:
    """Register the factorised form of a model type, such as "llama", with transformers.

    Then `AutoModelForCausalLM` loads it without `trust_remote_code`, by the code of this package.
    Raises Unsupported for a type without a causal LM in transformers.
    """
    import transformers as hf

    from peptrain.models import modeling_factorised as made

    known = family in hf.CONFIG_MAPPING
    config: Any = hf.CONFIG_MAPPING[family] if known else None
    if config not in hf.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise Unsupported(f"model_type {KIND + family!r}: transformers has no causal LM {family!r}")
    own = getattr(made, made.PREFIX + config.__name__)
    hf.AutoConfig.register(own.model_type, own)
    for auto, cls in _classes(config).items():
        getattr(hf, auto).register(own, getattr(made, made.PREFIX + cls.__name__))


def _classes(config: type[PretrainedConfig]) -> dict[str, Any]:
    """Return transformers' causal LM of a family, and the model in it if that has a class."""
    import transformers as hf

    causal: Any = hf.MODEL_FOR_CAUSAL_LM_MAPPING[config]
    inner: Any = hf.MODEL_MAPPING.get(config, None)
    # vLLM builds the inner model, by auto_map's AutoModel.
    whole = getattr(inner, "base_model_prefix", None) == causal.base_model_prefix
    return ({"AutoModel": inner} if whole else {}) | {"AutoModelForCausalLM": causal}


def factorised_config(
    config: PretrainedConfig, ranks: Mapping[str, int], activation: str | None
) -> PretrainedConfig:
    """Return the configuration of the factorised form of a model with `config`.

    ranks: r by the name of each matrix that is W = B A, in the base model.
    """
    from peptrain.models import modeling_factorised as made

    register(config.model_type)
    own: Any = getattr(made, made.PREFIX + type(config).__name__)
    values = config.to_dict()
    for key in ("model_type", "architectures", "transformers_version"):
        values.pop(key, None)
    file = made.__name__.rpartition(".")[2]
    classes = {"AutoConfig": type(config), **_classes(type(config))}
    auto_map = {auto: f"{file}.{made.PREFIX}{cls.__name__}" for auto, cls in classes.items()}
    found: PretrainedConfig = own(
        **values, ranks=_by_layer(ranks, config), factor_activation=activation, auto_map=auto_map
    )
    return found


def _by_layer(ranks: Mapping[str, int], config: PretrainedConfig) -> dict[str, int]:
    """Give a matrix that has one rank in every layer one entry: "layers.*.mlp.up_proj"."""
    from peptrain.models.modeling_factorised import every_layer

    found: dict[str, list[str]] = {}
    for name in ranks:
        found.setdefault(every_layer(name), []).append(name)
    kept: dict[str, int] = {}
    for every, names in found.items():
        alike = len(names) == config.get_text_config().num_hidden_layers
        if alike and len({ranks[name] for name in names}) == 1:
            kept[every] = ranks[names[0]]
        else:
            kept |= {name: ranks[name] for name in names}
    return kept


def factorised_model(
    model: PreTrainedModel, config: PretrainedConfig, state: Mapping[str, Tensor]
) -> PreTrainedModel:
    """Return the factorised model with the tensors `state`, and the other buffers of `model`.

    Tensors are shared, not copied. One that is larger than its place loses what is beyond it, the
    zeros of a padded MLP.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    cls: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        made: PreTrainedModel = cls(config)
    places = made.state_dict()
    fitting = {
        name: t[tuple(map(slice, places[name].shape))] if name in places else t
        for name, t in state.items()
    }
    made.load_state_dict(fitting, assign=True)
    for name, buffer in model.named_buffers():
        parent, _, own = name.rpartition(".")
        made.get_submodule(parent).register_buffer(own, buffer, persistent=name in places)
    made.tie_weights()
    made.generation_config = model.generation_config
    made.eval()
    return made
