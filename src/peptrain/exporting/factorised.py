"""Write and load factorised models: each matrix as two nn.Linear, which transformers loads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from fnmatch import fnmatch
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from peptrain import __version__
from peptrain.errors import CheckpointError, Unsupported
from peptrain.execution.padding import widen_mlps
from peptrain.files import read_json_object
from peptrain.methods import methods
from peptrain.methods.base import Method
from peptrain.methods.lowrank import LowRank, LowRankLinear
from peptrain.models import auto
from peptrain.models.auto import FACTORS, load_config, new_model
from peptrain.models.factorised import (
    factorised_config,
    factorised_model,
    is_factorised,
)
from peptrain.models.hf import TOKENIZER_FILES
from peptrain.models.modeling_factorised import every_layer
from peptrain.models.sites import ReparamLinear, find_sites, reparametrized
from peptrain.rng import Rng
from peptrain.runs.build import Opened
from peptrain.runs.checkpoint import load_model
from peptrain.settings import toml
from peptrain.settings.fields import as_before

CHECKSUMS = "sha256"
RECIPE = "peptrain.json"
TOKENIZER = "tokenizer"
"""Key of the recipe: the checksums of the tokenizer's files, which the model does not need."""
SUMMED = ("config.json", "generation_config.json", FACTORS, "model*.safetensors", "model*.json",
          "modeling_*.py")  # fmt: skip


def write_factorised(opened: Opened, out: Path) -> PreTrainedModel:
    """Write a run to `out` with two nn.Linear for each matrix. Return the model as read from there.

    Raises Unsupported for a method whose layers are neither W = B A nor B f(A x) with an
    `activation` f.
    """
    method = opened.config.method
    plain_form(opened.model, method).save_pretrained(out)
    files = [file for name in TOKENIZER_FILES if (file := out / name).is_file()]
    recipe = {
        "peptrain": __version__,
        "method": {"name": method.name} | _set(method),
        TOKENIZER: {file.name: _sum(file.read_bytes()) for file in files},
    }
    text = json.dumps({**recipe, CHECKSUMS: _sums(out, recipe)}, indent=1) + "\n"
    (out / RECIPE).write_text(text, encoding="utf-8")
    return _read(out)


def plain_form(model: PreTrainedModel, method: Method) -> PreTrainedModel:
    """Return `model` in the class that an export has. It shares the tensors.

    Raises what `write_factorised` raises.
    """
    prefix = f"{model.base_model_prefix}."
    layers = {layer.site.removeprefix(prefix): layer for layer in reparametrized(model)}
    ranks = {name: rank for name, layer in layers.items() if (rank := _rank(layer, method))}
    if len(ranks) < max(1, len(layers)):
        raise Unsupported(_why_not(method))
    f = None if method.has_dense_equivalent else method.activation
    config = factorised_config(model.config, ranks, f)
    return factorised_model(model, config, _exported_names(model, model.state_dict()))


def _rank(layer: ReparamLinear, method: Method) -> int:
    """Return r of a layer that two nn.Linear can replace, 0 of any other."""
    if method.has_dense_equivalent:
        return layer.A.shape[0] if isinstance(layer, LowRankLinear) else 0
    own = {name: tuple(p.shape) for name, p in layer.named_parameters() if name != "bias"}
    r = own.get("A", (0,))[0] if method.activation in ACT2FN else 0
    return r if own == {"A": (r, layer.in_features), "B": (layer.out_features, r)} else 0


def _why_not(method: Method) -> str:
    if not method.has_dense_equivalent:
        return (
            f"{method.name}: its layers must be y = B f(A x) + bias with no other parameters, and"
            f" {type(method).__name__}.activation the name of f in transformers, such as 'silu'"
            f" (got {method.activation!r})"
        )
    why = "is not of the form W = B A"
    if kept := method.needs_weights:
        why = f"with {kept} keeps W beside its factors, so that these alone are no model"
    return f"{method.name} {why}"


