"""Build a plan from an ONNX graph, in this process, with TensorRT or TensorRT for RTX.

The network is strongly typed: each tensor keeps the type that the graph gives it. NVIDIA's Python
interface is called directly, as it is the same for both; polygraphy would add a dependency and take
the flavour from the environment.
"""

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from wanexport.runtime.bundle.durable import durable_file, write_durably
from wanexport.runtime.engines.tensorrt_library import FLAVOURS, import_tensorrt, message_log
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.machine.memory import peak_rss

_SECONDS_BETWEEN_STEPS = 0.1  # of the progress shown: a build has thousands
_ATTENTION_KERNEL = re.compile("mha", re.IGNORECASE)


@dataclass(frozen=True)
class PlanJob:
    """One plan to build. Paths are absolute, an empty one is none; options are TensorRtOptions'.

    weights is the folder of the file that holds the graph's initializers; device is the GPU of this
    machine that the plan is for, so that it can be asked what it became. The timing cache is read
    where it is, and written to new_timing_cache.
    """

    flavour: str
    graph: str
    weights: str
    dtype: str
    arch: str
    device: str
    plan: str
    layers: str
    timing_cache: str
    new_timing_cache: str
    optimization_level: int | None
    workspace: int | None
    hardware_compatible: bool
    version_compatible: bool


def build_plan(job: PlanJob, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Write the plan and its layers as JSON; return what the build can say of both.

    attention_layers are those of the network; attention_kernels and activation_bytes are known only
    where the plan can be opened. kept_timings is False when TensorRT refused the timing cache, so
    that it was replaced. Raises WanExportError when TensorRT refuses the graph, the build or the
    plan.
    """
    _make_current(job.device)
    trt = import_tensorrt(job.flavour)
    log = message_log(trt)
    log.clear()
    builder = _made(trt.Builder, job, log)
    network = parse(trt, builder, log, Path(job.graph).read_bytes(), job.weights)
    layers: Any = network_layers(network)
    attentions = sum(layer["type"] == "ATTENTION_INPUT" for layer in layers)
    config = configure(trt, builder, job)
    kept_timings = _use_timing_cache(config, job.timing_cache)
    config.progress_monitor = monitor = _monitor(trt, progress)
    log.clear()  # of a timing cache that was refused
    started = time.monotonic()
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _build_failure(trt, job, log, config)
    result = {
        "layers": len(layers),
        "attention_layers": attentions,
        "attention_kernels": None,
        "activation_bytes": None,
        "kept_timings": kept_timings,
        "seconds": round(time.monotonic() - started, 2),
    }
    config.progress_monitor = None  # it must outlive the build, and no longer
    del monitor
    if job.device:
        layers, result["activation_bytes"] = _inspect(trt, job, log, plan)
        result["attention_kernels"] = _count_attention_kernels(layers)
    _write(job, plan, layers)
    _save_timing_cache(config, job.new_timing_cache)
    return {**result, "peak_rss_bytes": peak_rss()}


def _make_current(device: str) -> None:
    """Have TensorRT build for a GPU of this machine; it does so for the current one."""
    if device:
        import torch

        torch.cuda.set_device(device)


def _write(job: PlanJob, plan: Any, layers: Any) -> None:
    with durable_file(Path(job.plan)) as file:
        file.write(plan)
    if job.layers:
        write_durably(Path(job.layers), json.dumps(layers, separators=(",", ":")).encode())


def parse(trt: Any, builder: Any, log: Any, graph: bytes, weights: str = "") -> Any:
    """The network of an ONNX graph; weights is the folder of its external data.

    Raises WanExportError naming operator, node and reason when TensorRT refuses the graph, and
    naming the input where the network reads nothing of one.
    """
    strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strongly_typed)
    parser = trt.OnnxParser(network, log)
    # The path is that of the graph's file, of which the parser takes the folder.
    where = {"path": f"{weights}/"} if weights else {}
    if not parser.parse(graph, **where):
        error = parser.get_error(0)
        node = f"operator {error.node_operator()}, node {error.node_name() or '(unnamed)'}: "
        more = f", and {parser.num_errors - 1} more" if parser.num_errors > 1 else ""
        raise WanExportError(
            f"TensorRT {trt.__version__} does not take the graph: "
            f"{node if error.node_operator() else ''}{_in_one_line(error.desc())}{more}"
        )
    if unread := unread_inputs(network):
        raise WanExportError(
            f"TensorRT {trt.__version__} takes the graph and drops its input {unread[0]}: no "
            f"output of the network depends on it; write what reads it with other operators"
        )
    return network


def unread_inputs(network: Any) -> list[str]:
    """The inputs that no output of a network depends on: what a parser accepts and drops."""
    reads = {made[0]: own["inputs"] for own in network_layers(network) for made in own["outputs"]}
    needed, left = set[str](), [network.get_output(i).name for i in range(network.num_outputs)]
    while left:
        if (name := left.pop()) not in needed:
            needed.add(name)
            left += reads.get(name, ())
    names = (network.get_input(i).name for i in range(network.num_inputs))
    return [name for name in names if name not in needed]


def configure(trt: Any, builder: Any, job: PlanJob) -> Any:
    """The builder's settings."""
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)  # what is fp32 in the graph is meant to be
    if job.optimization_level is not None:
        config.builder_optimization_level = job.optimization_level
    if job.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace)
    if job.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if job.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if job.flavour == "tensorrt-rtx":
        targets = trt.ComputeCapability
        config.num_compute_capabilities = 1  # several in one build fail without a GPU
        config.set_compute_capability(getattr(targets, job.arch.upper(), targets.CURRENT), 0)
    return config


