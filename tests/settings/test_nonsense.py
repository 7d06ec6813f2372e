"""Values and files that make no sense: refused in one line that names the key or the file."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args, get_type_hints

import pytest
from support import tiny

from peptrain import recipes
from peptrain.comparison.grid import load_grid
from peptrain.config import RunConfig, dump, load, parse, resolved, warn_of_idle
from peptrain.errors import ConfigError
from peptrain.methods import METHODS
from peptrain.methods.full import Full
from peptrain.sections import TrainConfig
from peptrain.settings import toml

HUGE = 1 << 20_000
"""More digits than Python prints."""
NONSENSE = [float("nan"), float("inf"), -float("inf"), 1e300, -1, -0.5, 2**63, -(2**63), HUGE,
            True, "1", [1], [[[HUGE]]], {"x": {"y": HUGE}}, "x\0\n" * 10_000]  # fmt: skip


def sections() -> Iterator[tuple[str, type]]:
    """Name and class of every section, [method] with each method's own settings."""
    for name, hint in get_type_hints(RunConfig).items():
        if is_dataclass(hint):
            assert isinstance(hint, type)
            yield name, hint
    for cls in METHODS.values():
        yield "method", cls


def refused(table: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(table)
    said = str(caught.value)
    assert len(said) < 1000
    return said


def with_value(section: str, key: str, value: Any, table: dict[str, Any]) -> dict[str, Any]:
    return table | {section: {**table.get(section, {}), key: value}}


def test_no_number_that_makes_no_sense_is_taken() -> None:
    tried = set()
    for section, cls in sections():
        for key, kind in get_type_hints(cls).items():
            kinds = {kind, *get_args(kind)}
            if not {int, float} & kinds or (known := (key, cls.__dict__.get(key))) in tried:
                continue
            tried.add(known)
            wrong = [*NONSENSE, *([1.0] if int in kinds else [])]
            wrong += [10**12] if int in kinds and key not in ("seed", "eval_tokens") else []
            for value in wrong:
                with pytest.raises(ConfigError, match=rf"^{section}\.{key}: .{{,900}}$"):
                    toml.parse(cls, {key: value}, f"{section}.")
    assert len(tried) >= 50


@pytest.mark.parametrize(
    "section, key, value, message",
    [
        ("optim", "eps", 0, "optim.eps: must be a finite number > 0 (got 0.0)"),
        ("optim", "eps", 1e-300, "optim.eps: must be >= 1e-37, or fp32 rounds it to 0 and weights"),
        ("optim", "beta2", 0.9999999999, "optim.beta2: must be <= 0.9999999, or fp32 rounds it"),
        ("train", "micro_batch", 0, "train.micro_batch: must be >= 1 (got 0)"),
        (
            "train",
            "seed",
            2**63,
            "train.seed: must be a number of 64 bits (got 9223372036854775808",
        ),
        pytest.param(
            "train",
            "steps",
            HUGE,
            "train.steps: must be a number of 64 bits (got a number of 20001",
            id="huge",
        ),
        ("model", "kv_heads", 0, "model.kv_heads: must be >= 1 (got 0)"),
        ("model", "layers", 10**6, "model.layers: must be <= 10000 (got 1000000)"),
        ("data", "path", "a\0b", r"data.path: must be a path (got 'a\x00b')"),
        ("data", "path", "", "data.path: must be a path (got '')"),
        ("data", "path", "x" * 300, "data.path: 'xxx"),
        ("data", "path", "x/" * 3000, "data.path: 'x/x"),
        ("data", "path", "~nobody-has-this-name/x", "data.path: '~nobody-has-this-name/x': "),
    ],
)
def test_the_key_the_value_and_what_is_right_are_named(
    section: str, key: str, value: object, message: str
) -> None:
    said = refused(with_value(section, key, value, {"method": {"name": "full"}}))
    assert said.startswith(message)


@pytest.mark.parametrize(
    "key, value, needed",
    [("train.sample_prompts", "x", "train.sample_every"), ("eval.tasks_data", "x", "eval.tasks"),
     ("tune.rows", 5, "tune.task"), ("tune.tasks_data", "x", "tune.task")],
)  # fmt: skip
def test_a_setting_without_an_effect_is_refused_for_a_new_run(
    key: str, value: object, needed: str
) -> None:
    """One that is unset by default. A run that has it already is read."""
    section, name = key.split(".")
    config = parse(with_value(section, name, value, {"method": {"name": "full"}}))
    with pytest.raises(
        ConfigError, match=rf"^{key}: must be unset without {needed} \(got '?{value}"
    ):
        resolved(config, world_size=1, on_gpu=False)


IDLE = [
    ("schedule.decay", 7, "schedule.kind", "wsd"),
    ("schedule.decay_shape", "linear", "schedule.kind", "wsd"),
    ("schedule.restart_warmup", 3, "schedule.restart_every", 9),
    ("method.reset_fraction", 0.5, "method.reset", "random"),
    ("method.warm_start_lr", 0.5, "method.warm_start_steps", 20),
    ("method.warm_start_warmup", 3, "method.warm_start_steps", 20),
    ("method.warm_start_then", "fresh", "method.warm_start_steps", 20),
    ("train.observe_budget", 0.5, "train.observe", "dynamics"),
    ("eval.items", 3, "eval.tasks", "blimp"),
    ("tune.epochs", 5, "tune.task", "cola"),
]


def warnings_of(given: RunConfig[Any], caplog: pytest.LogCaptureFixture) -> list[str]:
    made = resolved(given, world_size=1, on_gpu=False)
    caplog.clear()
    warn_of_idle(given, made)
    return [record.message for record in caplog.records]


@pytest.mark.parametrize("key, value, other, used", IDLE)
def test_a_setting_with_a_default_that_has_no_effect_is_named(
    key: str, value: object, other: str, used: object, caplog: pytest.LogCaptureFixture
) -> None:
    """And not where it has one, and not as a default of the configuration that a run keeps."""
    base: dict[str, Any] = {"method": {"name": "relora", "warm_start_steps": 0}}
    given = parse(with_value(*key.split("."), value, base))
    (said,) = warnings_of(given, caplog)
    assert said.startswith(f"{key}: {value} has no effect, since {other} is ")
    assert f"set {other}" in said
    assert not warnings_of(resolved(parse(base), world_size=1, on_gpu=False), caplog)
    tables = with_value(*other.split("."), used, with_value(*key.split("."), value, base))
    if other in ("eval.tasks", "tune.task"):  # which need data
        tables = with_value(other.split(".")[0], "tasks_data", "x", tables)
    assert not warnings_of(parse(tables), caplog)


@dataclass(frozen=True, kw_only=True)
class Resetting(Full):
    """A method of another package with a setting that ours have too, and not what that one needs
    there."""

    name: ClassVar[str] = "resetting"
    reset_fraction: float = 0.5


def test_a_setting_of_another_method_is_not_taken_for_one_of_ours(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert not warnings_of(RunConfig(method=Resetting(reset_fraction=0.1)), caplog)


def test_a_checkpoint_to_keep_after_the_end_of_a_run_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    given = parse({"method": {"name": "full"}, "train": {"steps": 9, "keep_at": "9,10"}})
    said = ["train.keep_at: step 10 is after the end of the run at 9"]
    assert warnings_of(given, caplog) == said


@pytest.mark.parametrize("name", recipes.names())
def test_no_setting_of_a_recipe_is_without_an_effect(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    tasks = recipes.about(name).results.by_task()
    for task in tasks or [""]:
        assert not warnings_of(recipes.load(name, task), caplog)


def test_every_path_of_a_file_may_begin_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for section, key in (("data", "path"), ("model", "config")):
        config = parse(with_value(section, key, "~/x", {"method": {"name": "full"}}))
        assert getattr(getattr(config, section), key) == tmp_path / "x"
    for key in ("run", "init_from", "match_trainable"):
        assert getattr(parse({"method": {"name": "full"}, key: "~/x"}), key) == tmp_path / "x"
    (tmp_path / "grid").write_text('base.data.path = "~/x"\n[[grid]]\nmethod.name = "full"\n')
    assert load_grid(tmp_path / "grid").runs[0].config.data.path == (tmp_path / "x").resolve()


@pytest.mark.parametrize(
    "text, message",
    [
        (b"x = " + b"[" * 10_000, "nested too deeply"),
        (b"x = " + b"[" * 100 + b"]" * 100, "nested too deeply"),
        (b"x = " + b"{a=" * 10_000, "nested too deeply"),
        (b"train." + b"a." * 100_000 + b"a = 1", "nested too deeply"),
        (b"train.steps = " + b"9" * 10_000, "not TOML: Exceeds the limit"),
        (b"\xff = 1", "not TOML: 'utf-8' codec can't decode byte 0xff"),
        (b"[train\n", "not TOML: "),
        (b"#" * (1 << 21), "not TOML: larger than 1 MiB"),
        (b"\0", "not TOML: "),
    ],
    ids=range(9),
)
def test_a_file_that_can_not_be_read_is_named(text: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_bytes(text)
    for read, named in ((load, f"--config {file}: "), (load_grid, f"{file}: ")):
        with pytest.raises(ConfigError) as caught:
            read(file)
        assert str(caught.value).startswith(named) and message in str(caught.value)


def test_a_directory_or_a_pipe_is_not_a_configuration(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, why in (("fifo", "not a regular file"), ("", "Is a directory"), ("x", "No such")):
        with pytest.raises(ConfigError, match=why):
            load(tmp_path / name)


def test_a_path_that_toml_can_not_express_is_refused_before_anything_is_written() -> None:
    config = tiny("full", Path(os.fsdecode(b"/x\xff")))
    with pytest.raises(ConfigError, match=r"data\.path: '/x\\udcff' is not UTF-8"):
        dump(config)


def test_the_largest_batch_is_divided_in_no_time() -> None:
    config = RunConfig(method=Full(), train=TrainConfig(batch_size=(1 << 24) - 3))
    assert resolved(config, world_size=1, on_gpu=False).train.micro_batch == 1
    assert toml.DEEPEST > 4


def test_a_run_directory_that_libraries_can_not_write_to_is_refused() -> None:
    config = tiny("full", Path("data"), Path(os.fsdecode(b"x\xff")))
    with pytest.raises(ConfigError, match=r"^run: must be UTF-8, which .* \(got 'x\\udcff'\)"):
        resolved(config, world_size=1, on_gpu=False)
