"""Methods of other packages: small real packages, installed by pip, through every command."""

import json
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from support import rows, tiny, tiny_method
from torch import nn

from peptrain.adaptation import adapt
from peptrain.cli.app import main
from peptrain.display.training import TrainingProgress
from peptrain.errors import CheckpointError, ConfigError, Unsupported
from peptrain.exporting.export import export
from peptrain.exporting.factorised import load_factorised
from peptrain.methods import METHODS, methods
from peptrain.methods.base import Method
from peptrain.methods.rank import RankMethod
from peptrain.models.sites import ReparamLinear, Site
from peptrain.rng import Rng
from peptrain.testing import MODEL, TRAIN, check_method, small
from peptrain.training.loop import train

SOURCES = Path(__file__).with_name("outside")
NAMES = ("silu", "signed", "scaledgd")
ENTRY_POINTS = """[peptrain.methods]
silu = outside_methods:Silu
signed = outside_methods:Signed
scaledgd = outside_methods:ScaledGD
outer-name = outside_misfits:Misnamed
bpt = outside_misfits:Impostor
text = outside_misfits:NO_METHOD
demanding = outside_misfits:Demanding
bare = outside_misfits:Bare
listed = outside_misfits:Listed
broken = outside_broken:Broken
old = outside_old:Old
"""


def wheel(folder: Path) -> Path:
    """The modules in tests/outside as a wheel, with the entry points above."""
    info, made = "outside-1.0.dist-info", folder / "outside-1.0-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as file:
        for source in sorted(SOURCES.glob("*.py")):
            file.write(source, source.name)
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        file.writestr(f"{info}/WHEEL", tags)
        file.writestr(f"{info}/entry_points.txt", ENTRY_POINTS)
        file.writestr(f"{info}/RECORD", "")
    return made


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory into which pip installed the package."""
    folder = tmp_path_factory.mktemp("outside")
    site = folder / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", str(site), str(wheel(folder))], check=True, timeout=900)
    return site


@pytest.fixture
def outside(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process and those that it starts find the package."""
    monkeypatch.syspath_prepend(str(installed))
    monkeypatch.setenv("PYTHONPATH", ":".join([str(installed), *map(str, sys.path)]))


def flags(name: str, corpus: Path, run: Path) -> list[str]:
    """Of a small run in float64."""
    values: dict[str, Any] = {f"model.{k}": v for k, v in MODEL.items()}
    values |= {f"train.{k}": v for k, v in TRAIN.items()}
    values |= {"train.precision": "fp64", "data.path": corpus}
    values |= {} if name == "signed" else {"method.rank": 2}
    given = [f"--{k.replace('_', '-')}={v}" for k, v in values.items()]
    return [name, *given, f"--run={run}"]


def test_a_bad_package_is_named_and_takes_nothing_along(outside: None) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "peptrain", "methods"], capture_output=True, text=True, timeout=900
    )
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 0
    assert "Traceback" not in said
    for name in (*NAMES, *METHODS):
        assert f" {name} " in said
    assert "'broken' (outside_broken:Broken of package outside) is skipped: cannot be" in said
    assert "ImportError: its own library is missing" in said
    assert "its class has the name 'inner-name' and its entry point 'outer-name'" in said
    assert "already has a method 'bpt'" in said
    assert "'text' (outside_misfits:NO_METHOD of package outside) is skipped: not a" in said
    assert "Old.enter: this hook is now called on_phase_start; rename it" in said
    assert (
        "'demanding' (outside_misfits:Demanding of package outside) is skipped: cannot be" in said
    )
    assert "'listed' (outside_misfits:Listed of package outside) is skipped: its field" in said
    assert "'bare' (outside_misfits:Bare of package outside) is skipped: not a dataclass" in said


def test_what_can_be_used_is_offered_and_ours_stay_ours(outside: None) -> None:
    found = methods()
    assert list(found) == [*METHODS, *sorted(NAMES)]
    assert found["bpt"] is METHODS["bpt"]


@pytest.mark.parametrize("name", NAMES)
def test_it_keeps_the_laws(name: str, outside: None) -> None:
    check_method(methods()[name])
    assert name not in METHODS


