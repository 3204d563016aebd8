"""The manifest is read back as written, and anything else is refused in one line."""

import json
import multiprocessing
from pathlib import Path

import pytest

from wanexport.exporter.bundle.lock import bundle_lock
from wanexport.exporter.bundle.writer import write_manifest
from wanexport.runtime.bundle.check import check_content, check_weights
from wanexport.runtime.bundle.manifest import SCHEMA, read_manifest
from wanexport.runtime.errors import WanExportError


def edit(bundle: Path, **fields: object) -> None:
    path = bundle / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_round_trip_keeps_everything(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    write_manifest(bundle, manifest)
    assert read_manifest(bundle) == manifest


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(WanExportError, match=r"is no bundle: it has no manifest\.json"):
        read_manifest(tmp_path)
    with pytest.raises(WanExportError, match="is no bundle"):
        read_manifest(tmp_path / "nowhere")


def test_another_schema_is_refused_with_both_numbers(bundle: Path) -> None:
    edit(bundle, schema=SCHEMA + 1)
    with pytest.raises(WanExportError, match=f"has schema {SCHEMA + 1}.*reads {SCHEMA}"):
        read_manifest(bundle)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"schema": 1}', '{"schema": "1"}', "[" * 10**5]
)
def test_a_damaged_manifest_is_refused(bundle: Path, content: str) -> None:
    (bundle / "manifest.json").write_text(content)
    with pytest.raises(WanExportError, match="build again"):
        read_manifest(bundle)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("config", None),
        ("weights.fp32.dtype", 3),
        ("weights.fp32.file.size", "5"),
        ("weights.fp32.file.size", -5),
        ("weights.fp32.expert", "high_noise"),
        ("weights", {}),
        ("experts", ["high_noise", "low_noise"]),
        ("engines.0.backend", []),
        ("engines.0.geometry.spatial_stride", 0),
        ("engines.0.geometry.height", 64.5),
        ("engines.0.inputs", {}),
        ("engines.0.inputs.latent.shape", [1, "16", 3, 8, 12]),
        ("engines.0.output", []),
        ("engines.0.sampling.steps", "s"),
        ("engines.0.sampling.steps", True),
        ("engines.0.sampling.shift", None),
        ("engines.0.sampling.shift", "5"),
        ("engines.0.sampling.shift", float("nan")),
        ("engines.0.sampling.guidance", [1.0, 2.0, 3.0]),
        ("engines.0.sampling.boundary", 0.9),
        ("engines.0.sampling.boundary", float("nan")),
        ("engines.0.sampling.solver", []),
        ("engines.0.proof", []),
        ("engines.0.lint", {"host_sync": "none"}),
    ],
)
def test_fields_of_another_form_are_refused(bundle: Path, place: str, value: object) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    *parents, last = place.split(".")
    record = manifest
    for name in parents:
        record = record[int(name)] if isinstance(record, list) else record[name]
    record[last] = value
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(WanExportError, match=r"is damaged .* build again"):
        read_manifest(bundle)


def test_a_manifest_is_read_as_it_was_written(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    write_manifest(bundle, manifest)
    assert read_manifest(bundle) == manifest


def test_a_manifest_that_may_not_be_read_is_not_called_damaged(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()
    (bundle / "manifest.json").mkdir()
    with pytest.raises(WanExportError, match=r"cannot read .*manifest\.json: Is a directory"):
        read_manifest(bundle)


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "weights/../../x"])
def test_paths_outside_the_bundle_are_refused(bundle: Path, path: str) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["weights"]["fp32"]["file"]["path"] = path
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(WanExportError, match="lies outside the bundle"):
        read_manifest(bundle)


def test_missing_short_and_altered_files_are_told_apart(bundle: Path) -> None:
    engine = next(iter(read_manifest(bundle).engines[0].files.values()))
    path = bundle / engine.path
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(WanExportError, match="was altered after the build"):
        check_content(bundle, engine)
    path.write_bytes(content[:-1])
    with pytest.raises(WanExportError, match=f"{len(content) - 1} bytes, the manifest says"):
        check_content(bundle, engine)
    path.unlink()
    with pytest.raises(WanExportError, match="is missing from the bundle"):
        check_content(bundle, engine)


def test_weights_with_another_header_are_refused(bundle: Path) -> None:
    record = read_manifest(bundle).weights["fp32"]
    path = bundle / record.file.path
    content = bytearray(path.read_bytes())
    position = content.index(b"head.head.bias")
    content[position : position + 4] = b"tail"
    path.write_bytes(content)
    with pytest.raises(WanExportError, match="another header than the manifest says"):
        check_weights(bundle, record)


def _hold(bundle: Path, held: object, release: object) -> None:
    with bundle_lock(bundle):
        held.set()  # type: ignore[attr-defined]
        release.wait()  # type: ignore[attr-defined]


def test_two_writers_exclude_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path, held, release))
    process.start()
    try:
        assert held.wait(10)
        with pytest.raises(WanExportError, match="another wanexport is writing"):
            with bundle_lock(tmp_path):
                pass
    finally:
        release.set()
        process.join()
    with bundle_lock(tmp_path):
        pass
