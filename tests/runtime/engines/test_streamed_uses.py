"""What is around an engine whose layers are streamed: a causal video, and `compare --bisect`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.causal_stream import CONFIG, Clip, compared, eager, random_weights
from tests.runtime.causal_engine import causal_record, geometry_of, text_of
from tests.runtime.engines.test_aoti_engine import PROGRAM, FakeRegions, inputs, weights
from wanexport.exporter.compare.bisect import Forward, Visited
from wanexport.exporter.compare.steppers import AotiStepper
from wanexport.exporter.reference.parity import FP32_GATE, relative_l2
from wanexport.graphs.causal import CausalWan
from wanexport.runtime.bundle.pinned_file import PinnedFile, pin
from wanexport.runtime.bundle.tensorfile import save_arrays
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.engines.aoti import AotiEngine
from wanexport.runtime.engines.device_weights import DeviceWeights
from wanexport.runtime.engines.streamed_weights import StreamedWeights
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.program import Call, of_layer
from wanexport.runtime.sample_stream import sample_stream

CPU = torch.device("cpu")
CLIP = Clip([3, 1, 3], 7, window=7, sink=1)


@pytest.fixture
def causal(tmp_path: Path) -> PinnedFile:
    """Weights of a causal model of three layers."""
    save_arrays(tmp_path / "causal.safetensors", random_weights(CONFIG))
    return pin(tmp_path / "causal.safetensors")


def function_of(graph: CausalWan, call: Call) -> Callable[..., list[Tensor]]:
    """A call as a function of its parameters, what it reads and its state, as a package is one."""
    names = of_layer(call.parameters, 0)

    def function(*arguments: Tensor) -> list[Tensor]:
        given = iter(arguments)
        for name in names:
            graph.get_parameter(name).data.copy_(next(given))
        reads = {name: next(given) for name in call.reads}
        state = {name: next(given) for name in of_layer(call.state, 0)}
        written = graph.run_call(call, 0, reads, state)
        return [written[name] for name in call.writes]

    return function


def causal_engine(file: PinnedFile, geometry: Geometry, resident: int | None) -> AotiEngine:
    """An engine whose packages are the graph in eager PyTorch; None for all layers resident."""
    graph, _ = eager(random_weights(CONFIG, 1), geometry)  # of which no value is used
    program = graph.program
    functions = {call.name: function_of(graph, call) for call in program.calls if not call.code}
    regions = FakeRegions(program, **functions)
    if resident is None:
        return AotiEngine(regions, DeviceWeights(file, CPU), file)
    held = StreamedWeights(file, program, CPU)
    held.keep(resident)
    return AotiEngine(regions, held, file)


@pytest.mark.parametrize("resident", [0, 1, 3])
def test_steps_and_commits_of_a_causal_video_are_those_of_the_official_rules(
    resident: int, causal: PinnedFile
) -> None:
    engine = causal_engine(causal, CLIP.geometry, resident)
    memory = engine.memory()

    def call(given: Mapping[str, np.ndarray], moment: str) -> Any:
        tensors = {name: torch.from_numpy(array) for name, array in given.items()}
        velocity = engine(tensors, memory=memory, moment=moment)
        return None if velocity is None else velocity.numpy()

    pairs = list(compared(CLIP, random_weights(CONFIG), call))
    assert len(pairs) == 9
    assert max(relative_l2(*pair) for pair in pairs) <= FP32_GATE


def test_two_videos_of_streamed_layers_are_those_of_resident_ones(causal: PinnedFile) -> None:
    """Chunk by chunk in turn."""
    geometry = geometry_of(7)
    whole, streamed = (
        Denoiser(causal_record(geometry), {"": causal_engine(causal, geometry, resident)})
        for resident in (None, 0)
    )

    def begin(denoiser: Denoiser, seed: int) -> Any:
        stream = denoiser.stream(text_of(seed))
        return (chunk.latent for chunk in sample_stream(stream, frames=7, seed=seed))

    alone = [list(begin(whole, seed)) for seed in range(2)]
    both = list(zip(begin(streamed, 0), begin(streamed, 1), strict=True))
    assert len(both) == 3 and not np.array_equal(alone[0][0], alone[1][0])
    for own, latents in zip(zip(*alone, strict=True), both, strict=True):
        assert all(map(np.array_equal, own, latents))


@pytest.mark.parametrize("resident", [0, 2])
def test_calls_run_one_at_a_time_are_those_of_resident_layers(
    resident: int, tmp_path: Path
) -> None:
    """In the order of a forward, and each layer after another one than in a forward."""
    file = pin(weights(tmp_path / "weights.safetensors", 0))
    held = StreamedWeights(file, PROGRAM, CPU)
    held.keep(resident)
    streamed, whole = (
        AotiStepper(AotiEngine(FakeRegions(), own, file), "fp32")
        for own in (held, DeviceWeights(file, CPU))
    )
    visits = list[Visited]()
    state = {f"kept.{i}": torch.ones(4) for i in range(3)}
    Forward(whole).walk({**inputs(), "text": torch.ones(2)}, state, visits.append)
    assert len(visits) == 6
    for visit in [*visits, *reversed(visits)]:
        place = visit.place
        found = streamed.run_call(place.call, place.index, visit.given)
        assert found.keys() == visit.written.keys()
        assert all(torch.equal(found[name], value) for name, value in visit.written.items())
