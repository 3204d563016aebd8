"""Files that are written appear whole, and no other file is touched."""

import errno
import fcntl
import os
import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from wanexport.runtime.bundle import durable
from wanexport.runtime.bundle.durable import (
    durable_file,
    fsync_folder,
    is_partial,
    own_folder,
    remove_partials,
    write_durably,
)
from wanexport.runtime.errors import WanExportError, explain


def failing(number: int) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    path, wrong = tmp_path / "x", []

    def write(content: bytes) -> None:
        for _ in range(100):
            write_durably(path, content)
            if len(set(path.read_bytes())) != 1:
                wrong.append(path.read_bytes())

    threads = [threading.Thread(target=write, args=(letter * 20_000,)) for letter in (b"A", b"B")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert os.listdir(tmp_path) == ["x"]
    assert path.stat().st_size == 20_000


def test_a_file_has_the_mode_of_any_new_file(tmp_path: Path) -> None:
    write_durably(tmp_path / "ours", b"")
    (tmp_path / "any").write_bytes(b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "any").stat().st_mode


@pytest.mark.parametrize("name", ["x" * 255, "\u00e9" * 127, "\udcff" * 255])
def test_the_longest_names_can_be_written(tmp_path: Path, name: str) -> None:
    write_durably(tmp_path / name, b"content")
    assert os.listdir(tmp_path) == [name]


def test_unfinished_files_are_known_by_their_names(tmp_path: Path) -> None:
    with durable_file(tmp_path / "x.json") as file:
        names = os.listdir(tmp_path)
        assert file.name == str(tmp_path / names[0])
    assert len(names) == 1 and is_partial(names[0])
    users = ("x.json", "x.partial", "x.json.partial", "x.0123abcd", "x.0123ABCD.partial")
    assert not any(map(is_partial, users))


def test_a_link_is_replaced_and_its_target_left(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "link").symlink_to("target")
    os.link(tmp_path / "target", tmp_path / "hard")
    for name in ("link", "hard"):
        write_durably(tmp_path / name, b"new")
        assert (tmp_path / name).read_bytes() == b"new"
        assert not (tmp_path / name).is_symlink()
    assert (tmp_path / "target").read_bytes() == b"precious"


def test_a_failed_write_leaves_nothing_and_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left") as caught:
        write_durably(path, b"new")
    assert caught.value.filename == str(path)
    assert explain(caught.value).startswith(f"{path}: No space left on device: free space")
    assert os.listdir(tmp_path) == ["x"] and path.read_bytes() == b"old"


@pytest.mark.parametrize("place", ["none/x", "folder", "file/x"])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError) as caught:
        write_durably(tmp_path / place, b"")
    assert caught.value.filename == str(tmp_path / place)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EPERM, errno.ENOTSUP, errno.EACCES])
@pytest.mark.parametrize("call", ["open", "fsync"])
def test_a_folder_that_cannot_be_synced_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    monkeypatch.setattr(os, call, failing(number))
    fsync_folder(tmp_path)


def test_a_file_that_may_not_last_is_said_to_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "fsync_folder", failing(errno.EIO))
    with pytest.raises(WanExportError, match=r"/x is written, but .*Input/output error"):
        write_durably(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new"


def test_only_what_no_process_writes_is_removed(tmp_path: Path) -> None:
    dead = tmp_path / "x.0123abcd.partial"
    for name in (dead.name, "mine.partial", "mine.json"):
        (tmp_path / name).write_bytes(b"")
    with durable_file(tmp_path / "x") as file:
        remove_partials(tmp_path)
        file.write(b"content")
    assert sorted(os.listdir(tmp_path)) == ["mine.json", "mine.partial", "x"]
    assert (tmp_path / "x").read_bytes() == b"content"


def test_without_locks_only_what_is_old_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    write_durably(tmp_path / "x", b"content")
    for name, age in (("old.0123abcd.partial", 25), ("new.0123abcd.partial", 23)):
        (tmp_path / name).write_bytes(b"")
        then = time.time() - 3600 * age
        os.utime(tmp_path / name, (then, then))
    remove_partials(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["new.0123abcd.partial", "x"]


def test_links_pipes_and_folders_are_no_leftovers(tmp_path: Path) -> None:
    names = [f"{kind}.0123abcd.partial" for kind in ("link", "pipe", "folder")]
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / names[0]).symlink_to("target")
    os.mkfifo(tmp_path / names[1])
    (tmp_path / names[2]).mkdir()
    remove_partials(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "target"])
    assert stat.S_ISFIFO((tmp_path / names[1]).stat().st_mode)


def test_no_leftovers_are_looked_for_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.0123abcd.partial").write_bytes(b"")
    (tmp_path / "link").symlink_to("elsewhere")
    remove_partials(tmp_path / "link")
    remove_partials(tmp_path / "nowhere")
    assert os.listdir(tmp_path / "elsewhere") == ["x.0123abcd.partial"]
    with pytest.raises(WanExportError, match="link is a link: put a folder in its place"):
        own_folder(tmp_path, "link")
