"""Laws that every method passes: a new one is covered by its line in METHODS."""

import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import algebra
from safetensors.torch import load_file
from support import SPREAD, Killed, Toy, kill_at, rows, tiny, tiny_method
from torch import nn

from peptrain import testing
from peptrain.config import resolved
from peptrain.errors import ConfigError, Unsupported
from peptrain.methods import METHODS
from peptrain.methods.bpt import BPTLinear
from peptrain.methods.rank import RankMethod
from peptrain.models.hf import count_parameters
from peptrain.models.sites import ReparamLinear, Site
from peptrain.optim.adamw import state_bytes
from peptrain.rng import Rng
from peptrain.testing import EVENT, MODEL, QWEN, STEPS, Bench, close, losses, newest
from peptrain.training.loop import train

RESUMED_AFTER = (1, 2, 4)
KEPT = SPREAD | {"checkpoint_every": 1, "keep": 99}
every_method = pytest.mark.parametrize("name", METHODS)


def bench(name: str, phase: int | None = None, model: Any = QWEN, **given: Any) -> Bench:
    """`name` in its last phase (or `phase`): after any warm start."""
    optim = given.pop("optim", {})
    return testing.bench(tiny_method(name, **given), phase, model=model, optim=optim)


@every_method
@pytest.mark.parametrize("law", testing.LAWS, ids=lambda law: law.__name__)
def test_a_method_keeps_the_laws(name: str, law: testing.Law, corpus: Path) -> None:
    law(tiny_method(name), corpus)


def test_bpt_merges_exactly_the_product_inside_the_diagonals() -> None:
    one = bench("bpt")
    one.train(EVENT - 1)
    one.scramble()
    layers = [layer for layer in one.layers if isinstance(layer, BPTLinear)]
    with torch.no_grad():
        sums = [layer.weight + layer.U @ layer.V for layer in layers]
    kept = [(layer.a.clone(), layer.b.clone(), layer.bias) for layer in layers]
    one.after_step(EVENT)
    for layer, total, (a, b, bias) in zip(layers, sums, kept, strict=True):
        close(layer.weight, total, 1e-15)
        assert torch.equal(layer.a, a) and torch.equal(layer.b, b) and layer.bias is bias
        assert not layer.V.any()
        close(layer.U.T @ layer.U, torch.eye(layer.U.shape[1], dtype=torch.float64), 1e-14)


def test_a_merge_resets_the_moments_of_the_factors_alone() -> None:
    one = bench("bpt")
    one.train(EVENT - 1)
    one.backward()
    one.optimizer.step()
    state = {
        n: {k: v.clone() for k, v in one.optimizer.state[p].items()}
        for n, p in one.model.named_parameters()
        if p.requires_grad
    }
    one.after_step(EVENT)
    for n, p in one.model.named_parameters():
        if p.requires_grad:
            now, zero = one.optimizer.state[p], n.endswith((".U", ".V"))
            assert all(torch.equal(now[k], v * 0 if zero else v) for k, v in state[n].items()), n
            assert state[n]["exp_avg"].any(), n


def test_weight_decay_leaves_diagonals_norms_biases_and_embeddings_alone() -> None:
    with_decay, without = (bench("bpt", optim={"weight_decay": wd}) for wd in (0.5, 0.0))
    decayed = set()
    for one in (with_decay, without):
        one.backward()
        one.optimizer.step()
    other = dict(without.model.named_parameters())
    for n, p in with_decay.model.named_parameters():
        if not torch.equal(p, other[n]):
            decayed.add(n.rpartition("layers.")[2].lstrip("01."))
    factors = {n for n in decayed if n.endswith((".U", ".V"))}
    assert factors and decayed - factors == {"lm_head.weight"} | dense_matrices(with_decay)


def dense_matrices(one: Bench) -> set[str]:
    found = {n for n, m in one.model.model.layers[0].named_modules() if type(m) is nn.Linear}
    return {f"{n}.weight" for n in found}


@pytest.mark.parametrize("name", [n for n in METHODS if n in algebra.COUNTED])
@pytest.mark.parametrize("family, kv, tied", [("llama", 2, False), ("qwen2", 1, True)])
@pytest.mark.parametrize("rank", [1, 4, 8])  # at 8 only some matrices are worth it
def test_the_counts_are_those_of_the_closed_form(
    name: str, family: str, kv: int, tied: bool, rank: int
) -> None:
    ranked = {"rank": rank} if "rank" in {f.name for f in fields(METHODS[name])} else {}
    one = bench(name, model={"family": family, "kv_heads": kv, "tied": tied}, **ranked)
    sizes = (MODEL[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "layers"))
    V, d, f, L = sizes
    arch = algebra.Arch(family=family, V=V, d=d, f=f, L=L, heads=MODEL["heads"], kv=kv, tied=tied)
    wanted = algebra.parameter_count(arch, name, rank)
    assert count_parameters(one.model, trainable=True) == wanted.trainable
    assert count_parameters(one.model) == wanted.total


