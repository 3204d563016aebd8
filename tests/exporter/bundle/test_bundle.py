"""A writer that is killed or fails leaves the old bundle, the new one, or none."""

import errno
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.exporter.bundle.stub_build import _weights as stub_weights
from tests.exporter.bundle.stub_build import empty, stub_build
from tests.runtime.bundle.small_bundle import manifest_of, put, small_bundle
from wanexport.exporter.bundle import writer as module
from wanexport.exporter.bundle.place import JOURNAL
from wanexport.exporter.bundle.sweep import mark
from wanexport.exporter.bundle.writer import open_bundle, write_manifest
from wanexport.runtime.bundle.manifest import Manifest, read_manifest
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.load import load


class Killed(BaseException):
    """Stands for Ctrl-C."""


def empty_like(manifest: Manifest) -> Manifest:
    return replace(manifest, weights={}, engines=())


def test_a_failure_with_nothing_finished_leaves_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "bundle"
    path.parent.mkdir()
    with pytest.raises(Killed), open_bundle(path, empty_like(read_manifest(tiny_bundle))) as writer:
        (writer.free_folder(Path("weights/fp32")) / "x.partial").write_text("half")
        raise Killed
    assert list((tmp_path / "new").iterdir()) == []


def test_a_failure_keeps_the_old_bundle_and_the_finished_parts(bundle: Path) -> None:
    old = read_manifest(bundle)
    with pytest.raises(Killed), open_bundle(bundle, empty_like(old)) as writer:
        folder = writer.free_folder(Path("weights/fp32"))
        assert folder.name == "fp32.2"
        (folder / "denoiser.safetensors").write_bytes(b"half")
        raise Killed
    assert read_manifest(bundle) == old
    assert not (bundle / "weights" / "fp32.2").exists()
    load(bundle)


def test_what_a_killed_build_left_is_swept_or_resumed(bundle: Path) -> None:
    whole = read_manifest(bundle)
    write_manifest(bundle, whole, JOURNAL)  # as if killed just before the commit
    (bundle / "manifest.json").unlink()
    stray = bundle / "engines" / "64x96x9" / "onnx-fp32.2" / "denoiser.onnx"
    stray.parent.mkdir()
    mark(stray.parent)
    stray.write_bytes(b"half")
    (bundle / "manifest.json.partial").write_bytes(b"half")
    with pytest.raises(WanExportError, match="is no bundle"):
        load(bundle)
    with open_bundle(bundle, empty_like(whole)) as writer:
        assert not stray.parent.exists()
        assert not (bundle / "manifest.json.partial").exists()
        for label, weights in whole.weights.items():
            assert writer.find_weights(label, weights.layout) == weights
            assert writer.find_weights(label, "another layout") is None
            writer.put_weights(label, weights)
        for engine in whole.engines:
            assert writer.find_engine(engine.key) == engine
            writer.put_engine(engine)
        assert writer.find_engine("another key") is None
        writer.commit()
    assert read_manifest(bundle) == whole
    assert not (bundle / JOURNAL).exists()


def test_a_second_interruption_forgets_nothing(bundle: Path) -> None:
    whole = read_manifest(bundle)
    write_manifest(bundle, whole, JOURNAL)
    (bundle / "manifest.json").unlink()
    for _ in range(2):
        with pytest.raises(Killed), open_bundle(bundle, empty_like(whole)) as writer:
            writer.put_weights("fp32", whole.weights["fp32"])
            raise Killed
    with open_bundle(bundle, empty_like(whole)) as writer:
        assert writer.journal.weights == whole.weights
        assert writer.find_engine(whole.engines[0].key) == whole.engines[0]


def test_an_interrupt_inside_the_commit_leaves_the_new_bundle(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = read_manifest(bundle)
    record = old.weights["fp32"]

    def interrupted(path: Path, missing_ok: bool = False) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), open_bundle(bundle, empty_like(old)) as writer:
        folder = writer.free_folder(Path("weights/fp32"))
        new = folder / "denoiser.safetensors"
        shutil.copy(bundle / record.file.path, new)
        file = replace(record.file, path=new.relative_to(bundle).as_posix())
        writer.put_weights("fp32", replace(record, file=file))
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", interrupted)
            writer.commit()
    assert read_manifest(bundle).weights["fp32"].file == file
    load(bundle)


def test_damaged_parts_are_not_reused(bundle: Path) -> None:
    whole = read_manifest(bundle)
    engine, weights = whole.engines[0], whole.weights["fp32"]
    for file in (*engine.files.values(), weights.file):
        with (bundle / file.path).open("r+b") as handle:
            handle.truncate(file.size - 1)
    with open_bundle(bundle, empty_like(whole)) as writer:
        assert writer.find_engine(engine.key) is None
        assert writer.find_weights("fp32", weights.layout) is None


