"""A weightless ONNX graph in ONNX Runtime on a GPU: its weights stay where other engines have them.

With the CUDA provider a session reads the tensors of `DeviceWeights` in place. TensorRT's providers
compile the weights into an engine of their own, which they keep in the user's cache folder.
"""

import ctypes
import importlib
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanexport.runtime.bundle.pinned_file import PinnedFile, pin
from wanexport.runtime.engines.device import torch_dtype
from wanexport.runtime.engines.device_engine import DeviceEngine
from wanexport.runtime.engines.device_weights import DeviceWeights, device_weights
from wanexport.runtime.engines.engine import CLOSED, Memory
from wanexport.runtime.engines.moments import Ends, call_moment
from wanexport.runtime.engines.onnx import import_onnxruntime, reading_weights
from wanexport.runtime.engines.onnx_moments import (
    ends_of,
    written_state,
    zeros_by_name,
)
from wanexport.runtime.engines.onnx_providers import PROVIDERS, RTX_PLUGIN, Provider, gpu_obstacle
from wanexport.runtime.errors import (
    BadRequest,
    BundleError,
    EngineFailure,
    WanExportError,
    WanExportWarning,
    first_line,
    installing,
)
from wanexport.runtime.lora.merged_file import stack_of
from wanexport.runtime.program import NEXT, WHOLE, Program

# What takes the time of a forward: none of it may land on the CPU.
_HEAVY = frozenset(
    "Attention MultiHeadAttention Gemm MatMul Gelu Softmax LayerNormalization RMSNormalization "
    "SimplifiedLayerNormalization ScatterND".split()
)
# ONNX's numbers of types, which binding takes where numpy has none.
_ELEMENTS = {"fp32": 1, "fp16": 10, "bf16": 16, "I64": 7}
_CURAND = "libcurand.so.10"  # of CUDA 12 and 13
_OVERHEAD = 2 << 30  # bytes of GPU memory that a session may take beside its weights


