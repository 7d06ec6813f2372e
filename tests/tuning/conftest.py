"""Models to fine-tune and rows to do it with, made once for all tests of fine-tuning."""

from pathlib import Path

import pytest
from tuned import pretrained, write_encoder, write_rows, write_t5


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="session")
def decoder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained(corpus, tmp_path_factory.mktemp("pretrained") / "run")


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_t5(tmp_path_factory.mktemp("t5"))
