"""`compare` passes a good engine and catches planted faults."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.wan_reference import small_config
from wanexport.exporter.build import build
from wanexport.exporter.compare import compare
from wanexport.exporter.parity import Parity, measure, relative_l2
from wanexport.graphs.config import PRESETS
from wanexport.runtime.manifest import bundle_lock, file_record, read_manifest, write_manifest
from wanexport.runtime.tensorfile import load_arrays, read_header


def replace_graph(bundle: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    """Alter the fp32 engine and make the manifest agree, as a faulty build would."""
    manifest = read_manifest(bundle)
    engine = next(e for e in manifest.engines if e.dtype == "fp32")
    path = bundle / engine.files["denoiser"].path
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    changed = replace(engine, files={"denoiser": file_record(bundle, path)})
    others = tuple(e for e in manifest.engines if e.dtype != "fp32")
    write_manifest(bundle, replace(manifest, engines=(changed, *others)))


def drop_row_rope(model: onnx.ModelProto) -> None:
    """No rotation along rows: pairs 22 to 42 of cos become 1 and those of sin 0."""
    (tensor,) = (t for t in model.graph.initializer if list(t.dims) == [2, 3, 4, 6, 64])
    table = numpy_helper.to_array(tensor).copy()
    table[0, ..., 22:43], table[1, ..., 22:43] = 1, 0
    tensor.CopyFrom(numpy_helper.from_array(table, tensor.name))


def swap_gate_and_shift(model: onnx.ModelProto) -> None:
    """Exchange the first two slices of the first block's modulation that differ in their start."""
    slices = [node for node in model.graph.node if node.op_type == "Slice"]
    first = [node for node in slices if node.input[0] == slices[0].input[0]]
    first[0].input[1], first[2].input[1] = first[2].input[1], first[0].input[1]
    first[0].input[2], first[2].input[2] = first[2].input[2], first[0].input[2]


def coarser_epsilon(model: onnx.ModelProto) -> None:
    """LayerNorm with eps 1e-3 in place of 1e-6."""
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "LayerNormalization" and attribute.name == "epsilon":
                attribute.f = 1e-3


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_good_engine_passes(bundle: Path, dtype: str) -> None:
    result = compare(bundle, dtype=dtype, steps=3)
    assert result["passed"]
    assert [row["step"] for row in result["steps"]] == [0, 1, 2]
    for row in result["steps"]:
        assert row["error"] <= row["gate"]
        assert (row["floor"] is None) == (dtype == "fp32")
        assert 0 <= row["drift"] < 1e-2
    name = f"compare-64x96x9-onnx-{dtype}"
    assert json.loads((bundle / "reports" / f"{name}.json").read_text()) == result
    inputs = load_arrays(bundle / "reports" / f"{name}-inputs.safetensors")
    assert inputs["noise"].shape == (1, 16, 3, 8, 12)
    engine = next(e for e in read_manifest(bundle).engines if e.dtype == dtype)
    assert engine.parity["passed"]


def test_a_report_elsewhere_leaves_the_bundle_alone(bundle: Path, tmp_path: Path) -> None:
    before = (bundle / "manifest.json").read_bytes()
    compare(bundle, steps=1, report=tmp_path / "reports")
    assert (bundle / "manifest.json").read_bytes() == before
    assert not (bundle / "reports").exists()
    assert len(list((tmp_path / "reports").iterdir())) == 2


def test_the_verdict_stands_when_a_writer_holds_the_bundle(bundle: Path) -> None:
    with bundle_lock(bundle):
        result = compare(bundle, steps=1)
    assert result["passed"]
    assert "another wanexport is writing" in result["warning"]


@pytest.mark.parametrize("fault", [drop_row_rope, swap_gate_and_shift, coarser_epsilon])
def test_a_fault_in_the_graph_is_caught(
    bundle: Path, fault: Callable[[onnx.ModelProto], None]
) -> None:
    replace_graph(bundle, fault)
    assert not compare(bundle, steps=1)["passed"]


def test_not_a_number_fails_and_is_null_in_json(bundle: Path) -> None:
    def to_nan(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for attribute in node.attribute:
                if node.op_type == "RMSNormalization" and attribute.name == "epsilon":
                    attribute.f = float("nan")

    replace_graph(bundle, to_nan)
    result = compare(bundle, steps=1)
    assert not result["passed"]
    assert result["forward"]["error"] is None
    assert json.loads((bundle / "reports" / "compare-64x96x9-onnx-fp32.json").read_text()) == result


@pytest.mark.parametrize("preset", ["ti2v-5b", "i2v-a14b"])
def test_conditioned_families_are_compared_through_their_own_inputs(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(preset, num_layers=1)
    monkeypatch.setitem(PRESETS, preset, replace(PRESETS[preset], config=config))
    size = f"{8 * config.spatial_stride}x{8 * config.spatial_stride}"
    build(preset, random_weights=0, resolution=size, frames=9, output=tmp_path / "b")
    result = compare(tmp_path / "b", steps=2)
    assert result["passed"]
    inputs = read_header(
        tmp_path / "b" / "reports" / f"compare-{size}x9-onnx-fp32-inputs.safetensors"
    )
    assert ("first_frame" in inputs) == (preset == "ti2v-5b")
    assert ("condition" in inputs) == (preset == "i2v-a14b")


def test_relative_l2_and_gates() -> None:
    one = np.ones(4, np.float32)
    assert relative_l2(1.5 * one, one) == 0.5
    assert np.isnan(relative_l2(np.array([1, 1, np.inf, 1]), one))
    assert not Parity(float("nan"), None).passed
    assert measure(one, one, None).gate == 1e-5
    assert Parity(1.2e-3, 1e-3).passed
    assert not Parity(1.3e-3, 1e-3).passed
