"""`compare` passes a good engine and catches planted faults."""

import json
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from diffusers import WanTransformer3DModel

from tests.exporter.bundle.other_weights import add_style
from tests.oracles.wan_reference import (
    diffusers_model,
    diffusers_velocity,
    small_config,
    small_geometry,
)
from tests.quick import slow_but
from tests.tables import faults
from wanexport.exporter.build import build
from wanexport.exporter.bundle.lock import bundle_lock
from wanexport.exporter.compare.compare import compare
from wanexport.exporter.reference.inputs import forward_inputs, seeded_inputs
from wanexport.exporter.reference.parity import Parity, difference, measure, relative_l2
from wanexport.graphs.config import PRESETS
from wanexport.runtime import load
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.bundle.tensorfile import load_arrays, read_header, save_arrays
from wanexport.runtime.errors import BadRequest, WanExportError
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.wan_config import EXPERTS


@pytest.mark.parametrize("dtype", slow_but(["fp32", "fp16"], "fp32"))
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


@pytest.mark.parametrize(
    "plant",
    slow_but(
        faults.FAULTS,
        "one element of it times 1.01, against the checkpoint",
        "RoPE of the rows dropped in our code, against diffusers",
        "modulation rounded to bf16, fp16 engine",
        "LayerNorm with eps 1e-3, fp32 engine",
    ),
)
def test_a_planted_fault_is_caught(converted: Path, plant: faults.Fault) -> None:
    result = plant(converted)
    assert not result["passed"]
    assert faults.error_over_gate(result) > 1


@pytest.mark.parametrize(
    ("reference", "dtype"),
    slow_but(
        product(["graph", "diffusers"], ["fp32", "fp16"]), ("graph", "fp16"), ("diffusers", "fp32")
    ),
)
def test_the_checkpoint_it_came_from_passes(converted: Path, reference: str, dtype: str) -> None:
    model = str(converted.parent / "model")
    result = compare(converted, model=model, reference=reference, dtype=dtype, steps=2)
    assert result["passed"]
    for row in result["steps"]:
        if dtype == "fp32":
            assert row["rounding"] is None
        else:  # of fp32 tensors to fp16
            assert 1e-5 < row["rounding"] < 1e-3


def test_another_checkpoint_is_refused(tiny_bundle: Path, converted: Path) -> None:
    with pytest.raises(WanExportError, match=r"another model \(t2v\) than the bundle's \(tiny\)"):
        compare(tiny_bundle, model=str(converted.parent / "model"))
    with pytest.raises(WanExportError, match="is a preset"):
        compare(tiny_bundle, model="tiny")


def test_an_altered_weights_file_is_refused(bundle: Path) -> None:
    path = bundle / read_manifest(bundle).weights["fp32"].file.path
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(WanExportError, match="was altered after the build"):
        compare(bundle, dtype="fp32", steps=1)


def record(
    folder: Path, number: int = 3, dtype: torch.dtype = torch.float32
) -> tuple[Path, Path, dict[str, np.ndarray]]:
    """Files of calls to the checkpoint's model in diffusers, and the inputs stacked."""
    config = small_config("t2v-1.3b")
    model = diffusers_model(config)
    if dtype != torch.float32:
        model.save_pretrained(folder / "saved")
        model = WanTransformer3DModel.from_pretrained(folder / "saved", torch_dtype=dtype)
    rng = np.random.default_rng(5)
    stacked = {
        "latent": rng.standard_normal((number, 16, 3, 8, 12), np.float32),
        "timestep": np.linspace(990, 300, number).astype(np.float32),
        "text": rng.standard_normal((1, 20, 4096), np.float32),
    }
    calls = [
        {
            "latent": stacked["latent"][i : i + 1],
            "timestep": stacked["timestep"][i : i + 1],
            "text": np.pad(stacked["text"], ((0, 0), (0, 492), (0, 0))),
        }
        for i in range(number)
    ]
    velocity = np.concatenate([diffusers_velocity(model, config, call) for call in calls])
    save_arrays(folder / "calls.safetensors", stacked)
    save_arrays(folder / "outputs.safetensors", {"velocity": velocity})
    return folder / "calls.safetensors", folder / "outputs.safetensors", stacked


