"""method.ranks: a rank of its own for some matrices, in every method that has a rank."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from byhand import configured, made, walk
from support import tiny, tiny_method
from torch import Tensor, nn

from peptrain.adaptation import adapt
from peptrain.config import RunConfig, dump, essence, load, parse
from peptrain.errors import ConfigError
from peptrain.estimation.estimate import estimate
from peptrain.exporting.export import export
from peptrain.exporting.factorised import load_factorised
from peptrain.methods import LORO, METHODS, CoLA, LoRA, LowRank, ReLoRA
from peptrain.methods.base import Method
from peptrain.methods.lora import LoRALinear
from peptrain.methods.lowrank import LowRankLinear
from peptrain.methods.rank import RankMethod, parsed
from peptrain.methods.sltrain import SLTrainLinear
from peptrain.models.hf import count_parameters
from peptrain.models.sites import reparametrized
from peptrain.ops.projection import leading_directions
from peptrain.runs.build import open_run
from peptrain.runs.match_size import trained_by
from peptrain.testing import STEPS, differences, newest
from peptrain.training.loop import resume, train

RANKED = [n for n, cls in METHODS.items() if issubclass(cls, RankMethod)]
ranked_methods = pytest.mark.parametrize("name", RANKED)
QWEN = {"family": "qwen2", "kv_heads": 1}
"""Biases; k and v are 8 x 16, q and o 16 x 16, gate and up 24 x 16, down 16 x 24."""


def rank_in(layer: Any, state: Mapping[Tensor, Any]) -> int:
    """Read from its tensors: the side that a factor shares with no W, or that of GaLore's P."""
    if "P" in state.get(getattr(layer, "weight", None), {}):
        return int(state[layer.weight]["P"].shape[1])
    first = layer.V if hasattr(layer, "V") else layer.A
    return int(first.shape[0])


@ranked_methods
def test_a_kind_has_the_rank_that_is_its_own_and_the_others_the_methods(name: str) -> None:
    method = tiny_method(name, rank=2, ranks="q=3, *.1.mlp.down_proj=5,v=1")
    model, optimizer, config = made(method, model=QWEN)
    walk(model, optimizer, 1)
    found = {x.site.partition("layers.")[2]: rank_in(x, optimizer.state)
             for x in reparametrized(model)}  # fmt: skip
    assert len(found) == 14
    for site, r in found.items():
        wanted = 5 if site == "1.mlp.down_proj" else {"q": 3, "v": 1}.get(site.split(".")[-1][0], 2)
        assert r == wanted, site
    assert config.method.rank_of("model.layers.0.self_attn.q_proj") == 3


@ranked_methods
def test_the_same_rank_for_a_kind_is_the_same_model(name: str) -> None:
    """Weights, gradients and steps, through a merge, an exact step and a new basis."""
    ends = []
    for given in ({"rank": 3}, {"rank": 2, "ranks": "attention=3,mlp=3"}):
        model, optimizer, config = made(tiny_method(name, **given), model=QWEN)
        for step in range(4):
            walk(model, optimizer, 1, step)
        ends.append({n: p.detach() for n, p in model.named_parameters()})
        assert config.optim.lr is not None
    for key, p in ends[0].items():
        assert torch.equal(p, ends[1][key]), key


def test_the_scale_of_a_layer_is_over_its_own_rank() -> None:
    lora, *_ = made(tiny_method("lora", rank=2, ranks="q=4", alpha=8.0))
    sltrain, *_ = made(tiny_method("sltrain", rank=2, ranks="q=4", alpha=8.0))
    for layer in reparametrized(lora):
        assert isinstance(layer, LoRALinear)
        s = 2.0 if "q_proj" in layer.site else 4.0
        assert torch.equal(layer.sB(), s * layer.B)
    for other in reparametrized(sltrain):
        assert isinstance(other, SLTrainLinear)
        assert other.s == (2.0 if "q_proj" in other.site else 4.0)


