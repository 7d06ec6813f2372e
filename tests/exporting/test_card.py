"""The model card of an export, and what each of its files says and allows."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import tiny, tiny_method
from transformers import GenerationConfig

import peptrain
from peptrain.data.index import Index
from peptrain.eval.run import evaluate
from peptrain.exporting.card import CARD, base_of, describe, in_markdown
from peptrain.exporting.export import FORMS, Form, export
from peptrain.runs.directory import RunDir
from peptrain.testing import MODEL
from peptrain.training.loop import train

HAS: dict[Form, str] = {"dense": "bpt", "factorised": "loro", "peft": "lora", "gguf": "bpt"}


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each method, the adapter around an exported base."""
    folder = tmp_path_factory.mktemp("secret-place")
    made = {name: folder / name for name in ("bpt", "loro", "lora")}
    for name in ("bpt", "loro"):
        train(tiny(name, corpus, made[name], train={"precision": "fp32"}))
    base = export(made["bpt"], folder / "base")
    method = tiny_method("lora", warm_start_steps=0, train_rest=False)
    config = tiny(method, corpus, made["lora"], model=dict.fromkeys(MODEL))
    train(peptrain.RunConfig(**{**vars(config), "init_from": base}))
    return made


@pytest.fixture(scope="module")
def exported(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[Form, Path]:
    folder = tmp_path_factory.mktemp("secret-exports")
    return {form: export(runs[name], folder / form, form) for form, name in HAS.items()}


def card(out: Path) -> str:
    return (out / CARD).read_text(encoding="utf-8")


@pytest.mark.parametrize("form", FORMS)
def test_no_file_names_a_place_on_this_machine(form: Form, exported: dict[Form, Path]) -> None:
    for file in exported[form].iterdir():
        content = file.read_bytes()
        for secret in (b"secret-", os.fsencode(Path.home()), b"/tmp"):
            assert secret not in content, file.name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_every_file_has_the_permissions_of_the_umask(
    form: Form, mask: int, runs: dict[str, Path], tmp_path: Path
) -> None:
    before = os.umask(mask)
    try:
        out = export(runs[HAS[form]], tmp_path / "out", form)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {0o666 & ~mask}
    assert out.stat().st_mode & 0o777 == 0o777 & ~mask


@pytest.mark.parametrize("form", FORMS)
def test_a_card_says_how_the_model_was_made(form: Form, exported: dict[Form, Path]) -> None:
    text = card(exported[form])
    data = ModelCard(text).data.to_dict()
    assert data["pipeline_tag"] == "text-generation" and HAS[form] in data["tags"]
    libraries = {"dense": "transformers", "factorised": "transformers"}
    assert data["library_name"] == libraries.get(form, form)
    for row in ("| step | 8 of 8 |", "| tokens | 512 |", "| batch | 4 sequences of 16 tokens |",
                f"| peptrain | {peptrain.__version__} |"):  # fmt: skip
        assert row in text
    assert f'[method]\nname = "{HAS[form]}"' in text and "\nlr = " in text
    assert "init_from" not in text and "path" not in text.partition("```toml")[2]


def test_the_counts_and_the_losses_are_those_of_the_run(
    runs: dict[str, Path], exported: dict[Form, Path]
) -> None:
    end = RunDir(runs["bpt"]).newest("end")
    assert end is not None
    text = card(exported["dense"])
    assert f"| {end['parameters']:,}, of them {end['trainable']:,} trainable |" in text
    assert f"| held out loss | {end['held_out_loss']:.4f} |" in text
    assert f"| perplexity | {end['perplexity']:.4f} |" in text


def test_what_was_evaluated_later_is_in_the_card(
    runs: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    run = runs["loro"]
    assert "Not measured at this step." in card(export(Path(f"{run}@6"), tmp_path / "before"))
    found = evaluate(Path(f"{run}@6"))
    entries = json.loads((run / "eval.json").read_text())
    task = {"step": 6, "task": "blimp", "items": 1000, "acc": 0.625, "acc_stderr": 0.0125}
    other = {"step": 6, "data": "another corpus", "legacy": False, "loss": 9.5, "tokens": 1}
    (run / "eval.json").write_text(json.dumps([*entries, task, other]))
    text = card(export(Path(f"{run}@6"), tmp_path / "after"))
    assert f"| held out loss | {found.loss:.4f} |" in text and "9.5" not in text
    assert "| blimp acc | 0.6250 |" in text and "| blimp acc stderr | 0.0125 |" in text
    assert "0.6250" not in card(export(run, tmp_path / "another-step"))
    (run / "eval.json").write_text('[{"step"')
    assert "Not measured" in card(export(Path(f"{run}@6"), tmp_path / "damaged"))


def test_the_lines_to_load_it_work(exported: dict[Form, Path], runs: dict[str, Path]) -> None:
    for out in exported.values():
        code = re.findall(r"```python\n(.*?)```", card(out), re.DOTALL)[0]
        names: dict[str, Any] = {"DIR": str(out), "BASE": str(runs["lora"].with_name("base"))}
        exec(code, names)
        ids = names["tokenizer"]("tea", return_tensors="pt").input_ids
        assert names["model"](ids).logits.shape == (1, ids.shape[1], MODEL["vocab_size"])


def test_safetensors_files_say_method_step_and_version(exported: dict[Form, Path]) -> None:
    for form in ("dense", "peft"):
        (file,) = exported[form].glob("*.safetensors")
        with safe_open(file, "pt") as opened:
            said = opened.metadata()
        wanted = {"method": HAS[form], "step": "8", "peptrain": peptrain.__version__}
        assert said == {"format": "pt", **wanted}
    assert GenerationConfig.from_pretrained(exported["dense"]).eos_token_id == 0


def test_describing_a_file_changes_no_tensor(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).view(2, 3), "b": torch.randn(5).bfloat16()}
    save_file(tensors, file := tmp_path / "x.safetensors", {"format": "pt", "step": "old"})
    describe(file, {"step": "1", "name": "ü" * 101})
    assert [p.name for p in tmp_path.iterdir()] == [file.name]
    found = load_file(file)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "step": "1", "name": "ü" * 101}


