"""Which matrices a method with a rank adapts, and what becomes of all the others."""

from pathlib import Path
from typing import Any

import pytest
from byhand import made
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import algebra
from support import tiny, tiny_method
from torch import nn

from peptrain.config import resolved
from peptrain.errors import ConfigError
from peptrain.methods import METHODS
from peptrain.methods.lora import LoRA
from peptrain.methods.lowrank import LowRank
from peptrain.methods.rank import RankMethod
from peptrain.methods.targets import TargetedMethod
from peptrain.models.hf import count_parameters
from peptrain.models.sites import Site, reparametrized
from peptrain.runs.build import build
from peptrain.testing import MODEL

TARGETED = [n for n, cls in METHODS.items() if issubclass(cls, TargetedMethod)]
targeted_methods = pytest.mark.parametrize("name", TARGETED)
RANKED = [n for n, cls in METHODS.items() if issubclass(cls, RankMethod)]
ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")
KINDS = ATTENTION + MLP
QWEN = {"family": "qwen2", "kv_heads": 1}
"""Biases; k and v are 8 x 16."""
BOTH = {(layer, kind) for layer in (0, 1) for kind in KINDS}


def sites() -> list[Site]:
    """The two layers of a tiny model, rid of everything but names and shapes."""
    found = []
    for layer, kind in sorted(BOTH):
        block = "mlp" if kind in MLP else "self_attn"
        n, m = {"gate": (24, 16), "up": (24, 16), "down": (16, 24)}.get(kind, (16, 16))
        parent = nn.ModuleDict({f"{kind}_proj": nn.Linear(m, n, bias=False)})
        found.append(Site(f"model.layers.{layer}.{block}.{kind}_proj", parent, 16))
    return found


SITES = sites()


def chosen(**given: Any) -> set[tuple[int, str]]:
    taken = LowRank(**{"rank": 1} | given).chosen(SITES)
    return {named(site.name) for site in taken}


def named(site: str) -> tuple[int, str]:
    return int(site.split(".")[2]), site.rpartition(".")[2].removesuffix("_proj")


def kinds(*wanted: str) -> set[tuple[int, str]]:
    return {(layer, kind) for layer, kind in BOTH if kind in wanted}


ONE_ITEM: list[tuple[str, set[tuple[int, str]]]] = [
    ("q", kinds("q")),
    ("q,v", kinds("q", "v")),
    (" q , v ,", kinds("q", "v")),
    ("attention", kinds(*ATTENTION)),
    ("mlp", kinds(*MLP)),
    ("attention,down", kinds(*ATTENTION, "down")),
    ("k_proj", kinds("k")),
    ("?_proj", kinds(*ATTENTION)),
    ("*", BOTH),
    ("model.layers.0.*", {x for x in BOTH if x[0] == 0}),
    ("*.1.mlp.*", {(1, kind) for kind in MLP}),
    ("model.layers.1.self_attn.o_proj", {(1, "o")}),
    ("up,*.0.self_attn.q*", kinds("up") | {(0, "q")}),
]


@pytest.mark.parametrize("listed, wanted", ONE_ITEM)
def test_kinds_blocks_and_patterns_mean_the_same_in_every_list(
    listed: str, wanted: set[tuple[int, str]]
) -> None:
    assert chosen(targets=listed) == wanted
    assert chosen(rank=12, include=listed) == wanted  # no other is worth it
    if wanted != BOTH:
        assert chosen(exclude=listed) == BOTH - wanted


lists = st.sets(st.sampled_from(KINDS))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(lists, lists, lists, st.sampled_from([1, 9, 12]))
def test_exclude_beats_include_beats_the_rule_within_the_targets(
    targets: set[str], include: set[str], exclude: set[str], rank: int
) -> None:
    """r (n + m) < n m at 16 x 16 for r < 8, at 24 x 16 for r < 9.6."""
    worth = kinds(*KINDS) if rank == 1 else kinds(*MLP) if rank == 9 else set()
    open_to = (kinds(*targets, *include) if targets else BOTH) - kinds(*exclude)
    wanted = open_to & (worth | kinds(*include))
    lists = {"targets": targets, "include": include, "exclude": exclude}
    given = {key: ",".join(sorted(value)) for key, value in lists.items()}
    if wanted:
        assert chosen(rank=rank, **given) == wanted
        return
    message = rf"method\.rank: rank {rank} saves" if open_to else r"method\.exclude: .*no matrix"
    with pytest.raises(ConfigError, match=message):
        chosen(rank=rank, **given)


