"""Which engine `load` opens, and what it refuses."""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wanexport.exporter.build import build
from wanexport.exporter.bundle.writer import write_manifest
from wanexport.exporter.reference.inputs import forward_inputs
from wanexport.graphs.config import PRESETS
from wanexport.graphs.weights import RandomWeights, write_weights
from wanexport.runtime import load
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.bundle.tensorfile import read_header
from wanexport.runtime.engines.onnx import OnnxSession
from wanexport.runtime.errors import BadRequest, BundleError
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.load import _named
from wanexport.runtime.program import Input


@pytest.fixture(scope="module")
def two_shapes(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("two") / "bundle"))
    build("tiny", random_weights=0, resolution="64x64", frames=5, output=bundle)
    return bundle


def inputs() -> dict[str, np.ndarray]:
    return forward_inputs(PRESETS["tiny"].config, Geometry(64, 96, 9), 500.0, seed=0)


def test_the_exact_engine_is_preferred_on_a_cpu(tiny_bundle: Path) -> None:
    denoiser = load(tiny_bundle)
    assert denoiser.record.name == "64x96x9/onnx-fp32"
    assert denoiser.inputs["latent"] == Input((1, 16, 3, 8, 12), "fp32")
    assert load(str(tiny_bundle), dtype="fp16").record.dtype == "fp16"


def test_several_shapes_need_a_choice(two_shapes: Path) -> None:
    with pytest.raises(BadRequest, match=r"holds several shapes .*64x64x5/onnx-fp32"):
        load(two_shapes)
    assert load(two_shapes, frames=5).geometry.name == "64x64x5"
    assert load(two_shapes, resolution="96*64").geometry.name == "64x96x9"


def test_what_the_bundle_does_not_hold_is_named(tiny_bundle: Path) -> None:
    with pytest.raises(BadRequest, match="no such engine; it holds 64x96x9/onnx-fp32"):
        load(tiny_bundle, resolution="480x832")
    with pytest.raises(BadRequest, match="unknown backend 'quantum': expected one of onnx, aoti"):
        load(tiny_bundle, backend="quantum")
    with pytest.raises(BundleError, match="bf16, which ONNX Runtime cannot execute on a CPU"):
        load(tiny_bundle, dtype="bf16")
    with pytest.raises(BadRequest, match="no such engine; it holds"):
        load(tiny_bundle, backend="aoti", device="cuda")


def test_other_weights_of_the_same_layout_are_taken(tiny_bundle: Path, tmp_path: Path) -> None:
    config = PRESETS["tiny"].config
    path = tmp_path / "denoiser.safetensors"
    write_weights(path, config, "fp32", RandomWeights(config, 0, ""))
    own = load(tiny_bundle)(**inputs())
    np.testing.assert_array_equal(load(tiny_bundle, weights=tmp_path)(**inputs()), own)
    write_weights(path, config, "fp32", RandomWeights(config, 1, ""))
    assert np.abs(load(tiny_bundle, weights=tmp_path)(**inputs()) - own).max() > 0.1


def test_the_file_itself_is_taken_as_other_weights(tiny_bundle: Path, tmp_path: Path) -> None:
    config = PRESETS["tiny"].config
    write_weights(tmp_path / "own.safetensors", config, "fp32", RandomWeights(config, 1, ""))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "denoiser.safetensors").symlink_to("../own.safetensors")
    by_file = load(tiny_bundle, weights=tmp_path / "own.safetensors")(**inputs())
    np.testing.assert_array_equal(load(tiny_bundle, weights=folder)(**inputs()), by_file)
    assert np.abs(load(tiny_bundle)(**inputs()) - by_file).max() > 0.1


def test_one_file_is_not_the_weights_of_two_experts(tmp_path: Path) -> None:
    (tmp_path / "own.safetensors").touch()
    with pytest.raises(BadRequest, match=r"one file, the model has two .* in each of high/, l"):
        _named(tmp_path / "own.safetensors", ["high", "low"])


