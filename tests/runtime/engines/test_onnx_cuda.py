"""What an ONNX engine on a GPU does, as far as a CPU can show it: bindings, weights, choices."""

import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import pytest
import torch

from tests.oracles.tensorrt_doubles import Calls, Stream
from tests.oracles.wan_reference import small_config, small_geometry
from tests.quick import slow_but
from wanexport.exporter.backends.onnx.assemble import assemble
from wanexport.exporter.backends.onnx.lower import for_onnx_runtime, lower, serialize
from wanexport.exporter.backends.onnx.proof_process import OnnxJob, run_with_device_weights
from wanexport.exporter.build import build
from wanexport.exporter.bundle.writer import write_manifest
from wanexport.exporter.cli.options import parse_pairs
from wanexport.exporter.lint.onnx_graph import lint_onnx
from wanexport.exporter.reference.figures import make_case
from wanexport.exporter.reference.inputs import forward_inputs
from wanexport.exporter.reference.parity import relative_l2
from wanexport.graphs.config import PRESETS
from wanexport.graphs.signature import attention_count
from wanexport.graphs.weights import RandomWeights, write_weights
from wanexport.runtime import load
from wanexport.runtime.bundle.details import AotiDetails, OnnxDetails, TensorRtDetails
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.bundle.pinned_file import pin
from wanexport.runtime.bundle.signature import program_of, weights_layout
from wanexport.runtime.engines.choose import Choice, choose_engine
from wanexport.runtime.engines.device_weights import DeviceWeights, device_weights
from wanexport.runtime.engines.engine import EngineOptions
from wanexport.runtime.engines.onnx import OnnxSession
from wanexport.runtime.engines.onnx_gpu import (
    OnnxGpuEngine,
    OnnxGpuSession,
    _add_rtx,
    open_engines,
)
from wanexport.runtime.engines.onnx_providers import RTX_PLUGIN, Provider
from wanexport.runtime.errors import (
    BadRequest,
    BundleError,
    EngineFailure,
    WanExportError,
    WanExportWarning,
)
from wanexport.runtime.family import family_of
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.program import WHOLE

CPU = torch.device("cpu")
PROGRAM = program_of(PRESETS["tiny"].config, Geometry(64, 96, 9)).whole()
GRAPH, WEIGHTS = "engines/64x96x9/onnx-fp32/denoiser.onnx", "weights/fp32/denoiser.safetensors"


def arrays() -> dict[str, np.ndarray]:
    return forward_inputs(PRESETS["tiny"].config, Geometry(64, 96, 9), 500.0, seed=0)


def tensors() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays().items()}


def expected(bundle: Path, weights: Path) -> torch.Tensor:
    """The velocity of a session that maps the file itself."""
    return torch.from_numpy(OnnxSession(bundle / GRAPH, weights)(arrays())[0])


