"""The configuration: strict TOML in, the same TOML out, and nothing left unset once resolved."""

import dataclasses
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny, tiny_method

from peptrain.config import RunConfig, dump, load, parse, resolved
from peptrain.errors import ConfigError
from peptrain.methods import METHODS
from peptrain.methods.base import Method
from peptrain.methods.bpt import BPT
from peptrain.methods.full import Full
from peptrain.methods.loro import LORO
from peptrain.models.hf import ModelConfig
from peptrain.optim.adamw import OptimConfig
from peptrain.optim.schedule import ScheduleConfig, build
from peptrain.sections import DataConfig, TrainConfig
from peptrain.settings import toml
from peptrain.settings.fields import interval, of_width, resolve, same_as


def parsed(text: str) -> RunConfig[Method]:
    return parse(toml.tomllib.loads(text))


BPT_SECTION = '[method]\nname = "bpt"\n'


@pytest.mark.parametrize(
    "text, message",
    [
        (BPT_SECTION + "merge_evry = 3", "method.merge_evry: unknown key; did you mean"
         " 'method.merge_every'?"),
        (BPT_SECTION + "[optim]\nlearning_rate = 1.0", "optim.learning_rate: unknown key"),
        (BPT_SECTION + "[train]\nstep = 3", "train.step: unknown key; did you mean 'train.steps'?"),
        (BPT_SECTION + "[shedule]\nkind = 'wsd'", "shedule: unknown key; did you mean 'schedule'?"),
        (BPT_SECTION + "[quite_another]", "quite_another: unknown key; known are method, model,"),
        ("steps = 3\n" + BPT_SECTION, "steps: unknown key; did you mean 'train.steps'?"),
        ("lr = 1e-3\n" + BPT_SECTION, "lr: unknown key; did you mean 'optim.lr'?"),
        (BPT_SECTION + "[train]\nlr = 1e-3", "train.lr: unknown key; did you mean 'optim.lr'?"),
        (BPT_SECTION + "lr = 1e-3", "method.lr: unknown key; did you mean 'optim.lr'?"),
        ("rank = 3\n" + BPT_SECTION, "rank: unknown key; did you mean 'method.rank'?"),
        (BPT_SECTION + "xyzzy = 1", "method.xyzzy: unknown key; bpt has method.targets, method."),
        ("[method]\nname = 'full'\nrank = 3", "method.rank: unknown key; full has none"),
        (BPT_SECTION + "[train]\nxyzzy = 1", "train.xyzzy: unknown key; known are train.steps,"),
        (BPT_SECTION + "[train]\nseed = -1", "train.seed: must be >= 0 (got -1)"),
        (BPT_SECTION + "eval = 3", "method.eval: unknown key"),
        ("train = 3\n" + BPT_SECTION, "train: must be a table, [train] (got 3)"),
        ("method = 'bpt'", "method: must be a table (got 'bpt'); write name = \"bpt\""),
        ("[method]\nrank = 3", "method.name: missing"),
        ("[method]\nname = 'btp'", "method.name: unknown method 'btp'; choose from full, bpt,"),
        ("[method]\nname = ['bpt']", "method.name: unknown method ['bpt']"),
        ("[train]\nsteps = 3", "method.name: missing"),
        (BPT_SECTION + "rank = '3'", "method.rank: '3' has the wrong type or value; give a whole"
         " number"),
        (BPT_SECTION + "rank = 3.0", "method.rank: 3.0 has the wrong type"),
        (BPT_SECTION + "rank = true", "method.rank: True has the wrong type"),
        (BPT_SECTION + "rank = 0", "method.rank: must be >= 1 (got 0)"),
        (BPT_SECTION + "init = 'zero'", "method.init: 'zero' has the wrong type or value; give"
         " 'kaiming_uniform' or 'kaiming_normal' or 'model'"),
        (BPT_SECTION + "[optim]\nlr = true", "optim.lr: True has the wrong type or value; give a"
         " number"),
        (BPT_SECTION + "[optim]\nlr = '1e-3'", "optim.lr: '1e-3' has the wrong type"),
        (BPT_SECTION + "[optim]\nlr = -1", "lr: must be a finite number >= 0 (got -1.0)"),
        (BPT_SECTION + "[optim]\nlr = inf", "optim.lr: must be a finite number >= 0 (got inf)"),
        (BPT_SECTION + "[optim]\nweight_decay = inf", "weight_decay: must be a finite number"),
        (BPT_SECTION + "[optim]\neps = inf", "optim.eps: must be a finite number > 0 (got inf)"),
        (BPT_SECTION + "[optim]\nclip = -1", "optim.clip: must be a finite number >= 0 (got -1"),
        (BPT_SECTION + "[optim]\nlr = nan", "optim.lr: must be a finite number >= 0 (got nan)"),
        (BPT_SECTION + "[optim]\nbeta2 = 1", "optim.beta2: must be in [0, 1) (got 1.0)"),
        (BPT_SECTION + "[train]\ncompile = 1", "train.compile: 1 has the wrong type or value; give"
         " true or false"),
        (BPT_SECTION + "[train]\nprecision = 'fp16'", "train.precision: 'fp16' has the wrong type"
         " or value; give 'fp32' or 'bf16-mixed'"),
        (BPT_SECTION + "[train]\nsteps = 0", "train.steps: must be >= 1 (got 0)"),
        (BPT_SECTION + "[train]\nsteps = [1]", "train.steps: [1] has the wrong type"),
        (BPT_SECTION + "[train]\neval_every = -1", "train.eval_every: must be >= 0 (got -1)"),
        (BPT_SECTION + "[data]\npath = 3", "data.path: 3 has the wrong type or value; give a path"),
        (BPT_SECTION + "[model]\npreset = 'tinny'", "model.preset: 'tinny' is unknown; did you mean"
         " 'tiny'?"),
        (BPT_SECTION + "[model]\nlayers = 0", "model.layers: must be >= 1 (got 0)"),
        (BPT_SECTION + "[model]\nconfig = 'x'\nfamily = 'llama'", "model.family: a config.json"),
        (BPT_SECTION + "[schedule]\nkind = 'wsdd'", "schedule.kind: 'wsdd' has the wrong type or"
         " value; give 'constant' or"),
        (BPT_SECTION + "[schedule]\nfloor = 1.5", "schedule.floor: must be in [0, 1] (got 1.5)"),
        ("[method]\nname = 'loro'\nscale = 'wide'", "method.scale: must be"
         " hidden, rows, min or a number > 0"),
    ],
)  # fmt: skip
def test_a_mistake_is_answered_with_the_key_the_value_and_the_repair(
    text: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(text)
    assert message in str(caught.value)


def test_a_whole_number_may_stand_for_a_float() -> None:
    lr = parsed(BPT_SECTION + "[optim]\nlr = 1").optim.lr
    assert lr == 1.0 and type(lr) is float


def test_a_file_that_is_no_toml_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    with pytest.raises(ConfigError, match=r"--config .*x\.toml: No such file"):
        load(file)
    file.write_text("[train\n")
    with pytest.raises(ConfigError, match=r"--config .*x\.toml: not TOML: .*line 1"):
        load(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not TOML"):
        load(file)


def back(config: RunConfig[Any]) -> RunConfig[Method]:
    return parsed(dump(config))


@pytest.mark.parametrize("name", METHODS)
def test_what_is_dumped_is_what_is_parsed(name: str) -> None:
    for config in (RunConfig(method=METHODS[name]()), tiny(name, Path('some where/ö/"q"\\x'))):
        assert back(config) == config
        full = resolved(config, world_size=1, on_gpu=False)
        assert back(full) == full


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), st.floats(0, 3e38))
def test_any_string_and_any_number_survive(text: str, number: float) -> None:
    config = RunConfig(
        method=BPT(include=text, rank=3),
        data=DataConfig(path=Path("/" + text.replace("\0", ""))),
        optim=OptimConfig(lr=number),
    )
    assert back(config) == config


