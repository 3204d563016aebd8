"""AOTInductor engines on the CPU: parity, no compiler at run time, refusals, shared weights."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from tests.exporter.backends.machine_code import beyond, compiled_for
from tests.oracles.wan_reference import (
    convert,
    diffusers_model,
    diffusers_velocity,
    official_state,
    small_config,
    small_geometry,
    write_official,
)
from tests.runtime.engines.hub_layout import as_snapshot
from tests.tables.bisect import Fault, bisected
from wanexport.exporter.backends.aoti import compile as to_aoti
from wanexport.exporter.backends.aoti import prove as prove_module
from wanexport.exporter.backends.aoti.compile import RegionJob, compile_region, compile_regions
from wanexport.exporter.backends.backend import Request
from wanexport.exporter.build import build
from wanexport.exporter.bundle.writer import file_record, open_bundle, write_manifest
from wanexport.exporter.cli.main import cli
from wanexport.exporter.compare.compare import compare
from wanexport.exporter.inspection import inspect
from wanexport.exporter.lint.onnx import lint
from wanexport.exporter.model_source import resolve
from wanexport.exporter.profile.profile import profile
from wanexport.exporter.reference.inputs import forward_inputs
from wanexport.exporter.reference.parity import relative_l2
from wanexport.exporter.sets.convert import add_weights
from wanexport.exporter.trace.rates import Rates
from wanexport.graphs.config import PRESETS
from wanexport.graphs.signature import attention_flops
from wanexport.runtime import Geometry, WanExportError, load
from wanexport.runtime.bundle.details import AotiDetails
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.bundle.path import WEIGHTS_FILE
from wanexport.runtime.bundle.pinned_file import pin
from wanexport.runtime.bundle.signature import program_of
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.engines.aoti import AotiEngine, attention_of, streamed_engines
from wanexport.runtime.engines.aoti_regions import Regions
from wanexport.runtime.engines.engine import EngineOptions, Memory
from wanexport.runtime.engines.processor import level_for, level_here
from wanexport.runtime.errors import BundleError, EngineFailure, WanExportWarning
from wanexport.runtime.family import family_of
from wanexport.runtime.load import find_weights
from wanexport.runtime.program import Input, Program
from wanexport.runtime.wan_config import EXPERTS

PRESET = "t2v-1.3b"  # its packages are those of a model of two experts too
SERVE = """
import hashlib, json, sys
from wanexport.exporter.reference.inputs import forward_inputs
from wanexport.runtime import load
from wanexport.runtime.bundle.manifest import read_manifest
from pathlib import Path
before = set(sys.modules)
denoiser = load(sys.argv[1], backend="aoti")
config = read_manifest(Path(sys.argv[1])).config
velocity = denoiser(**forward_inputs(config, denoiser.geometry, 812.0, 0))
print(json.dumps({
    "md5": hashlib.md5(velocity.tobytes()).hexdigest(),
    "modules": sorted(set(sys.modules) - before),
}))
"""
COMPILERS = ("torch._dynamo", "torch._inductor", "triton", "cutlass")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model."""
    folder, config = tmp_path_factory.mktemp("model"), small_config(PRESET)
    return write_official(folder, official_state(diffusers_model(config)), config)