SOME = {"full", "relora", "loro", Toy.name}
"""For the default run: phases, merges, resets and an optimizer of its own."""


@pytest.fixture(scope="module")
def two_ranks(
    corpus: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Path:
    """The runs under torchrun of the methods that are asked for, and the weights that each rank
    ended with."""
    asked = [
        item.callspec.params["name"]
        for item in request.session.items
        if getattr(item, "function", None) is test_two_ranks_are_one_process
    ]
    out = tmp_path_factory.mktemp("two-ranks")
    for step in RESUMED_AFTER:
        config = tiny("relora", corpus, out / f"resume-{step}", train=KEPT)
        with pytest.raises(Killed):
            train(config, kill_at("checkpoint", step))
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = Path(__file__).with_name("two_ranks.py")
    done = subprocess.run(
        [*run, str(script), str(corpus), str(out), *sorted({"full", *asked})],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in SOME else [pytest.mark.slow])
        for name in [*METHODS, Toy.name]
    ],
)
def test_two_ranks_are_one_process(
    name: str, two_ranks: Path, corpus: Path, tmp_path: Path
) -> None:
    weights = [load_file(two_ranks / f"{name}-rank{rank}.safetensors") for rank in (0, 1)]
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    run = tmp_path / "alone"
    train(tiny(Toy() if name == Toy.name else name, corpus, run, train=SPREAD))
    alone, together = newest(run), newest(two_ranks / name)
    assert together.step == STEPS and together.model.keys() == alone.model.keys()
    for n, weight in alone.model.items():
        assert torch.equal(together.model[n], weights[0][n])
        close(weight, together.model[n], 1e-12)
    assert [s for s, _ in losses(two_ranks / name)] == list(range(1, STEPS + 1))
    for one, other in zip(rows(run), rows(two_ranks / name), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-8)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], abs=1e-8)
        assert one["tokens"] == other["tokens"]
        for row, ranks in ((one, 1), (other, 2)):
            assert 0 < row["device_hours"] == pytest.approx(row["seconds"] * ranks / 3600)
    (end,), (other_end,) = rows(run, "end"), rows(two_ranks / name, "end")
    assert end["held_out_tokens"] == other_end["held_out_tokens"]
    assert end["held_out_loss"] == pytest.approx(other_end["held_out_loss"], abs=1e-8)


@pytest.mark.parametrize("step", RESUMED_AFTER)
def test_a_warm_started_run_goes_on_on_two_ranks(
    step: int, two_ranks: Path, corpus: Path, tmp_path: Path
) -> None:
    """Stopped in the warm start, at the switch, or after it, by one process."""
    train(tiny("relora", corpus, tmp_path / "whole", train=KEPT))
    whole, resumed = newest(tmp_path / "whole"), newest(two_ranks / f"resume-{step}")
    assert (resumed.step, resumed.phase) == (STEPS, 1)
    for n, weight in whole.model.items():
        close(weight, resumed.model[n], 1e-8)


def test_what_rank_0_finds_ends_every_rank(two_ranks: Path) -> None:
    for rank in (0, 1):
        assert "exists and is never overwritten" in (two_ranks / f"refused-rank{rank}").read_text()


# The one rule for which matrices are adapted.

ranked_methods = pytest.mark.parametrize(
    "name", [n for n, cls in METHODS.items() if issubclass(cls, RankMethod)]
)


def adapted(one: Bench) -> set[str]:
    return {layer.site.partition("layers.")[2] for layer in one.layers}


