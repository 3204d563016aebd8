"""Models whose calls can be run one at a time: eager PyTorch, and engines of some backends."""

import tempfile
from collections.abc import Callable, Hashable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
import torch
from torch import Tensor

from wanexport.exporter.backends.onnx.cut import Cut, cut_call
from wanexport.exporter.reference.eager import EagerEngine
from wanexport.graphs.graph import torch_dtype
from wanexport.runtime.bundle.pinned_file import PinnedFile
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.engines.aoti import AotiEngine
from wanexport.runtime.engines.device import on_device, to_device
from wanexport.runtime.engines.onnx import OnnxEngine, OnnxSession
from wanexport.runtime.engines.operators import attention_kernels
from wanexport.runtime.errors import BadRequest, EngineFailure
from wanexport.runtime.program import ENGINE_DTYPE, WHOLE, Call, Program, of_layer

Values = Mapping[str, Tensor]  # by the Program's names, fp32


class Stepper(Hashable, Protocol):
    """A model that runs one layer of one call. It keeps no state: that is given and returned."""

    @property
    def program(self) -> Program:
        """The calls."""

    def run_call(self, call: Call, index: int, given: Values) -> dict[str, Tensor]:
        """What a layer of a call writes, and what its state becomes, in fp32.

        given has what it reads, and its state by the layer's own names.
        """


@dataclass(frozen=True)
class EagerStepper:
    """The graph in eager PyTorch, in its own precision. Two of one engine are equal."""

    engine: EagerEngine

    @property
    def program(self) -> Program:
        """The calls."""
        return self.engine.model.program

    def run_call(self, call: Call, index: int, given: Values) -> dict[str, Tensor]:
        """What a layer of a call writes, and what its state becomes."""
        own = _placed(self.program, given, self.engine.dtype, torch.device(self.engine.device))
        state = {name: own[name].clone() for name in of_layer(call.state, index)}
        with torch.no_grad():
            written = self.engine.model.run_call(call, index, own, state)
        return {name: value.float() for name, value in {**written, **state}.items()}


class AotiStepper:
    """The packages of an AOTInductor engine with one expert's weights."""

    def __init__(self, engine: AotiEngine, dtype: str) -> None:
        self.engine, self.dtype = engine, torch_dtype(dtype)
        self.program = engine.regions.program

    def run_call(self, call: Call, index: int, given: Values) -> dict[str, Tensor]:
        """What a layer of a call writes, and what its state becomes."""
        engine, weights = self.engine, self.engine.weights
        assert weights is not None and engine.bound is not None
        layer = engine.bound.layers()[self.program.calls.index(call)][index]
        own = _placed(self.program, given, self.dtype, engine.device_of)
        state = {name: own[name].clone() for name in layer.state}
        with weights.held(engine.file), engine.regions.lock, on_device(engine.device_of):
            with attention_kernels(engine.regions.kernels), torch.no_grad():
                reads = [own[name] for name in call.reads]
                with layer.parameters as parameters:
                    results = layer.run([*parameters, *reads, *state.values()])
        written = dict(zip(call.writes, results, strict=True))
        return {name: value.float() for name, value in {**written, **state}.items()}


Run = Callable[[Path, Cut, Mapping[str, Tensor]], list[Tensor]]  # a graph, on its inputs by name


class OnnxStepper:
    """ONNX graphs, each layer of a call cut out of that of its moment and opened by itself.

    So the weights of one layer are in memory at a time.
    """

    def __init__(
        self, graphs: Mapping[str, PinnedFile], program: Program, dtype: str, run: Run
    ) -> None:
        self.program, self.dtype, self.run = program, dtype, run
        self.models = {
            call.when: onnx.load_model_from_string(graphs[call.name].read())
            for call in program.whole().calls
        }

    def cut(self, call: Call, index: int) -> Cut:
        """One layer of a call."""
        return cut_call(self.models[call.when], self.program, call, index, self.dtype)

    def run_call(self, call: Call, index: int, given: Values) -> dict[str, Tensor]:
        """What a layer of a call writes, and what its state becomes."""
        cut = self.cut(call, index)
        kept = {name: given[name] for name in of_layer(call.state, index)}
        return kept | dict(zip(cut.written, self.run_cut(cut, given), strict=True))

    def run_cut(self, cut: Cut, given: Values) -> list[Tensor]:
        """The outputs of a cut, then the values that it taps."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "call.onnx"
            path.write_bytes(cut.model.SerializeToString())
            return self.run(path, cut, {name: given[own] for own, name in cut.inputs.items()})


def _placed(
    program: Program, given: Values, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Values on a device, in the precisions that a model of this dtype has them in."""
    low = {name for name, spec in program.values.items() if spec.dtype == ENGINE_DTYPE}
    return {
        name: to_device(value, device).to(dtype if name in low else torch.float32)
        for name, value in given.items()
    }


def stepper_of(
    denoiser: Denoiser, program: Program, expert: str, weights: Mapping[str, PinnedFile]
) -> Stepper:
    """The calls of a denoiser's expert, as program has them; weights are the files by expert.

    Raises BadRequest when the engine has no values between its calls.
    """
    engine, record = denoiser.engines[expert], denoiser.record
    if isinstance(engine, EagerEngine):
        return EagerStepper(engine)
    if isinstance(engine, AotiEngine):
        return AotiStepper(engine, record.dtype)
    if isinstance(engine, OnnxEngine):
        graphs, run = engine.graphs, _on_cpu(weights[expert])
    else:
        graphs, run = _of_gpu_sessions(engine, record.name)
    return OnnxStepper(graphs, program, record.dtype, run)


def _on_cpu(file: PinnedFile) -> Run:
    def run(path: Path, cut: Cut, given: Mapping[str, Tensor]) -> list[Tensor]:
        arrays = {name: value.cpu().numpy() for name, value in given.items()}
        return [torch.from_numpy(np.asarray(a)) for a in OnnxSession(path, file)(arrays)]

    return run


def _of_gpu_sessions(engine: object, name: str) -> tuple[Mapping[str, PinnedFile], Run]:
    """The graphs that sessions on a GPU run, and what runs their parts on the same tensors."""
    from wanexport.runtime.engines.onnx_gpu import OnnxGpuEngine, OnnxGpuSession

    if not isinstance(engine, OnnxGpuEngine):
        raise BadRequest(no_values(name))
    sessions, weights = engine.sessions, engine.weights
    if sessions is None:
        raise EngineFailure(f"engine {name} was closed: load it again")
    whole = sessions[WHOLE]
    if whole.provider.compiles:
        raise BadRequest(
            f"provider {whole.provider.name} compiles the whole graph of {name}, which has no "
            f"values between calls then: bisect with --provider cuda or cpu"
        )

    def run(path: Path, cut: Cut, given: Mapping[str, Tensor]) -> list[Tensor]:
        held = nullcontext() if weights is None else weights.held(engine.file)
        tensors = {} if weights is None else weights.tensors
        own = {parameter: tensors[parameter] for parameter in cut.parameters}
        placed = {name: to_device(value, whole.device) for name, value in given.items()}
        with held:
            session = OnnxGpuSession(path, engine.file, own, whole.device, whole.provider)
            results = session(placed)
            if session.stream is not None:  # the session is gone after this
                session.stream.synchronize()
            return results

    return {name: session.graph for name, session in sessions.items()}, run


def no_values(name: str) -> str:
    """Why an engine without values between its calls cannot be bisected, and what to do."""
    return (
        f"engine {name} has no values between its calls to look at: bisect the engine of another "
        f"--backend, onnx or aoti, or compare the two with --against"
    )