@pytest.fixture(scope="module")
def small(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle, compiled for this CPU in fp32."""
    return build_small(model, PRESET, tmp_path_factory.mktemp("aoti") / "bundle")


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(small, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A small two-expert model's bundle, and diffusers' models of both experts."""
    folder, config = tmp_path_factory.mktemp("experts"), small_config("t2v-a14b")
    models = {name: diffusers_model(config, seed) for seed, name in enumerate(EXPERTS)}
    for name, model in models.items():
        write_official(folder / "model" / f"{name}_model", official_state(model), config)
    yield build_small(folder / "model", "t2v-a14b", folder / "bundle"), models


def build_small(model: Path, preset: str, bundle: Path) -> Path:
    geometry = small_geometry(small_config(preset))
    record = build(
        str(model), resolution=f"{geometry.height}x{geometry.width}", frames=geometry.frames,
        backends=["aoti"], dtype="fp32", device="cpu", output=bundle,
    )  # fmt: skip
    assert record["engines"][0]["proof"]["error"] <= 1e-5
    return bundle


def inputs_of(preset: str, timestep: float) -> dict[str, np.ndarray]:
    config = small_config(preset)
    return forward_inputs(config, small_geometry(config), timestep, seed=2)


def test_a_bundle_in_the_hubs_cache_gives_the_same(small: Path, tmp_path: Path) -> None:
    snapshot, inputs = as_snapshot(small, tmp_path), inputs_of(PRESET, 950.0)
    np.testing.assert_array_equal(load(snapshot)(**inputs), load(small)(**inputs))


def test_a_package_that_changes_while_it_is_opened_is_refused(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (package,) = copy.glob("engines/*/*/head.pt2")

    def replace_it(*_: object) -> None:
        (copy / "other").write_bytes(package.read_bytes())
        (copy / "other").replace(package)

    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", replace_it)
    with pytest.raises(WanExportError, match=f"^{package} was changed since it was checked"):
        load(copy)


@pytest.mark.parametrize("what", ["rewritten", "replaced", "gone"])
def test_weights_that_changed_since_load_are_refused_at_the_switch(
    what: str, experts: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(experts[0], tmp_path / "bundle"))
    denoiser = load(bundle, offload="experts")
    (file,) = bundle.glob("weights/low_noise*/*")
    content = file.read_bytes()
    if what == "rewritten":
        file.write_bytes(b"\0" * len(content))
    else:
        file.unlink()
    if what == "replaced":
        file.write_bytes(content)
    denoiser(**inputs_of("t2v-a14b", 950.0))
    with pytest.raises(WanExportError, match=f"{file} (was changed|.No such file)"):
        denoiser(**inputs_of("t2v-a14b", 100.0))
    denoiser(**inputs_of("t2v-a14b", 950.0))


@pytest.mark.skipif(level_here() < "x86-64-v3", reason="needs a processor of x86-64-v3")
def test_a_package_has_no_instruction_beyond_its_level(small: Path) -> None:
    (package,) = small.glob("engines/*/*/head.pt2")
    assert not beyond(package, level_for("cpu"))
    assert compiled_for(package) == {level_for("cpu")}


def test_the_engine_gives_diffusers_velocity(small: Path) -> None:
    assert off_diffusers(small, PRESET) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["flf2v-14b", "ti2v-5b"])
def test_with_optional_inputs_it_does_so_too(preset: str, tmp_path: Path) -> None:
    """CLIP's tokens and a condition; and a timestep for each token."""
    config = small_config(preset)
    model = write_official(tmp_path / "model", official_state(diffusers_model(config)), config)
    assert off_diffusers(build_small(model, preset, tmp_path / "bundle"), preset) <= 1e-5


def off_diffusers(bundle: Path, preset: str) -> float:
    """How far the engine is off the model that diffusers makes of the same seed."""
    config, inputs = small_config(preset), inputs_of(preset, 950.0)
    theirs = diffusers_velocity(diffusers_model(config), config, inputs)
    return relative_l2(load(bundle)(**inputs), theirs)


@pytest.mark.parametrize("offload", [None, "experts"])
def test_each_expert_gives_its_own_velocity(
    experts: tuple[Path, dict[str, Any]], offload: str | None
) -> None:
    bundle, models = experts
    denoiser = load(bundle, offload=offload)
    for timestep, expert in ((950.0, "high_noise"), (100.0, "low_noise"), (960.0, "high_noise")):
        inputs = inputs_of("t2v-a14b", timestep)
        theirs = diffusers_velocity(models[expert], small_config("t2v-a14b"), inputs)
        assert relative_l2(denoiser(**inputs), theirs) <= 1e-5
    assert len(denoiser.switch_seconds) == (2 if offload else 0)
    held = {engine.weights.buffer.data_ptr() for engine in denoiser.engines.values()}  # type: ignore[attr-defined]
    assert len(held) == (1 if offload else 2)


@pytest.mark.parametrize("resident", [0, 1])
def test_streamed_blocks_give_the_same_bits(
    resident: int, experts: tuple[Path, dict[str, Any]]
) -> None:
    manifest = read_manifest(experts[0])
    (record,) = manifest.engines
    whole, files = load(experts[0]), {r: pin(experts[0] / f.path) for r, f in record.files.items()}
    weights = find_weights(experts[0], record, None)
    regions = Regions(files, record.program, attention_of(record, files, None), torch.device("cpu"))
    engines = streamed_engines(regions, weights.files, EngineOptions(resident_blocks=resident))
    streamed = Denoiser(record, engines, weights, offload="blocks")
    assert streamed.resident_blocks == resident
    for timestep in (950.0, 100.0, 90.0, 960.0):
        given = inputs_of("t2v-a14b", timestep)
        np.testing.assert_array_equal(streamed(**given), whole(**given))
    assert len(streamed.switch_seconds) == 2


@pytest.mark.slow
def test_a_fault_in_one_layer_is_located_and_so_it_is_between_engines(
    copy: Path, model: Path
) -> None:
    clean = compare(copy, steps=1, bisect=True)
    assert clean["bisect"]["first"] is None
    assert clean["bisect"]["calls"][-1]["carried"] == pytest.approx(clean["steps"][0]["error"])
    faults = [Fault("aoti", "fp32", "gate", 1, "feed-forward")]
    faults += [Fault("aoti", "fp32", "RoPE axis", 0, "rows")]
    for fault in faults:
        assert bisected(copy, fault)["bisect"]["first"] == f"block {fault.layer}"
    size = read_manifest(copy).engines[0].geometry
    build(
        str(model), resolution=f"{size.height}x{size.width}", frames=size.frames,
        backends=["onnx"], dtype="fp32", device="cpu", output=copy,
    )  # fmt: skip
    both = bisected(copy, faults[0], against="onnx")
    assert both["reference"].endswith("onnx-fp32") and both["note"] is None
    assert both["steps"][0]["gate"] == pytest.approx(2**0.5 * 1e-5)  # of each, in quadrature
    assert both["bisect"]["first"] == "block 1"
    other = compare(copy, backend="onnx", against="aoti", steps=1, bisect=True)
    assert other["passed"] and other["bisect"]["first"] is None


def test_numpy_and_torch_give_the_same(small: Path) -> None:
    denoiser, inputs = load(small), inputs_of(PRESET, 500.0)
    velocity = denoiser(**inputs)
    assert isinstance(velocity, np.ndarray)
    as_torch = denoiser(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    np.testing.assert_array_equal(as_torch.numpy(), velocity)


def test_serving_needs_no_compiler_and_repeats_itself(small: Path, tmp_path: Path) -> None:
    caches = {
        name: tmp_path / name for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TMPDIR")
    }
    for path in caches.values():
        path.mkdir()
    environment = {
        **{k: v for k, v in os.environ.items() if k not in ("CC", "CXX")},
        **{name: str(path) for name, path in caches.items()},
        "PATH": "/nonexistent",
        "CXX": "/nonexistent/g++",
    }
    results = []
    for _ in range(2):
        child = subprocess.run(
            [sys.executable, "-c", SERVE, str(small)],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert child.returncode == 0, child.stderr
        results.append(json.loads(child.stdout))
    assert results[0]["md5"] == results[1]["md5"]
    assert not [m for m in results[0]["modules"] if m.startswith(COMPILERS)]
    assert not any(any(path.iterdir()) for path in caches.values())


def test_the_record_says_what_the_engine_is_bound_to(small: Path) -> None:
    (engine,) = read_manifest(small).engines
    assert set(engine.files) == {"embed", "block", "head"}
    assert sum(file.size for file in engine.files.values()) < 20e6
    assert engine.target["device"] == "cpu" and engine.target["torch"] == torch.__version__
    assert engine.name == f"64x96x9/aoti-fp32-{engine.target['arch']}"
    kernels = dict.fromkeys(("self", "text"), "sdpa")
    assert engine.details == AotiDetails(attention=kernels)
    assert engine.program == program_of(small_config(PRESET), engine.geometry)
    assert set(engine.lint.values()) == {0}
    assert not inspect(small, verify=True)["problems"]
    found = lint(small)
    assert found["clean"]
    assert found["graphs"][engine.name] == {
        "counts": dict(engine.lint),
        "findings": [],
        "recorded": True,
    }


def test_a_record_of_findings_is_not_clean(copy: Path) -> None:
    manifest = read_manifest(copy)
    (engine,) = manifest.engines
    other = replace(engine, lint={**engine.lint, "loop": 2})
    write_manifest(copy, replace(manifest, engines=(other,)))
    shown = CliRunner().invoke(cli, ["lint", str(copy)])
    assert shown.exit_code == 1
    assert f"{engine.name}: not clean by the record of its build; no host_sync" in shown.output
    assert "loop 2" in shown.output


def test_a_second_build_reuses_the_engine(model: Path, copy: Path) -> None:
    record = build(
        str(model), resolution="64x96", frames=9, backends=["aoti"], dtype="fp32", device="cpu",
        output=copy,
    )  # fmt: skip
    (engine,) = read_manifest(copy).engines
    assert record["reused"] == ["weights fp32", f"engine {engine.name}"]


@pytest.mark.parametrize("field", ["torch", "arch", "march", "instructions"])
def test_an_engine_for_another_machine_names_field_values_and_cure(copy: Path, field: str) -> None:
    manifest = read_manifest(copy)
    (engine,) = manifest.engines
    other = replace(engine, target={**engine.target, field: "other"})
    write_manifest(copy, replace(manifest, engines=(other,)))
    with pytest.raises(WanExportError) as raised:
        load(copy)
    message = str(raised.value)
    assert f"{field} other, here {engine.target[field]}" in message
    assert "wanexport build --backend aoti --resolution 64x96 --frames 9 -o" in message


def test_an_engine_for_a_gpu_says_that_there_is_none(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    manifest = read_manifest(copy)
    (engine,) = manifest.engines
    other = replace(engine, target={**engine.target, "device": "cuda", "arch": "sm90"})
    write_manifest(copy, replace(manifest, engines=(other,)))
    with pytest.raises(WanExportError, match=r"aoti-fp32-sm90 is for a GPU: there is no CUDA"):
        load(copy)


def test_a_package_that_is_none_is_one_line(copy: Path) -> None:
    manifest = read_manifest(copy)
    (engine,) = manifest.engines
    path = copy / engine.files["block"].path
    path.write_bytes(b"no package" * 1000)
    with pytest.raises(WanExportError, match=r"manifest says"):
        load(copy)
    files = {**engine.files, "block": file_record(copy, path)}
    write_manifest(copy, replace(manifest, engines=(replace(engine, files=files),)))
    with pytest.raises(WanExportError, match=r"libtorch cannot open .*block\.pt2") as raised:
        load(copy)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"details": AotiDetails({"all": "sdpa"})}, "has kernels for attention of kind all"),
        ({"target": {}}, "is for no device"),
    ],
)
def test_a_malformed_record_is_one_line(copy: Path, changes: Any, message: str) -> None:
    manifest = read_manifest(copy)
    (engine,) = manifest.engines
    write_manifest(copy, replace(manifest, engines=(replace(engine, **changes),)))
    with pytest.raises(WanExportError, match=message):
        load(copy)


