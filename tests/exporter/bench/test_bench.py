"""`bench` times every arm on the same inputs, and its figures are plain arithmetic."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from tests.exporter.bundle.other_weights import add_style
from tests.exporter.child.killed_parents import alive
from tests.exporter.trace.traces import raw
from tests.quick import slow_but
from tests.tables import bench_arms
from wanexport.exporter.bench import bench as bench_module
from wanexport.exporter.bench import opening as bench_opening
from wanexport.exporter.bench import process as bench_process
from wanexport.exporter.bench.arms import (
    ARMS,
    MACHINE,
    Arm,
    Job,
    find_arms,
    kernel_shown,
    options_of,
    peer_kernel,
)
from wanexport.exporter.bench.bench import bench, run_job
from wanexport.exporter.bench.opening import import_libraries, open_arm, read_inputs
from wanexport.exporter.bench.process import (
    cold_start,
    measure_machine,
    peak_bytes,
    profile_step,
)
from wanexport.exporter.bench.report import row, save
from wanexport.exporter.bench.subject import (
    Subject,
    arms_that_apply,
    check_arms,
    choose_subject,
    first_job,
)
from wanexport.exporter.bundle.writer import file_record, write_manifest
from wanexport.exporter.cli.main import cli
from wanexport.exporter.reference.diffusers import DiffusersEngine
from wanexport.exporter.reference.inputs import forward_inputs
from wanexport.exporter.reference.parity import relative_l2
from wanexport.graphs.weights import bundle_tensors
from wanexport.runtime import load
from wanexport.runtime.bundle.details import AotiDetails
from wanexport.runtime.bundle.manifest import EngineRecord, read_manifest
from wanexport.runtime.bundle.signature import parameter_shapes
from wanexport.runtime.bundle.tensorfile import header_sha256, load_arrays, save_arrays
from wanexport.runtime.engines.choose import Choice
from wanexport.runtime.engines.engine import EngineOptions
from wanexport.runtime.engines.table import ENGINES
from wanexport.runtime.errors import EngineFailure, WanExportError
from wanexport.runtime.wan_config import EXPERTS

FLOPS = 1_237_581_824  # of the tiny preset at 64x96x9, counted by hand below


@pytest.fixture(scope="module", params=slow_but(["onnx graph", "onnx graph diffusers"]))
def measured(
    request: pytest.FixtureRequest, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """One real run of some arms at tiny size, and its folder of reports."""
    folder, arms = tmp_path_factory.mktemp("bench"), request.param.split()
    result = bench(tiny_bundle, dtype="fp32", arms=arms, report=folder)
    assert [line["arm"] for line in result["arms"]] == arms
    return result, folder


def test_arms_get_the_same_inputs_and_weights(
    measured: tuple[dict[str, Any], Path], tiny_bundle: Path
) -> None:
    result, _ = measured
    lines = {line["arm"]: line for line in result["arms"]}
    assert (result["failed"], result["warning"]) == ({}, None)
    assert result["compared_with"] == "graph"
    for line in lines.values():
        assert line["difference"] <= 1e-5
        assert line["difference"] > 0 or line["arm"] == "graph"
    denoiser = load(tiny_bundle, dtype="fp32")
    config = read_manifest(tiny_bundle).config
    inputs = forward_inputs(config, denoiser.geometry, result["timestep"], result["seed"])
    assert lines["onnx"]["md5"] == hashlib.md5(denoiser(**inputs).tobytes()).hexdigest()


def test_the_onnx_arm_needs_only_its_provider(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def obstacle(provider: str) -> str:
        return "" if provider == "tensorrt-rtx" else f"there is no {provider}"

    monkeypatch.setattr("wanexport.runtime.engines.onnx.gpu_obstacle", obstacle)
    with pytest.raises(WanExportError, match=r"there is no tensorrt$"):
        bench(tiny_bundle, provider="tensorrt", arms=["onnx"])
    opened: list[tuple[Choice, EngineOptions]] = []

    def open_engine(bundle: Path, manifest: Any, *given: Any) -> Mock:
        opened.append(given)
        return Mock()

    monkeypatch.setattr(bench_opening, "open_engine", open_engine)
    options = {"key": "value"}
    asked = EngineOptions(dtype="bf16", provider="tensorrt-rtx", provider_options=options)
    subject = choose_subject(tiny_bundle, asked, [ARMS["onnx"]])
    check_arms([ARMS["onnx"]], subject)
    open_arm(replace(first_job(subject, tmp_path, 5, False), arm=ARMS["onnx"]))
    ((choice, given),) = opened
    assert (given.provider, given.provider_options) == ("tensorrt-rtx", options)
    assert (choice.device, choice.record.dtype) == ("cuda", "bf16")


def test_figures_follow_from_the_seconds(measured: tuple[dict[str, Any], Path]) -> None:
    result, _ = measured
    layers, tokens, dim, ffn, text = 4, 3 * 4 * 6, 256, 1024, 512
    products = 6 * tokens * dim**2 + 2 * text * dim**2 + 2 * tokens * dim * ffn
    attention = 2 * tokens**2 * dim + 2 * tokens * text * dim
    assert result["flops_per_forward"] == 2 * layers * (products + attention) == FLOPS
    assert result["floor_seconds"] == pytest.approx(FLOPS / result["peak"])
    for line in result["arms"]:
        seconds = sorted(line["seconds"])
        assert len(seconds) == result["rounds"] == 5
        assert [line["min"], line["median"], line["max"]] == [seconds[0], seconds[2], seconds[4]]
        assert line["tflops"] * 1e12 * seconds[2] == pytest.approx(FLOPS)
        assert line["percent_of_floor"] == pytest.approx(
            100 * line["tflops"] * 1e12 / result["peak"]
        )
        cold = line["cold_start"]
        parts = ("start", "import", "open", "inputs", "first_call", "second_call")
        assert all(cold[part] > 0 for part in parts)
        assert cold["first_step"] == pytest.approx(sum(cold[part] for part in parts))
        assert cold["first_forward"] == pytest.approx(cold["first_step"] - cold["second_call"])
        assert cold["first_step"] < result["seconds"]
        assert line["peak_bytes"] > 50e6
    compiled = {line["arm"]: line["compile_seconds"] for line in result["arms"]}
    assert compiled["graph"] is compiled.get("diffusers") is None
    assert compiled["onnx"] > 0


def test_report_plot_and_table(
    measured: tuple[dict[str, Any], Path], tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, folder = measured
    saved = json.loads((folder / "bench-64x96x9-onnx-fp32.json").read_text())
    assert saved == {name: value for name, value in result.items() if name != "warning"}
    assert (folder / "bench-64x96x9-onnx-fp32.png").read_bytes()[:4] == b"\x89PNG"
    shown = result | {"failed": {"compile": "no g++"}}
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        "wanexport.exporter.bench.bench.bench",
        lambda bundle, **options: asked.update(options) or shown,
    )
    output = CliRunner().invoke(cli, ["bench", str(tiny_bundle), "--arms", "onnx, graph"])
    assert output.exit_code == 1  # since an arm failed
    assert asked["arms"] == ["onnx", "graph"]
    assert (asked["rounds"], asked["profile"]) == (5, False)
    for line in result["arms"]:
        (text,) = (t for t in output.stdout.splitlines() if t.strip().startswith(line["arm"] + " "))
        assert f"{1e3 * line['median']:.4g} (" in text
        assert f" {line['percent_of_floor']:.1f} " in text
    assert "failed compile: no g++" in output.stdout
    assert f"{result['peak'] / 1e12:.3g} TFLOP/s in float32 matrix products" in output.stdout
    assert max(map(len, output.stdout.splitlines())) < 140


def test_the_percentage_of_the_floor_is_plain_arithmetic() -> None:
    figures = {"seconds": [0.5, 0.2, 0.4, 0.3, 0.25], "cold_start": {"first_call": 0.9}}
    line = row(figures, flops=6_000_000_000_000, floor=0.15)
    assert (line["median"], line["min"], line["max"]) == (0.3, 0.2, 0.5)
    assert line["tflops"] == pytest.approx(20)
    assert line["percent_of_floor"] == pytest.approx(50)
    assert line["first_to_steady"] == pytest.approx(3)


def test_phases_of_the_cold_start() -> None:
    phases = cold_start([100, 101, 103, 106, 110, 115, 121])
    names = ("start", "import", "open", "inputs", "first_call", "second_call")
    assert [phases[name] for name in names] == [1, 2, 3, 4, 5, 6]
    assert (phases["first_forward"], phases["first_step"]) == (15, 21)


def test_profile_counts_waits_and_measures_how_busy_the_gpu_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the same code as `wanexport profile`, of a guided step: two forwards."""
    events = [
        raw("user_annotation", "wanexport step", 0, 100),
        *(raw("cuda_runtime", "cudaStreamSynchronize", at, 2) for at in (10, 20, 30, 120)),
        raw("cuda_runtime", "cudaLaunchKernel", 40, 2, correlation=1),
        raw("kernel", "a", 50, 10, correlation=1),
        raw("kernel", "b", 80, 20, correlation=1),
    ]
    ran: list[int] = []

    def capture(step: Callable[[], Any], steps: int, **_: bool) -> dict[str, Any]:
        step()
        return {"traceEvents": events}

    monkeypatch.setattr("wanexport.exporter.trace.capture.capture", capture)
    result = profile_step(lambda: ran.append(1))
    assert (len(ran), result["host_syncs"]) == (2, 1.5)
    assert result["gpu_busy"] == pytest.approx(30 / 50)


