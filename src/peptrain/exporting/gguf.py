"""Export a run as one GGUF file, the format of llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from peptrain.config import RunConfig
from peptrain.errors import CheckpointError, PeptrainError, Unsupported
from peptrain.exporting.card import Loading, metadata, title
from peptrain.exporting.encoding import SAMPLE
from peptrain.files import read_json_object
from peptrain.methods.base import Method
from peptrain.models.auto import load_tokenizer, new_model
from peptrain.models.dense import load_dense
from peptrain.models.hf import hf_config
from peptrain.runs.build import Opened

FILE = "model.gguf"
FAMILIES = ("llama", "qwen2", "olmo2")
READ_BY_TRANSFORMERS = ("llama", "qwen2")
"""The others are read back by the gguf package itself, tensor for tensor."""
SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}
"""Names that GGUF has for regular expressions that split text (tokenizer.ggml.pre)."""
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Types of tokens in GGUF."""


def load_gguf(config: RunConfig[Method]) -> Loading:
    """Return how the file is read, by transformers where it knows the family."""
    note = f"It needs the package gguf. `{FILE}` is for llama.cpp, with which it was not tested."
    family = hf_config(config.model, config.train.seq_len).model_type
    if family in READ_BY_TRANSFORMERS:
        call = f"transformers.AutoModelForCausalLM.from_pretrained(DIR, gguf_file={FILE!r})"
        return Loading("gguf", "", call, note=note)
    note = f"transformers does not read {family} from GGUF; these are the tensors. {note}"
    return Loading("gguf", "import gguf", f"gguf.GGUFReader(DIR + '/{FILE}')", note=note)


def check_gguf(opened: Opened) -> None:
    """Raise Unsupported, with the reason, for a run whose function GGUF can't express."""
    c: Any = opened.model.config
    if opened.config.tune.task:
        raise Unsupported("is for language models, and the run is a fine-tuned classifier")
    if not opened.config.method.has_dense_equivalent:
        raise Unsupported(f"{opened.config.method.name} has no dense equivalent")
    if c.model_type not in FAMILIES:
        raise Unsupported(f"is for {', '.join(FAMILIES)}, and the model is {c.model_type}")
    split = c.head_dim if getattr(c, "head_dim", None) else _head(c)
    unusual = {
        "rope_type": c.rope_parameters.get("rope_type", "default") != "default",
        "hidden_act": c.hidden_act != "silu",
        "attention_bias": getattr(c, "attention_bias", False),
        "mlp_bias": getattr(c, "mlp_bias", False),
        "head_dim": split != _head(c) and c.model_type != "llama",
        "use_sliding_window": getattr(c, "use_sliding_window", False),
    }
    for key, is_unusual in unusual.items():
        if is_unusual:
            value = c.rope_parameters[key] if key == "rope_type" else getattr(c, key)
            raise Unsupported(f"has no place for {key} {value!r} of a {c.model_type} model")


def _head(config: PretrainedConfig) -> int:
    return int(config.hidden_size // config.num_attention_heads)


def write_gguf(opened: Opened, out: Path) -> PreTrainedModel:
    """Write the dense equivalent to one file. Return the model as it is read back.

    Matrices are BF16 for a run in bf16, else F32; vectors are F32. Raises PeptrainError without the
    package gguf, and Unsupported for a tokenizer that GGUF has no name for.
    """
    try:
        import gguf
    except ImportError as error:
        raise PeptrainError(
            "--form gguf: needs the package gguf; install it with pip install 'peptrain[gguf]'"
        ) from error
    twin = opened.dense_twin()
    config, half = twin.config, twin.dtype == torch.bfloat16
    writer = gguf.GGUFWriter(out / FILE, config.model_type)
    writer.add_name(title(opened))
    for key, value in metadata(opened).items():
        writer.add_string(f"peptrain.{key}", value)
    types = gguf.LlamaFileType
    writer.add_file_type(types.MOSTLY_BF16 if half else types.ALL_F32)
    _add_sizes(writer, config)
    _add_tokenizer(writer, out, config.vocab_size)
    kind = gguf.GGMLQuantizationType.BF16
    for name, tensor in _tensors(twin):
        if half and tensor.ndim > 1:
            writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return _read(out, twin, torch.bfloat16 if half else torch.float32)


def _add_sizes(writer: Any, config: Any) -> None:
    head = getattr(config, "head_dim", None) or _head(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _names(model: PreTrainedModel) -> dict[str, str]:
    """Return GGUF's names by Hugging Face's, of every parameter."""
    import gguf

    config: Any = model.config
    arch = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == config.model_type)
    known = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    found = {}
    for name, _ in model.named_parameters():
        stem, _, suffix = name.rpartition(".")
        found[name] = f"{known.get_name(stem)}.{suffix}"
    return found


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, NDArray[np.float32]]]:
    config: Any = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = _names(model)
    for name, p in model.named_parameters():
        array = p.detach().float().numpy()
        number = heads.get(name.split(".")[-2])
        if config.model_type == "llama" and number:
            array = interleaved(array, number)
        yield names[name], np.ascontiguousarray(array)


