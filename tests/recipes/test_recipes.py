"""The recipes that pre-train: they parse, count as their papers print, and train."""

import re
import tomllib
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from oracles import algebra
from support import arch_of, rows
from torch._subclasses import FakeTensorMode
from transformers import PreTrainedModel

from peptrain import recipes
from peptrain.config import RunConfig, dump, parse, resolved
from peptrain.errors import ConfigError
from peptrain.methods.base import Method
from peptrain.models.hf import build_model, count_parameters, hf_config
from peptrain.models.sites import find_sites
from peptrain.optim.schedule import build as build_schedule
from peptrain.rng import Rng
from peptrain.sections import DataConfig
from peptrain.testing import MODEL, STEPS
from peptrain.training.loop import train

NAMES = [name for name in recipes.names() if not recipes.about(name).tunes]
every_recipe = pytest.mark.parametrize("name", NAMES)


def large_ones_slow(names: Iterable[str]) -> list[Any]:
    """Deep models are built in half a second each."""
    large = re.compile(r"-(250m|350m|0\.5b|1b|1\.3b|1\.5b)-")
    return [pytest.param(n, marks=[pytest.mark.slow] if large.search(n) else []) for n in names]


SIZES = ("60m", "130m", "350m", "1b")
TABLE_1 = {  # LORO's "Param", in millions; for LoRA and ReLoRA it prints the dense model's
    "full": (58, 134, 368, 1339),
    "galore": (58, 134, 368, 1339),
    "lowrank": (43, 94, 185, 609),
    "loro": (43, 94, 185, 609),
    "sltrain": (44, 97, 194, 646),
}
PRINTED = {  # millions of trainable parameters, and to what they were rounded
    **{
        f"loro-{size}-{key}": (count, 1)
        for key, counts in TABLE_1.items()
        for size, count in zip(SIZES, counts, strict=True)
    },
    **{f"loro-130m-{key}": (94, 1) for key in ("shallow", "slim", "loro-slim-mlp")},
    **{f"loro-350m-{key}": (185, 1) for key in ("shallow", "loro-slim-mlp")},
    "loro-350m-slim": (185, 2.2),  # the shape it prints has 186.05
    **{f"relora-60m-{key}": (43, 1) for key in ("lora", "lora-warm", "relora")},
    **{f"relora-130m-{key}": (72, 1) for key in ("lora", "lora-warm", "relora")},
    **{f"relora-250m-{key}": (99, 1) for key in ("lora", "lora-warm", "relora", "online")},
    **{f"relora-350m-{key}": (125, 1) for key in ("lora", "lora-warm", "relora")},
    **{f"relora-1.3b-{key}": (250, 2) for key in ("lora-warm", "relora", "online")},
    "relora-60m-control": (43, 2),  # the released shapes
    "relora-130m-control": (72, 3),
    "relora-250m-control": (99, 2),
    "relora-350m-control": (130, 10),
    "relora-1.3b-control": (250, 10),
    **{f"bpt-qwen-0.5b-{key}": (206, 1) for key in ("bpt", "relora", "lora", "dora")},
    **{f"bpt-qwen-0.5b-{key}": (137, 1) for key in ("vera", "hyperadapt")},
    "bpt-qwen-0.5b-full": (494, 1),
    "bpt-qwen-100m-full": (108, 1),
    "bpt-qwen-100m-bpt": (88.894, 1e-3),
    "bpt-qwen-1.5b-bpt": (526.339, 1e-3),
    **{f"bpt-olmo2-1b-{key}": (600, 100) for key in ("bpt", "relora")},
    "bpt-olmo2-1b-full": (1500, 100),
}
PICO = {  # total and trainable
    "tiny-full": (11_282_784, 11_282_784),
    "small-full": (64_595_328, 64_595_328),
    "tiny-relora": (11_682_144, 10_060_128),
    "small-relora": (66_192_768, 40_240_512),
}
TOKENS = {  # billions as printed, of papers that count all of a step's tokens
    **{name: 10.0 for name in NAMES if name.startswith("bpt-")},
    **{name: 100.0 for name in NAMES if name.startswith("bpt-qwen-1.5b-100b")},
    **{name: 41.9 for name in NAMES if name.startswith("pico-")},
    **{name: 13.1 for name in NAMES if name.startswith("loro-1b")},
    **{name: 1.2 for name in NAMES if name.startswith("relora-60m")},
}


def settled(name: str) -> RunConfig[Method]:
    return resolved(recipes.load(name), world_size=1, on_gpu=True)


