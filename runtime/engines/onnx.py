"""Weightless ONNX graphs in ONNX Runtime on the CPU, their weights mapped from the bundle's file.

An engine has a graph for each moment of its Program, a model that keeps nothing the one of a step.
"""

import os
import platform
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wanexport.runtime.arrays import Array, to_numpy
from wanexport.runtime.bundle.manifest import EngineRecord
from wanexport.runtime.bundle.pinned_file import PinnedFile, pin
from wanexport.runtime.bundle.tensorfile import read_array, read_header
from wanexport.runtime.engines.cache_folder import cache_folder
from wanexport.runtime.engines.engine import CLOSED, Engine, EngineOptions, Memory
from wanexport.runtime.engines.moments import call_moment
from wanexport.runtime.engines.onnx_location import with_location
from wanexport.runtime.engines.onnx_moments import (
    ends_of,
    numpy_dtype,
    written_state,
    zeros_by_name,
)
from wanexport.runtime.engines.onnx_providers import gpu_obstacle
from wanexport.runtime.errors import (
    BadRequest,
    BundleError,
    EngineFailure,
    first_line,
    needing_extra,
)
from wanexport.runtime.lora.merged_file import merge_array, stack_of
from wanexport.runtime.machine.memory import limit_bytes
from wanexport.runtime.program import NEXT, WHOLE, Program

OPTIONS = frozenset({"provider", "provider_options", "offload"})
RUNNABLE_DTYPES = ("fp16", "fp32")  # what ONNX Runtime executes on a CPU


