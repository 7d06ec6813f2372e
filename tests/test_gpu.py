"""What only a GPU can show. Run with `pytest -m gpu -n0`."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from byhand import seeded
from support import rows, tiny, tiny_method
from transformers import LlamaConfig, LlamaForCausalLM

from peptrain.adaptation import adapt
from peptrain.analysis import live
from peptrain.analysis.analyze import analyze
from peptrain.analysis.table import read_table
from peptrain.eval.run import evaluate
from peptrain.execution.attention import attend_without_masks
from peptrain.execution.compile import compile_layers
from peptrain.execution.loss import token_loss
from peptrain.exporting.export import export
from peptrain.exporting.factorised import load_factorised
from peptrain.methods import METHODS
from peptrain.methods.base import Method
from peptrain.models.auto import load_model
from peptrain.ops.cross_entropy import linear_cross_entropy, softmax_
from peptrain.ops.riemannian_gram import gram_steps_
from peptrain.ops.spectral import semi_orthogonal
from peptrain.optim.loro import LOROOptimizer, LORORule
from peptrain.testing import losses, newest
from peptrain.training.loop import resume, train

pytestmark = pytest.mark.gpu
CALM = {"eps": 0.1}
"""Adam divides a gradient of rounding size by itself; a larger eps keeps rounding small. At 1e-3
LORO's losses on a CPU and a GPU were 7e-9 apart at first and 1e-3 after 7 steps."""


def calm(name: str) -> dict[str, float]:
    """Spectral steps are rounded to bf16 on a GPU and have one size, which has to be small."""
    return CALM | ({"lr": 1e-4} if name == "spectron" else {})