@pytest.mark.parametrize("scale, of", [("hidden", {}), ("rows", {"gate": 24, "up": 24})])
def test_the_c_of_loro_has_the_rank_of_the_pair(scale: str, of: dict[str, int]) -> None:
    method = tiny_method("loro", rank=2, ranks="q=4,gate=6", scale=scale)
    model, optimizer, _ = made(method)
    (group,) = [g for g in optimizer.param_groups if g["factors"]]
    kinds = [x.site.split(".")[-1].removesuffix("_proj") for x in reparametrized(model)]
    wanted = [{"q": 4, "gate": 6}.get(kind, 2) / of.get(kind, 16) for kind in kinds]
    assert group["scales"] == [c for c in wanted for _ in "BA"]


def test_lambda_of_loro_around_a_frozen_w_is_over_the_rank_of_the_pair() -> None:
    for over, wanted in ((True, {"0": 2.0, "2": 4.0}), (False, {"0": 8.0, "2": 8.0})):
        module = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        method = LORO(around="frozen", rank=2, ranks="0=4", alpha=8.0, alpha_over_rank=over)
        adapt(module, method, steps=4)
        for layer in reparametrized(module):
            assert isinstance(layer, LoRALinear)
            assert torch.equal(layer.sB(), wanted[layer.site] * layer.B)


def test_the_draw_of_a_factor_is_that_of_its_rank() -> None:
    """The standard deviation of CoLA's depends on it, and orthogonal factors have r columns."""
    for method in (CoLA(rank=2, ranks="up=6"), LowRank(rank=2, ranks="up=6", init="orthogonal")):
        mixed, *_ = made(method)
        alone, *_ = made(type(method)(**{**vars(method), "ranks": None, "rank": 6}))
        for key, p in mixed.named_parameters():
            if "up_proj" in key:
                assert torch.equal(p, alone.get_parameter(key))


def test_the_subspace_of_galore_is_that_of_the_matrix() -> None:
    model, optimizer, _ = made(tiny_method("galore", rank=2, ranks="q=4"))
    walk(model, optimizer, 1)
    for layer in reparametrized(model):
        W: Any = layer.weight
        r = 4 if "q_proj" in layer.site else 2
        assert torch.equal(optimizer.state[W]["P"], leading_directions(W.grad, r))


# --- what is refused


@pytest.mark.parametrize("ranks, said", [
    ("q", r"must be a list such as q=64,mlp=128 \(got 'q'\)$"),
    ("", r"must be a list such as q=64,mlp=128 \(got ''\)$"),
    ("=3", r"must be a list such as q=64,mlp=128 \(got '=3'\)$"),
    ("q=2.5", r"q: must be a whole number \(got '2\.5'\)$"),
    ("q=", r"q: must be a whole number \(got ''\)$"),
    ("q=two", r"q: must be a whole number \(got 'two'\)$"),
    ("q=2=3", r"q: must be a whole number \(got '2=3'\)$"),
    ("q=0", r"q: must be >= 1 \(got 0\)$"),
    ("v=3,q=-2", r"q: must be >= 1 \(got -2\)$"),
    ("q=99999999999", r"q: must be <= 1000000000 \(got 99999999999\)$"),
    ("q=2, q=2", r"q: must be given once \(got 'q=2, q=2'\)$"),
])  # fmt: skip
def test_what_is_no_list_of_ranks_is_refused(ranks: str, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"^method\.ranks: {said}"):
        LowRank(ranks=ranks)


