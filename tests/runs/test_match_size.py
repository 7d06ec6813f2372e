"""--match-trainable: a dense model of the size that another run trains."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import algebra
from support import arch_of, rows, tiny

from peptrain import recipes
from peptrain.config import RunConfig, dump, load, resolved
from peptrain.errors import CheckpointError, ConfigError
from peptrain.methods.bpt import BPT
from peptrain.methods.full import Full
from peptrain.models.hf import ModelConfig, hf_config
from peptrain.models.presets import PRESETS
from peptrain.runs import match_size as control
from peptrain.runs.match_size import matched, trained_by
from peptrain.testing import MODEL
from peptrain.training.loop import train

EXAMPLES = settings(max_examples=25, deadline=None, derandomize=True)


def run_of(config: RunConfig[Any], run: Path) -> Path:
    """A run directory with nothing in it but its configuration."""
    run.mkdir()
    (run / "config.toml").write_text(dump(resolved(config, world_size=1, on_gpu=False)))
    return run


def count(model: ModelConfig) -> tuple[int, Any]:
    """By arithmetic, and the sizes."""
    hf = hf_config(model, 64)
    return algebra.parameter_count(arch_of(hf), "full")[0], hf


@pytest.mark.parametrize(
    "name",
    ["relora-60m-relora", "relora-250m-relora", "pico-small-relora", "loro-130m-loro",
     pytest.param("relora-1.3b-relora", marks=pytest.mark.slow),
     pytest.param("bpt-qwen-0.5b-bpt", marks=pytest.mark.slow)],
)  # fmt: skip
def test_the_total_is_what_the_run_trains(name: str, tmp_path: Path) -> None:
    run = run_of(recipes.load(name), tmp_path / "run")
    config = matched(RunConfig(method=Full(), match_trainable=run))
    wanted = recipes.about(name).trainable
    assert trained_by(load(run / "config.toml")) == wanted
    total, hf = count(config.model)
    shape = PRESETS[str(config.model.preset)]
    # f moves by 8, and a unit of it is 3 d in each layer.
    assert abs(total - wanted) <= 4 * 3 * hf.hidden_size * hf.num_hidden_layers
    assert hf.hidden_size * shape.heads == shape.d * hf.num_attention_heads
    assert hf.num_key_value_heads * shape.heads == shape.kv * hf.num_attention_heads
    assert hf.intermediate_size % 8 == 0 and config.match_trainable is None
    if shape.kv != 2:  # of 14 heads on 2 only 7 on 1 are a smaller number
        assert 0.7 < hf.intermediate_size / hf.hidden_size / (shape.f / shape.d) < 1.4
        assert 0.6 < hf.hidden_size / hf.num_hidden_layers / (shape.d / shape.L) < 1.7


@EXAMPLES
@given(heads=st.integers(1, 5), layers=st.integers(1, 4), f=st.integers(1, 8), part=st.floats(0, 1))
def test_a_model_that_is_there_is_found(heads: int, layers: int, f: int, part: float) -> None:
    """Of any proportions: what it counts is reached within half a step of f."""
    whole = ModelConfig(family="llama", vocab_size=50, hidden_size=8 * heads, heads=heads,
                        layers=layers, intermediate_size=8 * f)  # fmt: skip
    n, L, g = (max(1, round(part * size)) for size in (heads, layers, f))
    small = replace(whole, hidden_size=8 * n, heads=n, layers=L, intermediate_size=8 * g)
    wanted = count(small)[0]
    found = list(control._shapes(whole, 64, wanted))
    assert wanted in [shape.parameters for shape in found]
    for shape in found:
        made = replace(whole, hidden_size=shape.d, heads=shape.heads, kv_heads=shape.kv,
                       layers=shape.L, intermediate_size=shape.f)  # fmt: skip
        assert count(made)[0] == shape.parameters
        assert abs(shape.parameters - wanted) <= 4 * 3 * shape.d * shape.L


SMALL = MODEL | {"hidden_size": 32, "heads": 4, "intermediate_size": 64, "layers": 3}


def test_a_control_trains_and_keeps_its_sizes(corpus: Path, tmp_path: Path) -> None:
    run = run_of(tiny("lowrank", corpus, model=SMALL), tmp_path / "run")
    alone = replace(tiny("full", corpus, tmp_path / "control"), model=ModelConfig())
    result = train(replace(alone, match_trainable=run))
    wanted = trained_by(load(run / "config.toml"))
    assert result.parameters == result.trainable == pytest.approx(wanted, rel=0.06)
    written = load(tmp_path / "control" / "config.toml")
    assert written.match_trainable is None and count(written.model)[0] == result.parameters
    assert rows(tmp_path / "control", "end")


def test_settings_of_the_model_are_the_whole_to_shrink(corpus: Path, tmp_path: Path) -> None:
    run = run_of(tiny("lowrank", corpus, model=SMALL), tmp_path / "run")
    mine = replace(tiny("full", corpus, model=SMALL | {"vocab_size": 300}), match_trainable=run)
    assert matched(mine).model.vocab_size == 300


def test_what_can_not_be_a_control_is_refused(corpus: Path, tmp_path: Path) -> None:
    config = replace(tiny("full", corpus, model=SMALL), match_trainable=tmp_path / "run")
    with pytest.raises(CheckpointError, match="not a run directory"):
        matched(config)
    run_of(tiny("lowrank", corpus, model=SMALL), tmp_path / "run")
    for wrong, message in (
        ({"method": BPT(rank=2)}, r"requires method full \(got bpt\)"),
        ({"init_from": tmp_path}, f"cannot be combined with init_from {tmp_path};"),
        ({"match_trainable": run_of(tiny("full", corpus, model=SMALL), tmp_path / "all")},
         "but no smaller model of this architecture has that number"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            matched(replace(config, **wrong))


def test_a_run_whose_settings_were_edited_is_refused(corpus: Path, tmp_path: Path) -> None:
    steps = {"steps": 1, "checkpoint_every": 1}
    train(tiny("lowrank", corpus, tmp_path / "run", model=SMALL, train=steps))
    alone = replace(tiny("full", corpus), model=ModelConfig(), match_trainable=tmp_path / "run")
    matched(alone)
    file = tmp_path / "run" / "config.toml"
    assert "rank = 2\n" in file.read_text()
    file.write_text(file.read_text().replace("rank = 2\n", "rank = 1\n"))
    with pytest.raises(CheckpointError, match=r"method\.rank"):
        matched(alone)
