"""Write atomically, lock files, read JSON of strangers, stay in the named directory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from secrets import token_hex
from typing import Any, TypeVar
from zlib import crc32

J = TypeVar("J", dict[str, Any], list[Any])
SUFFIX = ".peptrain-tmp"
SCRATCH = re.compile(r"\..+\.[0-9a-f]{16}" + re.escape(SUFFIX), re.DOTALL)
"""Names of unfinished files and directories. Random, so that nobody can put a link there first."""
LARGEST_JSON = 64 << 20
"""Bytes. The weight index of a model of 10^5 matrices has 10^7."""
CHECKSUM = "crc32"
"""Key of the checksum of a small JSON object."""
MOST_DIGITS = 1000
"""Of an integer in JSON. Python itself refuses more than 4,300."""
LONGEST = 50  # characters kept of a name, so that the rest fits into the 255 bytes of a file name


def write_atomically(path: Path, content: str | Iterable[bytes | memoryview]) -> None:
    """Write `path` so that a kill or a full disk leaves the complete old or new file.

    If `path` is a link, the link is replaced, and not the file it leads to. Raises OSError if it
    can't be written, also for a device or a pipe, which would be replaced by a file.
    """
    chunks = [content.encode()] if isinstance(content, str) else content
    try:
        _check_replaceable(path)
        temporary, descriptor = _create(path, directory=False)
        try:
            with open(descriptor, "wb", closefd=False) as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(descriptor)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
            os.close(descriptor)
    except OSError as error:  # when the disk is full, it lacks the file name
        raise OSError(error.errno, error.strerror, str(path)) from error


def _check_replaceable(path: Path) -> None:
    """Raise OSError for a device, a pipe or a socket, and for any name in /dev, such as stdout."""
    mode = path.lstat().st_mode if os.path.lexists(path) else stat.S_IFREG
    plain = any(kind(mode) for kind in (stat.S_ISREG, stat.S_ISLNK, stat.S_ISDIR))
    if not plain or os.path.realpath(path.parent) == "/dev":
        raise OSError(errno.EINVAL, "not a regular file")


@contextlib.contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """Yield a new hidden directory next to `path`, to be filled and renamed.

    It is deleted at the end unless it was renamed. Raises OSError if it can't be created.
    """
    made, descriptor = _create(path, directory=True)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        os.close(descriptor)


def is_scratch(path: Path) -> bool:
    """Return whether `path` has the name of an unfinished file or directory."""
    return SCRATCH.fullmatch(path.name) is not None


def _create(path: Path, *, directory: bool) -> tuple[Path, int]:
    """Create a hidden file or directory next to `path`; return it with a descriptor that locks it.

    What killed processes left there is deleted first.
    """
    _remove_strays(path.parent)
    while True:
        made = path.with_name(f".{path.name[:LONGEST]}.{token_hex(8)}{SUFFIX}")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        if directory:
            made.mkdir()
            flags = os.O_RDONLY | os.O_DIRECTORY
        try:
            descriptor = os.open(made, flags | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:
            if directory:
                continue  # another process took it for a stray
            raise  # a directory that takes no files, such as /proc
        if try_flock(descriptor) is not False and is_open_file(made, descriptor):
            return made, descriptor
        os.close(descriptor)


def _remove_strays(directory: Path) -> None:
    """Delete what killed processes left unfinished in `directory`.

    The kernel releases a lock with its process. What can't be locked or deleted is left there, so
    also everything on a file system without locks.
    """
    with os.scandir(directory) as entries:
        found = [Path(entry.path) for entry in entries if SCRATCH.fullmatch(entry.name)]
    for stray in found:
        with contextlib.suppress(OSError):
            descriptor = os.open(stray, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if try_flock(descriptor):
                    shutil.rmtree(stray) if stray.is_dir() else stray.unlink()
            finally:
                os.close(descriptor)


def try_flock(descriptor: int) -> bool | None:
    """Return whether the lock was acquired; None where the file system has no flock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_open_file(path: Path, descriptor: int) -> bool:
    """Return whether `path` still names the open file."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ValueError if the file can't be read or contains anything else."""
    return read_json(path, dict)


def read_json(path: Path, kind: type[J]) -> J:
    """Read a JSON file that must contain a `kind`, dict or list. Raises ValueError otherwise."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"larger than {LARGEST_JSON >> 20} MiB")
        if not (path.is_file() or path.is_dir()):
            raise ValueError("not a regular file")  # a pipe might never end
        found = json.loads(path.read_bytes(), parse_int=_integer)
        if not isinstance(found, kind):
            wanted = "an object" if kind is dict else "a list"
            raise ValueError(f"a JSON {type(found).__name__}, not {wanted}")
    except OSError as error:
        raise ValueError(f"{path.name}: {error.strerror}") from error
    except RecursionError as error:
        raise ValueError(f"{path.name}: nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    return found


def _integer(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def is_barred(path: Path) -> bool:
    """Return whether `path` is there and may not be read, which is no damage."""
    return os.path.exists(path) and not os.access(path, os.R_OK)


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON values with a checksum of them, its last key."""
    text = json.dumps(values, sort_keys=True)
    return {**values, CHECKSUM: f"{crc32(text.encode()):08x}"}


def check_sealed(found: Mapping[str, Any]) -> None:
    """Raise ValueError if values that `sealed` returned have changed. Older ones lack the key."""
    values = {key: value for key, value in found.items() if key != CHECKSUM}
    if CHECKSUM in found and sealed(values) != found:
        raise ValueError("does not match its checksum")


def sha256sums(directory: Path, names: Iterable[str]) -> str:
    """Return what `sha256sum` prints for these files of a directory."""
    lines = []
    for name in names:
        with (directory / name).open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n")
    return "".join(lines)


def open_up(directory: Path) -> None:
    """Give the files in a new directory the permissions that its own were created with.

    safetensors creates files that only their owner can read.
    """
    mode = directory.stat().st_mode & 0o666
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def no_links(path: str, flags: int) -> int:
    """Open a file, as an `opener` of `open`, unless it is a link. A pipe is not waited for."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def leading_out(root: Path, names: Iterable[str]) -> Path | None:
    """Return a path in `root` that leads out of it through a link, or is no file or directory.

    Only the entries of `root` in `names` are searched, and what is in them. None if all are inside.
    """
    inside = os.path.realpath(root)
    todo, seen = [root / name for name in names], set()
    while todo:
        path = todo.pop()
        target = Path(os.path.realpath(path))
        if not target.is_relative_to(inside):
            return path
        if target.is_dir():
            todo += [] if target in seen else (path / entry.name for entry in target.iterdir())
            seen.add(target)
        elif target.exists() and not target.is_file():
            return path
    return None
