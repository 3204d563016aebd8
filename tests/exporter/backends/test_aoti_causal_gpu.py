"""A causal engine of AOTInductor on a GPU: its kernels, its clips, and no wait of the host."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.causal_stream import Clip, Slots, compared, video_of
from wanexport.exporter.backends.aoti.cached_attention import TOLERANCE, error_of
from wanexport.exporter.build import build
from wanexport.exporter.reference.eager import EagerEngine
from wanexport.exporter.reference.parity import FLOOR_FACTOR, FP32_GATE, relative_l2
from wanexport.graphs.config import PRESETS
from wanexport.graphs.weights import bundle_tensors
from wanexport.runtime import load
from wanexport.runtime.bundle.path import WEIGHTS_FILE
from wanexport.runtime.bundle.signature import parameter_shapes
from wanexport.runtime.bundle.tensorfile import load_arrays
from wanexport.runtime.engines.cached_kernels import CACHED
from wanexport.runtime.engines.operators import open_kernel
from wanexport.runtime.program import Attention

pytestmark = pytest.mark.gpu

CONFIG = PRESETS["causal-tiny"].config
CLIP = Clip([1, 3, 3, 3], 7, window=7, sink=1)


@pytest.fixture(scope="module", params=["bf16", "fp32"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model of random weights at 32x48, in chunks of 3 with a cache of 7."""
    path = tmp_path_factory.mktemp("causal") / request.param
    build(
        "causal-tiny", random_weights=0, resolution="32x48", frames=81, chunk=3, cache=7,
        backends=["aoti"], device="cuda", dtype=request.param, output=path,
    )  # fmt: skip
    return path


def fp32_weights(bundle: Path) -> dict[str, np.ndarray]:
    (file,) = bundle.glob(f"weights/*/{WEIGHTS_FILE}")
    return load_arrays(file)


@pytest.mark.parametrize("name", ["cudnn", "sdpa", *CACHED])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_kernel_attends_to_the_first_keys_and_no_other(name: str, dtype: str) -> None:
    for shape in (Attention(1, 300, 3000), Attention(1, 37, 200)):
        assert (
            error_of(open_kernel(name, None, "cache"), replace(CONFIG, num_layers=1), shape, dtype)
            < TOLERANCE
        )


@pytest.mark.parametrize("tells", [True, False])
def test_every_step_is_as_near_the_rules_as_eager(bundle: Path, tells: bool) -> None:
    denoiser, weights = load(bundle), fp32_weights(bundle)
    (file,) = bundle.glob(f"weights/*/{WEIGHTS_FILE}")
    tensors = bundle_tensors(file, {name: name for name in parameter_shapes(CONFIG)})
    dtype = denoiser.record.dtype
    eager = EagerEngine(CONFIG, denoiser.geometry, dtype, tensors, device="cuda")
    pairs = zip(
        compared(CLIP, weights, video_of(denoiser.engines[""], "cuda", tells=tells), config=CONFIG),
        compared(CLIP, weights, video_of(eager, "cuda", tells=True), config=CONFIG),
    )
    for own, floor in pairs:
        gate = FP32_GATE if dtype == "fp32" else FLOOR_FACTOR * relative_l2(*floor)
        assert relative_l2(*own) <= gate


def test_a_chunk_never_waits_for_the_gpu(bundle: Path) -> None:
    denoiser = load(bundle)
    engine, memory = denoiser.engines[""], denoiser.engines[""].memory()
    slots = Slots(denoiser.geometry, window=7, sink=1)
    specs = denoiser.inputs
    inputs = {
        name: torch.zeros(specs[name].shape, device="cuda") for name in ("latent", "timestep")
    }
    inputs["text"] = torch.randn(specs["text"].shape, device="cuda")
    places = [slots.place(start, 3) for start in range(0, 12, 3)]
    attended = [int(place["keys"][0]) for place in places]
    chunks = [{n: torch.from_numpy(a).cuda() for n, a in place.items()} for place in places]
    engine({**inputs, **chunks[0]}, memory=memory)  # the prompt's calls; kernels are loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number, place in enumerate(chunks):
            memory.attended = None if number % 2 else attended[number]
            for moment in ("step", "step", "commit"):
                engine({**inputs, **place}, memory=memory, moment=moment)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
