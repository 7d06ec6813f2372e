"""Read Hugging Face directories, also a stranger's: data only, and never code that lies in them.

transformers is called through these functions alone.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor

from peptrain.errors import DataError, PeptrainError, Unsupported
from peptrain.files import read_json_object
from peptrain.models.factorised import family_of, register
from peptrain.models.probe import leave_dense
from peptrain.settings.fields import shown

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger("peptrain")
WEIGHTS, PICKLED = ".safetensors", ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt")
HUB_CODE = ("attn_implementation", "experts_implementation")
"""Keys of a config.json whose value may be the name of a kernel on the hub, such as "user/name"."""
COUNT = re.compile(r"_?(num|n)_(\w+_)?(labels|layers?)")
"""Keys of a config.json for each unit of which transformers adds to a list: num_hidden_layers."""
MOST_OF_A_COUNT = 100_000
LONGEST_REASON = 300
"""Characters of an error of transformers. Some list all models."""
FACTORS = "factors.safetensors"
"""The weights of a factorised export of older versions, beside a dense model's config.json."""
OF_A_RUN = "a factorised export; give the run, or its export without --form factorised"
NEVER = "peptrain never runs code from a directory"
CONVERT = (
    "convert them, on a machine where a pickle may run code: `AutoModelForCausalLM"
    ".from_pretrained(DIR).save_pretrained(OUT)`"
)


def load_config(path: Path, *, factorised: bool = False, **overrides: Any) -> PretrainedConfig:
    """Return the configuration in `path`, a config.json or a directory with one, with `overrides`.

    A model type of transformers is built by its own code, with a warning if the file names other
    code. That of a factorised export is built by ours if `factorised`. Otherwise it raises
    Unsupported, as for a configuration that needs code from elsewhere, and OSError, ValueError,
    KeyError or StrictDataclassError for one that can't be read.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    file = path / "config.json" if path.is_dir() else path
    found = read_json_object(file)
    _check_numbers(found)
    for key, value in _kernels(found):
        raise Unsupported(f"{file}: {key} {value!r} is code from elsewhere, and {NEVER}; remove it")
    if family := family_of(found):
        if not factorised:
            raise Unsupported(f"{file}: {OF_A_RUN}")
        register(family)
    own = None if family else found.get("auto_map")
    kind = found.get("model_type")
    if own and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
        raise _needs_code(file, own, f"model_type {kind!r} is not in transformers")
    config: PretrainedConfig = AutoConfig.from_pretrained(
        path, trust_remote_code=False, local_files_only=True, **overrides
    )
    if own:
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise _needs_code(file, own, f"transformers has no causal LM for {kind!r}")
        _say_whose_code(file, str(kind))
        if hasattr(config, "auto_map"):
            del config.auto_map  # so that an export does not name the code either
    return config


@contextmanager
def of_strangers(what: str, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn any error about the values in a config.json into Unsupported, which begins with `what`.

    transformers raises anything for values that do not fit together. This is the one place that
    catches it. but: errors that the caller expects.
    """
    expected: tuple[type[Exception], ...] = (PeptrainError, MemoryError, *but)
    try:
        yield
    except expected:
        raise
    except Exception as error:
        said = " ".join(str(error).split())  # transformers writes several lines
        raise Unsupported(f"{what}: {type(error).__name__}: {said[:LONGEST_REASON]}") from error


def new_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model with random weights, with its matrices that no method can adapt marked.

    Raises Unsupported for a type without a causal LM, and for values that do not fit together.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    kind = config.model_type
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise Unsupported(
            f"model: no causal LM for {kind!r} in transformers; choose a decoder such as Llama,"
            " Qwen2 or OLMo2"
        )
    if not config.name_or_path:  # a preset
        return _from_config(AutoModelForCausalLM, config, dtype)
    with of_strangers(f"model.config: can't build the model {kind!r}"):
        made = _from_config(AutoModelForCausalLM, config, dtype)
    if type(torch.empty(0)) is Tensor and made.device.type == "cpu":  # not fake, not meta
        with of_strangers(f"model.config: can't run the model {kind!r}"):
            leave_dense(made)
    return made


