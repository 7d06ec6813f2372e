"""Exports as GGUF: what transformers and the gguf package read from the file."""

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from support import tiny, tiny_method
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

from peptrain.data import PrepareConfig, prepare
from peptrain.errors import CheckpointError, PeptrainError, Unsupported
from peptrain.exporting import gguf as exporting
from peptrain.exporting.export import export
from peptrain.exporting.gguf import FILE, interleaved
from peptrain.runs.build import open_run
from peptrain.testing import MODEL
from peptrain.training.loop import train

IDS = torch.arange(64).view(2, 32) * 7 % 300
TEXT = "In 2026 the fox's 12,345 jumps:\n\n    return x == 'é'\t# <|endoftext|>"
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("bpt", {"heads": 4, "kv_heads": 2}, "fp32"),
    "llama-bf16": ("full", {"heads": 4, "kv_heads": 2}, "bf16"),
    "llama-tied": ("lowrank", {"tied": True}, "fp64"),
    "llama-config": ("full", {}, "fp32"),
    "qwen2": ("bpt", {"family": "qwen2", "kv_heads": 1, "tied": True}, "fp32"),
    "olmo2": ("lowrank", {"family": "olmo2", "heads": 4}, "fp32"),
    "olmo2-bf16": ("full", {"family": "olmo2"}, "bf16"),
}


def custom_config(**given: Any) -> dict[str, Any]:
    """A head size and a base of RoPE that no preset has."""
    return LlamaConfig(**{
        **{"vocab_size": 310, "hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 3},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
        **{"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        **{"rms_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": None}, **given,
    }).to_dict()  # fmt: skip


def trained(
    corpus: Path, run: Path, method: str, model: dict[str, Any], precision: str = "fp32"
) -> Path:
    train(tiny(tiny_method(method), corpus, run, model=model, train={"precision": precision},
               optim={"lr": 3e-2}))  # fmt: skip
    return run


def from_config(corpus: Path, folder: Path, **given: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(custom_config(**given)))
    return trained(corpus, folder / "run", "full", dict.fromkeys(MODEL) | {"config": file})


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("name", CASES)
def test_the_file_holds_the_runs_model(name: str, corpus: Path, tmp_path: Path) -> None:
    if name == "llama-config":
        run = from_config(corpus, tmp_path)
    else:
        run = trained(corpus, tmp_path / "run", *CASES[name])
    out = export(run, tmp_path / "out", "gguf")
    twin = open_run(run).dense_twin()
    reader = gguf.GGUFReader(out / FILE)
    count = sum(int(np.prod(tensor.shape)) for tensor in reader.tensors)
    assert count == sum(p.numel() for p in twin.parameters())
    assert reader.get_field("general.architecture").contents() == twin.config.model_type
    if twin.config.model_type != "olmo2":
        found = AutoModelForCausalLM.from_pretrained(out, gguf_file=FILE, dtype=torch.float32)
        torch.testing.assert_close(logits(found), logits(twin.float()), rtol=0, atol=2e-5)
        return
    held = {tensor.name: tensor for tensor in reader.tensors}
    one = held["blk.1.attn_q.weight"]
    wanted = twin.model.layers[1].self_attn.q_proj.weight.detach().float().numpy()
    assert np.array_equal(gguf.dequantize(one.data, one.tensor_type), wanted)
    assert {"blk.0.attn_q_norm.weight", "blk.0.post_ffw_norm.weight"} <= held.keys()


def test_rows_of_a_head_that_rope_rotates_together_become_neighbours() -> None:
    rows = np.arange(12, dtype=np.float32)[:, None].repeat(3, 1)  # 2 heads of 6
    assert interleaved(rows, 2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_llamas_rows_in_another_order_are_caught(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(corpus, tmp_path / "run", "full", {"heads": 2})
    monkeypatch.setattr(exporting, "interleaved", lambda rows, heads: rows)
    with pytest.raises(CheckpointError, match=r"q_proj.weight: changed when read back from disk"):
        export(run, tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_in_the_file_is_that_of_the_run(corpus: Path, tmp_path: Path) -> None:
    run = trained(corpus, tmp_path / "run", "full", {})
    out = export(run, tmp_path / "out", "gguf")
    fields = {k: f.contents() for k, f in gguf.GGUFReader(out / FILE).fields.items()}
    named = {k.removeprefix("tokenizer.ggml."): v for k, v in fields.items()}
    assert (named["model"], named["pre"]) == ("gpt2", "gpt-2")
    assert named["eos_token_id"] == named["bos_token_id"] == 0
    assert named["add_bos_token"] is False and named["add_eos_token"] is False
    assert len(named["tokens"]) == len(set(named["tokens"])) == MODEL["vocab_size"]
    assert named["token_type"][0] == gguf.TokenType.CONTROL
    assert named["token_type"][300:] == [gguf.TokenType.UNUSED] * 20
    assert fields["peptrain.method"] == "full" and fields["peptrain.step"] == "8"
    own = AutoTokenizer.from_pretrained(out)
    (out / FILE).rename(tmp_path / FILE)  # beside a tokenizer.json transformers takes that
    found = AutoTokenizer.from_pretrained(tmp_path, gguf_file=FILE)
    assert len(found) == MODEL["vocab_size"]
    assert found(TEXT).input_ids == own(TEXT).input_ids
    assert found.eos_token_id == own.eos_token_id == 0


def test_a_tokenizer_that_encodes_otherwise_is_caught(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(corpus, tmp_path / "run", "full", {})
    add = gguf.GGUFWriter.add_token_merges
    monkeypatch.setattr(gguf.GGUFWriter, "add_token_merges", lambda self, all: add(self, all[:1]))
    with pytest.raises(CheckpointError, match="its tokenizer encodes otherwise"):
        export(run, tmp_path / "out", "gguf")


def test_a_tokenizer_that_gguf_has_no_name_for_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("a b " * 2000)
    made = prepare(PrepareConfig(inputs=(tmp_path / "text.txt",), out=tmp_path / "corpus",
                                 tokenizer=tmp_path, held_out=0.02))  # fmt: skip
    run = trained(made.path, tmp_path / "run", "full", {})
    with pytest.raises(Unsupported, match="--form gguf: GGUF has no name for the run's tokenizer"):
        export(run, tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"attention_bias": True}, "attention_bias True of a llama model"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
         "rope_type 'linear'"),
    ],
)  # fmt: skip
def test_what_gguf_can_not_express_is_refused(
    given: dict[str, Any], said: str, corpus: Path, tmp_path: Path
) -> None:
    run = from_config(corpus, tmp_path, **given)
    with pytest.raises(Unsupported, match=f"--form gguf: has no place for {said}.*--form dense"):
        export(run, tmp_path / "out", "gguf")


def test_without_the_package_the_extra_is_named(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(corpus, tmp_path / "run", "full", {})
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(PeptrainError, match=r"pip install 'peptrain\[gguf\]'"):
        export(run, tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()
