"""MLPs of odd width, computed at an aligned one: nothing else may show it."""

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from byhand import made, snapshot, walk
from support import tiny, tiny_method
from torch import Tensor, nn

import peptrain.execution.prepare
from peptrain.estimation.dry_run import fake_tensors
from peptrain.execution.compile import checkpoint_activations
from peptrain.execution.loss import NextTokenLoss
from peptrain.execution.padding import _Padded, pad_mlps, widen_mlps
from peptrain.exporting.export import export
from peptrain.methods import METHODS
from peptrain.models.dense import dense_state
from peptrain.models.hf import count_parameters
from peptrain.models.sites import ReparamLinear, Site, reparametrized
from peptrain.rng import Rng
from peptrain.testing import EVENT, STEPS, differences, losses, newest
from peptrain.training.loop import resume, train

ODD = {"intermediate_size": 21}
every_method = pytest.mark.parametrize("name", METHODS)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    windows = torch.randint(320, (2, 9), generator=torch.Generator().manual_seed(3))
    NextTokenLoss(model)(windows).backward()  # type: ignore[arg-type]
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def both(name: str, **given: Any) -> tuple[Any, ...]:
    """The same method twice, the second padded: model and optimizer of each, and the method."""
    model = ODD | given.pop("model", {})
    plain, optimizer, config = made(tiny_method(name, **given), model=model)
    padded, other, _ = made(tiny_method(name, **given), model=model)
    assert pad_mlps(padded) == 2
    return plain, optimizer, padded, other, config.method