def interleaved(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Reorder the rows of W_q or W_k [heads * 2h, in] for llama.cpp's RoPE of llama.

    Hugging Face rotates dimension i of a head with i + h; llama.cpp rotates 2i with 2i + 1. So row
    i becomes row 2i and row i + h becomes row 2i + 1. For qwen2 and olmo2 both rotate alike.
    """
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _add_tokenizer(writer: Any, directory: Path, size: int) -> None:
    """Describe the tokenizer in `directory`, with as many tokens as the embedding has rows."""
    made = read_json_object(directory / "tokenizer.json")
    split = _split(made)
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [UNUSED] * size
    for token, number in made["model"]["vocab"].items():
        tokens[number], types[number] = token, NORMAL
    for token in made["added_tokens"]:
        kind = CONTROL if token["special"] else USER_DEFINED
        tokens[token["id"]], types[token["id"]] = token["content"], kind
    writer.add_tokenizer_model("gpt2")  # GGUF's name of a byte-level BPE
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = made["model"]["merges"]
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in merges])
    special = read_json_object(directory / "tokenizer_config.json")
    ids = {key: tokens.index(special[f"{key}_token"]) for key in ("bos", "eos", "unk", "pad")
           if special.get(f"{key}_token") in tokens}  # fmt: skip
    ids.setdefault("bos", ids["eos"])  # llama.cpp takes token 11 if none is named
    for key, number in ids.items():
        getattr(writer, f"add_{key}_token_id")(number)
    writer.add_add_bos_token(False)  # as in training
    writer.add_add_eos_token(False)
    if template := special.get("chat_template"):
        writer.add_chat_template(template)


def _split(made: Mapping[str, Any]) -> str:
    """Return GGUF's name for how a tokenizer.json splits text, before a byte-level BPE.

    Raises Unsupported for what has none.
    """
    model, pre = made["model"], made["pre_tokenizer"] or {}
    steps = pre.get("pretokenizers", [pre])
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    found = None
    if model["type"] == "BPE" and last.get("type") == "ByteLevel" and not last["add_prefix_space"]:
        if kinds == ["ByteLevel"] and last.get("use_regex", True) and not made["normalizer"]:
            found = "gpt-2"
        if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
            found = SPLITS.get(steps[0]["pattern"].get("Regex"))
    if found is None or bool(model.get("ignore_merges")) != (found == "llama-bpe"):
        raise Unsupported(
            "--form gguf: GGUF has no name for the run's tokenizer; it has for byte-level BPE that"
            " splits text as GPT-2, Llama 3 or Qwen2, like those that `peptrain data prepare`"
            " trains; use --form dense"
        )
    return found


def _read(out: Path, twin: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Read the file back: as transformers does, or else tensor for tensor."""
    if twin.config.model_type in READ_BY_TRANSFORMERS:
        _check_tokenizer(out)
        model: PreTrainedModel = type(twin).from_pretrained(
            out, gguf_file=FILE, dtype=dtype, local_files_only=True
        )
    else:
        model = new_model(twin.config, dtype)
        load_dense(model, _state(out, model))
    model.eval()
    return model


def _state(out: Path, model: PreTrainedModel) -> dict[str, Tensor]:
    import gguf

    held = {tensor.name: tensor for tensor in gguf.GGUFReader(out / FILE).tensors}
    return {
        name: torch.from_numpy(gguf.dequantize(held[key].data, held[key].tensor_type).copy())
        for name, key in _names(model).items()
    }


def _check_tokenizer(out: Path) -> None:
    """Raise CheckpointError unless the tokenizer in the file encodes as that of the run."""
    own = load_tokenizer(out)
    with TemporaryDirectory() as alone:  # beside a tokenizer.json transformers takes that
        (Path(alone) / FILE).symlink_to((out / FILE).absolute())
        read = PreTrainedTokenizerFast.from_pretrained(alone, gguf_file=FILE, local_files_only=True)
    same = read.eos_token_id == own.eos_token_id
    if not same or read(SAMPLE).input_ids != own(SAMPLE).input_ids:
        raise CheckpointError(f"{FILE}: its tokenizer encodes otherwise; nothing was exported")