def opened(bundle: Path, *weights: Path, offload: bool = False) -> list[OnnxGpuEngine]:
    """The engines of these files, with ONNX Runtime's provider for a CPU in a GPU's place."""
    files = {str(number): file for number, file in enumerate(weights or [bundle / WEIGHTS])}
    engines = open_engines(
        {WHOLE: bundle / GRAPH}, files, CPU, Provider("cpu"), PROGRAM, offload=offload
    )
    return list(engines.values())


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights of the same layout."""
    path = tmp_path_factory.mktemp("other") / "denoiser.safetensors"
    config = PRESETS["tiny"].config
    write_weights(path, config, "fp32", RandomWeights(config, 1, ""))
    return path


def test_bound_tensors_give_what_arrays_do(tiny_bundle: Path) -> None:
    (engine,) = opened(tiny_bundle)
    first = engine(tensors())
    assert torch.equal(first, expected(tiny_bundle, tiny_bundle / WEIGHTS))
    assert torch.equal(engine(tensors()), first)


@pytest.mark.parametrize(
    "name", ["head.head.bias", "patch_embedding.weight", "blocks.3.modulation"]
)
def test_the_session_reads_the_weights_where_they_are(tiny_bundle: Path, name: str) -> None:
    weights = DeviceWeights(tiny_bundle / WEIGHTS, CPU)
    session = OnnxGpuSession(
        tiny_bundle / GRAPH, tiny_bundle / WEIGHTS, weights.tensors, CPU, Provider("cpu")
    )
    (before,) = session(tensors())
    weights.tensors[name] *= -2
    assert (session(tensors())[0] - before).abs().max() > 0.1


def test_engines_of_a_process_share_their_weights(tiny_bundle: Path) -> None:
    file = tiny_bundle / WEIGHTS
    (one,), (two,) = opened(tiny_bundle), opened(tiny_bundle)
    assert one.weights is two.weights is device_weights(file, CPU)
    assert one.session is not two.session


@pytest.fixture
def swapped(tiny_bundle: Path, other: Path) -> dict[str, OnnxGpuEngine]:
    """Two experts with one buffer between them."""
    high, low = opened(tiny_bundle, tiny_bundle / WEIGHTS, other, offload=True)
    return {"high_noise": high, "low_noise": low}


def test_swapped_experts_give_what_resident_ones_do(
    tiny_bundle: Path, other: Path, swapped: dict[str, OnnxGpuEngine]
) -> None:
    high, low = expected(tiny_bundle, tiny_bundle / WEIGHTS), expected(tiny_bundle, other)
    assert not torch.equal(high, low)
    for expert, velocity in (("high_noise", high), ("low_noise", low), ("high_noise", high)):
        assert torch.equal(swapped[expert](tensors()), velocity)
    weights = swapped["high_noise"].weights
    assert weights is not None and len(weights.switches) == 2
    assert swapped["low_noise"].session is swapped["high_noise"].session


@pytest.mark.parametrize("times", [1, 2])
def test_a_session_that_copies_the_weights_offloads_none(
    times: int, tiny_bundle: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, it may be a neighbour on the GPU that took the memory."""
    free = iter([8 << 30, 5 << 30] * times + [8 << 30] * 2)
    monkeypatch.setattr("wanexport.runtime.engines.onnx_gpu._free_bytes", lambda _: next(free))
    refusal = pytest.raises(BadRequest, match=r"copies the weights, which --offload")
    with refusal if times == 2 else nullcontext():
        opened(tiny_bundle, tiny_bundle / WEIGHTS, other, offload=True)


def test_threads_that_swap_do_not_disturb_each_other(
    tiny_bundle: Path, other: Path, swapped: dict[str, OnnxGpuEngine]
) -> None:
    velocity = {
        "high_noise": expected(tiny_bundle, tiny_bundle / WEIGHTS),
        "low_noise": expected(tiny_bundle, other),
    }
    experts = ["high_noise", "low_noise"] * 8
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda expert: swapped[expert](tensors()), experts))
    assert all(torch.equal(got, velocity[expert]) for expert, got in zip(experts, results))


def test_another_set_is_read_where_the_first_was(tiny_bundle: Path, other: Path) -> None:
    (engine,) = opened(tiny_bundle)
    session, own = engine.session, expected(tiny_bundle, tiny_bundle / WEIGHTS)
    theirs = expected(tiny_bundle, other)
    engine.use(pin(other))
    assert torch.equal(engine(tensors(), pin(other)), theirs)
    assert torch.equal(engine(tensors(), engine.file), own)
    assert engine.session is session and engine.weights is not None
    assert len(engine.weights.switches) == 2


def test_a_session_that_may_have_a_copy_of_its_weights_is_opened_anew(
    tiny_bundle: Path, other: Path
) -> None:
    """A swap beneath it would change nothing that it computes."""
    (engine,) = opened(tiny_bundle)
    first = engine.session
    assert first is not None
    first.grown = 1 << 40
    assert torch.equal(engine(tensors(), pin(other)), expected(tiny_bundle, other))
    assert engine.session is not first
    second = engine.session
    engine(tensors(), pin(other))
    assert engine.session is second


@pytest.fixture
def compiled(tiny_bundle: Path) -> OnnxGpuEngine:
    """An engine whose session has its weights inside, as those of TensorRT's providers."""
    file = pin(tiny_bundle / WEIGHTS)
    session = OnnxGpuSession(tiny_bundle / GRAPH, file, {}, CPU, Provider("cpu"))
    return OnnxGpuEngine({WHOLE: session}, None, file, PROGRAM)


