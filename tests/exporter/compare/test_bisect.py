"""`compare --bisect` names the call and the node that a fault was planted in, and no other."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from tests.quick import slow_but
from tests.tables import faults
from tests.tables.bisect import Fault, alter_block, bisected, engine_of
from wanexport.exporter.bundle.writer import file_record, write_manifest
from wanexport.exporter.cli.main import cli
from wanexport.exporter.compare import nodes
from wanexport.exporter.compare.bisect import Bisection, Forward, Noise, Visited, distance
from wanexport.exporter.compare.compare import compare
from wanexport.exporter.compare.nodes import inside
from wanexport.exporter.compare.peers import EXACT, Placed, open_peers, tensors_of_bundle
from wanexport.exporter.compare.steppers import EagerStepper, OnnxStepper, stepper_of
from wanexport.exporter.reference.inputs import forward_inputs
from wanexport.exporter.reference.parity import relative_l2
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.bundle.signature import program_of
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.engines.engine import EngineKeywords
from wanexport.runtime.engines.onnx_gpu import OnnxGpuEngine
from wanexport.runtime.engines.onnx_gpu import open_engines as open_gpu_engines
from wanexport.runtime.engines.onnx_providers import Provider
from wanexport.runtime.errors import BadRequest, BundleError, WanExportError
from wanexport.runtime.load import find_weights, load
from wanexport.runtime.program import WHOLE, Call, Input, Program, TensorSpec

PLANTED = [  # and the operator whose value is the first one in excess
    (Fault("onnx", "fp32", "RoPE axis", 1, "rows"), "Mul"),
    (Fault("onnx", "fp16", "gate", 2, "self-attention"), "Mul"),
    (Fault("onnx", "fp32", "precision", 3, "the block's input"), "LayerNormalization"),
]


@pytest.mark.parametrize(
    ("fault", "operator"),
    slow_but(PLANTED, PLANTED[2]),
    ids=lambda case: getattr(case, "kind", ""),
)
def test_a_fault_in_one_block_is_located(bundle: Path, fault: Fault, operator: str) -> None:
    found = bisected(bundle, fault)["bisect"]
    assert found["first"] == f"block {fault.layer}"
    assert [row["call"] for row in found["calls"] if not row["passed"]] == [found["first"]]
    assert found["nodes"]["first"]["operators"][-1] == operator
    assert found["verdict"].startswith(f"block {fault.layer} is the first call that exceeds")


@pytest.mark.slow
def test_a_weight_that_was_converted_wrong_is_named(converted: Path) -> None:
    found = bisected(converted, Fault("onnx", "fp16", "weight", 1, "cross_attn.v"))["bisect"]
    assert found["first"] == "block 1"
    assert "blocks.1.cross_attn.v.weight" in found["nodes"]["first"]["parameters"]
    assert found["nodes"]["first"]["value"] == "linear_4"  # the fifth product of a block


@pytest.mark.parametrize(
    ("name", "call"),
    slow_but(
        [("time_embedding.0.weight", "embed"), ("head.head.weight", "head")], "head.head.weight"
    ),
)
def test_the_ends_are_looked_into_too(converted: Path, name: str, call: str) -> None:
    faults.alter_weight(converted, name, faults.scale_tensor)
    model = str(converted.parent / "model")
    found = compare(converted, dtype="fp32", model=model, steps=1, bisect=True)["bisect"]
    assert found["first"] == call
    assert name in found["nodes"]["first"]["parameters"]


@pytest.mark.parametrize(
    ("dtype", "reference"), slow_but([("fp16", "graph"), ("fp32", "diffusers")], "fp16")
)
def test_a_clean_engine_has_no_faulty_call(tiny_bundle: Path, dtype: str, reference: str,
                                           tmp_path: Path) -> None:  # fmt: skip
    result = compare(
        tiny_bundle, dtype=dtype, reference=reference, steps=2, bisect=True, report=tmp_path
    )
    found = result["bisect"]
    names = ["embed", *(f"block {i}" for i in range(4)), "head"]
    assert [row["call"] for row in found["calls"]] == names
    assert found["first"] is found["nodes"] is None
    assert found["verdict"].startswith("no call exceeds its floor: the nearest is ")
    worst = max(result["steps"], key=lambda row: row["error"] / row["gate"])
    assert found["step"] == worst["step"]
    # One by one, each from what the one before gave, the calls are the engine.
    last = found["calls"][-1]
    assert last["carried"] == pytest.approx(worst["error"], rel=0.05)
    if dtype == "fp16":
        assert last["carried_floor"] == pytest.approx(worst["floor"], rel=0.05)


def test_a_flat_graph_is_cut_too(bundle: Path) -> None:
    faults.alter_graph(bundle, faults.swap_gate_and_shift, "fp32")  # of the first block
    found = compare(bundle, dtype="fp32", steps=1, bisect=True)["bisect"]
    assert [row["passed"] for row in found["calls"]] == [True, False, True, True, True, True]
    assert found["first"] == "block 0"
    assert found["nodes"]["first"]["operators"] == ["Slice"]


@pytest.mark.slow
def test_a_fault_of_the_graph_shows_against_diffusers_and_in_no_node(
    converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.tables.faults.compare", partial(compare, bisect=True))
    found = faults.in_code("apply_rope", faults.rope_without_rows)(converted)["bisect"]
    assert found["first"] == "block 0"
    assert found["nodes"]["first"] is None
    assert "they differ from our graph's nowhere" in found["verdict"]


@pytest.mark.slow
def test_values_are_tapped_a_few_at_a_time(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alter_block(bundle, fault := Fault("onnx", "fp32", "RoPE axis", 1, "frames"))
    options: dict[str, Any] = {"dtype": fault.dtype, "steps": 1, "bisect": True}
    at_once = compare(bundle, **options)["bisect"]["nodes"]
    monkeypatch.setattr(nodes, "free_bytes", lambda device: 16 * 200_000)
    in_groups = compare(bundle, **options)["bisect"]["nodes"]
    assert in_groups["first"] == at_once["first"]
    assert in_groups["values"] == at_once["values"][: len(in_groups["values"])]
    assert len(in_groups["values"]) < len(at_once["values"])


def test_a_block_that_reads_another_ones_value_is_named(bundle: Path) -> None:
    engine = engine_of(bundle, Fault("onnx", "fp32", "", 0, ""))
    path = bundle / engine.files["denoiser"].path
    model = onnx.load(path, load_external_data=False)
    calls = [node for node in model.graph.node if node.op_type == "block"]
    calls[2].input[:] = ["block.0.x" if n == "block.1.x" else n for n in calls[2].input]
    path.write_bytes(model.SerializeToString())
    manifest = read_manifest(bundle)
    altered = replace(engine, files={"denoiser": file_record(bundle, path)})
    engines = tuple(altered if e == engine else e for e in manifest.engines)
    write_manifest(bundle, replace(manifest, engines=engines))
    with pytest.raises(BundleError, match=r"computes block 2 from \S+, and not from block\.1\.x"):
        compare(bundle, dtype="fp32", steps=1, bisect=True)


@pytest.mark.slow
def test_another_engine_takes_the_place_of_the_model(bundle: Path) -> None:
    options: dict[str, Any] = {"dtype": "fp16", "against": "onnx", "steps": 1, "bisect": True}
    clean = compare(bundle, **options)
    assert clean["passed"] and clean["bisect"]["first"] is None
    assert clean["reference"] == "64x96x9/onnx-fp32"
    assert "in fp16 and 64x96x9/onnx-fp32 in fp32" in clean["note"]
    for row in clean["steps"]:
        assert row["other"] is None
        own, weights = (1.25 * row[name] for name in ("floor", "rounding"))
        assert row["gate"] == pytest.approx(np.sqrt(own**2 + weights**2 + 1e-10), rel=1e-6)
    assert (bundle / "reports" / "compare-64x96x9-onnx-fp16-64x96x9-onnx-fp32.json").exists()
    alter_block(bundle, Fault("onnx", "fp32", "gate", 1, "self-attention"))  # of the other engine
    found = compare(bundle, **options)["bisect"]
    assert found["first"] == "block 1"
    assert found["nodes"]["first"] is None  # the engine's own nodes are as they should be


def test_what_leaves_no_values_or_names_two_references_is_refused(tiny_bundle: Path) -> None:
    recorded = {"calls": "c", "outputs": "o"}
    for options, message in (
        ({"bisect": True, **recorded}, "no values between calls to bisect by: leave --outputs"),
        ({"against": "onnx", "model": "m"}, "--model names another: leave one out"),
        ({"against": "onnx", "reference": "diffusers"}, "--reference names another"),
        ({"against": "onnx", **recorded}, "--outputs names another"),
        ({"against": "trt"}, "no other trt engine than 64x96x9/onnx-fp32"),
        ({"against": "aoti", "dtype": "fp32"}, "no other aoti engine than 64x96x9/onnx-fp32"),
        ({"plot": "a.png"}, "curves are saved as SVG"),
        ({"plot": "nowhere/a.svg"}, "cannot write in nowhere: name an existing folder"),
    ):
        with pytest.raises(BadRequest, match=message):
            compare(tiny_bundle, **options)


def test_an_engine_without_values_between_its_calls_is_refused(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    record = replace(manifest.engines[0], backend="tensorrt")
    program = program_of(manifest.config, record.geometry)
    plan = Denoiser(record, {"": SimpleNamespace()})
    with pytest.raises(BadRequest, match=r"bisect the engine of another --backend, onnx or aoti"):
        stepper_of(plan, program, "", {})
    gpu = OnnxGpuEngine.__new__(OnnxGpuEngine)
    provider = SimpleNamespace(compiles=True, name="tensorrt")
    session = SimpleNamespace(provider=provider)
    gpu.sessions, gpu.weights = {WHOLE: session}, None  # type: ignore[dict-item]
    with pytest.raises(BadRequest, match="bisect with --provider cuda or cpu"):
        stepper_of(Denoiser(record, {"": gpu}), program, "", {})


def test_a_session_over_tensors_of_a_device_is_cut_alike(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    record = next(e for e in manifest.engines if e.dtype == "fp32")
    program = program_of(manifest.config, record.geometry)
    files = find_weights(tiny_bundle, record, None, manifest).files
    graphs = {name: tiny_bundle / file.path for name, file in record.files.items()}
    engines = open_gpu_engines(graphs, files, torch.device("cpu"), Provider("cpu"), record.program)
    there = stepper_of(Denoiser(record, engines), program, "", files)
    here = stepper_of(load(tiny_bundle, dtype="fp32"), program, "", files)
    drawn = forward_inputs(manifest.config, record.geometry, 700.0, 0)
    seen: list[Visited] = []
    Forward(here).walk({n: torch.from_numpy(a) for n, a in drawn.items()}, {}, seen.append)
    for one in (seen[0], seen[2]):
        written = there.run_call(one.place.call, one.place.index, one.given)
        for name, value in written.items():
            assert distance(value, one.written[name]) < 1e-6, name


class Scaling:
    """A model of three calls that multiply a number; each rounds its result to `digits`."""

    def __init__(self, *factors: float, digits: int = 12) -> None:
        self.factors, self.digits = factors, digits
        spec = TensorSpec((1,))
        call = Call("times", ("x",), ("x",), repeat=len(factors))
        self.program = Program({"x": Input((1,))}, {"x": spec}, (call,))

    def run_call(self, call: Call, index: int, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The number times the factor of the layer."""
        return {"x": (given["x"].double() * self.factors[index]).round(decimals=self.digits)}


