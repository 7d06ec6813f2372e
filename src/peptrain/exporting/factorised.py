"""Write and load factorised models: a method's own layers as safetensors and JSON."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from peptrain import __version__
from peptrain.errors import CheckpointError, Unsupported
from peptrain.execution.padding import widen_mlps
from peptrain.files import read_json_object
from peptrain.methods import methods
from peptrain.methods.base import Method
from peptrain.methods.lowrank import LowRankLinear
from peptrain.models.auto import FACTORS, load_config, new_model
from peptrain.models.sites import find_sites, reparametrized
from peptrain.rng import Rng
from peptrain.runs.build import Opened
from peptrain.runs.checkpoint import load_model
from peptrain.settings import toml
from peptrain.settings.fields import as_before

CHECKSUMS = "sha256"
RECIPE = "peptrain.json"
SUMMED = ("config.json", FACTORS)


def write_factorised(opened: Opened, out: Path) -> PreTrainedModel:
    """Write the layers of a run unchanged to `out`. Return the model as read back from there.

    Raises Unsupported for a method that has a dense equivalent but is not W = B A.
    """
    layers, method = list(reparametrized(opened.model)), opened.config.method
    factored = layers and all(isinstance(layer, LowRankLinear) for layer in layers)
    if method.has_dense_equivalent and not factored:
        why = "is not of the form W = B A"
        if kept := method.needs_weights:
            why = f"with {kept} keeps W beside its factors, so that these alone are no model"
        raise Unsupported(f"--form factorised: {method.name} {why}; use --form dense")
    opened.model.config.save_pretrained(out)
    tensors = {name: p.detach().contiguous() for name, p in opened.model.named_parameters()}
    save_file(tensors, out / FACTORS, {"format": "pt"})
    made = {"phase": opened.saved.phase, "seed": opened.config.train.seed}
    recipe = {"peptrain": __version__, "method": {"name": method.name} | _set(method), **made}
    sums = {RECIPE: _of_recipe(recipe), **{name: _of_file(out / name) for name in SUMMED}}
    text = json.dumps({**recipe, CHECKSUMS: sums}, indent=1) + "\n"
    (out / RECIPE).write_text(text, encoding="utf-8")
    return _read_factorised(out)[0]


def _of_file(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _of_recipe(recipe: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def _verify(path: Path, recipe: dict[str, Any]) -> None:
    """Remove the checksums from `recipe`. Raise ValueError for a file that differs from its own."""
    sums = recipe.pop(CHECKSUMS, {})  # absent in 0.1.0
    found = {RECIPE: _of_recipe(recipe), **{name: _of_file(path / name) for name in SUMMED}}
    for name in sums and found:
        if found[name] != sums.get(name):
            raise ValueError(f"{name}: differs from what was exported")


def _set(method: Method) -> dict[str, Any]:
    set_to = ((f.name, getattr(method, f.name)) for f in fields(method))
    return {name: value for name, value in set_to if value is not None}


def load_factorised(path: Path) -> PreTrainedModel:
    """Load the small model that `export(..., form="factorised")` wrote, ready for `generate`.

    MLPs of unaligned width are padded with zeros to the next multiple of 64, which is faster on a
    GPU. Only safetensors and JSON are read. Raises CheckpointError if `path` is not such a model.
    """
    model, method = _read_factorised(Path(path))
    widen_mlps(model)
    if find_spec("triton"):
        method.fuse(model)
    return model


def _read_factorised(path: Path) -> tuple[PreTrainedModel, Method]:
    """Load the model as it was written, without padding or fused kernels."""
    if not (path / RECIPE).is_file():
        raise CheckpointError(
            f"{path}: {RECIPE} is missing, so this is not a factorised model;"
            " create one with `peptrain export RUN --form factorised`"
        )
    try:
        recipe = read_json_object(path / RECIPE)
        _verify(path, recipe)
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
    except (
        OSError, ValueError, KeyError, TypeError, SafetensorError, StrictDataclassError
    ) as error:  # fmt: skip
        raise CheckpointError(f"{path}: can't be read: {error}; export it again") from error
    rng, phase = Rng(recipe.get("seed", 0)), recipe.get("phase", 0)  # missing in files of 0.1.0
    method.install(model, find_sites(model), rng, phase)
    load_model(model, tensors)
    model.eval()
    return model, method
