"""TensorRT on a CPU: doubles autospecced from its real classes; plans compute a known function.

A plan is a JSON file. Executing one reads the addresses that were bound, as kernels would. A call
must fit the signature that the real method states, and a misspelt name is an error. A plan of an
ONNX graph computes what ONNX Runtime makes of it.
"""

import ctypes
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import onnx
import pytest
import torch
from onnx import TensorProto
from onnxruntime import InferenceSession
from torch import Tensor

from tests.oracles.bindings import accepts, signatures
from wanexport.runtime.engines import tensorrt as tensorrt_engine
from wanexport.runtime.engines import tensorrt_moments, tensorrt_plan, tensorrt_target

DTYPES = {
    "FLOAT": torch.float32,
    "BF16": torch.bfloat16,
    "HALF": torch.float16,
    "INT64": torch.int64,
}
Calls = list[tuple[Any, ...]]  # method or function, and what was passed


def write_plan(
    path: Path, tensors: Mapping[str, tuple[tuple[int, ...], str]], activation_bytes: int = 4096
) -> None:
    """A plan that takes these tensors (shape, TensorRT's dtype); `velocity` is its output."""
    path.write_text(json.dumps({"tensors": tensors, "activation_bytes": activation_bytes}))


def write_graph_plan(path: Path, graph: Path) -> None:
    """A plan that computes what an ONNX graph does, and takes and gives the same tensors."""
    model = onnx.load(graph)
    tensors = {
        end.name: (
            [size.dim_value for size in end.type.tensor_type.shape.dim],
            _OF_ONNX[end.type.tensor_type.elem_type],
        )
        for end in (*model.graph.input, *model.graph.output)
    }
    outputs = [end.name for end in model.graph.output]
    plan = {"tensors": tensors, "outputs": outputs, "graph": str(graph), "activation_bytes": 4096}
    path.write_text(json.dumps(plan))


_OF_ONNX = {TensorProto.FLOAT: "FLOAT", TensorProto.INT64: "INT64"}


@cache
def _session(graph: str) -> InferenceSession:
    return InferenceSession(graph, providers=["CPUExecutionProvider"])


