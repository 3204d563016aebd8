"""`bench` times every arm on the same inputs, and its figures are plain arithmetic."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from tests.exporter.bundle.other_weights import add_style
from tests.exporter.child.killed_parents import alive
from wanexport.exporter.bench import opening as bench_opening
from wanexport.exporter.bench import process as bench_process
from wanexport.exporter.bench import subject as bench_subject
from wanexport.exporter.bench.arms import ARMS, Job, choose_arms, kernel_of, options_of
from wanexport.exporter.bench.bench import _OverBudget, _Session, bench
from wanexport.exporter.bench.opening import import_libraries, open_arm, read_inputs
from wanexport.exporter.bench.process import (
    Span,
    busy_share,
    cold_start,
    count_syncs,
    measure_machine,
    peak_bytes,
)
from wanexport.exporter.bench.report import row, save
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
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.program import WHOLE
from wanexport.runtime.wan_config import EXPERTS

FLOPS = 1_237_581_824  # of the tiny preset at 64x96x9, counted by hand below


@pytest.fixture(scope="module")
def measured(
    tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """One real run of four arms at tiny size, and its folder of reports."""
    folder = tmp_path_factory.mktemp("bench")
    arms = ("onnx", "graph", "diffusers", "regional-aoti")
    return bench(tiny_bundle, dtype="fp32", against=arms, report=folder), folder


def test_arms_get_the_same_inputs_and_weights(
    measured: tuple[dict[str, Any], Path], tiny_bundle: Path
) -> None:
    result, _ = measured
    lines = {line["arm"]: line for line in result["arms"]}
    assert list(lines) == ["onnx", "graph", "diffusers", "regional-aoti"]
    assert (result["failed"], result["skipped"], result["warning"]) == ({}, {}, None)
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
        bench(tiny_bundle, provider="tensorrt", against=["onnx"])
    opened: list[tuple[Choice, EngineOptions]] = []

    def open_engine(bundle: Path, manifest: Any, *given: Any) -> Mock:
        opened.append(given)
        return Mock()

    monkeypatch.setattr(bench_opening, "open_engine", open_engine)
    options = {"key": "value"}
    asked = EngineOptions(dtype="bf16", provider="tensorrt-rtx", provider_options=options)
    subject = bench_subject.choose_subject(tiny_bundle, asked)
    job = bench_subject.first_job(subject, tmp_path, 5, False)
    assert choose_arms(subject.manifest, job, ["onnx"], None) == ["onnx"]
    open_arm(replace(job, arm="onnx"))
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
    assert compiled["graph"] is compiled["diffusers"] is None
    assert compiled["regional-aoti"] > 1  # and none of it in the cold start, which loads a package
    assert result["arms"][3]["cold_start"]["first_call"] < compiled["regional-aoti"]


def test_report_plot_and_table(
    measured: tuple[dict[str, Any], Path], tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, folder = measured
    saved = json.loads((folder / "bench-64x96x9-onnx-fp32.json").read_text())
    assert saved == {name: value for name, value in result.items() if name != "warning"}
    assert (folder / "bench-64x96x9-onnx-fp32.png").read_bytes()[:4] == b"\x89PNG"
    shown = result | {"failed": {"compile": "no g++"}, "skipped": {"max-autotune": "too late"}}
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        "wanexport.exporter.bench.bench.bench",
        lambda bundle, **options: asked.update(options) or shown,
    )
    output = CliRunner().invoke(cli, ["bench", str(tiny_bundle), "--against", "onnx, graph"])
    assert output.exit_code == 1  # since an arm failed
    assert asked["against"] == ["onnx", "graph"]
    assert (asked["rounds"], asked["budget"], asked["profile"]) == (5, 540.0, False)
    for line in result["arms"]:
        (text,) = (t for t in output.stdout.splitlines() if t.strip().startswith(line["arm"] + " "))
        assert f"{1e3 * line['median']:.4g} (" in text
        assert f" {line['percent_of_floor']:.1f} " in text
    assert "failed compile: no g++" in output.stdout
    assert "skipped max-autotune: too late" in output.stdout
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


def test_waits_outside_the_step_and_gaps_are_told_apart() -> None:
    step = Span("wanexport guided step", 10, 20)
    waits = [Span("cudaStreamSynchronize", 12, 13), Span("cudaMemcpy", 20, 21)]
    others = [Span("cudaLaunchKernel", 12, 13), Span("cudaDeviceSynchronize", 22, 23)]
    assert count_syncs([*waits, *others, step]) == 2
    assert busy_share([Span("a", 5, 6), Span("b", 0, 2), Span("c", 1, 3)]) == pytest.approx(4 / 6)
    assert busy_share([Span("outer", 0, 8), Span("inner", 1, 2)]) == 1
    assert busy_share([]) is None


@pytest.mark.gpu
def test_a_wait_of_the_host_is_seen_on_a_gpu() -> None:
    a = torch.randn(2048, 2048, device="cuda")
    silent = bench_process._profile(lambda: a @ a)
    waiting = bench_process._profile(lambda: (a @ a).sum().item())
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
        arm=arm,
        bundle=str(bundle),
        options={"device": "cpu", "dtype": dtype, "resolution": "64x96", "frames": 9},
        geometry=vars(geometry),
        weights=str(bundle / next(w.file.path for w in weights if w.dtype == dtype)),
        inputs=str(folder / "inputs.safetensors"),
        velocity=str(folder / "velocity.safetensors"),
        package=str(folder / "block.pt2"),
        rounds=5,
        profile=False,
        spawned=time.time(),
    )


def placed(job: Job, **options: str) -> Job:
    """The job with another device or dtype."""
    return replace(job, options=job.options | options)


Children = Callable[[dict[str, float]], list[str]]


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Children:
    """Replace processes by ones that take so many seconds of a clock of ours; the list says which.

    An arm of negative seconds fails, the machine's peak takes 10 seconds.
    """
    now, ran = [0.0], []

    def install(seconds: dict[str, float]) -> list[str]:
        def child(session: _Session, **changes: Any) -> dict[str, Any]:
            job = replace(session.job, **changes)
            ran.append(job.arm)
            if job.arm == "peak":
                now[0] += 10
                stated = {"products": {}, "product_dtype": "float32", "machine": "m", "torch": "t"}
                return {"peak": FLOPS / 2, **stated}  # a floor of 2 seconds
            if seconds[job.arm] < 0:
                raise WanExportError("its process died of signal 11")
            if seconds[job.arm] > session.left:
                now[0] += session.left
                raise _OverBudget
            now[0] += seconds[job.arm]
            save_arrays(Path(job.velocity), {"velocity": np.ones(3, np.float32)})
            cold = {"first_call": 5.0, "first_step": 9.0}
            return {"seconds": [3.0] * 5, "cold_start": cold, "peak_bytes": 1}

        monkeypatch.setattr(_Session, "child", child)
        clock = SimpleNamespace(monotonic=lambda: now[0], time=time.time)
        monkeypatch.setattr("wanexport.exporter.bench.bench.time", clock)
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
    children({"onnx": 1})
    result = bench(bundle, against=["onnx"], report=tmp_path)
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


def test_kernels_are_chosen_on_a_gpu_only(tiny_bundle: Path, tmp_path: Path) -> None:
    def kernel(arm: str, device: str, dtype: str) -> str | None:
        return kernel_of(ARMS[arm], placed(job, device=device, dtype=dtype))

    job = job_of(tiny_bundle, "onnx", tmp_path)
    assert kernel("diffusers", "cuda", "bf16") == "cudnn"
    assert kernel("diffusers-fa2", "cuda:1", "fp16") == "fa2"
    assert kernel("diffusers", "cuda", "fp32") is None  # neither kernel takes it
    assert kernel("wanexport-fa4", "cuda", "bf16") == "fa4"
    assert kernel("wanexport", "cuda", "bf16") is None
    assert all(kernel(arm, "cpu", "fp32") is None for arm in ARMS)


def test_memory_beside_pytorchs_counts_where_a_library_takes_its_own(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_process, "_device_bytes", lambda: 9_000)
    monkeypatch.setattr(bench_process, "peak_gpu_bytes", lambda: 70)
    job = placed(job_of(tiny_bundle, "graph", tmp_path), device="cuda")
    own = {arm: peak_bytes(replace(job, arm=arm), 2_000) for arm in ARMS}
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


def test_by_default_what_applies_is_measured(tiny_bundle: Path, tmp_path: Path) -> None:
    manifest, job = read_manifest(tiny_bundle), job_of(tiny_bundle, "onnx", tmp_path)
    assert choose_arms(manifest, job, None, None) == ["onnx", "graph", "diffusers"]
    assert choose_arms(manifest, job, ["graph", "onnx", "graph"], None) == ["graph", "onnx"]


@pytest.fixture
def on_gpu(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job on a GPU, where the bundle seems to hold an aoti engine with FlashAttention-4."""
    record = read_manifest(tiny_bundle).engines[0]
    record = replace(
        record,
        details=AotiDetails({"self": "fa4", "text": "cudnn"}),
        files=record.files | {"flash_attention": record.files[WHOLE]},
    )
    hold(monkeypatch, {"aoti": record})
    return placed(job_of(tiny_bundle, "onnx", tmp_path), device="cuda", dtype="bf16")


