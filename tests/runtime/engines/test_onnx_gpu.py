"""ONNX engines on a GPU: every family through the gate, shared and swapped weights, host waits."""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.oracles.wan_reference import (
    VARIANTS,
    diffusers_model,
    diffusers_velocity,
    official_state,
    small_config,
    small_geometry,
    write_official,
)
from wanexport.exporter.reference.eager import EagerEngine
from wanexport.exporter.reference.inputs import forward_inputs
from wanexport.exporter.reference.parity import FLOOR_FACTOR, FP32_GATE, relative_l2
from wanexport.graphs.weights import RandomWeights, bundle_tensors, write_weights
from wanexport.runtime import Denoiser, load
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.bundle.signature import parameter_shapes
from wanexport.runtime.engines.onnx_gpu import OnnxGpuEngine, OnnxGpuSession
from wanexport.runtime.wan_config import EXPERTS

pytestmark = pytest.mark.gpu
FIRST, TWO_EXPERTS = VARIANTS[0], "t2v-a14b"
# Every family in bf16; the others once.
BUILDS = {
    **{preset: (preset, "bf16", "mha") for preset in VARIANTS},
    "fp16": (FIRST, "fp16", "mha"),
    "fp32": (FIRST, "fp32", "mha"),
    "native": (FIRST, "bf16", "native"),
}


def build_command(name: str, source: Path, output: Path) -> list[str]:
    """The build of one of `BUILDS`; bf16 and mha are the defaults on a GPU."""
    preset, dtype, attention = BUILDS[name]
    geometry = small_geometry(small_config(preset))
    command = [sys.executable, "-m", "wanexport.exporter.cli.main", "build", "-m", str(source)]
    command += ["--resolution", f"{geometry.height}x{geometry.width}"]
    command += ["--frames", str(geometry.frames), "--backend", "onnx", "--device", "cuda"]
    command += ["-o", str(output)]
    command += [] if attention == "mha" else ["--attention-operator", attention]
    return command + ([] if dtype == "bf16" else ["--dtype", dtype])


