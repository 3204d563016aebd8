"""Plans built for real by TensorRT for RTX, without a GPU, and what a build does around that."""

import json
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnxruntime import InferenceSession

from tests.exporter.families import memory
from tests.exporter.lint.test_tensorrt_lint import attention, sequence
from tests.oracles.wan_reference import (
    VARIANTS,
    diffusers_model,
    official_state,
    small_config,
    small_geometry,
    write_official,
)
from tests.quick import slow_but
from wanexport.exporter.backends.backend import Request, TensorRtOptions
from wanexport.exporter.backends.onnx.assemble import assemble
from wanexport.exporter.backends.onnx.lower import for_onnx_runtime, for_tensorrt, lower, serialize
from wanexport.exporter.backends.onnx.passes import separate_queries
from wanexport.exporter.backends.onnx.prove import prove_lowering
from wanexport.exporter.backends.tensorrt import backend as tensorrt_backend
from wanexport.exporter.backends.tensorrt import plan as to_tensorrt
from wanexport.exporter.backends.tensorrt import targets as tensorrt_targets
from wanexport.exporter.backends.tensorrt.backend import TensorRtBackend
from wanexport.exporter.backends.tensorrt.fusion import check_fusion
from wanexport.exporter.backends.tensorrt.graphs import lowered_graphs
from wanexport.exporter.backends.tensorrt.plan import PlanJob, build_plan, configure, parse
from wanexport.exporter.build import build
from wanexport.exporter.child.child import run_process
from wanexport.exporter.child.process import Ended
from wanexport.exporter.cli.main import cli
from wanexport.exporter.lint.tensorrt import lint_tensorrt
from wanexport.graphs.config import PRESETS, sampling_defaults
from wanexport.graphs.signature import attention_count
from wanexport.runtime import Geometry, WanExportError
from wanexport.runtime.bundle.check import file_sha256
from wanexport.runtime.bundle.details import TensorRtDetails
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.bundle.signature import parameter_shapes, program_of, weights_layout
from wanexport.runtime.engines.tensorrt_library import import_tensorrt, message_log
from wanexport.runtime.errors import BadRequest, WanExportWarning
from wanexport.runtime.family import FAMILIES, family_of
from wanexport.runtime.wan_config import EXPERTS, WanConfig

RTX = "tensorrt-rtx"
TARGETS = ("sm86", "sm89", "sm120")
SIZE: dict[str, Any] = {"random_weights": 0, "resolution": "64x96", "frames": 9}


