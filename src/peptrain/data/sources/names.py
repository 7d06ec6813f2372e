"""What a file's name says: its format, its compression, and whether it only describes data."""

from __future__ import annotations

import re
from pathlib import Path

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson", ".jsonlines", ".ldjson")
TEXT_SUFFIXES = (".txt", ".md", ".text")
PARQUET_SUFFIX = ".parquet"
KNOWN_SUFFIXES = (*JSON_SUFFIXES, *TEXT_SUFFIXES, PARQUET_SUFFIX)
PACKERS = (".gz", ".xz", ".bz2", ".zst")
UNREAD_PACKERS = (".zip", ".7z", ".lz4", ".rar", ".tar", ".tgz", ".tbz2", ".txz", ".lzma", ".br")
PART = re.compile(r"[-._](?:(?:part|shard|chunk|split)[-._]?)?\d+(?:[-._]of[-._]\d+)?$", re.I)
"""The end of the name of one of several files: -00000-of-00002, .00000, .part-1."""
CARDS = {"readme", "license", "licence", "copying", "notice", "citation", "contributing"}
HELD_OUT = {"test", "valid", "validation", "val", "dev", "heldout", "eval"}
METADATA = {
    *("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"),
    *("metadata.json", "manifest.json", "croissant.json", "config.json", "tokenizer.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "vocab.json"),
}


def split_name(path: Path) -> tuple[str, str]:
    """Return the suffixes of content and compression, without numbers of parts, in lower case.

    (".jsonl", ".gz") for A.JSONL.gz and for a.jsonl.gz-00000-of-00002; "" for none.
    """
    name, packer = path.name.lower(), ""
    while True:
        suffix = Path(name).suffix
        if suffix in PACKERS and not packer:
            name, packer = name.removesuffix(suffix), suffix
        elif suffix not in KNOWN_SUFFIXES and (part := PART.search(name)):
            name = name[: part.start()]
        else:
            return suffix, packer


def content_suffix(path: Path) -> str:
    """Return the suffix of the content in lower case: ".txt" for A.TXT.gz."""
    return split_name(path)[0]


def is_card(path: Path) -> bool:
    """Return whether it is a README, a license or the like, as text."""
    return path.name.lower().partition(".")[0] in CARDS and content_suffix(path) in TEXT_SUFFIXES


def is_test_set(path: Path) -> bool:
    """Return whether its name, or that of its folder, is that of a test or validation set."""
    words = re.split(r"[^a-z]+", "/".join(path.parts[-2:]).lower())
    return not HELD_OUT.isdisjoint(words)


def is_metadata(path: Path) -> bool:
    """Return whether it is a file like dataset_infos.json."""
    return path.name.lower() in METADATA