def test_hub_datasets_of_the_corpus_are_named_and_private_files_are_not(
    corpus: Path, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "datasets:" not in card(export(runs["bpt"], tmp_path / "private"))
    index = Index.load(corpus)
    index.sources[0]["source"] = "hf:org/books@0123abc:en:train"
    monkeypatch.setattr(Index, "load", lambda path: index)
    public = card(export(runs["bpt"], tmp_path / "public"))
    assert ModelCard(public).data.datasets == ["org/books"]
    index = replace(index, tokenizer_sha256="0" * 64)  # prepared again by another tokenizer
    assert "datasets:" not in card(export(runs["bpt"], tmp_path / "another"))


def test_the_recipe_of_the_command_is_named(runs: dict[str, Path], tmp_path: Path) -> None:
    file = runs["bpt"] / "env.json"
    before, entries = file.read_text(), json.loads(file.read_text())
    entries[0]["command"] = "peptrain train bpt --recipe bpt-qwen-0.5b-bpt --run /secret/run"
    try:
        file.write_text(json.dumps(entries))
        out = export(runs["bpt"], tmp_path / "out")
    finally:
        file.write_text(before)
    assert "| recipe | bpt-qwen-0.5b-bpt |" in card(out)
    with safe_open(out / "model.safetensors", "pt") as opened:
        assert opened.metadata()["recipe"] == "bpt-qwen-0.5b-bpt"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/home/me/models/base", "base"),
        ("/home/me/.cache/huggingface/hub/models--org--a-b/snapshots/12ab", "org/a-b"),
    ],
)
def test_a_base_is_named_without_its_path(path: str, name: str) -> None:
    assert base_of(Path(path)) == name


def test_a_name_does_not_end_the_markdown_around_it() -> None:
    assert in_markdown("my `base`|x\n# y") == r"my _base__x\n# y"