def quietly(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def job_of(folder: Path, content: bytes, **changes: Any) -> PlanJob:
    """A job for TensorRT for RTX with defaults, its graph written in the folder."""
    (folder / "graph.onnx").write_bytes(content)
    job = PlanJob(
        flavour=RTX,
        graph=str(folder / "graph.onnx"),
        weights="",
        dtype="bf16",
        arch="sm89",
        device="",
        plan=str(folder / "denoiser.plan"),
        layers=str(folder / "layers.json"),
        timing_cache="",
        new_timing_cache="",
        optimization_level=None,
        workspace=None,
        hardware_compatible=False,
        version_compatible=False,
    )
    return replace(job, **changes)


def graph_of(config: WanConfig, geometry: Geometry, dtype: str = "bf16") -> bytes:
    """The graph that a build gives TensorRT, its parameters inputs."""
    how = for_tensorrt(dtype, "native")
    graphs = lowered_graphs(family_of(config).graph, config, geometry, how, True)
    return graphs.content["denoiser"]


def request_for(target: Mapping[str, str], **changes: Any) -> Request:
    config = small_config("t2v-1.3b", num_layers=1)
    geometry = small_geometry(config)
    sampling = sampling_defaults(config, (), geometry)
    request = Request(config, geometry, sampling, RTX, "bf16", "cuda", dict(target))
    return TensorRtBackend(RTX).resolve(replace(request, **changes))


def shapes_of(config: WanConfig, geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """What a graph whose parameters are inputs takes."""
    inputs = program_of(config, geometry).inputs
    return {**{name: spec.shape for name, spec in inputs.items()}, **parameter_shapes(config)}


@pytest.mark.parametrize("preset", slow_but(VARIANTS, "i2v-14b"))
def test_lint_takes_every_variant_and_it_builds(preset: str, tmp_path: Path) -> None:
    config = small_config(preset, num_layers=1)
    program = program_of(config, small_geometry(config))
    content = graph_of(config, small_geometry(config))
    assert lint_tensorrt(onnx.load_from_string(content)) == []
    plans = []
    for arch in TARGETS:
        result = build_plan(job_of(tmp_path, content, arch=arch), quietly)
        assert result["attention_layers"] == attention_count(program)
        plans.append((tmp_path / "denoiser.plan").read_bytes())
    assert len(set(plans)) == len(TARGETS)
    layers = json.loads((tmp_path / "layers.json").read_text())
    assert len(layers) == result["layers"]
    assert layers[-1]["outputs"][0][1:] == ["FLOAT", *program.output.shape]


@pytest.mark.slow
def test_a_full_width_block_builds_at_full_size(tmp_path: Path) -> None:
    config = replace(PRESETS["t2v-1.3b"].config, num_layers=1)
    content = graph_of(config, Geometry(480, 832, 81))
    for arch in TARGETS:
        result = build_plan(job_of(tmp_path, content, arch=arch), quietly)
        assert result["attention_layers"] == 2
        assert (tmp_path / "denoiser.plan").stat().st_size < 5_000_000  # its weights are 300 MB
    with pytest.raises(WanExportError, match=r"needs more than 0\.5 GiB of workspace") as caught:
        build_plan(job_of(tmp_path, content, workspace=2**29), quietly)
    assert "\n" not in str(caught.value)


def test_parameters_are_inputs_under_their_official_names() -> None:
    config = small_config("i2v-14b", num_layers=1)
    geometry = small_geometry(config)
    trt = import_tensorrt(RTX)
    log = message_log(trt)
    network = parse(trt, trt.Builder(log), log, graph_of(config, geometry))
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    shapes = {tensor.name: tuple(tensor.shape) for tensor in tensors}
    assert shapes == shapes_of(config, geometry)
    dtypes = {tensor.name: tensor.dtype for tensor in tensors}
    assert dtypes["blocks.0.ffn.0.weight"] == trt.DataType.BF16
    assert dtypes["blocks.0.modulation"] == dtypes["latent"] == trt.DataType.FLOAT


def test_separate_queries_change_no_velocity() -> None:
    config = small_config("flf2v-14b")
    _, layout = weights_layout(config, "fp32")
    geometry = small_geometry(config)
    lowered = lower(family_of(config).graph, config, geometry, for_onnx_runtime("fp32", "native"))
    rng = np.random.default_rng(0)
    shapes = shapes_of(config, geometry)
    inputs = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}

    def velocity() -> np.ndarray:
        graph = serialize(assemble(lowered, layout, as_inputs=True))
        session = InferenceSession(graph, providers=["CPUExecutionProvider"])
        return session.run(None, inputs)[0]

    before = velocity()
    assert separate_queries(lowered.calls["block"]) == 1  # which every layer calls
    np.testing.assert_allclose(velocity(), before, atol=1e-5 * np.abs(before).max())
    config = small_config("t2v-1.3b")
    other = lower(family_of(config).graph, config, geometry, for_onnx_runtime("fp32", "native"))
    assert [separate_queries(model) for model in other.calls.values()] == [0, 0, 0]


@pytest.mark.slow  # test_proofs builds one of fp32
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_other_precisions_build(dtype: str, tmp_path: Path) -> None:
    config = small_config("t2v-1.3b", num_layers=1)
    content = graph_of(config, small_geometry(config), dtype)
    result = build_plan(job_of(tmp_path, content, dtype=dtype), quietly)
    assert result["attention_layers"] == 2


def test_a_refused_graph_is_one_line(tmp_path: Path) -> None:
    job = job_of(tmp_path, sequence().SerializeToString())
    with pytest.raises(WanExportError, match="operator SplitToSequence, node") as caught:
        build_plan(job, quietly)
    assert "\n" not in str(caught.value)
    assert "and 1 more" in str(caught.value)
    assert not (tmp_path / "denoiser.plan").exists()


def test_attention_without_a_fused_kernel_is_refused(tmp_path: Path) -> None:
    job = job_of(tmp_path, attention().SerializeToString(), dtype="fp32")
    with pytest.raises(WanExportError, match=r"attention is not fused: .* in fp32 at this size"):
        build_plan(job, quietly)


def test_a_failed_build_is_not_put_down_to_a_timing_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = import_tensorrt(RTX)
    log = message_log(trt)

    def refuse(config: Any, path: str) -> bool:
        log.log(trt.ILogger.Severity.ERROR, "the cache is damaged")
        return False

    monkeypatch.setattr(to_tensorrt, "_use_timing_cache", refuse)
    monkeypatch.setattr(to_tensorrt, "_build_failure", lambda *_: WanExportError(log.reason()))
    job = job_of(tmp_path, attention().SerializeToString(), dtype="fp32")
    with pytest.raises(WanExportError, match="not supported by a dedicated kernel"):
        build_plan(job, quietly)


@pytest.mark.usefixtures("fresh_processes")
def test_the_child_tells_its_progress_and_its_result(tmp_path: Path) -> None:
    config = small_config("t2v-1.3b", num_layers=1)
    job = job_of(tmp_path, graph_of(config, small_geometry(config)))
    told: list[tuple[str, int, int]] = []
    result = run_process(
        "backends.tensorrt.process", job, tmp_path, lambda *step: told.append(step)
    )
    assert result["attention_layers"] == 2
    assert 50e6 < result["peak_rss_bytes"] < 1.5 * 2**30
    assert all(stage.startswith("building, ") and done <= total for stage, done, total in told)
    # A phase is shown when it starts: its one step may take nearly all of the build.
    assert ("building, Building engine from subgraph", 0, 1) in told


def test_settings_reach_the_builder(tmp_path: Path) -> None:
    trt = import_tensorrt(RTX)
    builder = trt.Builder(message_log(trt))
    config = configure(trt, builder, job_of(tmp_path, b"", arch="sm120", workspace=2**30))
    assert not config.get_flag(trt.BuilderFlag.TF32)
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 2**30
    assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
    assert config.num_compute_capabilities == 1
    assert config.get_compute_capability(0) == trt.ComputeCapability.SM120
    # What only TensorRT has; the names are the same in both bindings.
    options = {"optimization_level": 5, "version_compatible": True}
    config = configure(trt, builder, job_of(tmp_path, b"", flavour="tensorrt", **options))
    assert config.builder_optimization_level == 5
    assert config.get_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    job = job_of(tmp_path, b"", flavour="tensorrt", hardware_compatible=True)
    config = configure(trt, Mock(), job)  # the real one of TensorRT for RTX keeps no level
    assert config.hardware_compatibility_level == trt.HardwareCompatibilityLevel.AMPERE_PLUS


class TimingConfig:
    """A builder's settings that take the timing cache `good`, and an empty one."""

    def __init__(self) -> None:
        self.taken: bytes | None = None

    def create_timing_cache(self, content: bytes) -> bytes | None:
        return None if content == b"damaged" else content

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        if cache not in (b"good", b"") or ignore_mismatch:
            return False
        self.taken = cache
        return True

    def get_timing_cache(self) -> SimpleNamespace:
        return SimpleNamespace(serialize=lambda: b"good")


@pytest.mark.parametrize(
    ("kept", "taken"), [(b"good", b"good"), (b"damaged", b""), (b"of 10.15", b""), (None, b"")]
)
def test_a_timing_cache_that_is_not_of_this_build_is_ignored(
    kept: bytes | None, taken: bytes, tmp_path: Path
) -> None:
    path, config = tmp_path / "cache" / "own.timing", TimingConfig()
    if kept is not None:
        path.parent.mkdir()
        path.write_bytes(kept)
    is_kept = to_tensorrt._use_timing_cache(config, str(path))
    assert config.taken == taken
    assert is_kept == (kept in (b"good", None))
    to_tensorrt._save_timing_cache(config, str(path))
    assert path.read_bytes() == b"good"


def test_a_timing_cache_that_is_replaced_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results: list[dict[str, Any]] = [{"kept_timings": True}, {"kept_timings": False}]
    monkeypatch.setattr(tensorrt_backend, "run_process", Mock(side_effect=results))
    job = job_of(tmp_path, b"", timing_cache="cache/own.timing")
    assert tensorrt_backend._run(job, tmp_path, quietly) == results[0]
    with pytest.warns(WanExportWarning, match=r"^cache/own\.timing was damaged or of another GPU"):
        tensorrt_backend._run(job, tmp_path, quietly)


def test_what_a_child_wrote_is_moved_into_the_bundle_by_its_parent(tmp_path: Path) -> None:
    scratch, folder = tmp_path / "scratch", tmp_path / "engine"
    scratch.mkdir()
    folder.mkdir()
    names = {"plan": "denoiser.plan", "layers": "layers.json", "new_timing_cache": "own.timing"}
    paths = {field: str(scratch / name) for field, name in names.items()}
    for path in paths.values():
        Path(path).write_text(path)
    cache = tmp_path / "cache" / "own.timing"
    job = job_of(tmp_path, b"", timing_cache=str(cache), **paths)
    tensorrt_backend._take_over(job, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["denoiser.plan", "layers.json"]
    assert cache.exists() and not list(scratch.iterdir())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny preset for two targets, built by the command line."""
    bundle = tmp_path_factory.mktemp("plans") / "bundle"
    arguments = f"build -m tiny --random-weights 0 --resolution 64x96 --frames 9 --backend {RTX}"
    options = ["--target", "sm89,SM120", "-o", str(bundle)]
    result = CliRunner().invoke(cli, [*arguments.split(), *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert result.output.count("plan: 8 of 8 attention layers native, built in") == 2
    return bundle


def test_one_build_makes_a_plan_for_each_target(tiny: Path) -> None:
    manifest = read_manifest(tiny)
    assert [engine.name for engine in manifest.engines] == [
        f"64x96x9/{RTX}-bf16-{arch}" for arch in ("sm89", "sm120")
    ]
    for engine in manifest.engines:
        assert set(engine.files) == {"denoiser", "layers"}
        for file in engine.files.values():
            assert file_sha256(tiny / file.path) == file.sha256
        assert engine.target[RTX] == import_tensorrt(RTX).__version__
        assert engine.build["attention_layers"] == engine.build["attention_expected"] == 8
        assert engine.build["needs_bytes"].keys() == {"gpu", "host", "disk"}
        assert set(engine.lint.values()) == {0} and "tensorrt" in engine.lint
        method = "parsed and built by TensorRT for RTX; cut retyped to fp32, compared"
        assert engine.proof["method"] == method
        assert engine.proof["error"] <= engine.proof["gate"] == 1e-5
        assert engine.program == program_of(manifest.config, engine.geometry).whole()
        assert engine.details == TensorRtDetails()
    assert not list(tiny.rglob("*.json.partial")) and not list(tiny.rglob("plan-*"))


def test_a_second_build_reuses_both_and_other_options_do_not(tiny: Path) -> None:
    options = TensorRtOptions(targets=("sm120", "sm89"))
    record = build("tiny", output=tiny, backends=[RTX], tensorrt=options, **SIZE)
    names = [f"engine 64x96x9/{RTX}-bf16-{arch}" for arch in ("sm120", "sm89")]
    assert record["reused"] == ["weights bf16", *names]
    keys = {
        tensorrt_key(replace(options, targets=(), **change))
        for change in ({}, {"workspace": 2**33}, {"allow_unfused": True})
    }
    assert len(keys) == 3


def tensorrt_key(options: TensorRtOptions) -> str:
    from wanexport.exporter.key import engine_key

    target = {"device": "cuda", "arch": "sm89", RTX: "1.7"}
    return engine_key(request_for(target, options=options))


def test_the_record_has_only_the_engines_that_were_asked_for(tiny: Path) -> None:
    options = TensorRtOptions(targets=("sm120",))
    record = build("tiny", output=tiny, backends=[RTX], tensorrt=options, **SIZE)
    assert [engine["name"] for engine in record["engines"]] == [f"64x96x9/{RTX}-bf16-sm120"]


def test_options_of_tensorrt_need_its_backend(tmp_path: Path) -> None:
    options = TensorRtOptions(targets=("sm89",), bake_weights=True)
    with pytest.raises(WanExportError, match=r"^targets, bake weights: only TensorRT takes this"):
        build("tiny", output=tmp_path / "b", backends=["onnx"], tensorrt=options, **SIZE)
    assert not (tmp_path / "b").exists()


def test_without_onnx_runtime_no_plan_for_elsewhere_is_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(tensorrt_targets, "gpu_arch", lambda *_: "sm89")
    backend = TensorRtBackend(RTX)
    assert backend.targets("cuda", TensorRtOptions())[0]["arch"] == "sm89"
    with pytest.raises(WanExportError, match=r"needs onnxruntime; from a clone"):
        backend.targets("cuda", TensorRtOptions(targets=("sm89", "sm120")))


def write_experts(folder: Path) -> WanConfig:
    config = small_config("t2v-a14b", num_layers=1)
    for seed, expert in enumerate(EXPERTS):
        state = official_state(diffusers_model(config, seed))
        write_official(folder / f"{expert}_model", state, config)
    return config


def test_experts_share_a_plan_unless_their_weights_are_baked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_experts(tmp_path / "model")
    graphs: list[onnx.ModelProto] = []

    def prove_and_keep(*arguments: Any, **options: Any) -> dict[str, Any]:
        graphs.append(onnx.load(arguments[2]["denoiser"], load_external_data=False))
        return prove_lowering(*arguments, **options)

    proofs = Mock(wraps=prove_and_keep)
    monkeypatch.setattr(tensorrt_backend, "prove_lowering", proofs)
    geometry = small_geometry(config)
    size = f"{geometry.height}x{geometry.width}"

    def built(**options: Any) -> Any:
        build(
            tmp_path / "model",
            resolution=size,
            frames=geometry.frames,
            output=tmp_path / "bundle",
            backends=[RTX],
            tensorrt=TensorRtOptions(**options),
        )
        return read_manifest(tmp_path / "bundle").engines

    engines = built(targets=("sm86", "sm89"))
    assert all(set(engine.files) == {"denoiser", "layers"} for engine in engines)
    assert len(proofs.call_args.args[3]) == 2
    assert proofs.call_count == 1  # for both targets
    shared = engines[1].files["denoiser"].size
    (*_, engine) = built(targets=("sm89",), bake_weights=True)
    assert set(engine.files) == {"denoiser-high_noise", "denoiser-low_noise", "layers"}
    weights = read_manifest(tmp_path / "bundle").weights["high_noise-bf16"].file.size
    plans = [engine.files[f"denoiser-{expert}"] for expert in EXPERTS]
    assert all(plan.size > weights + shared / 2 for plan in plans)
    assert plans[0].sha256 != plans[1].sha256
    # Each is proven by the very graph that TensorRT was given.
    assert [bool(graph.graph.initializer) for graph in graphs] == [False, True]


def files_of(bundle: Path) -> set[str]:
    return {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()}


# After a build whose engine failed: the converted weights, for the next try.
LEFT = {".lock", "manifest.partial.json", "weights/bf16/denoiser.safetensors"}


def test_a_build_that_fails_leaves_no_engine(tmp_path: Path) -> None:
    options = TensorRtOptions(targets=("sm89",), workspace=1)
    with pytest.raises(WanExportError, match="GiB of workspace for this video in bf16"):
        build("tiny", output=tmp_path / "b", backends=[RTX], tensorrt=options, **SIZE)
    assert files_of(tmp_path / "b") == LEFT


def test_a_killed_build_leaves_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*arguments: Any, **options: Any) -> Ended:
        return Ended(-signal.SIGKILL, "", "")

    monkeypatch.setattr("wanexport.exporter.child.child.run_command", die)
    options = TensorRtOptions(targets=("sm89",))
    with pytest.raises(WanExportError, match="was killed: out of memory"):
        build("tiny", output=tmp_path / "b", backends=[RTX], tensorrt=options, **SIZE)
    assert files_of(tmp_path / "b") == LEFT


def test_tensorrt_that_is_not_installed_is_said_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(WanExportError, match="TensorRT is not installed: pip install 'tensorrt-"):
        build("tiny", output=tmp_path / "b", backends=["tensorrt"], **SIZE)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("flavour", "here", "options", "message"),
    [
        (RTX, None, {}, "no GPU here to build for: name one with --target, of sm75, sm80, sm86, "),
        (RTX, None, {"targets": ("sm90",)}, "builds for no 'sm90': --target expects of sm75, "),
        (RTX, "sm89", {"hardware_compatible": True}, "has no --hardware-compatible"),
        (RTX, "sm89", {"version_compatible": True}, "has no --version-compatible"),
        (RTX, "sm89", {"optimization_level": 0}, "has no --optimization-level"),
        ("tensorrt", None, {}, "PyTorch finds none here: build on that machine, or use --backend"),
        ("tensorrt", "sm90", {"targets": ("sm89",)}, "that it runs on: leave out --target"),
    ],
)
def test_what_cannot_be_built_is_refused(
    flavour: str,
    here: str | None,
    options: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rtx = import_tensorrt(RTX)
    monkeypatch.setattr(tensorrt_targets, "import_tensorrt", lambda name: rtx)
    monkeypatch.setattr(tensorrt_targets, "gpu_arch", lambda *_: here)
    with pytest.raises(WanExportError, match=message) as caught:
        TensorRtBackend(flavour).targets("cuda", TensorRtOptions(**options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flavour", [RTX, "tensorrt"])
def test_the_gpu_here_is_the_default_target(flavour: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(
        __version__="9", ComputeCapability=import_tensorrt(RTX).ComputeCapability
    )
    monkeypatch.setattr(tensorrt_targets, "import_tensorrt", lambda name: fake)
    monkeypatch.setattr(tensorrt_targets, "gpu_arch", lambda *_: "sm90")
    targets = TensorRtBackend(flavour).targets("cuda", TensorRtOptions())
    assert targets == [{"device": "cuda", "arch": "sm90", flavour: "9"}]


def test_the_plan_itself_is_proven_where_its_gpu_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = SimpleNamespace(prove_plan=Mock(return_value={"method": "the plan's own"}))
    monkeypatch.setitem(sys.modules, "wanexport.exporter.backends.tensorrt.prove", module)
    monkeypatch.setattr(tensorrt_backend, "gpu_arch", lambda *_: "sm89")
    request = request_for({"device": "cuda", "arch": "sm89", RTX: "1.7"})
    engine: Any = object()
    proof = TensorRtBackend(RTX).prove(request, engine, tmp_path, [tmp_path / "w"], "ends")
    assert proof == {"method": "the plan's own"}
    module.prove_plan.assert_called_once_with(request, engine, tmp_path, [tmp_path / "w"], "ends")


def test_weights_are_not_baked_into_plans_of_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "memory", memory.FAMILY)
    target = {"device": "cuda", "arch": "sm89", RTX: "1.7"}
    config = replace(small_config("t2v-1.3b"), family="memory")
    options = TensorRtOptions(bake_weights=True)
    with pytest.raises(BadRequest, match="a memory has a plan for each of its moments, ") as caught:
        request_for(target, config=config, options=options)
    assert "\n" not in str(caught.value)
    assert not request_for(target, config=config).bakes


def test_a_request_leaves_nothing_to_choose() -> None:
    target = {"device": "cuda", "arch": "sm89", RTX: "1.7"}
    options = TensorRtOptions(targets=("sm86", "sm89"), bake_weights=True)
    request = request_for(target, device="cpu", options=options)
    assert (request.device, request.attention, request.bakes) == ("cuda", "native", True)
    assert request.options == replace(options, targets=())
    assert request_for(target, device="cuda:1").device == "cuda:1"
    assert not request_for(target).bakes


def test_decomposed_attention_without_its_gpu_must_be_allowed(tmp_path: Path) -> None:
    target = {"device": "cuda", "arch": "sm89", RTX: import_tensorrt(RTX).__version__}
    request = request_for(target, attention="decomposed")
    with pytest.raises(WanExportError, match="no sm89 here: use --attention-operator native, or"):
        TensorRtBackend(RTX).compile_engine(tmp_path, request, {}, quietly)
    request = replace(request, options=TensorRtOptions(allow_unfused=True))
    with pytest.warns(WanExportWarning, match="an unknown number of 2 attention layers are fused"):
        compiled = TensorRtBackend(RTX).compile_engine(tmp_path, request, {}, quietly)
    assert compiled.build["attention_layers"] == 0
    assert compiled.files["denoiser"].stat().st_size > 0


@pytest.mark.slow
def test_an_engine_of_decomposed_attention_is_linted_and_proven(tmp_path: Path) -> None:
    options = TensorRtOptions(targets=("sm89",), allow_unfused=True)
    with pytest.warns(WanExportWarning, match="attention layers are fused"):
        record = build(
            "tiny", output=tmp_path / "b", backends=[RTX], attention_operator="decomposed",
            tensorrt=options, **SIZE,
        )  # fmt: skip
    (engine,) = record["engines"]
    assert set(engine["lint"].values()) == {0} and "tensorrt" in engine["lint"]
    assert engine["proof"]["error"] <= engine["proof"]["gate"]
    assert "retyped to fp32" in engine["proof"]["method"]


@pytest.mark.parametrize(
    ("attention_form", "layers", "kernels", "is_fused"),
    [
        (None, 2, None, True),
        ("native", 1, None, False),
        ("decomposed", 0, 2, True),
        ("decomposed", 0, 1, False),
    ],
)
def test_fewer_fused_attentions_than_the_model_has_are_refused(
    attention_form: str | None, layers: int, kernels: int | None, is_fused: bool
) -> None:
    request = request_for({"device": "cuda", "arch": "sm89", RTX: "1.7"}, attention=attention_form)
    report = {
        "attention_layers": layers,
        "attention_kernels": kernels,
        "attention_expected": 2,
    }
    if is_fused:
        check_fusion(request, TensorRtOptions(), report)
        return
    with pytest.raises(WanExportError, match="1 of 2 attention layers are fused"):
        check_fusion(request, TensorRtOptions(), report)
    with pytest.warns(WanExportWarning, match="would keep every score"):
        check_fusion(request, TensorRtOptions(allow_unfused=True), report)


def test_an_opened_plan_is_asked_for_its_kernels_and_memory(tmp_path: Path) -> None:
    layers = [{"Name": "__myl_Fc"}, {"Name": "_gemm_mha_v2"}, {"Name": "x", "TacticName": "fMHA"}]
    inspector = SimpleNamespace(get_engine_information=lambda form: json.dumps({"Layers": layers}))
    engine = SimpleNamespace(create_engine_inspector=lambda: inspector, device_memory_size_v2=12345)
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda plan: engine)
    trt = SimpleNamespace(
        Runtime=lambda log: runtime, LayerInformationFormat=SimpleNamespace(JSON="json")
    )
    job = job_of(tmp_path, b"")
    information, memory = to_tensorrt._inspect(trt, job, None, b"plan")
    assert memory == 12345
    assert to_tensorrt._count_attention_kernels(information) == 2
    runtime.deserialize_cuda_engine = lambda plan: None
    log = SimpleNamespace(reason=lambda: "of another GPU")
    with pytest.raises(WanExportError, match="cannot open its plan for sm89: of another GPU"):
        to_tensorrt._inspect(trt, job, log, b"plan")