@pytest.mark.parametrize("key", ["targets", "include", "exclude"])
@pytest.mark.parametrize("item", ["x", "qv", "Q", "proj", "q_pro", "model.layers.2.*", "q v"])
def test_an_item_that_matches_nothing_is_an_error_that_names_it(key: str, item: str) -> None:
    given = item.replace("*", ".")
    with pytest.raises(ConfigError, match=rf"^method\.{key}: must be .* \(got '{given}'\)$"):
        chosen(**{key: f"q,{item}"})


def test_the_largest_useful_rank_is_that_of_the_targets() -> None:
    with pytest.raises(ConfigError, match=r"rank 12 saves no parameters .* rank is 7$"):
        chosen(rank=12, targets="attention")
    with pytest.raises(ConfigError, match=r"rank 12 saves no parameters .* rank is 9$"):
        chosen(rank=12, targets="q,down")


@pytest.mark.parametrize("name, saved", [("lowrank", "parameters"), ("galore", "optimizer state")])
def test_a_rank_that_saves_nothing_names_the_largest_useful_one(name: str, saved: str) -> None:
    """The method's own cost: at 96 x 128 both factors are 224 r of 12,288 numbers, and half of
    GaLore's state is 176 r."""
    site = Site("x", nn.ModuleDict({"x": nn.Linear(128, 96)}), 128)
    largest = {"lowrank": 54, "galore": 69}[name]
    method: Any = METHODS[name]
    assert method(rank=largest).chosen([site]) == [site]
    wanted = f"rank 5000 saves no {saved} in any matrix; the largest useful rank is {largest}"
    with pytest.raises(ConfigError, match=rf"^method\.rank: {wanted}$"):
        method(rank=5000).chosen([site])


def test_where_no_rank_saves_anything_none_is_named() -> None:
    site = Site("x", nn.ModuleDict({"x": nn.Linear(2, 2)}), 2)
    wanted = "rank 1 saves no parameters in any matrix; no rank does"
    with pytest.raises(ConfigError, match=rf"^method\.rank: {wanted}$"):
        LowRank(rank=1).chosen([site])


@targeted_methods
def test_every_method_leaves_the_matrices_of_no_target_dense_and_trainable(name: str) -> None:
    model, optimizer, _ = made(tiny_method(name, targets="q,mlp", exclude="up"), model=QWEN)
    adapted = {named(layer.site) for layer in reparametrized(model)}
    assert adapted == kinds("q", "gate", "down")
    for layer, kind in BOTH - adapted:
        block = "mlp" if kind in MLP else "self_attn"
        module = model.get_submodule(f"model.layers.{layer}.{block}.{kind}_proj")
        assert type(module) is nn.Linear and module.weight.requires_grad
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


# --- train_rest

LETTERS = {
    "bpt": {"U", "V", "a", "b"},
    "dora": {"A", "B", "m"},
    "vera": {"lambda_d", "lambda_b"},
    "hyperadapt": {"a", "b"},
    "galore": {"weight"},
    "sltrain": {"A", "B", "values"},
}
"""What a method trains of an adapted matrix, if it is not A and B."""


def trainable(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


@targeted_methods
@pytest.mark.parametrize("model", [QWEN, QWEN | {"tied": True}, {"family": "llama"}])
def test_without_the_rest_exactly_the_adapters_train(name: str, model: dict[str, Any]) -> None:
    method = tiny_method(name, targets="q,down", train_rest=False)
    adapted, optimizer, _ = made(method, model=model)
    at = [layer.site for layer in reparametrized(adapted)]
    assert {named(site) for site in at} == kinds("q", "down")
    wanted = {f"{site}.{x}" for site in at for x in LETTERS.get(name, {"A", "B"})}
    assert trainable(adapted) == wanted
    held = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["lora", "relora", "dora"])
def test_a_trained_scale_is_one_of_the_adapters(name: str) -> None:
    given = {"targets": "v", "train_rest": False, "train_scale": True}
    model, _, _ = made(tiny_method(name, **given), model=QWEN)
    sites = [f"model.layers.{layer}.self_attn.v_proj" for layer in (0, 1)]
    letters = LETTERS.get(name, {"A", "B"}) | {"s"}
    assert trainable(model) == {f"{site}.{x}" for site in sites for x in letters}


