"""The runtime's calls of TensorRT, on doubles of its real classes that compute from what is bound.

Where the bindings of TensorRT can be imported these are its classes, else TensorRT for RTX's.
"""

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.oracles.tensorrt_doubles import Calls, Gpu, Stream, TensorRt, velocity, write_plan
from wanexport.exporter.backends.backend import Request
from wanexport.exporter.backends.tensorrt import prove as tensorrt_proof
from wanexport.exporter.backends.tensorrt.proof_process import PlanJob
from wanexport.exporter.backends.tensorrt.proof_process import prove_plan as prove_here
from wanexport.exporter.backends.tensorrt.prove import prove_plan
from wanexport.exporter.bundle.writer import file_record, write_manifest
from wanexport.exporter.reference.inputs import seeded_inputs
from wanexport.graphs.wan import WanModel
from wanexport.graphs.weights import RandomWeights, write_weights
from wanexport.runtime import load, sample
from wanexport.runtime.bundle.details import OnnxDetails, TensorRtDetails
from wanexport.runtime.bundle.manifest import (
    BASE,
    DENOISER,
    EngineRecord,
    Manifest,
    WeightsRecord,
    read_manifest,
)
from wanexport.runtime.bundle.pinned_file import pin
from wanexport.runtime.bundle.signature import layout_sha256, program_of
from wanexport.runtime.bundle.tensorfile import header_sha256, read_header
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.engines import tensorrt, tensorrt_target
from wanexport.runtime.engines.choose import choose_engine
from wanexport.runtime.engines.engine import EngineOptions
from wanexport.runtime.engines.tensorrt import TensorRtEngine
from wanexport.runtime.engines.tensorrt_library import import_tensorrt, message_log
from wanexport.runtime.engines.tensorrt_plan import Plan
from wanexport.runtime.errors import (
    BadRequest,
    BundleError,
    EngineFailure,
    WanExportError,
    WanExportWarning,
)
from wanexport.runtime.family import SamplingDefaults
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.wan_config import WanConfig

FLAVOUR = "tensorrt" if find_spec("tensorrt") else "tensorrt-rtx"
REAL = import_tensorrt(FLAVOUR)
CONFIG, GEOMETRY = WanConfig("t2v", 128, 128, 1, 1, 16, 16, 0), Geometry(64, 96, 9)
TWO = replace(CONFIG, family="t2v-a14b")  # of two experts
INPUTS = {name: spec.shape for name, spec in program_of(CONFIG, GEOMETRY).inputs.items()}
EXPERTS = ("high_noise", "low_noise")
TENSORRT_DTYPES = {"F32": "FLOAT", "BF16": "BF16", "F16": "HALF"}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where this user's compiled kernels are kept; nothing is there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "wanexport"


@pytest.fixture(params=[f"{FLAVOUR}-{REAL.__version__}"])
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A GPU with TensorRT, of doubles."""
    return Gpu(TensorRt(REAL), monkeypatch)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Weights files of two experts, in bf16."""
    folder = tmp_path_factory.mktemp("weights")
    paths = {expert: folder / f"{expert}.safetensors" for expert in EXPERTS}
    for seed, path in enumerate(paths.values()):
        write_weights(path, CONFIG, "bf16", RandomWeights(CONFIG, seed, ""))
    return paths


def plan_tensors(weights: Path | None) -> dict[str, tuple[tuple[int, ...], str]]:
    """What the plan of an engine takes, with the parameters unless weights are baked in."""
    tensors = {name: (shape, "FLOAT") for name, shape in INPUTS.items()}
    tensors["velocity"] = tensors["latent"]
    if weights is not None:
        for name, entry in read_header(weights).items():
            tensors[name] = (entry.shape, TENSORRT_DTYPES[entry.dtype])
    return tensors


def make_bundle(
    folder: Path, weights: Mapping[str, Path], *, baked: bool = False, **details: bool
) -> Path:
    """A bundle with one TensorRT engine, of one model or two experts."""
    experts = tuple(weights) if len(weights) > 1 else ()
    config = TWO if experts else CONFIG
    records, files = {}, {}
    for expert, source in weights.items():
        expert = expert if experts else ""
        path = folder / "weights" / (f"{expert}-bf16".strip("-")) / "denoiser.safetensors"
        path.parent.mkdir(parents=True)
        path.write_bytes(source.read_bytes())
        file = file_record(folder, path)
        header = header_sha256(path)
        records[path.parent.name] = WeightsRecord(
            BASE, DENOISER, expert, "bf16", header, file, "", {}
        )
        role = f"denoiser-{expert}" if baked and expert else "denoiser"
        plan = folder / "engines" / f"{role}.plan"
        plan.parent.mkdir(exist_ok=True)
        write_plan(plan, plan_tensors(None if baked else path))
        files[role] = file_record(folder, plan)
    engine = EngineRecord(
        backend=FLAVOUR,
        role=DENOISER,
        family=config.family,
        dtype="bf16",
        geometry=GEOMETRY,
        program=program_of(config, GEOMETRY).whole(),
        details=TensorRtDetails(**details),
        sampling=SamplingDefaults(4, 5.0, (1.0, 1.0), 0.9 if experts else None, 16),
        files=files,
        layout=header,
        key="0123456789abcdef0123",
        target={"device": "cuda", "arch": "sm89", FLAVOUR: REAL.__version__},
    )
    write_manifest(folder, Manifest("tiny", config, experts, records, (engine,), wanexport="0"))
    return folder


