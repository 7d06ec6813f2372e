"""trackio and Weights & Biases, by stand-ins for their packages: no row twice, nothing online."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support import Killed, kill_at, rows, tiny

import peptrain.loggers
from peptrain.errors import Diverged
from peptrain.loggers.sending import sending
from peptrain.training.loop import resume, train

EVERY = {"checkpoint_every": 2, "eval_every": 2, "keep": 9}
NAMES = ("trackio", "wandb")
either = pytest.mark.parametrize("name", NAMES)


@dataclass
class Service:
    """What a stand-in was called with."""

    inits: list[dict[str, Any]] = field(default_factory=list)
    logged: list[tuple[str, int, Mapping[str, float]]] = field(default_factory=list)
    ends: list[dict[str, Any]] = field(default_factory=list)

    def init(self, **given: Any) -> "Handle":
        self.inits.append(given)
        return Handle(self, given.get("id") or given["name"])

    def series(self, run: str, key: str) -> list[tuple[int, float]]:
        return [
            (step, values[key]) for of, step, values in self.logged if of == run and key in values
        ]


@dataclass
class Handle:
    service: Service
    run: str

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.service.logged.append((self.run, step, values))

    def finish(self, **given: Any) -> None:
        self.service.ends.append(given)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    """In the place of both packages."""
    for variable in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_NAME", "TRACKIO_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    made = Service()
    for name in NAMES:
        module = ModuleType(name)
        module.__dict__.update(init=made.init, Settings=dict)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(peptrain.loggers, "find_spec", lambda name: name)
    return made


@either
def test_a_killed_and_resumed_run_is_one_series(
    name: str, service: Service, corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Killed):
        train(tiny("loro", corpus, run, train=EVERY | {"log_to": name}), kill_at("step", 6))
    with pytest.raises(Killed):  # at 4 again, so that less is written than the service has
        resume(run, kill_at("step", 5))
    result = resume(run)
    resume(run)
    (which,) = {one.get("id") or one["name"] for one in service.inits}
    assert len(service.inits) == 3 and service.inits[0]["config"]["train"]["log_to"] == name
    for key, event in (("loss", "step"), ("grad_norm", "step")):
        written = [(row["step"], row[key]) for row in rows(run, event)]
        assert service.series(which, f"train/{key}") == written
    steps = [step for step, _ in service.series(which, "eval/held_out_loss")]
    assert steps == [2, 4, 6, 8]
    assert service.series(which, "eval/held_out_loss")[-1] == (8, result.held_out.loss)


def test_a_run_made_longer_from_an_earlier_step_is_another_series(
    service: Service, corpus: Path, tmp_path: Path
) -> None:
    run, wsd = tmp_path / "run", {"kind": "wsd", "decay": 4}
    train(tiny("full", corpus, run, train=EVERY | {"log_to": "wandb"}, schedule=wsd))
    resume(run, steps=12)
    first, second = (one["id"] for one in service.inits)
    assert first != second
    assert [step for step, _ in service.series(second, "train/loss")] == list(range(5, 13))


@pytest.mark.parametrize(
    "content",
    ["", "null", "[]", "{}", '{"id": 5, "steps": 8, "sent": {}}', "[" * 100_000,
     '{"id": "01234567", "steps": 8, "sent": [1]}', '{"id": "01234567", "steps": [], "sent": {}}',
     '{"id": "../../up", "steps": 8, "sent": {}}',
     '{"id": "01234567", "steps": 8, "sent": {"a": "b"}}',
     '{"id": "01234567", "steps": 8, "sent": {"step": 3}, "crc32": "0"}'],
)  # fmt: skip
@either
def test_a_damaged_series_is_named_and_nothing_is_sent(
    name: str, content: str, service: Service, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / f"{name}.json"
    file.write_text(content)
    with sending(peptrain.loggers.chosen(name), tmp_path, {"train": {"steps": 8}}, 0) as send:
        send({"event": "step", "step": 1, "loss": 1.0})
    (said,) = caplog.messages
    assert said.startswith(f"train.log_to: {name} is off and the run continues without it: {file}:")
    assert said.endswith("; delete it to begin a new series") and file.read_text() == content
    assert not service.logged and not service.inits


def test_a_series_of_before_checksums_continues(service: Service, tmp_path: Path) -> None:
    kept = {"id": "01234567", "steps": 8, "sent": {"step": 3}}
    (tmp_path / "wandb.json").write_text(json.dumps(kept))
    for step in (2, 4):
        with sending(peptrain.loggers.chosen("wandb"), tmp_path, {"train": {"steps": 8}}, 2) as to:
            to({"event": "step", "step": step, "loss": 1.0})
    assert [one["id"] for one in service.inits] == ["01234567"] * 2
    assert [step for _, step, _ in service.logged] == [4]


def test_wandb_is_offline_unless_the_environment_says_otherwise(
    service: Service, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"steps": 1, "log_to": "wandb"}
    for mode in ("offline", "online"):
        if mode == "online":
            monkeypatch.setenv("WANDB_MODE", mode)
        train(tiny("full", corpus, tmp_path / mode, train=short))
        given = service.inits[-1]
        assert (given["mode"], given["dir"], given["name"]) == (mode, str(tmp_path / mode), mode)
    assert service.ends == [{"exit_code": 0}] * 2


def test_a_diverged_run_has_failed_in_wandb(service: Service, corpus: Path, tmp_path: Path) -> None:
    settings = {"log_to": "wandb"}
    with pytest.raises(Diverged):
        train(tiny("full", corpus, tmp_path / "run", train=settings, optim={"lr": 1e30, "clip": 0}))
    assert service.ends == [{"exit_code": 1}]


def test_trackio_is_local(service: Service, corpus: Path, tmp_path: Path) -> None:
    train(tiny("full", corpus, tmp_path / "run", train={"steps": 1, "log_to": "trackio"}))
    (given,) = service.inits
    assert given["project"] == "peptrain" and given["name"].startswith("run-")
    assert not {"space_id", "server_url", "dataset_id"} & given.keys()
