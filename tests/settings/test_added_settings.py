"""A setting that is newer than a run counts, for that run, as what was done before it existed."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import pytest
from support import Killed, kill_at, tiny
from torch import nn
from torch.optim import Optimizer

from peptrain.comparison.grid import expand
from peptrain.config import RunConfig, dump, essence, load, resolved
from peptrain.errors import CheckpointError
from peptrain.methods import METHODS, Spectron
from peptrain.methods.base import Method, Metrics
from peptrain.methods.lowrank import LowRank
from peptrain.models.hf import ModelConfig
from peptrain.optim.adamw import OptimConfig
from peptrain.optim.schedule import ScheduleConfig
from peptrain.rng import Rng
from peptrain.sections import TrainConfig
from peptrain.settings import toml
from peptrain.settings.fields import added, before, interval
from peptrain.testing import differences, losses, newest
from peptrain.training.loop import resume, train

LORA = """rank alpha dropout train_scale warm_start_steps warm_start_lr warm_start_warmup
warm_start_then restart_warmup"""
RESETS = "merge_every reset reset_fraction"
OF_0_1_0 = {
    ModelConfig: """preset config family vocab_size hidden_size intermediate_size layers heads
    kv_heads tied""",
    OptimConfig: "lr beta1 beta2 eps weight_decay clip",
    ScheduleConfig: "kind warmup decay decay_shape floor restart_every restart_warmup",
    TrainConfig: """steps batch_size micro_batch seq_len seed precision compile
    checkpoint_activations kernels cuda_graph memory_budget device log_every eval_every eval_tokens
    checkpoint_every keep""",
    **{
        METHODS[name]: f"targets include exclude train_rest {own}" if name != "full" else ""
        for name, own in {
            "full": "",
            "bpt": f"rank {RESETS} init restart_warmup",
            "lora": LORA,
            "relora": f"{LORA} {RESETS} reset_every reset_factors pico_compat start merge_scaled",
            "lowrank": "rank",
            "loro": """rank exact_every refresh_every refresh restart_warmup scale direction
            retraction update precond_eps reference_schedule""",
            "dora": LORA,
            "vera": "rank",
            "hyperadapt": "",
            "galore": "rank gap scale moments",
            "sltrain": "rank alpha density",
        }.items()
    },
}
"""The fields of the first release: never added to."""


@pytest.mark.parametrize("section", OF_0_1_0, ids=lambda section: section.__name__)
def test_a_setting_says_what_was_done_before_it_existed(section: Any) -> None:
    """Or every run that is older is refused, or resumes as another run."""
    known = OF_0_1_0[section].split()
    new = [f for f in fields(section) if f.name not in known]
    assert [f.name for f in new if "before" not in f.metadata] == [], "write added(..., before=...)"
    assert {f.name for f in fields(section)} >= set(known), "a setting of 0.1.0 is gone"


@dataclass(frozen=True, kw_only=True)
class Aged(LowRank):
    """A method as its first version was."""

    name: ClassVar[str] = "aged"


@dataclass(frozen=True, kw_only=True)
class Renewed(LowRank):
    """The same with settings added: an interval, unset, and a number whose default is new."""

    name: ClassVar[str] = "aged"

    halve_every: int | None = added(interval(0.25), before=0)
    """Steps between halvings of the factors. Unset: a quarter of the run."""
    gain: float = added(0.5, before=1.0)
    """Of a halving."""

    def after_step(self, model: nn.Module, optimizer: Optimizer, step: int, rng: Rng) -> Metrics:
        if self.halve_every and step % self.halve_every == 0:
            for p in model.parameters():
                p.data *= self.gain
        return {}


KEPT = {"checkpoint_every": 1, "keep": 99}


@pytest.fixture
def old(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a whole run of the first version, and one that was stopped at step 3; then the
    second version is installed."""
    monkeypatch.setitem(METHODS, "aged", Aged)
    train(tiny(Aged(rank=2), corpus, tmp_path / "whole", train=KEPT))
    with pytest.raises(Killed):
        train(tiny(Aged(rank=2), corpus, tmp_path / "begun", train=KEPT), kill_at("checkpoint", 3))
    monkeypatch.setitem(METHODS, "aged", Renewed)
    return tmp_path


def test_an_older_run_resumes_as_it_was(old: Path) -> None:
    resume(old / "begun")
    assert differences(newest(old / "whole"), newest(old / "begun")) == []
    assert losses(old / "whole") == losses(old / "begun")


def test_the_configuration_of_an_older_run_replays_it(old: Path, tmp_path: Path) -> None:
    config = load(old / "whole" / "config.toml")
    assert isinstance(config.method, Renewed)
    assert (config.method.halve_every, config.method.gain) == (0, 1.0)
    copied = tmp_path / "mine.toml"
    copied.write_text((old / "whole" / "config.toml").read_text())
    method = load(copied).method
    assert isinstance(method, Renewed) and (method.halve_every, method.gain) == (None, 0.5)


def test_a_new_run_has_the_new_defaults_and_another_value_is_refused_by_name(
    old: Path, corpus: Path
) -> None:
    train(tiny(Renewed(rank=2), corpus, old / "new"))
    method = load(old / "new" / "config.toml").method
    assert isinstance(method, Renewed) and (method.halve_every, method.gain) == (2, 0.5)
    assert losses(old / "new") != losses(old / "whole")
    text = (old / "begun" / "config.toml").read_text()
    changed = text.replace("rank = 2\n", "rank = 2\ngain = 0.25\n")
    (old / "begun" / "config.toml").write_text(changed)
    with pytest.raises(CheckpointError, match=r"method\.gain: .* written with 1\.0, .* has 0\.25"):
        resume(old / "begun")


def digests(method: str, gain: float | None = None) -> str:
    settings = {} if gain is None else {"gain": gain, "halve_every": 0}
    table = {"grid": [{"method": {"name": method, "rank": 2, **settings}, "train.steps": 4}]}
    (run,) = expand(table).runs
    return run.digest


def test_a_grid_finds_the_runs_of_an_older_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the digest in their names, which leaves out what is as it ever was."""
    monkeypatch.setitem(METHODS, "aged", Aged)
    older = digests("aged")
    monkeypatch.setitem(METHODS, "aged", Renewed)
    assert digests("aged", 1.0) == older
    assert digests("aged") != older


def test_essence_is_the_dump_without_what_was_added() -> None:
    new_ones = ("eval", "tune")  # sections
    for cls in METHODS.values():
        config: RunConfig[Method] = resolved(RunConfig(method=cls()), world_size=1, on_gpu=False)
        kept, section = [], ""
        for line in dump(config).splitlines(keepends=True):
            section = line.strip("[]\n") if line.startswith("[") else section
            new = before(getattr(config, section)) if section else {}
            if cls is Spectron:
                new.pop("embedding_lr", None)  # it has a default there, which no older run has
            kept += [line] if line.split(" = ")[0] not in new and section not in new_ones else []
        assert essence(config) == "".join(kept).rstrip("\n") + "\n"


def test_a_value_that_toml_cannot_say_is_no_value_of_an_added_setting() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Section:
        """Its unset value would be read back as the past's."""

        often: int | None = added(None, before=3)

    with pytest.raises(AssertionError, match="often: None would be read as 3"):
        toml.dump(Section())
