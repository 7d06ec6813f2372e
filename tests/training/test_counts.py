"""What the last row of a run counts."""

from pathlib import Path
from typing import Any

import pytest
from support import rows, tiny, tiny_method

from peptrain.estimation.estimate import estimate
from peptrain.testing import MODEL
from peptrain.training.loop import train


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("name", ["full", "relora", "loro"])
def test_the_last_row_has_the_flops_of_the_estimate(
    name: str, corpus: Path, tmp_path: Path
) -> None:
    """Averaged over the steps: relora's warm start costs as much as full training."""
    config = tiny(name, corpus, tmp_path / "run")
    train(config)
    [end] = rows(tmp_path / "run", "end")
    expected = estimate(config)
    assert end["flops_per_token"] == expected.run_flops / expected.tokens
    phases = {phase.flops_per_token for phase in expected.phases}
    assert min(phases) <= end["flops_per_token"] <= max(phases)


@pytest.mark.usefixtures("counted")
def test_a_model_that_can_not_be_estimated_has_no_flops(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peptrain.estimation.phases
    from peptrain.errors import Unsupported

    def refuse(*args: Any, **given: Any) -> Any:
        raise Unsupported("experts")

    monkeypatch.setattr(peptrain.estimation.phases, "PhaseEstimator", refuse)
    train(tiny("full", corpus, tmp_path / "run"))
    [end] = rows(tmp_path / "run", "end")
    assert "flops_per_token" not in end and end["trainable"] == end["parameters"]


def test_trainable_parameters_outside_the_embeddings(corpus: Path, tmp_path: Path) -> None:
    """The two tables are not tied."""
    ends = {}
    for name, method in (
        ("full", tiny_method("full")),
        ("all", tiny_method("loro")),
        ("frozen", tiny_method("relora", train_rest=False, warm_start_steps=0)),
    ):
        train(tiny(method, corpus, tmp_path / name))
        [ends[name]] = rows(tmp_path / name, "end")
    for name in ("full", "all"):
        assert (
            ends[name]["trainable"] - ends[name]["non_embedding_trainable"]
            == 2 * MODEL["vocab_size"] * MODEL["hidden_size"]
        )
    assert ends["frozen"]["trainable"] == ends["frozen"]["non_embedding_trainable"]