class OnnxGpuSession:
    """One graph and its weights on a device; fp32 torch tensors there, in and out.

    `weights` is the file, and `tensors` its content on the device by the names of the graph's
    parameters. `assigned` counts the nodes by ONNX Runtime's provider and operator;
    `grown` is how much GPU memory opening took, in bytes.
    Raises WanExportError when ONNX Runtime lacks the provider, refuses the graph, or leaves a
    product, an attention or a norm to the CPU, and when a file is not what was pinned; it warns
    when it leaves other nodes there.
    """

    def __init__(
        self,
        graph: Path | PinnedFile,
        weights: Path | PinnedFile,
        tensors: Mapping[str, Tensor],
        device: torch.device,
        provider: Provider,
    ) -> None:
        self.device, self.provider = device, provider
        self.lock = threading.Lock()  # for its callers: one call at a time
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # ONNX Runtime holds their addresses as long as the session lives.
        self.values = {} if provider.compiles else _values(tensors)
        self.graph, self.file = graph, weights = pin(graph), pin(weights)
        if provider.compiles and stack_of(weights):
            raise BadRequest(
                f"provider {provider.name} compiles the weights in from a file, and takes no LoRA "
                f"in memory: merge it into a set with wanexport add, and use that"
            )
        self._tensors = dict(tensors)
        before, content = _free_bytes(device), graph.read()
        with weights.opened():
            try:
                self.session = self._open(content, weights)
            except WanExportError:
                raise
            except Exception as error:  # ONNX Runtime's own exceptions have no base but this
                raise BundleError(
                    f"ONNX Runtime cannot load {graph.path}: {first_line(error)}"
                ) from error
        self.grown = before - _free_bytes(device)
        self.inputs, self.outputs = ends_of(self.session)
        self.written = written_state(self.session)
        self.run_options = import_onnxruntime().RunOptions()
        self.run_options.log_severity_level = 4  # what goes wrong is raised
        self.run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self.assigned = _assigned(self.session)
        self._check_assignment(graph.path)

    @property
    def copies_weights(self) -> bool:
        """Whether opening took so much memory that the session may have its own copy of them."""
        size = sum(tensor.nbytes for tensor in self._tensors.values())
        return self.grown > max(size, _OVERHEAD)

    def with_weights(self, file: PinnedFile) -> "OnnxGpuSession":
        """Another session over the same graph, with the weights of a file."""
        return OnnxGpuSession(self.graph, file, self._tensors, self.device, self.provider)

    def _open(self, graph: bytes, weights: PinnedFile) -> Any:
        onnxruntime = import_onnxruntime()
        if self.device.type == "cuda":
            _load_curand()
        options = self._options(onnxruntime)
        stream = self.stream.cuda_stream if self.stream is not None else 0
        settings = self.provider.settings(self.device, stream, weights)
        wanted = PROVIDERS[self.provider.name]
        arguments: dict[str, Any] = {"providers": [(wanted, settings)]}
        if self.provider.name == "tensorrt-rtx":
            arguments = {}
            _add_rtx(onnxruntime, options, settings, self.device)
        elif self.provider.name == "tensorrt":
            with suppress(ImportError):  # its import makes the libraries findable
                importlib.import_module("tensorrt")
            cuda = Provider().settings(self.device, stream, weights)
            arguments["providers"].append((PROVIDERS["cuda"], cuda))
        # It tells of a plugin that it looks for before its own provider.
        onnxruntime.set_default_logger_severity(3)
        try:
            session = onnxruntime.InferenceSession(
                reading_weights(graph, weights, options),
                options,
                # Folded, a parameter would be a copy that no swap of the weights reaches.
                disabled_optimizers=["ConstantFolding"],
                enable_fallback=0,
                **arguments,
            )
        finally:
            onnxruntime.set_default_logger_severity(2)  # as it is by default
        if wanted not in session.get_providers():
            needed = "TensorRT 10 and the CUDA" if self.provider.name == "tensorrt" else "the CUDA"
            raise BundleError(
                f"ONNX Runtime cannot use its {wanted}, whose libraries it does not find: "
                f"install {needed} version that this onnxruntime-gpu is for"
            )
        return session

    def _options(self, onnxruntime: Any) -> Any:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # A pattern is known after the first call, and would take its memory a second time.
        options.enable_mem_pattern = False
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        for name, value in self.values.items():
            options.add_initializer(name, value)
        return options

    def _check_assignment(self, graph: Path) -> None:
        on_host = {
            operator: count
            for (provider, operator), count in self.assigned.items()
            if provider == PROVIDERS["cpu"]
        }
        if self.device.type == "cpu" or not on_host:
            return
        counts = ", ".join(f"{count} {operator}" for operator, count in sorted(on_host.items()))
        if _HEAVY & on_host.keys():
            raise BundleError(
                f"ONNX Runtime's {PROVIDERS[self.provider.name]} leaves {counts} of {graph} to the "
                f"CPU: {installing('onnxruntime-gpu>=1.31')}, or build with another --dtype"
            )
        warnings.warn(
            f"ONNX Runtime runs {counts} on the CPU, which the GPU waits for",
            WanExportWarning,
            stacklevel=2,
        )

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The outputs in order; the host does not wait for them.

        Of inputs those are taken that the graph has. State that is written where it lies is
        returned as it was given. The caller's current stream goes on after the outputs. Raises
        EngineFailure when ONNX Runtime cannot, for want of memory most likely.
        """
        binding = self.session.io_binding()
        try:
            given = {
                name: inputs[name].to(torch_dtype(dtype)).contiguous()
                for name, (_, dtype) in self.inputs.items()
            }
            with torch.inference_mode(False):  # of a caller in it, others could not write the state
                outputs = {
                    name: given[state] if (state := name.removesuffix(NEXT)) in self.written else
                    torch.empty(end[0], dtype=torch_dtype(end[1]), device=self.device)
                    for name, end in self.outputs.items()
                }  # fmt: skip
            self._bind(binding.bind_input, given, self.inputs)
            self._bind(binding.bind_output, outputs, self.outputs)
            with self._in_order():
                self.session.run_with_iobinding(binding, self.run_options)
        except Exception as error:
            raise EngineFailure(
                f"ONNX Runtime failed on {self.device} ({first_line(error)[:160]}), for want of "
                f"memory most likely: close what else uses it, or build an engine of a smaller "
                f"--resolution or fewer --frames"
            ) from error
        return [*outputs.values()]

    def _bind(self, bind: Callable[..., None], tensors: Mapping[str, Tensor], ends: Ends) -> None:
        """Give ONNX Runtime the addresses of tensors."""
        for name, tensor in tensors.items():
            place, element = (self.device.type, self.device.index or 0), _ELEMENTS[ends[name][1]]
            bind(name, *place, element, list(tensor.shape), tensor.data_ptr())

    @contextmanager
    def _in_order(self) -> Iterator[None]:
        """Begin after what the caller's stream holds, and have it go on after the session's."""
        if self.stream is None:
            yield
            return
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self.stream.wait_stream(current)
            try:
                yield
            finally:  # what was launched before a failure uses the caller's memory too
                current.wait_stream(self.stream)


class OnnxGpuEngine(DeviceEngine):
    """Calls sessions with one expert's weights: with a provider that reads them where they lie,
    `weights` hold by turns the files that calls name.

    `sessions` has one for each of the Program's calls by its name. Where they compiled their own
    copy in, weights is None and another file other sessions.
    """

    def __init__(
        self,
        sessions: Mapping[str, OnnxGpuSession],
        weights: DeviceWeights | None,
        file: PinnedFile,
        program: Program,
    ) -> None:
        self.file, self.program = file, program
        self.sessions: dict[str, OnnxGpuSession] | None = dict(sessions)
        self.weights = weights
        self.device_of = sessions[WHOLE].device
        self._state = zeros_by_name(program, sessions.values())
        self._lock = threading.Lock()

    @property
    def session(self) -> OnnxGpuSession | None:
        """That of a step."""
        return None if self.sessions is None else self.sessions[WHOLE]

    def memory(self) -> Memory:
        """What a new session keeps: a state of zeros."""
        with torch.inference_mode(False):
            return Memory(
                {
                    name: torch.zeros(end[0], dtype=torch_dtype(end[1]), device=self.device_of)
                    for name, end in self._state.items()
                }
            )

    def __call__(
        self,
        inputs: Mapping[str, Tensor],
        weights: PinnedFile | None = None,
        memory: Memory | None = None,
        moment: str = "step",
    ) -> Any:
        """Return the velocity, of a commit None; the caller's current stream does the work, the
        host waits not.

        Raises EngineFailure when the device has too little memory, and after `close`.
        """
        memory = self.memory() if memory is None else memory
        file = weights or self.file
        with self._held(file) as sessions, sessions[WHOLE].lock:
            return call_moment(self.program, sessions, inputs, file, memory, moment)

    @contextmanager
    def _held(self, file: PinnedFile) -> Iterator[dict[str, OnnxGpuSession]]:
        """The sessions with the weights of a file, for as long as the block lasts.

        One that has a copy of others is opened anew.
        """
        weights = self.weights
        with nullcontext() if weights is None else weights.held(file):
            with self._lock:
                sessions = self.sessions
                if sessions is None:
                    raise EngineFailure(CLOSED)
                for name, session in sessions.items():
                    is_own = weights is None or session.copies_weights
                    if is_own and session.file.content != file.content:
                        sessions = {**sessions, name: session.with_weights(file)}
                self.sessions = sessions
            yield sessions

    def close(self) -> None:
        """Let go of session and weights; a call then raises EngineFailure."""
        with self._lock:
            self.sessions = self.weights = None


def open_engines(
    graphs: Mapping[str, Path | PinnedFile],
    weights: Mapping[str, Path | PinnedFile],
    device: torch.device,
    provider: Provider,
    program: Program,
    *,
    offload: bool = False,
) -> dict[str, OnnxGpuEngine]:
    """The engine of each expert; graphs are files by the Program's calls, weights by expert.

    A path is taken as its file is now. With offload the experts share one session, whose weights
    are replaced at the switch.
    Raises BadRequest when the provider copies the weights that offload would replace, EngineFailure
    when it is missing, BundleError when it refuses the graph.
    """
    if device.type == "cuda" and (reason := gpu_obstacle(provider.name)):
        raise EngineFailure(reason)
    _check_provider(provider, program, offload)
    engines: dict[str, OnnxGpuEngine] = {}
    for expert, file in {expert: pin(file) for expert, file in weights.items()}.items():
        first = next(iter(engines.values()), None)
        if first is not None and first.sessions is not None and offload:
            engines[expert] = OnnxGpuEngine(first.sessions, first.weights, file, program)
            continue
        held = None if provider.compiles else device_weights(file, device, private=offload)
        tensors = held.tensors if held is not None else {}
        opened = _in_place if offload else OnnxGpuSession
        sessions = {
            call.name: opened(graphs[call.name], file, tensors, device, provider)
            for call in program.calls
        }
        engines[expert] = OnnxGpuEngine(sessions, held, file, program)
    return engines


def _check_provider(provider: Provider, program: Program, offload: bool) -> None:
    """Raise BadRequest for what a provider that compiles the weights in does not do."""
    if provider.compiles and offload:
        raise BadRequest(
            f"provider {provider.name} has its weights inside and cannot offload them: "
            f"choose --provider cuda"
        )
    if provider.compiles and program.state:
        raise BadRequest(
            f"provider {provider.name} is not used for engines that keep a state: choose "
            f"--provider cuda"
        )


def _in_place(
    graph: Path | PinnedFile,
    file: PinnedFile,
    tensors: Mapping[str, Tensor],
    device: torch.device,
    provider: Provider,
) -> OnnxGpuSession:
    """A session whose weights can be replaced. Raises BadRequest when ONNX Runtime copies them."""
    for _ in range(2):  # what a neighbour took meanwhile counts as grown: not so twice
        session = OnnxGpuSession(graph, file, tensors, device, provider)
        if not session.copies_weights:
            return session
        del session
    raise BadRequest(
        f"ONNX Runtime {import_onnxruntime().__version__} copies the weights, which "
        f"--offload experts would replace: leave it out"
    )


def _values(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The tensors as ONNX Runtime's values over the same memory."""
    value = import_onnxruntime().OrtValue
    return {name: value.from_dlpack(tensor) for name, tensor in tensors.items()}


