"""Weights sets of a bundle: named ones beside the base, and those that schema 1 had converted."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.oracles.wan_reference import (
    diffusers_model,
    diffusers_velocity,
    official_state,
    small_config,
    small_geometry,
    write_official,
)
from wanexport.exporter import build as build_module
from wanexport.exporter.build import build
from wanexport.exporter.bundle.writer import open_bundle
from wanexport.exporter.model_source import ModelSource, resolve
from wanexport.exporter.reference.inputs import forward_inputs
from wanexport.exporter.reference.parity import relative_l2
from wanexport.exporter.sets import convert
from wanexport.exporter.sets.convert import add_weights
from wanexport.runtime import load
from wanexport.runtime.bundle.manifest import Manifest, read_manifest
from wanexport.runtime.errors import BadRequest

PRESET = "t2v-1.3b"
CONFIG = small_config(PRESET, num_layers=1)
GEOMETRY = small_geometry(CONFIG)


def untold(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Checkpoints of one model by their seed."""
    folder = tmp_path_factory.mktemp("models")
    return {
        seed: write_official(
            folder / str(seed), official_state(diffusers_model(CONFIG, seed)), CONFIG
        )
        for seed in range(3)
    }


@pytest.fixture(scope="module")
def built(models: dict[int, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the first."""
    bundle = tmp_path_factory.mktemp("bundles") / "bundle"
    build_small(models[0], bundle)
    return bundle


@pytest.fixture
def own(built: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(built, tmp_path / "bundle"))


def build_small(model: Path, bundle: Path, **options: Any) -> dict[str, Any]:
    resolution = (GEOMETRY.height, GEOMETRY.width)
    asked: dict[str, Any] = {"resolution": resolution, "frames": GEOMETRY.frames, **options}
    return build(model, output=bundle, backends=["onnx"], device="cpu", **asked)


def add(bundle: Path, model: Path, name: str, dtype: str = "fp32") -> list[str]:
    source = resolve(str(model), None)
    with open_bundle(bundle, empty_of(source)) as writer:
        reused = add_weights(writer, source, "", dtype, untold, name=name)
        writer.commit()
    return reused


def empty_of(source: ModelSource) -> Manifest:
    return build_module._empty_manifest(source)


def test_a_named_set_serves_the_engines_that_are_there(own: Path, models: dict[int, Path]) -> None:
    before = read_manifest(own)
    assert add(own, models[1], "style") == []
    manifest = read_manifest(own)
    assert set(manifest.weights) == {"fp32", "style-fp32"}
    style = manifest.weights["style-fp32"]
    assert style.file.path == "weights/style-fp32/denoiser.safetensors"
    assert (style.name, style.layout) == ("style", manifest.engines[0].layout)
    assert manifest.engines == before.engines
    inputs = forward_inputs(CONFIG, GEOMETRY, 812.0, seed=2)
    denoiser = load(own)
    for name, seed in (("base", 0), ("style", 1), ("base", 0)):
        denoiser.use(name)
        theirs = diffusers_velocity(diffusers_model(CONFIG, seed), CONFIG, inputs)
        assert relative_l2(denoiser(**inputs), theirs) <= 1e-5


def test_each_set_is_of_one_source(own: Path, models: dict[int, Path]) -> None:
    add(own, models[1], "style")
    assert add(own, models[1], "style") == ["weights style-fp32"]
    assert add(own, models[1], "style", "bf16") == []
    for dtype in ("fp32", "bf16"):
        with pytest.raises(BadRequest, match=r"holds other weights named style, of .*models.*/1:"):
            add(own, models[2], "style", dtype)
        with pytest.raises(BadRequest, match=r"holds other weights, of .*models.*/0: name another"):
            build_small(models[1], own, dtype=dtype)
    assert add(own, models[2], "other") == []
    assert set(read_manifest(own).weights) == {
        "fp32", "style-fp32", "style-bf16", "other-fp32",
    }  # fmt: skip


def test_a_build_tells_its_own_weights_alone(own: Path, models: dict[int, Path]) -> None:
    add(own, models[1], "style")
    record = build_small(models[0], own)
    assert list(record["weights"]) == ["fp32"]
    assert record["reused"] == ["weights fp32", f"engine {GEOMETRY.name}/onnx-fp32"]
    assert set(read_manifest(own).weights) == {"fp32", "style-fp32"}


def as_schema_1(bundle: Path) -> None:
    """Rewrite a bundle's manifest as the version before sets, Programs and families had it."""
    data = json.loads((bundle / "manifest.json").read_text())
    del data["family"]
    data["schema"] = 1
    for record in data["weights"].values():
        del record["name"], record["role"]
        record["header_sha256"] = record.pop("layout")
    for engine in data["engines"]:
        program, details = engine.pop("program"), engine.pop("details")
        del engine["role"], engine["family"]
        engine["inputs"] = {
            name: {"shape": spec["shape"], "dtype": spec["dtype"]}
            for name, spec in program["inputs"].items()
        }
        engine["output"] = program["outputs"]["velocity"]
        engine["weights_header_sha256"] = engine.pop("layout")
        engine |= {"parameters": {}, "attention": {}, "key": "0" * 64}
        engine["build"]["attention_score_bytes"] = details["attention_score_bytes"]
    (bundle / "manifest.json").write_text(json.dumps(data))


def test_a_bundle_of_schema_1_is_written_forward_without_converting(
    own: Path, models: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = forward_inputs(CONFIG, GEOMETRY, 812.0, seed=2)
    before, velocity = read_manifest(own), load(own)(**inputs)
    file = own / before.weights["fp32"].file.path
    written = file.stat().st_mtime_ns
    as_schema_1(own)
    np.testing.assert_array_equal(load(own)(**inputs), velocity)
    monkeypatch.setattr(convert, "write_weights", None)
    record = build_small(models[0], own, resolution="64x64", frames=5)
    assert record["reused"] == ["weights fp32"]
    assert file.stat().st_mtime_ns == written
    assert json.loads((own / "manifest.json").read_text())["schema"] == 2
    manifest = read_manifest(own)
    assert manifest.config == before.config and manifest.weights == before.weights
    assert [engine.name for engine in manifest.engines] == [
        f"{GEOMETRY.name}/onnx-fp32", "64x64x5/onnx-fp32",
    ]  # fmt: skip
    assert manifest.engines[0].program == before.engines[0].program
    old = load(own, resolution=(GEOMETRY.height, GEOMETRY.width))
    np.testing.assert_array_equal(old(**inputs), velocity)


def test_an_engine_of_schema_1_is_replaced_by_one_of_its_name(
    own: Path, models: dict[int, Path]
) -> None:
    as_schema_1(own)
    record = build_small(models[0], own)
    assert record["reused"] == ["weights fp32"]
    (engine,) = read_manifest(own).engines
    assert engine.key != "0" * 64
    assert len(list(own.rglob("*.onnx"))) == 1