@ranked_methods
def test_patterns_force_matrices_in_and_out(name: str) -> None:
    everything = adapted(bench(name, rank=1))
    assert len(everything) == 2 * 7
    out = bench(name, rank=1, exclude="k_proj, model.layers.0.mlp.*")
    gone = {n for n in everything if n.endswith("k_proj") or n.startswith("0.mlp.")}
    assert len(gone) == 5 and adapted(out) == everything - gone
    for site in gone:
        module = out.model.get_submodule(f"model.layers.{site}")
        assert type(module) is nn.Linear and module.weight.requires_grad
    costly = 8  # r (n + m) >= n m for every n x 16 with n <= 16
    assert not any(n.endswith("k_proj") for n in adapted(bench(name, rank=costly)))
    forced = bench(name, rank=costly, include="k_proj")
    assert {"0.self_attn.k_proj", "1.self_attn.k_proj"} < adapted(forced)
    forced.train(2)
    both = bench(name, rank=1, include="k_proj", exclude="k_proj")
    assert not any(n.endswith("k_proj") for n in adapted(both))


@ranked_methods
@pytest.mark.parametrize("key", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error(name: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"method\.{key}: .*matches a.*got 'k_porj'"):
        bench(name, **{key: "q_proj, k_porj"})


def costs_less(method: RankMethod, n: int, m: int, rank: int) -> bool:
    """Whether a matrix gets cheaper by being adapted, counted on a real one: its trainable
    parameters, or for GaLore, which trains all of them, the numbers of its optimizer."""
    stack = nn.ModuleDict({"m0": nn.Linear(m, n, bias=False)})
    config = tiny(replace(method, rank=rank, include="*"), Path())
    chosen = resolved(config, world_size=1, on_gpu=False)
    last = len(chosen.method.phases(STEPS))
    chosen.method.install(stack, sites_of(stack), Rng(0), last)
    if method.name != "galore":
        return count_parameters(stack, trainable=True) < n * m
    optimizer = chosen.method.optimizer(stack, sites_of(stack), chosen.optim, last)
    for p in stack.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return state_bytes(optimizer) < 2 * n * m * 4


def sites_of(stack: nn.ModuleDict) -> list[Site]:
    return [Site(name, stack, 16) for name in stack]


@ranked_methods
@pytest.mark.parametrize("shapes", [[(16, 16)], [(24, 16), (7, 16)], [(40, 9)], [(5, 3), (4, 4)]])
def test_a_rank_too_large_is_an_error_that_names_the_largest_useful_one(
    name: str, shapes: list[tuple[int, int]]
) -> None:
    method = tiny_method(name, **({"init": "xavier"} if name == "spectron" else {}))  # at any rank
    assert isinstance(method, RankMethod)

    def useful(rank: int) -> bool:
        return any(costs_less(method, n, m, rank) for n, m in shapes)

    largest = max(r for r in range(30) if r == 0 or useful(r))
    stack = nn.ModuleDict({f"m{i}": nn.Linear(m, n, bias=False) for i, (n, m) in enumerate(shapes)})
    last = len(method.phases(STEPS))
    hint = f"the largest useful rank is {largest}" if largest else "no rank does"
    with pytest.raises(ConfigError, match=rf"method\.rank: rank 30 saves no .* matrix; {hint}$"):
        replace(method, rank=30).install(stack, sites_of(stack), Rng(0), last)
    if largest:
        replace(method, rank=largest).install(stack, sites_of(stack), Rng(0), last)
        assert any(isinstance(m, ReparamLinear) for m in stack.modules())


@ranked_methods
def test_a_rank_at_which_some_stay_dense_says_so(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "peptrain"):
        bench(name, rank=1)
        assert "dense" not in caplog.text
        bench(name, rank=8)
    (said,) = [r.message for r in caplog.records if "dense" in r.message]
    adapted = 10 if name == "galore" else 6  # its state at 16 x 16 is 3 x 8 x 16 for 2 x 16 x 16
    assert said.startswith(f"{name}: {adapted} of 14 matrices adapted") and "k_proj" in said


@ranked_methods
def test_a_model_without_linear_layers_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 320}'
    )
    model = dict.fromkeys(MODEL) | {"config": tmp_path}
    with pytest.raises(Unsupported, match=r"no nn\.Linear inside its decoder layers"):
        bench(name, model=model)
    assert bench("full", model=model).backward()


def test_the_laws_see_every_kind_of_event() -> None:
    """A field that `small` doesn't set would leave its event out of these laws unnoticed."""
    known = {"merge_every", "exact_every", "reset_every", "refresh_every", "gap"}
    every = [f for cls in METHODS.values() for f in fields(cls)]
    found = {f.name for f in every if f.metadata.get("up") or "same_as" in f.metadata}
    assert {"merge_every", "refresh_every"} < found
    assert found <= known, "look whether testing.small gives it an event"


def test_every_method_is_known_by_its_own_name() -> None:
    assert [cls.name for cls in METHODS.values()] == list(METHODS)
