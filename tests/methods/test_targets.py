"""Which matrices a method with a rank adapts, and what becomes of all the others."""

from typing import Any

import pytest
from byhand import made
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny_method
from torch import nn

from peptrain.errors import ConfigError
from peptrain.methods import METHODS
from peptrain.methods.lowrank import LowRank
from peptrain.methods.rank import RankMethod
from peptrain.methods.targets import TargetedMethod
from peptrain.models.sites import Site, reparametrized

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


# --- what it says

LISTED = "gate_proj, k_proj, o_proj, up_proj"


@targeted_methods
@pytest.mark.parametrize("given, word", [
    ({"train_rest": True}, "trainable"), ({"train_rest": False}, "frozen"),
    ({"train": "norm"}, "frozen"), ({"train": "k"}, "partly frozen"),
])  # fmt: skip
def test_the_log_says_what_becomes_of_the_rest(
    name: str, given: dict[str, Any], word: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "peptrain"):
        made(tiny_method(name, targets="q,v,down", **given))
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