@pytest.mark.parametrize("name", ["nothing", "x" * 300, "pipe", "folder"])
def test_what_is_no_weights_file_is_one_line(name: str, tiny_bundle: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder" / "denoiser.safetensors").mkdir(parents=True)
    said = r"has no denoiser\.safetensors: name one that has$"
    if name not in ("pipe", "folder"):
        said = r"has no weights set .*nor is there such a file: expected one of base, or a path$"
    with pytest.raises(BadRequest, match=said) as refused:
        load(tiny_bundle, weights=tmp_path / name)
    assert "\n" not in str(refused.value)


def test_the_weights_that_the_record_names_are_those_that_are_opened(bundle: Path) -> None:
    """A file of the usual name beside them, which no manifest lists, is not looked at."""
    own, manifest = load(bundle)(**inputs()), read_manifest(bundle)
    record = manifest.weights["fp32"]
    path = bundle / record.file.path
    renamed = path.rename(path.with_name("renamed.safetensors"))
    with path.open("wb") as unlisted:
        unlisted.write(renamed.read_bytes()[:100_000])
        unlisted.truncate(renamed.stat().st_size)
    file = replace(record.file, path=renamed.relative_to(bundle).as_posix())
    weights = manifest.weights | {"fp32": replace(record, file=file)}
    write_manifest(bundle, replace(manifest, weights=weights))
    np.testing.assert_array_equal(load(bundle)(**inputs()), own)


@pytest.mark.parametrize("what", ["written to", "cut"])
def test_mapped_weights_that_are_changed_are_one_line(what: str, bundle: Path) -> None:
    denoiser, path = load(bundle), bundle / read_manifest(bundle).weights["fp32"].file.path
    with path.open("r+b") as file:
        if what == "cut":
            file.truncate(1000)
        else:
            file.write(b"\0")
    with pytest.raises(BundleError, match=f"^{path} was changed since it was checked"):
        denoiser(**inputs())


def test_mapped_weights_serve_on_when_their_name_goes(bundle: Path) -> None:
    denoiser, path = load(bundle), bundle / read_manifest(bundle).weights["fp32"].file.path
    own = denoiser(**inputs())
    path.unlink()
    np.testing.assert_array_equal(denoiser(**inputs()), own)


@pytest.mark.parametrize("which", ["weights", "engines"])
def test_a_file_that_is_replaced_while_it_is_opened_is_one_line(
    which: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = read_manifest(bundle)
    name = {
        "weights": record.weights["fp32"].file.path,
        "engines": record.engines[0].files["denoiser"].path,
    }[which]
    graph_of = OnnxSession.__init__

    def replaced(*arguments: Any, **options: Any) -> None:
        (bundle / "new").write_bytes((bundle / name).read_bytes())
        (bundle / "new").replace(bundle / name)
        graph_of(*arguments, **options)

    monkeypatch.setattr(OnnxSession, "__init__", replaced)
    with pytest.raises(BundleError, match=f"^{bundle / name} was changed since it was checked"):
        load(bundle, dtype="fp32")


def test_weights_of_another_layout_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=r"has no denoiser\.safetensors"):
        load(tiny_bundle, weights=tmp_path)
    config = PRESETS["tiny"].config
    path = tmp_path / "denoiser.safetensors"
    write_weights(path, config, "bf16", RandomWeights(config, 0, ""))
    with pytest.raises(BadRequest, match="laid out for another engine"):
        load(tiny_bundle, weights=tmp_path)


def test_a_cut_weights_file_is_refused_before_the_backend_sees_it(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    whole = (tiny_bundle / "weights" / "fp32" / "denoiser.safetensors").read_bytes()
    (tmp_path / "denoiser.safetensors").write_bytes(whole[:-100])
    with pytest.raises(BundleError, match="its header describes"):
        load(tiny_bundle, weights=tmp_path)


def test_what_the_backend_refuses_is_one_line(bundle: Path) -> None:
    graph = bundle / "engines" / "64x96x9" / "onnx-fp32" / "denoiser.onnx"
    graph.write_bytes(b"no graph")
    with pytest.raises(BundleError, match="ONNX Runtime cannot load"):
        OnnxSession(graph, bundle / "weights/fp32/denoiser.safetensors")


def test_a_bundle_replaced_while_it_is_opened_is_opened_anew(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = read_manifest(bundle)
    moved = Path("engines/64x96x9/onnx-fp32.2/denoiser.onnx")
    engine = new.engines[0]
    assert engine.dtype == "fp32"
    file = engine.files["denoiser"]
    old = replace(
        new, engines=(replace(engine, files={"denoiser": replace(file, path=moved.as_posix())}),)
    )
    answers = iter([old, new, new])  # the old manifest's file is gone by the time it is checked
    module = sys.modules["wanexport.runtime.load"]  # the package's attribute is the function
    monkeypatch.setattr(module, "read_manifest", lambda _: next(answers))
    assert load(bundle).record == engine


def test_an_engine_of_a_newer_backend_is_passed_over(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    newer = replace(manifest.engines[0], backend="quantum")
    write_manifest(bundle, replace(manifest, engines=(newer, *manifest.engines)))
    assert load(bundle).record.backend == "onnx"


def test_the_weights_are_mapped_not_copied(tiny_bundle: Path) -> None:
    """A changed byte in the weights file is seen by an open engine: it holds no copy.

    The file gets back its time of modification, by which an engine tells that it was changed.
    """
    denoiser = load(tiny_bundle)
    own = denoiser(**inputs())
    record = tiny_bundle / "weights" / "fp32" / "denoiser.safetensors"
    times = (record.stat().st_atime_ns, record.stat().st_mtime_ns)
    entry = read_header(record)["head.head.bias"]
    with record.open("r+b") as file:
        file.seek(entry.offset)
        kept = file.read(entry.size)
        file.seek(entry.offset)
        file.write(np.full(64, 3.0, np.float32).tobytes())
    os.utime(record, ns=times)
    try:
        assert np.abs(denoiser(**inputs()) - own).max() > 1
    finally:
        with record.open("r+b") as file:
            file.seek(entry.offset)
            file.write(kept)
