"""Causal TensorRT engines on doubles of its real classes, whose plans run as ONNX Runtime would."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from tests.causal_stream import CONFIG, Clip, Slots, compared, random_weights
from tests.exporter.families import memory as memory_family
from tests.oracles.tensorrt_doubles import Gpu, Stream, TensorRt, write_graph_plan
from tests.runtime.causal_engine import causal_denoiser, joined, text_of
from tests.runtime.engines.test_tensorrt_engine import CONFIG as SMALL
from tests.runtime.engines.test_tensorrt_engine import FLAVOUR, REAL, since
from wanexport.exporter.backends.onnx.assemble import assemble
from wanexport.exporter.backends.onnx.lower import Lowered, for_tensorrt, lower
from wanexport.exporter.backends.tensorrt.proof_process import PlanJob, prove_plan
from wanexport.exporter.bundle.writer import file_record, write_manifest
from wanexport.exporter.cli.main import cli
from wanexport.exporter.compare.peers import EXACT, Peers
from wanexport.exporter.compare.recorded import Loop
from wanexport.exporter.compare.request import CompareRequest
from wanexport.exporter.compare.streams import stream_rows
from wanexport.exporter.inspection import inspect
from wanexport.exporter.reference.eager import EagerEngine
from wanexport.exporter.reference.figures import make_case
from wanexport.exporter.reference.inputs import forward_inputs
from wanexport.exporter.reference.parity import FP32_GATE, relative_l2
from wanexport.graphs.config import sampling_defaults
from wanexport.graphs.weights import RandomWeights, bundle_tensors, write_weights
from wanexport.runtime import BadRequest, BundleError, WanExportError, load
from wanexport.runtime.bundle.details import TensorRtDetails
from wanexport.runtime.bundle.manifest import (
    BASE,
    DENOISER,
    EngineRecord,
    Manifest,
    WeightsRecord,
    read_manifest,
)
from wanexport.runtime.bundle.pinned_file import PinnedFile, pin
from wanexport.runtime.bundle.signature import parameter_shapes, weights_layout
from wanexport.runtime.bundle.tensorfile import header_sha256, load_arrays, save_arrays
from wanexport.runtime.engines import moments
from wanexport.runtime.engines.moments import keep_rows
from wanexport.runtime.engines.tensorrt_moments import MomentsEngine, run_calls
from wanexport.runtime.errors import EngineFailure
from wanexport.runtime.family import FAMILIES, family_of
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.sample_stream import sample_stream
from wanexport.runtime.wan_config import EXPERTS, WanConfig

GEOMETRY = Clip([3] * 2, 7).geometry
CLIPS = {
    "a window and a sink that chunks do not divide": Clip([3] * 4, 7, window=7, sink=1),
    "chunks of several lengths": Clip([1, 3, 2], 7, window=7),
}


class Given:
    """Weights that a test has, as a source of a weights file."""

    def __init__(self, seed: int) -> None:
        self.arrays = random_weights(CONFIG, seed)

    def chunks(self, name: str) -> Any:
        yield torch.from_numpy(self.arrays[name]).flatten()

    def digest(self) -> str:
        return ""


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where this user's compiled kernels are kept; nothing is there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A GPU with TensorRT, of doubles."""
    return Gpu(TensorRt(REAL), monkeypatch)


@pytest.fixture(scope="module")
def lowered() -> Lowered:
    """The calls of the small model in fp32, lowered as for TensorRT."""
    how = for_tensorrt("fp32", "native")
    return lower(family_of(CONFIG).graph, CONFIG, GEOMETRY, how)


def written_plans(lowered: Lowered, config: WanConfig, folder: Path) -> dict[str, Path]:
    """Plans that compute what their graphs do, by the calls of the whole Program."""
    _, layout = weights_layout(config, lowered.dtype)
    plans = {}
    for call in lowered.program.whole().calls:
        graph, plans[call.name] = (folder / f"{call.name}.{kind}" for kind in ("onnx", "plan"))
        model = assemble(lowered, layout, call.when, as_inputs=True)
        graph.write_bytes(ir.to_proto(model).SerializeToString())
        write_graph_plan(plans[call.name], graph)
    return plans


REMEMBERING = replace(SMALL, family="memory")


