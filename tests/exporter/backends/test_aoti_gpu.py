"""AOTInductor engines on a GPU: every family through the gate, its kernels, graphs and repeats."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.exporter.backends.test_aoti import COMPILERS, SERVE
from tests.oracles.wan_reference import (
    VARIANTS,
    diffusers_model,
    diffusers_velocity,
    official_state,
    small_config,
    small_geometry,
    write_official,
)
from wanexport.exporter.build import build
from wanexport.exporter.reference.eager import EagerEngine
from wanexport.exporter.reference.inputs import forward_inputs
from wanexport.exporter.reference.parity import FLOOR_FACTOR, relative_l2
from wanexport.graphs.wan import Block, Conditioning
from wanexport.graphs.weights import bundle_tensors
from wanexport.runtime import load
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.bundle.signature import parameter_shapes
from wanexport.runtime.wan_config import EXPERTS

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bf16 bundle of every family, and one with a named kernel built a second time."""
    folder = tmp_path_factory.mktemp("gpu")

    def source(preset: str) -> Path:
        config, path = small_config(preset), folder / f"{preset}-model"
        parts = [f"{e}_model" for e in EXPERTS] if preset.endswith("a14b") else ["."]
        for seed, part in enumerate(parts):
            write_official(path / part, official_state(diffusers_model(config, seed)), config)
        return path

    # One after the other: PyTorch's random numbers are those of the process.
    sources = {preset: source(preset) for preset in VARIANTS}

    def make(name: str) -> Path:
        preset = name.removeprefix("again-")
        geometry = small_geometry(small_config(preset))
        size = f"{geometry.height}x{geometry.width}"
        # One family with the kernel that a build chooses: to compile it for all takes minutes.
        attention = None if preset == VARIANTS[0] else "cudnn"
        build(
            str(sources[preset]), resolution=size, frames=geometry.frames, attention=attention,
            output=folder / name,
        )  # fmt: skip
        return folder / name

    names = [*VARIANTS, f"again-{VARIANTS[1]}"]
    with ThreadPoolExecutor(len(names)) as pool:
        return dict(zip(names, pool.map(make, names)))


def inputs_of(preset: str) -> dict[str, Any]:
    config = small_config(preset)
    return forward_inputs(config, small_geometry(config), 950.0, seed=2)


def on_gpu(preset: str) -> dict[str, Any]:
    return {name: torch.from_numpy(value).cuda() for name, value in inputs_of(preset).items()}


@pytest.mark.parametrize("preset", VARIANTS)
def test_bf16_is_as_near_diffusers_as_eager_bf16(preset: str, bundles: dict[str, Path]) -> None:
    config, inputs = small_config(preset), inputs_of(preset)
    denoiser = load(bundles[preset])
    assert denoiser.record.backend == "aoti" and denoiser.record.dtype == "bf16"
    assert denoiser.record.proof["error"] <= denoiser.record.proof["gate"]
    exact = diffusers_velocity(diffusers_model(config), config, inputs)
    weights = next(iter(read_manifest(bundles[preset]).weights.values()))
    tensors = bundle_tensors(
        bundles[preset] / weights.file.path, {name: name for name in parameter_shapes(config)}
    )
    floor = EagerEngine(config, denoiser.geometry, "bf16", tensors, device="cuda")(inputs)
    assert relative_l2(denoiser(**inputs), exact) <= FLOOR_FACTOR * relative_l2(floor, exact)


def test_a_captured_graph_gives_the_same(bundles: dict[str, Path]) -> None:
    given = on_gpu(VARIANTS[0])
    plain = load(bundles[VARIANTS[0]], cuda_graph=False)(**given)
    replayed = load(bundles[VARIANTS[0]], cuda_graph=True)
    assert torch.equal(replayed(**given), plain)
    other = {**given, "latent": given["latent"].flip(2)}
    assert not torch.equal(replayed(**other), plain)
    assert torch.equal(replayed(**given), plain)