def hold(monkeypatch: pytest.MonkeyPatch, records: dict[str, EngineRecord]) -> None:
    """Have the bundle hold these engines, by their backend."""

    def choose(bundle: Path, _: object, options: EngineOptions) -> Choice:
        if options.backend not in records:
            raise WanExportError(f"{bundle} has no such engine")
        return Choice(replace(records[options.backend], backend=options.backend), "cuda")

    monkeypatch.setattr("wanexport.exporter.bench.arms.choose_engine", choose)


def test_an_arm_that_is_another_once_more_is_left_out(on_gpu: Job, tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    chosen = choose_arms(manifest, on_gpu, None, "aoti")
    first = ["wanexport", "graph", "diffusers", "regional-aoti", "compile"]
    variants = ["wanexport-cudnn", "wanexport-sdpa"]  # fa4 is wanexport itself
    assert chosen == [*first, *variants, "diffusers-fa2", "max-autotune"]
    assert choose_arms(manifest, on_gpu, ["wanexport-fa4"], None) == ["wanexport-fa4"]


def test_arms_of_the_engines_that_are_there(
    on_gpu: Job, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(tiny_bundle)
    in_bundle = {"onnx", "tensorrt-rtx"}
    hold(monkeypatch, dict.fromkeys(in_bundle, manifest.engines[0]))
    others = choose_arms(manifest, on_gpu, None, None)
    assert others[:4] == ["tensorrt-rtx", "onnx", "graph", "diffusers"]
    assert not in_bundle & set(choose_arms(manifest, on_gpu, None, "aoti"))
    with pytest.raises(
        WanExportError, match=r"arm tensorrt cannot run here: .* has no such engine"
    ):
        choose_arms(manifest, on_gpu, ["tensorrt"], None)
    hold(monkeypatch, {"aoti": manifest.engines[0]})
    with pytest.raises(WanExportError, match="has no FlashAttention-4 kernel"):
        choose_arms(manifest, on_gpu, ["wanexport-fa4"], None)


def test_an_engine_is_opened_with_the_options_that_it_has(on_gpu: Job) -> None:
    asked = {"attention": "sdpa", "cuda_graph": False, "provider": "cuda", "weights": "style"}
    job = replace(on_gpu, options=on_gpu.options | asked)
    aoti = options_of(ARMS["wanexport"], job).given()
    assert {n: aoti.get(n) for n in asked} == asked | {"provider": None}
    assert options_of(ARMS["wanexport-cudnn"], job).attention == "cudnn"
    onnx = options_of(ARMS["onnx"], job).given()
    assert (onnx["provider"], onnx["weights"]) == ("cuda", "style")
    assert {"attention", "cuda_graph"}.isdisjoint(onnx)


def test_other_weights_are_every_arms(bundle: Path, tmp_path: Path, children: Children) -> None:
    add_style(bundle)
    children({"onnx": 1})
    named = bench(bundle, dtype="fp32", against=["onnx"], weights="style", report=tmp_path / "r")
    assert named["weights"] == "style"
    with_style = load(bundle, dtype="fp32", weights="style")
    for weights in ("style", bundle / "weights" / "style-fp32"):
        subject = bench_subject.choose_subject(bundle, EngineOptions(dtype="fp32", weights=weights))
        job = bench_subject.first_job(subject, tmp_path, 5, False)
        inputs = forward_inputs(subject.manifest.config, subject.record.geometry, 950.0, 0)
        save_arrays(Path(job.inputs), inputs)
        expected = with_style(**inputs)
        assert relative_l2(load(bundle, dtype="fp32")(**inputs), expected) > 0.1
        for arm in ("onnx", "graph", "diffusers"):
            own = replace(job, arm=arm)
            assert relative_l2(open_arm(own)(read_inputs(own)), expected) <= 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"against": ["onnx", "vllm"]}, "unknown arm 'vllm': expected some of wanexport, tens"),
        ({"against": ["wanexport"]}, "arm wanexport cannot run here: .* has no such engine"),
        ({"against": ["tensorrt-rtx"]}, "arm tensorrt-rtx cannot run here: .* has no such engine"),
        ({"against": ["diffusers-fa2"]}, "no choice of attention kernels for fp32 on cpu"),
        ({"rounds": 4}, "4 rounds make no median: expected 5 or more"),
        ({"offload": True}, "bench measures one expert"),
        ({"attention": "sdpa"}, "has no attention kernel"),
        ({"weights": "style"}, "no weights set style"),
        ({"resolution": "480x832"}, "has no such engine"),
        ({"dtype": "bf16"}, "ONNX Runtime cannot execute"),
        ({"budget": 0.0}, "a budget of 0 s does not even do for the machine's peak"),
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
        bench(tiny_bundle, dtype="fp32", against=["compile"])


