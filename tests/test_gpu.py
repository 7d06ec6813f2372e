"""What only a GPU can show. Run with `pytest -m gpu -n0`."""

from pathlib import Path

import pytest
import torch
from support import losses, newest, tiny, tiny_method

from peptrain.eval.run import evaluate_run
from peptrain.export import export
from peptrain.methods import METHODS
from peptrain.train import resume, train

pytestmark = pytest.mark.gpu
CALM = {"eps": 1e-3}
"""Adam divides a gradient of rounding size by itself; a larger eps keeps rounding small."""


@pytest.mark.parametrize("name", METHODS)
def test_the_device_changes_the_losses_by_rounding_only(
    name: str, corpus: Path, tmp_path: Path
) -> None:
    """Every draw is made on the CPU, so both devices train the same model on the same data."""
    for device in ("cpu", "cuda"):
        config = {"precision": "fp64", "device": device}
        train(tiny(name, corpus, tmp_path / device, train=config, optim=CALM))
    for (_, cpu), (_, gpu) in zip(losses(tmp_path / "cpu"), losses(tmp_path / "cuda"), strict=True):
        assert cpu == pytest.approx(gpu, abs=1e-4)


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
    held_out = evaluate_run(run, device="cuda")
    assert held_out.loss == pytest.approx(result.held_out.loss, rel=2e-2)
    export(run, tmp_path / "out")


@pytest.mark.parametrize("name", ["bpt", "relora"])
@pytest.mark.parametrize("reset", ["magnitude", "random"])
def test_partial_resets_run_on_a_gpu(name: str, reset: str, corpus: Path, tmp_path: Path) -> None:
    method = tiny_method(name, reset=reset, reset_fraction=0.5)
    train(tiny(method, corpus, tmp_path / "run", train={"device": "cuda", "precision": "fp32"}))


@pytest.mark.parametrize("name", METHODS)
def test_compiled_layers_give_the_same_losses(name: str, corpus: Path, tmp_path: Path) -> None:
    for compile in (False, True):
        config = {"precision": "fp32", "device": "cuda", "compile": compile}
        train(tiny(name, corpus, tmp_path / str(compile), train=config, optim=CALM))
    for (_, eager), (_, compiled) in zip(
        losses(tmp_path / "False"), losses(tmp_path / "True"), strict=True
    ):
        assert eager == pytest.approx(compiled, abs=1e-4)
