"""Fine-tuning on a GPU. Run with `pytest -m gpu -n0`."""

from pathlib import Path

import pytest
from support import rows, tiny_method
from tuned import tuning, write_encoder, write_t5

from peptrain.testing import losses
from peptrain.training.loop import resume, train

pytestmark = pytest.mark.gpu
CALM = {"eps": 0.1}
"""Keeps rounding small, as in tests/test_gpu.py."""


@pytest.mark.parametrize("kind, task", [("decoder", "cola"), ("encoder", "rte"), ("t5", "stsb")])
def test_the_device_changes_a_fine_tuning_by_rounding_only(
    kind: str, task: str, decoder: Path, data: Path, tmp_path: Path
) -> None:
    """Without dropout, which each device draws itself."""
    start = decoder
    if kind == "encoder":
        none = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
        start = write_encoder(tmp_path / "start", **none)
    elif kind == "t5":
        start = write_t5(tmp_path / "start", dropout_rate=0.0)
    for device in ("cpu", "cuda"):
        train(tuning("lora", start, data, tmp_path / device, {"task": task},
                     train={"device": device}, optim=CALM))  # fmt: skip
    for (_, cpu), (_, gpu) in zip(losses(tmp_path / "cpu"), losses(tmp_path / "cuda"), strict=True):
        assert cpu == pytest.approx(gpu, abs=1e-5)
    ends = [rows(tmp_path / device, "end")[0]["held_out_loss"] for device in ("cpu", "cuda")]
    assert ends[0] == pytest.approx(ends[1], abs=1e-5)


@pytest.mark.parametrize("name", ["full", "relora", "loro"])
def test_a_compiled_fine_tuning_in_mixed_precision_is_evaluated_the_same_again(
    name: str, decoder: Path, data: Path, tmp_path: Path
) -> None:
    method = tiny_method(name, **({"around": "frozen"} if name == "loro" else {}))
    fast = {"device": "cuda", "precision": "bf16-mixed", "compile": True}
    train(tuning(method, decoder, data, tmp_path / "run", train=fast))
    before = rows(tmp_path / "run", "end")[0]["cola_matthews"]
    resume(tmp_path / "run")
    assert rows(tmp_path / "run", "end")[-1]["cola_matthews"] == before
