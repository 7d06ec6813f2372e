"""Export adapters around an unchanged base model in the format of the package PEFT."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from peptrain.config import RunConfig
from peptrain.errors import CheckpointError, PeptrainError, Unsupported
from peptrain.exporting.card import Loading, base_of, describe, in_markdown, metadata
from peptrain.files import read_json_object
from peptrain.methods.base import Method
from peptrain.methods.dora import DoRALinear
from peptrain.methods.lora import LoRA, LoRALinear
from peptrain.methods.vera import VeRALinear
from peptrain.models.auto import load_model
from peptrain.models.hf import dtype_of, hf_config
from peptrain.models.named import HEADS, leaf
from peptrain.models.sites import ReparamLinear, reparametrized
from peptrain.runs.build import Opened, open_run, plain_model
from peptrain.runs.init_from import is_run
from peptrain.runs.select import at

KINDS = (LoRALinear, DoRALinear, VeRALinear)
NAMES = {
    **{"weight": "base_layer.weight", "bias": "base_layer.bias"},
    **{"A": "lora_A.default.weight", "B": "lora_B.default.weight"},
    "m": "lora_magnitude_vector.default.weight",
    **{"lambda_d": "vera_lambda_d.default", "lambda_b": "vera_lambda_b.default"},
}
"""PEFT's names of a layer's parameters. A trained s is in its configuration (alpha_pattern), and
VeRA's A and B are buffers of the model."""


def load_peft(config: RunConfig[Method]) -> Loading:
    """Return how PEFT loads the adapter onto the base model."""
    assert config.train.precision is not None
    dtype = str(dtype_of(config.train.precision)).removeprefix("torch.")
    loader, more = "AutoModelForCausalLM", f", dtype={dtype!r}"
    if config.tune.task:
        loader = "AutoModelForSeq2SeqLM"
        if not hf_config(config.model, config.train.seq_len).is_encoder_decoder:
            loader = "AutoModelForSequenceClassification"
            labels = max(1, len(config.tune.classes))
            more += f", num_labels={labels}, pad_token_id={config.tune.pad_token}"
    base = f"transformers.{loader}.from_pretrained(BASE{more})"
    named = f" `{in_markdown(base_of(at(config.init_from)[0]))}`" if config.init_from else ""
    note = (
        f"`BASE` is the directory or the name on the hub of the base model{named}, without which"
        " the adapter is nothing. In training it had this dtype."
    )
    return Loading("peft", "import peft", f"peft.PeftModel.from_pretrained({base}, DIR)", note=note)


def check_peft(opened: Opened) -> None:
    """Raise Unsupported, with the reason, for a run that is no adapter around a base model."""
    method = opened.config.method
    if method.merges:
        raise Unsupported(f"{method.name} merges into W, which is then not the base model's")
    layers = list(reparametrized(opened.model))
    if not layers or any(type(layer) not in KINDS for layer in layers):
        raise Unsupported(f"PEFT has no adapter like {method.name}; it has lora, dora and vera")
    if isinstance(method, LoRA) and method.warm:
        raise Unsupported(f"W was trained too, in method.warm_start_steps = {method.warm}")
    if opened.config.init_from is None:
        raise Unsupported("the run has no base model, since it was not started with --init-from")


def write_peft(opened: Opened, out: Path) -> PreTrainedModel:
    """Write the adapter by PEFT itself. Return the base model with it, as PEFT loads it.

    Raises PeptrainError without the package peft, and Unsupported where the base model's weights
    are not those that the run started from, or where something was trained that PEFT can't save.
    """
    try:
        import peft
    except ImportError as error:
        raise PeptrainError(
            "--form peft: needs the package peft; install it with pip install 'peptrain[peft]'"
        ) from error
    base = _base(opened)
    settings = _settings(opened, base)
    base.name_or_path = settings.base_model_name_or_path  # or PEFT would write the path
    with torch.random.fork_rng(devices=[]):  # it draws its own factors first
        made = peft.get_peft_model(base, settings)
    with torch.no_grad():
        own = dict(made.get_base_model().named_parameters())
        for name, tensor in peft_tensors(opened.model, made.get_base_model()).items():
            own[name].copy_(tensor)
        for layer in reparametrized(opened.model):
            if isinstance(layer, VeRALinear):
                made.base_model.vera_A["default"].copy_(layer.A)
                made.base_model.vera_B["default"].copy_(layer.B)
                break  # all layers share them
    made.save_pretrained(out, save_embedding_layers=False)
    _sort_modules(out / "adapter_config.json")
    describe(out / "adapter_model.safetensors", metadata(opened))
    read = peft.PeftModel.from_pretrained(_base(opened), out)
    model: Any = read.get_base_model()
    model.eval()
    return model  # type: ignore[no-any-return]