def _load_curand() -> None:
    """Have the one library that the provider needs and PyTorch may not have loaded."""
    with suppress(OSError):
        ctypes.CDLL(_CURAND)
        return
    spec = find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in Path(folder).glob(f"*/lib/{_CURAND}"):
            ctypes.CDLL(str(path))


def _add_rtx(
    onnxruntime: Any, options: Any, settings: Mapping[str, str], device: torch.device
) -> None:
    """Have a session use TensorRT for RTX, whose provider is a plugin."""
    name = PROVIDERS["tensorrt-rtx"]
    devices = _rtx_devices(onnxruntime, name)
    if not devices:
        _register_rtx(onnxruntime, name)
        devices = _rtx_devices(onnxruntime, name)
    if len(devices) <= device.index:
        raise BundleError(
            f"{name} offers {len(devices)} devices, {device} is not among them: it is for "
            f"GeForce RTX GPUs, choose --provider cuda"
        )
    options.add_provider_for_devices([devices[device.index]], dict(settings))


@cache
def _register_rtx(onnxruntime: Any, name: str) -> None:
    """Load the plugin, which ONNX Runtime refuses to do twice in a process."""
    plugin = importlib.import_module(RTX_PLUGIN)
    onnxruntime.register_execution_provider_library(name, plugin.get_library_path())


def _rtx_devices(onnxruntime: Any, name: str) -> list[Any]:
    return [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]


def _assigned(session: Any) -> Counter[tuple[str, str]]:
    """How many nodes of each operator each provider has."""
    return Counter(
        (part.ep_name, node.op_type)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    )


def _free_bytes(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 0
