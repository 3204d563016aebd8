"""Weights sets of an engine on a GPU: swapped under captured graphs and threads, and let go of."""

import gc
import hashlib
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.oracles.lora_files import write_lora
from wanexport.exporter.build import build
from wanexport.exporter.sets.add import add
from wanexport.graphs.config import PRESETS
from wanexport.runtime import BundleError, Denoiser, EngineFailure, load
from wanexport.runtime.bundle.signature import parameter_shapes

pytestmark = pytest.mark.gpu

SWAPS = 50


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two bundles of one model with other weights: each has weights for the engine of the first."""
    folders = [tmp_path_factory.mktemp("swap") / str(seed) for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        build("tiny", random_weights=seed, resolution="64x96", frames=9, backends=["aoti"],
              dtype="bf16", device="cuda", output=folder)  # fmt: skip
    return folders


def weights_of(bundle: Path) -> Path:
    return bundle / "weights" / "bf16" / "denoiser.safetensors"


def forward_md5(denoiser: Denoiser) -> str:
    rng = np.random.default_rng(0)
    inputs = {
        name: torch.from_numpy(rng.standard_normal(spec.shape, np.float32)).cuda()
        for name, spec in denoiser.inputs.items()
        if name != "timestep"
    }
    velocity = denoiser(timestep=500.0, **inputs)
    return hashlib.md5(velocity.cpu().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_swaps_from_two_threads_never_show_half_of_a_set(
    bundles: list[Path], cuda_graph: bool
) -> None:
    alone = [forward_md5(load(bundle, weights=weights_of(bundle))) for bundle in bundles]
    assert alone[0] != alone[1]
    denoiser = load(bundles[0], cuda_graph=cuda_graph)
    found: list[str] = []

    def swap(first: int) -> None:
        for number in range(SWAPS // 2):
            denoiser.use(weights_of(bundles[(first + number) % 2]))
            found.append(forward_md5(denoiser))

    threads = [threading.Thread(target=swap, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == SWAPS and set(found) == set(alone)
    denoiser.close()


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two LoRAs of the model."""
    folder, shapes = tmp_path_factory.mktemp("loras"), parameter_shapes(PRESETS["tiny"].config)
    return [write_lora(folder / f"{seed}.safetensors", shapes, seed) for seed in range(2)]


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_swaps_of_styles_from_four_threads_are_whole(
    bundles: list[Path], loras: list[Path], cuda_graph: bool, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(bundles[0], tmp_path / "bundle"))
    add(bundle, "style", lora=[loras[0]])
    styles: list[dict[str, Any]] = [{}, {"weights": "style"}, {"lora": [(loras[1], 0.7)]}]
    alone = []
    for given in styles:
        own = load(bundle, cuda_graph=cuda_graph)
        own.use(**given)
        alone.append(forward_md5(own))
        own.close()
    assert len(set(alone)) == len(styles)
    denoiser = load(bundle, cuda_graph=cuda_graph)
    found: list[str] = []

    def swap(first: int) -> None:
        for number in range(25):
            denoiser.use(**styles[(first + number) % len(styles)])
            found.append(forward_md5(denoiser))

    threads = [threading.Thread(target=swap, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 100 and set(found) == set(alone)
    for given, expected in zip(styles, alone, strict=True):
        denoiser.use(**given)
        assert forward_md5(denoiser) == expected
    denoiser.close()


def test_a_lora_merged_on_the_gpu_is_the_set_of_it(
    bundles: list[Path], loras: list[Path], tmp_path: Path
) -> None:
    """Products are rounded once from fp64, so that the order of a GPU's sums is hardly seen."""
    bundle = Path(shutil.copytree(bundles[0], tmp_path / "bundle"))
    add(bundle, "style", lora=[loras[0], f"{loras[1]}:-0.5"])
    denoiser = load(bundle, weights="style")
    expected = {name: tensor.clone() for name, tensor in held(denoiser).items()}
    denoiser.use(lora=[loras[0], f"{loras[1]}:-0.5"])
    different = sum(int((held(denoiser)[n] != t).sum()) for n, t in expected.items())
    assert different <= 1e-6 * sum(tensor.numel() for tensor in expected.values())
    denoiser.close()


def held(denoiser: Denoiser) -> dict[str, torch.Tensor]:
    """The weights on the device."""
    (engine,) = denoiser.engines.values()
    tensors: dict[str, torch.Tensor] = engine.weights.tensors  # type: ignore[attr-defined]
    return tensors


def test_a_captured_graph_survives_a_swap(bundles: list[Path]) -> None:
    denoiser = load(bundles[0], cuda_graph=True)
    (engine,) = denoiser.engines.values()
    graph = engine.graph  # type: ignore[attr-defined]
    assert graph is not None
    base = forward_md5(denoiser)
    denoiser.use(weights_of(bundles[1]))
    other = forward_md5(denoiser)
    assert engine.graph is graph  # type: ignore[attr-defined]
    denoiser.use("base")
    assert other != base == forward_md5(denoiser)
    denoiser.close()


def test_a_closed_engine_frees_its_memory(bundles: list[Path]) -> None:
    load(bundles[0], cuda_graph=True).close()  # cuBLAS keeps a workspace for its stream
    gc.collect()
    before = torch.cuda.memory_allocated()
    denoiser = load(bundles[0], cuda_graph=True)
    forward_md5(denoiser)
    held = torch.cuda.memory_allocated() - before
    assert held > weights_of(bundles[0]).stat().st_size * 0.9
    denoiser.close()
    gc.collect()
    assert torch.cuda.memory_allocated() - before < held / 20
    with pytest.raises(EngineFailure):
        forward_md5(denoiser)


def test_a_gpu_is_taken_by_its_number(bundles: list[Path]) -> None:
    last = torch.cuda.device_count() - 1
    denoiser = load(bundles[0], device=f"cuda:{last}")
    assert denoiser.device == f"cuda:{last}"
    assert forward_md5(denoiser) == forward_md5(load(bundles[0]))
    with pytest.raises(BundleError, match=f"cuda:{last + 1}"):
        load(bundles[0], device=f"cuda:{last + 1}")
    denoiser.close()
