"""What every test needs: no network, one thread, and a cache that goes away."""

import gc
import os
import sys
import tempfile
from pathlib import Path

gc.disable()  # until all tests are known: there is nothing to collect
os.environ["HF_HUB_OFFLINE"] = "1"
CACHE = tempfile.TemporaryDirectory(prefix="peptrain-tests-")  # removed when Python exits
os.environ["PEPTRAIN_CACHE"] = CACHE.name

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Collect garbage among what the tests make, without what was imported for them: often enough
    that models in cycles leave, and quickly."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(5000, 10, 10)
    gc.enable()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus of 300 token ids."""
    from peptrain.testing import small_corpus

    return small_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes find the package that the tests find."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(os.path.abspath, sys.path)))
