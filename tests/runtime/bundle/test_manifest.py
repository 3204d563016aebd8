"""The manifest is read back as written, and anything else is refused in one line."""

import multiprocessing
from pathlib import Path

import pytest

from tests.runtime.bundle.small_bundle import change, manifest_of, put, small_bundle
from wanexport.exporter.bundle.lock import bundle_lock
from wanexport.exporter.bundle.writer import write_manifest
from wanexport.runtime.bundle.check import check_content, check_weights
from wanexport.runtime.bundle.manifest import SCHEMA, read_manifest, weights_label
from wanexport.runtime.bundle.usable import why_unread, why_unusable
from wanexport.runtime.errors import BundleError, WanExportError


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle with an ONNX engine, made by hand."""
    return small_bundle(tmp_path / "bundle")


def test_a_round_trip_keeps_everything(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    write_manifest(bundle, manifest)
    assert read_manifest(bundle) == manifest


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is no bundle: it has no manifest\.json"):
        read_manifest(tmp_path)
    with pytest.raises(BundleError, match="is no bundle"):
        read_manifest(tmp_path / "nowhere")


def test_another_schema_is_refused_with_both_numbers(bundle: Path) -> None:
    put(bundle, {**manifest_of(bundle), "schema": SCHEMA + 1})
    with pytest.raises(BundleError, match=f"has schema {SCHEMA + 1}.*reads 1 and {SCHEMA}"):
        read_manifest(bundle)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"schema": 1}', '{"schema": "1"}', "[" * 10**5]
)
def test_a_damaged_manifest_is_refused(bundle: Path, content: str) -> None:
    (bundle / "manifest.json").write_text(content)
    with pytest.raises(BundleError, match="build again"):
        read_manifest(bundle)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("config", None),
        ("weights.fp32.dtype", 3),
        ("weights.fp32.file.size", "5"),
        ("weights.fp32.file.size", -5),
        ("weights.fp32.layout", None),
        ("family", []),
        ("engines", None),
        ("engines.0.sampling.shift", float("nan")),
        ("engines.0.sampling.boundary", float("nan")),
    ],
)
def test_fields_of_another_form_are_refused(bundle: Path, place: str, value: object) -> None:
    change(bundle, place, value)
    with pytest.raises(BundleError, match=r"is damaged .* build again"):
        read_manifest(bundle)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("weights.fp32.expert", "high_noise"),
        ("weights", {}),
        ("experts", ["high_noise", "low_noise"]),
        ("engines.0.backend", []),
        ("engines.0.geometry.spatial_stride", 0),
        ("engines.0.geometry.height", 64.5),
        ("engines.0.program", {}),
        ("engines.0.program.inputs", {}),
        ("engines.0.program.inputs.latent.shape", [1, "16", 3, 8, 12]),
        ("engines.0.program.outputs", []),
        ("engines.0.details", None),
        ("engines.0.sampling.steps", "s"),
        ("engines.0.sampling.steps", True),
        ("engines.0.sampling.shift", None),
        ("engines.0.sampling.shift", "5"),
        ("engines.0.sampling.guidance", [1.0, 2.0, 3.0]),
        ("engines.0.sampling.boundary", 0.9),
        ("engines.0.sampling.solver", []),
        ("engines.0.proof", []),
        ("engines.0.lint", {"host_sync": "none"}),
    ],
)
def test_what_an_engine_lacks_is_no_damage_of_the_bundle(
    bundle: Path, place: str, value: object
) -> None:
    manifest = read_manifest(change(bundle, place, value))
    reasons = [why_unusable(bundle, manifest, engine) for engine in manifest.engines]
    reasons += [why_unread(bundle, manifest, data) for data in manifest.unread]
    (reason,) = reasons
    assert "cannot be used: " in reason or "details of another form" in reason


@pytest.mark.parametrize(
    ("name", "expert", "dtype", "label"),
    [
        ("base", "", "fp32", "fp32"),
        ("base", "high_noise", "bf16", "high_noise-bf16"),
        ("style", "", "fp16", "style-fp16"),
        ("style", "low_noise", "bf16", "style-low_noise-bf16"),
    ],
)
def test_a_file_of_a_weights_set_is_called_by_what_it_is(
    name: str, expert: str, dtype: str, label: str
) -> None:
    assert weights_label(name, expert, dtype) == label


def test_a_manifest_is_read_as_it_was_written(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    write_manifest(bundle, manifest)
    assert read_manifest(bundle) == manifest


def test_a_manifest_that_may_not_be_read_is_not_called_damaged(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()
    (bundle / "manifest.json").mkdir()
    with pytest.raises(BundleError, match=r"cannot read .*manifest\.json: Is a directory"):
        read_manifest(bundle)


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "weights/../../x"])
def test_paths_outside_the_bundle_are_refused(bundle: Path, path: str) -> None:
    for place in ("weights.fp32.file.path", "engines.0.files.denoiser.path"):
        whole = manifest_of(bundle)
        with pytest.raises(BundleError, match="lies outside the bundle"):
            read_manifest(change(bundle, place, path))
        put(bundle, whole)


def test_missing_short_and_altered_files_are_told_apart(bundle: Path) -> None:
    engine = next(iter(read_manifest(bundle).engines[0].files.values()))
    path = bundle / engine.path
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleError, match="was altered after the build"):
        check_content(bundle, engine)
    path.write_bytes(content[:-1])
    with pytest.raises(BundleError, match=f"{len(content) - 1} bytes, the manifest says"):
        check_content(bundle, engine)
    path.unlink()
    with pytest.raises(BundleError, match="is missing from the bundle"):
        check_content(bundle, engine)


def test_weights_with_another_header_are_refused(bundle: Path) -> None:
    record = read_manifest(bundle).weights["fp32"]
    path = bundle / record.file.path
    content = bytearray(path.read_bytes())
    position = content.index(b"head.head.bias")
    content[position : position + 4] = b"tail"
    path.write_bytes(content)
    with pytest.raises(BundleError, match="another header than the manifest says"):
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