def test_recorded_velocities_are_a_reference(converted: Path, tmp_path: Path) -> None:
    calls, outputs, _ = record(tmp_path)
    result = compare(converted, dtype="fp32", calls=calls, outputs=outputs)
    assert result["passed"]
    assert result["reference"] == "recorded (graph, fp32)"
    assert [row["step"] for row in result["steps"]] == [0, 1, 2]
    assert all(1e-7 < row["error"] <= 1e-5 for row in result["steps"])
    assert all(row["drift"] is None for row in result["steps"])
    graph = compare(converted, dtype="fp32", calls=calls)
    assert graph["passed"]
    assert graph["reference"] == "graph"


def test_recorded_velocities_that_are_wrong_fail(converted: Path, tmp_path: Path) -> None:
    calls, outputs, _ = record(tmp_path)
    velocity = load_arrays(outputs)["velocity"]
    save_arrays(outputs, {"velocity": velocity[::-1]})
    result = compare(converted, dtype="fp32", calls=calls, outputs=outputs)
    assert [row["passed"] for row in result["steps"]] == [False, True, False]


@pytest.mark.parametrize("dtype", slow_but(["fp32", "fp16"], "fp32"))
def test_a_recording_in_bf16_passes_by_the_error_of_bf16(
    converted: Path, tmp_path: Path, dtype: str
) -> None:
    calls, outputs, _ = record(tmp_path, dtype=torch.bfloat16)
    recorded = partial(
        compare, converted, dtype=dtype, calls=calls, outputs=outputs, reference="diffusers"
    )
    assert not recorded()["passed"]
    result = recorded(outputs_dtype="bf16")
    assert result["passed"]
    assert result["reference"] == "recorded (diffusers, bf16)"
    for row in result["steps"]:
        assert 3e-3 < row["recorded"] < 2e-2
        assert row["eager"] == pytest.approx(row["recorded"], rel=0.05)
        assert row["gate"] == pytest.approx(1.25 * row["recorded"], rel=0.05)


def test_another_velocity_than_recorded_in_bf16_fails(converted: Path, tmp_path: Path) -> None:
    calls, outputs, _ = record(tmp_path, dtype=torch.bfloat16)
    faults.alter_graph(converted, faults.drop_row_rope, "fp32")
    result = compare(
        converted,
        dtype="fp32",
        reference="diffusers",
        calls=calls,
        outputs=outputs,
        outputs_dtype="bf16",
    )
    assert not any(row["passed"] for row in result["steps"])


