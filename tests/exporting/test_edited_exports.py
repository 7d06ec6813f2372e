"""Exports that were edited: what is wrong is named, by its file and key, and never loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_export import Exports
from transformers import AutoModelForCausalLM

import peptrain.exporting.export
import peptrain.hf
from peptrain.analysis.source import is_run
from peptrain.cli.app import main
from peptrain.errors import CheckpointError
from peptrain.exporting.export import Form, export
from peptrain.exporting.factorised import RECIPE, load_factorised
from peptrain.runs.build import Opened, open_run

assert peptrain.hf.register  # imported for what it registers
UP = "layers.*.mlp.up_proj"
READ_A_RUN = ("eval X", "export X --out out", "resume X", "watch X", "report X --out out.html",
              "plot X --out out.svg", "train full --continue-from X")  # fmt: skip
TAKE_A_RUN = ("train full --init-from X", "train full --match-trainable X", "generate X a",
              "analyze X --out out")  # fmt: skip


def edited(folder: Path, out: Path, **values: Any) -> Path:
    """Copy an export without its checksums, with `values` in config.json; None removes one."""
    shutil.copytree(folder, out)
    (out / RECIPE).unlink()
    config = json.loads((out / "config.json").read_text()) | values
    kept = {key: value for key, value in config.items() if value is not None or key not in values}
    (out / "config.json").write_text(json.dumps(kept))
    return out


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("ranks", None, r"ranks: must be an object .*\(got \{\}\)"),
        ("ranks", "all", r"ranks: must be an object .*\(got 'all'\)"),
        ("ranks", {UP: "8"}, r"ranks: 'layers.*up_proj' must have an integer >= 1 \(got '8'\)"),
        ("ranks", {UP: -1}, r"must have an integer >= 1 \(got -1\)"),
        ("ranks", {UP: True}, r"must have an integer >= 1 \(got True\)"),
        ("factor_activation", "nope", r"factor_activation: transformers has no 'nope'"),
        ("factor_activation", ["silu"], r"factor_activation: transformers has no \['silu'\]"),
    ],
)  # fmt: skip
def test_ranks_and_activations_that_cannot_be_are_named_by_both_loaders(
    key: str, value: Any, said: str, exports: Exports, tmp_path: Path
) -> None:
    folder = edited(exports.factorised("loro"), tmp_path / "edited", **{key: value})
    with pytest.raises(CheckpointError, match=said):
        load_factorised(folder)
    with pytest.raises(ValueError, match=said):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("num_attention_heads", 0, "config.json: ZeroDivisionError"),
        ("hidden_size", -2, "negative dimension"),
        ("dtype", "float33", "config.json: AttributeError: .*float33"),
        ("hidden_act", "nope", "config.json: KeyError: 'nope'"),
        ("vocab_size", 10, r"can't be read: lm_head\.weight: not in the weights"),
    ],
)
def test_other_values_that_cannot_be_are_no_bug_of_ours(
    key: str, value: Any, said: str, exports: Exports, tmp_path: Path
) -> None:
    folder = edited(exports.factorised("loro"), tmp_path / "edited", **{key: value})
    with pytest.raises(CheckpointError, match=said):
        load_factorised(folder)


@pytest.mark.parametrize("recipe", [{}, {"sha256": {}}, {"sha256": 3}])
def test_a_recipe_without_checksums_is_refused(
    recipe: dict[str, Any], exports: Exports, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exports.factorised("loro"), tmp_path / "edited"))
    (folder / RECIPE).write_text(json.dumps(recipe))
    with pytest.raises(CheckpointError, match=r"peptrain\.json: has no checksums"):
        load_factorised(folder)


@pytest.mark.parametrize(
    "file, said", [("adapter_config.json", "an adapter"), ("model.gguf", "for llama.cpp")]
)
def test_forms_that_only_others_read_are_named(
    file: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"{said} \({file}\).* give the run, or its export"):
        is_run(tmp_path)
    for command in (*READ_A_RUN, *TAKE_A_RUN):
        assert main([word.replace("X", str(tmp_path)) for word in command.split()]) == 1
        told = " ".join(capsys.readouterr().err.split())
        assert f"{said} ({file}), which peptrain writes and does not read; give the run" in told


def test_what_else_is_given_for_a_run_is_named_with_what_to_give(
    exports: Exports, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = exports.run("loro")
    for given, said in (
        (exports.factorised("loro"), "a Hugging Face model (config.json): give the run that"),
        (corpus, "a prepared corpus (index.json): give a run that was trained on it"),
        (corpus / "index.json", "it is a file"),
        (run / "checkpoints", f"a part of a run: give {run}"),
        (sorted(run.glob("checkpoints/*"))[-1], f"a checkpoint: give the run, {run}"),
        (corpus.parent, "(config.toml is missing)"),
    ):
        for command in READ_A_RUN:
            words = [word.replace("X", str(given)) for word in command.split()]
            if given == exports.factorised("loro") and words[0] == "eval":
                continue  # which judges it by tasks
            assert main(words) == 1
            told = " ".join(capsys.readouterr().err.split())
            assert f"{given}: not a run directory (config.toml is missing)" in told
            assert told.endswith(said) or f"; it is {said}" in told


@pytest.mark.parametrize("form", ["dense", "factorised"])
def test_a_run_whose_logits_are_gone_is_not_exported_and_an_earlier_step_is_advised(
    form: Form, exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(run: Path) -> Opened:
        opened = open_run(run)
        with torch.no_grad():
            opened.model.get_input_embeddings().weight.fill_(torch.inf)
        return opened

    monkeypatch.setattr(peptrain.exporting.export, "open_run", diverged)
    with pytest.raises(CheckpointError, match=r"not finite.* give an earlier checkpoint by --step"):
        export(exports.run("loro"), tmp_path / "out", form)
    assert not [*tmp_path.iterdir()]