@pytest.mark.parametrize("name", NAMES)
def test_it_goes_through_every_command(
    name: str, outside: None, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, form = tmp_path / "run", "factorised" if name == "silu" else "dense"
    assert main(["train", *flags(name, corpus, run)]) == 0
    assert main(["resume", str(run)]) == 0
    assert main(["eval", str(run)]) == 0
    assert main(["estimate", *flags(name, corpus, tmp_path / "none")]) == 0
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--form", form]) == 0
    said = " ".join(capsys.readouterr().out.split())
    warned = "silu has no dense equivalent: eval runs the model itself, and `peptrain export` needs"
    assert (warned in said) == (name == "silu")
    (end,) = rows(run, "end")
    measured = json.loads((run / "eval.json").read_text())[-1]["loss"]
    assert measured == pytest.approx(end["held_out_loss"], rel=1e-6)


@pytest.mark.slow
def test_a_table_of_them(
    outside: None, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = tmp_path / "grid.toml"
    given = {"model": MODEL, "train": TRAIN}
    lines = [f"{s}.{k} = {v}" for s, section in given.items() for k, v in section.items()]
    lines.append(f'data.path = "{corpus}"')
    blocks = [f'[[grid]]\nmethod.name = "{name}"' for name in NAMES]
    grid.write_text("\n".join(["[base]", *lines, *blocks]))
    assert main(["compare", str(grid), "--out", str(tmp_path / "out"), "--workers", "2"]) == 0
    table = (tmp_path / "out" / "table.md").read_text()
    for name in NAMES:
        assert f"| {name} | " in table


def test_a_map_that_is_not_linear_is_exported_with_its_activation(
    outside: None, corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(tiny(small(methods()["silu"]), corpus, run))
    with pytest.raises(Unsupported, match=r"--form dense: silu .*; use --form factorised"):
        export(run, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
    export(run, tmp_path / "own", "factorised")
    model = load_factorised(tmp_path / "own")
    assert sum(isinstance(m, nn.Sequential) for m in model.modules()) == 14


def test_weights_without_a_dense_form_start_nothing(
    outside: None, corpus: Path, tmp_path: Path
) -> None:
    run, silu = tmp_path / "run", methods()["silu"]
    train(tiny(small(silu), corpus, run))
    config = tiny("full", corpus, tmp_path / "next")
    object.__setattr__(config, "init_from", run)
    with pytest.raises(ConfigError, match="was trained by silu, whose layers have no dense"):
        train(config)
    assert not (tmp_path / "next").exists()
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    training = adapt(model, small(silu), steps=3)
    model(torch.ones(2, 16)).sum().backward()
    assert training.step()["grad_norm"] > 0
    with pytest.raises(Unsupported, match="SiluLinear has no effective_weight"):
        training.dense()


class Bare(ReparamLinear):
    """A layer whose author forgot the effective weight."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.weight = site.linear.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.mT.relu()


@dataclass(frozen=True, kw_only=True)
class Forgetful(RankMethod):
    """Neither an effective weight nor the word that there is none."""

    name: ClassVar[str] = "forgetful"
    equation: ClassVar[str] = "?"
    warm: int = 0

    def layer(self, site: Site, rng: Rng) -> ReparamLinear:
        return Bare(site)

    def phases(self, steps: int) -> tuple[int, ...]:
        return (self.warm,) if self.warm else ()


@dataclass(frozen=True, kw_only=True)
class Declared(Forgetful):
    """With the word."""

    name: ClassVar[str] = "declared"
    has_dense_equivalent: ClassVar[bool] = False


def test_a_layer_without_an_effective_weight_is_refused_before_training(
    corpus: Path, tmp_path: Path
) -> None:
    refused = r"forgetful: Bare has no effective_weight\(\).*has_dense_equivalent = False in Forget"
    with pytest.raises(Unsupported, match=refused):
        train(tiny(Forgetful(rank=1), corpus, tmp_path / "run"))
    with pytest.raises(Unsupported, match="phase 1 could not start from the weights of phase 0"):
        train(tiny(Declared(rank=1, warm=3), corpus, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    assert train(tiny(Declared(rank=1), corpus, tmp_path / "run")).held_out.loss > 0


def test_the_learning_rate_of_each_named_group_is_kept_and_shown(
    outside: None, corpus: Path, tmp_path: Path
) -> None:
    from rich.console import Console

    console = Console(record=True, width=200)
    config = tiny(small(methods()["signed"]), corpus, tmp_path / "run", optim={"lr": 0.02})
    train(config, TrainingProgress(console))
    for row in rows(tmp_path / "run"):
        assert (row["lr"], row["lr_matrices"]) == (0.02, 0.005)
    assert "lr 2.0e-02 (matrices 5.0e-03)" in console.export_text()
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    training = adapt(model, small(methods()["signed"]), steps=2)
    before = model[0].weight.detach().clone()
    model(torch.ones(1, 4)).square().sum().backward()
    numbers = training.step()
    assert numbers["lr_matrices"] == numbers["lr"] / 4 or numbers["lr"] == 0
    assert set((model[0].weight - before).abs().unique().tolist()) != {0.0} or numbers["lr"] == 0


def test_hooks_of_older_versions_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"Late\.accelerate: this hook is now called fuse"):
        type("Late", (Method,), {"accelerate": lambda self, model: None})
    with pytest.raises(TypeError, match=r"now takes \(model, sites, optim, phase\); add `sites`"):
        type("Late", (Method,), {"optimizer": lambda self, model, optim, phase: None})
    type("Fine", (Method,), {"enter": 0.5, "optimizer": lambda self, *given: None})


def test_a_method_that_breaks_laws_is_told_which() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Drifting(METHODS["bpt"]):  # type: ignore[misc,valid-type]
        """A merge that is not the identity, and touches what is frozen."""

        name: ClassVar[str] = "drifting"

        def after_step(self, model: Any, optimizer: Any, step: int, rng: Rng) -> Any:
            for p in model.parameters():
                p.data += 1e-3
            return super().after_step(model, optimizer, step, rng)

    with pytest.raises(AssertionError, match=r"Drifting breaks 2 laws") as error:
        check_method(Drifting)
    assert "- a merge keeps the function and a second one does nothing: " in str(error.value)
    assert "- what is frozen stays the same between merges: " in str(error.value)
    assert "drifting" not in METHODS
    with pytest.raises(AssertionError, match="'bpt' is the name of another method"):
        check_method(type("Mine", (METHODS["full"],), {"name": "bpt", "__doc__": "x"}))


def test_the_sites_are_what_may_be_adapted_whether_or_not_it_was(corpus: Path) -> None:
    seen: list[Sequence[Site]] = []

    @dataclass(frozen=True, kw_only=True)
    class Looking(METHODS["lowrank"]):  # type: ignore[misc,valid-type]
        """It looks at the sites."""

        name: ClassVar[str] = "looking"

        def optimizer(self, model: Any, sites: Any, optim: Any, phase: int) -> Any:
            seen.append(sites)
            return super().optimizer(model, sites, optim, phase)

    check_method(Looking, include="", exclude="k_proj")
    for sites in seen:
        left = [s.name for s in sites if isinstance(s.module, nn.Linear)]
        assert len(sites) == 14
        assert all(name.endswith("k_proj") for name in left) and len(left) == 2
        assert all(len(s.shape) == 2 for s in sites)
    assert tiny_method("full") == METHODS["full"]()


@dataclass(frozen=True, kw_only=True)
class Telling(Method):
    """It returns numbers by a name of one's choice."""

    name: ClassVar[str] = "telling"
    equation: ClassVar[str] = "W"
    key: str = "condition"

    def after_step(self, model: Any, optimizer: Any, step: int, rng: Rng) -> Any:
        if self.key == "none":
            return None
        return {self.key: float("inf") if step < 3 else 2.0}


def test_a_methods_numbers_are_kept_whatever_they_are(corpus: Path, tmp_path: Path) -> None:
    train(tiny(Telling(), corpus, tmp_path / "run"))
    assert [row.get("condition", 0) for row in rows(tmp_path / "run")][:4] == [None, None, 2.0, 2.0]
    with pytest.raises(Unsupported, match="after_step: 'loss' is the name of a built-in metric"):
        train(tiny(Telling(key="loss"), corpus, tmp_path / "other"))
    with pytest.raises(Unsupported, match=r"after_step: returned None; return the method"):
        train(tiny(Telling(key="none"), corpus, tmp_path / "another"))


class CountingSteps(torch.optim.SGD):
    """It counts in plain numbers, as most optimizers that are written by hand do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in (p for g in self.param_groups for p in g["params"] if p.grad is not None):
            state = self.state[p]
            state["count"] = state.get("count", 0) + 1
            state["size"] = 0.5 * state.get("size", 1.0)
            p -= 1e-2 * state["size"] / state["count"] * p.grad


@dataclass(frozen=True, kw_only=True)
class Counting(Method):
    """Full training by such an optimizer."""

    name: ClassVar[str] = "counting"
    equation: ClassVar[str] = "W"
    odd: bool = False

    def optimizer(self, model: Any, sites: Any, optim: Any, phase: int) -> Any:
        made = CountingSteps(model.parameters(), lr=1e-3)
        if self.odd:
            made.state[next(model.parameters())]["what"] = "a word"
        return made


def test_numbers_in_an_optimizers_state_are_kept(corpus: Path, tmp_path: Path) -> None:
    check_method(Counting)
    with pytest.raises(CheckpointError, match="/what: optimizer state contains a str; use tensors"):
        train(tiny(Counting(odd=True), corpus, tmp_path / "run"))


@dataclass(frozen=True, kw_only=True)
class Dropping(METHODS["lora"]):  # type: ignore[misc,valid-type]
    """LoRA with dropout."""

    name: ClassVar[str] = "dropping"
    dropout: float = 0.1


def test_dropout_breaks_no_law() -> None:
    check_method(Dropping)