class Bundles:
    """A bundle for each of `BUILDS`, proven on the GPU, each made by a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pool = ThreadPoolExecutor(5)
        sources = {preset: self._source(preset) for preset in VARIANTS}
        self.builds = {
            name: self.pool.submit(
                subprocess.run,
                build_command(name, sources[BUILDS[name][0]], folder / name),
                capture_output=True,
                text=True,
            )
            for name in BUILDS
        }

    def _source(self, preset: str) -> Path:
        config, folder = small_config(preset), self.folder / f"{preset}-model"
        parts = [f"{e}_model" for e in EXPERTS] if preset.endswith("a14b") else ["."]
        for seed, part in enumerate(parts):
            write_official(folder / part, official_state(diffusers_model(config, seed)), config)
        return folder

    def __getitem__(self, name: str) -> Path:
        """Wait for a build; one that failed fails the tests of its bundle alone."""
        child = self.builds[name].result()
        assert child.returncode == 0, child.stderr
        return self.folder / name


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundles]:
    """The bundles, of which a test waits for its own."""
    made = Bundles(tmp_path_factory.mktemp("onnx-gpu"))
    yield made
    made.pool.shutdown(cancel_futures=True)


def inputs_of(preset: str) -> dict[str, Any]:
    config = small_config(preset)
    return forward_inputs(config, small_geometry(config), 950.0, seed=2)


def on_gpu(preset: str) -> dict[str, Any]:
    return {name: torch.from_numpy(value).cuda() for name, value in inputs_of(preset).items()}


def eager(bundle: Path, denoiser: Denoiser, preset: str, inputs: Mapping[str, Any]) -> np.ndarray:
    """Eager PyTorch in the engine's precision, with the bundle's weights."""
    config = small_config(preset)
    weights = next(iter(read_manifest(bundle).weights.values()))
    tensors = bundle_tensors(
        bundle / weights.file.path, {name: name for name in parameter_shapes(config)}
    )
    model = EagerEngine(config, denoiser.geometry, denoiser.record.dtype, tensors, device="cuda")
    velocity: np.ndarray = model(inputs)
    return velocity


def only_engine(denoiser: Denoiser) -> OnnxGpuEngine:
    (engine,) = denoiser.engines.values()
    assert isinstance(engine, OnnxGpuEngine)
    return engine


def only_session(denoiser: Denoiser) -> OnnxGpuSession:
    session = only_engine(denoiser).session
    assert session is not None
    return session


@pytest.mark.parametrize("name", BUILDS)
def test_it_is_as_near_diffusers_as_eager(name: str, bundles: Bundles) -> None:
    preset, dtype, _ = BUILDS[name]
    config, inputs = small_config(preset), inputs_of(preset)
    denoiser = load(bundles[name])
    assert (denoiser.record.dtype, denoiser.device) == (dtype, "cuda:0")
    proof = denoiser.record.proof
    assert proof["error"] <= proof["gate"] and proof["method"].endswith("on the GPU")
    exact = diffusers_velocity(diffusers_model(config), config, inputs)
    floor = relative_l2(eager(bundles[name], denoiser, preset, inputs), exact)
    gate = FP32_GATE if dtype == "fp32" else FLOOR_FACTOR * floor
    assert relative_l2(denoiser(**inputs), exact) <= gate


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_the_same_file_runs_on_the_cpu(name: str, bundles: Bundles) -> None:
    inputs = inputs_of(FIRST)
    there, here = load(bundles[name]), load(bundles[name], device="cpu")
    assert here.record == there.record and (there.device, here.device) == ("cuda:0", "cpu")
    assert relative_l2(there(**inputs), here(**inputs)) <= (1e-5 if name == "fp32" else 2e-3)


def test_tensors_stay_on_the_gpu_and_calls_repeat(bundles: Bundles) -> None:
    denoiser, given = load(bundles[FIRST]), on_gpu(FIRST)
    first = denoiser(**given)
    assert first.is_cuda and first.dtype == torch.float32
    assert torch.equal(denoiser(**given), first)
    other = {**given, "latent": given["latent"].flip(2)}
    assert not torch.equal(denoiser(**other), first)
    assert torch.equal(denoiser(**given), first)
    assert np.array_equal(denoiser(**inputs_of(FIRST)), first.cpu().numpy())


def test_it_begins_after_what_the_callers_stream_holds(bundles: Bundles) -> None:
    denoiser, given = load(bundles[FIRST]), on_gpu(FIRST)
    expected = denoiser(**given)
    late = torch.zeros_like(given["latent"])
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)  # cycles: about 0.1 s
        late.copy_(given["latent"])
        velocity = denoiser(**{**given, "latent": late})
        doubled = velocity * 2  # on the caller's stream, without a wait
        torch.cuda.current_stream().synchronize()
    assert torch.equal(doubled, expected * 2)


def test_a_forward_never_waits_for_the_gpu(bundles: Bundles) -> None:
    """The debug mode sees PyTorch's waits; the delay on the stream shows ONNX Runtime's."""
    denoiser, given = load(bundles[FIRST]), on_gpu(FIRST)
    given["timestep"] = 812.0
    denoiser(**given)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(2_000_000_000)  # cycles: about 1 s
        velocity = denoiser(**given)
        still_asleep = not torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert velocity.is_cuda
    session = only_session(denoiser)
    on_host = {op for provider, op in session.assigned if provider.startswith("CPU")}
    assert still_asleep or on_host, "ONNX Runtime waited without a node on the CPU"


def test_no_heavy_node_is_on_the_cpu(bundles: Bundles) -> None:
    assigned = only_session(load(bundles[FIRST])).assigned
    share = sum(n for (p, _), n in assigned.items() if p.startswith("CUDA")) / assigned.total()
    assert share > 0.95, dict(assigned)


def test_the_session_reads_the_shared_weights(bundles: Bundles) -> None:
    one, two = load(bundles[FIRST]), load(bundles[FIRST])
    given = on_gpu(FIRST)
    weights = only_engine(one).weights
    assert weights is not None and weights is only_engine(two).weights
    before = one(**given)
    for name in ("head.head.bias", "patch_embedding.weight", "blocks.0.ffn.0.weight"):
        tensor = weights.tensors[name]
        kept = tensor.clone()
        tensor.mul_(-2)
        assert not torch.equal(two(**given), before), name
        tensor.copy_(kept)
    assert torch.equal(two(**given), before)


def test_another_set_is_used_in_place(bundles: Bundles, tmp_path: Path) -> None:
    config, given = small_config(FIRST), on_gpu(FIRST)
    path = tmp_path / "denoiser.safetensors"
    write_weights(path, config, "bf16", RandomWeights(config, 5, ""))
    own, theirs = load(bundles[FIRST])(**given), load(bundles[FIRST], weights=path)(**given)
    denoiser = load(bundles[FIRST])
    session = only_session(denoiser)
    for name, velocity in ((path, theirs), ("base", own), (path, theirs)):
        denoiser.use(name)
        assert torch.equal(denoiser(**given), velocity)
    assert not torch.equal(own, theirs) and only_session(denoiser) is session


def test_swapped_experts_give_what_resident_ones_do(bundles: Bundles) -> None:
    resident, swapped = (load(bundles[TWO_EXPERTS], offload=off) for off in (None, "experts"))
    given = on_gpu(TWO_EXPERTS)
    for timestep in (950.0, 100.0, 950.0):
        given["timestep"] = timestep
        assert torch.equal(swapped(**given), resident(**given))
    assert len(swapped.switch_seconds) == 2 and not resident.switch_seconds
    given["timestep"] = 950.0
    high = resident(**given)
    given["timestep"] = 100.0
    assert not torch.equal(resident(**given), high)


def test_threads_do_not_disturb_each_other(bundles: Bundles) -> None:
    denoiser, given = load(bundles[FIRST]), on_gpu(FIRST)
    latents = [given["latent"] * (1 + i) for i in range(4)]
    expected = [denoiser(**{**given, "latent": latent}) for latent in latents]
    torch.cuda.synchronize()
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda latent: denoiser(**{**given, "latent": latent}), latents * 4))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected * 4))
