"""torch.compile of the decoder layers, on a CPU: `pytest -m slow -n0`."""

from pathlib import Path

import pytest
import torch
import torch._dynamo
from support import losses, tiny

from peptrain.train import train


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bpt", "loro"])
def test_compiled_layers_give_the_same_losses_and_compile_once(
    name: str, corpus: Path, tmp_path: Path
) -> None:
    """Merges, exact steps and evaluations in between compile nothing anew."""
    torch._dynamo.reset()
    for compile in (False, True):
        settings = {"precision": "fp32", "compile": compile, "eval_every": 2}
        with torch._dynamo.config.patch(error_on_recompile=True):
            train(tiny(name, corpus, tmp_path / str(compile), train=settings))
    eager, compiled = losses(tmp_path / "False"), losses(tmp_path / "True")
    for (_, one), (_, other) in zip(eager, compiled, strict=True):
        assert one == pytest.approx(other, abs=1e-3)  # rounding, which Adam makes larger