@pytest.fixture
def bundle(weights: dict[str, Path], tmp_path: Path) -> Path:
    """One model, its parameters inputs of the plan."""
    return make_bundle(tmp_path / "bundle", {"": weights["low_noise"]})


@pytest.fixture
def experts(weights: dict[str, Path], tmp_path: Path) -> Path:
    """Two experts that share a plan."""
    return make_bundle(tmp_path / "experts", weights)


def alter(bundle: Path, **changes: Any) -> None:
    """Change the engine's record."""
    manifest = read_manifest(bundle)
    write_manifest(bundle, replace(manifest, engines=(replace(manifest.engines[0], **changes),)))


def alter_plan(bundle: Path, content: str) -> None:
    """Give the engine another plan, as a faulty build would."""
    path = bundle / read_manifest(bundle).engines[0].files["denoiser"].path
    path.write_text(content)
    alter(bundle, files={"denoiser": file_record(bundle, path)})


def inputs(seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=rng) for name, shape in INPUTS.items()}


def expected(given: Mapping[str, Tensor], file: Path | None) -> Tensor:
    """What the plan computes of these inputs and the tensors of a file, as safetensors reads it."""
    return velocity({**given, **(load_file(file) if file else {})})


def engine_of(denoiser: Denoiser, expert: str = "") -> TensorRtEngine:
    engine = denoiser.engines[expert]
    assert isinstance(engine, TensorRtEngine)
    return engine


def since(calls: Calls, *names: str) -> list[Any]:
    """The calls of these functions, in order."""
    return [call for call in calls if call[0] in names]


def test_every_weight_and_input_reaches_the_plan_by_its_name(
    gpu: Gpu, bundle: Path, weights: dict[str, Path]
) -> None:
    denoiser = load(bundle)
    assert denoiser.record.backend == FLAVOUR
    for seed in (0, 1):
        given = inputs(seed)
        torch.testing.assert_close(denoiser(**given), expected(given, weights["low_noise"]))


def test_a_whole_loop_runs(gpu: Gpu, experts: Path) -> None:
    given = seeded_inputs(CONFIG, GEOMETRY, 0)
    latents = [step.latent for step in sample(load(experts), **given, guidance=2.0, steps=4)]
    assert len(latents) == 4 and all(np.isfinite(latent).all() for latent in latents)
    assert np.abs(latents[-1] - given["noise"]).max() > 0.1


def test_weights_are_bound_once_before_the_first_execution(gpu: Gpu, bundle: Path) -> None:
    denoiser, calls = load(bundle, cuda_graph=False), gpu.trt.calls
    names = [name for name, _ in since(calls, "deserialize_cuda_engine", "execute_async_v3")]
    assert names == ["deserialize_cuda_engine", "execute_async_v3", "execute_async_v3"]
    order = [call[0] for call in calls]
    bound = {call[1] for call in since(calls, "set_tensor_address")}
    assert bound == set(plan_tensors(next(bundle.glob("weights/*/*"))))
    strategy = REAL.ExecutionContextAllocationStrategy.USER_MANAGED
    assert ("set_execution_context_allocation_strategy", strategy) in calls
    for earlier, later in (
        ("set_execution_context_allocation_strategy", "create_execution_context"),
        ("create_execution_context", "set_device_memory"),
        ("set_device_memory", "execute_async_v3"),
        ("set_tensor_address", "execute_async_v3"),
    ):
        last = len(order) - 1 - order[::-1].index(earlier)
        assert last < order.index(later), (earlier, later)
    calls.clear()
    denoiser(**inputs())
    assert calls == [("wait_event", 7), ("execute_async_v3", 7), ("record", 7)]  # no host wait


def test_on_the_default_stream_the_plan_has_one_of_its_own(gpu: Gpu, bundle: Path) -> None:
    denoiser, calls = load(bundle, cuda_graph=False), gpu.trt.calls
    gpu.current = Stream(calls, 0)
    calls.clear()
    denoiser(**inputs())
    assert calls == [
        ("wait_event", 0),
        ("wait_stream", 99, 0),
        ("execute_async_v3", 99),
        ("wait_stream", 0, 99),
        ("record", 0),
    ]


