"""--init-from: the weights of a run, or of a directory in Hugging Face's format."""

import json
import logging
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import Killed, kill_at, rows, tiny, tiny_method
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from peptrain.config import RunConfig, load, resolved
from peptrain.data import Corpus
from peptrain.errors import CheckpointError, ConfigError, PeptrainError
from peptrain.eval.run import evaluate
from peptrain.execution.loss import token_loss
from peptrain.exporting.export import export
from peptrain.methods import METHODS
from peptrain.methods.base import Method
from peptrain.methods.bpt import BPTLinear
from peptrain.methods.lowrank import LowRankLinear
from peptrain.models.dense import dense_state
from peptrain.models.hf import ModelConfig
from peptrain.models.sites import reparametrized
from peptrain.runs.build import build, open_run, plain_model
from peptrain.runs.directory import RunDir
from peptrain.runs.init_from import initial_weights, with_inherited_model
from peptrain.testing import MODEL, differences, losses, newest
from peptrain.training.loop import resume, train

KEEP_THE_FUNCTION = ["full", "bpt", "lora", "relora", "dora", "vera", "hyperadapt"]
SIZES = {"vocab_size": 320, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1}
HF: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False, rms_norm_eps=1e-5),
    "llama tied": LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
}
IDS = torch.randint(320, (3, 16), generator=torch.Generator().manual_seed(0))


def starting(
    method: Method | str, source: Path, corpus: Path, run: Path | None = None, **sections: Any
) -> RunConfig[Any]:
    """From `source`, nothing said of the model unless `sections` do."""
    model = sections.pop("model", None)
    config = replace(tiny(method, corpus, run, **sections), init_from=source)
    return config if model == MODEL else replace(config, model=ModelConfig(**model or {}))


def built(config: RunConfig[Any], phase: int = 0) -> Any:
    config = resolved(with_inherited_model(config), world_size=1, on_gpu=False)
    return build(config, phase, initial_weights(config))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def sources(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of full, bpt and relora, and directories of Hugging Face."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("full", "bpt", "relora"):
        train(tiny(name, corpus, folder / name, train={"steps": 5, "seed": 7}, optim={"lr": 0.02}))
    for name, config in HF.items():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
        with torch.no_grad():
            for p in model.parameters():
                p += 0.05 * torch.randn(p.shape)  # biases and norms too
        model.save_pretrained(folder / name)
    return {path.name: path for path in folder.iterdir()}


def model_of(source: Path) -> Any:
    if (source / "config.toml").exists():
        return open_run(source).model
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)


# --- the function


@pytest.mark.parametrize("source", ["full", "bpt", "relora", *HF])
@pytest.mark.parametrize("name", KEEP_THE_FUNCTION)
def test_the_function_is_that_of_the_source(
    name: str, source: str, sources: dict[str, Path], corpus: Path
) -> None:
    wanted = logits(model_of(sources[source]))
    config = starting(name, sources[source], corpus)
    for phase in range(len(config.method.phases(8)) + 1):
        model = built(config, phase)
        assert_close(logits(model), wanted, rtol=0, atol=1e-6)
        last = phase == len(config.method.phases(8))
        assert bool(list(reparametrized(model))) is (last and name != "full")


def test_bpt_keeps_the_weights_it_is_given_and_draws_fresh_ones(
    sources: dict[str, Path], corpus: Path
) -> None:
    given = {n: p for n, p in model_of(sources["full"]).named_parameters()}
    config = starting("bpt", sources["full"], corpus)
    layers = [layer for layer in reparametrized(built(config)) if isinstance(layer, BPTLinear)]
    assert len(layers) == 14
    assert all(torch.equal(layer.weight, given[f"{layer.site}.weight"]) for layer in layers)
    fresh = resolved(tiny("bpt", corpus), world_size=1, on_gpu=False)
    drawn, plain = build(fresh, 0), dict(plain_model(fresh).named_parameters())
    for layer in reparametrized(drawn):
        assert isinstance(layer, BPTLinear)
        assert not torch.equal(layer.weight, plain[f"{layer.site}.weight"])


