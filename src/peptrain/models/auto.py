"""Read Hugging Face directories, also a stranger's: data only, and never code that lies in them.

transformers is called through these functions alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from peptrain.errors import Unsupported
from peptrain.files import read_json_object

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger("peptrain")
WEIGHTS, PICKLED = ".safetensors", ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt")
HUB_CODE = ("attn_implementation", "experts_implementation")
"""Keys of a config.json whose value may be the name of a kernel on the hub, such as "user/name"."""
NEVER = "peptrain never runs code from a directory"
CONVERT = (
    "convert them, on a machine where a pickle may run code: `AutoModelForCausalLM"
    ".from_pretrained(DIR).save_pretrained(OUT)`"
)


def load_config(path: Path, **overrides: Any) -> PretrainedConfig:
    """Return the configuration in `path`, a config.json or a directory with one, with `overrides`.

    A model type of transformers is built by its own code, with a warning if the file names other
    code. Raises Unsupported for a configuration that needs code from elsewhere, and OSError,
    ValueError, KeyError or StrictDataclassError for one that can't be read.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    file = path / "config.json" if path.is_dir() else path
    found = read_json_object(file)
    for key, value in _kernels(found):
        raise Unsupported(f"{file}: {key} {value!r} is code from elsewhere, and {NEVER}; remove it")
    own = found.get("auto_map")
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


def new_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model with random weights. Raises ValueError for a type without a causal LM."""
    from transformers import AutoModelForCausalLM

    made: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=dtype, trust_remote_code=False
    )
    return made


def load_model(
    path: Path, dtype: torch.dtype | Literal["auto"] = "auto"
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """Load a causal LM from safetensors; return it with transformers' report on the weights.

    Raises Unsupported for a directory whose model or weights would need code, and what
    `load_config` and transformers raise for one that can't be read.
    """
    from transformers import AutoModelForCausalLM

    _check_weights(path)
    if (generation := path / "generation_config.json").exists():
        read_json_object(generation)  # transformers does not say which file is damaged
    load: Any = AutoModelForCausalLM.from_pretrained
    model, report = load(
        path,
        config=load_config(path),
        dtype=dtype,
        trust_remote_code=False,
        use_safetensors=True,
        local_files_only=True,
        ignore_mismatched_sizes=True,  # listed in the report
        output_loading_info=True,
    )
    return model, report


def load_tokenizer(directory: Path) -> Any:
    """Return the tokenizer of a directory. Raises Unsupported if it needs code of its own."""
    from transformers import AutoTokenizer

    for name in ("tokenizer_config.json", "config.json"):
        file = directory / name
        if file.is_file() and (own := read_json_object(file).get("auto_map")):
            raise _needs_code(file, own, "a tokenizer.json needs none")
    return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)


def _needs_code(file: Path, own: object, why: str) -> Unsupported:
    return Unsupported(
        f"{file}: needs code of its own (auto_map {own!r}; {why}), and {NEVER}; give a directory"
        " whose classes are in transformers"
    )


@cache
def _say_whose_code(file: Path, kind: str) -> None:
    log.warning("%s: names code of its own (auto_map), but %s: the model is transformers' %r",
                file, NEVER, kind)  # fmt: skip


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
    """Raise Unsupported for weights that are pickles, or that are somewhere else."""
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
