"""Build unmodified Hugging Face causal language models from a configuration."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from peptrain.errors import ConfigError, Unsupported
from peptrain.files import write_atomically
from peptrain.models.auto import load_config, new_model, of_strangers
from peptrain.models.presets import DEFAULT_PRESET, PRESETS, Family, unknown_preset
from peptrain.rng import seed_default
from peptrain.settings.fields import check, check_whole, essential

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger("peptrain")
Precision = Literal["fp32", "bf16-mixed", "bf16", "fp64"]
LARGEST_SIZES = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "layers": 10_000,
    "heads": 1 << 16,
    "kv_heads": 1 << 16,
}
"""Far above any model. A slip of a few digits is refused here, before it takes hours."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A preset or a config.json, and sizes that override it."""

    preset: str | None = essential(None)
    """A named architecture (`peptrain methods` lists them). Sizes given by other settings, a
    recipe or a file override it. Unset: tiny, unless config or --init-from determines the model."""
    config: Path | None = None
    """A Hugging Face config.json, or a directory that contains one, instead of a preset."""
    family: Family | None = None
    """Architecture: llama, qwen2 or olmo2."""
    vocab_size: int | None = None
    """V, the vocabulary size, at least the corpus's largest token id plus 1."""
    hidden_size: int | None = None
    """d, the width of the residual stream."""
    intermediate_size: int | None = None
    """f, the width of the MLP."""
    layers: int | None = None
    """L, the number of decoder layers."""
    heads: int | None = None
    """Number of attention heads."""
    kv_heads: int | None = None
    """Number of key and value heads (grouped-query attention)."""
    tied: bool | None = None
    """Whether the output head shares the embedding's matrix."""

    def __post_init__(self) -> None:
        for key, most in LARGEST_SIZES.items():
            check_whole(f"model.{key}", getattr(self, key), 1, most)
        if self.config is None and (self.preset or DEFAULT_PRESET) not in PRESETS:
            raise ConfigError(unknown_preset(self.preset or DEFAULT_PRESET))
        if self.config is not None and self.family is not None:
            raise ConfigError("model.family: a config.json has its own; give only one of the two")


HF_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "tied": "tie_word_embeddings",
}


def hf_config(config: ModelConfig, seq_len: int) -> PretrainedConfig:
    """Return the Hugging Face config that `config` describes, with `seq_len` positions or more.

    Raises ConfigError for sizes that are incompatible.
    """
    made = _made(config, seq_len)
    heads, kv = (getattr(made, f"num_{k}_heads", None) for k in ("attention", "key_value"))
    fits = not heads or kv is None or (kv >= 1 and heads % kv == 0)
    check(fits, "model.kv_heads", kv, f"a divisor of the {heads} attention heads")
    positions = getattr(made, "max_position_embeddings", None) or -1  # no limit
    wanted = f"at most the model's {positions} positions"
    check(seq_len <= positions or positions == -1, "train.seq_len", seq_len, wanted)
    return made


def _made(config: ModelConfig, seq_len: int) -> PretrainedConfig:
    wanted = {
        hf: getattr(config, k) for k, hf in HF_NAMES.items() if getattr(config, k) is not None
    }
    if "num_attention_heads" in wanted:
        wanted.setdefault("num_key_value_heads", wanted["num_attention_heads"])
    if config.config is not None:
        return _from_file(config.config, wanted)
    shape = PRESETS[config.preset or DEFAULT_PRESET]
    preset = {
        "vocab_size": shape.V,
        "hidden_size": shape.d,
        "intermediate_size": shape.f,
        "num_hidden_layers": shape.L,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv,
        "tie_word_embeddings": shape.tied,
    }
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    fields = {**preset, **special, "max_position_embeddings": max(2048, seq_len), **wanted}
    heads = fields["num_attention_heads"]
    check(fields["hidden_size"] % (2 * heads) == 0, "model.hidden_size", fields["hidden_size"],
          f"an even multiple of the {heads} attention heads")  # fmt: skip
    return _family(config.family or shape.family)(**fields)


def config_file(config: ModelConfig) -> Path | None:
    """Return the file that `model.config` names, directly or by its directory."""
    path = config.config
    return path / "config.json" if path is not None and path.is_dir() else path


def _family(name: Family) -> type[PretrainedConfig]:
    from transformers import LlamaConfig, Olmo2Config, Qwen2Config

    return {"llama": LlamaConfig, "qwen2": Qwen2Config, "olmo2": Olmo2Config}[name]


def _from_file(path: Path, wanted: dict[str, Any]) -> PretrainedConfig:
    if not path.exists():
        raise ConfigError(
            f"model.config: {path} does not exist; give a config.json or its directory"
        )
    what = f"model.config: {path} is not a usable config.json"
    try:
        with of_strangers(what):
            made = load_config(path, **wanted)
            _check_file_sizes(made.get_text_config())
    except Unsupported as error:
        said = str(error)
        raise ConfigError(said if said.startswith(what) else f"{what}: {said}") from error
    return made