@pytest.mark.parametrize("source", ["full", "relora", *HF])
@pytest.mark.parametrize("name", KEEP_THE_FUNCTION)
def test_the_first_loss_is_that_of_the_source(
    name: str, source: str, sources: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    train(starting(name, sources[source], corpus, tmp_path / "run", train={"steps": 3}))
    at = {"seed": 0, "step": 0, "rank": 0, "world": 1}
    first = Corpus.open(corpus).batch(batch_size=4, seq_len=16, **at)
    model = model_of(sources[source]).train()
    with torch.no_grad():
        wanted = token_loss(model(input_ids=first[:, :-1]).logits, first[:, 1:]).item()
    found = [loss for _, loss in losses(tmp_path / "run")]
    assert found[0] == pytest.approx(wanted, abs=1e-6) and found[0] != found[-1]


@pytest.mark.parametrize("name", ["lowrank", "loro"])
@pytest.mark.parametrize("source", ["bpt", "qwen2"])
@pytest.mark.parametrize("rank", [1, 3])
def test_factored_methods_start_at_the_best_approximation_of_each_matrix(
    name: str, source: str, rank: int, sources: dict[str, Path], corpus: Path
) -> None:
    given = dense_state(model_of(sources[source]))
    model = built(starting(tiny_method(name, rank=rank), sources[source], corpus))
    own = dense_state(model)
    layers = [layer for layer in reparametrized(model) if isinstance(layer, LowRankLinear)]
    assert len(layers) == 14
    for layer in layers:
        W = given.pop(f"{layer.site}.weight").numpy()
        U, sigma, Vt = np.linalg.svd(W, full_matrices=False)
        best = (U[:, :rank] * sigma[:rank]) @ Vt[:rank]
        B, A = layer.B.detach().numpy(), layer.A.detach().numpy()
        np.testing.assert_allclose(B @ A, best, rtol=0, atol=1e-12)
        for factor in (B, A):
            found = np.linalg.svd(factor, compute_uv=False)
            np.testing.assert_allclose(found, np.sqrt(sigma[:rank]), rtol=1e-10)
    assert given and all(torch.equal(own[n], weight) for n, weight in given.items())


def test_it_may_be_of_another_precision(sources: dict[str, Path], corpus: Path) -> None:
    for source in ("full", "llama"):
        wanted = dense_state(model_of(sources[source]))
        model = built(starting("full", sources[source], corpus, train={"precision": "bf16"}))
        assert all(torch.equal(p, wanted[n].bfloat16()) for n, p in model.named_parameters())


# --- the model's settings


@pytest.mark.parametrize("source", ["full", *HF])
def test_the_model_left_alone_is_that_of_the_source(
    source: str, sources: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(starting("lora", sources[source], corpus, run, train={"steps": 3}))
    theirs, ours = model_of(sources[source]).config, open_run(run).model.config
    for key in (*SIZES, "model_type", "tie_word_embeddings", "rms_norm_eps"):
        assert getattr(ours, key) == getattr(theirs, key), key
    config = load(run / "config.toml")
    assert config.init_from == sources[source].resolve()


def test_a_run_that_started_elsewhere_is_a_source_like_any_other(
    sources: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    """Its model is in its own model.json, so what it came from may go."""
    here = copied(sources["llama tied"], tmp_path)
    train(starting("bpt", here, corpus, tmp_path / "one", train={"steps": 3}))
    shutil.rmtree(here)
    model = built(starting("relora", tmp_path / "one", corpus), phase=1)
    assert_close(logits(model), logits(model_of(tmp_path / "one")), rtol=0, atol=1e-6)
    train(starting("relora", tmp_path / "one", corpus, tmp_path / "two", train={"steps": 3}))
    shutil.rmtree(tmp_path / "one")
    assert open_run(tmp_path / "two").model.config.rms_norm_eps == HF["llama tied"].rms_norm_eps


def test_a_model_that_is_given_and_agrees_is_as_good(
    sources: dict[str, Path], corpus: Path
) -> None:
    config = starting("full", sources["full"], corpus, model=MODEL)
    assert with_inherited_model(config) == config
    assert_close(logits(built(config)), logits(model_of(sources["full"])), rtol=0, atol=0)


@pytest.mark.parametrize("source", ["full", "llama"])
@pytest.mark.parametrize(
    "other, weight",
    [
        ({"hidden_size": 32}, r"lm_head\.weight|model\.embed_tokens\.weight"),
        ({"layers": 3}, r"model\.layers\.2\."),
        ({"tied": True}, r"lm_head\.weight"),
        ({"intermediate_size": 40}, r"mlp\.down_proj\.weight"),
        ({"family": "qwen2"}, r"q_proj\.bias|k_proj\.bias"),
    ],
)
def test_a_model_of_another_shape_is_refused_before_anything_is_written(
    source: str, other: dict[str, Any], weight: str, sources: dict[str, Path], corpus: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    kv = {"kv_heads": 1} if source == "llama" else {}
    config = tiny("lora", corpus, tmp_path / "run", model=kv | other)
    with pytest.raises(
        ConfigError, match=rf"^init_from: .*({weight}).*; leave out all model settings"
    ):
        train(replace(config, init_from=sources[source]))
    assert list(tmp_path.iterdir()) == []


# --- the run


@pytest.mark.parametrize("source", ["relora", "qwen2"])
def test_once_there_is_a_checkpoint_the_source_may_go(
    source: str, sources: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    here, each = copied(sources[source], tmp_path), {"checkpoint_every": 1, "keep": 99}
    train(starting("relora", here, corpus, tmp_path / "whole", train=each))
    config = starting("relora", here, corpus, tmp_path / "run", train=each)
    with pytest.raises(Killed):
        train(config, kill_at("checkpoint", 1))
    shutil.rmtree(here)
    resume(tmp_path / "run")
    assert differences(*(newest(tmp_path / x) for x in ("run", "whole"))) == []
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    (end,) = rows(tmp_path / "run", "end")
    assert evaluate(tmp_path / "run").loss == pytest.approx(end["held_out_loss"], abs=1e-6)
    exported = model_of(export(tmp_path / "run", tmp_path / "out"))
    assert_close(logits(exported), logits(open_run(tmp_path / "run").model), rtol=0, atol=1e-5)


def test_before_the_first_checkpoint_the_source_is_read_again(
    sources: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    here = copied(sources["llama"], tmp_path)
    train(starting("bpt", here, corpus, tmp_path / "whole"))
    for run in ("one", "two"):
        with pytest.raises(Killed):
            train(starting("bpt", here, corpus, tmp_path / run), kill_at("step", 2))
    resume(tmp_path / "one")
    assert differences(*(newest(tmp_path / x) for x in ("one", "whole"))) == []
    shutil.rmtree(here)
    with pytest.raises(ConfigError, match=r"^init_from: .*copy"):
        resume(tmp_path / "two")


@pytest.mark.parametrize("name", [n for n, cls in METHODS.items() if not cls.from_scratch_only])
def test_the_configuration_of_the_run_replays_it(
    name: str, sources: dict[str, Path], corpus: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """From another directory too, though the path was given relative to this one."""
    monkeypatch.chdir(sources["full"].parent)
    train(starting(name, Path("full"), corpus, tmp_path / "one", train={"steps": 4}))
    monkeypatch.chdir(tmp_path)
    train(replace(load(tmp_path / "one" / "config.toml"), run=tmp_path / "two"))
    one, two = (newest(tmp_path / x) for x in ("one", "two"))
    assert differences(one, two) == [] and one.identity == two.identity
    train(tiny(name, corpus, tmp_path / "fresh", train={"steps": 4}))
    assert differences(one, newest(tmp_path / "fresh")) != []


# --- bad sources


def refused(
    source: Path, corpus: Path, match: str, error: type[PeptrainError] = ConfigError
) -> None:
    run = source.parent / "refused"
    with pytest.raises(error, match=match):
        train(starting("full", source, corpus, run))
    assert not list(run.parent.glob("*refused*"))


def copied(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder / "copy"))


def test_no_such_directory_or_one_of_something_else(corpus: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", corpus, r"^init_from: .*nowhere is neither a run directory")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", corpus, r"^init_from: .*config\.toml.*config\.json")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", corpus, r"^init_from: .*file is neither a run directory")


def test_a_run_without_a_checkpoint(sources: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    source = copied(sources["full"], tmp_path)
    shutil.rmtree(RunDir(source).checkpoints)
    refused(source, corpus, r"copy: contains no checkpoint", CheckpointError)


def test_a_base_model_lacks_its_head_unless_it_is_tied(
    sources: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    for source in ("llama", "qwen2"):
        model_of(sources[source]).model.save_pretrained(tmp_path / source)
    refused(tmp_path / "llama", corpus, r"^init_from: .* lacks lm_head\.weight and 0 more")
    model = built(starting("full", tmp_path / "qwen2", corpus))
    assert_close(logits(model), logits(model_of(sources["qwen2"])), rtol=0, atol=1e-12)


def edited(source: Path, folder: Path, **values: Any) -> Path:
    """A copy of `source` whose config.json says something else."""
    copy = copied(source, folder)
    given = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(given | values))
    return copy


def test_weights_that_are_not_those_of_the_config(
    sources: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    wider = edited(sources["llama"], tmp_path / "wider", intermediate_size=40)
    refused(wider, corpus, r"^init_from: .*\[16, 24\] for model\.layers\.0\.mlp\.down.*\[16, 40\]")
    deeper = edited(sources["llama"], tmp_path / "deeper", num_hidden_layers=3)
    refused(deeper, corpus, r"^init_from: .*lacks model\.layers\.2\.input_layernorm\.weight and 8")


def test_weights_that_the_config_has_no_place_for_are_a_warning(
    sources: dict[str, Path], corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = edited(sources["llama tied"], tmp_path, attention_bias=False)
    with caplog.at_level(logging.WARNING, "peptrain"):
        built(starting("full", sources["llama tied"], corpus))
        assert "peptrain" not in caplog.text
        built(starting("full", source, corpus))
    (said,) = [r.message for r in caplog.records if r.name == "peptrain"]
    assert "contains model.layers.0.self_attn.k_proj.bias and 7 more" in said


def test_a_damaged_file(sources: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    source = copied(sources["llama"], tmp_path)
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    refused(source, corpus, r"^init_from: .*copy can't be read")


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


def test_a_pickle_is_never_opened(sources: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    source = copied(sources["llama"], tmp_path)
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "went-off")))
    refused(
        source, corpus, r"^init_from: .*copy can't be read: .*\.bin: pickled weights.*; convert"
    )
    assert not (tmp_path / "went-off").exists()
    pickle.loads((source / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "went-off").exists()


# --- tokenizers


def with_tokenizer(source: Path, corpus: Path, folder: Path, *, other: bool) -> Path:
    """A copy of `source` with the corpus' tokenizer, or one in which two tokens change places."""
    copy = copied(source, folder)
    known = json.loads(Corpus.open(corpus).tokenizer_file.read_text(encoding="utf-8"))
    if other:
        vocabulary = known["model"]["vocab"]
        one, two = list(vocabulary)[50:52]
        vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    where = RunDir(copy).tokenizer if (copy / "config.toml").exists() else copy
    (where / "tokenizer.json").write_text(json.dumps(known), encoding="utf-8")
    (where / "SHA256SUMS").unlink(missing_ok=True)  # as in a run of 0.1.0
    return copy


@pytest.mark.parametrize("source", ["full", "llama"])
@pytest.mark.parametrize("other", [True, False])
def test_another_tokenizer_is_a_warning(
    source: str, other: bool, sources: dict[str, Path], corpus: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    copy = with_tokenizer(sources[source], corpus, tmp_path, other=other)
    with caplog.at_level(logging.WARNING, "peptrain"):
        train(starting("full", copy, corpus, tmp_path / "run", train={"steps": 1}))
    said = [r.message for r in caplog.records]
    assert len(said) == other and all("init_from: the tokenizer of" in m for m in said)
    assert all(str(copy) in m and "--tokenizer" in m for m in said)