def assert_near(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for n, wanted in one.items():
        torch.testing.assert_close(other[n], wanted, rtol=0, atol=tolerance, msg=n)


@every_method
def test_outputs_gradients_and_steps_are_those_of_the_unpadded_model(name: str) -> None:
    plain, optimizer, padded, other, method = both(name)
    shapes = {n: t.shape for n, t in plain.state_dict().items()}
    for step in range(EVENT + 2):  # a merge, an exact step, a reset among them
        assert_near(gradients(plain), gradients(padded), 1e-13)
        for model, moves in ((plain, optimizer), (padded, other)):
            walk(model, moves, 1, step)
            method.after_step(model, moves, step + 1, Rng(0))
        assert_near(snapshot(plain), snapshot(padded), 1e-9)
    assert {n: t.shape for n, t in padded.state_dict().items()} == shapes
    if method.has_dense_equivalent:
        assert_near(dense_state(plain), dense_state(padded), 1e-9)
    assert count_parameters(padded) == count_parameters(plain)


@pytest.mark.parametrize("within", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("name", ["full", "lowrank", "loro"])
def test_widened_for_good_outputs_and_gradients_are_the_same(name: str, within: Any) -> None:
    """What is beyond f has no gradient, so it stays 0 even if somebody trains on."""
    plain, *_ = both(name)
    wide = copy.deepcopy(plain)
    with within():
        assert widen_mlps(wide) == 2 and widen_mlps(wide) == 0
    assert not any(isinstance(module, _Padded) for module in wide.modules())
    assert not any(21 in p.shape for p in wide.parameters())
    found = gradients(wide)
    for n, wanted in gradients(plain).items():
        inside = tuple(slice(side) for side in wanted.shape)
        torch.testing.assert_close(found[n][inside], wanted, rtol=0, atol=1e-13, msg=n)
        found[n][inside] = 0
        assert not found[n].any()
    for layer in reparametrized(wide):
        assert layer.effective_weight().shape == (layer.out_features, layer.in_features)


def test_a_model_is_widened_in_inference_mode() -> None:
    plain, *_ = both("loro")
    with torch.inference_mode():
        wide, ids = copy.deepcopy(plain), torch.arange(8)[None]
        assert widen_mlps(wide) == 2
        torch.testing.assert_close(wide(ids).logits, plain(ids).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["bpt", "sltrain", "vera"])
def test_what_is_more_than_its_sides_is_padded_but_not_widened(name: str) -> None:
    plain, *_ = both(name)
    wide = copy.deepcopy(plain)
    assert widen_mlps(wide) == 2 == sum(isinstance(module, _Padded) for module in wide.modules())
    assert_near(gradients(plain), gradients(wide), 1e-13)


@every_method
def test_the_mlp_computes_at_the_aligned_width(name: str) -> None:
    _, _, padded, *_ = both(name)
    mlp = padded.model.layers[0].mlp
    seen: list[torch.Tensor] = []
    for layer in (mlp.gate_proj, mlp.up_proj):
        layer.register_forward_hook(lambda _, given, y: seen.append(y))
    mlp.down_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    assert mlp(torch.randn(2, 16, dtype=torch.float64)).shape == (2, 16)
    assert [y.shape for y in seen] == [(2, 64)] * 3
    assert not any(y[:, 21:].any() for y in seen)
    assert not isinstance(padded.model.layers[0].self_attn, _Padded)
    replaced = sum(isinstance(m, ReparamLinear) for m in padded.modules())
    assert len(list(reparametrized(padded))) == replaced == (0 if name == "full" else 14)


def test_biases_and_a_trained_scale_stay_what_they_are() -> None:
    plain, _, padded, *_ = both("lora", train_scale=True)
    for model in (plain, padded):
        for layer in model.modules():
            if hasattr(layer, "out_features"):
                layer.bias = nn.Parameter(torch.linspace(-1, 1, layer.out_features).double())
    assert_near(gradients(plain), gradients(padded), 1e-13)


def test_dropout_runs_in_training_and_not_in_evaluation() -> None:
    plain, _, padded, *_ = both("lora", dropout=0.5)
    for layer in [*reparametrized(plain), *reparametrized(padded)]:
        nn.init.ones_(layer.B)  # type: ignore[arg-type]
    mlp = padded.train().model.layers[0].mlp
    x = torch.randn(4, 16, dtype=torch.float64)
    assert not torch.equal(mlp(x), mlp(x))
    mlp.eval()
    # Values of up to 1e4, since B is far from its size in training.
    torch.testing.assert_close(mlp(x), plain.eval().model.layers[0].mlp(x), rtol=1e-12, atol=1e-12)


@every_method
def test_with_activation_checkpointing(name: str) -> None:
    plain, _, padded, *_ = both(name)
    checkpoint_activations(padded.train())
    assert_near(gradients(plain), gradients(padded), 1e-13)


@every_method
def test_runs_resumes_and_exports_as_without(
    name: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU nothing is padded, so here it is done by hand."""

    def padding(model: Any) -> None:
        assert pad_mlps(model) == 2
        checkpoint_activations(model)

    settings = {"model": ODD, "train": {"checkpoint_every": STEPS // 2, "keep": 9}}
    train(tiny(name, corpus, tmp_path / "plain", **settings))
    monkeypatch.setattr(peptrain.execution.prepare, "checkpoint_activations", padding)
    settings["train"]["checkpoint_activations"] = True
    train(tiny(name, corpus, tmp_path / "padded", **settings))
    plain, padded = newest(tmp_path / "plain"), newest(tmp_path / "padded")
    assert_near(plain.model, padded.model, 1e-7)
    assert {n: t.shape for n, t in plain.optimizer.items()} == {
        n: t.shape for n, t in padded.optimizer.items()
    }
    for file in newest_files(tmp_path / "padded"):
        file.unlink()
    resume(tmp_path / "padded")
    assert differences(newest(tmp_path / "padded"), padded) == []
    export(tmp_path / "padded", tmp_path / "out", tiny_method(name).export_form)


def newest_files(run: Path) -> list[Path]:
    return list((run / "checkpoints" / f"step-{STEPS:08d}").iterdir())


def test_a_copy_is_padded_and_has_weights_of_its_own() -> None:
    _, _, padded, *_ = both("bpt")
    twin = copy.deepcopy(padded)
    wanted = gradients(twin)
    with torch.no_grad():
        for p in padded.parameters():
            p.zero_()
    assert_near(wanted, gradients(twin), 0)


def test_a_model_that_is_let_go_leaves_at_once() -> None:
    layer = made(tiny_method("bpt"), model=ODD)[0].model.layers[0].mlp  # type: ignore[union-attr]
    stack = Stack(layer)
    assert pad_mlps(stack) == 1
    gc.collect()
    gc.disable()
    try:
        alive = weakref.ref(layer.up_proj)
        del layer, stack
        assert alive() is None
    finally:
        gc.enable()


# What is left alone.


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(block) for block in blocks)


class MLP(nn.Module):
    def __init__(self, d: int = 16, f: int = 21, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.down = nn.Linear(f, d, dtype=dtype)
        self.gate, self.up = nn.Linear(d, f, dtype=dtype), nn.Linear(d, f, dtype=dtype)

    def middle(self, z: Tensor) -> Tensor:
        return F.silu(self.gate(z)) * self.up(z)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.middle(x))


class Normed(MLP):
    def middle(self, z: Tensor) -> Tensor:
        y = super().middle(z)
        return y * y.square().mean(-1, keepdim=True).rsqrt()


class Infinite(MLP):
    def middle(self, z: Tensor) -> Tensor:
        return self.gate(z).abs().log() * self.up(z)


class SteepAtZero(MLP):
    """Finite outputs, and a NaN for the gradient of a zero."""

    def middle(self, z: Tensor) -> Tensor:
        return self.gate(z).abs().sqrt() * self.up(z)


class Sized(MLP):
    def middle(self, z: Tensor) -> Tensor:
        return super().middle(z).view(*z.shape[:-1], self.up.out_features)


class TakesTwo(MLP):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        assert y is not None
        return super().forward(x)


class Exp(MLP):
    """exp(0) is 1, and the columns of down are 0."""

    def middle(self, z: Tensor) -> Tensor:
        return (self.gate(z) / 8).exp() * (self.up(z) + 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Normed, Infinite, SteepAtZero, Sized, TakesTwo])
def test_what_padding_would_change_is_left_alone_and_said(
    kind: type[MLP], dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    stack = Stack(kind(dtype=dtype), kind(dtype=dtype))
    with caplog.at_level("INFO", "peptrain"):
        assert pad_mlps(stack) == 0
    assert [r.message for r in caplog.records] == [
        "2 MLPs of width 21: not padded, it would change results"
    ]
    assert all(type(m) is nn.Linear for m in stack.modules() if hasattr(m, "out_features"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [MLP, Exp])
def test_what_padding_keeps_is_padded_in_every_dtype(
    kind: type[MLP], dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    stack = Stack(*(kind(dtype=dtype) for _ in range(3)))
    with caplog.at_level("INFO", "peptrain"):
        assert pad_mlps(stack) == 3
    assert [r.message for r in caplog.records] == ["3 MLPs of width 21: computed at 64"]


@pytest.mark.parametrize("d, f", [(16, 24), (12, 21), (16, 64)])
def test_widths_that_are_aligned_or_would_not_be_are_no_candidates(
    d: int, f: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "peptrain"):
        assert pad_mlps(Stack(MLP(d, f))) == 0
    assert not caplog.records


def test_a_rank_that_is_the_width_is_left_alone() -> None:
    plain, *_ = made(tiny_method("lowrank", rank=21, include="*"), model=ODD | {"hidden_size": 32})
    assert pad_mlps(plain) == pad_mlps(plain, tried=False) == 0


def test_a_model_without_numbers_is_padded_untried() -> None:
    with fake_tensors():
        stack = Stack(MLP(), MLP())
        assert pad_mlps(stack, tried=False) == 2
        x = torch.zeros(2, 16, dtype=torch.float64)
        assert stack.layers[0](x).shape == x.shape


class Dividing(torch.autograd.Function):
    """y = (a z), its gradient of a computed from y, by a division."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, a: Tensor) -> Tensor:
        y = z * a
        ctx.save_for_backward(y, a)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        y, a = ctx.saved_tensors
        return grads[0] * a, (grads[0] * y).sum(0) / a


class Divided(ReparamLinear):
    """W_eff = diag(a) W."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.weight = site.linear.weight
        self.a = nn.Parameter(self.weight.new_ones(self.out_features))

    def forward(self, x: Tensor) -> Tensor:
        z = F.linear(x, self.weight).flatten(0, -2)
        y: Tensor = Dividing.apply(z, self.a)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], -1)


def test_a_nan_in_the_gradient_of_the_padding_is_cut_off() -> None:
    mlp = MLP()
    for name in ("gate", "up", "down"):
        site = Site(f"0.{name}", mlp, 16)
        site.replace(Divided(site))
    padded = copy.deepcopy(mlp)
    assert pad_mlps(Stack(padded)) == 1
    x = torch.randn(5, 16, dtype=torch.float64)
    found = []
    for model in (mlp, padded):
        model(x).square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert_near(*found, 1e-13)  # type: ignore[misc, arg-type]
    assert found[0].keys() == {f"{n}.{p}" for n in ("gate", "up", "down") for p in ("weight", "a")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "bpt", "loro"])
def test_compiled_padded_layers_compile_once_and_give_the_same_losses(
    name: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"precision": "fp32", "eval_every": 2}
    train(tiny(name, corpus, tmp_path / "plain", model=ODD, train=settings))
    layers = peptrain.execution.prepare.compile_layers
    monkeypatch.setattr(
        peptrain.execution.prepare,
        "compile_layers",
        lambda m, *rest: (pad_mlps(m), layers(m, *rest)),
    )
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(tiny(name, corpus, tmp_path / "it", model=ODD, train=settings | {"compile": True}))
    for (_, one), (_, other) in zip(
        losses(tmp_path / "plain"), losses(tmp_path / "it"), strict=True
    ):
        assert one == pytest.approx(other, abs=1e-3)
