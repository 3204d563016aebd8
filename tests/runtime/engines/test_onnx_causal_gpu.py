"""A causal ONNX engine on a GPU: Self-Forcing's rules, its cache in place, and no wait."""

from pathlib import Path

import pytest
import torch

from tests.causal_stream import Clip, compared, video_of
from wanexport.exporter.build import build
from wanexport.exporter.reference.eager import EagerEngine
from wanexport.exporter.reference.parity import FLOOR_FACTOR, FP32_GATE, relative_l2
from wanexport.graphs.config import PRESETS
from wanexport.graphs.weights import bundle_tensors
from wanexport.runtime import load
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.bundle.signature import parameter_shapes
from wanexport.runtime.bundle.tensorfile import load_arrays
from wanexport.runtime.dtypes import DTYPES
from wanexport.runtime.engines.onnx_gpu import OnnxGpuEngine

pytestmark = pytest.mark.gpu
CONFIG = PRESETS["causal-tiny"].config
CLIP = Clip([3] * 4, 7, window=7, sink=1)


@pytest.fixture(scope="module", params=["fp32", "bf16", "fp16"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("causal") / "bundle"
    build(
        "causal-tiny", random_weights=0, resolution="32x48", frames=CLIP.geometry.frames, chunk=3,
        cache=7, backends=["onnx"], device="cuda", dtype=request.param, output=path,
    )  # fmt: skip
    return path


def opened(bundle: Path) -> OnnxGpuEngine:
    (engine,) = load(bundle, device="cuda").engines.values()
    assert isinstance(engine, OnnxGpuEngine)
    return engine


def test_every_step_is_that_of_the_official_rules(bundle: Path) -> None:
    """In fp32 to 1e-5; below it no farther off than eager PyTorch in the same precision."""
    (record,) = read_manifest(bundle).weights.values()
    file = bundle / record.file.path
    weights = {
        name: torch.as_tensor(array).float().numpy() for name, array in load_arrays(file).items()
    }
    (engine,) = read_manifest(bundle).engines
    dtype, geometry = engine.dtype, engine.geometry
    names = {name: name for name in parameter_shapes(CONFIG)}
    eager = EagerEngine(CONFIG, geometry, dtype, bundle_tensors(file, names), device="cuda")
    pairs = compared(CLIP, weights, video_of(opened(bundle), "cuda"), config=CONFIG)
    floors = compared(CLIP, weights, video_of(eager, "cuda"), config=CONFIG)
    for pair, floor in zip(pairs, floors, strict=True):
        gate = max(FP32_GATE, FLOOR_FACTOR * relative_l2(*floor))
        assert relative_l2(*pair) <= gate


def given(engine: OnnxGpuEngine, number: int) -> dict[str, torch.Tensor]:
    """The inputs of a chunk on the GPU."""
    tokens = 6
    numbers = {"position": [3 * number], "slots": [1, 0, 2], "keys": [3 * tokens]}
    inputs = {
        name: torch.randn(spec.shape, device="cuda")
        for name, spec in engine.program.inputs.items()
        if spec.dtype == "fp32"
    }
    return inputs | {name: torch.tensor(values).cuda() for name, values in numbers.items()}


def test_the_cache_stays_where_it_is_and_the_host_waits_for_nothing(bundle: Path) -> None:
    engine = opened(bundle)
    memory, inputs = engine.memory(), given(engine, 0)
    engine(inputs, memory=memory)
    before = {name: tensor.data_ptr() for name, tensor in memory.state.items()}
    assert memory.state["cache_k.0"].dtype == getattr(torch, DTYPES[dtype_of(bundle)].torch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine(inputs, memory=memory)
        assert engine(inputs, memory=memory, moment="commit") is None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert before == {name: tensor.data_ptr() for name, tensor in memory.state.items()}
    assert all(tensor.any() for tensor in memory.state.values())


def dtype_of(bundle: Path) -> str:
    (engine,) = read_manifest(bundle).engines
    return engine.dtype


def test_no_node_of_a_step_is_left_to_the_cpu(bundle: Path) -> None:
    engine = opened(bundle)
    assert engine.sessions is not None
    for name, opened_session in engine.sessions.items():
        on_host = {n for p, n in opened_session.assigned if p == "CPUExecutionProvider"}
        assert not on_host & {"ScatterND", "Attention", "Gemm"}, name
