"""Token shards from text (`prepare`), batches from shards (`Corpus`), and a default corpus."""

from peptrain.data.config import PrepareConfig
from peptrain.data.corpus import Corpus
from peptrain.data.embedded import configured_corpus, default_corpus, embedded_documents
from peptrain.data.prepare import Prepared, ProgressReport, prepare

__all__ = [
    "Corpus",
    "PrepareConfig",
    "Prepared",
    "ProgressReport",
    "configured_corpus",
    "default_corpus",
    "embedded_documents",
    "prepare",
]