@pytest.mark.parametrize("offload", [None, "experts"])
def test_two_experts_share_the_engine_and_its_memory(
    offload: str | None, gpu: Gpu, experts: Path, weights: dict[str, Path]
) -> None:
    denoiser, calls = load(experts, offload=offload), gpu.trt.calls
    assert gpu.trt.count("deserialize_cuda_engine") == 1
    assert len(set(since(calls, "set_device_memory"))) == 1
    head = [call for call in since(calls, "set_tensor_address") if call[1] == "head.head.bias"]
    assert len(head) == 2 and len(set(head)) == (1 if offload else 2)
    given = inputs()
    for timestep, expert in ((950.0, "high_noise"), (100.0, "low_noise"), (950.0, "high_noise")):
        given["timestep"] = torch.tensor([timestep])
        torch.testing.assert_close(denoiser(**given), expected(given, weights[expert]))
    assert len(denoiser.switch_seconds) == (2 if offload else 0)
    engine = engine_of(denoiser, "high_noise")
    size = sum(-(-e.size // 256) * 256 for e in read_header(weights["high_noise"]).values())
    assert engine.device_memory == {"activations": 4096, "weights": 100 + size}


def test_each_expert_has_its_plan_where_weights_are_baked_in(
    gpu: Gpu, weights: dict[str, Path], tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "baked", weights, baked=True)
    denoiser, calls = load(bundle), gpu.trt.calls
    assert gpu.trt.count("deserialize_cuda_engine") == 2
    assert len(set(since(calls, "set_device_memory"))) == 1
    given = inputs()
    torch.testing.assert_close(denoiser(**given), expected(given, None))
    assert engine_of(denoiser, "low_noise").device_memory["weights"] == 100
    for expert in EXPERTS:
        (tmp_path / "other" / expert).mkdir(parents=True)
        copy = tmp_path / "other" / expert / "denoiser.safetensors"
        copy.write_bytes(weights[expert].read_bytes())
    wrong: list[dict[str, Any]] = [{"offload": "experts"}, {"weights": tmp_path / "other"}]
    for options in wrong:
        with pytest.raises(BadRequest, match=r"holds its weights inside .* --bake-weights"):
            load(bundle, **options)


@pytest.mark.parametrize("expert", EXPERTS)
def test_a_plan_that_lacks_an_expert_is_refused(
    expert: str, gpu: Gpu, weights: dict[str, Path], tmp_path: Path
) -> None:
    """Be it that there is one for all beside it, which has weights of nobody knows whom."""
    bundle = make_bundle(tmp_path / "baked", weights, baked=True)
    files = dict(read_manifest(bundle).engines[0].files)
    files["denoiser"] = files.pop(f"denoiser-{expert}")
    alter(bundle, files=files)
    assert f"has no denoiser-{expert}: run wanexport build" in refused(bundle, BundleError)


def test_baked_weights_cannot_be_changed(
    gpu: Gpu, weights: dict[str, Path], tmp_path: Path
) -> None:
    denoiser = load(make_bundle(tmp_path / "baked", weights, baked=True))
    with pytest.raises(BadRequest, match="holds its weights inside and cannot change them"):
        denoiser.use("base")
    engine = engine_of(denoiser, "high_noise")
    with pytest.raises(BadRequest, match="holds its weights inside"):
        engine.use(pin(weights["high_noise"]))
    assert denoiser.weights == ""


def test_baked_weights_need_no_file_beside_the_plan(
    gpu: Gpu, weights: dict[str, Path], tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "baked", weights, baked=True)
    shutil.rmtree(bundle / "weights")
    given = inputs()
    torch.testing.assert_close(load(bundle)(**given), expected(given, None))


def test_weights_that_were_replaced_since_load_are_refused_at_the_switch(
    gpu: Gpu, experts: Path, tmp_path: Path
) -> None:
    denoiser = load(experts, offload="experts")
    (file,) = (experts / "weights" / "high_noise-bf16").iterdir()
    (tmp_path / "new").write_bytes(file.read_bytes())
    (tmp_path / "new").replace(file)
    with pytest.raises(WanExportError, match=f"^{file} was changed since it was checked"):
        for timestep in (100.0, 950.0):
            denoiser(**{**inputs(), "timestep": torch.tensor([timestep])})


def test_other_weights_go_into_the_same_plan(
    gpu: Gpu, bundle: Path, weights: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "denoiser.safetensors").write_bytes(weights["high_noise"].read_bytes())
    given = inputs()
    other = load(bundle, weights=tmp_path)(**given)
    torch.testing.assert_close(other, expected(given, weights["high_noise"]))


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_set_is_used_in_place_of_another_and_back(
    cuda_graph: bool, gpu: Gpu, bundle: Path, weights: dict[str, Path]
) -> None:
    """No context is made and no address set anew; a captured graph reads the new weights too."""
    denoiser, calls = load(bundle, cuda_graph=cuda_graph), gpu.trt.calls
    calls.clear()
    given = inputs()
    other, own = weights["high_noise"], weights["low_noise"]
    for name, file in ((other, other), ("base", own), (str(other), other)):
        denoiser.use(name)
        assert denoiser.weights == str(name)
        torch.testing.assert_close(denoiser(**given), expected(given, file))
    assert not since(calls, "set_tensor_address", "create_execution_context")
    assert len(denoiser.switch_seconds) == 3


@pytest.mark.parametrize("offload", [None, "experts"])
def test_both_experts_change_together(
    offload: str | None, gpu: Gpu, experts: Path, weights: dict[str, Path], tmp_path: Path
) -> None:
    denoiser, given = load(experts, offload=offload), inputs()
    for expert, other in zip(EXPERTS, EXPERTS[::-1]):  # the other's weights in each one's place
        (tmp_path / "swapped" / expert).mkdir(parents=True)
        path = tmp_path / "swapped" / expert / "denoiser.safetensors"
        path.write_bytes(weights[other].read_bytes())
    denoiser.use(tmp_path / "swapped")
    for timestep, expert in ((950.0, "low_noise"), (100.0, "high_noise")):
        given["timestep"] = torch.tensor([timestep])
        torch.testing.assert_close(denoiser(**given), expected(given, weights[expert]))


def test_a_set_that_is_refused_leaves_the_one_before(
    gpu: Gpu, bundle: Path, weights: dict[str, Path], tmp_path: Path
) -> None:
    denoiser, given = load(bundle), inputs()
    write_weights(tmp_path / "fp32.safetensors", CONFIG, "fp32", RandomWeights(CONFIG, 0, ""))
    for name in ("nothing", tmp_path / "fp32.safetensors"):
        with pytest.raises(BadRequest):
            denoiser.use(name)
        assert denoiser.weights == "base"
        torch.testing.assert_close(denoiser(**given), expected(given, weights["low_noise"]))
    assert not denoiser.switch_seconds


def test_a_closed_engine_says_so(gpu: Gpu, experts: Path) -> None:
    denoiser, calls = load(experts), gpu.trt.calls
    denoiser.close()
    assert ("synchronize event",) in calls  # what still runs is waited for
    calls.clear()
    for timestep in (950.0, 100.0):
        with pytest.raises(EngineFailure, match="was closed: load it again"):
            denoiser(**{**inputs(), "timestep": torch.tensor([timestep])})
    with pytest.raises(EngineFailure, match="was closed"):
        denoiser.use("base")
    assert not calls
    denoiser.close()


def test_a_call_beside_a_close_is_told_of_it(gpu: Gpu, bundle: Path) -> None:
    """Of another thread, when the weights have just been let go of: they were not baked in."""

    class Calling(TensorRtEngine):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "weights":
                with pytest.raises(EngineFailure, match="was closed: load it again"):
                    self._held(self.file)

    engine = engine_of(load(bundle))
    engine.__class__ = Calling
    engine.close()
    assert engine.weights is None


def test_the_gpu_is_the_one_that_was_named(gpu: Gpu, bundle: Path) -> None:
    load(bundle, device="cuda:1")
    assert set(gpu.devices) == {"cuda:1"}
    gpu.devices.clear()
    load(bundle)
    assert set(gpu.devices) == {"cuda"}


def test_a_captured_graph_is_replayed(gpu: Gpu, bundle: Path, weights: dict[str, Path]) -> None:
    denoiser, calls = load(bundle, cuda_graph=True), gpu.trt.calls
    assert calls[-1] == ("serialize",) or FLAVOUR == "tensorrt"
    assert ("execute_async_v3", 99) in calls  # on a stream of the engine's GPU
    assert gpu.capture_error_mode == "thread_local"  # other threads' allocations do not break it
    calls.clear()
    for seed in (0, 1):
        given = inputs(seed)
        torch.testing.assert_close(denoiser(**given), expected(given, weights["low_noise"]))
    assert [call[0] for call in calls] == ["wait_event", "replay", "record"] * 2


@pytest.mark.parametrize(("launch", "total", "captured"), [(0.9, 1.0, True), (0.1, 1.0, False)])
def test_a_graph_is_captured_where_launching_takes_as_long_as_running(
    launch: float,
    total: float,
    captured: bool,
    gpu: Gpu,
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([0.0, 5.0, 5.0, 0.0, launch, total])
    monkeypatch.setattr(tensorrt, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert (engine_of(load(bundle)).graph is not None) == captured


def test_a_long_execution_is_not_repeated_to_measure_its_launch(
    gpu: Gpu, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 30.0, 31.0])
    monkeypatch.setattr(tensorrt, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    engine = engine_of(load(bundle))
    assert engine.graph is None and gpu.trt.count("execute_async_v3") == 1


def test_threads_take_turns(gpu: Gpu, bundle: Path, weights: dict[str, Path]) -> None:
    """Each gets the velocity of its own inputs, though all use the same buffers."""
    denoiser, results = load(bundle), {}

    def call(seed: int) -> None:
        for _ in range(5):
            results[seed] = denoiser(**inputs(seed))

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        torch.testing.assert_close(results[seed], expected(inputs(seed), weights["low_noise"]))


def refused(bundle: Path, error: type[WanExportError] = WanExportError, **options: Any) -> str:
    """The one line that load refuses with."""
    with pytest.raises(error) as caught:
        load(bundle, **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_a_plan_for_another_gpu_or_version_is_refused(gpu: Gpu, bundle: Path) -> None:
    gpu.capability = (12, 0)
    gpu.trt.__version__ = "99.1"
    message = refused(bundle)
    assert f"built for arch sm89, here sm120; {FLAVOUR} {REAL.__version__}, here 99.1" in message
    assert f"wanexport build --backend {FLAVOUR} --resolution 64x96 --frames 9 -o" in message
    assert not gpu.trt.calls


def test_the_plan_for_this_gpu_is_chosen_before_onnx_on_a_cpu(gpu: Gpu, bundle: Path) -> None:
    manifest = read_manifest(bundle)
    engine = manifest.engines[0]
    other = replace(engine, target={**engine.target, "arch": "sm120"})
    layout = layout_sha256(CONFIG, "fp16")
    onnx = replace(
        engine,
        backend="onnx",
        dtype="fp16",
        details=OnnxDetails(),
        target={"device": "cpu"},
        layout=layout,
    )
    own = next(iter(manifest.weights.values()))
    weights = {**manifest.weights, "fp16": replace(own, dtype="fp16", layout=layout)}
    several = replace(manifest, engines=(other, onnx, engine), weights=weights)
    assert choose_engine(bundle, several, EngineOptions()).record == engine
    gpu.capability = (12, 0)
    assert choose_engine(bundle, several, EngineOptions()).record == other
    gpu.capability = (9, 0)
    with pytest.warns(WanExportWarning, match="was built for arch sm"):
        assert choose_engine(bundle, several, EngineOptions()).record.backend == "onnx"


@pytest.mark.parametrize("option", ["hardware_compatible", "version_compatible"])
def test_the_plan_for_just_this_gpu_and_version_comes_first(
    option: str, gpu: Gpu, bundle: Path
) -> None:
    manifest = read_manifest(bundle)
    own = manifest.engines[0]
    other = replace(own, details=TensorRtDetails(**{option: True}))
    several = replace(manifest, engines=(other, own))
    assert choose_engine(bundle, several, EngineOptions()).record == own


@pytest.mark.parametrize(
    ("option", "capability", "version", "runs"),
    [
        ("hardware_compatible", (12, 0), "", True),
        ("hardware_compatible", (7, 5), "", False),
        ("hardware_compatible", (8, 9), "99.1", False),
        ("version_compatible", (8, 9), "99.1", True),
        ("version_compatible", (8, 9), "1.0", False),
        ("version_compatible", (12, 0), "", False),
    ],
)
def test_a_compatible_plan_is_taken_where_tensorrt_takes_it(
    option: str,
    capability: tuple[int, int],
    version: str,
    runs: bool,
    gpu: Gpu,
    bundle: Path,
) -> None:
    alter(bundle, details=TensorRtDetails(**{option: True}))
    gpu.capability = capability
    gpu.trt.__version__ = version or REAL.__version__
    if runs:
        assert getattr(load(bundle).record.details, option)
    else:
        assert "here" in refused(bundle)


def test_without_a_gpu_or_tensorrt_one_line_says_what_is_missing(
    gpu: Gpu, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs an NVIDIA GPU and PyTorch for CUDA, which finds none" in refused(
        bundle, BundleError
    )

    def missing(flavour: str) -> None:
        raise WanExportError(f"{flavour} is not installed: pip install it")

    monkeypatch.setattr(tensorrt_target, "import_tensorrt", missing)
    assert f"cannot run here: {FLAVOUR} is not installed: pip install it" in refused(bundle)


@pytest.mark.parametrize(
    ("name", "found", "message"),
    [
        ("head.head.bias", ((64,), "HALF"), r"has \[64\] in fp16 for head.head.bias, .*in fp32"),
        ("head.head.bias", ((65,), "FLOAT"), r"has \[65\] in fp32 for head.head.bias, .*\[64\]"),
        ("head.head.bias", None, r"has nothing for head.head.bias, .*safetensors has \[64\]"),
        ("lora.up", ((4, 4), "BF16"), r"has \[4, 4\] in bf16 for lora.up, .* has nothing"),
        ("latent", ((1, 16, 3, 8, 8), "FLOAT"), r"for latent, the manifest has \[1, 16, 3, 8, 12"),
        ("text", None, r"has nothing for text, the manifest has \[1, 512, 4096\] in fp32"),
        ("velocity", ((1, 16, 3, 8, 12), "BF16"), r"in bf16 for velocity, the manifest has .*fp32"),
    ],
)
def test_a_plan_that_takes_other_tensors_is_refused_before_any_is_bound(
    name: str, found: Any, message: str, gpu: Gpu, bundle: Path
) -> None:
    tensors = plan_tensors(next(bundle.glob("weights/*/*")))
    tensors[name] = found
    if found is None:
        del tensors[name]
    alter_plan(bundle, json.dumps({"tensors": tensors, "activation_bytes": 1}))
    with pytest.raises(WanExportError, match=message):
        load(bundle)
    assert not since(gpu.trt.calls, "set_tensor_address", "create_execution_context")


def test_a_damaged_plan_is_refused(gpu: Gpu, bundle: Path) -> None:
    path = next(bundle.glob("engines/*.plan"))
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert "was altered after the build" in refused(bundle, BundleError)
    alter_plan(bundle, "no plan")
    assert "cannot open" in refused(bundle) and "kEXPECTED_MAGIC_TAG" in refused(bundle)


@pytest.mark.parametrize(
    "method", ["create_execution_context", "set_tensor_address", "execute_async_v3"]
)
def test_what_tensorrt_refuses_is_one_line_with_its_reason(
    method: str, gpu: Gpu, bundle: Path
) -> None:
    gpu.trt.fails = method
    assert f"({method} failed on purpose)" in refused(bundle, EngineFailure)


@pytest.mark.parametrize(
    "reason",
    [
        "Error Code 2: OutOfMemory (Requested size was 28577890304 bytes.)",
        "Error Code 1: Cuda Runtime (out of memory)",
    ],
)
def test_when_tensorrt_lacks_memory_a_rebuild_is_no_cure(
    reason: str, gpu: Gpu, bundle: Path
) -> None:
    gpu.trt.fails, gpu.trt.reason = "create_execution_context", reason
    message = refused(bundle)
    assert f"{reason}): close what else uses the GPU, or build" in message
    assert "--backend" not in message


def test_a_failed_call_leaves_the_engine_usable(
    gpu: Gpu, bundle: Path, weights: dict[str, Path]
) -> None:
    denoiser, given = load(bundle, cuda_graph=False), inputs()
    gpu.trt.fails = "execute_async_v3"
    with pytest.raises(WanExportError, match=r"cannot execute .*failed on purpose"):
        denoiser(**given)
    gpu.trt.fails = ""
    torch.testing.assert_close(denoiser(**given), expected(given, weights["low_noise"]))


def test_an_engine_opened_in_inference_mode_serves_outside(
    gpu: Gpu, bundle: Path, weights: dict[str, Path]
) -> None:
    with torch.inference_mode():
        denoiser = load(bundle)
    given = inputs()
    torch.testing.assert_close(denoiser(**given), expected(given, weights["low_noise"]))


def test_what_a_failed_call_launched_is_waited_for(gpu: Gpu, bundle: Path) -> None:
    denoiser, calls = load(bundle, cuda_graph=False), gpu.trt.calls
    gpu.current = Stream(calls, 0)
    gpu.trt.fails = "execute_async_v3"
    calls.clear()
    with pytest.raises(WanExportError):
        denoiser(**inputs())
    assert calls[-2:] == [("wait_stream", 0, 99), ("record", 0)]


def test_an_engine_waits_for_its_last_execution_before_it_goes(gpu: Gpu, bundle: Path) -> None:
    denoiser, calls = load(bundle), gpu.trt.calls
    denoiser(**inputs())
    assert ("synchronize event",) not in calls
    del denoiser
    assert calls[-1] == ("synchronize event",)


def test_memory_that_pytorch_cannot_give_is_one_line(
    gpu: Gpu, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch, "full", full)
    assert "failed on cpu (CUDA out of memory.), for want of memory: close what else" in refused(
        bundle, EngineFailure
    )


def test_too_little_memory_is_refused_with_the_figures(gpu: Gpu, bundle: Path) -> None:
    tensors = plan_tensors(next(bundle.glob("weights/*/*")))
    alter_plan(bundle, json.dumps({"tensors": tensors, "activation_bytes": 30_000_000_000}))
    gpu.free = 20_000_000_000
    assert "activation memory takes 30.0 GB, the GPU has 20.0 of 25.8 GB free" in refused(
        bundle, EngineFailure
    )


def test_options_that_do_not_apply_are_refused(gpu: Gpu, bundle: Path) -> None:
    assert "has no attention kernel: leave it out" in refused(bundle, BadRequest, attention="fa4")
    assert "offload experts swaps two experts" in refused(bundle, BadRequest, offload="experts")


@pytest.mark.skipif(FLAVOUR == "tensorrt", reason="TensorRT compiles when it builds")
def test_compiled_kernels_are_kept_for_the_user(gpu: Gpu, bundle: Path, cache: Path) -> None:
    load(bundle)
    (file,) = cache.iterdir()
    assert file.read_bytes() == b"kernels" and "sm89" in file.name
    assert not since(gpu.trt.calls, "deserialize")
    load(bundle)
    assert since(gpu.trt.calls, "deserialize") == [("deserialize", b"kernels")]
    order = [call[0] for call in gpu.trt.calls]
    assert order.index("set_runtime_cache") < order.index("create_execution_context")
    file.write_bytes(b"damaged")
    with pytest.warns(WanExportWarning, match="is damaged, or of another GPU or driver"):
        load(bundle)
    assert file.read_bytes() == b"kernels"


@pytest.mark.skipif(FLAVOUR == "tensorrt", reason="TensorRT compiles when it builds")
@pytest.mark.parametrize("nothing", [None, b""])
def test_where_nothing_was_compiled_nothing_is_kept(
    nothing: bytes | None, gpu: Gpu, bundle: Path, cache: Path
) -> None:
    gpu.trt.cached = nothing
    load(bundle)
    assert list(cache.iterdir()) == []


@pytest.mark.skipif(FLAVOUR == "tensorrt", reason="TensorRT compiles when it builds")
def test_kernels_that_a_bundle_brings_are_not_read(gpu: Gpu, bundle: Path, cache: Path) -> None:
    load(bundle)
    (file,) = cache.iterdir()
    engine = read_manifest(bundle).engines[0]
    (bundle / "cache").mkdir()
    for name in (file.name, f"{engine.key[:16]}-sm89-denoiser"):
        (bundle / "cache" / name).write_bytes(b"code of a stranger")
    file.unlink()
    load(bundle)
    assert not since(gpu.trt.calls, "deserialize")


@pytest.mark.skipif(FLAVOUR == "tensorrt", reason="TensorRT compiles when it builds")
def test_each_plan_has_kernels_of_its_own(gpu: Gpu, bundle: Path, cache: Path) -> None:
    load(bundle)
    tensors = plan_tensors(next(bundle.glob("weights/*/*")))
    alter_plan(bundle, json.dumps({"tensors": tensors, "activation_bytes": 1}))
    load(bundle)
    assert len(list(cache.iterdir())) == 2 and not since(gpu.trt.calls, "deserialize")


@pytest.mark.skipif(FLAVOUR == "tensorrt", reason="TensorRT compiles when it builds")
@pytest.mark.parametrize("obstacle", ["a file", "another user's", "others may write", "no home"])
def test_a_cache_that_cannot_be_trusted_is_not_used(
    obstacle: str,
    gpu: Gpu,
    bundle: Path,
    weights: dict[str, Path],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load(bundle)
    (file,) = cache.iterdir()
    if obstacle == "a file":  # in the place of the folder: root may write anywhere
        file.unlink()
        cache.rmdir()
        cache.write_text("")
    elif obstacle == "another user's":
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    elif obstacle == "others may write":
        cache.chmod(0o777)
    else:
        monkeypatch.setattr("platformdirs.user_cache_path", lambda _: Path("~/.cache/wanexport"))
    with pytest.warns(WanExportWarning, match="the next load compiles anew") as warned:
        denoiser = load(bundle)
    assert len(warned) == 1 and not since(gpu.trt.calls, "deserialize")
    given = inputs()
    torch.testing.assert_close(denoiser(**given), expected(given, weights["low_noise"]))


@pytest.mark.skipif(FLAVOUR == "tensorrt", reason="TensorRT compiles when it builds")
def test_kernels_that_may_not_be_read_are_compiled_anew(
    gpu: Gpu, bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(bundle)
    read = Path.read_bytes

    def guarded(path: Path) -> bytes:
        if path.parent == cache:
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", guarded)
    load(bundle)
    assert gpu.trt.count("create_runtime_cache") == 2 and not gpu.trt.count("deserialize")


@pytest.mark.skipif(FLAVOUR == "tensorrt", reason="its libraries are stand-ins")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_the_real_runtime_without_a_driver_fails_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    path = tmp_path / "x.plan"
    path.write_bytes(small_plan())
    with pytest.raises(WanExportError) as caught:
        Plan(FLAVOUR, path, torch.device("cpu"))
    message = str(caught.value)
    assert message.startswith(f"TensorRT for RTX cannot open {path} (") and "\n" not in message
    assert "CUDA driver version is insufficient for CUDA runtime version" in message
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WanExportError, match=r"cannot open .*plan.header.size == blobSize"):
        Plan(FLAVOUR, path, torch.device("cpu"))


class Model:
    """What a right plan computes: the graph in eager PyTorch, with the parameters it was given."""

    def __init__(self, error: float = 0.0) -> None:
        self.error = error

    def __call__(self, given: Mapping[str, Tensor]) -> Tensor:
        names = INPUTS
        model = WanModel(CONFIG, GEOMETRY, torch.bfloat16)
        parameters = {name: value for name, value in given.items() if name not in names}
        model.load_state_dict(parameters, assign=True)
        with torch.no_grad():
            velocity = model(**{name: given[name] for name in names})
        return velocity * (1 + self.error)


def request_of(bundle: Path) -> Request:
    engine = read_manifest(bundle).engines[0]
    config = read_manifest(bundle).config
    return Request(config, GEOMETRY, engine.sampling, FLAVOUR, "bf16", "cpu", engine.target)


def proof(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The proof of the bundle's engine, in this process, where the doubles are."""

    def here(module: str, job: PlanJob, folder: Path) -> dict[str, Any]:
        assert module == "tensorrt.proof_process"
        return prove_here(PlanJob(**json.loads(json.dumps(asdict(job)))))

    monkeypatch.setattr(tensorrt_proof, "run_in_fresh_process", here)
    manifest = read_manifest(bundle)
    files = [
        bundle / record.file.path for record in manifest.weights_of(manifest.engines[0].layout)
    ]
    return prove_plan(request_of(bundle), manifest.engines[0], bundle, files, "ends")


def test_a_right_plan_passes_its_proof_and_a_wrong_one_fails(
    gpu: Gpu, experts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.trt.compute = Model()
    figures = proof(experts, monkeypatch)
    assert figures["method"] == "plan opened and run on the GPU" and figures["verify"] == "full"
    assert figures["tokens"] == GEOMETRY.num_tokens and figures["blocks"] == CONFIG.num_layers
    assert 0 < figures["error"] <= figures["gate"] == pytest.approx(1.25 * figures["floor"])
    assert gpu.trt.count("deserialize_cuda_engine") == 2  # once with each expert's weights
    gpu.trt.compute = Model(error=0.05)
    with pytest.raises(WanExportError, match="is over the gate"):
        proof(experts, monkeypatch)


def test_the_proof_of_baked_weights_runs_each_plan_with_its_own_expert(
    gpu: Gpu, weights: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle(tmp_path / "baked", weights, baked=True)
    jobs: list[PlanJob] = []

    def note(module: str, job: PlanJob, folder: Path) -> dict[str, Any]:
        jobs.append(job)
        return {"error": 0.0}

    monkeypatch.setattr(tensorrt_proof, "run_in_fresh_process", note)
    manifest = read_manifest(bundle)
    request = replace(request_of(bundle), baked=dict.fromkeys(EXPERTS, "hash"))
    files = [
        bundle / record.file.path for record in manifest.weights_of(manifest.engines[0].layout)
    ]
    prove_plan(request, manifest.engines[0], bundle, files, "ends")
    assert [Path(job.plans["denoiser"]).stem for job in jobs] == [
        f"denoiser-{expert}" for expert in EXPERTS
    ]
    assert [Path(job.weights).parent.name for job in jobs] == [f"{e}-bf16" for e in EXPERTS]


def small_plan() -> bytes:
    """A real plan for sm89, of one addition."""
    builder = REAL.Builder(REAL.Logger(REAL.Logger.ERROR))
    network = builder.create_network(1 << int(REAL.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    terms = [network.add_input(name, REAL.bfloat16, (1, 4)) for name in ("x", "y")]
    total = network.add_elementwise(*terms, REAL.ElementWiseOperation.SUM).get_output(0)
    network.mark_output(total)
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(REAL.ComputeCapability.SM89, 0)
    return bytes(builder.build_serialized_network(network, config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": {"device": "cuda", FLAVOUR: "1"}}, "it is for no GPU's architecture"),
        ({"target": {"device": "cuda", "arch": "sm89"}}, "it is for no version of TensorRT"),
        ({"target": {"device": "cuda", "arch": "x86", FLAVOUR: "1"}}, "no GPU's architecture"),
        ({"target": {"device": "cuda", "arch": "sm89", FLAVOUR: "new"}}, "for no version"),
        ({"target": {"device": "cpu", "arch": "sm89", FLAVOUR: "1"}}, "for device cpu"),
        ({"target": {"arch": "sm89", FLAVOUR: "1"}}, "it is for no device"),
        ({"files": {}}, "it has no plan for an expert"),
    ],
)
def test_a_record_that_lacks_what_running_takes_is_not_used(
    change: dict[str, Any], message: str, gpu: Gpu, bundle: Path
) -> None:
    alter(bundle, **change)
    said = refused(bundle, BundleError)
    assert message in said and "cannot be used: " in said and not gpu.trt.calls


def test_a_threads_errors_are_its_own(gpu: Gpu, bundle: Path) -> None:
    """Two threads that fail at once: neither clears nor tells the other's reason."""
    log = message_log(REAL)
    error = REAL.ILogger.Severity.ERROR
    log.clear()
    log.log(error, "of this thread")

    def other() -> None:
        log.clear()
        log.log(error, "of the other")
        assert log.reason() == "of the other"

    with ThreadPoolExecutor(1) as pool:
        pool.submit(other).result()
        assert log.reason() == "of this thread"
        log.clear()
        assert log.errors == ["of the other"]
    log.clear()  # the thread has ended
    assert log.reason() == "it gave no reason"
    for number in range(1000):
        log.log(error, str(number))
    assert len(log.errors) == 100
    log.clear()