def rows(engine: Scaling, *, digits: int = 12) -> list[dict[str, Any]]:
    exact = Scaling(2, 3, 5)
    noise = None if digits == 12 else Noise(Scaling(2, 3, 5, digits=digits), exact)
    bisection = Bisection(engine, noise, known=exact)
    given = {"x": torch.tensor([1.234567])}
    return bisection.rows(Forward(exact), given, {}, lambda *_: None)


def test_an_error_counts_in_its_own_call_alone_and_is_carried_on() -> None:
    found = rows(Scaling(2, 3.003, 5))
    assert [row["call"] for row in found] == ["times 0", "times 1", "times 2"]
    assert [row["passed"] for row in found] == [True, False, True]
    assert found[1]["error"] == pytest.approx(1e-3)
    assert found[2]["error"] == 0
    assert [row["carried"] for row in found] == pytest.approx([0, 1e-3, 1e-3])


def test_a_call_may_be_as_far_off_as_eager_is_in_its_precision() -> None:
    assert all(row["passed"] for row in rows(Scaling(2, 3, 5, digits=3), digits=3))
    assert not any(row["passed"] for row in rows(Scaling(2, 3, 5, digits=2), digits=3))


def test_a_value_of_another_shape_is_refused() -> None:
    class Wider(Scaling):
        def run_call(
            self, call: Call, index: int, given: Mapping[str, Tensor]
        ) -> dict[str, Tensor]:
            return {"x": torch.ones(2)}

    with pytest.raises(WanExportError, match=r"times 0 of the engine gives x \[2\], the model has"):
        rows(Wider(2, 3, 5))


