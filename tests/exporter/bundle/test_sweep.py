"""A build removes what builds left, and nothing that it cannot know to be so."""

import os
from pathlib import Path

import pytest

from tests.exporter.bundle.stub_build import check_whole, empty, files_of, stub_build
from wanexport.exporter.bundle.sweep import MARK
from wanexport.exporter.bundle.writer import open_bundle
from wanexport.runtime.bundle.durable import durable_file
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.errors import WanExportWarning

OTHERS = [  # what no build made, in all depths
    "weights/notes.txt",
    "weights/fp32/mine.safetensors",
    "weights/mine/deep/er/x.bin",
    "engines/64x96x9/onnx-fp32/denoiser.onnx.data",
    "engines/64x96x9/onnx-fp32.7/denoiser.onnx",
]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    stub_build(tmp_path / "bundle")
    return tmp_path / "bundle"


def put(path: Path, content: bytes = b"precious") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("version", ["1", "2"])  # nothing to do, and an engine to replace
def test_what_no_build_made_is_left_and_named(bundle: Path, version: str) -> None:
    for name in OTHERS:
        put(bundle / name)
    with pytest.warns(WanExportWarning) as caught:
        stub_build(bundle, version=version)
    assert {name for name in OTHERS if (bundle / name).read_bytes() == b"precious"} == set(OTHERS)
    told = str(caught[0].message)
    assert told.startswith(f"left alone in {bundle}, as no build made it or may remove it: ")
    assert set(told.partition("it: ")[2].split(", ")) == set(OTHERS)
    files = {file.path for file in read_manifest(bundle).files()}
    assert files_of(bundle) == files | set(OTHERS) | {"manifest.json", ".lock"}


def test_a_long_list_of_what_is_left_is_cut_and_shown_safely(bundle: Path) -> None:
    put(bundle / "weights" / "a\nb")
    for number in range(9):
        put(bundle / "weights" / f"{number}")
    with pytest.warns(WanExportWarning, match="weights/4 and 5 more") as caught:
        stub_build(bundle)
    assert "\n" not in str(caught[0].message)


def test_links_and_pipes_are_left_and_what_they_lead_to(bundle: Path, tmp_path: Path) -> None:
    elsewhere = put(tmp_path / "elsewhere" / "x.0123abcd.partial").parent
    put(elsewhere / "denoiser.onnx")
    names = ["weights/link", "engines/link", "engines/64x96x9/link", "weights/fp32/link"]
    for name in names:
        (bundle / name).symlink_to(elsewhere)
    (bundle / "weights" / "file.0123abcd.partial").symlink_to(elsewhere / "denoiser.onnx")
    os.mkfifo(bundle / "engines" / "pipe.0123abcd.partial")
    with pytest.warns(WanExportWarning, match="left alone"):
        stub_build(bundle, version="2")
    assert all((bundle / name).is_symlink() for name in names)
    assert sorted(os.listdir(elsewhere)) == ["denoiser.onnx", "x.0123abcd.partial"]
    assert (elsewhere / "denoiser.onnx").read_bytes() == b"precious"


def test_a_replaced_engine_goes_and_other_files_of_its_folder_stay(bundle: Path) -> None:
    old = read_manifest(bundle).engines[0].files["denoiser"].path
    mine = put(bundle / Path(old).parent / "mine")
    with pytest.warns(WanExportWarning, match="left alone"):
        stub_build(bundle, version="2")
    assert not (bundle / old).exists() and mine.exists()


def test_an_engine_goes_where_no_folder_is(bundle: Path) -> None:
    mine = put(bundle / "engines" / "32x96x9" / "onnx-fp32" / "denoiser.onnx")
    with pytest.warns(WanExportWarning, match="left alone"):
        engine = stub_build(bundle, height=32).engines[1]
    assert engine.files["denoiser"].path == "engines/32x96x9/onnx-fp32.2/denoiser.onnx"
    assert mine.read_bytes() == b"precious"


def test_all_in_a_folder_that_a_killed_build_made_goes(bundle: Path) -> None:
    folder = bundle / "engines" / "32x96x9" / "onnx-fp32"
    for name in (MARK, "denoiser.onnx", "plan-xyz/denoiser.onnx", "job.json"):
        put(folder / name, b"")
    check_whole(bundle, stub_build(bundle, height=32))
    assert not list(bundle.rglob(MARK))


def test_leftovers_go_everywhere_but_where_one_is_being_written(bundle: Path) -> None:
    leftovers = [
        f"{name}.0123abcd.partial"
        for name in ("manifest.json", "manifest.partial.json", "weights/x", "weights/fp32/x",
                     "engines/x", "engines/64x96x9/onnx-fp32/x", "reports/x", "cache/x")
    ]  # fmt: skip
    for name in leftovers:
        put(bundle / name)
    with durable_file(put(bundle / "reports" / "mine.json")):
        being_written = files_of(bundle) & {
            name for name in files_of(bundle) if name not in leftovers and name.endswith("partial")
        }
        stub_build(bundle)
        assert not files_of(bundle) & set(leftovers)
        assert being_written <= files_of(bundle) and len(being_written) == 1
    assert files_of(bundle / "reports") == {"mine.json"}


def test_a_hard_link_loses_its_name_at_most(bundle: Path, tmp_path: Path) -> None:
    weights = read_manifest(bundle).weights["fp32"].file.path
    content = (bundle / weights).read_bytes()
    os.link(bundle / weights, tmp_path / "weights")
    os.link(bundle / "manifest.json", tmp_path / "manifest")
    os.link(put(tmp_path / "precious"), bundle / "manifest.json.0123abcd.partial")
    before = (tmp_path / "manifest").read_bytes()
    stub_build(bundle, version="2")
    assert (tmp_path / "weights").read_bytes() == content
    assert (tmp_path / "manifest").read_bytes() == before
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_folders_nested_without_end_are_left(bundle: Path) -> None:
    deep = bundle / "weights" / "/".join("d" * 100)
    put(deep / "x")
    with pytest.warns(WanExportWarning, match="left alone"):
        stub_build(bundle)
    assert (deep / "x").exists()


def test_a_failure_to_clear_up_says_that_the_bundle_is_written(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink

    def fail(path: Path, missing_ok: bool = False) -> None:
        if path.name == "manifest.partial.json":
            raise OSError(5, "Input/output error", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", fail)
    with pytest.raises(ValueError, match=r"is written and holds what was built, but clearing up "):
        stub_build(bundle, version="2")
    monkeypatch.undo()
    assert read_manifest(bundle).engines[0].key != "1"
    check_whole(bundle, stub_build(bundle, version="2"))


def test_a_build_that_fails_forgets_nothing_that_it_finished(bundle: Path) -> None:
    before = read_manifest(bundle)
    with pytest.raises(KeyboardInterrupt), open_bundle(bundle, empty()) as writer:
        put(writer.free_folder(Path("engines/1x1x1/onnx-fp32")) / "denoiser.onnx")
        raise KeyboardInterrupt
    check_whole(bundle, before)


def test_an_empty_folder_of_the_users_stays(tmp_path: Path) -> None:
    stub_build(tmp_path / "b")
    (tmp_path / "b" / "weights" / "mine" / "empty").mkdir(parents=True)
    stub_build(tmp_path / "b", version="2")
    assert (tmp_path / "b" / "weights" / "mine" / "empty").is_dir()
