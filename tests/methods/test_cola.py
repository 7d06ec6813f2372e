"""CoLA: its layer against the formulas, its initialisation, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from byhand import configured, made
from oracles import cola
from support import tiny, tiny_method
from torch import nn
from transformers import LlamaConfig

from peptrain.adaptation import adapt
from peptrain.errors import ConfigError, Unsupported
from peptrain.estimation.estimate import estimate
from peptrain.exporting.export import export
from peptrain.exporting.factorised import load_factorised
from peptrain.methods import CoLA, LowRank
from peptrain.methods.cola import CoLALinear, fresh_factors
from peptrain.methods.rank import RankMethod
from peptrain.models.probe import gated_mlps, swiglu_roles
from peptrain.models.sites import ReparamLinear, Site, reparametrized
from peptrain.rng import Rng
from peptrain.runs.build import open_run
from peptrain.testing import MODEL, TRAIN
from peptrain.training.loop import train


def site_of(n: int, m: int, *, bias: bool = True, fresh: bool = True) -> Site:
    linear = nn.Linear(m, n, bias=bias, dtype=torch.float64)
    return Site("block.map", nn.ModuleDict({"map": linear}), m, fresh)


@pytest.mark.parametrize("n, m, r", [(7, 5, 3), (4, 9, 1), (6, 6, 6)])
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_a_layer_and_its_gradients_are_those_of_the_formulas(
    n: int, m: int, r: int, size: float
) -> None:
    """Also where the logistic function is 0 or 1 to the last digit."""
    layer = CoLALinear(site_of(n, m), r, Rng(0))
    x = size * torch.randn(4, m, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    dy = torch.randn(4, n, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x.requires_grad_()
    layer(x).backward(dy)
    given = [p.detach().numpy() for p in (x, layer.A, layer.B, layer.bias, dy)]
    wanted = cola.forward_backward(*given)
    found = (layer(x).detach(), x.grad, layer.A.grad, layer.B.grad, layer.bias.grad)
    for ours, formula in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours.numpy(), formula, rtol=1e-12, atol=1e-12 * size)


@pytest.mark.parametrize("n, m, r", [(512, 512, 128), (1376, 512, 128), (512, 1376, 32)])
def test_factors_have_the_standard_deviation_of_the_released_code(n: int, m: int, r: int) -> None:
    """A standard normal over r^(1/4), times the root of (n + m)^(-1/2)."""
    B, A = fresh_factors(site_of(n, m), r, Rng(3))
    assert (B.shape, A.shape) == ((n, r), (r, m))
    wanted = 1 / r ** (1 / 4) * ((n + m) ** (-1 / 2)) ** (1 / 2)
    for factor in (B, A):
        scatter = 5 / (2 * factor.numel()) ** 0.5
        assert factor.std().item() == pytest.approx(wanted, rel=scatter)
        assert abs(factor.mean().item()) < 5 * wanted / factor.numel() ** 0.5
        kurtosis = (factor / factor.std()).pow(4).mean().item()
        assert kurtosis == pytest.approx(3, rel=0.1)  # 1.8 of a uniform one
    entry = (B.double() @ A.double()).pow(2).mean().item()
    assert entry == pytest.approx(1 / (n + m), rel=0.05)


def test_both_factors_of_every_matrix_have_their_own_draw() -> None:
    model, *_ = made(tiny_method("cola"))
    factors = [p for layer in reparametrized(model) for p in (layer.B, layer.A)]
    drawn = [p.flatten()[:8].tolist() for p in factors]
    assert len(drawn) == 28 == len({tuple(values) for values in drawn})


def test_an_unset_rank_is_a_quarter_of_the_hidden_size_and_the_rest_is_of_the_60m_script() -> None:
    config = configured(CoLA())
    assert config.method.r == MODEL["hidden_size"] // 4
    o = config.optim
    assert (o.lr, o.weight_decay, o.clip, o.beta1, o.beta2) == (6e-3, 0.01, 0.5, 0.9, 0.999)


def test_the_mlp_of_the_model_keeps_its_own_silu() -> None:
    """down(silu(gate) * up), each of the three a layer with a silu inside."""
    model, *_ = made(tiny_method("cola"))
    found = gated_mlps(model.model.layers, ReparamLinear)
    mlps = [mlp for mlp in found if mlp.d != mlp.f]  # in attention all are squares
    assert len(mlps) == 2
    for mlp in mlps:
        assert swiglu_roles(mlp) == ("gate_proj", "up_proj", "down_proj")


def test_a_config_json_leaves_the_silu_of_the_mlp_out(corpus: Path, tmp_path: Path) -> None:
    """As the released configurations for 350M and more do; the export computes the same."""
    file = tmp_path / "linear.json"
    config = LlamaConfig(
        vocab_size=320, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, hidden_act="linear", max_position_embeddings=64,
    )  # fmt: skip
    file.write_text(json.dumps(config.to_dict()))
    model: dict[str, Any] = dict.fromkeys(MODEL) | {"config": file}
    train(tiny("cola", corpus, tmp_path / "run", model=model, train={"steps": 2}))
    opened = open_run(tmp_path / "run").model
    mlp = opened.model.layers[0].mlp
    x = torch.randn(3, 16, dtype=torch.float64)
    wanted = mlp.down_proj(mlp.gate_proj(x) * mlp.up_proj(x))
    assert torch.equal(mlp(x), wanted)
    assert not torch.allclose(wanted, mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)))
    ids = torch.arange(12)[None]
    small = load_factorised(export(tmp_path / "run", tmp_path / "small", "factorised"))
    torch.testing.assert_close(small(ids).logits, opened(ids).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["dense", "gguf", "peft"])
def test_the_other_forms_of_export_are_refused_with_the_one_that_there_is(
    form: Any, corpus: Path, tmp_path: Path
) -> None:
    train(tiny("cola", corpus, tmp_path / "run", train={"steps": 1}))
    with pytest.raises(Unsupported, match=rf"^--form {form}: .*; use --form factorised$"):
        export(tmp_path / "run", tmp_path / "out", form)
    assert not (tmp_path / "out").exists()


def test_trained_weights_to_start_from_are_refused_before_anything_is_made(
    corpus: Path, tmp_path: Path
) -> None:
    train(tiny("full", corpus, tmp_path / "full", train={"steps": 1}))
    said = r"^init_from: .*full: the layers of cola can't represent .*such as lowrank"
    config = tiny("cola", corpus, tmp_path / "run")
    object.__setattr__(config, "init_from", tmp_path / "full")
    for refused in (train, estimate):
        with pytest.raises(ConfigError, match=said):
            refused(config)
    assert not (tmp_path / "run").exists()


def test_a_module_that_was_trained_is_refused() -> None:
    module = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    with pytest.raises(ConfigError, match=r"^fresh: must be True for cola, .*\(got False\)"):
        adapt(module, CoLA(rank=2), steps=4)
    assert not list(reparametrized(module))
    adapt(module, CoLA(rank=2), steps=4, fresh=True)
    assert len(list(reparametrized(module))) == 2


def test_its_runs_give_no_weights_to_another(corpus: Path, tmp_path: Path) -> None:
    train(tiny("cola", corpus, tmp_path / "cola", train={"steps": 1}))
    config = tiny("full", corpus, tmp_path / "run")
    object.__setattr__(config, "init_from", tmp_path / "cola")
    with pytest.raises(ConfigError, match="was trained by cola, whose layers have no dense"):
        train(config)


def test_a_token_takes_the_products_of_lowrank() -> None:
    def flops(method: RankMethod) -> float:
        config = tiny(method, Path("unused"), train=TRAIN | {"precision": "fp32"})
        (phase,) = estimate(config).phases
        return phase.flops_per_token

    assert flops(CoLA(rank=2)) == flops(LowRank(rank=2)) < flops(CoLA(rank=4))
