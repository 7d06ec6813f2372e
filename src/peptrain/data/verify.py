"""Compare the files of a corpus with the SHA-256 in its index, the shards once on a machine."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from peptrain.data.index import TokenFile, damaged
from peptrain.settings.fields import as_path

ANNOUNCED_BYTES = 2 << 30  # one core hashes 1.1 GB/s and up, so less takes two seconds at most
STAMPS = "verified"
log = logging.getLogger("peptrain")


def cache_directory() -> Path:
    """Return $PEPTRAIN_CACHE, else $XDG_CACHE_HOME/peptrain, else ~/.cache/peptrain.

    Raises OSError if the user has no home directory, ConfigError for a `~name` that nobody has.
    """
    if chosen := os.environ.get("PEPTRAIN_CACHE"):
        return as_path(chosen, "PEPTRAIN_CACHE")
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "peptrain"
    try:
        return Path.home() / ".cache" / "peptrain"
    except RuntimeError as error:
        raise OSError(str(error)) from error


def verify(path: Path, sha256: str) -> None:
    """Raise DataError if the file can't be read or its SHA-256 is another."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise damaged(path, f"can't be read ({error.strerror})") from error
    if found != sha256:
        raise damaged(path, "damaged: it differs from what was prepared (SHA-256)")


def verify_shards(directory: Path, shards: Sequence[TokenFile], *, again: bool) -> None:
    """Raise DataError for a damaged shard. Shards that were verified before are not read again.

    That is recorded in the cache directory, since a corpus may be read-only: in a file whose name
    is a hash of the shards' path, sizes, times and checksums. `again` disregards it.
    """
    stamp = _stamp(directory, shards)
    if stamp and stamp.exists():
        if not again:
            return
        stamp.unlink(missing_ok=True)  # another process may do the same
    size = sum((directory / shard.name).stat().st_size for shard in shards)
    if size > ANNOUNCED_BYTES:
        log.info("%s: verifying %.1f GB of shards", directory, size / 1e9)
    with ThreadPoolExecutor() as pool:
        checks = [pool.submit(verify, directory / s.name, s.sha256) for s in shards]
        for check in checks:
            check.result()
    if stamp:
        with contextlib.suppress(OSError):  # no room: verified again at the next start
            stamp.touch()


def _stamp(directory: Path, shards: Sequence[TokenFile]) -> Path | None:
    """Return the path of the stamp, or None if the cache directory can't be written."""
    path = directory.resolve()
    stats = [(path / shard.name).stat() for shard in shards]
    content = [
        (s.sha256, stat.st_size, stat.st_mtime_ns) for s, stat in zip(shards, stats, strict=True)
    ]
    name = hashlib.sha256(repr((str(path), content)).encode(errors="surrogateescape")).hexdigest()
    try:
        folder = cache_directory() / STAMPS
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.debug(
            "%s: verified at each start, because the cache can't be written (%s)", path, error
        )
        return None
    if not os.access(folder, os.W_OK):
        log.debug("%s: verified at each start, because %s can't be written", path, folder)
        return None
    return folder / name
