"""TensorRT engines, of either flavour: what `build` asks of this backend."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from wanexport.exporter.backends.backend import (
    Compiled,
    Options,
    Progress,
    Request,
    TensorRtOptions,
)
from wanexport.exporter.backends.onnx.prove import prove_lowering
from wanexport.exporter.backends.tensorrt import graphs as graphs_of_plans
from wanexport.exporter.backends.tensorrt import plan as to_tensorrt
from wanexport.exporter.backends.tensorrt.fusion import check_fusion, check_fusion_can_be_known
from wanexport.exporter.backends.tensorrt.graphs import (
    Graphs,
    lowered_graphs,
    lowering,
    what_is_lowered,
)
from wanexport.exporter.backends.tensorrt.plan import PlanJob
from wanexport.exporter.backends.tensorrt.room import check_room
from wanexport.exporter.backends.tensorrt.targets import find_targets, gpu_arch
from wanexport.exporter.child.child import run_process, temporary_folder
from wanexport.runtime.bundle.details import TensorRtDetails, layers_role
from wanexport.runtime.bundle.durable import fsync_folder, write_durably
from wanexport.runtime.bundle.manifest import EngineRecord
from wanexport.runtime.engines.cache_folder import cache_folder
from wanexport.runtime.engines.device_name import device_kind
from wanexport.runtime.engines.tensorrt_library import FLAVOURS
from wanexport.runtime.errors import BadRequest, WanExportError, WanExportWarning, explain
from wanexport.runtime.program import WHOLE


class TensorRtBackend:
    """Builds plans with TensorRT (`tensorrt`) or TensorRT for RTX (`tensorrt-rtx`)."""

    ATTENTION = ("native", "decomposed")
    OPTIONS = TensorRtOptions
    COMPILES = False
    SOURCES = (graphs_of_plans.__name__, to_tensorrt.__name__)

    def __init__(self, flavour: str) -> None:
        self.flavour, self.title = flavour, FLAVOURS[flavour].title
        self.BINDING: tuple[str, ...] = ("device", "arch", flavour)
        self._twin: tuple[object, dict[str, Any]] | None = None  # what was proven, and its figures

    def default_device(self) -> str:
        """A GPU where there is one; without one, plans for others are built."""
        return "cuda" if torch.cuda.is_available() else "cpu"

    def default_dtype(self, device: str) -> str:
        """The precision that TensorRT has a fused attention for, wherever the plan is built."""
        return "bf16"

    def libraries(self, request: Request) -> dict[str, str]:
        """Versions of what makes the graph; TensorRT's own is in the target."""
        return {name: version(name) for name in ("torch", "onnx", "onnx-ir", "onnxscript")}

    def targets(self, device: str, options: Options) -> list[dict[str, str]]:
        """What plans are made for, one each: the GPU here, or with TensorRT for RTX any.

        Raises WanExportError when TensorRT is missing, has not the options, or knows no target.
        """
        return find_targets(self.flavour, options or TensorRtOptions(), _gpu(device))

    def check_attention(self, attention: str | None, dtype: str, target: Mapping[str, str]) -> None:
        """What TensorRT does with it shows when it has built the plan."""

    def resolve(self, request: Request) -> Request:
        """The request with its own options, of which the targets make several requests.

        Raises BadRequest for weights that would be baked into the plans of several moments.
        """
        options = request.options or TensorRtOptions()
        if options.bake_weights and not request.program.is_plain:
            raise BadRequest(
                f"a {request.config.family} has a plan for each of its moments, and each would "
                f"hold weights of its own: leave out --bake-weights"
            )
        return replace(
            request,
            device=_gpu(request.device),
            attention=request.attention or self.ATTENTION[0],
            options=replace(options, targets=()),
            bakes=options.bake_weights,
        )

    def compile_engine(
        self, folder: Path, request: Request, weights: Mapping[str, Path], progress: Progress
    ) -> Compiled:
        """Write a plan for each moment, with baked weights one for each expert, and the list of
        its layers.

        Raises WanExportError when there is no room, when TensorRT refuses the graph, or when
        attention is not fused and that was not allowed.
        """

        def show(stage: str, done: int, total: int) -> None:
            progress(f"{request.label}: {stage}", done, total)

        options, gpu = _options(request), _memory(request)
        check_fusion_can_be_known(request, options, gpu is not None)
        room = check_room(request, folder, gpu)
        show("tracing and lowering", 0, 0)
        graphs = lowered_graphs(*what_is_lowered(request))
        files, results = {}, {}
        # Beside the plan, where a sweep finds it after a kill.
        with TemporaryDirectory(prefix="plan-", dir=folder) as name:
            scratch = Path(name).resolve()
            plans = _plans(graphs, weights, request.bakes)
            for role, call, source in plans:
                files[role] = folder / f"{role}.plan"
                (scratch / f"{call}.onnx").write_bytes(graphs.content[call])
                job = self._job(request, scratch, role, call, source)
                own = _of_plan(role, show) if len(plans) > 1 else show
                results[role] = _run(job, scratch, own)
                _take_over(job, folder)
                files[layers_role(role)] = folder / Path(job.layers).name
        report = _summary(graphs, results)
        check_fusion(request, options, report)
        details = TensorRtDetails(options.hardware_compatible, options.version_compatible)
        build = {**report, "needs_bytes": room}
        return Compiled(files, request.program.whole(), details, graphs.lint, build)

    def _job(
        self, request: Request, scratch: Path, role: str, call: str, weights: Path | None
    ) -> PlanJob:
        options, arch = _options(request), request.target["arch"]
        name = f"{self.flavour}-{request.target[self.flavour]}-{arch}.timing"
        # RTX has no timings to keep.
        cache = cache_folder() if self.flavour == "tensorrt" else None
        return PlanJob(
            flavour=self.flavour,
            graph=str(scratch / f"{call}.onnx"),
            weights=str(weights.resolve().parent) if weights else "",
            dtype=request.dtype,
            arch=arch,
            device=request.device if _is_here(request) else "",
            plan=str(scratch / f"{role}.plan"),
            layers=str(scratch / f"{layers_role(role)}.json"),
            timing_cache=str(cache / name) if cache else "",
            new_timing_cache=str(scratch / name) if cache else "",
            optimization_level=options.optimization_level,
            workspace=options.workspace,
            hardware_compatible=options.hardware_compatible,
            version_compatible=options.version_compatible,
        )

    def prove(
        self,
        request: Request,
        engine: EngineRecord,
        bundle: Path,
        weights: Sequence[Path],
        verify: str,
    ) -> dict[str, Any]:
        """The figures of the proof: of the plan itself where it runs, else of its graph.

        Raises WanExportError when it fails.
        """
        if _is_here(request):
            from wanexport.exporter.backends.tensorrt.prove import prove_plan

            return prove_plan(request, engine, bundle, weights, verify)
        # Plans for several targets share all that the graph's proof depends on.
        stamps = tuple((str(path), path.stat().st_mtime_ns) for path in weights)
        key = (*what_is_lowered(request), verify, stamps)
        if self._twin is None or self._twin[0] != key:
            self._twin = key, self._prove_graph(request, engine, bundle, weights, verify)
        return dict(self._twin[1])

    def _prove_graph(
        self,
        request: Request,
        engine: EngineRecord,
        bundle: Path,
        weights: Sequence[Path],
        verify: str,
    ) -> dict[str, Any]:
        """Prove, by ONNX Runtime, the graphs that the plans were built of."""
        graphs = lowered_graphs(*what_is_lowered(request))
        with temporary_folder() as scratch:
            paths = {name: scratch / f"{name}.onnx" for name in graphs.content}
            for name, path in paths.items():
                path.write_bytes(graphs.content[name])
            how = lowering(request)
            figures = prove_lowering(request, how, paths, weights, verify, opens=False)
        compared = figures["method"].rpartition("; ")[2]
        return {**figures, "method": f"parsed and built by {self.title}; {compared}"}