@pytest.mark.gpu
def test_a_wait_of_the_host_is_seen_on_a_gpu() -> None:
    a = torch.randn(2048, 2048, device="cuda")
    silent = profile_step(lambda: a @ a)
    waiting = profile_step(lambda: (a @ a).sum().item())
    assert silent["host_syncs"] == 0
    assert waiting["host_syncs"] >= 1
    assert 0 < silent["gpu_busy"] <= 1


@pytest.mark.gpu
def test_a_gpu_is_timed_to_the_end_of_its_work() -> None:
    a = torch.randn(8192, 8192, device="cuda")
    seconds = bench_process.time_calls(lambda: a @ a, "cuda", 3)
    assert 2 * 8192**3 / min(seconds) < 1e15  # in fp32: a launch alone would look far faster
    assert measure_machine("cuda", "bf16")["peak"] > 1e13


def job_of(bundle: Path, arm: str, folder: Path, dtype: str = "fp32") -> Job:
    """A job for an arm on the CPU, with the inputs at timestep 950."""
    manifest = read_manifest(bundle)
    geometry, weights = manifest.engines[0].geometry, manifest.weights.values()
    inputs = forward_inputs(manifest.config, geometry, 950.0, 0)
    save_arrays(folder / "inputs.safetensors", inputs)
    return Job(
        arm=ARMS[arm],
        bundle=str(bundle),
        options={"device": "cpu", "dtype": dtype, "resolution": "64x96", "frames": 9},
        geometry=vars(geometry),
        weights=str(bundle / next(w.file.path for w in weights if w.dtype == dtype)),
        inputs=str(folder / "inputs.safetensors"),
        velocity=str(folder / "velocity.safetensors"),
        rounds=5,
        profile=False,
        spawned=time.time(),
    )