def test_an_unreadable_journal_costs_only_its_work(bundle: Path) -> None:
    (bundle / JOURNAL).write_text("{")
    with open_bundle(bundle, empty_like(read_manifest(bundle))) as writer:
        writer.commit()
    load(bundle)


def test_a_folder_with_only_a_lock_and_other_files_is_refused(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "precious.bin").write_text("")
    (tmp_path / ".lock").write_text("")
    empty = empty_like(read_manifest(tiny_bundle))
    with pytest.raises(WanExportError, match="is no bundle"), open_bundle(tmp_path, empty):
        pass
    assert (tmp_path / "weights" / "precious.bin").exists()


def test_a_failure_removes_the_folders_it_made_and_no_other(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = empty_like(read_manifest(tiny_bundle))
    (tmp_path / "mine").mkdir()
    (tmp_path / "link").symlink_to("mine")
    monkeypatch.chdir(tmp_path / "mine")
    for path in (Path("."), tmp_path / "mine", tmp_path / "link", tmp_path / "new" / "a" / "b"):
        with pytest.raises(Killed), open_bundle(path, empty):
            raise Killed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "mine"]
    assert not list((tmp_path / "mine").iterdir())


@pytest.mark.parametrize("name", ["x" * 300, "file/inside"])
def test_a_folder_that_cannot_be_made_is_one_line(
    name: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    empty = empty_like(read_manifest(tiny_bundle))
    with pytest.raises(WanExportError, match="name another folder with -o"):
        with open_bundle(tmp_path / name, empty):
            pass


def test_weights_of_a_failed_try_do_not_bind_the_next(bundle: Path) -> None:
    whole = read_manifest(bundle)
    write_manifest(bundle, whole, JOURNAL)
    (bundle / "manifest.json").unlink()
    with open_bundle(bundle, empty_like(whole)) as writer:
        writer.forget_weights("fp32")
        assert set(writer.journal.weights) == {"fp16", "bf16"}
        assert not writer.journal.engines
        assert not (bundle / whole.weights["fp32"].file.path).exists()
        writer.commit()


def test_new_folders_are_numbered_where_the_name_is_taken(bundle: Path) -> None:
    with open_bundle(bundle, empty_like(read_manifest(bundle))) as writer:
        assert writer.free_folder(Path("weights/fp32")).name == "fp32.2"
        assert writer.free_folder(Path("weights/new")).name == "new"


def test_of_two_engines_of_a_key_the_one_proven_in_full_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wanexport.exporter.bundle.writer.why_unusable", lambda *_: "")
    manifest = stub_build(tmp_path / "b")
    ends = manifest.engines[0]
    full = replace(ends, proof={**ends.proof, "verify": "full"})
    with open_bundle(tmp_path / "b", empty()) as writer:
        writer.committed = replace(manifest, engines=(ends,))
        writer.journal = replace(manifest, engines=(full,))
        assert writer.find_engine(ends.key) == full
        writer.committed, writer.journal = writer.journal, writer.committed
        assert writer.find_engine(ends.key) == full


def test_a_journal_that_cannot_be_read_loses_nothing_of_what_it_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Killed), open_bundle(tmp_path / "b", empty()) as writer:
        writer.put_weights("fp32", stub_weights(writer))
        raise Killed
    before = {path.name for path in (tmp_path / "b").rglob("*")}
    assert "denoiser.safetensors" in before
    read = read_manifest

    def fail(bundle: Path, name: str = "manifest.json") -> Manifest:
        if name != JOURNAL:
            return read(bundle, name)
        raise WanExportError("cannot read it") from OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(module, "read_manifest", fail)
    with pytest.raises(WanExportError, match="cannot read it"):
        with open_bundle(tmp_path / "b", empty()):
            pass
    assert {path.name for path in (tmp_path / "b").rglob("*")} == before


def test_an_engine_that_cannot_be_read_is_replaced_by_one_of_its_name(tmp_path: Path) -> None:
    """What a later version made of another kind stays, whatever its name."""
    bundle = small_bundle(tmp_path / "bundle", "onnx", "aoti")
    whole, data = read_manifest(bundle), manifest_of(bundle)
    later = {**data["engines"][0], "role": "upscaler", "program": None}
    del data["engines"][0]["program"]
    put(bundle, {**data, "engines": [*data["engines"], later]})
    assert len(read_manifest(bundle).unread) == 2
    with open_bundle(bundle, empty_like(whole)) as writer:
        writer.put_engine(whole.engines[1])
        assert len(writer.manifest.unread) == 2
        writer.put_engine(whole.engines[0])
        writer.commit()
    assert {e.name: e for e in read_manifest(bundle).engines} == {e.name: e for e in whole.engines}
    assert read_manifest(bundle).unread == (later,)
