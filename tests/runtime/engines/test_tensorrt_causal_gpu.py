"""A causal TensorRT engine on a GPU: Self-Forcing's rules, a cache that stays, and no wait."""

from importlib.util import find_spec
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
from wanexport.runtime.engines.tensorrt_moments import MomentsEngine

FLAVOUR = "tensorrt" if find_spec("tensorrt") else "tensorrt-rtx"
# What TensorRT for RTX 1.7 says that it runs on.
RTX_RUNS_ON = ((8, 0), (8, 6), (8, 9), (12, 0), (12, 1))


def runs_here() -> bool:
    """Whether TensorRT is installed, or TensorRT for RTX beside a GPU that it runs on."""
    if FLAVOUR == "tensorrt" or not torch.cuda.is_available():
        return True
    return bool(find_spec("tensorrt_rtx")) and torch.cuda.get_device_capability() in RTX_RUNS_ON


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not runs_here(), reason="needs TensorRT, or a GPU that TensorRT for RTX runs on"
    ),
]
CONFIG = PRESETS["causal-tiny"].config
CLIP = Clip([3] * 4, 7, window=7, sink=1)


@pytest.fixture(scope="module", params=["bf16", "fp16"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("causal") / "bundle"
    build(
        "causal-tiny", random_weights=0, resolution="32x48", frames=CLIP.geometry.frames, chunk=3,
        cache=7, backends=[FLAVOUR], dtype=request.param, output=path,
    )  # fmt: skip
    return path


def opened(bundle: Path) -> MomentsEngine:
    (engine,) = load(bundle, device="cuda").engines.values()
    assert isinstance(engine, MomentsEngine)
    return engine


def test_the_plans_themselves_were_proven(bundle: Path) -> None:
    (engine,) = read_manifest(bundle).engines
    assert engine.proof["method"] == "plan opened and run on the GPU"
    assert engine.proof["error"] <= engine.proof["gate"]


def test_every_step_is_that_of_the_official_rules(bundle: Path) -> None:
    """No farther off than eager PyTorch in the same precision."""
    (record,) = read_manifest(bundle).weights.values()
    (engine,) = read_manifest(bundle).engines
    file = bundle / record.file.path
    weights = {
        name: torch.as_tensor(array).float().numpy() for name, array in load_arrays(file).items()
    }
    names = {name: name for name in parameter_shapes(CONFIG)}
    tensors = bundle_tensors(file, names)
    eager = EagerEngine(CONFIG, engine.geometry, engine.dtype, tensors, device="cuda")
    pairs = compared(CLIP, weights, video_of(opened(bundle), "cuda"), config=CONFIG)
    floors = compared(CLIP, weights, video_of(eager, "cuda"), config=CONFIG)
    for pair, floor in zip(pairs, floors, strict=True):
        gate = max(FP32_GATE, FLOOR_FACTOR * relative_l2(*floor))
        assert relative_l2(*pair) <= gate


def given(engine: MomentsEngine) -> dict[str, torch.Tensor]:
    """The inputs of a first chunk on the GPU."""
    numbers = {"position": [0], "slots": [1, 0, 2], "keys": [18]}
    inputs = {
        name: torch.randn(spec.shape, device="cuda")
        for name, spec in engine.program.inputs.items()
        if spec.dtype == "fp32"
    }
    return inputs | {name: torch.tensor(values).cuda() for name, values in numbers.items()}


@pytest.mark.parametrize("own_stream", [False, True])
def test_the_cache_stays_where_it_is_and_the_host_waits_for_nothing(
    own_stream: bool, bundle: Path
) -> None:
    engine = opened(bundle)
    memory, inputs = engine.memory(), given(engine)
    (record,) = read_manifest(bundle).engines
    assert memory.state["cache_k.0"].dtype == getattr(torch, DTYPES[record.dtype].torch)
    engine(inputs, memory=memory)
    cache = {n: t.data_ptr() for n, t in memory.state.items() if n.startswith("cache_")}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream() if own_stream else torch.cuda.default_stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            engine(inputs, memory=memory)
            assert engine(inputs, memory=memory, moment="commit") is None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert cache == {name: memory.state[name].data_ptr() for name in cache}
    assert all(tensor.any() for tensor in memory.state.values())


def test_sessions_on_several_streams_are_as_if_alone(bundle: Path) -> None:
    engine = opened(bundle)
    inputs = [given(engine) for _ in range(3)]
    alone = [engine(one) for one in inputs]
    memories = [engine.memory() for _ in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    found = list[torch.Tensor]()
    for _ in range(2):
        found.clear()
        for one, memory, stream in zip(inputs, memories, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(engine(one, memory=memory))
    torch.cuda.synchronize()
    for velocity, expected in zip(found, alone, strict=True):
        torch.testing.assert_close(velocity, expected, rtol=0, atol=0)
