"""A build refuses what is no bundle of real files, before its work, and touches nothing there."""

import os
import shutil
from pathlib import Path

import pytest

from tests.exporter.bundle.stub_build import check_whole, empty, files_of, stub_build
from wanexport.exporter.build import build
from wanexport.exporter.bundle.place import check_place
from wanexport.exporter.bundle.writer import open_bundle
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.errors import WanExportError

PLACES = [
    ".lock",
    ".lock.soft",
    "manifest.json",
    "manifest.partial.json",
    "manifest.replaced.json",
    "weights",
    "weights/fp32",
    "weights/fp32/denoiser.safetensors",
    "engines",
    "engines/64x96x9",
    "engines/64x96x9/onnx-fp32",
    "engines/64x96x9/onnx-fp32/denoiser.onnx",
    "cache",
    "reports",
]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    stub_build(tmp_path / "bundle")
    return tmp_path / "bundle"


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files_of(folder)}


@pytest.mark.parametrize("place", PLACES)
def test_a_bundle_that_lies_elsewhere_too_is_not_written(bundle: Path, place: str) -> None:
    elsewhere, path = bundle.with_name("elsewhere"), bundle / place
    if os.path.lexists(path):
        path.rename(elsewhere)
    elif place in ("cache", "reports"):
        elsewhere.mkdir()
    else:
        elsewhere.write_bytes(b"precious")
    if elsewhere.is_dir():
        (elsewhere / "precious").write_bytes(b"precious")
        (elsewhere / "x.0123abcd.partial").write_bytes(b"precious")
    path.symlink_to(elsewhere)
    before = contents(bundle.parent)
    with pytest.raises(WanExportError) as caught:
        stub_build(bundle, version="2")
    lock = place.startswith(".lock")
    expected = "is no regular file, which" if lock else "is a link, and a build writes no bundle"
    assert f"{path} {expected}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(bundle.parent) == before


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["pipe", "other"])
def test_what_a_bundle_does_not_have_there_is_refused(bundle: Path, place: str, kind: str) -> None:
    path = bundle / place
    was_folder = path.is_dir() or place in ("cache", "reports")
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif was_folder:
        path.write_bytes(b"precious")
    else:
        path.mkdir()
    if place == "manifest.json":
        with pytest.raises(WanExportError):
            stub_build(bundle)
        return
    with pytest.raises(
        WanExportError, match=f"{path} is no (regular file|folder), which a bundle has"
    ) as caught:
        stub_build(bundle, version="2")
    assert "\n" not in str(caught.value)
    assert os.path.lexists(path)


def test_a_snapshot_of_the_hubs_cache_is_refused_before_the_work(
    bundle: Path, tmp_path: Path
) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    for number, name in enumerate(sorted(files_of(bundle) - {".lock"})):
        (bundle / name).rename(blobs / str(number))
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blobs / str(number), (snapshot / name).parent))
    before = contents(tmp_path)
    with pytest.raises(WanExportError, match=r"manifest\.json is a link, .* cp -rL .* with -o"):
        build("no/such-model", resolution="64x96", frames=9, output=snapshot)
    assert contents(tmp_path) == before


def test_a_bundle_may_itself_be_a_link_to_a_folder(bundle: Path) -> None:
    link = bundle.with_name("link")
    link.symlink_to(bundle)
    (bundle / "manifest.json.0123abcd.partial").write_bytes(b"half")
    check_whole(bundle, stub_build(link, version="2"))
    assert link.is_symlink()


def test_a_folder_that_may_not_be_written_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for place in (tmp_path, tmp_path / "new" / "bundle"):
        with pytest.raises(WanExportError, match=f"^{tmp_path} cannot be written: name another"):
            build("no/such-model", resolution="64x96", frames=9, output=place)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["x" * 300, "file", "file/inside", "dangling", "pipe"])
def test_what_can_be_no_folder_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "dangling").symlink_to("none")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(WanExportError, match=r"name a.* folder with -o$"):
        with open_bundle(tmp_path / name, empty()):
            pass
    assert sorted(os.listdir(tmp_path)) == ["dangling", "file", "pipe"]


@pytest.mark.parametrize(
    "name", ["manifest.partial.json.0123abcd.partial", "manifest.partial.json.partial", ".lock"]
)
def test_a_build_killed_before_its_journal_was_written_is_gone_on_from(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_bytes(b'{"half')
    check_whole(tmp_path, stub_build(tmp_path))


@pytest.mark.parametrize("name", ["x.0123abcd.partial", "notes.txt", "manifest.json.backup"])
def test_a_folder_with_files_of_others_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(WanExportError, match="exists and is no bundle"):
        check_place(tmp_path)


def test_an_unreadable_journal_bars_nothing(bundle: Path) -> None:
    for name in ("manifest.partial.json", "manifest.replaced.json"):
        (bundle / name).write_text("{")
    check_whole(bundle, stub_build(bundle, version="2"))
    assert read_manifest(bundle).engines[0].files["denoiser"].path.startswith("engines/64x96x9/")
