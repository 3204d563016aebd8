"""TensorRT engines, of either flavour: what `build` asks of this backend."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx_ir
import torch

from wanexport.exporter.backends.backend import (
    Compiled,
    Options,
    Progress,
    Request,
    TensorRtOptions,
)
from wanexport.exporter.backends.onnx.assemble import assemble
from wanexport.exporter.backends.onnx.lower import Lowering, for_tensorrt, lower, serialize
from wanexport.exporter.backends.onnx.prove import prove_lowering
from wanexport.exporter.backends.tensorrt import plan as to_tensorrt
from wanexport.exporter.backends.tensorrt.plan import PlanJob
from wanexport.exporter.backends.tensorrt.room import check_room
from wanexport.exporter.backends.tensorrt.targets import find_targets, gpu_arch
from wanexport.exporter.child.child import run_process, temporary_folder
from wanexport.exporter.lint import tensorrt as tensorrt_lint
from wanexport.graphs.signature import attention_count
from wanexport.runtime.bundle.details import TensorRtDetails
from wanexport.runtime.bundle.durable import fsync_folder, write_durably
from wanexport.runtime.bundle.manifest import EngineRecord
from wanexport.runtime.bundle.signature import weights_layout
from wanexport.runtime.engines.cache_folder import cache_folder
from wanexport.runtime.engines.device_name import device_kind
from wanexport.runtime.engines.tensorrt_library import FLAVOURS
from wanexport.runtime.errors import BadRequest, WanExportError, WanExportWarning, explain
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.program import WHOLE
from wanexport.runtime.wan_config import WanConfig


class TensorRtBackend:
    """Builds plans with TensorRT (`tensorrt`) or TensorRT for RTX (`tensorrt-rtx`)."""

    ATTENTION = ("native", "decomposed")
    OPTIONS = TensorRtOptions
    COMPILES = False
    SOURCES = (lower.__module__, assemble.__module__, to_tensorrt.__name__)

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

        Raises BadRequest for a model with state, which a plan does not keep.
        """
        if request.program.state:
            raise BadRequest(
                f"{self.title} builds no {request.config.family}, which keeps a state between "
                f"steps: use --backend onnx or aoti"
            )
        options = request.options or TensorRtOptions()
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
        """Write the plan, with baked weights one for each expert, and the list of its layers.

        Raises WanExportError when there is no room, when TensorRT refuses the graph, or when
        attention is not fused and that was not allowed.
        """

        def show(stage: str, done: int, total: int) -> None:
            progress(f"{request.label}: {stage}", done, total)

        options, gpu = _options(request), _memory(request)
        _check_fusion_can_be_known(request, options, gpu is not None)
        room = check_room(request, folder, gpu)
        show("tracing and lowering", 0, 0)
        graph, lint = _lowered(*_what_is_lowered(request))
        files, results = {}, []
        # Beside the plan, where a sweep finds it after a kill.
        with TemporaryDirectory(prefix="plan-", dir=folder) as name:
            scratch = Path(name).resolve()
            (scratch / "denoiser.onnx").write_bytes(graph)
            for role, source in _roles(weights, request.bakes).items():
                files[role] = folder / f"{role}.plan"
                job = self._job(request, options, scratch, files[role], source)
                results.append(_run(job, scratch, show))
                _take_over(job, folder)
        files["layers"] = folder / "layers.json"
        program = request.program
        report = {**_summary(results), "attention_expected": attention_count(program)}
        _check_fusion(request, options, report)
        details = TensorRtDetails(options.hardware_compatible, options.version_compatible)
        build = {**report, "needs_bytes": room}
        return Compiled(files, program.whole(), details, lint, build)

    def _job(
        self,
        request: Request,
        options: TensorRtOptions,
        scratch: Path,
        plan: Path,
        weights: Path | None,
    ) -> PlanJob:
        arch = request.target["arch"]
        name = f"{self.flavour}-{request.target[self.flavour]}-{arch}.timing"
        # RTX has no timings to keep.
        cache = cache_folder() if self.flavour == "tensorrt" else None
        return PlanJob(
            flavour=self.flavour,
            graph=str(scratch / "denoiser.onnx"),
            weights=str(weights.resolve().parent) if weights else "",
            dtype=request.dtype,
            arch=arch,
            device=request.device if _is_here(request) else "",
            plan=str(scratch / plan.name),
            layers=str(scratch / "layers.json"),
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
        key = (*_what_is_lowered(request), verify, stamps)
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
        """Prove, by ONNX Runtime, the graph that the plan was built of."""
        with temporary_folder() as scratch:
            path = scratch / "denoiser.onnx"
            path.write_bytes(_lowered(*_what_is_lowered(request))[0])
            how = _lowering(request)
            figures = prove_lowering(request, how, {WHOLE: path}, weights, verify, opens=False)
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


def _lowering(request: Request) -> Lowering:
    assert request.attention is not None
    return for_tensorrt(request.dtype, request.attention)


def _what_is_lowered(request: Request) -> tuple[str, WanConfig, Geometry, Lowering, bool]:
    """What decides the graph of a plan, which is the same for all targets."""
    return request.graph, request.config, request.geometry, _lowering(request), not request.bakes


@lru_cache(maxsize=2)  # one as inputs for every target's plan, one with initializers to bake
def _lowered(
    graph: str, config: WanConfig, geometry: Geometry, how: Lowering, as_inputs: bool
) -> tuple[bytes, dict[str, int]]:
    """The graph as ONNX, and its lint counts. Raises RuntimeError when it is not clean."""
    _, entries = weights_layout(config, how.dtype)
    lowered = lower(graph, config, geometry, how)
    whole = assemble(lowered, entries, as_inputs=as_inputs)
    findings = tensorrt_lint.lint_tensorrt(onnx_ir.to_proto(whole))
    if findings:
        raise RuntimeError(f"TensorRT takes no such graph: {findings[0]}")
    return serialize(whole), {**lowered.lint, tensorrt_lint.KIND: 0}


def _roles(weights: Mapping[str, Path], baked: bool) -> dict[str, Path | None]:
    """The plans to build by role, with the weights that go into each."""
    if not baked:
        return {WHOLE: None}
    return {f"{WHOLE}-{expert}" if expert else WHOLE: path for expert, path in weights.items()}


def _summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is recorded of the builds: the first's layers, all that they took."""
    first = results[0]
    return {
        **{name: first[name] for name in ("layers", "attention_layers", "attention_kernels")},
        "activation_bytes": first["activation_bytes"],
        "plan_seconds": round(sum(result["seconds"] for result in results), 2),
        "plan_peak_rss_bytes": max(result["peak_rss_bytes"] for result in results),
    }


def _check_fusion_can_be_known(request: Request, options: TensorRtOptions, is_here: bool) -> None:
    if request.attention == "decomposed" and not is_here and not options.allow_unfused:
        raise BadRequest(
            f"whether TensorRT fuses decomposed attention shows only on a GPU, and there is no "
            f"{request.target['arch']} here: use --attention-operator native, or --allow-unfused"
        )


def _check_fusion(request: Request, options: TensorRtOptions, report: dict[str, Any]) -> None:
    """Refuse an engine whose attention is not known to be fused, or warn where that is allowed."""
    is_native = request.attention != "decomposed"
    found = report["attention_layers" if is_native else "attention_kernels"]
    expected = report["attention_expected"]
    if found is not None and found >= expected:
        return
    shown = "an unknown number" if found is None else str(found)
    message = (
        f"{request.label}: {shown} of {expected} attention layers are fused; others would keep "
        f"every score in GPU memory"
    )
    if not options.allow_unfused:
        raise BadRequest(f"{message}: use --attention-operator native, or --allow-unfused")
    warnings.warn(message, WanExportWarning, stacklevel=2)