def test_nan_exceeds_every_floor() -> None:
    found = rows(Scaling(2, float("nan"), 5))
    assert [row["passed"] for row in found] == [True, False, True]
    assert found[1]["error"] is found[1]["carried"] is None


@pytest.mark.parametrize("shape", [(3,), (2, 3, 5)])
def test_the_distance_of_tensors_is_that_of_arrays(
    shape: tuple[int, ...], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wanexport.exporter.compare.bisect._PIECE", 4)
    a, b = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    assert distance(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(relative_l2(a, b))
    zero = torch.zeros(shape)
    assert distance(zero, zero) == 0 and distance(torch.ones(shape), zero) == float("inf")


def test_the_command_line_shows_calls_verdict_and_plot(bundle: Path, tmp_path: Path) -> None:
    alter_block(bundle, Fault("onnx", "fp32", "gate", 2, "feed-forward"))
    arguments = ["compare", str(bundle), "--dtype", "fp32", "--steps", "1", "--bisect"]
    shown = CliRunner().invoke(cli, [*arguments, "--plot", str(tmp_path / "c.svg")])
    assert shown.exit_code == 1
    lines = [" ".join(line.split()) for line in shown.stdout.splitlines()]
    assert any(re.fullmatch(r"block 2 x [\d.e-]+ 1\.0e-05 [\d.e-]+ no", line) for line in lines)
    (verdict,) = (line for line in lines if line.startswith("block 2 is the first call"))
    svg = (tmp_path / "c.svg").read_text()
    assert "the calls of step 0" in svg and ">carried<" in svg
    saved = json.loads((bundle / "reports" / "compare-64x96x9-onnx-fp32.json").read_text())
    assert saved["bisect"]["verdict"] == verdict
    assert saved["bisect"]["nodes"]["first"]["operators"][-1] == "Mul"


@pytest.mark.slow
def test_the_values_inside_every_call_of_a_clean_engine_have_the_names_of_the_trace(
    tiny_bundle: Path,
) -> None:
    found = look_everywhere(tiny_bundle, "fp16")
    assert [one["call"] for one in found] == ["embed", "block 0", "head"]
    assert [one["first"] for one in found] == [None] * 3
    assert [len(one["values"]) > least for one, least in zip(found, (20, 50, 5))] == [True] * 3


def look_everywhere(bundle: Path, dtype: str) -> list[dict[str, Any]]:
    """What is inside each call of an ONNX engine, the block's once, with seeded inputs."""
    manifest = read_manifest(bundle)
    record = next(e for e in manifest.engines if e.dtype == dtype)
    program = program_of(manifest.config, record.geometry)
    tensors = tensors_of_bundle(bundle, manifest, record, None)
    peers = open_peers(Placed(manifest, record, "cpu", tensors), {EXACT}, unrounded=None)
    exact = stepper_of(peers.eager[EXACT], program, "", {})
    options: EngineKeywords = {"backend": "onnx", "dtype": dtype}
    files = find_weights(bundle, record, None, manifest).files
    engine = stepper_of(load(bundle, **options), program, next(iter(files)), files)
    assert isinstance(engine, OnnxStepper) and isinstance(exact, EagerStepper)
    drawn = forward_inputs(manifest.config, record.geometry, 700.0, 0)
    visited: list[Visited] = []
    inputs = {name: torch.from_numpy(array) for name, array in drawn.items()}
    Forward(exact).walk(inputs, {}, visited.append)
    return [inside(engine, exact, one) for one in visited if one.place.index == 0]
