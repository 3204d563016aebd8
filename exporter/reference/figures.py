"""What the manifest says of a proof, and the seeded call that it is made of."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wanexport.exporter.reference.eager import EagerEngine
from wanexport.exporter.reference.inputs import commit_inputs, forward_inputs, whole_inputs
from wanexport.exporter.reference.parity import measure
from wanexport.graphs.graph import load_graph
from wanexport.graphs.weights import bundle_tensors
from wanexport.runtime.bundle.tensorfile import load_arrays, save_arrays
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.family import family_of
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.program import Program
from wanexport.runtime.wan_config import WanConfig

TIMESTEP = 812.0
SEED = 0


@dataclass(frozen=True)
class Case:
    """One seeded call of a model, or of a cut of it: all that a fresh process is told of it.

    graph names the class of the graph; weights and inputs are files, by absolute paths; tensors
    maps the names of the case's parameters to those in `weights`. device is PyTorch's name of it.
    """

    graph: str
    config: dict[str, Any]
    geometry: dict[str, Any]
    dtype: str
    device: str
    tensors: dict[str, str]
    inputs: str
    weights: str

    @property
    def wan(self) -> WanConfig:
        """The config of the case."""
        return WanConfig(**self.config)

    @property
    def size(self) -> Geometry:
        """The geometry of the case."""
        return Geometry(**self.geometry)

    def program(self) -> Program:
        """The calls of the case's graph."""
        return load_graph(self.graph).describe(self.wan, self.size)

    def arrays(self) -> dict[str, np.ndarray]:
        """The inputs; whole numbers are not in the file."""
        return {**whole_inputs(self.size), **load_arrays(Path(self.inputs))}

    def calls(self) -> list[tuple[str, dict[str, np.ndarray]]]:
        """The moments that the case runs with their inputs; the last gives its velocity."""
        inputs = self.arrays()
        before = commit_inputs(self.size, inputs)
        return [*([] if before is None else [("commit", before)]), ("step", inputs)]

    def eager(self, dtype: str) -> np.ndarray:
        """The velocity that eager PyTorch gives in a dtype."""
        tensors = bundle_tensors(Path(self.weights), self.tensors)
        engine = EagerEngine(
            self.wan, self.size, dtype, tensors,
            graph=self.graph, resident=False, device=self.device,
        )  # fmt: skip
        memory, velocity = engine.memory(), None
        for moment, inputs in self.calls():
            velocity = engine(inputs, memory=memory, moment=moment)
        assert isinstance(velocity, np.ndarray)
        return velocity


def make_case(
    config: WanConfig,
    geometry: Geometry,
    dtype: str,
    *,
    device: str,
    tensors: Mapping[str, str],
    folder: Path,
) -> dict[str, Any]:
    """The fields of a Case but for the weights; its seeded inputs are written in the folder."""
    path = folder.resolve() / "inputs.safetensors"
    drawn = forward_inputs(config, geometry, TIMESTEP, SEED)
    save_arrays(path, {n: array for n, array in drawn.items() if array.dtype == np.float32})
    return {
        "graph": family_of(config).graph,
        "config": asdict(config),
        "geometry": asdict(geometry),
        "dtype": dtype,
        "device": device,
        "tensors": dict(tensors),
        "inputs": str(path),
    }


def proof_figures(
    case: Case, method: str, velocity: np.ndarray, *, has_floor: bool = True
) -> dict[str, Any]:
    """What the manifest says of the proof: the engine's velocity against that of eager PyTorch.

    Without has_floor, eager PyTorch in the engine's own precision is not asked. Raises
    WanExportError when the proof failed.
    """
    reference = case.eager("fp32")
    floor = case.eager(case.dtype) if has_floor and case.dtype != "fp32" else None
    _check_finite(case.dtype, reference, velocity)
    parity = measure(velocity, reference, floor)
    if not parity.passed:
        raise WanExportError(
            f"relative L2 error {parity.error:.2e} is over the gate {parity.gate:.2e}: "
            f"this is a fault of wanexport or of a library, please report it"
        )
    return {
        "method": method,
        "blocks": case.wan.num_layers,
        "tokens": case.size.num_tokens,
        "error": parity.error,
        "floor": parity.floor,
        "gate": parity.gate,
    }


def _check_finite(dtype: str, reference: np.ndarray, velocity: np.ndarray) -> None:
    if not np.isfinite(reference).all():
        raise WanExportError("the model gives NaN or Inf in eager fp32: check the checkpoint")
    if not np.isfinite(velocity).all():
        raise WanExportError(
            f"the {dtype} engine gives NaN or Inf: build with --dtype bf16 or fp32"
        )
