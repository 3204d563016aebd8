"""Builds of a bundle that compile nothing: the writer's work alone, in milliseconds."""

import hashlib
from pathlib import Path

import numpy as np

from wanexport.exporter.bundle.writer import BundleWriter, file_record, open_bundle
from wanexport.graphs.config import PRESETS, sampling_defaults
from wanexport.runtime.bundle.details import OnnxDetails
from wanexport.runtime.bundle.durable import write_durably
from wanexport.runtime.bundle.manifest import (
    BASE,
    DENOISER,
    EngineRecord,
    Manifest,
    WeightsRecord,
)
from wanexport.runtime.bundle.signature import program_of
from wanexport.runtime.bundle.tensorfile import header_sha256, save_arrays
from wanexport.runtime.geometry import Geometry

CONFIG = PRESETS["tiny"].config
KEPT = {"manifest.json", ".lock"}  # what a finished bundle holds beside what it lists


def empty() -> Manifest:
    return Manifest("tiny", CONFIG, (), {}, (), "0")


def stub_build(bundle: Path, *, version: str = "1", height: int = 64) -> Manifest:
    """Build weights and an engine as `build` does; another version is another engine's key."""
    with open_bundle(bundle, empty()) as writer:
        if "fp32" not in writer.known_weights():
            writer.put_weights("fp32", _weights(writer))
        else:
            writer.put_weights("fp32", writer.known_weights()["fp32"])
        key = hashlib.sha256(f"{version} {height}".encode()).hexdigest()
        engine = writer.find_engine(key) or _engine(writer, key, Geometry(height, 96, 9))
        writer.put_engine(engine)
        writer.commit()
    return writer.manifest


def _weights(writer: BundleWriter) -> WeightsRecord:
    path = writer.free_folder(Path("weights/fp32")) / "denoiser.safetensors"
    save_arrays(path, {"head.head.bias": np.zeros(64, np.float32)})
    file = file_record(writer.path, path)
    return WeightsRecord(
        name=BASE,
        role=DENOISER,
        expert="",
        dtype="fp32",
        layout=header_sha256(path),
        file=file,
        content="0" * 64,
        source={"preset": "tiny"},
    )


def _engine(writer: BundleWriter, key: str, geometry: Geometry) -> EngineRecord:
    folder = writer.free_folder(Path("engines") / geometry.name / "onnx-fp32")
    path = folder / "denoiser.onnx"
    (folder / "scratch").mkdir()
    (folder / "scratch" / "left.bin").write_bytes(b"of a child")
    write_durably(path, f"graph {key}".encode() * 1000)
    (folder / "scratch" / "left.bin").unlink()
    (folder / "scratch").rmdir()
    return EngineRecord(
        backend="onnx",
        role=DENOISER,
        family=CONFIG.family,
        dtype="fp32",
        geometry=geometry,
        program=program_of(CONFIG, geometry).whole(),
        details=OnnxDetails(),
        sampling=sampling_defaults(CONFIG, (), geometry),
        files={"denoiser": file_record(writer.path, path)},
        layout=next(iter(writer.manifest.weights.values())).layout,
        key=key,
        target={"device": "cpu"},
    )


def files_of(bundle: Path) -> set[str]:
    """Every file of a bundle, links and pipes too."""
    return {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if not p.is_dir()}


def check_whole(bundle: Path, manifest: Manifest) -> None:
    """The bundle holds what its manifest lists, as listed, and nothing else."""
    assert files_of(bundle) - KEPT == {file.path for file in manifest.files()}
    check_readable(bundle, manifest)


def check_readable(bundle: Path, manifest: Manifest) -> None:
    """Every file that the manifest lists is there, as listed."""
    for file in manifest.files():
        assert file_record(bundle, bundle / file.path) == file
