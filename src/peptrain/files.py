"""Write files atomically."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def write_atomically(path: Path, content: str | Iterable[bytes | memoryview]) -> None:
    """Write `path` so that a kill or a full disk leaves the complete old or new file."""
    chunks = [content.encode()] if isinstance(content, str) else content
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:  # when the disk is full, it lacks the file name
        raise OSError(error.errno, error.strerror, str(path)) from error
