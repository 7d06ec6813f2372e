"""Architectures and sizes of strangers: trained rightly, or refused before anything is written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny, tiny_method

from peptrain.errors import ConfigError, Unsupported
from peptrain.exporting.export import export
from peptrain.exporting.factorised import load_factorised
from peptrain.models.dense import dense_state
from peptrain.models.hf import ModelConfig, build_model
from peptrain.models.sites import find_sites, reparametrized
from peptrain.runs.build import open_run
from peptrain.training.loop import train

LLAMA = {"model_type": "llama", "vocab_size": 300, "hidden_size": 16, "intermediate_size": 32,
         "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
MAMBA = {"model_type": "mamba", "vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2,
         "state_size": 4, "time_step_rank": 4}  # fmt: skip
BART = {"model_type": "bart", "vocab_size": 300, "d_model": 16, "decoder_layers": 2,
        "encoder_layers": 2, "decoder_ffn_dim": 32, "decoder_attention_heads": 2}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 300, "n_embd": 16, "n_layer": 2, "n_head": 2}
JAMBA = LLAMA | {"model_type": "jamba", "attn_layer_period": 2, "attn_layer_offset": 1,
                 "num_experts": 1, "use_mamba_kernels": False}  # fmt: skip

LLAMA4 = {"model_type": "llama4_text", "vocab_size": 300, "hidden_size": 16, "head_dim": 8,
          "intermediate_size": 24, "intermediate_size_mlp": 24, "num_hidden_layers": 2,
          "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}  # fmt: skip


def written(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize(
    "values, left",
    [(MAMBA, "dt_proj"), (BART, "encoder_attn"), (LLAMA4, "router")],
    ids=["mamba", "bart", "llama4"],
)
def test_a_matrix_that_is_not_used_as_a_linear_map_stays_dense(
    values: dict[str, Any], left: str, tmp_path: Path
) -> None:
    model = build_model(ModelConfig(config=written(tmp_path, values)), seq_len=8, seed=0)
    assert left in "".join(dict(model.named_modules()))
    names = [site.name for site in find_sites(model)]
    assert names and not any(left in name for name in names)
    assert model.training and all(type(m).__name__ != "_Watched" for m in model.modules())


@pytest.mark.parametrize("method", ["loro", "lora"])
def test_a_model_that_reads_a_weight_itself_trains_and_exports(
    method: str, tmp_path: Path, corpus: Path
) -> None:
    model = {"config": written(tmp_path, MAMBA), "preset": None} | dict.fromkeys(
        ("vocab_size", "hidden_size", "intermediate_size", "layers", "heads", "kv_heads")
    )
    settings = {"warm_start_steps": 0} if method == "lora" else {}
    chosen = tiny_method(method, **settings)
    train(tiny(chosen, corpus, tmp_path / "run", model=model, train={"steps": 2}))
    opened = open_run(tmp_path / "run")
    layers = list(reparametrized(opened.model))
    assert layers and not any("dt_proj" in layer.site for layer in layers)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        ours, dense = (m.double().eval()(ids).logits for m in (opened.model, opened.dense_twin()))
    torch.testing.assert_close(ours, dense)
    export(tmp_path / "run", tmp_path / "out", "factorised" if method == "loro" else "dense")
    if method == "loro":
        again = dense_state(load_factorised(tmp_path / "out"))
        assert again.keys() == dense_state(opened.model).keys()


def test_a_model_without_a_working_cache_is_exported(tmp_path: Path, corpus: Path) -> None:
    """With two layers all are recurrent, and transformers' cache has no length."""
    values = LLAMA | {"model_type": "recurrent_gemma", "lru_width": 16, "attention_window_size": 8}
    model = {"config": written(tmp_path, values), "preset": None} | dict.fromkeys(
        ("vocab_size", "hidden_size", "intermediate_size", "layers", "heads", "kv_heads")
    )
    train(tiny(tiny_method("loro"), corpus, tmp_path / "run", model=model, train={"steps": 2}))
    export(tmp_path / "run", tmp_path / "out")


@pytest.mark.parametrize(
    "values, message",
    [
        (GPT2, "GPT2LMHeadModel: has no nn.Linear inside its decoder layers to adapt, only Conv1D"),
        (JAMBA, "JambaForCausalLM has no list of identical decoder layers"),
        (LLAMA | {"model_type": "bert"}, "model.config: BertLMHeadModel lets a token see those"),
        ({"model_type": "t5", "vocab_size": 300}, "model: no causal LM for 't5' in transformers"),
        (LLAMA | {"hidden_size": -16}, "hidden_size: must be >= 1 (got -16)"),
        (LLAMA | {"num_hidden_layers": 10**9}, "num_hidden_layers: must be <= 100000 (got"),
        (LLAMA | {"vocab_size": "300"}, "vocab_size"),
        (LLAMA | {"vocab_size": None}, "vocab_size"),
        (LLAMA | {"num_attention_heads": 3}, "heads"),
        (LLAMA | {"num_key_value_heads": 0}, "num_key_value_heads: must be >= 1 (got 0)"),
        (LLAMA | {"rope_theta": "x"}, "model.config: can't build the model 'llama': TypeError: "),
        (
            LLAMA | {"rms_norm_eps": -9.0},
            "model.config: the logits of LlamaForCausalLM are not fin",
        ),
        (LLAMA | {"attention_dropout": 2}, "model.config: can't run the model 'llama': "),
        (LLAMA | {"hidden_act": "nope"}, "model.config: can't build the model 'llama': KeyError"),
        (LLAMA | {"model_type": "nope"}, "is not a usable config.json: "),
        (LLAMA | {"pad_token_id": 10**9}, "model.config: can't build the model 'llama': "),
    ],
    ids=range(16),
)
def test_what_can_not_be_trained_is_refused_before_anything_is_written(
    values: dict[str, Any], message: str, tmp_path: Path, corpus: Path
) -> None:
    model = {"config": written(tmp_path, values), "preset": None} | dict.fromkeys(
        ("vocab_size", "hidden_size", "intermediate_size", "layers", "heads", "kv_heads")
    )
    with pytest.raises((Unsupported, ConfigError)) as caught:
        train(tiny(tiny_method("loro"), corpus, tmp_path / "run", model=model))
    assert message in str(caught.value) and len(str(caught.value)) < 700
    assert not (tmp_path / "run").exists()