@cache
def model_of(name: str) -> PreTrainedModel:
    """In the last phase, of fake tensors: no number is ever drawn."""
    config = settled(name)
    with FakeTensorMode():
        model = build_model(config.model, seq_len=config.train.seq_len, seed=0)
        last = len(config.method.phases(config.train.steps))
        config.method.install(model, find_sites(model), Rng(0), last)
    return model


@pytest.mark.parametrize("name", large_ones_slow(NAMES))
def test_a_recipe_says_what_it_is_and_what_it_counts(name: str) -> None:
    about, config, model = recipes.about(name), recipes.load(name), model_of(name)
    assert all(str(getattr(about, key)) for key in about.__dataclass_fields__)
    assert about.parameters == count_parameters(model)
    assert about.trainable == count_parameters(model, trainable=True)
    t = config.train
    assert about.tokens == t.steps * t.batch_size * t.seq_len
    assert config.data.path is None and config.run is None and config.init_from is None


@every_recipe
def test_a_recipe_leaves_nothing_of_consequence_to_a_default(name: str) -> None:
    config = recipes.load(name)
    assert None not in (config.optim.lr, config.optim.clip, config.optim.weight_decay)
    assert None not in (config.schedule.kind, config.schedule.warmup, config.schedule.floor)
    assert config.train.precision is not None
    assert config.schedule.kind != "wsd" or config.schedule.decay is not None
    given = tomllib.loads(recipes.text(name))["method"]
    of_the_run = {"rank", "merge_every", "warm_start_steps", "exact_every", "restart_warmup"}
    fields = config.method.__dataclass_fields__.keys() & of_the_run
    if given.get("warm_start_steps"):
        fields |= {"warm_start_lr", "warm_start_warmup", "warm_start_then"}
    elif config.method.name in ("lora", "dora"):
        fields -= {"restart_warmup"}  # there is no restart
    assert fields <= given.keys()


@pytest.mark.parametrize("name", large_ones_slow(PRINTED))
def test_the_counts_are_the_papers(name: str) -> None:
    millions, unit = PRINTED[name]
    trainable = count_parameters(model_of(name), trainable=True)
    assert abs(trainable / 1e6 - millions) <= unit / 2


@pytest.mark.parametrize("kind", ["pico", "pico-compat"])
@pytest.mark.parametrize("key", PICO)
def test_the_counts_of_the_small_models(key: str, kind: str) -> None:
    model = model_of(f"{kind}-{key}")
    assert (count_parameters(model), count_parameters(model, trainable=True)) == PICO[key]


@every_recipe
def test_a_recipe_has_its_closed_form(name: str) -> None:
    config, method = settled(name), settled(name).method
    hf = hf_config(config.model, config.train.seq_len)
    if hf.model_type == "olmo2" or getattr(method, "targets", ""):
        pytest.skip("no closed form for its norms, or for a choice of matrices")
    total, trainable, _ = algebra.parameter_count(
        arch_of(hf), method.name, getattr(method, "rank", 0)
    )
    about = recipes.about(name)
    assert (about.parameters, about.trainable) == (total, trainable)


@pytest.mark.parametrize("name", TOKENS)
def test_the_tokens_are_the_papers(name: str) -> None:
    printed = TOKENS[name]
    unit = 0.1 if printed != int(printed) else 1e-4 * printed
    assert abs(recipes.about(name).tokens / 1e9 - printed) <= unit / 2


@pytest.mark.parametrize("name", ["relora-130m-relora", "relora-250m-relora", "relora-250m-online"])
def test_the_jagged_cosine_of_the_released_runs(name: str) -> None:
    """Full training's for the warm start; then 15,000 steps, restarts every 5000, warm-ups of 500
    and 100 steps."""
    config = settled(name)
    schedule = config.method.schedule(build_schedule(config.schedule, config.train.steps))
    first = algebra.warmup_cosine(20_000, 500 if "130m" in name else 1000, 0.1)
    assert all(schedule(step) == pytest.approx(first(step)) for step in range(0, 5000, 50))
    points = {250: 0.5, 500: 1.0, 2500: 0.958409, 5000: 0.0, 5050: 0.397203, 5100: 0.794406,
              7500: 0.574363, 14999: 0.100000}  # fmt: skip
    for step, wanted in points.items():
        assert schedule(5000 + step) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_the_first_tenth_of_a_long_schedule(size: str) -> None:
    """The compatible recipes follow 200,000 steps to 0.6 %, the linear one to 1e-5."""
    steps = range(2500, 20_000, 500)
    for key, long in (
        ("full", lambda t: (200_000 - t) / 197_500),
        ("relora", algebra.warmup_cosine(200_000, 2000, 0.1)),
    ):
        config = settled(f"pico-compat-{size}-{key}")
        schedule = config.method.schedule(build_schedule(config.schedule, config.train.steps))
        apart = [abs(schedule(t) - long(t)) for t in steps if t % 2000]
        assert max(apart) < (1e-5 if key == "full" else 6e-3)


