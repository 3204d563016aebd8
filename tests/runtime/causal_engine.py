"""The causal graph as an engine of tests, in eager PyTorch: numpy or tensors in and out."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from tests.causal_stream import CONFIG, SIDES, TEXT_ROWS, eager, random_weights
from wanexport.graphs.causal import CausalWan
from wanexport.graphs.config import sampling_defaults
from wanexport.runtime.arrays import Array, to_numpy
from wanexport.runtime.bundle.details import OnnxDetails
from wanexport.runtime.bundle.manifest import DENOISER, EngineRecord
from wanexport.runtime.denoiser import Denoiser, WeightsSet
from wanexport.runtime.engines.cached_kernels import attending_to
from wanexport.runtime.engines.device import to_device, zero_state
from wanexport.runtime.engines.engine import Memory
from wanexport.runtime.errors import EngineFailure
from wanexport.runtime.geometry import Geometry

BASE, STYLE = "base", "style"


def geometry_of(frames: int, chunk: int = 3, cache: int | None = None) -> Geometry:
    """2 x 3 tokens a latent frame, of a clip of so many; the cache holds it by default."""
    return Geometry(*SIDES, (frames - 1) * 4 + 1, chunk=chunk, cache=cache or frames)


def causal_record(geometry: Geometry) -> EngineRecord:
    """An engine of the small causal model."""
    return EngineRecord(
        backend="onnx",
        role=DENOISER,
        family=CONFIG.family,
        dtype="fp32",
        geometry=geometry,
        program=CausalWan.describe(CONFIG, geometry),
        details=OnnxDetails(),
        sampling=sampling_defaults(CONFIG, (), geometry),
        files={},
        layout="",
        key="",
        target={"device": "cpu"},
    )


@cache  # it keeps nothing
def _graph(seed: int, geometry: Geometry) -> CausalWan:
    return eager(random_weights(CONFIG, seed), geometry)[0]


class CausalEngine:
    """The graph with the weights of either of two sets; `calls` are the moments that ran.

    Inputs of the engine are kept in `given`. While `fails` is set, calls of that moment fail.
    """

    device = "cpu"

    def __init__(self, geometry: Geometry, *, torch_arrays: bool = False) -> None:
        self.torch_arrays, self.fails = torch_arrays, ""
        self.calls: list[str] = []
        self.given: list[dict[str, Any]] = []
        self.graphs = {name: _graph(seed, geometry) for seed, name in enumerate((BASE, STYLE))}
        self.program = self.graphs[BASE].program

    def array(self, value: Array) -> Any:
        return to_device(value, torch.device("cpu")) if self.torch_arrays else to_numpy(value)

    def memory(self) -> Memory:
        return Memory(zero_state(self.program, torch.float32, torch.device("cpu")))

    def use(self, weights: Any) -> None: ...

    def close(self) -> None: ...

    def __call__(
        self,
        inputs: Mapping[str, Any],
        weights: Any = None,
        memory: Memory | None = None,
        moment: str = "step",
    ) -> Any:
        assert memory is not None
        self.calls.append(moment)
        self.given.append({**inputs, "attended": memory.attended})
        graph = self.graphs[weights]
        given = {name: torch.as_tensor(value) for name, value in inputs.items()}
        with torch.no_grad(), attending_to(memory.attended):
            if memory.values is None or memory.weights != weights:
                self.calls.append("prompt")
                known = graph.run(given, memory.state, ("prompt",))
                memory.values, memory.weights = {"context": known["context"]}, weights
            known = graph.run({**given, **memory.values}, memory.state, (moment,))
        if self.fails == moment:  # after it has written
            raise EngineFailure("it was asked to fail")
        if moment != "step":
            return None
        return known["velocity"] if self.torch_arrays else known["velocity"].numpy()


def causal_denoiser(
    geometry: Geometry, *, torch_arrays: bool = False
) -> tuple[Denoiser, CausalEngine]:
    """A denoiser of the small causal model, which can use either set of weights."""
    engine = CausalEngine(geometry, torch_arrays=torch_arrays)

    def find(name: Any, **_: Any) -> WeightsSet:
        own: Any = name or BASE
        return WeightsSet(own, {"": own})

    return Denoiser(causal_record(geometry), {"": engine}, find(None), find), engine


def text_of(seed: int = 0) -> np.ndarray:
    """Text embeddings of a few tokens."""
    rng = np.random.default_rng([seed, 1])
    return rng.standard_normal((TEXT_ROWS, CONFIG.text_dim), np.float32)


def latent_of(geometry: Geometry, frames: int, seed: int = 0) -> np.ndarray:
    """A random latent [1, 16, frames, h, w]."""
    _, height, width = geometry.latent
    rng = np.random.default_rng([seed, 2])
    return rng.standard_normal((1, 16, frames, height, width), np.float32)


def joined(latents: Sequence[Array]) -> np.ndarray:
    """Chunks as one latent."""
    return np.concatenate([to_numpy(latent) for latent in latents], axis=2)
