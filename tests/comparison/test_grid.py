"""What a grid's file describes: its runs, their names, and what it may not say."""

import math
import re
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import algebra

from peptrain import recipes
from peptrain.comparison.grid import GridRun, expand, load_grid, unstated
from peptrain.config import RunConfig, dump, parse, resolved
from peptrain.errors import ConfigError
from peptrain.methods import Full
from peptrain.models.sites import find_sites
from peptrain.optim import schedule
from peptrain.runs.build import build

EXAMPLES = Path(__file__).parents[2] / "examples"


def runs(text: str) -> Sequence[GridRun]:
    return expand(tomllib.loads(text)).runs


def test_a_block_is_the_product_of_its_lists() -> None:
    found = runs("""
        [base]
        train.seed = [0, 1]
        train.steps = 50
        optim.lr = [1e-3, 2e-3]
        [[grid]]
        method.name = "full"
        [[grid]]
        method.name = ["bpt", "lowrank"]
        method.rank = [4, 8]
        optim.lr = 5e-3
    """)
    seen = [(r.method, getattr(r.config.method, "rank", None), r.lr, r.seed) for r in found]
    full = [("full", None, lr, seed) for lr, seed in product((1e-3, 2e-3), (0, 1))]
    others = [(m, rank, 5e-3, s) for m, rank, s in product(("bpt", "lowrank"), (4, 8), (0, 1))]
    assert sorted(seen, key=str) == sorted(full + others, key=str)
    assert {r.config.train.steps for r in found} == {50}
    assert {r.tokens for r in found} == {50 * 32 * 256}


def test_a_short_run_has_the_name_that_0_1_0_gave_it() -> None:
    """There unset eval_tokens were at least 8,192, more than a short run trains."""
    block = """
        [[grid]]
        method = { name = "bpt", rank = 8 }
        train.steps = 20
        train.batch_size = 4
        train.seq_len = 64
        train.device = "cpu"
    """
    (unset,), (given,), (other,) = (
        runs(block + line) for line in ("", "train.eval_tokens = 8192", "train.eval_tokens = 64")
    )
    assert (unset.digest, given.digest) == ("501244db", "501244db")
    assert unset.costs_name.endswith("-6710419e")
    assert (unset.config.train.eval_tokens, given.config.train.eval_tokens) == (256, 8192)
    assert other.digest != unset.digest and other.configuration != unset.configuration


def test_a_run_is_configured_as_by_its_own_file() -> None:
    (run,) = runs("""
        [base.train]
        steps = 40
        device = "cpu"
        [[grid]]
        method = { name = "relora", rank = 8, warm_start_steps = 10 }
        schedule.kind = "wsd"
    """)
    own = {
        "train": {"steps": 40, "device": "cpu"},
        "method": {"name": "relora", "rank": 8, "warm_start_steps": 10},
        "schedule": {"kind": "wsd"},
    }
    assert run.config == resolved(parse(own), world_size=1, on_gpu=False)
    assert run.lr == 4e-3  # the method's own
    assert run.label == "relora rank=8 warm_start_steps=10 schedule.kind=wsd"


def test_what_base_says_once_is_not_in_the_label_and_its_lists_are() -> None:
    text = """
        [base]
        train.steps = 40
        schedule.warmup = [2, 4]
        [[grid]]
        method.name = "full"
    """
    assert [r.label for r in runs(text)] == ["full schedule.warmup=2", "full schedule.warmup=4"]


def test_seeds_and_rates_share_a_configuration_and_nothing_else_does() -> None:
    found = runs("""
        [base]
        train.seed = [0, 1, 2]
        optim.lr = [1e-3, 2e-3]
        [[grid]]
        method.name = "bpt"
        method.rank = [4, 8]
        method.merge_every = [10, 20]
    """)
    assert len(found) == 24
    assert len({r.configuration for r in found}) == len({r.label for r in found}) == 4
    assert all((a.configuration == b.configuration) == (a.label == b.label)
               for a in found for b in found)  # fmt: skip