ALL_ON_CPU = ("onnx", "graph", "diffusers")


def test_arms_that_do_not_fit_the_budget_are_skipped_aloud(
    children: Children, tiny_bundle: Path, tmp_path: Path
) -> None:
    ran = children({"diffusers": 40, "onnx": 30, "compile": 1, "graph": 15})
    options: dict[str, Any] = {"dtype": "fp32", "report": tmp_path}
    arms = ("diffusers", "onnx", "compile", "graph")
    result = bench(tiny_bundle, against=arms, budget=100, **options)
    # 100 - 10 - 40 - 30 leaves 20: too little for what ran 40 s without compiling.
    assert [line["arm"] for line in result["arms"]] == ["diffusers", "onnx", "graph"]
    assert result["skipped"] == {"compile": "takes some 40 s, the budget has 20 s left"}
    assert ran == ["peak", "diffusers", "onnx", "graph"]
    assert result["arms"][0]["percent_of_floor"] == pytest.approx(100 * 2 / 3)


def test_what_compiling_took_is_not_expected_of_others(
    children: Children, tiny_bundle: Path, tmp_path: Path
) -> None:
    children({"compile": 60, "diffusers": 20})
    options: dict[str, Any] = {"dtype": "fp32", "report": tmp_path}
    result = bench(tiny_bundle, against=("compile", "diffusers"), budget=100, **options)
    assert [line["arm"] for line in result["arms"]] == ["compile", "diffusers"]
    assert result["arms"][0]["compile_seconds"] == 5 - 3  # what its first call took more
    assert result["arms"][1]["compile_seconds"] is None


