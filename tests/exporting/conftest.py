"""Runs and their exports, made when a test first asks for them."""

from pathlib import Path

import pytest
from test_export import Exports


@pytest.fixture(scope="module")
def exports(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(corpus, tmp_path_factory.mktemp("exports"))