@pytest.fixture(scope="module")
def remembering() -> Lowered:
    """The same of a family of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "memory", memory_family.FAMILY)
        graph, how = family_of(REMEMBERING).graph, for_tensorrt("fp32", "native")
        return lower(graph, REMEMBERING, Geometry(64, 96, 9), how)


@pytest.fixture(scope="module")
def bundle(lowered: Lowered, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with one engine, whose plans compute what their graphs do."""
    folder = tmp_path_factory.mktemp("bundle")
    weights = folder / "weights" / "fp32" / "denoiser.safetensors"
    weights.parent.mkdir(parents=True)
    write_weights(weights, CONFIG, "fp32", Given(0))
    plans = written_plans(lowered, CONFIG, folder)
    program = lowered.program.whole()
    files = {name: file_record(folder, path) for name, path in plans.items()}
    header = header_sha256(weights)
    engine = EngineRecord(
        backend=FLAVOUR,
        role=DENOISER,
        family=CONFIG.family,
        dtype="fp32",
        geometry=GEOMETRY,
        program=program,
        details=TensorRtDetails(),
        sampling=sampling_defaults(CONFIG, (), GEOMETRY),
        files=files,
        layout=header,
        key="0123456789abcdef0123",
        target={"device": "cuda", "arch": "sm89", FLAVOUR: REAL.__version__},
    )
    record = WeightsRecord(BASE, DENOISER, "", "fp32", header, file_record(folder, weights), "", {})
    write_manifest(folder, Manifest("tiny", CONFIG, (), {"fp32": record}, (engine,), wanexport="0"))
    return folder


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another weights file of the same layout."""
    path = tmp_path / "other.safetensors"
    write_weights(path, CONFIG, "fp32", Given(1))
    return path


def opened(bundle: Path, **options: Any) -> MomentsEngine:
    (engine,) = load(bundle, **options).engines.values()
    assert isinstance(engine, MomentsEngine)
    return engine


def weights_of(bundle: Path) -> Path:
    return bundle / "weights" / "fp32" / "denoiser.safetensors"


def session(
    engine: MomentsEngine, file: PinnedFile | None = None
) -> Callable[[Mapping[str, np.ndarray], str], Any]:
    """A video of an engine that has not begun, from numpy to numpy."""
    memory = engine.memory()

    def call(inputs: Mapping[str, np.ndarray], moment: str) -> Any:
        given = {name: torch.from_numpy(array) for name, array in inputs.items()}
        velocity = engine(given, file, memory, moment)
        return None if velocity is None else velocity.numpy()

    return call


def drawn(seed: int, number: int = 0) -> dict[str, Tensor]:
    """The inputs of a chunk of a video."""
    rng, slots = np.random.default_rng(seed), Slots(GEOMETRY)
    program = family_of(CONFIG).program(CONFIG, GEOMETRY)
    inputs = {n: rng.standard_normal(s.shape, np.float32) for n, s in program.inputs.items()}
    for index in range(number + 1):
        place = slots.place(index * GEOMETRY.chunk, GEOMETRY.chunk)
    times = {"timestep": np.full(GEOMETRY.chunk, 700, np.float32)}
    return {name: torch.from_numpy(a) for name, a in {**inputs, **times, **place}.items()}


@pytest.mark.parametrize("name", CLIPS)
def test_every_step_of_a_stream_is_that_of_the_official_rules(
    name: str, gpu: Gpu, bundle: Path
) -> None:
    pairs = compared(CLIPS[name], load_arrays(weights_of(bundle)), session(opened(bundle)))
    assert max(relative_l2(*pair) for pair in pairs) <= FP32_GATE


def test_a_stream_of_the_denoiser_is_that_of_eager_pytorch(gpu: Gpu, bundle: Path) -> None:
    """Through `load` and the loop, with the weights that the double of an engine has."""
    latents = []
    for denoiser in (load(bundle), causal_denoiser(GEOMETRY)[0]):
        stream = denoiser.stream(text_of(), window=5)
        latents.append(joined([chunk.latent for chunk in sample_stream(stream, frames=6, seed=3)]))
    assert relative_l2(*latents) <= 10 * FP32_GATE


def test_the_state_lies_where_the_session_has_it(gpu: Gpu, bundle: Path) -> None:
    engine = opened(bundle)
    memory = engine.memory()
    before = dict(memory.state)
    assert engine(drawn(0), memory=memory).shape == engine.program.output.shape
    assert engine(drawn(0), memory=memory, moment="commit") is None
    gpu.trt.calls.clear()
    engine(drawn(1, 1), memory=memory)
    addresses = dict(call[1:] for call in since(gpu.trt.calls, "set_tensor_address"))
    assert not {n for n in addresses if not n.endswith((".rows", "velocity"))}  # bound already
    for name, tensor in before.items():
        if name.startswith("cache_"):
            assert memory.state[name] is tensor and tensor.any(), name
    second = engine.memory()
    gpu.trt.calls.clear()
    engine(drawn(1, 1), memory=second)
    addresses = dict(call[1:] for call in since(gpu.trt.calls, "set_tensor_address"))
    for name, tensor in second.state.items():
        assert addresses[name] == tensor.data_ptr()


def test_sessions_by_turns_are_as_if_alone(gpu: Gpu, bundle: Path) -> None:
    engine = opened(bundle)
    alone: list[list[Tensor]] = []
    for video in (0, 1):
        memory = engine.memory()
        alone.append([engine(drawn(2 * video + n, n), memory=memory) for n in (0, 1)])
    memories = [engine.memory(), engine.memory()]
    for number in (0, 1):
        for video in (0, 1):
            found = engine(drawn(2 * video + number, number), memory=memories[video])
            torch.testing.assert_close(found, alone[video][number], rtol=0, atol=0)


def test_the_text_is_read_once_and_again_for_other_weights(
    gpu: Gpu, bundle: Path, other: Path
) -> None:
    engine = opened(bundle)
    memory = engine.memory()
    executions = []
    for file in (None, None, pin(other), pin(other)):
        before = gpu.trt.count("execute_async_v3")
        velocity = engine(drawn(0), file, memory)
        executions.append(gpu.trt.count("execute_async_v3") - before)
    assert executions == [2, 1, 2, 1]
    fresh = engine(drawn(0), pin(other), engine.memory())
    torch.testing.assert_close(velocity, fresh, rtol=0, atol=0)


def test_the_host_waits_for_nothing_and_no_graph_is_captured(gpu: Gpu, bundle: Path) -> None:
    with pytest.raises(BadRequest, match=r"a state of each session, .*: leave --cuda-graph out"):
        load(bundle, cuda_graph=True)
    engine = opened(bundle)
    memory = engine.memory()
    engine(drawn(0), memory=memory)
    gpu.trt.calls.clear()
    for moment in ("step", "commit"):
        engine(drawn(0), memory=memory, moment=moment)
    names = [c[0] for c in gpu.trt.calls if c[0] != "set_tensor_address"]
    assert names == ["wait_event", "execute_async_v3", "record"] * 2


def test_rows_are_written_behind_the_plan_where_it_ran_on_another_stream(
    gpu: Gpu, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, calls = opened(bundle), gpu.trt.calls
    memory = engine.memory()
    engine(drawn(0), memory=memory)

    def noted(*arrays: Any) -> None:
        calls.append(("rows",))
        keep_rows(*arrays)

    monkeypatch.setattr(moments, "keep_rows", noted)
    gpu.current = Stream(calls, 0)
    calls.clear()
    engine(drawn(0), memory=memory, moment="commit")
    own = [
        ("wait_event", 0),
        ("wait_stream", 99, 0),
        ("execute_async_v3", 99),
        ("wait_stream", 0, 99),
        *[("rows",)] * 2 * CONFIG.num_layers,
        ("record", 0),
    ]
    assert [call for call in calls if call[0] != "set_tensor_address"] == own


def test_the_plans_share_weights_and_activations(gpu: Gpu, bundle: Path) -> None:
    opened(bundle)
    calls = gpu.trt.calls
    assert gpu.trt.count("deserialize_cuda_engine") == 3
    assert len(set(since(calls, "set_device_memory"))) == 1
    bound = [call for call in since(calls, "set_tensor_address") if call[1] in NAMES]
    assert {name for _, name, _ in bound} == NAMES
    assert len(set(bound)) == len(NAMES)  # a parameter of two plans has one address


NAMES = set(parameter_shapes(CONFIG))


def test_what_tensorrt_refuses_leaves_the_session_as_it_was(gpu: Gpu, bundle: Path) -> None:
    engine = opened(bundle)
    memory = engine.memory()
    engine(drawn(0), memory=memory)
    before = {name: tensor.clone() for name, tensor in memory.state.items()}
    gpu.trt.fails = "execute_async_v3"
    with pytest.raises(EngineFailure, match=r"cannot execute .*failed on purpose"):
        engine(drawn(1, 1), memory=memory)
    gpu.trt.fails = ""
    for name, tensor in before.items():
        torch.testing.assert_close(memory.state[name], tensor, rtol=0, atol=0)
    engine.close()
    for call in (lambda: engine(drawn(0), memory=memory), lambda: engine.use(engine.file)):
        with pytest.raises(EngineFailure, match="was closed: load it again"):
            call()


def test_a_close_beside_a_call_is_told_in_one_line(gpu: Gpu, bundle: Path) -> None:
    """Of another thread, between the looks that a call takes at the engine's weights."""

    class ClosedBetween(MomentsEngine):
        looks: ClassVar[list[Any]] = []

        @property
        def weights(self) -> Any:
            return self.looks.pop(0) if self.looks else None

        @weights.setter
        def weights(self, weights: Any) -> None: ...

    engine = opened(bundle)
    ClosedBetween.looks = [engine.weights]
    engine.__class__ = ClosedBetween
    engine(drawn(0))
    with pytest.raises(EngineFailure, match="was closed: load it again"):
        engine(drawn(0))