SETTINGS = {
    "method.rank": st.integers(1, 64),
    "method.merge_every": st.integers(0, 300),
    "optim.lr": st.floats(1e-6, 1.0),
    "train.seed": st.integers(0, 99),
    "schedule.kind": st.sampled_from(["cosine", "linear", "wsd"]),
}


@settings(max_examples=25, deadline=None)
@given(st.fixed_dictionaries({k: st.lists(v, min_size=1, max_size=3, unique=True)
                              for k, v in SETTINGS.items()}), st.data())  # fmt: skip
def test_any_product_has_distinct_stable_names(lists: dict[str, Any], data: st.DataObject) -> None:
    block = {"method.name": "bpt", **lists}
    found = expand({"grid": [block]}).runs
    assert len(found) == math.prod(map(len, lists.values()))
    names = [run.name for run in found]
    assert len(set(names)) == len(names) and all(len(name) < 200 for name in names)
    chosen = data.draw(st.sampled_from(list(product(*lists.values()))))
    alone = dict(zip(lists, chosen, strict=True))
    (run,) = expand(
        {"base": {"optim": {"lr": 0.5}}, "grid": [{"method": {"name": "bpt"}, **alone}]}
    ).runs
    assert run.name in names, "a run's name doesn't depend on the rest of the grid"
    assert dump(run.config) in {dump(other.config) for other in found}


def test_a_name_is_a_plain_file_name() -> None:
    (run,) = runs("""
        [[grid]]
        method.name = "bpt"
        method.targets = "q,v,*.mlp/up"
        method.train_rest = false
    """)
    assert run.name == f"bpt-targets=q_v_.mlp_up-train_rest=false-lr=0.002-seed=0-{run.digest}"


@pytest.mark.parametrize("change", ["train.steps = 31", "optim.clip = 0.5", "train.seed = 1"])
def test_another_setting_is_another_run(change: str) -> None:
    text = '[[grid]]\nmethod.name = "full"\ntrain.batch_size = 4\n'
    (one,), (other,) = runs(text), runs(text + change)
    assert one.digest != other.digest