@pytest.mark.slow
def test_a_fault_of_our_graph_does_not_widen_its_own_gate(
    converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = compare(converted, dtype="fp16", reference="diffusers", steps=1)["steps"][0]["gate"]
    plant = faults.in_code("apply_rope", faults.rope_without_rows, "fp16")
    result = plant(converted)
    assert not result["passed"]
    assert result["steps"][0]["gate"] == pytest.approx(sound, rel=0.5)


@pytest.mark.parametrize("preset", slow_but(["ti2v-5b", "flf2v-14b", "t2v-a14b"], "ti2v-5b"))
def test_calls_of_every_kind_of_model_are_recorded(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(preset, num_layers=1)
    monkeypatch.setitem(PRESETS, preset, replace(PRESETS[preset], config=config))
    geometry = small_geometry(config)
    size = f"{geometry.height}x{geometry.width}"
    build(preset, random_weights=0, resolution=size, frames=9, output=tmp_path / "b")
    given = [forward_inputs(config, geometry, t, seed) for t, seed in ((950.0, 1), (200.0, 2))]
    stacked = {
        name: np.stack([call[name] for call in given])
        if name == "timestep"
        else np.concatenate([call[name] for call in given])
        for name in given[0]
    }
    denoiser = load(tmp_path / "b")
    velocities = np.concatenate([denoiser(**call) for call in given])
    save_arrays(tmp_path / "in.safetensors", stacked)
    save_arrays(tmp_path / "out.safetensors", {"velocity": velocities})
    calls, outputs = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    result = compare(tmp_path / "b", calls=calls, outputs=outputs)
    assert result["passed"]
    assert [row["error"] for row in result["steps"]] == [0, 0]
    assert compare(tmp_path / "b", calls=calls)["passed"]
    loop = compare(tmp_path / "b", steps=3, bisect=True)  # t2v-a14b's guidance is a pair: 3 and 4
    assert loop["passed"] and loop["bisect"]["first"] is None
    assert (loop["bisect"]["expert"] in EXPERTS) is (preset == "t2v-a14b")
    theirs = compare(tmp_path / "b", steps=1, bisect=True, reference="diffusers")["bisect"]
    assert [row["call"] for row in theirs["calls"]] == ["embed", "block", "head"]
    assert theirs["first"] is None


def test_a_large_model_is_streamed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compare(bundle, dtype="fp32", steps=2)
    monkeypatch.setattr("wanexport.exporter.compare.peers.free_bytes", lambda device: 10**6)
    again = compare(bundle, dtype="fp32", steps=2)
    assert again["steps"] == first["steps"]
    with pytest.raises(WanExportError, match=r"diffusers' model would take 0.0 GB of 0.0 GB free"):
        compare(bundle, dtype="fp32", reference="diffusers")


def test_other_weights_are_compared_with_their_own_reference(bundle: Path) -> None:
    add_style(bundle)
    folder = bundle / "weights" / "style-fp32"
    base = compare(bundle, dtype="fp32", steps=1)
    by_name = compare(bundle, dtype="fp32", steps=1, weights="style")
    by_path = compare(bundle, dtype="fp32", steps=1, weights=folder)
    assert by_name["passed"] and by_name["weights"] == "style"
    assert by_path["steps"] == by_name["steps"] != base["steps"]
    reports = {path.name for path in (bundle / "reports").glob("*.json")}
    assert reports == {f"compare-64x96x9-onnx-fp32{w}.json" for w in ("", "-style", "-style-fp32")}
    (parity,) = (e.parity for e in read_manifest(bundle).engines if e.dtype == "fp32")
    assert parity["weights"] == str(folder)
    with pytest.raises(WanExportError, match="no weights set cubist"):
        compare(bundle, dtype="fp32", weights="cubist")


def test_weights_of_a_set_that_were_altered_are_refused(bundle: Path) -> None:
    add_style(bundle)
    path = bundle / "weights" / "style-fp32" / "denoiser.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert compare(bundle, dtype="fp32", steps=1)["passed"]
    with pytest.raises(WanExportError, match="was altered after the build"):
        compare(bundle, dtype="fp32", steps=1, weights="style")


def test_the_inputs_of_a_report_repeat_it(bundle: Path, tmp_path: Path) -> None:
    first = compare(bundle, dtype="fp32", steps=2, seed=3, report=tmp_path)
    inputs = tmp_path / "compare-64x96x9-onnx-fp32-inputs.safetensors"
    again = compare(bundle, dtype="fp32", steps=2, inputs=inputs, report=tmp_path / "again")
    assert again["steps"] == first["steps"]
    assert (first["inputs"], again["inputs"]) == ("seed 3", str(inputs))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": None}, "text missing"),
        ({"extra": np.zeros(1)}, "extra not expected"),
        (
            {"latent": np.zeros((3, 16, 3, 8, 8))},
            r"latent is \[3, 16, 3, 8, 8\], expected",
        ),
        ({"timestep": np.zeros(2)}, r"timestep is \[2\], expected \[3, 1\]"),
        ({"latent": np.zeros((1, 16, 3, 8, 12))}, r"timestep is \[3\], expected \[1, 1\]"),
        ({"text": np.zeros((1, 513, 4096))}, "text has 513 rows"),
        ({"latent": np.full((3, 16, 3, 8, 12), np.nan)}, "NaN or Inf"),
        ({"latent": np.zeros((0, 16, 3, 8, 12)), "timestep": np.zeros(0)}, "no call"),
    ],
)
def test_a_recording_that_does_not_fit_is_refused(
    converted: Path, tmp_path: Path, changes: dict[str, np.ndarray | None], message: str
) -> None:
    calls, _, stacked = record(tmp_path)
    changed = {n: a for n, a in {**stacked, **changes}.items() if a is not None}
    save_arrays(calls, changed)
    with pytest.raises(WanExportError, match=message):
        compare(converted, dtype="fp32", calls=calls)


def test_outputs_without_their_calls_are_refused(converted: Path, tmp_path: Path) -> None:
    calls, outputs, _ = record(tmp_path)
    with pytest.raises(WanExportError, match=r"pass the file of these calls too \(--calls\)"):
        compare(converted, dtype="fp32", outputs=outputs)
    with pytest.raises(WanExportError, match=r"expected velocity \[3, 16, 3, 8, 12\]"):
        compare(converted, dtype="fp32", calls=calls, outputs=calls)
    with pytest.raises(WanExportError, match="unknown reference 'keras'"):
        compare(converted, reference="keras")
    with pytest.raises(WanExportError, match="unknown outputs dtype 'int8'"):
        compare(converted, dtype="fp32", calls=calls, outputs=outputs, outputs_dtype="int8")