def _exported_names(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of a model with a method's layers B, A by their names in an export."""
    sites = {layer.site for layer in reparametrized(model)}

    def exported(name: str) -> str:
        site, _, own = name.rpartition(".")
        if site not in sites:
            return name
        return f"{site}.B.bias" if own == "bias" else f"{name}.weight"

    return {exported(name): tensor for name, tensor in tensors.items()}


def own_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the parameters of a run's model by the names that they have in its export."""
    return _exported_names(model, dict(model.named_parameters()))


def _sums(path: Path, recipe: Mapping[str, Any]) -> dict[str, str]:
    """Return the checksums of the recipe and of each file that the model consists of."""
    names = sorted(p.name for p in path.iterdir() if any(fnmatch(p.name, s) for s in SUMMED))
    text = json.dumps(recipe, sort_keys=True).encode()
    return {RECIPE: _sum(text), **{name: _sum((path / name).read_bytes()) for name in names}}


def _sum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _verify(path: Path, recipe: dict[str, Any], *, needed: bool) -> None:
    """Remove the checksums from `recipe`. Raise ValueError for a file that differs from its own."""
    sums = recipe.pop(CHECKSUMS, {})  # absent in 0.1.0
    if not isinstance(sums, dict) or (needed and not sums):
        raise ValueError(f"{RECIPE}: has no checksums ({CHECKSUMS!r})")
    found = _sums(path, recipe) if sums else {}
    for name in sorted(sums.keys() | found.keys()):
        if found.get(name) != sums.get(name):
            raise ValueError(f"{name}: differs from what was exported")


def check_tokenizer(path: Path) -> None:
    """Raise CheckpointError if the tokenizer of a factorised export is not as it was written.

    Files may be added. Without a recipe, or with one of an earlier version, nothing is compared.
    """
    written = read_json_object(path / RECIPE).get(TOKENIZER) if (path / RECIPE).exists() else None
    for name, expected in written.items() if isinstance(written, dict) else ():
        if name not in TOKENIZER_FILES:
            continue
        file = path / name
        if not file.is_file() or _sum(file.read_bytes()) != expected:
            raise CheckpointError(
                f"{path}: {name}: differs from what was exported; export it again"
            )


def _set(method: Method) -> dict[str, Any]:
    set_to = ((f.name, getattr(method, f.name)) for f in fields(method))
    return {name: value for name, value in set_to if value is not None}


def holds_factors(path: Path) -> bool:
    """Return whether `path` is a factorised export, of this or an older version.

    A config.json that can't be read is none: whoever loads the model names what is wrong with it.
    """
    try:
        return (path / FACTORS).is_file() or is_factorised(path)
    except (OSError, ValueError):
        return False


def load_factorised(path: Path) -> PreTrainedModel:
    """Load the small model that `export(..., form="factorised")` wrote, ready for `generate`.

    It computes what `AutoModelForCausalLM.from_pretrained` loads, with fused layers on a GPU, and
    with MLPs of unaligned width padded with zeros to the next multiple of 64. `save_pretrained`
    writes it without them, as it was exported. Only safetensors and JSON are read. Raises
    CheckpointError if `path` is not such a model.
    """
    model = _read(Path(path))
    _unite(model)
    widen_mlps(model)
    if find_spec("triton"):
        getattr(model, METHOD, LowRank()).fuse(model)
    cls: Any = type(model)
    model.__class__ = _saving(cls)
    return model


METHOD = "peptrain_method"
"""Attribute of a model of an older version whose layers have no other form than the method's."""


def _unite(model: PreTrainedModel) -> None:
    """Turn each pair of nn.Linear that is W = B A into one layer, which kernels can fuse."""
    ranks = getattr(model.config, "ranks", {})
    if getattr(model.config, "factor_activation", None) is not None:
        return
    base = model.base_model
    for name, pair in list(base.named_modules()):
        if name in ranks or every_layer(name) in ranks:
            A, B = pair.get_submodule("A"), pair.get_submodule("B")
            site = f"{model.base_model_prefix}.{name}"
            layer = LowRankLinear.of(site, B.weight, A.weight, B.bias)
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, layer.eval())


class _Saving:
    """Mixin for the class of a loaded model: saves it in the form that transformers loads."""

    def save_pretrained(
        self: Any, save_directory: Any, *args: Any, state_dict: Any = None, **settings: Any
    ) -> None:
        """Do as transformers' method. Raises Unsupported for layers that only a method has."""
        if method := getattr(self, METHOD, None):
            raise Unsupported(f"save_pretrained: {_why_not(method)}; copy the directory instead")
        state = self.state_dict() if state_dict is None else state_dict
        plain = factorised_model(self, self.config, _exported_names(self, state))
        plain.save_pretrained(save_directory, *args, **settings)


@cache
def _saving(of: Any) -> Any:
    return type(of.__name__, (_Saving, of), {"__module__": of.__module__})


def _read(path: Path) -> PreTrainedModel:
    """Load the model as it was written, without padding or fused kernels."""
    try:
        old, new = (path / FACTORS).is_file(), any(path.glob("model*.safetensors"))
        if old and new:
            raise CheckpointError(
                f"{path}: contains the weights of two exports, {FACTORS} and model.safetensors;"
                " export the run again to another directory"
            )
        if not (old or is_factorised(path)):
            raise CheckpointError(
                f"{path}: is not a factorised model; create one with `peptrain export RUN --form"
                " factorised`"
            )
        if old or (path / RECIPE).exists():  # not written by save_pretrained
            recipe = read_json_object(path / RECIPE)
            _verify(path, recipe, needed=new)
        if old:
            return _read_old(path, recipe)
        model, report = auto.load_model(path, factorised=True)
        shapes = (name for name, *_ in report["mismatched_keys"])
        if lacking := sorted([*report["missing_keys"], *shapes]):
            raise ValueError(f"{lacking[0]}: not in the weights, or of another shape")
    except (
        OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError,
        StrictDataclassError, Unsupported,
    ) as error:  # fmt: skip
        raise CheckpointError(f"{path}: can't be read: {error}; export it again") from error
    model.eval()
    return model


def _read_old(path: Path, recipe: Mapping[str, Any]) -> PreTrainedModel:
    """Load what older versions wrote: the method's own layers, beside a dense model's config."""
    name, known = recipe["method"].pop("name"), methods()
    if name not in known:
        raise CheckpointError(
            f"{path}: was written by the method {name!r}, which is not installed; install"
            " the package that provides it"
        )
    written = recipe["method"]
    method = as_before(toml.parse(known[name], written, "method."), written)
    tensors = load_file(path / FACTORS)
    model = new_model(load_config(path), next(iter(tensors.values())).dtype)
    rng, phase = Rng(recipe.get("seed", 0)), recipe.get("phase", 0)  # missing in files of 0.1.0
    method.install(model, find_sites(model), rng, phase)
    load_model(model, tensors)
    model.eval()
    try:
        return plain_form(model, method)
    except Unsupported:
        setattr(model, METHOD, method)
        return model
