"""A method in a loop of one's own: the same training as the trainer's, on any module."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import DENSE, tiny, tiny_method
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from peptrain.adaptation import Adapted, adapt
from peptrain.config import RunConfig, resolved
from peptrain.data import Corpus
from peptrain.errors import ConfigError
from peptrain.execution.loss import token_loss
from peptrain.methods import BPT, LORO, METHODS, LoRA, ReLoRA
from peptrain.methods.base import Method
from peptrain.models.sites import ReparamLinear, reparametrized
from peptrain.optim.adamw import OptimConfig
from peptrain.optim.schedule import ScheduleConfig
from peptrain.runs.build import plain_model
from peptrain.testing import STEPS, TRAIN, newest
from peptrain.training.loop import train

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
    training = adapt(
        model, given.method, steps=STEPS, optim=given.optim, schedule=given.schedule, fresh=True
    )
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
    whole = adapt(mlp(), tiny_method(name), steps=STEPS, schedule=CONSTANT, fresh=True)
    go(whole, at)
    saved = copy.deepcopy(whole.state_dict())
    rest = go(whole, STEPS - at)
    again = adapt(mlp(seed=5), tiny_method(name), steps=STEPS, schedule=CONSTANT, fresh=True)
    again.load_state_dict(saved)
    assert again.done == at and go(again, STEPS - at) == rest
    for key, p in whole.model.named_parameters():
        assert torch.equal(p, again.model.get_parameter(key)), key


@pytest.mark.parametrize("name", DENSE)
def test_dense_gives_plain_layers_and_the_same_function(name: str) -> None:
    training = adapt(mlp(), tiny_method(name), steps=STEPS, schedule=CONSTANT, fresh=True)
    go(training, STEPS - 1)
    x, _ = images(99)
    before = training.model(x)
    plain = training.dense()
    assert not any(isinstance(m, ReparamLinear) for m in plain.modules())
    assert {n for n, _ in plain.named_parameters()} == {n for n, _ in mlp().named_parameters()}
    torch.testing.assert_close(plain(x), before, rtol=0, atol=1e-12)


@every_method
def test_it_learns(name: str) -> None:
    # Spectron's lr bounds the spectral norm of a step, and is larger than AdamW's.
    optim = OptimConfig(lr=0.1 if name == "spectron" else 1e-2)
    training = adapt(mlp(), tiny_method(name), steps=200, optim=optim, fresh=True)
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
    """Its fast path reads linear1.weight, MultiheadAttention out_proj.weight, past any forward."""
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(nn.Linear(16, 16), encoder, nn.Linear(16, 16))
    adapt(model, LoRA(rank=2), steps=4)
    assert [layer.site for layer in reparametrized(model)] == ["0", "2"]


class Doubled(nn.Linear):
    """A subclass with another formula."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """A subclass that computes the same."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.T) + self.bias


def decoder(layer: nn.Linear) -> nn.Module:
    """A Hugging Face decoder in which a subclass has the place of a matrix."""
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=40,
                    num_attention_heads=2)
    )  # fmt: skip
    model.model.layers[0].mlp.up_proj = layer
    return model


@pytest.mark.parametrize("method", [BPT(rank=2), LORO(rank=2)])
@pytest.mark.parametrize("hugging_face", [True, False])
def test_only_layers_that_compute_a_linear_map_are_replaced(
    hugging_face: bool, method: Method, caplog: pytest.LogCaptureFixture
) -> None:
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
    for layer, fits in ((Doubled(16, 16), False), (Renamed(16, 16), True), (normed, False)):
        if hugging_face:
            model = decoder(layer)
        else:
            model = nn.Sequential(nn.Linear(16, 16), nn.Sequential(layer))
        with caplog.at_level("INFO", "peptrain"):
            adapt(model, method, steps=4)
        assert (layer not in set(model.modules())) is fits
        name = "model.layers.0.mlp.up_proj" if hugging_face else "1.0"
        assert (f"not x Wᵀ + bias: {name}" in caplog.text) is not fits
        caplog.clear()


