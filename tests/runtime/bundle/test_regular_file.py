"""A reader neither waits for a pipe nor reads a device without end."""

import os
from pathlib import Path

import pytest

from wanexport.runtime.bundle.regular_file import read_regular
from wanexport.runtime.errors import BundleError


def test_a_file_is_read_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1234")
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "link", at_most=4) == b"1234"


def test_a_file_over_the_bound_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    with pytest.raises(BundleError, match="file is larger than 4 bytes"):
        read_regular(tmp_path / "file", at_most=4)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_regular_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = {"pipe": tmp_path / "pipe", "folder": tmp_path, "device": Path("/dev/zero")}[kind]
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(BundleError, match="is no regular file"):
        read_regular(path, at_most=4)