def test_callers_on_several_streams_share_a_captured_graph(bundles: dict[str, Path]) -> None:
    denoiser, given = load(bundles[VARIANTS[0]], cuda_graph=True), on_gpu(VARIANTS[0])
    latents = [given["latent"] * scale for scale in (1.0, 0.5, -1.0)]
    alone = [denoiser(**{**given, "latent": latent}) for latent in latents]
    streams = [torch.cuda.Stream() for _ in latents]
    torch.cuda.synchronize()
    for _ in range(20):
        together = []
        for stream, latent in zip(streams, latents):
            with torch.cuda.stream(stream):
                together.append(denoiser(**{**given, "latent": latent}))
        torch.cuda.synchronize()
        assert all(torch.equal(*pair) for pair in zip(alone, together))


def test_a_forward_never_waits_for_the_gpu(bundles: dict[str, Path]) -> None:
    denoiser, given = load(bundles[VARIANTS[0]], cuda_graph=False), on_gpu(VARIANTS[0])
    given["timestep"] = 812.0
    denoiser(**given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        velocity = denoiser(**given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert velocity.is_cuda


def test_swapped_experts_give_what_resident_ones_do(bundles: dict[str, Path]) -> None:
    resident, swapped = (load(bundles["t2v-a14b"], offload=off) for off in (None, "experts"))
    given = on_gpu("t2v-a14b")
    for timestep in (950.0, 100.0, 950.0):
        given["timestep"] = timestep
        assert torch.equal(swapped(**given), resident(**given))
    assert len(swapped.switch_seconds) == 2 and not resident.switch_seconds


def served(bundle: Path, folder: Path) -> dict[str, Any]:
    """A serving process's result, with no compiler to be found and nothing cached."""
    caches = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TMPDIR")
    for name in caches:
        (folder / name).mkdir(parents=True)
    environment = {**os.environ, **{name: str(folder / name) for name in caches}}
    environment |= {"PATH": "/nonexistent", "CXX": "/nonexistent/g++", "CC": "/nonexistent/gcc"}
    child = subprocess.run(
        [sys.executable, "-c", SERVE, str(bundle)], env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    assert not any(any((folder / name).iterdir()) for name in caches)
    result: dict[str, Any] = json.loads(child.stdout)
    return result


def test_serving_compiles_nothing_and_repeats_across_processes_and_builds(
    bundles: dict[str, Path], tmp_path: Path
) -> None:
    first = served(bundles[VARIANTS[1]], tmp_path / "first")
    assert not [name for name in first["modules"] if name.startswith(COMPILERS)]
    assert served(bundles[VARIANTS[1]], tmp_path / "second")["md5"] == first["md5"]
    again = served(bundles[f"again-{VARIANTS[1]}"], tmp_path / "again")
    assert again["md5"] == first["md5"]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_block_is_the_block(dtype: torch.dtype, rows: int) -> None:
    from wanexport.graphs.fused_block import FusedBlock
    from wanexport.graphs.graph import parameter_dtype

    config = replace(small_config("i2v-14b"), dim=384, num_heads=3)  # no power of two
    torch.manual_seed(0)
    plain, fused = Block(config), FusedBlock(config)
    for name, parameter in plain.named_parameters():
        parameter.data = torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
        parameter.data = parameter.data.to(parameter_dtype(f"blocks.0.{name}", dtype))
    for block in (plain, fused):
        block.cuda().requires_grad_(False)
    fused.load_state_dict(plain.state_dict(), assign=True)
    angles = torch.randn(1, rows * 50, 1, 64, device="cuda")
    cond = Conditioning(
        modulation=torch.randn(rows, 6, 384, device="cuda"),
        context=torch.randn(1, 512, 384, device="cuda").to(dtype),
        cos=angles.cos(),
        sin=angles.sin(),
        image_context=torch.randn(1, 257, 384, device="cuda").to(dtype),
    )
    x = torch.randn(rows, 50, 384, device="cuda")
    exact_block = Block(config).cuda().requires_grad_(False)
    state = {name: tensor.float() for name, tensor in plain.state_dict().items()}
    exact_block.load_state_dict(state, assign=True)
    exact = exact_block(x, Conditioning(**{k: t.float() for k, t in cond._asdict().items()}))
    errors = [((block(x, cond) - exact).norm() / exact.norm()).item() for block in (fused, plain)]
    assert errors[0] <= max(1.25 * errors[1], 1e-6)