def test_the_run_directory_is_not_in_its_own_configuration() -> None:
    config = tiny("full", Path("data"), Path("elsewhere"))
    assert back(config) == replace(config, run=None)


@pytest.mark.parametrize("name", METHODS)
def test_resolving_leaves_nothing_unset_and_is_idempotent(name: str) -> None:
    full = resolved(RunConfig(method=METHODS[name]()), world_size=1, on_gpu=False)
    optional = {
        "config",
        "path",
        "run",
        "family",
        "cuda_graph",
        "exact_cap",
        "init_std",
        "momentum",
        "ranks",
        "tasks_data",
        "sample_prompts",
        "parallel",
        "exchange",
        *("embedding_lr", "head_lr", "muon_scale"),
        *("rows", "labels", "pad_token"),
    } | {f.name for f in fields(ModelConfig)}
    optional.add(
        "warm_start_warmup"
    )  # follows schedule.warmup, which may change when a run goes on
    for section in fields(full):
        value = getattr(full, section.name)
        for leaf in fields(value) if dataclasses.is_dataclass(value) else ():
            assert leaf.name in optional or getattr(value, leaf.name) is not None, leaf.name
    assert resolved(full, world_size=1, on_gpu=False) == full
    own = METHODS[name].optim_defaults
    assert full.optim.lr == own.lr and full.optim.clip == own.clip


