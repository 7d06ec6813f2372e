"""Hugging Face directories of strangers: code in them never runs, and is asked for by nobody."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peptrain.errors import ConfigError, Unsupported
from peptrain.files import LARGEST_JSON
from peptrain.models.auto import load_model, load_tokenizer
from peptrain.models.hf import ModelConfig, build_model, hf_config

SIZES: dict[str, Any] = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8}
SIZES |= {"num_hidden_layers": 1, "num_attention_heads": 2}
OWN = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoTokenizer": ["own.T", None]}
ELSEWHERE = {kind: f"some/repository--{OWN[kind]}" for kind in ("AutoConfig", "AutoTokenizer")}


@pytest.fixture(autouse=True)
def nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*question: object) -> str:
        raise AssertionError("asked on stdin")

    monkeypatch.setattr("builtins.input", asked)


def directory(path: Path, name: str = "config.json", **config: Any) -> Path:
    """A model's directory, with code that leaves a trace if it ever runs."""
    path.mkdir(exist_ok=True)
    (path / "own.py").write_text(f"open({str(path / 'ran')!r}, 'w')\n")
    (path / name).write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("given_as", ["directory", "file"])
@pytest.mark.parametrize("own", [OWN, ELSEWHERE])
@pytest.mark.parametrize("kind", [{"model_type": "own"}, {}, {"model_type": "vit"}])
def test_a_configuration_that_needs_code_is_refused_in_one_line(
    kind: dict[str, Any], own: dict[str, Any], given_as: str, tmp_path: Path
) -> None:
    path = directory(tmp_path / "d", auto_map=own, **kind)
    given = path if given_as == "directory" else path / "config.json"
    with pytest.raises(ConfigError, match=r"^model\.config: ") as refused:
        build_model(ModelConfig(config=given), seq_len=4, seed=0)
    assert f"{path}/config.json: needs code of its own" in str(refused.value)
    assert "peptrain never runs code from a directory" in str(refused.value)
    assert "\n" not in str(refused.value) and not (path / "ran").exists()


def test_a_model_of_transformers_is_built_by_transformers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = directory(tmp_path / "d", model_type="llama", auto_map=OWN, **SIZES)
    with caplog.at_level(logging.WARNING, "peptrain"):
        model = build_model(ModelConfig(config=path), seq_len=4, seed=0)
    assert type(model) is LlamaForCausalLM and not (path / "ran").exists()
    assert "config.json: names code of its own" in caplog.text and "'llama'" in caplog.text
    model.save_pretrained(tmp_path / "out")
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize(
    "key, value",
    [
        ("attn_implementation", "some/kernel"),
        ("_attn_implementation", "some/kernel@v1:function"),
        ("_attn_implementation_internal", {"": "some/kernel"}),
        ("experts_implementation", "some/kernel"),
        ("text_config", {"attn_implementation": "some/kernel"}),
    ],
)
def test_a_kernel_of_the_hub_is_refused(key: str, value: object, tmp_path: Path) -> None:
    path = directory(tmp_path / "d", model_type="llama", **SIZES, **{key: value})
    with pytest.raises(ConfigError, match=r"config\.json: .*some/kernel.* is code from elsewhere"):
        hf_config(ModelConfig(config=path), seq_len=4)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "null", "{", " " * (LARGEST_JSON + 1)])
def test_what_is_no_configuration_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"^model\.config: .* is not a usable config\.json: .+$"):
        hf_config(ModelConfig(config=tmp_path), seq_len=4)