def test_the_methods_that_a_recipe_is_for() -> None:
    used = {recipes.load(name).method.name for name in NAMES}
    assert used == set(algebra.COUNTED)


FEW: dict[str, Any] = {
    "rank": 2, "merge_every": 2, "reset_every": 2, "exact_every": 3, "refresh_every": 3, "gap": 2,
    "restart_warmup": 1,
}  # fmt: skip
SHORT = [
    "bpt-qwen-100m-bpt", "bpt-qwen-0.5b-dora", "bpt-qwen-0.5b-vera", "bpt-qwen-0.5b-hyperadapt",
    "bpt-olmo2-1b-relora", "relora-60m-lora", "relora-1.3b-lora-warm", "relora-250m-online",
    "relora-130m-restarts-reset", "pico-compat-tiny-relora", "pico-small-full", "loro-350m-galore",
    "loro-60m-sltrain", "cola-60m-cola", "loro-130m-loro", "loro-130m-loro-slim-mlp",
]  # fmt: skip


@pytest.mark.parametrize("name", SHORT)
def test_a_recipe_trains_at_a_smaller_size(name: str, corpus: Path, tmp_path: Path) -> None:
    """All of its settings but the lengths, in its own precision."""
    config = recipes.load(name)
    known = config.method.__dataclass_fields__.keys()
    fewer = {k: v for k, v in FEW.items() if k in known and getattr(config.method, k)}
    if getattr(config.method, "warm_start_steps", 0):
        fewer |= {"warm_start_steps": 2, "warm_start_warmup": 1}
    train(
        replace(
            config,
            method=replace(config.method, **fewer),
            model=replace(config.model, **(MODEL | {"kv_heads": 1})),
            schedule=replace(config.schedule, warmup=1, decay=2),
            train=replace(config.train, steps=STEPS, batch_size=4, seq_len=16, log_every=1),
            data=DataConfig(path=corpus),
            run=tmp_path / "run",
        )
    )
    (end,) = rows(tmp_path / "run", "end")
    assert end["step"] == STEPS and 0 < end["held_out_loss"] < 10


def test_the_page_has_every_recipe_with_its_count_and_result() -> None:
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\S+)` \| (\S+) / (\S+) \| .* \| (.*) \|$", page, re.MULTILINE)
    assert sorted(row[0] for row in listed) == recipes.names()
    for name, trainable, total, expected in listed:
        about = recipes.about(name)
        assert trainable == f"{about.trainable / 1e6:,.1f}"
        assert (total, expected) == (f"{about.parameters / 1e6:,.1f}", about.expected)


# --- the loader


def test_an_unknown_recipe_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError) as told:
        recipes.load("loro-60-loro")
    nearest = "unknown; did you mean 'loro-60m-loro'? `peptrain recipes` lists them"
    assert str(told.value) == f"recipe 'loro-60-loro': {nearest}"
    for call in (recipes.load, recipes.about, recipes.text):
        with pytest.raises(ConfigError, match=r"^recipe '../config': unknown; `peptrain recipes`"):
            call("../config")


METHOD = '[method]\nname = "full"\n'


@pytest.mark.parametrize(
    "text, message",
    [
        ("recipe = 3\n" + METHOD, "recipe: must be a table, [recipe] (got 3)"),
        ("[recipes]\ntitle = 'x'\n" + METHOD, "recipes: unknown key; known are method, model,"),
    ],
)
def test_only_the_table_recipe_is_for_readers(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as told:
        parse(tomllib.loads(text))
    assert str(told.value).startswith(message)


def test_what_a_file_says_of_itself_does_not_configure() -> None:
    headed = parse(tomllib.loads("[recipe]\nanything = [1, 2]\n" + METHOD))
    assert dump(headed) == dump(parse(tomllib.loads(METHOD)))


def test_a_misspelt_line_of_a_recipe_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = recipes.text(NAMES[0]).replace("title =", "titel =", 1)
    monkeypatch.setattr(recipes, "text", lambda name: wrong)
    with pytest.raises(ConfigError, match=r"recipe\.titel: unknown key; did you mean"):
        recipes.about(NAMES[0])