def _sort_modules(file: Path) -> None:
    """Put names of modules in order, each once. PEFT writes a set, in another order every time."""
    found = read_json_object(file)
    for key in ("target_modules", "modules_to_save"):
        found[key] = found[key] and sorted(set(found[key]))
    file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def peft_tensors(model: PreTrainedModel, written: PreTrainedModel) -> Mapping[str, Tensor]:
    """Return the run's parameters by the names that they have in a model with PEFT's layers."""
    from peft.utils import ModulesToSaveWrapper

    copies = [
        n for n, module in written.named_modules() if isinstance(module, ModulesToSaveWrapper)
    ]
    layers = {layer.site for layer in reparametrized(model)}
    named = dict(written.named_parameters())
    found = {name: p for name, p in named.items() if ".original_module." in name}  # the base's
    for name, p in model.named_parameters():
        site, _, own = name.rpartition(".")
        copy = next((n for n in copies if name.startswith(f"{n}.")), None)
        if site in layers:
            name = f"{site}.{NAMES.get(own, own)}"
        elif copy is not None:
            name = f"{copy}.modules_to_save.default.{name.removeprefix(f'{copy}.')}"
        if name in named:
            found[name] = p
    return found


@torch.no_grad()
def _base(opened: Opened) -> PreTrainedModel:
    """Return the base model, in the run's dtype, with a new head if the run is a classifier.

    Raises CheckpointError if it can't be read.
    """
    config = opened.config
    path, precision = config.init_from, config.train.precision
    assert path is not None and precision is not None
    if not is_run(path):
        wanted = opened.model.config if config.tune.task else None
        try:
            with torch.random.fork_rng(devices=[]):
                return load_model(path, dtype_of(precision), wanted)[0]
        except (OSError, ValueError, RuntimeError, SafetensorError, Unsupported) as error:
            raise CheckpointError(
                f"init_from: {path} can't be read: {error}; restore the base model"
            ) from error
    base = plain_model(config)
    given = dict(open_run(path).dense_twin().named_parameters())
    for name, p in base.named_parameters():
        if name in given and given[name].shape == p.shape:
            p.copy_(given[name])
    return base


def _settings(opened: Opened, base: PreTrainedModel) -> Any:
    """Return PEFT's configuration of the adapter."""
    import peft

    layers = list(reparametrized(opened.model))
    first, path = layers[0], opened.config.init_from
    assert path is not None
    kind = "CAUSAL_LM"
    if opened.config.tune.task:
        kind = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "SEQ_CLS"
    given: dict[str, Any] = {
        "r": len(first.A),  # type: ignore[arg-type]
        "target_modules": _targets(layers, base),
        "modules_to_save": _also_trained(opened.model, base) or None,
        "base_model_name_or_path": base_of(at(path)[0]),
        "task_type": kind,
        "inference_mode": True,
    }
    if isinstance(first, VeRALinear):
        return peft.VeraConfig(**given, save_projection=True)
    assert isinstance(first, LoRALinear)
    ranks = {x.site: len(x.A) for x in layers if isinstance(x, LoRALinear)
             and len(x.A) != len(first.A)}  # fmt: skip
    scales = {x.site: x.s.item() * len(x.A) for x in layers if isinstance(x, LoRALinear)
              and x.s is not None}  # fmt: skip
    given |= {"lora_alpha": first.alpha, "lora_dropout": first.dropout}
    given |= {"rank_pattern": ranks, "alpha_pattern": scales}
    return peft.LoraConfig(**given, use_dora=isinstance(first, DoRALinear))


def _targets(layers: list[ReparamLinear], base: PreTrainedModel) -> list[str]:
    """Return the adapted modules: by kind, such as q_proj, if all of a kind are, else by name."""
    adapted = {layer.site for layer in layers}
    kinds = {leaf(site) for site in adapted}
    all_of_them = {name for name, _ in base.named_modules() if leaf(name) in kinds}
    return sorted(kinds if all_of_them == adapted else adapted)


def _also_trained(model: PreTrainedModel, base: PreTrainedModel) -> list[str]:
    """Return the modules besides the adapted matrices that differ from the base model's.

    Raises Unsupported for those of which PEFT can't save a copy.
    """
    layers = {layer.site for layer in reparametrized(model)}
    theirs = dict(base.named_parameters())
    return list(dict.fromkeys(_changed(model, theirs, layers)))


def _changed(
    model: PreTrainedModel, theirs: Mapping[str, Tensor], layers: set[str]
) -> Iterator[str]:
    tied = model.config.tie_word_embeddings and model.get_input_embeddings()
    for name, p in model.named_parameters():
        module, _, own = name.rpartition(".")
        has = theirs.get(name)
        if (module in layers and own not in ("weight", "bias")) or (
            has is not None and has.shape == p.shape and torch.equal(has, p.to(has.dtype))
        ):
            continue
        if module in layers:
            raise Unsupported(
                f"--form peft: {name} differs from the base model's, of which the adapter has no"
                " copy: the base model was changed, or biases were trained; use --form dense"
            )
        if tied and p is tied.weight:
            raise Unsupported(
                f"--form peft: {name} was trained and is the head too, which PEFT would save apart;"
                " use --form dense, or train with --method.train-rest false"
            )
        first = name.partition(".")[0]
        yield first if first in HEADS else module  # PEFT saves the head of a classifier as one