def test_what_the_user_sets_wins_over_the_method_and_the_method_over_the_common() -> None:
    config = RunConfig(
        method=BPT(), optim=OptimConfig(lr=0.5, clip=0.0), schedule=ScheduleConfig(floor=0.3)
    )
    full = resolved(config, world_size=1, on_gpu=False)
    assert (full.optim.lr, full.optim.clip, full.optim.beta2) == (0.5, 0.0, 0.999)
    assert (full.schedule.floor, full.schedule.kind) == (0.3, "wsd")
    plain = resolved(RunConfig(method=Full()), world_size=1, on_gpu=False)
    assert (plain.schedule.kind, plain.schedule.floor, plain.optim.lr) == ("cosine", 0.1, 1e-3)


def at(method: Method, steps: int, **train: Any) -> RunConfig[Method]:
    config = RunConfig(method=method, train=TrainConfig(steps=steps, **train))
    return resolved(config, world_size=1, on_gpu=False)


@pytest.mark.parametrize(
    "steps, merge, exact, warmup, decay, evaluate, save",
    [
        (600, 150, 150, 60, 120, 60, 150),
        (602, 151, 151, 60, 120, 61, 151),
        (20_000, 2000, 500, 2000, 4000, 2000, 1000),
        (100_000, 2000, 500, 10_000, 20_000, 10_000, 1000),
        (8, 2, 2, 1, 2, 1, 2),
        (3, 1, 1, 0, 1, 1, 1),
    ],
)
def test_intervals_and_lengths_are_fractions_of_the_run_with_a_cap(
    steps: int, merge: int, exact: int, warmup: int, decay: int, evaluate: int, save: int
) -> None:
    bpt, loro = at(BPT(), steps), at(LORO(), steps)
    assert isinstance(bpt.method, BPT) and isinstance(loro.method, LORO)
    assert bpt.method.merge_every == merge
    assert (loro.method.exact_every, loro.method.refresh_every) == (exact, exact)
    assert (bpt.schedule.warmup, bpt.schedule.decay) == (warmup, decay)
    assert (bpt.train.eval_every, bpt.train.checkpoint_every) == (evaluate, save)


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("name", METHODS)
def test_the_defaults_fit_a_run_however_short(name: str, steps: int) -> None:
    full = at(METHODS[name](), steps)
    schedule = full.method.schedule(build(full.schedule, steps))
    assert all(0 <= schedule(t) <= 1 for t in range(steps))


def test_an_interval_that_follows_another_follows_what_the_user_gave() -> None:
    def refresh(**given: int) -> int | None:
        method = at(LORO(**given), 100).method
        assert isinstance(method, LORO)
        return method.refresh_every

    assert refresh() == 25
    assert refresh(exact_every=7) == 7
    assert refresh(exact_every=0) == 0
    assert refresh(exact_every=7, refresh_every=14) == 14
    assert refresh(refresh_every=0) == 0


@dataclasses.dataclass(frozen=True)
class Section:
    name: ClassVar[str] = "section"
    often: int | None = interval(0.5)
    same: int | None = same_as("often")
    size: int | None = of_width(0.25)
    plain: int | None = None


def test_an_interval_longer_than_the_run_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert resolve(Section(often=11), "section", 10).often == 11
    assert caplog.messages == ["section.often: 11 is longer than the run of 10 steps"]
    caplog.clear()
    assert resolve(Section(often=10, size=64, plain=99), "section", 10, 64).size == 64
    assert resolve(Section(often=0), "section", 10) == Section(often=0, same=0, size=1)
    assert caplog.messages == []


def test_the_rank_is_a_quarter_of_the_width() -> None:
    for width, rank in ((128, 32), (64, 16), (6, 1), (2, 1)):
        model = ModelConfig(hidden_size=width, heads=1)
        full = resolved(RunConfig(method=BPT(), model=model), world_size=1, on_gpu=False)
        assert full.method.rank == rank
    assert tiny_method("bpt").rank == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "batch, seq_len, world, micro",
    [(32, 256, 1, 32), (512, 256, 1, 64), (512, 256, 4, 64), (6, 8192, 1, 2), (7, 8192, 1, 1),
     (4, 100_000, 2, 1), (96, 256, 1, 48)],
)  # fmt: skip
def test_a_micro_batch_is_the_largest_divisor_that_fits(
    batch: int, seq_len: int, world: int, micro: int
) -> None:
    train = TrainConfig(batch_size=batch, seq_len=seq_len)
    full = resolved(RunConfig(method=Full(), train=train), world_size=world, on_gpu=False)
    assert full.train.micro_batch == micro