FULL = '[[grid]]\nmethod.name = "full"\n'


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "grid: empty; write a [[grid]] block"),
        ("grid = []", "grid: empty; write a [[grid]] block"),
        ("[base.train]\nsteps = 3", "grid: empty"),
        ('[grid]\nmethod.name = "full"', "grid: must be a list of blocks, each under [[grid]]"),
        (f"base = 3\n{FULL}", "base: must be a table, [base] (got 3)"),
        (f"[bsae.train]\nsteps = 3\n{FULL}", "bsae: unknown key; did you mean 'base'?"),
        (f'equals = "flops"\n{FULL}', "equals: unknown key; did you mean 'equal'?"),
        (f'equal = "flop"\n{FULL}', "equal: 'flop' has the wrong type or value; give 'tokens' or"),
        (f"equal = 3\n{FULL}", "equal: 3 has the wrong type or value; give 'tokens' or 'flops'"),
        (f'equal = "flops"\n{FULL}train.steps = [30, 60]',
         "[[grid]] 1: train.steps: with equal = \"flops\" must be one number, set only in [base]"
         " or in the block of 'full' (got [30, 60]); the steps"),
        (f'equal = "time"\n[base.train]\nsteps = [30, 60]\n{FULL}',
         "[[grid]] 1: train.steps: with equal = \"time\" must be one"),
        (f'equal = "time"\n{FULL}{FULL}optim.clip = 0.5\ntrain.steps = 30',
         "[[grid]] 2: train.steps: with equal = \"time\" must be one number, set only in [base] or"
         " in the block of 'full' (got 30); the steps of all other runs follow from it"),
        (f'equal = "flops"\n[[grid]]\nmethod.name = "bpt"\ntrain.steps = 30\n{FULL}',
         "[[grid]] 1: train.steps: with equal = \"flops\" must be one"),
        (f'equal = "flops"\n{FULL}train.seq_len = [64, 128]',
         "train.seq_len: must be the same in all runs (got 64 in 'full train.seq_len=64' and 128"),
        (f'equal = "time"\n{FULL}data.path = ["a", "b"]', "data.path: "),
        ("[[grid]]\ntrain.steps = 3", "[[grid]] 1: method.name: missing"),
        (f'{FULL}[[grid]]\nmethod.name = "btp"', "[[grid]] 2: method.name: unknown method 'btp'"),
        (f"{FULL}method.rank = 3", "[[grid]] 1: method.rank: unknown key; full has none"),
        ('[[grid]]\nmethod.name = "bpt"\nmethod.merge_evry = [3, 4]',
         "[[grid]] 1: method.merge_evry: unknown key; did you mean 'method.merge_every'?"),
        (f"{FULL}trian.steps = 3", "[[grid]] 1: trian: unknown key; did you mean 'train'?"),
        (f"{FULL}seed = [0, 1]", "[[grid]] 1: seed: unknown key; did you mean 'train.seed'?"),
        (f'{FULL}equal = "flops"', "[[grid]] 1: equal: applies to all runs; write it above"),
        (f"{FULL}optim.lr = []", "[[grid]] 1: optim.lr: must have at least one value (got [])"),
        (f'{FULL}optim.lr = [1e-3, "2e-3"]', "[[grid]] 1: optim.lr: '2e-3' has the wrong type"),
        (f"{FULL}optim.lr = [[1e-3]]", "[[grid]] 1: optim.lr: [0.001] has the wrong type"),
        (f"{FULL}optim.lr = [-1e-3]", "[[grid]] 1: optim.lr: must be "),
        (f"{FULL}train.micro_batch = 5", "[[grid]] 1: train.micro_batch: must be "),
        (f"[base]\ntrain = 3\n{FULL}train.steps = 3", "[[grid]] 1: train.steps: train must be a"),
        (f'{FULL}run = "runs/x"', "[[grid]] 1: run: can't be set in a grid, since compare"),
        (f"{FULL}train.seed = [0, 1, 0]", "grid: two identical runs, 'full' and 'full', both"),
        (f"{FULL}optim.lr = [1e-3, 0.001]", "grid: two identical runs"),
        (f"{FULL}{FULL}train.steps = 300", "grid: two identical runs, 'full' and 'full train"),
        (f"{FULL}train.steps = [30, 60]", "train.steps x batch_size x seq_len: must be the same"),
        (f"{FULL}train.batch_size = [8, 16]", "train.steps x batch_size x seq_len: must be"),
        (f"{FULL}train.seq_len = [64, 128]", "train.seq_len: must be the same in all runs (got 64"),
        (f'{FULL}data.path = ["a", "b"]', "data.path: "),
        (f"{FULL}optim = [{{lr = 1e-3}}, {{lr = 2e-3}}]", "[[grid]] 1: optim: must not be a list"),
        (f"{FULL}optim.lr = 1e-3\ntrain.seed = [0, 1]\n{FULL}optim.lr = 2e-3",
         "train.seed: 'full' has [0, 1] at lr=0.001 and [0] at lr=0.002; give all"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_grid_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        runs(text)
    assert str(error.value).startswith(message)


def test_a_recipe_may_be_a_block_and_its_header_is_no_setting() -> None:
    made = expand({"grid": [tomllib.loads(recipes.text("loro-60m-loro"))]}).runs
    assert [run.method for run in made] == ["loro"] and "recipe" not in made[0].label


def test_fewer_steps_of_larger_batches_are_equal_tokens() -> None:
    text = f"{FULL}train = {{ steps = 60, batch_size = 8 }}\n"
    text += f"{FULL}train = {{ steps = 30, batch_size = 16 }}"
    assert [run.config.train.steps for run in runs(text)] == [60, 30]


@pytest.mark.parametrize("content, message", [(None, "No such file"), ("grid: x", "not TOML")])
def test_a_file_that_is_no_grid_is_named(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError) as error:
        load_grid(path)
    assert str(error.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    "name, methods",
    [("compare", {"full", "bpt", "relora", "loro"}), ("all-methods", set(algebra.COUNTED))],
)
def test_the_examples_have_a_tuned_baseline(name: str, methods: set[str]) -> None:
    found = load_grid(EXAMPLES / f"{name}.toml").runs
    assert {r.method for r in found} == methods
    assert {len({r.lr for r in found if r.label == one.label}) for one in found} == {3}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_run_of_an_example_is_one_that_can_begin(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each phase of each line is built, with one layer and few tokens, and gets its optimizer."""
    asked = path.read_text(encoding="utf-8")
    assert asked.startswith("# ") and f"peptrain compare examples/{path.name} --out runs/" in asked
    start = re.search(r'^init_from = "(.*)"', asked, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    if start is not None:  # trained by a command in the file's head
        assert f"--run {start[1]}\n" in asked
        Path(start[1], "checkpoints").mkdir(parents=True)
        begun = resolved(RunConfig(method=Full()), world_size=1, on_gpu=False)
        Path(start[1], "config.toml").write_text(dump(begun))
    found = load_grid(path)
    for run in {run.configuration: run for run in found.runs}.values():
        model = replace(run.config.model, layers=1, vocab_size=64)
        config = replace(run.config, model=model)
        ends = config.method.phases(config.train.steps)
        for phase in range(len(ends) + 1):
            sites = find_sites(one := build(config, phase))
            config.method.optimizer(one, sites, config.optim, phase)
        factors = config.method.schedule(schedule.build(config.schedule, config.train.steps))
        assert all(0 <= factors(step) <= 1 for step in range(config.train.steps))
    assert not [said for said in caplog.messages if "nothing merges" in said or "longer" in said]


def test_what_differs_unsaid_is_told() -> None:
    """By the methods' defaults; not what is said, nor what is a part of the run's length."""
    grid = """
        [base.train]
        steps = 10
        [base.optim]
        clip = 1.0
        [[grid]]
        method.name = ["full", "loro"]
        [[grid]]
        method.name = "bpt"
        schedule.floor = 0.5
        schedule.kind = ["wsd", "cosine"]
    """
    found = unstated(runs(grid))
    assert found == [
        "optim.eps differs by the methods' defaults: 1e-08 for full, bpt; 1e-06 for loro",
    ]
    found = unstated(runs(grid.replace('schedule.kind = ["wsd", "cosine"]', "")))
    assert found[1:] == [
        "schedule.kind differs by the methods' defaults: cosine for full, loro; wsd for bpt"
    ]
    assert unstated(runs('[[grid]]\nmethod.name = ["lora", "full"]')) == []


def test_nothing_is_said_of_steps_that_are_not_known_yet(caplog: pytest.LogCaptureFixture) -> None:
    text = """
        [[grid]]
        method = { name = "bpt", train_rest = false }
        train.steps = 10
        schedule.warmup = 20
    """
    runs(text)
    of_any, of_ten = caplog.messages
    assert of_any.startswith("method.train_rest: false leaves embeddings")
    assert of_ten == "schedule.warmup: 20 is longer than the run of 10 steps"
    caplog.clear()
    runs(f'equal = "flops"\n{text}')
    assert caplog.messages == [of_any]


def test_a_product_of_too_many_runs_is_refused_before_it_is_expanded() -> None:
    block = {"method": {"name": "full"}, "optim": {"lr": [n * 1e-6 for n in range(1, 20_001)]},
             "train": {"seed": list(range(200))}}  # fmt: skip
    with pytest.raises(ConfigError) as error:
        expand({"grid": [block]})
    assert str(error.value) == (
        "[[grid]] 1: optim.lr, train.seed: 20,000 x 200 values are 4000000 runs, and a block has at"
        " most 10,000; shorten a list"
    )


def test_a_mistake_in_base_is_looked_for_there() -> None:
    grid = {"base": {"train": {"seeds": [0, 1]}}, "grid": [{"method": {"name": "full"}}]}
    with pytest.raises(ConfigError, match=r"^\[base\]: train\.seeds: unknown key"):
        expand(grid)
    grid = {"grid": [{"method": {"name": "full"}, "train": {"seeds": 1}}]}
    with pytest.raises(ConfigError, match=r"^\[\[grid\]\] 1: train\.seeds: unknown key"):
        expand(grid)