def _check_file_sizes(made: PretrainedConfig) -> None:
    for key, name in HF_NAMES.items():
        value = getattr(made, name, None)
        if isinstance(value, int | float | str) and key in LARGEST_SIZES:
            check(type(value) is int, name, value, "a whole number")
            check_whole(name, int(value), 1, LARGEST_SIZES[key])
    check(isinstance(getattr(made, "hidden_size", None), int), "hidden_size", None, "set")


def build_model(
    config: ModelConfig, *, seq_len: int, seed: int, precision: Precision = "fp32"
) -> PreTrainedModel:
    """Return a newly initialised causal LM on the CPU. Its weights depend only on the seed.

    Raises Unsupported for an architecture without a causal LM in Hugging Face, and for a
    config.json whose values do not fit together.
    """
    hf = hf_config(config, seq_len)
    with torch.random.fork_rng(devices=[]):
        seed_default(seed)
        return new_model(hf, dtype_of(precision))


def dtype_of(precision: Precision) -> torch.dtype:
    """Return the dtype of parameters and moments."""
    return {"bf16": torch.bfloat16, "fp64": torch.float64}.get(precision, torch.float32)


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return the context of a forward pass: bf16 autocast for bf16-mixed, none otherwise."""
    if precision != "bf16-mixed":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return the rows of the embedding: the largest id it accepts plus 1."""
    table = model.get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    return table.num_embeddings


def positions_of(model: PreTrainedModel) -> int | None:
    """Return how many tokens fit into a learned table of positions that has a row for padding.

    RoBERTa's begin after that row, so they are fewer than `max_position_embeddings`. None for a
    model without such a table.
    """
    rows = getattr(model.config, "max_position_embeddings", None)
    words = model.get_input_embeddings()
    for module in model.modules():
        if not isinstance(module, nn.Embedding) or module is words or module.padding_idx is None:
            continue
        if module.num_embeddings == rows:
            return module.num_embeddings - module.padding_idx - 1
    return None


def count_parameters(model: nn.Module, trainable: bool = False) -> int:
    """Count the parameters of the model, shared ones once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def count_non_embedding(model: PreTrainedModel) -> int:
    """Count the trainable parameters outside the input embedding and the output head."""
    tables: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    embedding: set[Tensor] = {t.weight for t in tables if t is not None}
    inside = sum(p.numel() for p in embedding if p.requires_grad)
    return count_parameters(model, trainable=True) - inside


TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "chat_template.jinja",
)
"""Files of a tokenizer. Anything else in its directory is not exported."""


def save_tokenizer(file: Path, end_id: int, special: Mapping[str, str], out: Path) -> None:
    """Save a tokenizer.json and its end token in the form that `AutoTokenizer` loads.

    As in training, it adds no special tokens to a text. special: other special tokens and the chat
    template, by their name in `AutoTokenizer`. Raises OSError if a file can't be written.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_buffer(file.read_bytes())
    end = tokenizer.id_to_token(end_id)
    assert end is not None
    named = {**special, "eos_token": end}
    named.pop("chat_template", None)
    tokenizer.add_special_tokens([*named.values()])  # all are in the vocabulary
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "tokenizer.json", tokenizer.to_str())
    write_atomically(out / "tokenizer_config.json", json.dumps(config | named, indent=1) + "\n")
    if "chat_template" in special:
        write_atomically(out / "chat_template.jinja", special["chat_template"])
    encode_plainly(out)


def encode_plainly(directory: Path) -> None:
    """Change the tokenizer in `directory` such that it encodes a text as in training.

    A document of the training data is the tokens of its text, followed by the end token. What a
    post-processor adds, such as <s> before or </s> after a prompt, no batch contained or continued.
    Dropout, truncation and padding are switched off, which corpora of 0.1.0 may have.
    """
    file = directory / "tokenizer.json"
    content = json.loads(file.read_bytes())
    content["post_processor"] = _adding_nothing(content.get("post_processor"))
    content["truncation"] = content["padding"] = None
    if "dropout" in content["model"]:
        content["model"]["dropout"] = None
    write_atomically(file, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    file = directory / "tokenizer_config.json"
    config = json.loads(file.read_bytes()) | {"add_bos_token": False, "add_eos_token": False}
    write_atomically(file, json.dumps(config, ensure_ascii=False, indent=1) + "\n")


def _adding_nothing(processor: Any) -> Any:
    """Return the parts of a post-processor that add no tokens: ByteLevel, which trims offsets."""
    if not isinstance(processor, dict):
        return None
    if processor.get("type") == "Sequence":
        kept = [part for part in map(_adding_nothing, processor.get("processors", [])) if part]
        return {"type": "Sequence", "processors": kept} if kept else None
    return processor if processor.get("type") == "ByteLevel" else None
