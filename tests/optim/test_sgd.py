"""SGD, an optimizer of full training alone: its steps, its defaults, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny, tiny_method
from torch import nn

from peptrain.cli.app import main
from peptrain.comparison.grid import expand, unstated
from peptrain.config import RunConfig, load, resolved
from peptrain.errors import CheckpointError, ConfigError
from peptrain.estimation.estimate import estimate
from peptrain.files import sha256sums
from peptrain.methods import METHODS
from peptrain.methods.full import Full
from peptrain.optim.adamw import OptimConfig, sgd, state_bytes
from peptrain.runs.checkpoint import STATE, SUMMED, SUMS, available
from peptrain.testing import MODEL, bench, newest
from peptrain.training.loop import resume, train

CORPUS = Path("unused")


def settled(name: str = "full", **optim: Any) -> OptimConfig:
    config: RunConfig[Any] = tiny(tiny_method(name), CORPUS, optim={"kind": "sgd", **optim})
    return resolved(config, world_size=1, on_gpu=False).optim


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum, decay", [(0.0, 0.0), (0.9, 0.0), (0.5, 0.1)])
def test_sgd_is_the_textbook_one(momentum: float, decay: float, dtype: torch.dtype) -> None:
    """b = momentum b + g + decay p, p -= lr b, in which only matrices decay."""
    model = nn.Linear(3, 4).to(dtype)
    optim = OptimConfig(kind="sgd", lr=0.1, momentum=momentum, weight_decay=decay)
    optimizer, draw = sgd(model, optim), torch.Generator().manual_seed(0)
    wanted = [p.detach().double() for p in model.parameters()]
    moved = [torch.zeros_like(p) for p in wanted]
    for _ in range(4):
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=draw).to(dtype)
            decayed = decay * wanted[i] if p.ndim == 2 else 0
            moved[i] = momentum * moved[i] + p.grad.double() + decayed
            wanted[i] = wanted[i] - 0.1 * moved[i]
        optimizer.step()
    tolerance = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    for p, value in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.double(), value, rtol=tolerance, atol=tolerance)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert state_bytes(optimizer) == (size if momentum else 0)


def test_what_is_unset_is_sgds_own_and_what_adam_has_stays_unset() -> None:
    found = settled()
    assert (found.lr, found.momentum, found.clip, found.weight_decay) == (0.1, 0.0, 1.0, 0.0)
    assert (found.beta1, found.beta2, found.eps) == (None, None, None)
    assert settled(lr=0.5, momentum=0.9) == settled(lr=0.5, momentum=0.9, clip=1.0)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "full"])
def test_another_method_refuses_sgd_by_name(name: str) -> None:
    with pytest.raises(ConfigError) as refused:
        settled(name)
    kinds = " or ".join(METHODS[name].optim_kinds)
    assert str(refused.value) == f"optim.kind: must be {kinds} for {name} (got 'sgd')"


@pytest.mark.parametrize(
    "given, said",
    [
        ({"kind": "sgd", "beta1": 0.9}, "optim.beta1: must be unset with optim.kind sgd (got 0.9)"),
        ({"kind": "sgd", "eps": 1e-8}, "optim.eps: must be unset with optim.kind sgd (got 1e-08)"),
        ({"momentum": 0.9}, "optim.momentum: must be unset with optim.kind adamw (got 0.9)"),
        ({"kind": "sgd", "momentum": 1.0}, "optim.momentum: must be in [0, 1) (got 1.0)"),
    ],
)
def test_a_setting_of_the_other_optimizer_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        settled(**({"kind": "adamw"} | given))
    assert str(refused.value) == said


def test_a_setting_of_the_method_is_named_where_it_was_meant() -> None:
    with pytest.raises(ConfigError) as refused:
        settled("spectron", kind="adamw", momentum=0.9)
    assert str(refused.value) == (
        "optim.momentum: must be unset with optim.kind adamw; that of spectron is method.momentum"
        " (got 0.9)"
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_estimate_has_the_optimizers_bytes(corpus: Path, momentum: float) -> None:
    optim = {"kind": "sgd", "momentum": momentum}
    (phase,) = estimate(tiny(Full(), corpus, optim=optim, train={"device": "cpu"})).phases
    found = bench(Full(), model={}, optim=optim)
    found.train()
    assert phase.state_bytes == state_bytes(found.optimizer)
    assert (phase.state_bytes > 0) == (momentum > 0)


def test_the_command_has_sgds_defaults_and_its_run_says_so(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    sizes = [f"--model.{k.replace('_', '-')}={v}" for k, v in MODEL.items()]
    shape = ["--train.steps=2", "--train.batch-size=2", "--train.seq-len=16", "--train.device=cpu"]
    command = ["train", "full", "--optim.kind", "sgd", f"--data.path={corpus}", f"--run={run}"]
    assert main([*command, *sizes, *shape]) == 0
    found = load(run / "config.toml").optim
    assert (found.kind, found.lr, found.momentum, found.beta1) == ("sgd", 0.1, 0.0, None)


def test_a_checkpoint_and_its_continuation_agree_in_the_optimizer(
    corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(tiny(Full(), corpus, run, optim={"kind": "sgd", "momentum": 0.5}))
    assert newest(run).identity["optim.kind"] == "sgd"
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("momentum = 0.5", "momentum = 0.25"))
    with pytest.raises(CheckpointError, match=r"optim\.momentum: .* written with 0\.5, .* 0\.25"):
        resume(run)


def test_a_checkpoint_that_names_no_optimizer_was_made_by_adamw(
    corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(tiny(Full(), corpus, run))
    for path in available(run / "checkpoints"):
        state = json.loads((path / STATE).read_text())
        for key in ("optim.kind", "optim.momentum"):
            state["identity"].pop(key, None)
        (path / STATE).write_text(json.dumps(state))
        (path / SUMS).write_text(sha256sums(path, SUMMED))
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace('kind = "adamw"\n', ""))
    resume(run)
    gone = [line for line in text.splitlines() if not line.startswith(("beta", "eps", "lr"))]
    (run / "config.toml").write_text("\n".join(gone).replace('"adamw"', '"sgd"'))
    said = r"optim\.kind: .* written with 'adamw', .* has 'sgd'"
    with pytest.raises(CheckpointError, match=said):
        resume(run)


def test_a_grid_of_both_says_nothing_of_settings_that_only_one_has() -> None:
    block = {"method.name": "full", "optim.kind": ["adamw", "sgd"], "train.steps": 4}
    notes = unstated(expand({"grid": [block]}).runs)
    assert not [note for note in notes if note.startswith("optim.")]