def test_a_call_of_other_parameters_is_one_line(copy: Path) -> None:
    manifest = read_manifest(copy)
    (engine,) = manifest.engines
    embed, *rest = engine.program.calls
    program = replace(engine.program, calls=(replace(embed, parameters=("x",)), *rest))
    write_manifest(copy, replace(manifest, engines=(replace(engine, program=program),)))
    with pytest.raises(WanExportError, match="its embed takes other parameters than the model"):
        load(copy)


def test_options_that_do_not_apply_are_refused(small: Path, tiny_bundle: Path) -> None:
    with pytest.raises(WanExportError, match="offload experts swaps two experts"):
        load(small, offload="experts")
    with pytest.raises(WanExportError, match="runs on a CPU, from whose memory blocks are stream"):
        load(small, offload="blocks")
    with pytest.raises(WanExportError, match="resident blocks are those that stay with --offload"):
        load(small, resident_blocks=2)
    with pytest.raises(WanExportError, match="-1 resident blocks: expected a whole number from 0"):
        load(small, offload="blocks", resident_blocks=-1)
    with pytest.raises(WanExportError, match="offload is True: expected experts or blocks"):
        load(small, offload=cast(Any, True))
    with pytest.raises(WanExportError, match="unknown kernel 'fast'"):
        load(small, attention="fast")
    for kernel in ("fa4", "cudnn"):
        with pytest.raises(WanExportError, match=f"{kernel} runs on a GPU, not on cpu: choose sdp"):
            load(small, attention=kernel)
    for options, message in (
        ({"attention": "sdpa"}, "no attention kernel: leave it out, or choose an engine of anoth"),
        ({"cuda_graph": False}, "no CUDA graph: leave it out, or choose an engine of another"),
        ({"offload": "experts"}, "offload experts swaps two experts"),
        ({"offload": "blocks"}, "is one graph and streams no blocks: choose, or build, an engine"),
    ):
        with pytest.raises(WanExportError, match=message):
            load(tiny_bundle, backend="onnx", **options)


