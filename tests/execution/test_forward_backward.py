"""Recorded passes, with a GPU's recording played by nothing: what is around it."""

import contextlib

import pytest
import torch
from support import ALONE
from torch import Tensor, nn

from peptrain.errors import ConfigError, Unsupported
from peptrain.execution.forward_backward import CUDAGraphSteps, EagerSteps, ForwardBackward


class Dropped(nn.Module):
    """A loss that draws, and that fails in the fourth pass, the first to be recorded."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.w, self.calls, self.error = nn.Parameter(torch.ones(8)), 0, error

    def forward(self, windows: Tensor) -> Tensor:
        self.calls += 1
        if self.error is not None and self.calls > 3:
            raise self.error
        return nn.functional.dropout(self.w, 0.5).sum() + windows.sum()


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def wait_stream(self, other: object) -> None: ...

    class Graph:
        def pool(self) -> None: ...

        def replay(self) -> None: ...

    @contextlib.contextmanager
    def recording(graph: Graph, pool: object, capture_error_mode: str):
        try:
            yield
        except Exception:
            raise RuntimeError("the capture was invalidated")  # noqa: B904, as PyTorch does

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", recording)


def replayed(error: Exception | None = None) -> ForwardBackward:
    return CUDAGraphSteps(EagerSteps(Dropped(error), "fp32", ALONE))


def test_memory_that_runs_out_is_not_taken_for_a_pass_that_cannot_be_recorded() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="2 GiB"):
        replayed(torch.OutOfMemoryError("tried to allocate 2 GiB"))([torch.zeros(2, 5)])


def test_what_cannot_be_recorded_is_named_by_its_first_error() -> None:
    with pytest.raises(Unsupported, match=r"train.cuda_graph.*set it to false \(.item\(\)"):
        replayed(RuntimeError(".item() in the mask"))([torch.zeros(2, 5)])


def test_the_warm_up_gives_back_what_dropout_drew() -> None:
    """Or the first step after a resume, which records, would differ from an uninterrupted run's."""
    made = CUDAGraphSteps(EagerSteps(Dropped(), "fp32", ALONE))
    made.windows, made.share = torch.zeros(2, 5), 1.0
    before = torch.get_rng_state()
    made._warm_up()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("sizes", [(8, 1), (8, 8, 8), (8,)])
def test_parts_of_another_number_or_size_are_not_replayed_as_if_they_fitted(
    sizes: tuple[int, ...],
) -> None:
    made = replayed()
    made([torch.zeros(8, 5), torch.zeros(8, 5)])
    with pytest.raises(ConfigError, match=r"train\.micro_batch"):
        made([torch.zeros(n, 5) for n in sizes])
