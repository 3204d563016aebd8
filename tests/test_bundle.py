"""A writer that is killed or fails leaves the old bundle, the new one, or none."""

from dataclasses import asdict
from pathlib import Path

import pytest

from wanexport.exporter.bundle import JOURNAL, open_bundle
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.load import load
from wanexport.runtime.manifest import Manifest, read_manifest, write_manifest


class Killed(BaseException):
    """Stands for a signal: no handler of ours runs for the process, but the writer's do."""


def empty_like(manifest: Manifest) -> Manifest:
    return Manifest(**{**asdict(manifest), "weights": {}, "engines": ()})


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
    stray.write_bytes(b"half")
    with pytest.raises(WanExportError, match="is no bundle"):
        load(bundle)
    with open_bundle(bundle, empty_like(whole)) as writer:
        assert not stray.parent.exists()
        for name, weights in whole.weights.items():
            assert writer.find_weights(name, weights.__eq__) == weights
            writer.put_weights(name, weights)
        for engine in whole.engines:
            assert writer.find_engine(engine.key, engine.proof["weights"]) == engine
            writer.put_engine(engine)
        writer.commit()
    assert read_manifest(bundle) == whole
    assert not (bundle / JOURNAL).exists()


def test_damaged_parts_are_not_reused(bundle: Path) -> None:
    whole = read_manifest(bundle)
    engine = whole.engines[0]
    for file in (*engine.files.values(), whole.weights["fp32"].file):
        with (bundle / file.path).open("r+b") as handle:
            handle.truncate(file.size - 1)
    with open_bundle(bundle, empty_like(whole)) as writer:
        assert writer.find_engine(engine.key, engine.proof["weights"]) is None
        assert writer.find_weights("fp32", lambda record: True) is None


def test_an_engine_proven_with_other_weights_is_not_reused(bundle: Path) -> None:
    engine = read_manifest(bundle).engines[0]
    with open_bundle(bundle, empty_like(read_manifest(bundle))) as writer:
        assert writer.find_engine(engine.key, {"fp32": "another"}) is None
        assert writer.find_engine("another", engine.proof["weights"]) is None