def test_where_weights_are_inside_another_set_is_another_session(
    compiled: OnnxGpuEngine, tiny_bundle: Path, other: Path
) -> None:
    own, theirs = (expected(tiny_bundle, f) for f in (tiny_bundle / WEIGHTS, other))
    compiled.use(pin(other))
    swapped = compiled.session
    assert torch.equal(compiled(tensors(), pin(other)), theirs) and compiled.session is swapped
    assert torch.equal(compiled(tensors()), own)
    files = {0: pin(tiny_bundle / WEIGHTS), 1: pin(other)}
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda n: compiled(tensors(), files[n % 2]), range(8)))
    assert all(torch.equal(got, (own, theirs)[n % 2]) for n, got in enumerate(results))


def test_a_file_that_cannot_be_read_leaves_the_session(
    compiled: OnnxGpuEngine, tiny_bundle: Path, other: Path, tmp_path: Path
) -> None:
    (gone := tmp_path / "gone.safetensors").write_bytes(other.read_bytes())
    file = pin(gone)
    gone.unlink()
    (engine,) = opened(tiny_bundle)
    for one in (compiled, engine):
        with pytest.raises(BundleError, match="cannot read"):
            one.use(file)
        assert torch.equal(one(tensors()), expected(tiny_bundle, tiny_bundle / WEIGHTS))


def test_a_closed_engine_says_so(compiled: OnnxGpuEngine, tiny_bundle: Path) -> None:
    (engine,) = opened(tiny_bundle)
    for one in (compiled, engine):
        one.close()
        one.close()
        assert one.session is None and one.weights is None
        with pytest.raises(EngineFailure, match="was closed: load it again"):
            one(tensors())
        with pytest.raises(EngineFailure, match="was closed"):
            one.use(one.file)


def test_nodes_on_the_cpu_are_no_secret(tiny_bundle: Path) -> None:
    weights = DeviceWeights(tiny_bundle / WEIGHTS, CPU)
    graph = tiny_bundle / GRAPH
    session = OnnxGpuSession(graph, tiny_bundle / WEIGHTS, weights.tensors, CPU, Provider("cpu"))
    assert session.assigned["CPUExecutionProvider", "Attention"] == 8
    session.device = torch.device("cuda")
    with pytest.raises(BundleError, match=r"leaves .*8 Attention.* to the CPU"):
        session._check_assignment(graph)
    session.assigned = Counter({("CPUExecutionProvider", "Round"): 1})
    with pytest.warns(WanExportWarning, match="runs 1 Round on the CPU"):
        session._check_assignment(graph)


def test_what_onnx_runtime_refuses_is_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"no graph")
    file = tiny_bundle / WEIGHTS
    with pytest.raises(BundleError, match="ONNX Runtime cannot load"):
        OnnxGpuSession(tmp_path / "x.onnx", file, {}, CPU, Provider("cpu"))
    with pytest.raises(BundleError, match="cannot use its CUDAExecutionProvider"):
        OnnxGpuSession(tiny_bundle / GRAPH, file, {}, CPU, Provider("cuda"))
    (engine,) = opened(tiny_bundle)
    with pytest.raises(EngineFailure, match="ONNX Runtime failed on cpu"):
        engine({**tensors(), "text": torch.zeros(1, 5, 4096)})