@pytest.mark.parametrize("given_as", ["model.config", "init_from"])
@pytest.mark.parametrize(
    "key, value, named",
    [
        (
            "num_labels",
            "1" + "0" * 400,
            "num_labels: must be <= 100000 (got a number of 1329 bits)",
        ),
        ("num_labels", "1" + "0" * 5000, "config.json: an integer of 5001 digits"),
        ("num_hidden_layers", "1000000000", "num_hidden_layers: must be <= 100000 (got 10000000"),
        ("rope_theta", "-1" + "0" * 400, "rope_theta: must be a number of 64 bits"),
        ("rms_norm_eps", "NaN", "rms_norm_eps: must be a finite number (got nan)"),
        ("rms_norm_eps", "1e400", "rms_norm_eps: must be a finite number (got inf)"),
        ("text_config", '{"n_layer": 1e99, "n_layers": 1000000}', "n_layers: must be <= 100000"),
        ("rope_scaling", "[1, NaN]", "rope_scaling: must be a finite number (got nan)"),
        ("id2label", "[" * 100_000, "config.json: nested too deeply"),
    ],
)
def test_a_number_that_no_model_has_is_named(
    key: str, value: str, named: str, given_as: str, tmp_path: Path
) -> None:
    """transformers writes a label for each of num_labels, and so would never end."""
    path = directory(tmp_path / "d", model_type="llama", **SIZES | {key: "HERE"})
    text = (path / "config.json").read_text().replace('"HERE"', value)
    (path / "config.json").write_text(text)
    with pytest.raises((ConfigError, ValueError)) as refused:
        if given_as == "init_from":
            load_model(path)
        else:
            hf_config(ModelConfig(config=path), seq_len=4)
    assert named in str(refused.value)


def test_limits_of_a_configuration_may_be_infinite(tmp_path: Path) -> None:
    path = directory(tmp_path / "d", model_type="llama", **SIZES, time_step_limit=[0.0, math.inf])
    assert hf_config(ModelConfig(config=path), seq_len=4).time_step_limit == [0.0, math.inf]


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("own", [OWN, ELSEWHERE])
def test_a_tokenizer_that_needs_code_is_refused(
    own: dict[str, Any], known: bool, name: str, tmp_path: Path, corpus: Path
) -> None:
    made = PreTrainedTokenizerFast(tokenizer_file=str(corpus / "tokenizer.json"))
    made.save_pretrained(tmp_path / "d")
    kind = {"tokenizer_class": made.__class__.__name__} if known else {}
    path = directory(tmp_path / "d", name, auto_map=own, **kind)
    with pytest.raises(Unsupported, match=rf"{name}: needs code .* never runs code"):
        load_tokenizer(path)
    assert not (path / "ran").exists()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in two shards."""
    out = tmp_path_factory.mktemp("saved")
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(out, max_shard_size="2KB")
    return out


def pickled(path: Path) -> None:
    for file in [*path.glob("*.safetensors"), path / "model.safetensors.index.json"]:
        file.unlink()
    (path / "pytorch_model.bin").touch()


def _index(path: Path, change: Callable[[str], str]) -> None:
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] = {key: change(name) for key, name in index["weight_map"].items()}
    file.write_text(json.dumps(index))


def absolute(path: Path) -> None:
    _index(path, lambda name: str(path / name))


def above(path: Path) -> None:
    _index(path, lambda name: f"../{path.name}/{name}")


def pickled_shards(path: Path) -> None:
    _index(path, lambda name: name.replace(".safetensors", ".bin"))


def named_elsewhere(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    config["transformers_weights"] = "adapter_model.bin"
    (path / "config.json").write_text(json.dumps(config))


def adapter(path: Path) -> None:
    (path / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')


@pytest.mark.parametrize(
    "damage, message",
    [
        (pickled, r"pytorch_model\.bin: pickled weights, .*; convert them"),
        (absolute, r"index\.json: names the weights '/.*; only \.safetensors files in that"),
        (above, r"index\.json: names the weights '\.\./"),
        (pickled_shards, r"index\.json: names the weights .*\.bin'"),
        (named_elsewhere, r"config\.json: names the weights 'adapter_model\.bin'"),
        (adapter, r"adapter_config\.json: an adapter"),
    ],
)
def test_only_safetensors_of_the_directory_are_read(
    damage: Callable[[Path], None], message: str, saved: Path, tmp_path: Path
) -> None:
    path = tmp_path / "d"
    path.mkdir()
    for file in saved.iterdir():
        (path / file.name).symlink_to(file)  # as in the cache of huggingface_hub
    assert isinstance(load_model(path)[0], LlamaForCausalLM)
    for file in path.glob("*.json"):
        text = file.read_text()
        file.unlink()
        file.write_text(text)
    damage(path)
    with pytest.raises(Unsupported, match=message):
        load_model(path)
