"""What was checked is what is opened; every other thing in a file's place is one line."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from wanexport.runtime.bundle.check import check_content, check_weights, file_sha256
from wanexport.runtime.bundle.manifest import FileRecord, WeightsRecord
from wanexport.runtime.bundle.pinned_file import pin
from wanexport.runtime.errors import BundleError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    return path


def rewrite(path: Path) -> None:
    """Other content of the same size in the same file."""
    before = path.stat().st_mtime_ns
    path.write_bytes(b"CONTENT")
    os.utime(path, ns=(before, before + 1))


def replace(path: Path) -> None:
    """Another file of the same content, size and time."""
    copy, times = path.with_name("copy"), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=times)
    copy.replace(path)


def lead_elsewhere(path: Path) -> None:
    target = path.with_name("target")
    path.replace(target)
    copy = target.with_name("copy")
    copy.write_bytes(target.read_bytes())
    path.symlink_to(copy)


def put_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def put_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


CHANGES = [rewrite, replace, lead_elsewhere, Path.unlink, put_a_folder, put_a_pipe]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_refused_before_it_is_read(
    change: Callable[[Path], None], file: Path
) -> None:
    pinned = pin(file)
    change(file)
    with pytest.raises(BundleError) as caught, pinned.opened():
        raise AssertionError("it was opened")
    assert str(caught.value).startswith((f"{file} ", f"cannot read {file} "))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_while_it_is_read_is_refused_after_it(
    change: Callable[[Path], None], file: Path
) -> None:
    with pytest.raises(BundleError, match=f"{file} "), pin(file).opened() as descriptor:
        assert os.pread(descriptor, 7, 0) == b"content"
        change(file)


def test_a_file_that_moves_with_its_links_is_the_same(file: Path) -> None:
    link = file.with_name("link")
    link.symlink_to(file)
    pinned = pin(link)
    target = file.rename(file.with_name("elsewhere"))
    link.unlink()
    link.symlink_to(target)
    with pinned.opened() as descriptor:
        assert os.pread(descriptor, 7, 0) == b"content"


def test_bytes_are_those_that_were_hashed(file: Path) -> None:
    pinned = check_content(file.parent, FileRecord("file", 7, file_sha256(file)))
    assert pinned.read() == b"content"
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    file.write_bytes(b"CONTENT")
    os.utime(file, ns=times)  # as one does who wants it to go unnoticed
    with pytest.raises(BundleError, match="was changed since it was checked"):
        pinned.read()


@pytest.mark.parametrize("check", ["engine", "weights"])
@pytest.mark.parametrize(
    ("put", "message"),
    [
        (put_a_folder, "is no regular file"),
        (put_a_pipe, "is no regular file"),
        (Path.unlink, "is missing from the bundle"),
        (lambda path: (path.unlink(), path.symlink_to("nowhere")), "is missing from the bundle"),
        (lambda path: (path.unlink(), path.symlink_to(path)), "Too many levels of symbolic links"),
    ],
)
def test_what_is_no_file_is_one_line_that_names_it(
    put: Callable[[Path], None], message: str, check: str, file: Path
) -> None:
    put(file)
    with pytest.raises(BundleError, match=f"{file} .*{message}") as caught:
        run(check, file.parent, FileRecord("file", 7, "0" * 64))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("check", ["engine", "weights"])
def test_a_name_that_is_too_long_is_one_line(check: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"^cannot read .*File name too long"):
        run(check, tmp_path, FileRecord("x" * 300, 7, "0" * 64))


@pytest.mark.parametrize("check", ["engine", "weights"])
def test_a_file_that_may_not_be_read_is_one_line(
    check: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: object, **__: object) -> int:  # root may read anything
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(BundleError, match=f"^cannot read {file} .Permission denied"):
        run(check, file.parent, FileRecord("file", 7, "0" * 64))


def run(check: str, bundle: Path, record: FileRecord) -> None:
    if check == "engine":
        check_content(bundle, record)
    else:
        layout = "0" * 64
        weights = WeightsRecord("base", "denoiser", "", "fp32", layout, record, "", {})
        check_weights(bundle, weights)