def test_an_arm_slower_than_the_budget_is_stopped(
    children: Children, tiny_bundle: Path, tmp_path: Path
) -> None:
    children({"onnx": 20, "compile": 500, "graph": 20})
    arms = ("onnx", "compile", "graph")
    result = bench(tiny_bundle, dtype="fp32", against=arms, budget=60, report=tmp_path)
    assert [line["arm"] for line in result["arms"]] == ["onnx"]
    assert result["skipped"]["compile"] == "stopped after 30 s, when the budget was spent"
    assert result["skipped"]["graph"] == "takes some 14 s, the budget has 0 s left"


def test_what_not_even_the_floor_fits_is_not_begun(
    children: Children, tiny_bundle: Path, tmp_path: Path
) -> None:
    ran = children({"onnx": 1})
    with pytest.raises(WanExportError, match="onnx: takes some 14 s, the budget has 13 s left"):
        bench(tiny_bundle, dtype="fp32", against=["onnx"], budget=23, report=tmp_path)
    assert ran == ["peak"]  # seven forwards of two seconds each


def test_an_arm_that_fails_does_not_stop_the_others(
    children: Children, tiny_bundle: Path, tmp_path: Path
) -> None:
    children({"onnx": 1, "graph": -1, "diffusers": 1})
    result = bench(tiny_bundle, dtype="fp32", against=ALL_ON_CPU, report=tmp_path)
    assert [line["arm"] for line in result["arms"]] == ["onnx", "diffusers"]
    assert result["failed"] == {"graph": "its process died of signal 11"}
    assert result["compared_with"] == "onnx"
    with pytest.raises(WanExportError, match=r"^graph: its process died of signal 11$"):
        bench(tiny_bundle, dtype="fp32", against=["graph"], report=tmp_path)


def test_a_real_failure_is_told_in_the_words_of_its_process(bundle: Path, tmp_path: Path) -> None:
    (graph,) = (bundle / "engines").rglob("onnx-fp32/*.onnx")
    job = job_of(bundle, "onnx", tmp_path)
    graph.write_bytes(graph.read_bytes()[:-1] + b"\0")
    session = _Session(job, tmp_path, time.monotonic(), 60.0)
    with pytest.raises(WanExportError, match="was altered after the build"):
        session.child()


def test_a_child_out_of_time_is_stopped(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = _Session(job_of(bundle, "onnx", tmp_path), tmp_path, time.monotonic(), 0.3)
    with pytest.raises(_OverBudget):
        session.child()  # which takes longer to import
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
        f"work({vars(job)!r}); assert 'torch' not in sys.modules, 'torch was imported'"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert os.path.getsize(job.velocity) > 0