def test_a_kernel_that_cannot_be_had_is_replaced_aloud(copy: Path) -> None:
    manifest = read_manifest(copy)
    (engine,) = manifest.engines
    details = AotiDetails({**engine.details.attention, "self": "fa4"})
    other = replace(engine, details=details)
    write_manifest(copy, replace(manifest, engines=(other,)))
    with pytest.warns(WanExportWarning, match="sdpa instead of fa4, which is slower: this bundle"):
        denoiser = load(copy)
    inputs = inputs_of(PRESET, 500.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = load(copy, attention="sdpa")(**inputs)
        np.testing.assert_array_equal(denoiser(**inputs), expected)


def test_denoisers_of_one_process_share_weights(small: Path) -> None:
    first, second = load(small), load(small)
    one, other = (d.engines[""].weights for d in (first, second))  # type: ignore[attr-defined]
    assert one is other


def test_fixed_inputs_made_in_inference_mode_can_be_written_outside() -> None:
    kept: dict[str, torch.Tensor] = {}

    def warm_up(inputs: dict[str, torch.Tensor], memory: Memory) -> tuple[float, float]:
        kept.update(inputs)
        return 0.0, 0.0

    bound = SimpleNamespace(warm_up=warm_up)
    program = Program(inputs={"latent": Input((2, 3))}, outputs={}, calls=())
    regions: Any = SimpleNamespace(
        device=torch.device("cpu"), program=program,
        bind=lambda tensors, streamed: bound, memory=lambda: Memory(),
    )  # fmt: skip
    weights: Any = SimpleNamespace(tensors={})
    file: Any = object()
    with torch.inference_mode():
        AotiEngine(regions, weights, file)
    assert kept["latent"].fill_(1).sum() == 6


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> tuple[AotiEngine, list[Any]]:
    """An engine that captured a graph on a GPU of the test's own, and what it asks of the GPU."""
    calls: list[Any] = []

    def capture(
        graph: object, stream: Any = None, capture_error_mode: str = "global"
    ) -> AbstractContextManager[None]:
        calls.append((stream, capture_error_mode))
        return nullcontext()

    caller = SimpleNamespace(wait_event=lambda event: calls.append(("wait", event)))
    event = SimpleNamespace(record=lambda stream: calls.append(("record", stream)))
    graph = SimpleNamespace(replay=lambda: calls.append("replay"))
    doubles = {
        "CUDAGraph": lambda: graph,
        "Event": lambda: event,
        "Stream": lambda device: f"stream on {device}",
        "graph": capture,
        "current_stream": lambda device: caller,
    }
    for name, double in doubles.items():
        monkeypatch.setattr(torch.cuda, name, double)
    engine = object.__new__(AotiEngine)
    engine.device_of = torch.device("cuda", 1)
    bound: Any = lambda inputs, memory: inputs["x"]  # noqa: E731
    engine._capture(bound, {"x": torch.zeros(1)})
    return engine, calls


def test_a_graph_is_captured_on_the_engines_own_gpu(
    captured: tuple[AotiEngine, list[Any]],
) -> None:
    """PyTorch's stream for captures may be on another, where the graph would stay empty."""
    assert captured[1] == [("stream on cuda:1", "thread_local")]


@pytest.mark.parametrize("fails", [False, True])
def test_a_replay_waits_for_the_last_callers_use_of_its_buffers(
    fails: bool, captured: tuple[AotiEngine, list[Any]]
) -> None:
    engine, calls = captured
    assert engine.graph is not None
    calls.clear()
    given = {"x": torch.ones(3 if fails else 1)}  # three do not fit the one that was captured
    with pytest.raises(RuntimeError) if fails else nullcontext():
        assert engine._replay(engine.graph, given) == 1
    kinds = [call if isinstance(call, str) else call[0] for call in calls]
    assert kinds == ["wait", "record"] if fails else ["wait", "replay", "record"]


def test_other_weights_of_the_same_layout_are_taken(small: Path, tmp_path: Path) -> None:
    config = small_config(PRESET)
    theirs = diffusers_model(config, seed=7)
    convert(write_official(tmp_path, official_state(theirs), config), tmp_path / WEIGHTS_FILE)
    inputs = inputs_of(PRESET, 500.0)
    velocity = load(small, weights=tmp_path)(**inputs)
    assert relative_l2(velocity, diffusers_velocity(theirs, config, inputs)) <= 1e-5


def region_job(path: Path) -> RegionJob:
    config, geometry = PRESETS["tiny"].config, Geometry(64, 96, 9)
    graph = family_of(config).graph
    return RegionJob("head", graph, asdict(config), asdict(geometry), "fp32", "cpu", str(path))


@pytest.mark.slow
def test_a_compiler_that_links_statically_is_named(tmp_path: Path) -> None:
    compiler = tmp_path / "static-g++"
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -static-libstdc++\n')
    compiler.chmod(0o755)
    job = tmp_path / "job.json"
    job.write_text(json.dumps(asdict(region_job(tmp_path / "head.pt2"))))
    child = subprocess.run(
        [sys.executable, "-P", "-m", "wanexport.exporter.backends.aoti.compile", str(job)],
        env={**os.environ, "CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "c")},
        capture_output=True, text=True,
    )  # fmt: skip
    assert child.returncode == 2
    assert "static-g++ links libstdc++ statically" in child.stderr.splitlines()[-1]
    assert "set CXX to a g++ that links it dynamically" in child.stderr


def test_without_a_compiler_a_build_is_refused_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "wanexport.exporter.cli.main", "build", "-m", "tiny"]
    command += ["--random-weights", "0", "--resolution", "64x96", "--frames", "9"]
    command += ["--backend", "aoti", "--device", "cpu", "-o", str(tmp_path / "bundle")]
    environment = {**os.environ, "CXX": "/nonexistent/g++"}
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.returncode == 2
    assert child.stderr.count("\n") == 1
    assert "no C++ compiler works (CXX is /nonexistent/g++)" in child.stderr
    assert not (tmp_path / "bundle").exists()


def test_a_region_is_one_file_and_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    monkeypatch.setattr(
        "wanexport.exporter.backends.aoti.compile._compile",
        lambda program, path: written.append(path),
    )
    monkeypatch.setattr(
        "wanexport.exporter.backends.aoti.compile._check_linkage", lambda path: None
    )
    result = compile_region(region_job(tmp_path / "head.pt2"))
    assert written == [tmp_path / "head.pt2"]
    assert set(result["lint"].values()) == {0}
    assert result["attentions"] == 0


def test_a_numbered_gpu_compiles_and_proves(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its children are told its number; the record has the kind of device alone."""
    manifest = read_manifest(small)
    (engine,) = manifest.engines
    jobs: list[Any] = []

    def compile_nothing(module: str, job: RegionJob, *_: object, **__: object) -> dict[str, Any]:
        jobs.append(job)
        Path(job.path).write_bytes(b"")
        return {"lint": {}, "attentions": 2 * (job.call == "block"), "seconds": 0.0}

    def prove_nothing(module: str, job: Any, folder: Path) -> dict[str, Any]:
        jobs.append(job)
        assert Path(job.inputs).parent == folder.resolve()
        return {"error": 0.0}

    monkeypatch.setattr(to_aoti, "run_process", compile_nothing)
    monkeypatch.setattr(to_aoti, "check_compiler", lambda device: None)
    monkeypatch.setattr(prove_module, "run_in_fresh_process", prove_nothing)
    target = {**engine.target, "device": "cuda"}
    request = Request(
        manifest.config, engine.geometry, engine.sampling, "aoti", "fp32", "cuda:1", target
    )
    compile_regions(
        request.graph, request.config, request.geometry, "fp32", request.device, tmp_path
    )
    weights = [small / record.file.path for record in manifest.weights.values()]
    prove_module.prove_regions(request, engine, small, weights, "ends")
    assert {job.device for job in jobs} == {"cuda:1"} and len(jobs) == 4
    assert {job.graph for job in jobs} == {family_of(manifest.config).graph}
    assert {job.geometry["height"] for job in jobs} == {engine.geometry.height}


def test_calls_that_have_not_the_models_attentions_are_no_engine() -> None:
    config = small_config("i2v-14b")
    program = program_of(config, small_geometry(config))
    found = {"embed": {"attentions": 0}, "block": {"attentions": 3}, "head": {"attentions": 0}}
    to_aoti._check_attentions(program, found)
    with pytest.raises(RuntimeError, match="4 attention operators, the model has 6"):
        to_aoti._check_attentions(program, {**found, "block": {"attentions": 2}})


def with_style(bundle: Path, folder: Path) -> Path:
    """The bundle with a second weights set, of another checkpoint."""
    config = small_config(PRESET)
    model = write_official(folder / "style", official_state(diffusers_model(config, 1)), config)
    source = resolve(str(model), None)
    with open_bundle(bundle, read_manifest(bundle)) as writer:
        add_weights(writer, source, "", "fp32", lambda *_: None, name="style")
        writer.commit()
    return bundle


def test_sets_are_swapped_between_forwards_and_never_within_one(copy: Path, tmp_path: Path) -> None:
    """Two threads call while two others swap; what is computed is one set's own, to the bit."""
    bundle, inputs = with_style(copy, tmp_path), inputs_of(PRESET, 950.0)
    own = {name: digest(load(bundle, weights=name)(**inputs)) for name in ("base", "style")}
    for name, seed in (("base", 0), ("style", 1)):
        theirs = diffusers_velocity(
            diffusers_model(small_config(PRESET), seed), small_config(PRESET), inputs
        )
        assert relative_l2(load(bundle, weights=name)(**inputs), theirs) <= 1e-5
    denoiser, done = load(bundle), threading.Event()

    def swap(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(25):
            denoiser.use(rng.choice(list(own)))
            time.sleep(rng.random() * 0.05)

    def call() -> list[str]:
        seen = [digest(denoiser(**inputs))]
        while not done.is_set():
            seen.append(digest(denoiser(**inputs)))
        return seen

    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(call) for _ in range(2)]
        swaps = [pool.submit(swap, seed) for seed in (0, 1)]
        try:
            for future in swaps:
                future.result()
        finally:
            done.set()
        seen = {one for future in calls for one in future.result()}
    assert seen == set(own.values()) and len(own) == 2
    for name in ("style", "base"):
        denoiser.use(name)
        assert digest(denoiser(**inputs)) == own[name]


def test_a_swap_opens_no_package_and_a_failed_one_changes_nothing(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, inputs = with_style(copy, tmp_path), inputs_of(PRESET, 950.0)
    denoiser = load(bundle)
    own = digest(denoiser(**inputs))
    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", None)
    denoiser.use("style")
    assert digest(denoiser(**inputs)) != own
    denoiser.use("base")
    (bundle / read_manifest(bundle).weights["style-fp32"].file.path).unlink()
    with pytest.raises(BundleError, match="is missing from the bundle"):
        denoiser.use("style")
    assert denoiser.weights == "base" and digest(denoiser(**inputs)) == own
    denoiser.close()
    with pytest.raises(EngineFailure, match="was closed: load it again"):
        denoiser(**inputs)


def digest(velocity: np.ndarray) -> str:
    return hashlib.md5(velocity.tobytes()).hexdigest()


def test_a_profile_of_the_engine_shows_no_wait(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = Rates(flops=1e11, bytes=1e10, dtype="fp32")
    monkeypatch.setattr("wanexport.exporter.profile.rates.rates_here", lambda *_: rates)
    result = profile(small, arm="aoti", steps=1, warmup=1, report=tmp_path)
    assert result["waits"]["lines"] == [] and result["notes"] == []
    kinds = {row["kind"]: row for row in result["kinds"]}
    assert sum(row["seconds"] for row in kinds.values()) == pytest.approx(result["seconds"])
    config = small_config(PRESET)
    assert kinds["attention"]["flops"] == attention_flops(config, small_geometry(config))
    assert kinds["outside operators"]["seconds"] > 0  # its own code