def test_calls_and_the_inputs_of_a_loop_are_told_apart(converted: Path, tmp_path: Path) -> None:
    calls, outputs, _ = record(tmp_path)
    inputs = tmp_path / "inputs.safetensors"
    save_arrays(inputs, seeded_inputs(small_config("t2v-1.3b"), Geometry(64, 96, 9), 0))
    with pytest.raises(BadRequest, match=r"inputs\.safetensors holds .*loop go to --inputs"):
        compare(converted, dtype="fp32", calls=inputs)
    with pytest.raises(BadRequest, match=r"calls\.safetensors holds .* go to compare --calls"):
        compare(converted, dtype="fp32", inputs=calls)
    with pytest.raises(BadRequest, match="pass one of the two"):
        compare(converted, dtype="fp32", inputs=inputs, calls=calls)
    with pytest.raises(BadRequest, match=r"outputs\.safetensors holds velocity: expected recorded"):
        compare(converted, dtype="fp32", calls=outputs)


def test_not_a_number_fails_and_is_null_in_json(bundle: Path) -> None:
    def to_nan(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for attribute in node.attribute:
                if node.op_type == "RMSNormalization" and attribute.name == "epsilon":
                    attribute.f = float("nan")

    faults.alter_graph(bundle, to_nan, "fp32")
    result = compare(bundle, steps=3)
    assert not result["passed"]
    size = 16 * 3 * 8 * 12
    for row in result["steps"]:
        assert row["error"] is row["cosine"] is row["max"] is row["p99"] is row["drift"] is None
        assert (row["nan"], row["inf"]) == (2 * size, 0)
    assert json.loads((bundle / "reports" / "compare-64x96x9-onnx-fp32.json").read_text()) == result


def test_a_reference_that_is_not_finite_fails(bundle: Path) -> None:
    alter = faults.alter_weight
    alter(bundle, "head.head.bias", lambda array: array.fill(np.nan))
    with pytest.raises(WanExportError, match=r"head\.head\.bias has 64 NaN and 0 infinite of 64"):
        compare(bundle, dtype="fp32", steps=3)


@pytest.mark.parametrize("preset", slow_but(["ti2v-5b", "i2v-a14b", "flf2v-14b"], "i2v-a14b"))
def test_conditioned_families_are_compared_through_their_own_inputs(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(preset, num_layers=1)
    monkeypatch.setitem(PRESETS, preset, replace(PRESETS[preset], config=config))
    geometry = small_geometry(config)
    size = f"{geometry.height}x{geometry.width}"
    build(preset, random_weights=0, resolution=size, frames=9, output=tmp_path / "b")
    result = compare(tmp_path / "b", steps=3)
    assert result["passed"]
    assert compare(tmp_path / "b", steps=2, reference="diffusers")["passed"]
    inputs = read_header(
        tmp_path / "b" / "reports" / f"compare-{size}x9-onnx-fp32-inputs.safetensors"
    )
    assert ("first_frame" in inputs) == (preset == "ti2v-5b")
    assert ("condition" in inputs) == (preset != "ti2v-5b")
    assert ("image" in inputs) == (preset == "flf2v-14b")


def test_relative_l2_and_gates() -> None:
    one = np.ones(4, np.float32)
    assert relative_l2(1.5 * one, one) == 0.5
    assert np.isnan(relative_l2(np.array([1, 1, np.inf, 1]), one))
    assert not Parity(float("nan"), None).passed
    assert measure(one, one, None).gate == 1e-5
    assert Parity(1.2e-3, 1e-3).passed
    assert not Parity(1.3e-3, 1e-3).passed
    assert Parity(0.0, None, (3e-3,)).gate == pytest.approx(3.75e-3, rel=1e-4)
    assert Parity(0.0, 4e-3, (3e-3,)).gate == pytest.approx(6.25e-3)
    assert Parity(1e-6, 0.0).passed  # a floor of nothing, as of a zero head, is no gate
    assert not Parity(float("inf"), float("inf")).passed
    assert not Parity(1.0, float("nan")).passed


def test_differences_in_every_metric() -> None:
    exact = np.array([3.0, 4.0], np.float32)
    found = difference(np.array([3.0, 4.5], np.float32), exact)
    assert found.error == pytest.approx(0.1)
    assert found.cosine == pytest.approx((9 + 18) / (5 * 29.25**0.5))
    assert found.max == 0.5
    assert found.p99 == pytest.approx(0.495)
    broken = difference(np.array([np.nan, -np.inf], np.float32), exact)
    assert (broken.nan, broken.inf) == (1, 1)
    assert np.isnan(broken.error)
    assert difference(exact * 0, exact * 0).error == 0
    assert difference(exact, exact * 0).error == np.inf
