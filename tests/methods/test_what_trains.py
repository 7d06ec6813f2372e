"""What trains besides the adapted matrices: everything, nothing, or what is named."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from byhand import made
from oracles import algebra
from support import tiny, tiny_method
from torch import Tensor, nn

from peptrain.adaptation import adapt
from peptrain.config import dump, essence, parse, resolved
from peptrain.errors import ConfigError
from peptrain.estimation.estimate import estimate
from peptrain.methods import METHODS
from peptrain.methods.lora import LoRA
from peptrain.methods.rank import RankMethod
from peptrain.methods.targets import TargetedMethod
from peptrain.models.dense import dense_state
from peptrain.models.hf import count_parameters
from peptrain.models.sites import Site, reparametrized
from peptrain.runs.build import build, open_run
from peptrain.testing import MODEL
from peptrain.training.loop import train

TARGETED = [n for n, cls in METHODS.items() if issubclass(cls, TargetedMethod)]
targeted_methods = pytest.mark.parametrize("name", TARGETED)
RANKED = [n for n, cls in METHODS.items() if issubclass(cls, RankMethod)]
QWEN = {"family": "qwen2", "kv_heads": 1}
"""Biases; k and v are 8 x 16."""


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
    assert sorted(site.rpartition(".")[2] for site in at) == ["down_proj"] * 2 + ["q_proj"] * 2
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


# --- train


def names(model: nn.Module, *wanted: str) -> set[str]:
    """The parameters with one of these parts in their names, whichever of their names it is."""
    every = list(model.named_parameters(remove_duplicate=False))
    found = {id(p) for n, p in every if any(part in n for part in wanted)}
    return {n for n, p in model.named_parameters() if id(p) in found}


NAMED = {
    "norm": ("norm.",),
    "bias": (".bias",),
    "embedding": ("embed_tokens",),
    "head": ("lm_head",),
    "norm, classifier": ("norm.", "lm_head"),
    "lm_*,v": ("lm_head", "v_proj"),
    "model.layers.1.*norm": ("layers.1.input_layernorm", "layers.1.post_attention_layernorm"),
    "attention": ("q_proj.bias", "k_proj", "v_proj", "o_proj"),
}
"""Lists, and parts of the names of what they mean in a Qwen2 whose q and down are adapted."""


@targeted_methods
@pytest.mark.parametrize("listed", NAMED)
@pytest.mark.parametrize("tied", [False, True])
def test_exactly_what_is_named_and_the_methods_own_trains(
    name: str, listed: str, tied: bool
) -> None:
    """Also after a warm start, which some methods have. Tied embeddings are a head too."""
    method = tiny_method(name, targets="q,down", train=listed)
    model, optimizer, config = made(method, model=QWEN | {"tied": tied})
    at = [layer.site for layer in reparametrized(model)]
    own = {f"{site}.{x}" for site in at for x in LETTERS.get(name, {"A", "B"})}
    assert trainable(model) == names(model, *NAMED[listed]) | own
    held = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    if config.method.phases(8):
        warm = build(config, 0)
        assert trainable(warm) == names(warm, *NAMED[listed]) | {f"{site}.weight" for site in at}


def state_of(run: Path) -> Mapping[str, Tensor]:
    """The dense weights, or the layers' own where there are none."""
    opened = open_run(run)
    if opened.config.method.has_dense_equivalent:
        return dense_state(opened.model)
    return opened.model.state_dict()


@targeted_methods
def test_what_is_not_named_has_the_same_bytes_after_training(
    name: str, corpus: Path, tmp_path: Path
) -> None:
    """From the first step to the last, through merges and the end of a warm start."""
    every = {"keep_at": "0,8", "checkpoint_every": 0}
    method = tiny_method(name, targets="q,down", train="norm,classifier")
    train(tiny(method, corpus, tmp_path / "run", model=QWEN, train=every))
    first, last = (state_of(Path(f"{tmp_path / 'run'}@{step}")) for step in (0, 8))
    for site, weight in last.items():
        adapted = not site.endswith(".bias") and ("q_proj" in site or "down_proj" in site)
        moves = adapted or "norm." in site or "lm_head" in site
        assert torch.equal(weight, first[site]) is not moves, site


@pytest.mark.parametrize("listed, hint", [
    ("norn", "did you mean 'norm'? kinds in the model are norm, embedding, head, classifier,"),
    ("bias", "kinds in the model are norm, embedding, head, classifier, names of modules end in"),
    ("norm,embed_token", "did you mean 'embed_tokens'? kinds"),
    ("q", "kinds in the model are"),
])  # fmt: skip
def test_a_name_that_means_nothing_is_refused_with_the_kinds(listed: str, hint: str) -> None:
    """q has no bias in a Llama, and its matrix is adapted."""
    with pytest.raises(ConfigError) as refused:
        made(tiny_method("lora", train=listed), model={"family": "llama"})
    item = listed.rpartition(",")[2]
    said = f"method.train: {item!r} names no parameter of the model that the method doesn't adapt;"
    assert str(refused.value).startswith(said) and hint in str(refused.value)


@pytest.mark.parametrize("train_rest", [True, False])
def test_both_ways_to_say_what_trains_are_refused(train_rest: bool) -> None:
    with pytest.raises(ConfigError, match=r"method\.train_rest: .* 'norm', .* leave out one"):
        LoRA(rank=2, train="norm", train_rest=train_rest)


def test_unset_it_is_written_as_in_older_runs_unless_something_is_named() -> None:
    """So a run of an older version has the same settings, and the same name in a comparison."""
    for given, rest in (({}, True), ({"train": "norm"}, None), ({"train_rest": False}, False)):
        config = resolved(tiny(tiny_method("lora", **given), Path()), world_size=1, on_gpu=False)
        assert config.method.train_rest is rest
        assert ("train_rest = true" in essence(config)) is (rest is True)
        assert parse(tomllib.loads(dump(config))) == config


def test_the_estimate_counts_what_is_named(corpus: Path) -> None:
    method = tiny_method("lora", targets="q", train="norm,head", warm_start_steps=3)
    config = tiny(method, corpus, model={"family": "llama"})
    n, V, d, L = 16 * 16, MODEL["vocab_size"], MODEL["hidden_size"], MODEL["layers"]
    rest = V * d + (2 * L + 1) * d
    found = [phase.trainable_parameters for phase in estimate(config).phases]
    assert found == [L * n + rest, L * 2 * (d + d) + rest]


def test_in_a_loop_of_ones_own_a_classifier_trains_too() -> None:
    """The names of any module do, without Hugging Face."""
    model = nn.ModuleDict({
        "body": nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)),
        "classifier": nn.Sequential(nn.Linear(16, 3)),
    })  # fmt: skip
    adapt(model, LoRA(rank=2, train="classifier", exclude="classifier.*"), steps=4)
    assert trainable(model) == {
        "body.0.A", "body.0.B", "classifier.0.weight", "classifier.0.bias",
    }  # fmt: skip