def placed(job: Job, **options: str) -> Job:
    """The job with another device or dtype."""
    return replace(job, options=job.options | options)


Children = Callable[..., list[Job]]


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Children:
    """Replace processes by doubles, of which those of the named arms fail; the list has their jobs.

    The floor is 2 seconds, a forward takes 3 and the first one 5.
    """

    def install(failing: Collection[str] = ()) -> list[Job]:
        ran: list[Job] = []

        def run(job: Job, folder: Path) -> dict[str, Any]:
            ran.append(job)
            if job.arm == MACHINE:
                stated = {"products": {}, "product_dtype": "float32", "machine": "m", "torch": "t"}
                return {"peak": FLOPS / 2, **stated}
            if job.arm.name in failing:
                raise WanExportError("its process died of signal 11")
            save_arrays(Path(job.velocity), {"velocity": np.ones(3, np.float32)})
            cold = {"first_call": 5.0, "first_step": 9.0}
            return {"seconds": [3.0] * 5, "cold_start": cold, "peak_bytes": 1}

        monkeypatch.setattr(bench_module, "run_job", run)
        return ran

    return install


def with_low_noise_expert(bundle: Path) -> None:
    """Make of a bundle one of two experts: its own weights, and others for little noise."""
    manifest = read_manifest(bundle)
    high = manifest.weights["fp32"]
    arrays = load_arrays(bundle / high.file.path)
    low = bundle / "weights" / "low_noise-fp32" / "denoiser.safetensors"
    low.parent.mkdir()
    save_arrays(low, arrays | {"head.head.weight": -arrays["head.head.weight"]})
    weights = {
        "high_noise-fp32": replace(high, expert="high_noise"),
        "low_noise-fp32": replace(high, expert="low_noise", file=file_record(bundle, low)),
    }
    assert header_sha256(low) == high.layout
    engines = tuple(
        replace(engine, sampling=replace(engine.sampling, boundary=0.875))
        for engine in manifest.engines
        if engine.dtype == "fp32"
    )
    write_manifest(bundle, replace(manifest, experts=EXPERTS, weights=weights, engines=engines))