@pytest.mark.parametrize("name", METHODS)
def test_the_device_changes_the_losses_by_rounding_only(
    name: str, corpus: Path, tmp_path: Path
) -> None:
    """Every draw is made on the CPU, so both devices train the same model on the same data."""
    for device in ("cpu", "cuda"):
        config = {"precision": "fp64", "device": device}
        train(tiny(name, corpus, tmp_path / device, train=config, optim=calm(name)))
    for (_, cpu), (_, gpu) in zip(losses(tmp_path / "cpu"), losses(tmp_path / "cuda"), strict=True):
        assert cpu == pytest.approx(gpu, abs=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_a_run_trains_resumes_and_leaves_the_gpu(
    name: str, precision: str, corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    each = {"precision": precision, "device": "cuda", "checkpoint_every": 1, "keep": 99}
    result = train(tiny(name, corpus, run, train=each))
    assert result.peak_bytes > 0
    finished = newest(run)
    for step in range(5, 9):
        for file in (run / "checkpoints" / f"step-{step:08d}").iterdir():
            file.unlink()
        (run / "checkpoints" / f"step-{step:08d}").rmdir()
    resume(run)
    again = newest(run)
    for key, value in finished.model.items():
        torch.testing.assert_close(again.model[key], value, rtol=0.02, atol=2e-3)
    held_out = evaluate(run, device="cuda")
    assert held_out.loss == pytest.approx(result.held_out.loss, rel=2e-2)
    export(run, tmp_path / "out", tiny_method(name).export_form)


@pytest.mark.parametrize("name", ["bpt", "relora"])
@pytest.mark.parametrize("reset", ["magnitude", "random"])
def test_partial_resets_run_on_a_gpu(name: str, reset: str, corpus: Path, tmp_path: Path) -> None:
    method = tiny_method(name, reset=reset, reset_fraction=0.5)
    train(tiny(method, corpus, tmp_path / "run", train={"device": "cuda", "precision": "fp32"}))


@pytest.mark.parametrize("name", METHODS)
def test_compiled_layers_give_the_same_losses(name: str, corpus: Path, tmp_path: Path) -> None:
    for compile in (False, True):
        config = {"precision": "fp32", "device": "cuda", "compile": compile}
        train(tiny(name, corpus, tmp_path / str(compile), train=config, optim=calm(name)))
    for (_, eager), (_, compiled) in zip(
        losses(tmp_path / "False"), losses(tmp_path / "True"), strict=True
    ):
        assert eager == pytest.approx(compiled, abs=1e-4)


@pytest.mark.parametrize("setting", ["cuda_graph", "kernels"])
@pytest.mark.parametrize("name", METHODS)
def test_what_makes_a_run_fast_changes_its_losses_by_rounding_only(
    name: str, setting: str, corpus: Path, tmp_path: Path
) -> None:
    """Two micro-batches a step, so that a graph is replayed with and without adding up."""
    values = {"cuda_graph": (False, True), "kernels": ("torch", "triton")}[setting]
    for value in values:
        config = {"precision": "fp32", "device": "cuda", "micro_batch": 2, setting: value}
        train(tiny(name, corpus, tmp_path / str(value), train=config, optim=calm(name)))
    one, other = (losses(tmp_path / str(value)) for value in values)
    for (_, plain), (_, fast) in zip(one, other, strict=True):
        assert plain == pytest.approx(fast, abs=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_the_same_recorded_compiled_and_resumed(
    momentum: float, corpus: Path, tmp_path: Path
) -> None:
    optim = {"kind": "sgd", "momentum": momentum}
    common = {"precision": "fp32", "device": "cuda", "checkpoint_every": 4, "keep": 9}
    for fast in (False, True):
        config = {**common, "compile": fast, "cuda_graph": fast}
        train(tiny("full", corpus, tmp_path / str(fast), train=config, optim=optim))
    whole = losses(tmp_path / "True")
    shutil.rmtree(tmp_path / "True" / "checkpoints" / "step-00000008")
    resume(tmp_path / "True")
    for others in (losses(tmp_path / "False"), losses(tmp_path / "True")):
        for (_, one), (_, other) in zip(whole, others, strict=True):
            assert one == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize("name", ["full", "relora", "bpt", "loro", "vera"])
def test_spectra_are_the_same_on_both_devices(name: str, corpus: Path, tmp_path: Path) -> None:
    run, settings = tmp_path / "run", {"keep_at": "0,5,6", "device": "cpu"}
    train(tiny(name, corpus, run, train=settings, optim=CALM))
    tables = []
    for device in ("cpu", "cuda"):
        (table,) = analyze([Path(f"{run}@6")], out=tmp_path / device, probe=2, device=device)
        tables.append(read_table(table))
    assert len(tables[0]) == len(tables[1])
    for one, other in zip(*tables, strict=True):
        assert one["what"] == other["what"]
        for key in ("effective_rank", "frobenius", "sigma_max", "error_tangent"):
            if one[key] is not None:
                assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-9, nan_ok=True)


def test_a_compiled_run_is_observed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the times: the trial of one measurement takes longer than this run."""
    monkeypatch.setattr(live, "choose", lambda *given: live.Choice(2, 5, 1))
    monkeypatch.setattr(live.Dynamics, "_keep_the_budget", lambda *given: None)
    fast = {"device": "cuda", "precision": "bf16-mixed", "compile": True, "cuda_graph": True}
    observed = {"observe": "dynamics", "observe_budget": 1.0, "steps": 40, "log_every": 1}
    train(tiny("relora", corpus, tmp_path / "run", train=fast | observed))
    found = rows(tmp_path / "run", "dynamics")
    assert found and {row["what"] for row in found} == {"weight", "update"}


def test_a_recorded_run_resumes(corpus: Path, tmp_path: Path) -> None:
    """With the phases of a warm start, each of which records its own graph."""
    config = {"precision": "bf16-mixed", "device": "cuda", "compile": True, "cuda_graph": True}
    whole = train(tiny("relora", corpus, tmp_path / "run", train=config | {"checkpoint_every": 5}))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    again = resume(tmp_path / "run")
    assert again.held_out.loss == pytest.approx(whole.held_out.loss, rel=1e-2)


@pytest.mark.parametrize("name", ["full", "bpt", "loro"])
def test_samples_of_a_recorded_run_change_nothing(name: str, corpus: Path, tmp_path: Path) -> None:
    fast = {"precision": "bf16-mixed", "device": "cuda", "compile": True, "cuda_graph": True}
    for every in (0, 3):
        train(tiny(name, corpus, tmp_path / str(every), train=fast | {"sample_every": every}))
    assert len(rows(tmp_path / "3", "sample")) == 6
    for (_, without), (_, with_samples) in zip(
        losses(tmp_path / "0"), losses(tmp_path / "3"), strict=True
    ):
        assert without == pytest.approx(with_samples, abs=1e-4)


def test_the_small_model_is_the_same_fused_on_a_gpu(corpus: Path, tmp_path: Path) -> None:
    train(tiny("loro", corpus, tmp_path / "run", train={"device": "cuda", "precision": "fp32"}))
    small = export(tmp_path / "run", tmp_path / "small", "factorised")
    ids = torch.arange(96).view(2, 48) * 7 % 300
    with torch.no_grad():
        wanted = load_model(small, factorised=True)[0].eval().double()(ids).logits
        found = load_factorised(small).bfloat16().cuda()(ids.cuda()).logits
    assert (found.cpu().double() - wanted).norm() <= 0.03 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_loros_ordinary_step_is_that_of_the_cpu(dtype: torch.dtype) -> None:
    """Its kernel gets a step count of infinity, which every device must take for no correction."""
    rule = LORORule(0, 0, "riemannian", "adam", "adam", 1e-6, "none")
    found = []
    for device in ("cpu", "cuda"):
        params = [torch.nn.Parameter(torch.randn(9, 7, generator=seeded(i))) for i in range(4)]
        params = [torch.nn.Parameter(p.detach().to(device, dtype)) for p in params]
        group = {"params": params, "factors": True, "scales": [0.3, 0.3, 2, 2], "weight_decay": 0.1}
        optimizer = LOROOptimizer([group], rule, lr=0.1, betas=(0.0, 0.9), eps=1e-3)
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = torch.randn(9, 7, generator=seeded(10 * step + i)).to(device, dtype)
            optimizer.step()
        found.append([p.detach().cpu() for p in params])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("r", [16, 64])
def test_loros_exact_step_is_that_of_the_cpu(r: int) -> None:
    found = []
    for device in ("cpu", "cuda"):
        shapes = [(200, r), (r, 150)] * 3
        drawn = [torch.randn(*s, generator=seeded(i)).to(device) for i, s in enumerate(shapes)]
        drawn[2].zero_()
        pairs = list(zip(drawn[::2], drawn[1::2], strict=True))
        assert gram_steps_(pairs, torch.sin, 0.5)[0] == [1]
        found.append([(B @ A).cpu() for B, A in pairs])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("n, r", [(500, 64), (64, 64), (30, 64)])
def test_a_frame_is_that_of_the_cpu(n: int, r: int) -> None:
    frames = [semi_orthogonal(n, r, seeded(), device=device) for device in ("cpu", "cuda")]
    torch.testing.assert_close(frames[1].cpu(), frames[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_an_mlp_of_odd_width_is_padded_and_trains_the_same(
    name: str, corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    odd = {"intermediate_size": 21}
    for device in ("cpu", "cuda"):
        config = {"precision": "fp64", "device": device}
        with caplog.at_level("INFO", "peptrain"):
            train(tiny(name, corpus, tmp_path / device, model=odd, train=config, optim=CALM))
        assert ("2 MLPs of width 21: computed at 64" in caplog.text) == (device == "cuda")
    for (_, cpu), (_, gpu) in zip(losses(tmp_path / "cpu"), losses(tmp_path / "cuda"), strict=True):
        assert cpu == pytest.approx(gpu, abs=1e-4)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed"])
def test_a_chunked_loss_is_the_plain_one(precision: str, compile: bool) -> None:
    """Several chunks, the last one short, at a vocabulary that fills a kernel's blocks unevenly."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    draw = torch.Generator().manual_seed(0)
    x, W = (torch.randn(n, 64, generator=draw).to("cuda", dtype) for n in (700, 5003))
    targets = torch.randint(5003, (700,), generator=draw).cuda()
    softmax = torch.compile(softmax_) if compile else None
    found = []
    for form in (True, False):
        leaves = [x.clone().requires_grad_(), W.clone().requires_grad_()]
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16-mixed"):
            if form:
                loss = linear_cross_entropy(*leaves, targets, softmax=softmax, limit=256 * 5003)
            else:
                loss = token_loss((leaves[0] @ leaves[1].mT)[None], targets[None])
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for ours, plain in zip(*found, strict=True):
        assert ours.dtype == plain.dtype
        assert (ours - plain).float().norm() < 0.01 * plain.float().norm()


@pytest.mark.parametrize(
    ("method", "setting"),
    [
        (tiny_method("bpt"), {"checkpoint_activations": True}),
        (tiny_method("lora", dropout=0.5, warm_start_steps=0), {}),
    ],
    ids=["checkpointed", "dropout"],
)
def test_a_recorded_run_recomputes_and_draws_as_an_eager_one(
    method: Method, setting: dict[str, bool], corpus: Path, tmp_path: Path
) -> None:
    for graph in (False, True):
        config = {"precision": "fp32", "device": "cuda", "cuda_graph": graph, "kernels": "torch"}
        train(tiny(method, corpus, tmp_path / str(graph), train=config | setting, optim=CALM))
    one, other = losses(tmp_path / "False"), losses(tmp_path / "True")
    for (_, eager), (_, recorded) in zip(one, other, strict=True):
        assert eager == pytest.approx(recorded, abs=1e-5)


@pytest.mark.parametrize("length", [50, 137])
@torch.no_grad()
def test_a_compiled_llama_of_low_rank_maps(length: int) -> None:
    """Its fused layers, and attention within short windows, against plain ones in fp64."""
    sizes = {"hidden_size": 512, "intermediate_size": 600, "num_hidden_layers": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=1000, num_attention_heads=8, num_key_value_heads=2, **sizes)
    )
    method = METHODS["lowrank"](rank=72)
    adapt(model, method, steps=10)
    model.eval().bfloat16()
    ids = torch.randint(1000, (3, length), generator=seeded(0))
    wanted = copy.deepcopy(model).double()(ids, use_cache=False).logits
    model.cuda()
    method.fuse(model)
    assert attend_without_masks(model, length)
    compile_layers(model)
    found = model(ids.cuda(), use_cache=False).logits
    assert (found.cpu().double() - wanted).norm() <= 0.02 * wanted.norm()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="for two GPUs")
@pytest.mark.parametrize("name", ["bpt", "lowrank"])
@torch.no_grad()
def test_kernels_run_where_the_model_is(name: str) -> None:
    """On another GPU than the current one."""
    sizes = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_attention_heads=2, **sizes))
    method = METHODS[name](rank=8)
    adapt(model, method, steps=10)
    model.eval().bfloat16()
    ids = torch.arange(50)[None]
    wanted = copy.deepcopy(model).double()(ids, use_cache=False).logits
    model.to("cuda:1")
    method.fuse(model)
    assert torch.cuda.current_device() == 0
    assert attend_without_masks(model, 50)
    found = model(ids.to("cuda:1"), use_cache=False).logits
    assert torch.cuda.current_device() == 0
    assert (found.cpu().double() - wanted).norm() <= 0.02 * wanted.norm()
