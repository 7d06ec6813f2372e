"""Files and directories written atomically, next to strangers and to killed processes."""

import errno
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import peptrain.files
from peptrain.files import leading_out, open_up, read_json_object, scratch, write_atomically


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_a_file_has_the_permissions_of_the_umask(tmp_path: Path, umask: None) -> None:
    write_atomically(tmp_path / "a", "text")
    with scratch(tmp_path / "d") as made:
        (made / "deep").mkdir()
        for file in (made / "private", made / "deep" / "private"):
            file.touch(0o600)
        open_up(made)
        made.replace(tmp_path / "d")
    for name in ("a", "d/private", "d/deep/private"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o640, name
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o750


def test_nothing_is_written_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one in the place of the file nor one at a name that was guessed."""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "file").symlink_to(precious)
    (tmp_path / "file.tmp").symlink_to(precious)
    write_atomically(tmp_path / "file", "text")
    assert precious.read_text() == "precious" and (tmp_path / "file").read_text() == "text"
    assert not (tmp_path / "file").is_symlink()

    monkeypatch.setattr(peptrain.files, "token_hex", lambda n: "0" * 16)
    (tmp_path / f".b.{'0' * 16}{peptrain.files.SUFFIX}").symlink_to(precious)
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "b", "text")
    with pytest.raises(FileExistsError), scratch(tmp_path / "b"):
        pass
    assert precious.read_text() == "precious"


def test_a_device_and_a_pipe_are_not_replaced(tmp_path: Path) -> None:
    """With the rights of root, `-o /dev/null` would make it a file for all processes."""
    os.mkfifo(tmp_path / "pipe")
    unused = Path(f"/dev/peptrain-{secrets.token_hex(8)}")
    (tmp_path / "dev").symlink_to("/dev")
    try:
        for path in (tmp_path / "pipe", unused, tmp_path / "dev" / unused.name):
            with pytest.raises(OSError, match="not a regular file"):
                write_atomically(path, "text")
    finally:
        unused.unlink(missing_ok=True)
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
def test_a_place_that_takes_no_files_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not an endless loop: there is one name to draw."""
    names = iter(["0" * 16])
    monkeypatch.setattr(peptrain.files, "token_hex", lambda n: next(names))
    with pytest.raises(FileNotFoundError):
        write_atomically(Path("/proc/figure.svg"), "text")


def test_json_is_not_read_from_a_pipe(tmp_path: Path) -> None:
    """Nobody may ever write to it."""
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match=r"pipe\.json: not a regular file"):
        read_json_object(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match=r"one\.json: No such file"):
        read_json_object(tmp_path / "one.json")


def test_names_are_random_and_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    def draw(n: int) -> str:
        drawn.append(secrets.token_hex(n))
        return drawn[-1]

    monkeypatch.setattr(peptrain.files, "token_hex", draw)
    for _ in range(2):
        write_atomically(tmp_path / ("ä" * 127), "text")
    assert len({*drawn}) == 2 and all(len(name) >= 16 for name in drawn)


def test_a_failure_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_atomically(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a'"):
        write_atomically(tmp_path / "a", "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "old")]


WORK = """
import signal, sys
from pathlib import Path
from peptrain.files import scratch
with scratch(Path(sys.argv[1])) as made:
    (made / "half").touch()
    print(flush=True)
    signal.pause()
"""


def test_what_a_killed_process_left_is_deleted_and_what_a_living_one_has_is_not(
    tmp_path: Path, importable: None
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WORK, tmp_path / "out"], stdout=subprocess.PIPE
    )
    assert process.stdout and process.stdout.readline()
    (unfinished,) = tmp_path.iterdir()
    write_atomically(tmp_path / "a", "text")
    assert (unfinished / "half").exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tmp_path / ".a.0123456789abcdef.tmp").touch()  # another program's
    write_atomically(tmp_path / "a", "text")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.0123456789abcdef.tmp", "a"]


@pytest.mark.parametrize(
    "link, target, out",
    [
        ("a", "../elsewhere", True),
        ("a", "/etc/hostname", True),
        ("a", "/nothing", True),
        ("d/a", "../../elsewhere", True),
        ("d", "..", True),
        ("d", "other", True),  # which has a link out of the root
        ("d/a", "../b", False),
        ("d", ".", True),
        ("d", "empty", False),
        ("a", "a", False),
        ("not asked for", "/etc", False),
    ],
)
def test_a_link_out_of_a_directory_is_found(
    link: str, target: str, out: bool, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    (root / "other").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "b").touch()
    (root / "other" / "c").symlink_to(tmp_path)
    (root / link).parent.mkdir(exist_ok=True)
    (root / link).symlink_to(target)
    (tmp_path / "link").symlink_to(root)
    for given in (root, tmp_path / "link"):
        assert (leading_out(given, ["a", "b", "d"]) is not None) == out


def test_what_is_no_file_is_found(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a")
    assert leading_out(tmp_path, ["a"]) == tmp_path / "a"