@pytest.mark.parametrize(
    "given, tokens",
    [({"steps": 20, "batch_size": 4, "seq_len": 64}, 256),  # every 2 steps
     ({"steps": 5, "batch_size": 1, "seq_len": 64}, 64), ({"steps": 10**6}, 131_072),
     ({"steps": 9, "eval_every": 0, "batch_size": 2}, 9 * 256),
     ({"steps": 10**6, "seq_len": 200_000}, 200_000),
     ({"eval_tokens": 0}, 0), ({"eval_tokens": 8192}, 8192)],
)  # fmt: skip
def test_an_evaluation_takes_at_most_half_the_tokens_trained_since_the_last(
    given: dict[str, int], tokens: int
) -> None:
    config = RunConfig(method=Full(), train=TrainConfig(**given))
    assert resolved(config, world_size=1, on_gpu=False).train.eval_tokens == tokens


def test_a_batch_must_be_shared_evenly() -> None:
    six = RunConfig(method=Full(), train=TrainConfig(batch_size=6, micro_batch=2))
    with pytest.raises(ConfigError, match=r"train\.batch_size: must be a multiple of the 4 ranks"):
        resolved(six, world_size=4, on_gpu=False)
    with pytest.raises(ConfigError, match=r"train\.micro_batch: must be a divisor of the 3 rows"):
        resolved(six, world_size=2, on_gpu=False)
    assert resolved(six, world_size=3, on_gpu=False).train.micro_batch == 2


def test_precision_follows_the_device() -> None:
    for on_gpu, wanted in ((True, "bf16-mixed"), (False, "fp32")):
        unset = RunConfig(method=Full())
        assert resolved(unset, world_size=1, on_gpu=on_gpu).train.precision == wanted
        given = replace(unset, train=TrainConfig(precision="bf16"))
        assert resolved(given, world_size=1, on_gpu=on_gpu).train.precision == "bf16"


# --- settings by task


BY_TASK = '[method]\nname = "full"\n[optim]\nlr = 1.0\nclip = 2.0\n'


def test_a_file_may_have_settings_for_each_task(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    own = "[tasks.cola]\noptim.lr = 3.0\ntune.epochs = 7\n[tasks.rte.optim]\nlr = 4.0\n"
    file.write_text(BY_TASK + own)
    cola, rte = load(file, "cola"), load(file, "rte")
    assert (cola.optim.lr, cola.optim.clip, cola.tune.epochs, cola.tune.task) == (3, 2, 7, "cola")
    assert (rte.optim.lr, rte.optim.clip, rte.tune.epochs, rte.tune.task) == (4, 2, 3, "rte")
    file.write_text(BY_TASK)
    assert (load(file, "rte").tune.task, load(file).tune.task) == ("rte", "")


@pytest.mark.parametrize(
    "own, message",
    [
        ("[tasks.rte]\noptim.lr = 3.0", "tune.task: must be one of rte, for which there are"),
        ("[tasks]\ncola = 3", "tasks: must be tables, [tasks.NAME], with settings such as"),
        ("[tasks]", "tasks: must be tables, [tasks.NAME], with settings such as optim.lr = 1e-4"),
        ("[tasks.cola]", "tasks: must be tables, [tasks.NAME], with settings such as"),
        ("[tasks.cola]\nlr = 3.0", "lr: unknown key; did you mean 'optim.lr'?"),
        ("[tasks.cola]\noptim = 3", "optim: must be a table, [optim] (got 3)"),
    ],
)
def test_settings_for_tasks_are_checked(own: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(BY_TASK + own)
    with pytest.raises(ConfigError) as told:
        load(tmp_path / "c.toml", "cola")
    assert message in str(told.value) and str(told.value).startswith("--config ")


@pytest.mark.parametrize("given, message", [
    ({"method": "loro"}, r"method: must be a method, such as LORO\(rank=128\) \(got 'loro'\)"),
    ({"method": BPT}, r"method: must be a method, such as LORO"),
    ({"data": "corpus"}, r"data: must be of type DataConfig \(got 'corpus'\)"),
    ({"optim": {"lr": 1e-3}}, r"optim: must be of type OptimConfig"),
])  # fmt: skip
def test_a_section_of_another_type_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig(**{"method": BPT(rank=2), **given})


def test_paths_may_be_strings_and_numbers_may_not() -> None:
    config = RunConfig(method=BPT(rank=2), run="runs/a", data=DataConfig(path="b"))  # type: ignore[arg-type]
    assert (config.run, config.data.path) == (Path("runs/a"), Path("b"))
    with pytest.raises(ConfigError, match=r"method\.rank: must be a whole number \(got '8'\)"):
        BPT(rank="8")  # type: ignore[arg-type]
