"""Measure preparing (MB of text/s, tokens/s) and reading (tokens/s) a corpus, by file format.

    python benchmarks/data.py [DIR] [--tokenizer FILE] [--megabytes 60]

The text comes from the files in DIR, up to --megabytes, or from the default corpus without DIR. It
is written once in each file format and prepared from there, each time in a new process whose peak
memory is reported. Without --tokenizer a byte-level BPE of 8192 tokens is trained first, untimed.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from peptrain.data import Corpus, PrepareConfig, Prepared, embedded_documents, prepare
from peptrain.data.index import Index
from peptrain.data.sources.files import FileSet, find_files
from peptrain.data.tokenizer import train_tokenizer

GPU_TOKENS = 1.5e6  # per second; full training of llama-60m on one H200 processes 1.3 M
BATCH, SEQ_LENS = 512, (256, 1024)


def documents(directory: Path | None, size: int) -> Iterator[str]:
    """Yield documents, or pieces of long ones, up to about `size` bytes."""
    if directory is None:
        yield from embedded_documents()[1]
        return
    files = FileSet(str(directory), find_files(directory, "DIR"), "text", "strict")
    for piece in files.pieces(None):
        yield piece.text
        size -= len(piece.text.encode())
        if size <= 0:
            return


def write_txt(path: Path, texts: list[str]) -> None:
    path.write_text("\n".join(texts), encoding="utf-8")


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def write_xz(path: Path, texts: list[str]) -> None:
    with lzma.open(path, "wt", preset=1) as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def write_parquet(path: Path, texts: list[str]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=1000)


FORMS: dict[str, Callable[[Path, list[str]], None]] = {
    ".txt": write_txt,
    ".jsonl": write_jsonl,
    ".jsonl.xz": write_xz,
    ".parquet": write_parquet,
}


def prepared(config: PrepareConfig) -> tuple[Prepared, float, float]:
    """Prepare a corpus; return it, the seconds, and the peak memory of this process in MiB."""
    start = time.perf_counter()
    made = prepare(config)
    seconds = time.perf_counter() - start
    return made, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def preparing(folder: Path, texts: list[str], tokenizer: Path) -> None:
    print("| from | file, MB | MB of text/s | tokens/s | peak MiB |\n|---|---|---|---|---|")
    for form, write in FORMS.items():
        source = folder / f"text{form}"
        write(source, texts)
        out = folder / f"corpus{form}"
        config = PrepareConfig(inputs=(source,), out=out, tokenizer=tokenizer)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            made, seconds, peak = pool.submit(prepared, config).result()
        tokens = made.train_tokens + made.held_out_tokens
        size = source.stat().st_size / 1e6
        rate = made.text_bytes / 1e6 / seconds
        print(f"| `{form}` | {size:.1f} | {rate:.1f} | {tokens / seconds:,.0f} | {peak:.0f} |")


def reading(corpus: Corpus, least: float) -> None:
    """Read batches of each length for at least `least` seconds."""
    print("\n| batch | tokens/s | MB/s from the shards | times a GPU's need |\n|---|---|---|---|")
    for seq_len in SEQ_LENS:
        start, step = time.perf_counter(), 0
        while (seconds := time.perf_counter() - start) < least:
            corpus.batch(seed=0, step=step, rank=0, world=1, batch_size=BATCH, seq_len=seq_len)
            step += 1
        rate = step * BATCH * seq_len / seconds
        size = rate * np.dtype(Index.load(corpus.path).dtype).itemsize / 1e6
        print(f"| {BATCH} x {seq_len} | {rate:,.0f} | {size:.0f} | {rate / GPU_TOKENS:.0f} |")


def main(argv: list[str] | None = None) -> None:
    plain = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("directory", type=Path, nargs="?", metavar="DIR")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--megabytes", type=float, default=60)
    parser.add_argument("--seconds", type=float, default=3, help="reading time for each length")
    args = parser.parse_args(argv)
    texts = list(documents(args.directory, int(args.megabytes * 1e6)))
    size = sum(len(text.encode()) for text in texts)
    names = ("numpy", "tokenizers", "pyarrow", "torch")
    print(
        f"{len(texts):,} documents, {size / 1e6:.1f} MB of text; {os.cpu_count()} CPUs, Python"
        f" {platform.python_version()}, {', '.join(f'{n} {version(n)}' for n in names)}\n"
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizer = args.tokenizer or folder / "tokenizer.json"
        if not args.tokenizer:
            train_tokenizer(iter(texts), 8192).save(str(tokenizer))
        preparing(folder, texts, tokenizer)
        reading(Corpus.open(folder / "corpus.txt"), args.seconds)


if __name__ == "__main__":
    main()