def test_of_two_experts_the_high_noise_one_is_measured(
    bundle: Path, tmp_path: Path, children: Children
) -> None:
    with_low_noise_expert(bundle)
    denoiser = load(bundle)
    inputs = read_inputs(job_of(bundle, "onnx", tmp_path))
    high, low = (denoiser(**inputs | {"timestep": t}) for t in (950.0, 100.0))
    assert relative_l2(low, high) > 0.1
    for arm in ("onnx", "graph", "diffusers"):
        velocity = open_arm(job_of(bundle, arm, tmp_path))(inputs)
        assert relative_l2(velocity, high) <= 1e-5
    children()
    result = bench(bundle, arms=["onnx"], report=tmp_path)
    assert (result["expert"], result["timestep"]) == ("high_noise", 950)


def test_diffusers_takes_and_gives_either_kind_of_array(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    config, geometry = manifest.config, manifest.engines[0].geometry
    file = tiny_bundle / manifest.weights["fp32"].file.path
    tensors = bundle_tensors(file, {name: name for name in parameter_shapes(config)})
    engine = DiffusersEngine(config, geometry, "fp32", tensors, device="cpu")
    inputs = forward_inputs(config, geometry, 812.0, 0)
    array = engine(inputs)
    tensor = engine({name: torch.from_numpy(value) for name, value in inputs.items()})
    assert isinstance(array, np.ndarray)
    assert isinstance(tensor, torch.Tensor)
    np.testing.assert_array_equal(array, tensor.numpy())


def test_peers_are_held_to_a_kernel_on_a_gpu_only() -> None:
    def kernel(arm: Arm, device: str, dtype: str) -> str | None:
        return peer_kernel(arm, EngineOptions(device=device, dtype=dtype))

    assert kernel(ARMS["diffusers"], "cuda", "bf16") == "cudnn"
    assert kernel(bench_arms.OWN["diffusers-fa2"], "cuda:1", "fp16") == "fa2"
    assert kernel(ARMS["diffusers"], "cuda", "fp32") is None  # neither kernel takes it
    assert kernel(ARMS["graph"], "cpu", "bf16") is None


def test_memory_beside_pytorchs_counts_where_a_library_takes_its_own(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_process, "_device_bytes", lambda: 9_000)
    monkeypatch.setattr(bench_process, "peak_gpu_bytes", lambda: 70)
    job = placed(job_of(tiny_bundle, "graph", tmp_path), device="cuda")
    own = {name: peak_bytes(replace(job, arm=arm), 2_000) for name, arm in ARMS.items()}
    assert {arm for arm, taken in own.items() if taken == 7_000} == {
        "onnx",
        "tensorrt",
        "tensorrt-rtx",
    }
    assert set(own.values()) == {7_000, 70}
    assert peak_bytes(placed(job, device="cpu"), 0) > 50e6


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_importing_tensorrt_is_part_of_a_cold_start(
    flavour: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported: list[str] = []
    monkeypatch.setattr("wanexport.runtime.engines.tensorrt.import_tensorrt", imported.append)
    import_libraries(job_of(tiny_bundle, flavour, tmp_path))
    assert imported == [flavour]


def subject_of(bundle: Path, **options: Any) -> Subject:
    return choose_subject(bundle, EngineOptions(**options), [])


def names_of(arms: list[Arm]) -> list[str]:
    return [arm.name for arm in arms]


def test_by_default_what_applies_is_measured(tiny_bundle: Path) -> None:
    subject = subject_of(tiny_bundle, dtype="fp32")
    assert names_of(arms_that_apply(subject)) == ["onnx", "graph", "diffusers"]
    assert names_of(find_arms(["graph", "onnx", "graph"])) == ["graph", "onnx"]


@pytest.fixture
def on_gpu(tiny_bundle: Path) -> Subject:
    """A subject that seems to lie on a GPU."""
    subject = subject_of(tiny_bundle, dtype="fp32")
    return replace(subject, options=replace(subject.options, device="cuda", dtype="bf16"))


def hold(monkeypatch: pytest.MonkeyPatch, record: EngineRecord, backends: Collection[str]) -> None:
    """Have the bundle hold the engine for these backends."""

    def choose(bundle: Path, _: object, options: EngineOptions) -> Choice:
        if options.backend is None or options.backend not in backends:
            raise WanExportError(f"{bundle} has no such engine")
        return Choice(replace(record, backend=options.backend), "cuda")

    monkeypatch.setattr("wanexport.exporter.bench.subject.choose_engine", choose)


def test_arms_of_the_engines_that_are_there(
    on_gpu: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(monkeypatch, on_gpu.record, {"onnx", "tensorrt-rtx"})
    applying = names_of(arms_that_apply(on_gpu))
    assert applying == ["tensorrt-rtx", "onnx", "graph", "diffusers", "compile"]
    with pytest.raises(WanExportError, match=r"arm tensorrt cannot run here: .* no such engine"):
        check_arms([ARMS["tensorrt"]], on_gpu)


def test_every_backend_has_an_arm_of_its_name() -> None:
    engines = {arm.name for arm in ARMS.values() if arm.backend == arm.name}
    assert engines == {"aoti", "onnx", "tensorrt", "tensorrt-rtx"} == set(ENGINES)
    assert ARMS.keys() - engines == {"graph", "diffusers", "compile"}


def test_an_engine_is_opened_with_the_options_that_it_has() -> None:
    given = {"attention": "sdpa", "cuda_graph": False, "provider": "cuda", "weights": "style"}
    asked = EngineOptions(device="cuda", **given)  # type: ignore[arg-type]
    aoti = options_of(ARMS["aoti"], asked).given()
    assert {n: aoti.get(n) for n in given} == given | {"provider": None}
    assert options_of(bench_arms.OWN["aoti-cudnn"], asked).attention == "cudnn"
    onnx = options_of(ARMS["onnx"], asked).given()
    assert (onnx["provider"], onnx["weights"]) == ("cuda", "style")
    assert {"attention", "cuda_graph"}.isdisjoint(onnx)


def test_the_attention_that_an_arm_runs_is_told(on_gpu: Subject) -> None:
    engine = replace(on_gpu.record, details=AotiDetails({"self": "fa4", "text": "cudnn"}))
    asked = on_gpu.options
    assert kernel_shown(ARMS["aoti"], asked, engine) == "fa4"
    assert kernel_shown(bench_arms.OWN["aoti-sdpa"], asked, engine) == "sdpa"
    assert kernel_shown(ARMS["onnx"], asked, on_gpu.record) == "native"
    assert kernel_shown(ARMS["compile"], asked, None) == "cudnn"


def test_the_first_engine_that_is_named_gives_precision_and_shape(
    on_gpu: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[EngineOptions] = []

    def choose(bundle: Path, _: object, options: EngineOptions) -> Choice:
        asked.append(options)
        return Choice(on_gpu.record, "cuda")

    monkeypatch.setattr("wanexport.exporter.bench.subject.choose_engine", choose)
    options = EngineOptions(provider="cuda", cuda_graph=True)
    arms = find_arms(["graph", "aoti", "onnx"])
    subject = choose_subject(on_gpu.bundle, options, arms)
    assert asked == [EngineOptions(backend="aoti", cuda_graph=True)]
    assert subject.options.provider == "cuda" and subject.options.cuda_graph
    check_arms(arms, subject)


def test_other_weights_are_every_arms(bundle: Path, tmp_path: Path, children: Children) -> None:
    add_style(bundle)
    children()
    named = bench(bundle, dtype="fp32", arms=["onnx"], weights="style", report=tmp_path / "r")
    assert named["weights"] == "style"
    with_style = load(bundle, dtype="fp32", weights="style")
    for weights in ("style", bundle / "weights" / "style-fp32"):
        subject = subject_of(bundle, dtype="fp32", weights=weights)
        job = first_job(subject, tmp_path, 5, False)
        inputs = forward_inputs(subject.manifest.config, subject.record.geometry, 950.0, 0)
        save_arrays(Path(job.inputs), inputs)
        expected = with_style(**inputs)
        assert relative_l2(load(bundle, dtype="fp32")(**inputs), expected) > 0.1
        for arm in ("onnx", "graph", "diffusers"):
            own = replace(job, arm=ARMS[arm])
            assert relative_l2(open_arm(own)(read_inputs(own)), expected) <= 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": ["onnx", "vllm"]}, "unknown arm 'vllm': expected some of aoti, tensorrt, "),
        ({"arms": ["aoti"]}, "has no such engine"),
        ({"arms": ["onnx", "tensorrt-rtx"]}, "arm tensorrt-rtx cannot run here: .* no such engine"),
        ({"rounds": 4}, "4 rounds make no median: expected 5 or more"),
        ({"offload": "experts"}, "bench measures one expert"),
        ({"backend": "onnx"}, "bench takes no backend: name it among the arms"),
        ({"attention": "sdpa"}, "no arm of onnx, graph, diffusers takes attention: leave it out"),
        ({"arms": ["graph"], "cuda_graph": True}, "no arm of graph takes cuda graph"),
        ({"weights": "style"}, "no weights set style"),
        ({"resolution": "480x832"}, "has no such engine"),
        ({"dtype": "bf16"}, "ONNX Runtime cannot execute"),
    ],
)
def test_mistakes_are_refused_before_any_arm_runs(
    options: dict[str, Any], message: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"dtype": "fp32", "report": tmp_path / "r"}
    with pytest.raises(WanExportError, match=message):
        bench(tiny_bundle, **settings | options)
    assert not (tmp_path / "r").exists()


def test_without_diffusers_its_arms_are_refused(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(WanExportError, match=r"arm compile cannot run here: .*needs diffusers"):
        bench(tiny_bundle, dtype="fp32", arms=["compile"])


def test_an_arm_that_fails_does_not_stop_the_others(
    children: Children, tiny_bundle: Path, tmp_path: Path
) -> None:
    ran = children(["graph"])
    arms = ("onnx", "graph", "diffusers")
    result = bench(tiny_bundle, dtype="fp32", arms=arms, report=tmp_path)
    assert [job.arm.name for job in ran] == ["machine", *arms]
    assert [line["arm"] for line in result["arms"]] == ["onnx", "diffusers"]
    assert result["failed"] == {"graph": "its process died of signal 11"}
    assert result["compared_with"] == "onnx"
    assert result["arms"][0]["percent_of_floor"] == pytest.approx(100 * 2 / 3)
    with pytest.raises(WanExportError, match=r"^graph: its process died of signal 11$"):
        bench(tiny_bundle, dtype="fp32", arms=["graph"], report=tmp_path)


def test_what_the_first_call_took_more_is_compiling(
    children: Children, tiny_bundle: Path, tmp_path: Path
) -> None:
    children()
    arms = ("compile", "diffusers")
    result = bench(tiny_bundle, dtype="fp32", arms=arms, report=tmp_path)
    assert [line["compile_seconds"] for line in result["arms"]] == [5 - 3, None]


def test_the_projects_own_arms_are_measured_as_the_others(
    children: Children, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = children()
    bench_arms.main([str(tiny_bundle), "--profile", "max-autotune", "onnx"])
    measured = [(job.arm.compiles, job.arm.backend, job.profile) for job in ran[1:]]
    assert measured == [("max-autotune-no-cudagraphs", None, True), (None, "onnx", True)]
    printed = capsys.readouterr().out
    assert " max-autotune " in printed and " onnx " in printed


def test_a_real_failure_is_told_in_the_words_of_its_process(bundle: Path, tmp_path: Path) -> None:
    (graph,) = (bundle / "engines").rglob("onnx-fp32/*.onnx")
    job = job_of(bundle, "onnx", tmp_path)
    graph.write_bytes(graph.read_bytes()[:-1] + b"\0")
    with pytest.raises(WanExportError, match="was altered after the build"):
        run_job(job, tmp_path)


def test_an_arm_that_takes_too_long_is_stopped(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_module, "_LIMIT", 0.3)  # it takes longer to import
    with pytest.raises(EngineFailure, match=r"stopped after 0\.3 s"):
        run_job(job_of(bundle, "onnx", tmp_path), tmp_path)
    assert not alive("bench.process")


def test_without_matplotlib_there_is_no_plot_but_a_warning(
    measured: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    warning = save(measured[0], tmp_path)
    assert warning == "the plot needs matplotlib; from a clone of wanexport: pip install '.[bench]'"
    assert [file.suffix for file in tmp_path.iterdir()] == [".json"]


def test_figures_stand_when_they_cannot_be_saved(
    measured: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    warning = save(measured[0], tmp_path / "file")
    assert warning is not None
    assert warning.startswith("the report was not saved: ")


def test_an_engine_needs_no_torch_to_be_measured(tiny_bundle: Path, tmp_path: Path) -> None:
    job = job_of(tiny_bundle, "onnx", tmp_path)
    code = (
        "import sys; from wanexport.exporter.bench.process import work; "
        f"work({asdict(job)!r}); assert 'torch' not in sys.modules, 'torch was imported'"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert os.path.getsize(job.velocity) > 0