class OnnxSession:
    """One graph with the weights in a file, on the CPU; arrays in and out.

    Prepacking is off so that fp32 weights stay a mapping of the file: no copy, shared by processes.
    fp16 weights ONNX Runtime widens to fp32 in memory, having few fp16 kernels for a CPU.
    `keep_casts` is for a graph that widens its own weights: it does so at every call, in the memory
    of one weight, instead of once for all when the session is created. `profile` has ONNX Runtime
    record its nodes in a file whose name begins with it. `inputs` and `outputs` have the shape and
    numpy dtype of each by name, and `written` names the state that is written where it lies.
    Raises BundleError when ONNX Runtime is missing or refuses the graph, and when a file is not
    what was pinned.
    """

    def __init__(
        self,
        graph: Path | PinnedFile,
        weights: Path | PinnedFile,
        *,
        keep_casts: bool = False,
        profile: Path | None = None,
    ) -> None:
        graph, self.weights = pin(graph), pin(weights)
        onnxruntime = import_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised; it need not be printed too
        options.add_session_config_entry("session.disable_prepacking", "1")
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        skipped = ["ConstantFolding"] if keep_casts else []
        options.enable_cpu_mem_arena = not keep_casts  # it keeps what the largest weight took
        # Not `add_initializer`, whose values folding does not see. ONNX Runtime holds their
        # addresses as long as the session lives.
        self._merged = _merged_values(onnxruntime, self.weights)
        if self._merged:
            options.add_external_initializers([*self._merged], [*self._merged.values()])
        content = graph.read()
        with self.weights.opened() as descriptor:
            try:
                self.session = onnxruntime.InferenceSession(
                    reading_weights(content, self.weights, options),
                    options,
                    providers=["CPUExecutionProvider"],
                    disabled_optimizers=skipped,
                )
            except Exception as error:  # ONNX Runtime's own exceptions have no base but this
                raise BundleError(
                    f"ONNX Runtime cannot load {graph.path}: {first_line(error)}"
                ) from error
            # Of what is mapped, whatever file has its name by then.
            self._mapped = os.dup(descriptor)
            weakref.finalize(self, os.close, self._mapped)
        self.inputs, self.outputs = ends_of(self.session)
        self.written = written_state(self.session)

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Run the graph and return its outputs in order.

        Of inputs those are taken that the graph has. State that is written where it lies is
        returned as it was given: the same array, of which only what is new is touched.
        Raises EngineFailure when ONNX Runtime cannot, for want of memory most likely, and
        BundleError when the weights were written to since they were opened.
        """
        self.weights.check(self._mapped)
        try:
            return self._run(inputs)
        except Exception as error:
            raise EngineFailure(
                f"ONNX Runtime cannot run the engine: {first_line(error)}"
            ) from error

    def _run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        given = {
            name: np.ascontiguousarray(inputs[name], numpy_dtype(dtype))
            for name, (_, dtype) in self.inputs.items()
        }
        outputs = {
            name: given[state] if (state := name.removesuffix(NEXT)) in self.written else
            np.empty(shape, numpy_dtype(dtype))
            for name, (shape, dtype) in self.outputs.items()
        }  # fmt: skip
        binding = self.session.io_binding()
        for arrays, bind in ((given, binding.bind_input), (outputs, binding.bind_output)):
            for name, array in arrays.items():
                bind(name, "cpu", 0, array.dtype, list(array.shape), array.ctypes.data)
        self.session.run_with_iobinding(binding)
        return [*outputs.values()]


class OnnxEngine:
    """Calls graphs with one expert's weights; another file is other sessions over the graphs.

    `graphs` has the file of each of the Program's calls by its name. `needs` is how many bytes
    attention takes at a call: what is beyond any memory here is refused, lest the system kill the
    process.
    """

    device = "cpu"

    def __init__(
        self,
        graphs: Mapping[str, PinnedFile],
        file: PinnedFile,
        program: Program,
        *,
        needs: int = 0,
    ) -> None:
        self.graphs, self.program, self.needs = graphs, program, needs
        self._lock = threading.Lock()
        self._sessions: dict[str, OnnxSession] | None = self._opened(file)
        self._state = zeros_by_name(program, self._sessions.values())

    def _opened(self, file: PinnedFile) -> dict[str, OnnxSession]:
        return {call.name: OnnxSession(self.graphs[call.name], file) for call in self.program.calls}

    @property
    def graph(self) -> PinnedFile:
        """The graph of a step."""
        return self.graphs[WHOLE]

    def array(self, value: Array) -> np.ndarray:
        """An fp32 numpy array."""
        return to_numpy(value)

    def memory(self) -> Memory:
        """What a new session keeps: a state of zeros."""
        state = self._state.items()
        return Memory({name: np.zeros(shape, numpy_dtype(dtype)) for name, (shape, dtype) in state})

    def use(self, weights: PinnedFile) -> None:
        """Open sessions with the weights of a file; calls that run keep theirs."""
        self._sessions_of(weights)

    def record_nodes(self, prefix: Path) -> None:
        """Open the session of a step again, to record each node that runs in a file of this
        prefix."""
        file = self._sessions_of(None)[WHOLE].weights
        with self._lock:
            self._sessions = None  # two of them might not fit in memory
            others = {n: g for n, g in self.graphs.items() if n != WHOLE}
            self._sessions = {
                **{name: OnnxSession(graph, file) for name, graph in others.items()},
                WHOLE: OnnxSession(self.graph, file, profile=prefix),
            }

    def recorded_nodes(self) -> tuple[Path, int]:
        """End the record: its file, and the nanoseconds of the system's clock when it began."""
        session = self._sessions_of(None)[WHOLE].session
        return Path(session.end_profiling()), session.get_profiling_start_time_ns()

    def __call__(
        self,
        inputs: Mapping[str, np.ndarray],
        weights: PinnedFile | None = None,
        memory: Memory | None = None,
        moment: str = "step",
    ) -> Any:
        """Return the velocity, of a commit None. Raises EngineFailure for want of memory, and after
        `close`."""
        if self.needs > limit_bytes():
            raise EngineFailure(
                f"attention in ONNX Runtime on a CPU needs {self.needs / 1e9:.0f} GB, of "
                f"{limit_bytes() / 1e9:.0f} GB here: build an engine of a smaller --resolution or "
                f"fewer --frames"
            )
        sessions = self._sessions_of(weights)
        memory = self.memory() if memory is None else memory
        file = sessions[WHOLE].weights
        return call_moment(self.program, sessions, inputs, file, memory, moment)

    def _sessions_of(self, weights: PinnedFile | None) -> dict[str, OnnxSession]:
        """The sessions of a file, None for that there is; others may replace them while they
        run."""
        with self._lock:
            sessions = self._sessions
            if sessions is None:
                raise EngineFailure(CLOSED)
            if weights is not None and sessions[WHOLE].weights.content != weights.content:
                self._sessions = sessions = self._opened(weights)
            return sessions

    def close(self) -> None:
        """Let go of the sessions; a call then raises EngineFailure."""
        with self._lock:
            self._sessions = None


