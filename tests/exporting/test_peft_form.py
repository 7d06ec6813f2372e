"""Exports for PEFT: what PEFT itself computes with them, and the runs that it can't hold."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support import tiny, tiny_method
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from peptrain.errors import CheckpointError, PeptrainError, Unsupported
from peptrain.exporting.export import export
from peptrain.runs.build import open_run
from peptrain.testing import MODEL
from peptrain.training.loop import train

IDS = torch.arange(64).view(2, 32) * 7 % 300
CASES: dict[str, dict[str, Any]] = {
    "lora": {"train_rest": False},
    "dora": {"train_rest": False, "exclude": "k"},
    "vera": {"train_rest": False},
    "lora-scale": {"train_rest": False, "train_scale": True, "targets": "q,v"},
    "lora-and-parts": {"train": "norm,head,embedding"},
    "lora-one-layer": {"train_rest": False, "targets": "model.layers.0.*"},
    "lora-bf16": {"train_rest": False},
}


def adapted(name: str, corpus: Path, run: Path, base: Path, lr: float = 3e-2, **given: Any) -> Path:
    method = tiny_method(name.partition("-")[0], **{"warm_start_steps": 0, **given}
                         if not name.startswith("vera") else given)  # fmt: skip
    precision = "bf16" if name.endswith("bf16") else "fp32"
    config = tiny(method, corpus, run, model=dict.fromkeys(MODEL), optim={"lr": lr},
                  train={"precision": precision})  # fmt: skip
    train(replace(config, init_from=base))
    return run


@pytest.fixture(scope="module")
def base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain Hugging Face directory."""
    folder = tmp_path_factory.mktemp("base")
    train(tiny("full", corpus, folder / "run", train={"precision": "fp32"}, optim={"lr": 3e-2}))
    return export(folder / "run", folder / "plain-base")


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("name", CASES)
def test_peft_computes_the_runs_logits(name: str, base: Path, corpus: Path, tmp_path: Path) -> None:
    run = adapted(name, corpus, tmp_path / "run", base, **CASES[name])
    out = export(run, tmp_path / "out", "peft")
    model = open_run(run).model
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=model.dtype)
    before = logits(plain)
    found = logits(peft.PeftModel.from_pretrained(plain, out).float())
    wanted = logits(model.float())
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    assert (wanted - before).abs().max() > 0.2  # so the adapter does something
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "plain-base"
    assert settings["target_modules"] == sorted(settings["target_modules"])
    parts = settings["modules_to_save"] or []
    assert ("lm_head" in parts and "model.norm" in parts) == (name == "lora-and-parts")


def test_what_only_peft_holds_is_smaller_than_the_model(
    base: Path, corpus: Path, tmp_path: Path
) -> None:
    run = adapted("lora", corpus, tmp_path / "run", base, **CASES["lora"])
    out = export(run, tmp_path / "out", "peft")
    assert {p.name for p in out.iterdir()} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    size = (out / "adapter_model.safetensors").stat().st_size
    assert size < (base / "model.safetensors").stat().st_size / 5
    again = export(run, tmp_path / "again", "peft")
    assert [p.read_bytes() for p in sorted(again.iterdir())] == [
        p.read_bytes() for p in sorted(out.iterdir())
    ]


def test_the_base_may_be_a_run(base: Path, corpus: Path, tmp_path: Path) -> None:
    run = adapted("lora", corpus, tmp_path / "run", base.with_name("run"), **CASES["lora"])
    out = export(run, tmp_path / "out", "peft")
    found = logits(peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out))
    torch.testing.assert_close(found, logits(open_run(run).model), rtol=0, atol=2e-5)


def test_a_base_in_the_cache_of_the_hub_has_its_name_there(
    base: Path, corpus: Path, tmp_path: Path
) -> None:
    cached = tmp_path / "models--org--small-model" / "snapshots" / "0123456789abcdef"
    shutil.copytree(base, cached)
    run = adapted("lora", corpus, tmp_path / "run", cached, **CASES["lora"])
    out = export(run, tmp_path / "out", "peft")
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "org/small-model"
    assert "base_model: org/small-model\n" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("relora", {"train_rest": False}, "relora merges into W.*--form dense or gguf"),
        ("bpt", {}, "bpt merges into W"),
        ("full", {}, "PEFT has no adapter like full; it has lora, dora and vera"),
        ("lora", {"warm_start_steps": 2}, "W was trained too, in method.warm_start_steps = 2"),
    ],
)
def test_methods_that_change_w_are_refused(
    name: str, given: dict[str, Any], said: str, base: Path, corpus: Path, tmp_path: Path
) -> None:
    config = tiny(tiny_method(name, **given), corpus, tmp_path / "run", model=dict.fromkeys(MODEL))
    train(replace(config, init_from=base))
    with pytest.raises(Unsupported, match=f"--form peft: {said}"):
        export(tmp_path / "run", tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


def test_a_run_from_random_weights_has_no_base(corpus: Path, tmp_path: Path) -> None:
    train(tiny(tiny_method("lora", warm_start_steps=0), corpus, tmp_path / "run"))
    with pytest.raises(Unsupported, match=r"--form peft: the run has no base model.*--init-from"):
        export(tmp_path / "run", tmp_path / "out", "peft")


def test_another_base_than_that_of_the_training_is_refused(
    base: Path, corpus: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(base, tmp_path / "base")
    run = adapted("lora", corpus, tmp_path / "run", moved, **CASES["lora"])
    changed = AutoModelForCausalLM.from_pretrained(moved)
    changed.model.layers[1].mlp.up_proj.weight.data[3, 2] += 0.01
    changed.save_pretrained(moved)
    said = r"model.layers.1.mlp.up_proj.weight differs from the base model's"
    with pytest.raises(Unsupported, match=said):
        export(run, tmp_path / "out", "peft")
    shutil.rmtree(moved)
    with pytest.raises(PeptrainError, match=r"init_from: .* is neither a run directory"):
        export(run, tmp_path / "out", "peft")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_a_base_that_can_not_be_read_is_named(
    name: str, base: Path, corpus: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(base, tmp_path / "base")
    run = adapted("lora", corpus, tmp_path / "run", moved, **CASES["lora"])
    (moved / name).write_text("[]")
    said = rf"^init_from: {re.escape(str(moved))} can't be read: .*; restore the base model$"
    with pytest.raises(CheckpointError, match=said):
        export(run, tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


def test_an_embedding_that_is_the_head_too_is_refused(corpus: Path, tmp_path: Path) -> None:
    train(tiny("full", corpus, tmp_path / "tied", model={"tied": True}, train={"steps": 2}))
    run = adapted("lora", corpus, tmp_path / "run", tmp_path / "tied", train="embedding")
    with pytest.raises(Unsupported, match=r"embed_tokens.weight was trained and is the head too"):
        export(run, tmp_path / "out", "peft")


def test_logits_that_differ_after_peft_loads_them_are_caught(
    base: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = adapted("lora", corpus, tmp_path / "run", base, **CASES["lora"])
    settings = peft.LoraConfig
    monkeypatch.setattr(
        peft, "LoraConfig", lambda **given: settings(**{**given, "lora_alpha": 31.0})
    )
    with pytest.raises(CheckpointError, match="logits differ by"):
        export(run, tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


def test_without_the_package_the_extra_is_named(
    base: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = adapted("lora", corpus, tmp_path / "run", base, **CASES["lora"])
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(PeptrainError, match=r"pip install 'peptrain\[peft\]'"):
        export(run, tmp_path / "out", "peft")
