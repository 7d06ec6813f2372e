"""A method in a loop of one's own: the same training as the trainer's, on any module."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import STEPS, TRAIN, newest, tiny, tiny_method
from torch import Tensor, nn

from peptrain.adapt import Adapted, adapt
from peptrain.build import plain_model
from peptrain.config import RunConfig, resolved
from peptrain.data import Corpus
from peptrain.errors import ConfigError
from peptrain.methods import LORO, METHODS, LoRA, ReLoRA
from peptrain.methods.base import ReparamLinear, reparametrized
from peptrain.model import token_loss
from peptrain.schedule import ScheduleConfig
from peptrain.train import train

EXAMPLES = Path(__file__).parents[1] / "examples"
every_method = pytest.mark.parametrize("name", METHODS)
CONSTANT = ScheduleConfig(kind="constant", warmup=0)


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = (nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    return nn.Sequential(*layers).double()


def images(seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 12, generator=draw, dtype=torch.float64)
    return x, torch.randint(3, (8,), generator=draw)


def go(training: Adapted, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        x, y = images(training.done)
        loss = F.cross_entropy(training.model(x), y)
        loss.backward()
        training.step()
        losses.append(loss.item())
    return losses


@every_method
def test_a_loop_of_ones_own_is_the_trainers_training(
    name: str, corpus: Path, tmp_path: Path
) -> None:
    """Through a warm start, merges, exact steps, restarts and clipping."""
    shared: dict[str, Any] = {"schedule": {"kind": "cosine", "warmup": 2}, "optim": {"clip": 0.5}}
    given: RunConfig[Any] = tiny(name, corpus, tmp_path / "run", **shared)
    train(given)
    config = resolved(given, world_size=1, on_gpu=False)
    data, where = Corpus.open(corpus), {"seed": 0, "rank": 0, "world": 1}
    model = plain_model(config)
    training = adapt(model, given.method, steps=STEPS, optim=given.optim, schedule=given.schedule)
    for step in range(STEPS):
        shape = {"batch_size": TRAIN["batch_size"], "seq_len": TRAIN["seq_len"]}
        windows = data.batch(step=step, **where, **shape)
        token_loss(model(input_ids=windows[:, :-1]).logits, windows[:, 1:]).backward()
        training.step()
    for key, p in newest(tmp_path / "run").model.items():
        torch.testing.assert_close(model.get_parameter(key), p, rtol=0, atol=1e-12)


@every_method
@pytest.mark.parametrize("at", [1, 2, 4, 7])
def test_a_saved_state_goes_on_bit_for_bit(name: str, at: int) -> None:
    whole = adapt(mlp(), tiny_method(name), steps=STEPS, schedule=CONSTANT)
    go(whole, at)
    saved = copy.deepcopy(whole.state_dict())
    rest = go(whole, STEPS - at)
    again = adapt(mlp(seed=5), tiny_method(name), steps=STEPS, schedule=CONSTANT)
    again.load_state_dict(saved)
    assert again.done == at and go(again, STEPS - at) == rest
    for key, p in whole.model.named_parameters():
        assert torch.equal(p, again.model.get_parameter(key)), key


@every_method
def test_dense_gives_plain_layers_and_the_same_function(name: str) -> None:
    training = adapt(mlp(), tiny_method(name), steps=STEPS, schedule=CONSTANT)
    go(training, STEPS - 1)
    x, _ = images(99)
    before = training.model(x)
    plain = training.dense()
    assert not any(isinstance(m, ReparamLinear) for m in plain.modules())
    assert {n for n, _ in plain.named_parameters()} == {n for n, _ in mlp().named_parameters()}
    torch.testing.assert_close(plain(x), before, rtol=0, atol=1e-12)


@every_method
def test_it_learns(name: str) -> None:
    training = adapt(mlp(), tiny_method(name), steps=200)
    x, y = images(0)
    first = F.cross_entropy(training.model(x), y).item()
    for _ in range(200):
        F.cross_entropy(training.model(x), y).backward()
        training.step()
    assert F.cross_entropy(training.model(x), y).item() < 0.7 * first


def test_all_linear_layers_are_eligible_and_the_settings_choose() -> None:
    training = adapt(mlp(), LoRA(rank=2, exclude="4"), steps=4)
    assert [layer.site for layer in reparametrized(training.model)] == ["0", "2"]
    assert isinstance(training.method, LoRA) and training.method.restart_warmup == 0
    default = adapt(mlp(), LoRA(), steps=4).method
    assert isinstance(default, LoRA) and default.rank == 4, "a quarter of the most frequent side"


def test_linear_layers_that_others_read_are_left_alone() -> None:
    """MultiheadAttention takes out_proj.weight itself; a factor beside it would do nothing."""
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    adapt(model, LoRA(rank=2), steps=4)
    assert [layer.site for layer in reparametrized(model)] == ["linear1", "linear2"]


def test_weights_that_were_trained_are_kept() -> None:
    x, _ = images(3)
    model = mlp()
    before = model(x)
    for name in ("bpt", "lora", "relora", "full"):
        kept = adapt(copy.deepcopy(model), tiny_method(name), steps=4, trained=True)
        torch.testing.assert_close(kept.model(x), before, rtol=0, atol=1e-12)
    anew = adapt(copy.deepcopy(model), tiny_method("bpt"), steps=4)
    assert not torch.allclose(anew.model(x), before)
    W = model[2].weight.detach()
    low = adapt(copy.deepcopy(model), LORO(rank=3, include="2"), steps=4, trained=True)
    (layer,) = (m for m in reparametrized(low.model) if m.site == "2")
    sigma = torch.linalg.svdvals(W)
    error = torch.linalg.matrix_norm(W - layer.effective_weight())
    torch.testing.assert_close(error, sigma[3:].norm(), rtol=1e-10, atol=0)


def test_the_warm_start_rebuilds_in_place_and_keeps_what_stays() -> None:
    method = ReLoRA(rank=2, warm_start_steps=3, merge_every=2, restart_warmup=0, exclude="4")
    training = adapt(mlp(), method, steps=8, schedule=CONSTANT)
    head, first = training.model.get_submodule("4").weight, training.optimizer
    go(training, 3)
    assert training.optimizer is not first
    assert [layer.site for layer in reparametrized(training.model)] == ["0", "2"]
    assert training.model.get_submodule("4").weight is head
    assert training.optimizer.state[head]["step"].item() == 3


def test_more_steps_than_were_named_are_refused() -> None:
    training = adapt(mlp(), LoRA(rank=2), steps=2)
    go(training, 2)
    with pytest.raises(ConfigError, match="steps: all 2 are done"):
        training.step()


def test_the_numbers_of_a_step() -> None:
    training = adapt(mlp(), tiny_method("relora"), steps=STEPS, schedule=CONSTANT)
    seen = []
    for _ in range(STEPS):
        x, y = images(0)
        F.cross_entropy(training.model(x), y).backward()
        seen.append(training.step())
        assert all(p.grad is None for p in training.model.parameters())
    assert [step + 1 for step, row in enumerate(seen) if "merges" in row] == [3, 6]
    assert seen[0]["lr"] == 1e-3 and seen[2]["lr"] == 4e-3 and seen[0]["grad_norm"] > 0


@pytest.mark.parametrize(
    "file, short",
    [("plain_loop.py", ("60, 16, 128", "8, 2, 32")), ("mlp.py", ("else 300", "else 4"))],
)
def test_the_examples_run(
    file: str, short: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    source = (EXAMPLES / file).read_text()
    assert short[0] in source
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [file])
    exec(compile(source.replace(*short), file, "exec"), {"__name__": "__main__"})
    assert len(capsys.readouterr().out.splitlines()) > 2
