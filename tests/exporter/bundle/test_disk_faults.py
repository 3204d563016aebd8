"""Kills at every file operation of a build, and a full disk at every write, lose nothing."""

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest

from tests.exporter.bundle.disk_faults import dies_at, full_after, full_at_name
from tests.exporter.bundle.stub_build import check_readable, check_whole, files_of, stub_build
from tests.quick import slow_but
from tests.unsynced import spare_the_disk
from wanexport.runtime.bundle.manifest import Manifest, read_manifest
from wanexport.runtime.errors import WanExportError

Work = Callable[[Path], None]


@pytest.fixture(scope="module")
def small_process() -> Iterator[Callable[[Work, Path], None]]:
    """Does work in a small process: each of its many forks would copy the tables of a large one."""
    with ProcessPoolExecutor(1, get_context("spawn"), spare_the_disk) as pool:
        yield lambda work, folder: pool.submit(work, folder).result()


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A bundle with one engine, which the builds of these tests replace."""
    return build_old(tmp_path)


def build_old(folder: Path) -> Path:
    stub_build(folder / "old")
    return folder / "old"


def copy_of(old: Path) -> Path:
    bundle = old.with_name("bundle")
    shutil.rmtree(bundle, ignore_errors=True)
    shutil.copytree(old, bundle)
    return bundle


def held(bundle: Path) -> Manifest | None:
    """The manifest, whose files are all there; None where there is none yet."""
    if not (bundle / "manifest.json").exists():
        return None
    manifest = read_manifest(bundle)
    check_readable(bundle, manifest)
    return manifest


def kill_replacing(folder: Path, every: int) -> None:
    old = build_old(folder)
    before, bundle, point = read_manifest(old), copy_of(old), 1
    while dies_at(point, partial(stub_build, bundle, version="2")):
        seen = held(bundle)
        assert seen is not None
        assert seen == before or seen.engines[0].key != before.engines[0].key
        check_whole(bundle, stub_build(bundle, version="2"))
        point, bundle = point + every, copy_of(old)
    check_whole(bundle, read_manifest(bundle))
    assert point > 50


def kill_first(folder: Path, every: int) -> None:
    bundle, point = folder / "bundle", 1
    while dies_at(point, partial(stub_build, bundle)):
        held(bundle)
        check_whole(bundle, stub_build(bundle))
        shutil.rmtree(bundle)
        point += every
    assert point > 50


def kill_failing(folder: Path, every: int) -> None:
    bundle, point = folder / "bundle", 1

    def fails() -> None:
        with pytest.raises(WanExportError), full_after(5000):
            stub_build(bundle)

    while dies_at(point, fails):
        check_whole(bundle, stub_build(bundle))
        shutil.rmtree(bundle)
        point += every
    assert point > 50


@pytest.mark.parametrize("every", slow_but([1, 7], 7))
@pytest.mark.parametrize("work", [kill_replacing, kill_first, kill_failing])
def test_a_kill_at_any_operation_leaves_the_old_bundle_or_the_new(
    work: Callable[[Path, int], None],
    every: int,
    small_process: Callable[[Work, Path], None],
    tmp_path: Path,
) -> None:
    """Nor does it bar the next build."""
    small_process(partial(_every, work, every), tmp_path)


def _every(work: Callable[[Path, int], None], every: int, folder: Path) -> None:
    work(folder, every)


@pytest.mark.parametrize("free", [0, 1, 100, 1000, 2000, 4000, 60_000, 70_000, 72_000, 74_000])
def test_a_full_disk_at_any_byte_is_one_line_and_loses_nothing(old: Path, free: int) -> None:
    bundle, before = copy_of(old), read_manifest(old)
    with full_after(free):
        try:
            stub_build(bundle, version="2")
        except WanExportError as error:
            assert str(bundle) in str(error)
            assert "No space left on device: free space on its disk" in str(error)
            assert "\n" not in str(error)
        else:
            assert free > 70_000
    if held(bundle) == before:  # what was finished stays for the next try, and nothing else
        journal = bundle / "manifest.partial.json"
        kept = read_manifest(bundle, journal.name).files() if journal.exists() else []
        left = files_of(bundle) - files_of(old) - {file.path for file in kept}
        assert left <= {journal.name, "manifest.replaced.json"}
    check_whole(bundle, stub_build(bundle, version="2"))


@pytest.mark.parametrize("is_new", [True, False])
def test_no_room_for_a_name_is_one_line_and_leaves_nothing(old: Path, is_new: bool) -> None:
    point, was_asked = 0, True
    while was_asked:
        bundle, point = copy_of(old), point + 1
        if is_new:
            shutil.rmtree(bundle)
        with full_at_name(point) as asked:
            try:
                stub_build(bundle, version="2")
            except WanExportError as error:
                assert str(old.parent) in str(error)
                assert "No space left on device" in str(error)
            was_asked = asked()
        if is_new and was_asked and not (bundle / "manifest.json").exists():
            left = files_of(bundle)
            assert not left or "manifest.partial.json" in left
            assert left or not os.path.lexists(bundle)
        assert not [name for name in files_of(bundle) if name.endswith(".partial")]
        assert is_new or held(bundle) is not None
        check_whole(bundle, stub_build(bundle, version="2"))
    assert point > 10