def test_a_failed_call_leaves_the_callers_stream_after_the_sessions(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was launched before the failure still uses inputs and output."""
    (engine,), calls = opened(tiny_bundle), Calls()
    monkeypatch.setattr(engine.session, "stream", Stream(calls, 9))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream(calls, 7))
    with pytest.raises(EngineFailure, match="ONNX Runtime failed on cpu"):
        engine({**tensors(), "text": torch.zeros(1, 5, 4096)})
    assert calls == [("wait_stream", 9, 7), ("wait_stream", 7, 9)]


def test_memory_that_pytorch_cannot_give_is_one_line(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (engine,), given = opened(tiny_bundle), tensors()

    def full(*arguments: Any, **options: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(EngineFailure, match=r"failed on cpu \(CUDA out of memory"):
        engine(given)


def test_onnx_runtimes_log_is_left_as_it_was(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    severities: list[int] = []
    monkeypatch.setattr("onnxruntime.set_default_logger_severity", severities.append)
    (tmp_path / "x.onnx").write_bytes(b"no graph")
    with pytest.raises(WanExportError):
        OnnxGpuSession(tmp_path / "x.onnx", tiny_bundle / WEIGHTS, {}, CPU, Provider("cpu"))
    assert severities == [3, 2]


class NoRtxDevice:
    """ONNX Runtime where the plugin for TensorRT for RTX finds no GPU that it is for."""

    registered = False

    def get_ep_devices(self) -> list[Any]:
        return []

    def register_execution_provider_library(self, name: str, path: str) -> None:
        if self.registered:
            raise RuntimeError(f"library is already registered under {name}")
        self.registered = True


def test_a_gpu_that_the_plugin_is_not_for_is_refused_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plugin = SimpleNamespace(get_library_path=lambda: "plugin.so")
    monkeypatch.setitem(sys.modules, RTX_PLUGIN, plugin)
    onnxruntime = NoRtxDevice()
    for _ in range(2):
        with pytest.raises(BundleError, match="offers 0 devices, cuda:0 is not among them"):
            _add_rtx(onnxruntime, None, {}, torch.device("cuda", 0))


def test_a_folder_that_may_not_be_written_caches_nothing(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in the place of the folder: root may write anywhere")
    for name, option in (("tensorrt", "cache"), ("tensorrt-rtx", "nv_runtime_cache_path")):
        provider = Provider(name, cache=tmp_path / "cache")
        with pytest.warns(WanExportWarning, match="the next load compiles anew"):
            settings = provider.settings(torch.device("cuda", 0), 0, bundle / WEIGHTS)
        assert settings["device_id"] == "0"
        assert not [key for key in settings if option in key]


def test_a_providers_options(tiny_bundle: Path) -> None:
    gpu = torch.device("cuda", 1)
    file = tiny_bundle / WEIGHTS
    settings = Provider("cuda", {"use_tf32": "1", "sdpa_kernel": "2"}).settings(gpu, 77, file)
    assert settings["device_id"] == "1" and settings["user_compute_stream"] == "77"
    assert settings["use_tf32"] == "1" and settings["sdpa_kernel"] == "2"
    assert Provider("cuda").settings(gpu, 77, file)["use_tf32"] == "0"
    for name in ("user_compute_stream", "enable_cuda_graph"):
        with pytest.raises(BadRequest, match=f"option {name} is set by the engine"):
            Provider("cuda", {name: "1"})
    with pytest.raises(BadRequest, match="unknown provider 'rocm': expected one of cpu, cuda"):
        Provider("rocm")


def test_a_compiled_engine_is_cached_for_its_weights_alone(
    bundle: Path, other: Path, tmp_path: Path
) -> None:
    gpu, cache = torch.device("cuda", 0), tmp_path / "cache"
    provider = Provider("tensorrt", cache=cache)
    own = provider.settings(gpu, 0, bundle / WEIGHTS)
    assert Path(own["trt_engine_cache_path"]).parent == cache
    assert Path(own["trt_engine_cache_path"]).is_dir()
    assert own == provider.settings(gpu, 0, bundle / WEIGHTS)
    theirs = provider.settings(gpu, 0, other)
    assert own["trt_engine_cache_path"] != theirs["trt_engine_cache_path"]
    assert "trt_bf16_enable" not in own and "trt_fp16_enable" not in own
    narrow = provider.settings(gpu, 0, bundle / "weights/bf16/denoiser.safetensors")
    assert narrow["trt_bf16_enable"] == "1" and "trt_fp16_enable" not in narrow
    rtx = Provider("tensorrt-rtx", cache=cache).settings(gpu, 0, other)
    assert Path(rtx["nv_runtime_cache_path"]).is_dir()


def test_a_compiled_engine_offloads_nothing(tiny_bundle: Path, other: Path) -> None:
    files = {"high_noise": tiny_bundle / WEIGHTS, "low_noise": other}
    with pytest.raises(BadRequest, match="tensorrt has its weights inside"):
        open_engines(
            {WHOLE: tiny_bundle / GRAPH}, files, CPU, Provider("tensorrt"), PROGRAM, offload=True
        )


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A machine on which ONNX Runtime can use a GPU, whose engines are not opened."""
    seen: dict[str, Any] = {}

    def opened(
        graph: Path, weights: Any, device: Any, provider: Provider, program: Any, **options: Any
    ) -> Any:
        seen.update(weights=weights, device=device, provider=provider, **options)
        return dict.fromkeys(weights, SimpleNamespace(device=str(device)))

    monkeypatch.setattr("wanexport.runtime.engines.onnx.gpu_obstacle", lambda provider: "")
    monkeypatch.setattr("wanexport.runtime.engines.onnx_gpu.open_engines", opened)
    cuda = {"is_available": lambda: True, "device_count": lambda: 2, "current_device": lambda: 0}
    for name, answer in cuda.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    yield seen


def test_one_engine_serves_both_devices(
    tiny_bundle: Path, with_gpu: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    denoiser = load(tiny_bundle, provider_options={"use_tf32": "1"})
    assert (denoiser.record.dtype, denoiser.device) == ("bf16", "cuda:0")
    assert denoiser.record == read_manifest(tiny_bundle).engines[2]  # whose target is a CPU's
    assert with_gpu["device"] == torch.device("cuda", 0) and not with_gpu["offload"]
    provider = with_gpu["provider"]
    assert (provider.name, provider.options) == ("cuda", {"use_tf32": "1"})
    assert provider.cache is None
    weights = {expert: file.path for expert, file in with_gpu["weights"].items()}
    assert weights == {"": tiny_bundle / "weights/bf16/denoiser.safetensors"}
    record = load(tiny_bundle, dtype="fp32", provider="tensorrt").record
    assert with_gpu["provider"].name == "tensorrt"
    # The user's own, and of this graph alone.
    graph = record.files["denoiser"].sha256
    assert with_gpu["provider"].cache == tmp_path / "wanexport" / graph
    assert load(tiny_bundle, device="cuda:1").device == "cuda:1"
    assert with_gpu["device"] == torch.device("cuda", 1)
    with pytest.raises(EngineFailure, match="no cuda:2 here: expected cuda:0 to cuda:1"):
        load(tiny_bundle, device="cuda:2")
    for options in ({"device": "cpu"}, {"provider": "cpu"}):
        denoiser = load(tiny_bundle, **options)  # type: ignore[arg-type]
        assert (denoiser.record.dtype, denoiser.device) == ("fp32", "cpu")


def test_other_backends_come_first_on_a_gpu(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(tiny_bundle)
    onnx_engine = manifest.engines[2]
    target = {"device": "cuda", "arch": "sm90"}
    plan = replace(onnx_engine, backend="tensorrt", target=target, details=TensorRtDetails())
    aoti = replace(onnx_engine, backend="aoti", target=target, details=AotiDetails())

    def refusal(_: Path, choice: Choice, __: EngineOptions) -> str:
        return "" if choice.device == "cuda" else "too slow"

    monkeypatch.setattr("wanexport.runtime.engines.choose._refusal", refusal)
    monkeypatch.setattr("wanexport.runtime.engines.choose.why_unusable", lambda *_: "")
    for engines, chosen in (
        ((onnx_engine, plan, aoti), "aoti"),
        ((onnx_engine, plan), "tensorrt"),
        ((onnx_engine,), "onnx"),
    ):
        found = choose_engine(tiny_bundle, replace(manifest, engines=engines), EngineOptions())
        assert (found.record.backend, found.device) == (chosen, "cuda")


def test_attention_of_full_size_is_no_obstacle_on_a_gpu(
    bundle: Path, with_gpu: dict[str, Any]
) -> None:
    manifest = read_manifest(bundle)
    details = OnnxDetails(attention_score_bytes=1 << 60)
    engines = tuple(replace(engine, details=details) for engine in manifest.engines)
    write_manifest(bundle, replace(manifest, engines=engines))
    assert load(bundle).device == "cuda:0"
    with pytest.raises(EngineFailure, match="attention in ONNX Runtime on a CPU needs"):
        load(bundle, device="cpu")(**arrays())


def test_options_that_do_not_go_together(tiny_bundle: Path, with_gpu: dict[str, Any]) -> None:
    for options, message in (
        ({"provider": "cuda", "device": "cpu"}, "provider cuda is of cuda, not of cpu"),
        ({"provider": "cpu", "backend": "aoti"}, "provider cpu is of onnx, not of aoti"),
        ({"provider": "rocm"}, "unknown provider 'rocm'"),
        ({"device": "cpu", "offload": "experts"}, "this model has one"),
        ({"device": "cpu", "provider_options": {"a": "b"}}, "no provider options"),
        ({"offload": "experts"}, "this model has one"),
        ({"cuda_graph": True}, "has no CUDA graph"),
        ({"attention": "sdpa"}, "has no attention kernel"),
    ):
        with pytest.raises(BadRequest, match=message):
            load(tiny_bundle, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_without_a_gpu_it_says_what_is_missing(tiny_bundle: Path, tmp_path: Path) -> None:
    message = r"no CUDAExecutionProvider: .*pip install onnxruntime-gpu|no CUDA device here"
    with pytest.raises(WanExportError, match=message):
        load(tiny_bundle, device="cuda")
    with pytest.raises(WanExportError, match=message):
        build(
            "tiny", random_weights=0, resolution="32x32", frames=1, backends=["onnx"],
            device="cuda", output=tmp_path / "b",
        )  # fmt: skip
    assert not (tmp_path / "b").exists()


def test_pairs_of_an_option() -> None:
    assert parse_pairs("--provider-option", ["a=b", "c=d=e"]) == {"a": "b", "c": "d=e"}
    for text in ("a", "=b"):
        with pytest.raises(WanExportError, match="expected KEY=VALUE"):
            parse_pairs("--provider-option", [text])


@pytest.mark.parametrize("preset", slow_but(["t2v-1.3b", "flf2v-14b"], "t2v-1.3b"))
def test_onnx_runtimes_own_attention_is_the_same(preset: str, tmp_path: Path) -> None:
    config = small_config(preset)
    geometry = small_geometry(config)
    write_weights(tmp_path / "denoiser.safetensors", config, "fp32", RandomWeights(config, 0, ""))
    velocities = []
    for attention in ("native", "mha"):
        how = for_onnx_runtime("fp32", attention)
        lowered = lower(family_of(config).graph, config, geometry, how)
        assert set(lowered.lint.values()) == {0}
        graph = assemble(lowered, weights_layout(config, "fp32")[1])
        (tmp_path / "graph.onnx").write_bytes(serialize(graph))
        session = OnnxSession(tmp_path / "graph.onnx", tmp_path / "denoiser.safetensors")
        velocities += session(forward_inputs(config, geometry, 812.0, 0))
    assert relative_l2(velocities[1], velocities[0]) <= 1e-6
    model = onnx.load(tmp_path / "graph.onnx", load_external_data=False)
    imported = {"": 23, "com.microsoft": 1}
    assert {o.domain: o.version for o in model.opset_import} == {**imported, "wanexport": 1}
    model = onnx.inliner.inline_local_functions(model)
    operators = Counter((node.domain, node.op_type) for node in model.graph.node)
    assert operators["com.microsoft", "MultiHeadAttention"] == attention_count(
        program_of(config, geometry)
    )
    assert not operators["", "Attention"]
    assert lint_onnx(model, attention_count(program_of(config, geometry))) == []


def test_a_build_with_the_other_attention_is_another_engine(bundle: Path) -> None:
    native = read_manifest(bundle).engines[0]
    record = build(
        "tiny",
        random_weights=0,
        resolution="64x96",
        frames=9,
        attention_operator="mha",
        output=bundle,
    )
    assert record["reused"] == ["weights fp32"]
    engine = next(e for e in read_manifest(bundle).engines if e.dtype == "fp32")
    assert engine.key != native.key
    assert engine.build["nodes"]["MultiHeadAttention"] == 8
    assert engine.details == replace(native.details, attention="mha")
    assert engine.proof["error"] <= 1e-5
    with pytest.raises(BadRequest, match="attention fa4: only engines of aoti take this"):
        build("tiny", random_weights=0, resolution="64x96", frames=9, attention="fa4")


def test_the_proof_runs_the_cut_on_the_engines_own_tensors(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    config, geometry = PRESETS["tiny"].config, Geometry(64, 96, 9)
    names = {name: name for name in weights_layout(config, "fp32")[1]}
    job = OnnxJob(
        **make_case(config, geometry, "fp32", device="cpu", tensors=names, folder=tmp_path),
        engine={WHOLE: str(tiny_bundle / GRAPH)},
        runs_here=True,
        weights=str(tiny_bundle / WEIGHTS),
        cut={WHOLE: str(tiny_bundle / GRAPH)},
        opens=True,
    )
    (exact,) = OnnxSession(tiny_bundle / GRAPH, tiny_bundle / WEIGHTS)(job.arrays())
    assert np.array_equal(run_with_device_weights(job, CPU, Provider("cpu")), exact)