@pytest.mark.parametrize("ranks, given, said", [
    ("dwn=3", {}, r"'dwn' matches no matrix; did you mean 'down'\? .*names end in down_proj, "),
    ("atention=3", {}, r"'atention' matches no matrix; did you mean 'attention'\? "),
    ("model.layers.7.*=3", {}, r"'model\.layers\.7\.\*' matches no matrix; "),
    ("q=3", {"targets": "v,mlp"}, r"q=3 is of matrices that method\.targets or .* leaves dense"),
    ("q=3", {"exclude": "attention"}, r"q=3 is of matrices that .* method\.exclude leaves dense"),
    ("attention=3,q=4", {}, r"'attention' and 'q' both give model\.layers\.0\.self_attn\.q_proj a"),
    ("q_proj=3,q=3", {}, r"'q_proj' and 'q' both give .* a rank; give each matrix one$"),
    ("q=8", {}, r"q=8 saves no parameters in any matrix; the largest useful rank is 7$"),
    ("v=99", {}, r"v=99 saves no parameters in any matrix; the largest useful rank is 5$"),
    ("k=9", {"include": "k"}, r"k: must be <= 8, since model\.layers\.0\.\S*k_proj is 8 x 16 \(go"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["lowrank", "lora", "cola"])
def test_ranks_that_a_model_does_not_have_are_refused(
    name: str, ranks: str, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^method\.ranks: {said}"):
        made(tiny_method(name, ranks=ranks, **given), model=QWEN)


def test_before_a_warm_start_too() -> None:
    method = ReLoRA(rank=2, ranks="dwn=3", warm_start_steps=4, merge_every=2)
    with pytest.raises(ConfigError, match=r"^method\.ranks: 'dwn' matches no matrix"):
        made(method, model=QWEN)


def test_a_matrix_that_is_included_may_have_its_whole_rank() -> None:
    model, *_ = made(tiny_method("lowrank", rank=2, ranks="k=8", include="k"), model=QWEN)
    assert {len(x.A) for x in reparametrized(model) if "k_proj" in x.site} == {8}  # type: ignore[arg-type]


def test_where_a_rank_saves_nothing_in_some_of_its_matrices_these_stay_dense() -> None:
    """As with method.rank: 8 x 16 is worth r < 5.4, 16 x 16 r < 8."""
    model, *_ = made(tiny_method("lowrank", rank=2, ranks="attention=6"), model=QWEN)
    kinds = {x.site.split(".")[-1] for x in reparametrized(model)}
    assert kinds == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_a_method_that_reads_one_rank_refuses_several() -> None:
    class Old(LowRank):
        """A method of a package that does not know of ranks."""

        def layer(self, site: Any, rng: Any) -> Any:
            return LowRankLinear(site, self.r, rng)

    made(Old(rank=2))
    with pytest.raises(ConfigError, match=r"^method\.ranks: lowrank has one rank .*`rank_of`$"):
        made(Old(rank=2, ranks="q=3"))


# --- runs


def test_unset_it_is_in_no_configuration(corpus: Path, tmp_path: Path) -> None:
    config: RunConfig[Method] = configured(LowRank(rank=2))
    assert "ranks" not in dump(config) and "ranks" not in essence(config)
    train(tiny(LowRank(rank=2), corpus, tmp_path / "run", train={"steps": 1}))
    assert "ranks" not in (tmp_path / "run" / "config.toml").read_text()


def test_set_it_survives_the_file_and_tells_runs_apart() -> None:
    config: RunConfig[Method] = configured(LowRank(rank=2, ranks="q=3,down=4"))
    text = dump(config)
    assert 'ranks = "q=3,down=4"\n' in text
    import tomllib

    assert parse(tomllib.loads(text)) == config
    assert essence(config) != essence(configured(LowRank(rank=2)))
    assert parsed("q=3,down=4") == {"q": 3, "down": 4}


USUAL = ("loro", "cola")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in USUAL else pytest.mark.slow) for n in RANKED]
)
def test_a_run_with_ranks_resumes_to_the_same_bits(name: str, corpus: Path, tmp_path: Path) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    method = tiny_method(name, ranks="q=3,down=4")
    each = {"checkpoint_every": STEPS // 2, "keep": 9}
    train(tiny(method, corpus, whole, model=QWEN, train=each))
    shutil.copytree(whole, parted)
    shutil.rmtree(parted / "checkpoints" / f"step-{STEPS:08d}")
    resume(parted)
    assert differences(newest(whole), newest(parted)) == []
    form: Any = METHODS[name]().export_form
    export(parted, tmp_path / "out", form)


def test_other_ranks_are_not_those_of_the_run(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny(LowRank(rank=2, ranks="q=3"), corpus, run, train={"steps": 2}))
    file = run / "config.toml"
    file.write_text(file.read_text().replace('"q=3"', '"q=4"'))
    with pytest.raises(Exception, match=r"method\.ranks"):
        resume(run)


def test_the_factorised_export_has_the_ranks_of_its_matrices(corpus: Path, tmp_path: Path) -> None:
    train(tiny(LowRank(rank=2, ranks="q=3,*.1.*.up_proj=5"), corpus, tmp_path / "run"))
    out = export(tmp_path / "run", tmp_path / "out", "factorised")
    ranks = json.loads((out / "config.json").read_text())["ranks"]
    assert ranks["layers.*.self_attn.q_proj"] == 3 and ranks["layers.*.mlp.gate_proj"] == 2
    assert (ranks["layers.0.mlp.up_proj"], ranks["layers.1.mlp.up_proj"]) == (2, 5)
    ids, opened = torch.arange(12)[None], open_run(tmp_path / "run").model
    small = load_factorised(out)
    torch.testing.assert_close(small(ids).logits, opened(ids).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scaled", [False, True])
def test_peft_loads_an_adapter_with_several_ranks(
    scaled: bool, corpus: Path, tmp_path: Path
) -> None:
    """alpha / r is over the rank of each; export compares the logits."""
    pytest.importorskip("peft")
    train(tiny("full", corpus, tmp_path / "base", train={"steps": 2}))
    method = LoRA(rank=2, ranks="v=4,up=3", alpha=8.0, train_rest=False, train_scale=scaled,
                  restart_warmup=0)  # fmt: skip
    config = tiny(method, corpus, tmp_path / "run", optim={"lr": 3e-2})
    object.__setattr__(config, "init_from", tmp_path / "base")
    train(config)
    out = export(tmp_path / "run", tmp_path / "out", "peft")
    found = json.loads((out / "adapter_config.json").read_text())
    assert found["r"] == 2
    assert {k.split(".")[-1]: r for k, r in found["rank_pattern"].items()} == {
        "v_proj": 4, "up_proj": 3,
    }  # fmt: skip


# --- counts


def test_counts_are_those_of_the_ranks_in_estimate_metrics_and_match_size(
    corpus: Path, tmp_path: Path
) -> None:
    """q: 16 x 16, down: 16 x 24; each rank more is n + m parameters more in each of two layers."""
    more = LowRank(rank=2, ranks="q=5,down=3")
    run = tmp_path / "run"
    train(tiny(more, corpus, run))
    plain, *_ = made(LowRank(rank=2))
    wanted = count_parameters(plain) + 2 * (3 * 32 + 1 * 40)
    (end,) = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()
              if '"end"' in x]  # fmt: skip
    assert end["trainable"] == end["parameters"] == wanted
    found = estimate(tiny(more, Path("unused")))
    assert found.phases[-1].trainable_parameters == wanted
    assert found.as_dict()["method_ranks"] == "q=5,down=3" and found.as_dict()["rank"] == 2
    assert trained_by(load(run / "config.toml")) == wanted  # of match_trainable


def test_a_token_costs_the_products_of_the_ranks() -> None:
    """Two more dimensions of q cost 6 multiply-adds for each of 2 (n + m) x 2 layers."""

    def flops(method: Method) -> float:
        (phase,) = estimate(tiny(method, Path("unused"))).phases
        return phase.flops_per_token

    more = flops(LowRank(rank=2, ranks="q=4")) - flops(LowRank(rank=2))
    assert more == 2 * 3 * 2 * (16 + 16) * 2
    assert flops(LowRank(rank=4)) == flops(LowRank(rank=2, ranks="attention=4,mlp=4"))
