"""Lock a directory or file for one process at a time, on any file system.

A lock is a file that names its holder. It is created exclusively, which every file system supports,
and removed by the holder. A lock that was left behind is taken over. Whether its holder is dead is
decided by flock, which the kernel releases with the last process that has the file open. flock is
missing on some file systems, and on others it does not reach other machines. There a holder of this
machine is dead when its process is gone, and any other when the file's modification time, which a
holder renews every `BEAT` seconds, stays the same for `PATIENCE` seconds. No clocks are compared,
because those of two machines may differ.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import re
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex

from peptrain.errors import CheckpointError
from peptrain.files import is_open_file, try_flock

log = logging.getLogger("peptrain")
BEAT = 5.0
PATIENCE = 60.0
"""Longer than a holder may be too busy to renew its lock."""
SETTLE = 1.0
"""Seconds in which a process that has created or overwritten a lock writes its name."""
POLL = 0.1


@dataclass(frozen=True)
class Holder:
    """The process named in a lock."""

    host: str
    pid: int
    since: str
    machine: str
    """The boot of the machine, and the namespace in which `pid` is valid."""
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"

    @property
    def line(self) -> str:
        """The content of the lock file."""
        return f"{self.host} {self.pid} {self.since} {self.machine} {self.token}\n"

    @property
    def boot(self) -> str:
        return self.machine.partition("/")[0]


@contextlib.contextmanager
def lock(path: Path, busy: Callable[[str], str], wait: float = 0.0) -> Iterator[int]:
    """Hold the lock file `path` and yield its descriptor.

    A process that inherits the descriptor keeps the lock, where flock works. `busy` returns the
    error message for a description of the holder. wait: seconds to wait for a holder.

    Raises CheckpointError if the lock is held, or if it can't be written.
    """
    me, deadline = _me(), time.monotonic() + wait
    try:
        while (descriptor := _take(path, me)) is None:
            if time.monotonic() >= deadline:
                raise CheckpointError(busy(str(_holder(path) or "another process")))
            time.sleep(POLL)
    except OSError as error:
        how = "make its directory writable, or copy that to another place"
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
            how = "it is no file of ours, so remove it, and run the same command again"
        raise CheckpointError(f"{path}: can't be written: {error.strerror}; {how}") from error
    done = threading.Event()
    beat = threading.Thread(target=_renew, args=(descriptor, done), daemon=True)
    beat.start()
    try:
        yield descriptor
    finally:
        done.set()
        beat.join()
        _release(path, descriptor)


class Sign:
    """Tells whether a lock is held by a living process, without taking it or writing anything.

    The process of another machine, or of a container, is dead when it has stopped to renew the
    lock.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._seen = path, time.monotonic()
        self._state = _state(path) if self.held() else None
        # It may have died long ago. The clocks of two machines differ, so that is not sure before
        # the next beats are missing too.
        old = self._state is not None and time.time() - self._state[2] / 1e9 > PATIENCE
        self._patience = 2 * BEAT if old else PATIENCE
        self.doubtful = False
        """Whether the next seconds show if the holder is alive."""

    def holder(self) -> Holder | None:
        """Return the process named in the lock, None without a lock or a name in it."""
        return _holder(self._path) if self.held() else None

    def held(self) -> bool:
        """Return whether there is a lock. A pipe, which might be read forever, is none."""
        return self._path.is_file()

    def alive(self) -> bool:
        """Return whether the lock is held and its holder gives signs of life."""
        if not self.held():
            return False
        holder = self.holder()
        if holder is not None and holder.machine == _me().machine:
            return _runs(holder.pid)
        now, state = time.monotonic(), _state(self._path)  # the file is the newer one
        if state != self._state:
            self._state, self._seen, self._patience = state, now, PATIENCE
        alive = state is not None and now - self._seen < self._patience
        self.doubtful = alive and self._patience < PATIENCE
        return alive


def _take(path: Path, me: Holder) -> int | None:
    """Return the descriptor of the lock, now ours, or None if it is held."""
    while True:
        descriptor, new = _open(path)
        taken = False
        try:
            flocked = try_flock(descriptor)
            if flocked is False:
                return None
            if not is_open_file(path, descriptor):
                continue  # removed by its holder in the meantime
            before = None if new else _holder(path)
            if not new and not _dead(path, before, bool(flocked)):
                return None
            if not is_open_file(path, descriptor):
                continue
            os.ftruncate(descriptor, 0)
            if os.pwrite(descriptor, line := me.line.encode(), 0) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if not new and not (flocked and before and before.boot == me.boot):
                time.sleep(SETTLE)  # another process may be taking it over, where flock fails
            taken = _holder(path) == me
            return descriptor if taken else None
        finally:
            if not taken:
                os.close(descriptor)


def _open(path: Path) -> tuple[int, bool]:
    """Open `path`, never through a link; return (descriptor, whether it was created)."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    while True:
        with contextlib.suppress(FileExistsError):
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644), True
        with contextlib.suppress(FileNotFoundError):  # removed by its holder since
            descriptor = os.open(path, flags)
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                return descriptor, False
            os.close(descriptor)
            raise OSError(errno.EINVAL, "not a regular file")  # to read a pipe would take forever


def _dead(path: Path, holder: Holder | None, flocked: bool) -> bool:
    """Return whether the holder named in the lock is gone.

    flocked: this process has acquired the file's flock.
    """
    if holder is None:  # killed before it wrote its name, or a lock of version 0.1.0
        return not _renewed(path, SETTLE)
    here = _me()
    if flocked and holder.boot == here.boot:
        return True
    if holder.machine == here.machine and not _runs(holder.pid):
        return True
    log.warning("%s: left by %s; waiting up to %.0f s for a sign of it", path, holder, PATIENCE)
    return not _renewed(path, PATIENCE)


def _renewed(path: Path, seconds: float) -> bool:
    """Return whether the file changes within `seconds`. A removed file does not.

    Time in which this process itself was stopped does not count, since it is measured in looks.
    Otherwise a holder on the same busy or suspended machine, which was stopped with it, would be
    taken for dead before its next beat.
    """
    first = now = _state(path)
    for _ in range(math.ceil(seconds / POLL)):
        if now is None or now != first:
            break
        time.sleep(POLL)
        now = _state(path)
    return now is not None and now != first


def _state(path: Path) -> tuple[int, int, int] | None:
    """Return what changes with the file. Opening it makes NFS ask its server."""
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _holder(path: Path) -> Holder | None:
    """Read the holder's name; None if there is none."""
    try:
        with path.open("rb") as file:
            text = file.read(1000).decode("ascii", errors="replace")
    except FileNotFoundError:
        return None
    found = re.fullmatch(r"([!-~]+) (\d{1,9}) ([!-~]+) ([!-~]+) ([!-~]+)\n", text)
    return Holder(found[1], int(found[2]), *found.groups()[2:]) if found else None


def _me() -> Holder:
    since = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    host = re.sub(r"[^!-~]", "?", socket.gethostname()) or "?"
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        machine = f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        machine = host
    return Holder(host, os.getpid(), since, machine, token_hex(4))


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _renew(descriptor: int, done: threading.Event) -> None:
    while not done.wait(BEAT):
        with contextlib.suppress(OSError):  # the next one may succeed
            os.utime(descriptor)


def _release(path: Path, descriptor: int) -> None:
    if is_open_file(path, descriptor):
        path.unlink(missing_ok=True)
    os.close(descriptor)