def _gpu(device: str) -> str:
    """The GPU of a request: the one that it names, else the current one."""
    return "cuda" if device_kind(device) == "cpu" else device


def _is_here(request: Request) -> bool:
    """Whether this machine's GPU is the target, so that it opens the plan."""
    return request.target["arch"] == gpu_arch(request.device)


def _memory(request: Request) -> int | None:
    """Bytes of memory of the GPU that is the target, None where that is not here."""
    if not _is_here(request):
        return None
    return int(torch.cuda.get_device_properties(request.device).total_memory)


def _options(request: Request) -> TensorRtOptions:
    assert request.options is not None
    return request.options


def _of_plan(role: str, progress: Progress) -> Progress:
    """Progress that names the plan."""
    return lambda stage, done, total: progress(f"{role}, {stage}", done, total)


def _run(job: PlanJob, scratch: Path, progress: Progress) -> dict[str, Any]:
    """What the process that builds a plan says of it. Raises WanExportError when it fails."""
    result = run_process("backends.tensorrt.process", job, scratch, progress)
    if not result["kept_timings"]:
        warnings.warn(
            f"{job.timing_cache} was damaged or of another GPU: kernels were timed anew, and it is "
            f"replaced",
            WanExportWarning,
            stacklevel=2,
        )
    return result


def _take_over(job: PlanJob, folder: Path) -> None:
    """Move what a child wrote into the engine's folder, and the timings to where others find them.

    A child that outlives this process by an instant so leaves nothing in the bundle.
    """
    for path in (job.plan, job.layers):
        Path(path).replace(folder / Path(path).name)
    fsync_folder(folder)
    if job.new_timing_cache and Path(job.new_timing_cache).exists():
        try:  # a copy: the two may lie on different disks
            Path(job.timing_cache).parent.mkdir(parents=True, exist_ok=True)
            write_durably(Path(job.timing_cache), Path(job.new_timing_cache).read_bytes())
            Path(job.new_timing_cache).unlink()
        except (OSError, WanExportError) as error:
            warnings.warn(
                f"the next build times kernels anew: cannot write {explain(error)}",
                WanExportWarning,
                stacklevel=2,
            )


def _plans(
    graphs: Graphs, weights: Mapping[str, Path], baked: bool
) -> list[tuple[str, str, Path | None]]:
    """The plans to build by role, with the call whose graph it is and the weights inside."""
    if not baked:
        return [(call, call, None) for call in graphs.content]
    return [(f"{WHOLE}-{e}" if e else WHOLE, WHOLE, path) for e, path in weights.items()]


def _summary(graphs: Graphs, results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What is recorded of the builds: the layers of all moments, and all that they took.

    Of plans that differ by their weights alone the first stands for all.
    """
    first = [results[call] for call in graphs.content if call in results]
    first = first or [next(iter(results.values()))]
    seen = {name: [result[name] for result in first] for name in first[0]}
    kernels, memory = seen["attention_kernels"], seen["activation_bytes"]
    return {
        "layers": sum(seen["layers"]),
        "attention_layers": sum(seen["attention_layers"]),
        "attention_kernels": None if None in kernels else sum(kernels),
        "activation_bytes": None if None in memory else max(memory),
        "plan_seconds": round(sum(result["seconds"] for result in results.values()), 2),
        "plan_peak_rss_bytes": max(result["peak_rss_bytes"] for result in results.values()),
        "attention_expected": sum(graphs.attentions.values()),
    }