class Tied(nn.Module):
    """An output head that shares the embedding's matrix, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(40, 16), nn.Linear(16, 40, bias=False)
        self.head.weight = self.table.weight
        self.once, self.twice = nn.Linear(16, 16), nn.Linear(16, 16)
        self.again = self.twice

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.again(self.twice(self.once(self.table(ids)))))


@pytest.mark.parametrize("method", [LoRA(rank=2), BPT(rank=2), LORO(rank=2)])
def test_shared_weights_are_left_alone(method: Method, caplog: pytest.LogCaptureFixture) -> None:
    model = Tied()
    with caplog.at_level("INFO", "peptrain"):
        training = adapt(model, method, steps=4)
    assert [layer.site for layer in reparametrized(model)] == ["once"]
    assert "shared: head, twice" in caplog.text
    training.dense()
    assert model.head.weight is model.table.weight and model.again is model.twice


def test_an_encoder_decoder_is_adapted_on_both_sides() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    shape = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=40, **shape))
    adapt(model, LoRA(rank=2), steps=4)
    sites = [layer.site for layer in reparametrized(model)]
    assert {site.partition(".")[0] for site in sites} == {"encoder", "decoder"}


def test_a_compiled_model_is_adapted_by_its_own_names(corpus: Path) -> None:
    config = resolved(tiny("lora", corpus), world_size=1, on_gpu=False)
    plain, compiled = plain_model(config), plain_model(config)
    adapt(plain, LoRA(rank=2), steps=4)
    adapt(torch.compile(compiled, backend="eager"), LoRA(rank=2), steps=4)
    sites = [[layer.site for layer in reparametrized(m)] for m in (plain, compiled)]
    assert sites[0] == sites[1] and len(sites[0]) == 14


def test_a_layer_without_a_parent_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"bare nn\.Linear .*nn\.Sequential"):
        adapt(nn.Linear(8, 8), LoRA(rank=2), steps=4)


def test_a_resumed_training_may_have_another_learning_rate_and_no_other_warm_start() -> None:
    def begun(lr: float, warm: int) -> Adapted:
        method = LoRA(rank=2, warm_start_steps=warm, restart_warmup=0)
        return adapt(mlp(), method, steps=8, optim=OptimConfig(lr=lr), schedule=CONSTANT)

    first = begun(1e-2, 2)
    go(first, 4)
    saved = copy.deepcopy(first.state_dict())
    other = begun(1e-3, 2)
    other.load_state_dict(saved)
    x, y = images(4)
    F.cross_entropy(other.model(x), y).backward()
    assert other.step()["lr"] == 1e-3
    with pytest.raises(ConfigError, match="same warm start"):
        begun(1e-2, 6).load_state_dict(saved)


def test_weights_that_were_trained_are_kept() -> None:
    x, _ = images(3)
    model = mlp()
    before = model(x)
    for name in set(DENSE) - {"lowrank", "loro", "spectron", "sltrain"}:
        kept = adapt(copy.deepcopy(model), tiny_method(name), steps=4)
        torch.testing.assert_close(kept.model(x), before, rtol=0, atol=1e-12)
    anew = adapt(copy.deepcopy(model), tiny_method("bpt"), steps=4, fresh=True)
    assert not torch.allclose(anew.model(x), before)
    W = model[2].weight.detach()
    low = adapt(copy.deepcopy(model), LORO(rank=3, include="2"), steps=4)
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


@pytest.mark.parametrize(
    "name, fresh",
    [(n, True) for n in METHODS]
    + [(n, False) for n, cls in METHODS.items() if not cls.from_scratch_only],
)
def test_torchs_default_device_may_be_another(name: str, fresh: bool) -> None:
    """With torch.set_default_device("cuda"), say: all is drawn on the CPU and goes to the model,
    at the start and at merges."""
    reset = {"reset": "random"} if hasattr(METHODS[name], "reset") else {}
    found = []
    for default in ("cpu", "meta"):
        model = mlp()
        with torch.device(default):
            training = adapt(model, tiny_method(name, **reset), steps=STEPS, fresh=fresh)
        for seed in range(STEPS):
            x, y = images(seed)
            F.cross_entropy(training.model(x), y).backward()
            with torch.device(default):
                training.step()
        found.append(training.model.state_dict())
    for key, value in found[0].items():
        assert torch.equal(value, found[1][key]), key


MULTIPLYING = [("loro", {"update": "precond"}), ("loro", {"retraction": "svd"})]
"""Whose steps multiply matrices in fp32, beside the methods as they are."""


@pytest.mark.parametrize("name, own", [*((name, {}) for name in METHODS), *MULTIPLYING])
def test_a_step_within_autocast_is_one_without(name: str, own: dict[str, Any]) -> None:
    """Projections, merges and steps on the manifold multiply weights; in bf16 they would be rounded
    for good, or stop at factors of two dtypes."""
    found = []
    for within in (False, True):
        model, method = mlp().float(), tiny_method(name, **own)
        with torch.autocast("cpu", torch.bfloat16, enabled=within):
            training = adapt(model, method, steps=STEPS, fresh=method.from_scratch_only)
        for seed in range(STEPS):
            x, y = images(seed)
            F.cross_entropy(training.model(x.float()), y).backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=within):
                training.step()
        with torch.autocast("cpu", torch.bfloat16, enabled=within):
            trained = training.dense() if method.has_dense_equivalent else training.model
            found.append(trained.state_dict())
    for key, value in found[0].items():
        assert torch.equal(value, found[1][key]), key


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


def test_an_exact_step_at_the_end_of_a_loop_of_ones_own_is_reported() -> None:
    training = adapt(mlp(), tiny_method("loro"), steps=6, schedule=CONSTANT)
    seen = []
    for _ in range(6):
        x, y = images(0)
        F.cross_entropy(training.model(x), y).backward()
        seen.append(training.step())
    assert {n: row["exact_steps"] for n, row in enumerate(seen, 1) if "exact_steps" in row} == {
        3: 1, 6: 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    "file, short",
    [
        pytest.param("plain_loop.py", ("60, 16, 128", "8, 2, 32"), marks=pytest.mark.slow),
        ("mlp.py", ("else 300", "else 4")),
    ],
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