WRONG: dict[str, tuple[str, str, Any, str]] = {
    "a cache of another length": (
        "denoiser", "cache_k.1", ([1, 42, 2, 24], "FLOAT"), r"\[1, 42, 2, 24\] in fp32 for cache_k"
    ),
    "rows of no whole slots": (
        "commit", "cache_v.0.rows", ([1, 17, 2, 24], "FLOAT"), r"\[1, 17, 2, 24\] .* for cache_v"
    ),
    "no number of keys": ("denoiser", "keys", None, "has nothing for keys, the manifest has"),
    "keys of another type": ("commit", "keys", ([1], "FLOAT"), r"\[1\] in fp32 for keys"),
    "a parameter of another shape": (
        "prompt", "text_embedding.0.bias", ([7], "FLOAT"), r"\[7\] in fp32 for text_embedding"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_plan_that_does_not_fit_is_refused_before_any_is_bound(
    name: str, gpu: Gpu, bundle: Path, tmp_path: Path
) -> None:
    call, tensor, found, message = WRONG[name]
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    plan = json.loads((copy / f"{call}.plan").read_text())
    plan["tensors"][tensor] = found
    if found is None:
        del plan["tensors"][tensor]
    (copy / f"{call}.plan").write_text(json.dumps(plan))
    manifest = read_manifest(copy)
    (engine,) = manifest.engines
    files = {**engine.files, call: file_record(copy, copy / f"{call}.plan")}
    write_manifest(copy, replace(manifest, engines=(replace(engine, files=files),)))
    with pytest.raises(BundleError, match=message):
        load(copy)
    assert not since(gpu.trt.calls, "set_tensor_address", "create_execution_context")


def test_an_engine_without_a_plan_for_a_moment_is_unusable(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    manifest = read_manifest(copy)
    assert not inspect(copy)["problems"]
    (engine,) = manifest.engines
    files = {role: file for role, file in engine.files.items() if role != "commit"}
    write_manifest(copy, replace(manifest, engines=(replace(engine, files=files),)))
    assert "it has no file for its call commit" in str(inspect(copy)["problems"])


def test_plans_of_experts_are_no_plan_of_a_causal_step(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    manifest = read_manifest(copy)
    (engine,) = manifest.engines
    files = dict(engine.files)
    step = files.pop("denoiser")
    files |= {f"denoiser-{expert}": step for expert in EXPERTS}
    write_manifest(copy, replace(manifest, engines=(replace(engine, files=files),)))
    assert "it has no file for its call denoiser" in str(inspect(copy)["problems"])


def test_a_plan_that_gives_nothing_of_a_state_is_refused(
    gpu: Gpu, bundle: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    manifest = read_manifest(copy)
    (engine,) = manifest.engines
    files = dict(engine.files)
    for call in ("denoiser", "commit"):
        plan = json.loads((copy / f"{call}.plan").read_text())
        del plan["tensors"]["cache_k.1.rows"]
        plan["outputs"].remove("cache_k.1.rows")
        (copy / f"{call}.plan").write_text(json.dumps(plan))
        files[call] = file_record(copy, copy / f"{call}.plan")
    write_manifest(copy, replace(manifest, engines=(replace(engine, files=files),)))
    with pytest.raises(BundleError, match=r"cache_k\.1.*run wanexport build again"):
        load(copy)


def test_other_weights_are_used_between_videos(gpu: Gpu, bundle: Path, other: Path) -> None:
    pairs = compared(Clip([3], 7), load_arrays(other), session(opened(bundle), pin(other)))
    assert max(relative_l2(*pair) for pair in pairs) <= FP32_GATE
    denoiser = load(bundle)
    denoiser.use(other)
    stream = denoiser.stream(text_of())
    (own,) = sample_stream(stream, frames=3)
    denoiser.use("base")
    with pytest.raises(BadRequest, match="the weights became base in the middle"):
        next(iter(sample_stream(stream, frames=3)))
    stream.reset()
    (after,) = sample_stream(stream, frames=3)
    assert relative_l2(joined([after.latent]), joined([own.latent])) > 0.1


def job_of(bundle: Path, folder: Path) -> PlanJob:
    names = {name: name for name in parameter_shapes(CONFIG)}
    case = make_case(CONFIG, GEOMETRY, "fp32", device="cpu", tensors=names, folder=folder)
    plans = {name: str(bundle / f"{name}.plan") for name in ("prompt", "denoiser", "commit")}
    return PlanJob(
        **case, weights=str(weights_of(bundle)), flavour=FLAVOUR, plans=plans,
        version_compatible=False,
    )  # fmt: skip


def test_the_proof_on_a_gpu_commits_a_chunk_and_runs_a_step_of_the_next(
    gpu: Gpu, bundle: Path, tmp_path: Path
) -> None:
    figures = prove_plan(job_of(bundle, tmp_path))
    assert figures["error"] <= figures["gate"] == FP32_GATE
    assert figures["method"] == "plan opened and run on the GPU"
    # Each plan once at load, then text, commit and step.
    assert gpu.trt.count("execute_async_v3") == 6


def one_slot_off(state: Any, slots: Any, rows: Any) -> None:
    keep_rows(state, slots + 1, rows)


def test_the_proof_on_a_gpu_refuses_rows_in_other_slots(
    gpu: Gpu, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "keep_rows", one_slot_off)
    with pytest.raises(WanExportError, match="over the gate"):
        prove_plan(job_of(bundle, tmp_path))


def test_a_state_that_is_replaced_and_a_value_of_the_prompt_reach_the_next_step(
    remembering: Lowered, gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another family, whose steps remember: a plan gives its state whole, in a new place."""
    monkeypatch.setitem(FAMILIES, "memory", memory_family.FAMILY)
    config, geometry, model = REMEMBERING, Geometry(64, 96, 9), remembering
    weights = tmp_path / "denoiser.safetensors"
    write_weights(weights, config, "fp32", RandomWeights(config, 0, ""))
    program = model.program.whole()
    inputs = [forward_inputs(config, geometry, 700, seed) for seed in (0, 1)]
    steps = [("step", given) for given in inputs]
    names = {name: name for name in parameter_shapes(config)}
    eager = EagerEngine(config, geometry, "fp32", bundle_tensors(weights, names))
    memory = eager.memory()
    expected = [eager(given, memory=memory) for given in inputs]
    paths = written_plans(model, config, tmp_path)
    found = run_calls(FLAVOUR, paths, weights, program, "fp32", steps)
    assert relative_l2(found, expected[1]) <= FP32_GATE
    text = {"text": inputs[0]["text"]}  # of which a session reads the first alone
    fresh = run_calls(FLAVOUR, paths, weights, program, "fp32", [("step", inputs[1] | text)])
    assert relative_l2(fresh, expected[1]) > 100 * FP32_GATE


def test_compare_and_stream_take_the_engine(gpu: Gpu, bundle: Path, tmp_path: Path) -> None:
    peers = Peers({EXACT: causal_denoiser(GEOMETRY)[0]}, None)
    asked = CompareRequest(chunks=2, window=5)
    found = stream_rows(load(bundle), peers, Loop({"text": text_of()}, 4), asked, lambda *_: None)
    assert found.passed and len(found.rows) == 10
    save_arrays(tmp_path / "text.safetensors", {"text": text_of()})
    output = tmp_path / "latents.safetensors"
    words = ["stream", str(bundle), "--text", str(tmp_path / "text.safetensors"), "--window", "5"]
    result = CliRunner().invoke(cli, [*words, "-o", str(output)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert np.isfinite(load_arrays(output)["latent"]).all()


def test_a_session_that_began_in_inference_mode_goes_on_outside(gpu: Gpu, bundle: Path) -> None:
    stream = load(bundle).stream(text_of())
    with torch.inference_mode():
        (first,) = sample_stream(stream, frames=3)
    stream.reset()
    (again,) = sample_stream(stream, frames=3)
    assert relative_l2(joined([again.latent]), joined([first.latent])) == 0
