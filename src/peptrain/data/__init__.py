"""Text to token shards (`prepare`), shards to batches (`Corpus`), and a corpus to start with."""

from peptrain.data.config import PrepareConfig
from peptrain.data.corpus import Corpus
from peptrain.data.embedded import default_corpus, embedded_documents
from peptrain.data.prepare import Prepared, ProgressReport, prepare

__all__ = [
    "Corpus",
    "PrepareConfig",
    "Prepared",
    "ProgressReport",
    "default_corpus",
    "embedded_documents",
    "prepare",
]