def new_classifier(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model with random weights and a head for `config.num_labels` classes or numbers.

    Of an encoder and decoder, such as T5, it is the model that writes a text. Raises Unsupported
    for a type that has no such class, and for values that do not fit together.
    """
    auto, mapping = _classifier(config)
    kind = config.model_type
    if type(config) not in mapping:
        raise Unsupported(
            f"model: no sequence classifier for {kind!r} in transformers; choose a decoder or"
            " encoder such as Llama, Qwen2 or RoBERTa"
        )
    with of_strangers(f"model.config: can't build the model {kind!r}"):
        return _from_config(auto, config, dtype)


def _classifier(config: PretrainedConfig) -> tuple[Any, Any]:
    import transformers as hf

    if config.is_encoder_decoder:
        return hf.AutoModelForSeq2SeqLM, hf.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    return hf.AutoModelForSequenceClassification, hf.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING


def _from_config(auto: Any, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    made: PreTrainedModel = auto.from_config(config, dtype=dtype, trust_remote_code=False)
    return made


def load_model(
    path: Path,
    dtype: torch.dtype | Literal["auto"] = "auto",
    classifier: PretrainedConfig | None = None,
    *,
    factorised: bool = False,
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """Load a causal LM from safetensors; return it with transformers' report on the weights.

    classifier: the configuration of a `new_classifier`, to load the weights into that instead.
    factorised: whether a factorised export may be loaded. Raises Unsupported for a directory whose
    model or weights would need code, and what `load_config` and transformers raise for one that
    can't be read.
    """
    from transformers import AutoModelForCausalLM

    _check_weights(path)
    if (generation := path / "generation_config.json").exists():
        read_json_object(generation)  # transformers does not say which file is damaged
    auto: Any = AutoModelForCausalLM if classifier is None else _classifier(classifier)[0]
    expected = (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError)
    with of_strangers(f"{path / 'config.json'}", but=expected):
        model, report = auto.from_pretrained(
            path,
            config=classifier or load_config(path, factorised=factorised),
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # listed in the report
            output_loading_info=True,
        )
    return model, report


def load_tokenizer(directory: Path) -> Any:
    """Return the tokenizer of a directory.

    Raises Unsupported if it needs code of its own, and DataError if a file can't be read or
    transformers can't load it.
    """
    from transformers import AutoTokenizer

    for name in ("tokenizer_config.json", "config.json"):
        file = directory / name
        try:
            found = read_json_object(file) if file.is_file() else {}
        except ValueError as error:
            raise DataError(f"tokenizer: {directory}: {error}; fix the file") from error
        if family := family_of(found):
            register(family)
        elif own := found.get("auto_map"):
            raise _needs_code(file, own, "a tokenizer.json needs none")
    try:
        return AutoTokenizer.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # of many types, where a value is not as transformers expects it
        said = " ".join(str(error).split())[:LONGEST_REASON]
        raise DataError(f"tokenizer: transformers can't load it: {said}") from error


def _needs_code(file: Path, own: object, why: str) -> Unsupported:
    return Unsupported(
        f"{file}: needs code of its own (auto_map {own!r}; {why}), and {NEVER}; give a directory"
        " whose classes are in transformers"
    )


@cache
def _say_whose_code(file: Path, kind: str) -> None:
    log.warning("%s: names code of its own (auto_map), but %s: the model is transformers' %r",
                file, NEVER, kind)  # fmt: skip


def _check_numbers(config: Mapping[str, Any]) -> None:
    """Raise ValueError for a number with which transformers or PyTorch would never end.

    Also in configurations within this one. Lists may contain Infinity, such as Mamba2's limits.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            _check_numbers(value)
        most = MOST_OF_A_COUNT if COUNT.fullmatch(key) else math.inf
        for number in value if isinstance(value, list) else [value]:
            finite = not isinstance(number, float) or abs(number) < math.inf
            if not (finite or (isinstance(value, list) and not math.isnan(number))):
                raise ValueError(f"{key}: must be a finite number (got {number})")
            if type(number) is int and not -(2**63) <= number < min(2**63, most + 1):
                wanted = "a number of 64 bits" if most == math.inf else f"<= {most}"
                raise ValueError(f"{key}: must be {wanted} (got {shown(number)})")


def _kernels(config: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Yield the settings of a config.json, and of configurations in it, that name hub code."""
    for key, value in config.items():
        if key.removeprefix("_").removesuffix("_internal") in HUB_CODE:
            names = value.values() if isinstance(value, dict) else [value]
            if any("/" in str(name) for name in names):
                yield key, value
        elif isinstance(value, dict):
            yield from _kernels(value)


def _check_weights(directory: Path) -> None:
    """Raise Unsupported for weights that are pickles, factorised, or somewhere else."""
    if (directory / FACTORS).is_file():
        raise Unsupported(f"{directory / FACTORS}: {OF_A_RUN}")
    if not any(directory.glob(f"*{WEIGHTS}")):
        for pattern in PICKLED:
            for file in sorted(directory.glob(pattern)):
                raise Unsupported(f"{file}: pickled weights, and {NEVER}; {CONVERT}")
    if (adapter := directory / "adapter_config.json").exists():
        raise Unsupported(f"{adapter}: an adapter to another model; merge it and save the model")
    for index in sorted(directory.glob(f"*{WEIGHTS}.index.json")):
        weight_map = read_json_object(index).get("weight_map")
        shards = weight_map.values() if isinstance(weight_map, dict) else [weight_map]
        for shard in {str(name) for name in shards}:
            _check_shard(index, shard)
    named = read_json_object(directory / "config.json").get("transformers_weights")
    if named is not None:
        _check_shard(directory / "config.json", str(named).removesuffix(".index.json"))


def _check_shard(file: Path, name: str) -> None:
    if Path(name).name != name or not name.endswith(WEIGHTS):
        raise Unsupported(
            f"{file}: names the weights {name!r}; only {WEIGHTS} files in that directory are read"
        )