def import_library(backend: str) -> None:
    """Import ONNX Runtime. Raises BundleError when it is missing."""
    import_onnxruntime()


def refusal(record: EngineRecord, device: str, options: EngineOptions, rebuild: str) -> str:
    """Why this machine cannot execute the engine on a device; empty when it can."""
    if device != "cpu":
        obstacle = gpu_obstacle(options.provider or "cuda")
        return obstacle and f"engine {record.name} cannot run on a GPU: {obstacle}"
    if record.dtype in RUNNABLE_DTYPES:
        return ""
    return (
        f"engine {record.name} is {record.dtype}, which ONNX Runtime cannot execute on a CPU: add "
        f"an engine with wanexport build --dtype fp32, or run this one on a GPU with "
        f"onnxruntime-gpu"
    )


def open_engines(
    record: EngineRecord,
    files: Mapping[str, PinnedFile],
    weights: Callable[[], Mapping[str, PinnedFile]],
    options: EngineOptions,
    device: str,
) -> Mapping[str, Engine]:
    """The engine of each expert; weights gives the files by expert.

    Raises BadRequest for options that a CPU has not, BundleError when ONNX Runtime refuses a file.
    """
    if device != "cpu":
        from wanexport.runtime.engines import onnx_gpu
        from wanexport.runtime.engines.device import gpu_or_cpu
        from wanexport.runtime.engines.onnx_providers import Provider

        name = options.provider or "cuda"
        # Of this very graph: what another left there would be code of unknown origin.
        cache = cache_folder() if name.startswith("tensorrt") else None
        own = cache and cache / files[WHOLE].sha256
        provider = Provider(name, options.provider_options or {}, own)
        return onnx_gpu.open_engines(
            files,
            weights(),
            gpu_or_cpu(device),
            provider,
            record.program,
            offload=bool(options.offload),
        )
    if options.offload or options.provider_options:
        raise BadRequest(
            f"engine {record.name} on a CPU offloads nothing and has no provider options: these "
            f"are for --device cuda"
        )
    needs = 2 * record.details.attention_score_bytes  # it holds the scores twice
    return {
        expert: OnnxEngine(files, file, record.program, needs=needs)
        for expert, file in weights().items()
    }


def _merged_values(onnxruntime: Any, weights: PinnedFile) -> dict[str, Any]:
    """ONNX Runtime's values of the parameters that LoRAs change, rounded as the file's are."""
    stack, values = stack_of(weights), {}
    if stack is None:
        return {}
    with weights.opened() as descriptor:
        for name, entry in read_header(descriptor).items():
            if stack.changes(name):
                base = read_array(descriptor, entry)
                merged = merge_array(stack, name, base)
                values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(merged)
    return values


def reading_weights(graph: bytes, weights: PinnedFile, options: Any) -> bytes:
    """The graph for a session with these options, which reads its weights from this very file.

    Graph and options name the real file: ONNX Runtime refuses one that a link leads out of the
    folder. From a path, in place of bytes, it would look for the weights beside the graph.
    Raises ValueError when the bytes are no graph, or its weights lie in several files.
    """
    real = weights.path.resolve()
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(real.parent)
    )
    return with_location(graph, real.name)


def versions(device: str = "cpu") -> dict[str, str]:
    """What the manifest records about this backend on this machine.

    Raises BundleError when ONNX Runtime is missing, EngineFailure when it cannot use the device,
    PyTorch's name of one.
    """
    version = import_onnxruntime().__version__
    if device != "cpu" and (reason := gpu_obstacle()):
        raise EngineFailure(reason)
    return {
        "device": device.partition(":")[0],
        "machine": platform.machine(),
        "onnxruntime": version,
    }


def import_onnxruntime() -> Any:
    """The module. Raises BundleError when it is not installed, or does not import."""
    disable_telemetry()
    with needing_extra("cpu", "an ONNX engine"):
        import onnxruntime
    return onnxruntime


def disable_telemetry() -> None:
    """Have ONNX Runtime call nobody, here and in child processes, unless the user has decided.

    From 1.29 on its import writes a device id below the home folder and looks a collector up.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
