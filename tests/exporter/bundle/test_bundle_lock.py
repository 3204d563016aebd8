"""One writer at a time, on every file system, and no harm to what lies in the lock's place."""

import errno
import fcntl
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from wanexport.exporter.bundle.lock import LOCK, SOFT_LOCK, bundle_lock
from wanexport.runtime.errors import WanExportError, WanExportWarning

FORK = multiprocessing.get_context("fork")
NO_LOCKS = [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL]


def hold(bundle: Path, held: Any) -> None:
    with warnings.catch_warnings(action="ignore"), bundle_lock(bundle):
        held.set()
        signal.pause()


@contextmanager
def held_by_another(bundle: Path) -> Iterator[Any]:
    held = FORK.Event()
    process = FORK.Process(target=hold, args=(bundle, held))
    process.start()
    try:
        assert held.wait(10)
        yield process
    finally:
        process.kill()
        process.join()


@pytest.fixture(params=[0, *NO_LOCKS], ids=lambda n: errno.errorcode.get(n, "locks"))
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A file system with locks, and those without."""

    def fail(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    if request.param:
        monkeypatch.setattr(fcntl, "flock", fail)
    return int(request.param)


@pytest.mark.filterwarnings("ignore::wanexport.runtime.errors.WanExportWarning")
def test_a_second_writer_is_refused_at_once_and_a_killed_one_forgotten(
    tmp_path: Path, file_system: int
) -> None:
    for _ in range(2):
        with held_by_another(tmp_path):
            with pytest.raises(WanExportError, match="another wanexport is writing"):
                with bundle_lock(tmp_path):
                    pass
        with bundle_lock(tmp_path):  # it was killed
            pass
    assert set(os.listdir(tmp_path)) == {LOCK}


@pytest.mark.parametrize("number", NO_LOCKS)
def test_a_file_system_without_locks_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.warns(WanExportWarning, match="has no locks: the file .lock.soft") as caught:
        with bundle_lock(tmp_path):
            assert SOFT_LOCK in os.listdir(tmp_path)
    assert len(caught) == 1


def test_an_empty_lock_file_from_elsewhere_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / LOCK).write_bytes(b"")  # of a bundle that was copied to such a file system
    test_a_file_system_without_locks_is_told_in_one_line(tmp_path, monkeypatch, errno.ENOLCK)


def test_another_failure_of_locking_is_no_want_of_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="I/O error"), bundle_lock(tmp_path):
        pass


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder"])
@pytest.mark.parametrize("name", [LOCK, SOFT_LOCK])
@pytest.mark.filterwarnings("ignore::wanexport.runtime.errors.WanExportWarning")
def test_what_is_no_regular_file_is_refused_and_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    precious, lock = tmp_path / "precious", tmp_path / "bundle" / name
    precious.write_bytes(b"precious")
    lock.parent.mkdir()
    make: dict[str, Callable[[], object]] = {
        "link": lambda: lock.symlink_to(precious),
        "dangling": lambda: lock.symlink_to(tmp_path / "none"),
        "pipe": lambda: os.mkfifo(lock),
        "folder": lock.mkdir,
    }
    make[kind]()
    if name == SOFT_LOCK:

        def fail(*_: object) -> None:
            raise OSError(errno.ENOLCK, "no locks")

        monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(WanExportError, match=f"{name} is no regular file"):
        with bundle_lock(lock.parent):
            pass
    assert precious.read_bytes() == b"precious"
    assert os.path.lexists(lock) and not (tmp_path / "none").exists()


def test_a_lock_of_several_names_keeps_its_content(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    os.link(tmp_path / "precious", tmp_path / LOCK)
    with bundle_lock(tmp_path):
        pass
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_a_lock_that_a_writer_removed_excludes_all_the_same(tmp_path: Path) -> None:
    """Each of many writers removes the file when it gives up, as a failed build does."""
    inside, most, done = 0, 0, 0

    def write() -> None:
        nonlocal inside, most, done
        for _ in range(100):
            try:
                with bundle_lock(tmp_path):
                    inside += 1
                    most = max(most, inside)
                    time.sleep(0.0005)
                    inside -= 1
                    done += 1
                    (tmp_path / LOCK).unlink(missing_ok=True)
            except WanExportError:
                continue

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and done > 4


def test_one_that_waits_says_so_and_comes_next(tmp_path: Path) -> None:
    with held_by_another(tmp_path) as holder:
        threading.Timer(0.2, holder.kill).start()
        with pytest.warns(WanExportWarning, match="another .* is writing .*: waiting for it"):
            with bundle_lock(tmp_path, waits=True):
                assert not holder.is_alive()


def test_nobody_waits_for_himself(tmp_path: Path) -> None:
    with bundle_lock(tmp_path), pytest.warns(WanExportWarning, match="waiting"):
        with pytest.raises(WanExportError, match="another wanexport is writing"):
            with bundle_lock(tmp_path, waits=True):
                pass


def test_nobody_waits_for_a_lock_that_may_be_of_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", fail)
    (tmp_path / SOFT_LOCK).write_text("1\nanother-machine\n")
    message = r"wait for it to end, or delete .*\.lock\.soft if none is"
    with pytest.warns(WanExportWarning), pytest.raises(WanExportError, match=message):
        with bundle_lock(tmp_path, waits=True):
            pass