def network_layers(network: Any) -> list[dict[str, Any]]:
    """Name, type, inputs and outputs of every layer."""
    layers = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        layers.append(
            {
                "name": layer.name,
                "type": layer.type.name,
                "inputs": [tensor.name for tensor in inputs if tensor is not None],
                "outputs": [[tensor.name, tensor.dtype.name, *tensor.shape] for tensor in outputs],
            }
        )
    return layers


def _inspect(trt: Any, job: PlanJob, log: Any, plan: Any) -> tuple[Any, int]:
    """What the plan became on this machine's GPU: its layers, and the memory of its activations."""
    runtime = _made(trt.Runtime, job, log)
    runtime.engine_host_code_allowed = job.version_compatible
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        title = FLAVOURS[job.flavour].title
        raise WanExportError(f"{title} cannot open its plan for {job.arch}: {log.reason()}")
    inspector = engine.create_engine_inspector()
    information = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return json.loads(information), int(engine.device_memory_size_v2)


def _count_attention_kernels(information: dict[str, Any]) -> int:
    """Layers of an opened plan that a fused attention kernel runs."""
    layers = (json.dumps(layer) for layer in information.get("Layers", ()))
    return sum(bool(_ATTENTION_KERNEL.search(layer)) for layer in layers)


def _made(kind: Callable[[Any], Any], job: PlanJob, log: Any) -> Any:
    """A builder or runtime. Raises WanExportError when the driver or GPU does not let it be."""
    try:
        return kind(log)
    except TypeError as error:  # what the bindings make of a null pointer
        title = FLAVOURS[job.flavour].title
        raise WanExportError(f"{title} does not start here: {log.reason()}") from error


def _build_failure(trt: Any, job: PlanJob, log: Any, config: Any) -> WanExportError:
    """Why there is no plan, in one line."""
    title, errors = FLAVOURS[job.flavour].title, " ".join(log.errors)
    if "not supported by a dedicated kernel" in errors:
        return WanExportError(
            f"attention is not fused: {title} has no kernel for it in {job.dtype} at this size; "
            f"use --dtype bf16, or --attention-operator decomposed with --allow-unfused"
        )
    if "OutOfMemory" in errors or "workspace limit" in errors:
        limit = config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)
        return WanExportError(
            f"{title} needs more than {limit / 2**30:.3g} GiB of workspace for this video in "
            f"{job.dtype}: raise --workspace, or use --dtype bf16 or a smaller --resolution"
        )
    return WanExportError(f"{title} cannot build the engine for {job.arch}: {log.reason()}")


def _in_one_line(text: str) -> str:
    return " ".join(text.split())[:300]


def _monitor(trt: Any, progress: Callable[[str, int, int], None]) -> Any:
    """Shows the phase that runs and its steps; TensorRT calls it from several threads."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}
            self.shown, self.lock = 0.0, Lock()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self.lock:
                self.totals[phase_name] = num_steps
                progress(f"building, {phase_name}", 0, num_steps)  # its one step may take most

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self.lock:
                if time.monotonic() - self.shown >= _SECONDS_BETWEEN_STEPS:
                    self.shown = time.monotonic()
                    progress(f"building, {phase_name}", step + 1, self.totals.get(phase_name, 0))
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            with self.lock:
                self.totals.pop(phase_name, None)

    return Monitor()


def _use_timing_cache(config: Any, path: str) -> bool:
    """Take the kernels' times that earlier builds measured; False when those were refused."""
    if not path:
        return True
    kept = Path(path).read_bytes() if Path(path).is_file() else b""
    for content in (kept, b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return content == kept
    return not kept


def _save_timing_cache(config: Any, path: str) -> None:
    cache = config.get_timing_cache() if path else None
    if cache is not None:
        Path(path).parent.mkdir(exist_ok=True)
        write_durably(Path(path), bytes(cache.serialize()))
