"""A folder for temporary files that would fail in the middle is refused before the work."""

import os
import time
from pathlib import Path
from unittest.mock import Mock

import pytest

from wanexport.exporter.build import build
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.machine.temporary import check_temporary_folder, marked_folder


def statvfs(free: int = 1 << 30, flags: int = 0) -> Mock:
    return Mock(return_value=Mock(f_bavail=free // 4096, f_frsize=4096, f_flag=flags))


@pytest.mark.parametrize("variable", ["TMPDIR", "TEMP", "TMP"])
def test_one_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "none"))
    with pytest.raises(WanExportError) as caught:
        check_temporary_folder()
    assert str(caught.value) == (
        f"temporary files go to {tmp_path / 'none'} ({variable}), which does not exist: "
        f"set TMPDIR to a folder with room"
    )


def test_one_that_is_a_file_or_may_not_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "file"))
    with pytest.raises(WanExportError, match=r"file \(TMPDIR\), which is a file: set TMPDIR"):
        check_temporary_folder()
    monkeypatch.setenv("TMPDIR", "/proc/self")  # which root may not write either
    monkeypatch.setattr(os, "statvfs", statvfs())
    with pytest.raises(WanExportError, match=r"/proc/self \(TMPDIR\), which cannot be written"):
        check_temporary_folder()


def test_one_that_is_full_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(os, "statvfs", statvfs(free=1 << 19))
    with pytest.raises(WanExportError, match=r"full: 1 MB are needed, 0\.5 MB are free: set TMPD"):
        check_temporary_folder()
    monkeypatch.setattr(os, "statvfs", statvfs(free=2 << 20))
    check_temporary_folder()
    with pytest.raises(WanExportError, match="full: 16 MB are needed"):
        check_temporary_folder(runs_code=True)
    with pytest.raises(WanExportError, match="full: 128 MB are needed"):
        check_temporary_folder(compiles=True)


def test_one_that_runs_no_code_is_refused_where_code_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(os, "statvfs", statvfs(flags=os.ST_NOEXEC))
    check_temporary_folder()
    for asked in ({"runs_code": True}, {"compiles": True}):
        with pytest.raises(WanExportError, match=r"noexec: .*set TMPDIR to a folder that may run"):
            check_temporary_folder(**asked)


def test_a_build_asks_before_its_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    with pytest.raises(WanExportError, match="which does not exist"):
        build("tiny", random_weights=0, resolution="64x96", frames=9, output=tmp_path / "b")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("backend", ["onnx", "aoti"])
def test_only_a_build_of_compiled_code_needs_a_folder_that_runs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr(os, "statvfs", statvfs(flags=os.ST_NOEXEC))
    expected = "noexec" if backend == "aoti" else "is no preset"
    with pytest.raises(WanExportError, match=expected):
        build(
            "no preset", random_weights=0, resolution="64x96", frames=9, output=tmp_path / "b",
            backends=[backend], device="cpu",
        )  # fmt: skip


def test_what_killed_processes_left_a_day_ago_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for name in ("wanexport-old", "wanexport-new", "wanexport-used", "wanexport-mine", "other"):
        (tmp_path / name / "inside").mkdir(parents=True)
        if name != "wanexport-mine":  # a user's own: it has the name and not the mark
            (tmp_path / name / ".wanexport-temporary").touch()
        (tmp_path / name / "inside" / "file").write_bytes(b"")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "wanexport-link").symlink_to("elsewhere")
    then = time.time() - 25 * 3600
    for path in [*tmp_path.rglob("*"), tmp_path / "other"]:
        if "new" not in str(path) and path.name != "wanexport-link":
            os.utime(path, (then, then))
    (tmp_path / "wanexport-used" / "inside" / "file").write_bytes(b"")
    check_temporary_folder()
    left = ["elsewhere", "other"]
    left += [f"wanexport-{name}" for name in ("link", "mine", "new", "used")]
    assert sorted(os.listdir(tmp_path)) == left


def test_a_marked_folder_is_one_that_is_removed_a_day_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with marked_folder() as folder:
        then = time.time() - 25 * 3600
        for path in (folder, *folder.iterdir()):
            os.utime(path, (then, then))
        check_temporary_folder()
        assert not folder.exists()


def test_one_whose_name_is_too_long_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/tmp/" + "x" * 300)
    with pytest.raises(WanExportError, match=r"which cannot be used \(File name too long\): set"):
        check_temporary_folder()