@pytest.mark.parametrize("name", ["lora", "relora", "dora"])
@pytest.mark.parametrize("train_rest", [True, False])
def test_the_warm_start_trains_the_chosen_matrices_and_the_rest_if_it_is_to(
    name: str, train_rest: bool
) -> None:
    given = {"targets": "q,mlp", "exclude": "up", "warm_start_steps": 3, "train_rest": train_rest}
    config = resolved(tiny(tiny_method(name, **given), Path(), model=QWEN), world_size=1,
                      on_gpu=False)  # fmt: skip
    model = build(config, 0)
    assert not list(reparametrized(model))
    taken = ("self_attn.q", "mlp.gate", "mlp.down")  # q has a bias too
    sites = {f"model.layers.{layer}.{kind}_proj" for layer in (0, 1) for kind in taken}
    everything = {n for n, _ in model.named_parameters()}
    assert trainable(model) == (everything if train_rest else {f"{s}.weight" for s in sites})
    after = build(config, 1)
    assert {layer.site for layer in reparametrized(after)} == sites


AMONG = {
    "q,v": [(16, 16)] * 2,
    "mlp": [(24, 16), (24, 16), (16, 24)],
    "": [(16, 16)] * 4 + [(24, 16), (24, 16), (16, 24)],
}
"""Shapes of the targets in a layer."""


@pytest.mark.parametrize("name, scaled", [*((n, 0) for n in RANKED), ("lora", 1), ("dora", 1)])
@pytest.mark.parametrize("targets", AMONG)
@pytest.mark.parametrize("rank", [2, 8])
def test_without_the_rest_the_count_is_the_sum_over_the_adapted(
    name: str, scaled: int, targets: str, rank: int
) -> None:
    given: dict[str, Any] = {"train_scale": True} if scaled else {}
    method = tiny_method(name, rank=rank, targets=targets, train_rest=False, **given)

    def trained(n: int, m: int) -> int:
        """Of a matrix; 0 if it is not worth it."""
        if name == "galore":
            return n * m if rank * (2 * max(n, m) + min(n, m)) < 2 * n * m else 0
        beside = {"bpt": n + m, "dora": n, "sltrain": 3 * n * m // 100}
        count = rank * (n + m) + beside.get(name, 0) + scaled
        return count if count < n * m else 0

    worth = sum(trained(n, m) for n, m in AMONG[targets])
    if worth:
        model, _, _ = made(method)
        assert count_parameters(model, trainable=True) == MODEL["layers"] * worth
    else:
        with pytest.raises(ConfigError, match=r"method\.rank"):
            made(method)


@pytest.mark.parametrize("name", ["lora", "relora", "dora"])
@pytest.mark.parametrize("family, kv", [("llama", 2), ("qwen2", 1)])
def test_a_trained_scale_has_its_closed_form(name: str, family: str, kv: int) -> None:
    method = tiny_method(name, rank=5, train_scale=True)
    model, _, _ = made(method, model={"family": family, "kv_heads": kv})
    arch = algebra.Arch(family=family, V=320, d=16, f=24, L=2, heads=2, kv=kv, tied=False)
    wanted = algebra.parameter_count(arch, name, 5, trained_scale=True)
    assert count_parameters(model) == wanted.total
    assert count_parameters(model, trainable=True) == wanted.trainable


def test_a_trained_scale_counts_in_the_rule() -> None:
    """At 3 x 7 the factors of rank 2 are 20 of 21 numbers, and the scale is the 21st."""
    site = Site("x", nn.ModuleDict({"x": nn.Linear(7, 3)}), 16)
    assert LoRA(rank=2).chosen([site]) == [site]
    with pytest.raises(ConfigError, match=r"rank 2 saves .* rank is 1$"):
        LoRA(rank=2, train_scale=True).chosen([site])


# --- what it says

LISTED = "gate_proj, k_proj, o_proj, up_proj"


@targeted_methods
@pytest.mark.parametrize("train_rest, word", [(True, "trainable"), (False, "frozen")])
def test_the_log_says_what_becomes_of_the_rest(
    name: str, train_rest: bool, word: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "peptrain"):
        made(tiny_method(name, targets="q,v,down", train_rest=train_rest))
    (said,) = {r.message for r in caplog.records}
    assert said == f"{name}: 6 of 14 matrices adapted; dense and {word}: {LISTED}"


def test_the_log_of_a_choice_by_layer_has_no_kind_to_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO", "peptrain"):
        made(LowRank(rank=1, targets="model.layers.0.*"))
    assert [r.message for r in caplog.records] == [
        "lowrank: 7 of 14 matrices adapted; dense and trainable: some"
    ]
