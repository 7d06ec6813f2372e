"""torch.compile of the decoder layers, on a CPU: `pytest -m slow -n0`."""

from pathlib import Path

import pytest
import torch
import torch._dynamo
from support import losses, tiny, tiny_method

from peptrain.methods.base import Method
from peptrain.train import train


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [tiny_method("bpt"), tiny_method("loro"), tiny_method("relora", warm_start_steps=0)],
    ids=lambda method: method.name,
)
def test_compiled_layers_give_the_same_losses_and_compile_once(
    method: Method, corpus: Path, tmp_path: Path
) -> None:
    """Merges, exact steps and evaluations in between compile nothing anew."""
    torch._dynamo.reset()
    for compile in (False, True):
        settings = {"precision": "fp32", "compile": compile, "eval_every": 2}
        with torch._dynamo.config.patch(error_on_recompile=True):
            train(tiny(method, corpus, tmp_path / str(compile), train=settings))
    eager, compiled = losses(tmp_path / "False"), losses(tmp_path / "True")
    for (_, one), (_, other) in zip(eager, compiled, strict=True):
        assert one == pytest.approx(other, abs=1e-3)  # rounding, which Adam makes larger