def _run_graph(graph: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    session = _session(graph)
    names = [end.name for end in session.get_outputs()]
    found = session.run(names, {name: tensor.numpy() for name, tensor in tensors.items()})
    return {name: torch.from_numpy(array) for name, array in zip(names, found, strict=True)}


def velocity(tensors: Mapping[str, Tensor]) -> Tensor:
    """What a plan computes: different for every tensor by which any of its inputs differs."""
    total = tensors["latent"].float().clone()
    for place, name in enumerate(sorted(tensors)):
        value = tensors[name].double()
        if name != "latent":
            total += float(value.mean() + value.flatten()[-1]) / (place + 1)
    return total


class TensorRt:
    """A module with the real enumerations and the logger's base class, and doubles of the rest.

    `calls` has every call in order. `fails` names a method that reports failure, as TensorRT does:
    with False or None, and a message to the logger that ends with `reason`.
    """

    def __init__(self, real: Any) -> None:
        self.real, self.calls, self.fails = real, Calls(), ""
        self.reason = "failed on purpose"
        self.cached: bytes | None = b"kernels"  # what the runtime cache of TensorRT for RTX holds
        self.compute: Callable[[Mapping[str, Tensor]], Tensor] = velocity
        self.executing: Callable[[Callable[[], None]], None] = lambda work: work()
        for name in ("ILogger", "DataType", "EngineStat", "ExecutionContextAllocationStrategy"):
            setattr(self, name, getattr(real, name))
        self.__version__ = real.__version__

    def Runtime(self, logger: Any) -> Any:
        self.logger = logger
        assert isinstance(logger, self.real.ILogger)
        return self._double("Runtime", deserialize_cuda_engine=self._deserialize)

    def count(self, method: str) -> int:
        """How often a method was called."""
        return sum(call[0] == method for call in self.calls)

    def _double(self, owner: str, **methods: Callable[..., Any]) -> Any:
        real = getattr(self.real, owner)
        double = create_autospec(real, instance=True, spec_set=True)
        for name, work in methods.items():
            getattr(double, name).side_effect = self._checked(real, name, work)
        return double

    def _checked(self, real: Any, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        stated = signatures(name, getattr(real, name).__doc__)

        def call(*arguments: Any, **named: Any) -> Any:
            assert accepts(stated, (None, *arguments), **named), f"{name}{arguments}{named}"
            self.calls.append((name, *arguments))
            if name == self.fails:
                severity = self.real.ILogger.Severity
                self.logger.log(severity.INFO, "this is no error")
                self.logger.log(severity.ERROR, f"{name}\n {self.reason}")
                return None if work(*arguments, **named) is not True else False
            return work(*arguments, **named)

        return call

    def _deserialize(self, content: Any) -> Any:
        try:
            plan = json.loads(bytes(content))
        except ValueError:
            self.logger.log(self.real.ILogger.Severity.ERROR, "magicTag == kEXPECTED_MAGIC_TAG")
            return None
        tensors = {name: (tuple(shape), dtype) for name, (shape, dtype) in plan["tensors"].items()}
        engine = self._double(
            "ICudaEngine",
            get_tensor_name=lambda index: list(tensors)[index],
            get_tensor_dtype=lambda name: getattr(self.real.DataType, tensors[name][1]),
            get_tensor_shape=lambda name: self.real.Dims(tensors[name][0]),
            get_engine_stat=lambda stat: 100,
            create_runtime_config=self._config,
            create_execution_context=lambda config: self._context(plan, tensors),
        )
        engine.num_io_tensors = len(tensors)
        engine.device_memory_size_v2 = plan["activation_bytes"]
        return engine

    def _config(self) -> Any:
        methods: dict[str, Callable[..., Any]] = {
            "set_execution_context_allocation_strategy": lambda strategy: None
        }
        if hasattr(self.real.IRuntimeConfig, "create_runtime_cache"):
            methods |= {
                "create_runtime_cache": self._cache,
                "set_runtime_cache": lambda cache: True,
            }
        return self._double("IRuntimeConfig", **methods)

    def _cache(self) -> Any:
        return self._double(
            "IRuntimeCache",
            deserialize=lambda blob: bytes(blob) == self.cached,
            serialize=lambda: self.cached,
        )

    def _context(self, plan: Mapping[str, Any], tensors: Mapping[str, Any]) -> Any:
        addresses: dict[str, int] = {}

        def set_tensor_address(name: str, memory: int) -> bool:
            assert name in tensors and memory % 64 == 0
            addresses[name] = memory
            return True

        def set_device_memory(memory: int, size: int) -> None:
            assert size >= plan["activation_bytes"] and memory % 64 == 0
            addresses["activations"] = memory

        def execute() -> None:
            given = {name: _at(addresses[name], *tensors[name]) for name in tensors}
            outputs = {name: given.pop(name) for name in plan.get("outputs", ["velocity"])}
            places = {addresses[name] for name in given}
            assert not places & {addresses[name] for name in outputs}  # nothing is written in place
            graph = plan.get("graph")
            found = _run_graph(graph, given) if graph else {"velocity": self.compute(given)}
            for name, output in outputs.items():
                output.copy_(found[name])

        def execute_async_v3(stream_handle: int) -> bool:
            assert addresses.keys() == {*tensors, "activations"}
            self.executing(execute)
            return True

        return self._double(
            "IExecutionContext",
            set_tensor_address=set_tensor_address,
            set_device_memory=set_device_memory,
            execute_async_v3=execute_async_v3,
        )


def _at(address: int, shape: tuple[int, ...], dtype: str) -> Tensor:
    """The tensor that lies at an address, not a copy."""
    size = prod(shape) * DTYPES[dtype].itemsize
    memory = (ctypes.c_char * size).from_address(address)
    return torch.frombuffer(memory, dtype=DTYPES[dtype]).view(shape)


class Stream:
    """A CUDA stream that does nothing but say who waits for whom."""

    def __init__(self, calls: Calls, handle: int) -> None:
        self.calls, self.cuda_stream = calls, handle

    def wait_stream(self, other: "Stream") -> None:
        self.calls.append(("wait_stream", self.cuda_stream, other.cuda_stream))

    def wait_event(self, event: "Event") -> None:
        self.calls.append(("wait_event", self.cuda_stream))


class Event:
    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    def record(self, stream: Stream) -> None:
        self.calls.append(("record", stream.cuda_stream))

    def synchronize(self) -> None:
        self.calls.append(("synchronize event",))


class Graph:
    """A CUDA graph: what was executed while it was captured, for `replay` to do."""

    def __init__(self, calls: Calls) -> None:
        self.calls, self.work = calls, list[Callable[[], None]]()

    def replay(self) -> None:
        self.calls.append(("replay",))
        for work in self.work:
            work()


class Gpu:
    """What the runtime sees of a GPU of architecture sm89; `current` is the caller's stream."""

    def __init__(self, trt: TensorRt, patch: pytest.MonkeyPatch) -> None:
        self.trt, self.current = trt, Stream(trt.calls, 7)
        self.free, self.capability = 24 << 30, (8, 9)
        for module in (tensorrt_plan, tensorrt_target):
            patch.setattr(module, "import_tensorrt", lambda flavour: trt)
        self.devices: list[str] = []  # by which the GPU was asked for
        for module in (tensorrt_engine, tensorrt_moments, tensorrt_target):
            patch.setattr(module, "gpu_or_cpu", self._place)
        cuda = {
            "is_available": lambda: True,
            "get_device_capability": lambda device: self.capability,
            "mem_get_info": lambda device: (self.free, 24 << 30),
            "memory_reserved": lambda device: 0,
            "get_per_process_memory_fraction": lambda device: 1.0,
            "memory_allocated": lambda device: 0,
            "device": self._device,
            "current_stream": lambda device: self.current,
            "synchronize": lambda device: trt.calls.append(("synchronize",)),
            "Stream": lambda device: Stream(trt.calls, 99),
            "Event": lambda: Event(trt.calls),
            "CUDAGraph": lambda: Graph(trt.calls),
            "graph": self._capture,
        }
        for name, value in cuda.items():
            patch.setattr(torch.cuda, name, value)

    def _place(self, device: str) -> torch.device:
        self.devices.append(device)
        return torch.device("cpu")

    @contextmanager
    def _device(self, device: torch.device) -> Iterator[None]:
        yield

    @contextmanager
    def _capture(
        self, graph: Graph, stream: Stream | None = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        """Without a stream, on PyTorch's own, which may be on another GPU."""
        self.capture_error_mode = capture_error_mode
        caller, self.current = self.current, stream or Stream(self.trt.calls, 55)
        run, self.trt.executing = self.trt.executing, graph.work.append
        yield
        self.current, self.trt.executing = caller, run
