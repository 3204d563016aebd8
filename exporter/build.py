"""`wanexport build`: the weights, then each engine with its proof, then the manifest."""

import hashlib
import inspect
import json
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from wanexport.exporter import to_onnx, trace
from wanexport.exporter.bundle import BundleWriter, open_bundle
from wanexport.exporter.eager import cut_to_ends, tensors_of_cut
from wanexport.exporter.model_source import ModelSource, resolve
from wanexport.exporter.proof import MAX_TOKENS, Job, run_in_fresh_process
from wanexport.graphs import config as graph_config
from wanexport.graphs import lint, model, rope
from wanexport.graphs.checkpoint import (
    CheckpointWeights,
    SourceTensor,
    weights_layout,
    write_weights,
)
from wanexport.graphs.config import WanConfig, sampling_defaults
from wanexport.runtime import attention, onnx_engine
from wanexport.runtime.geometry import Geometry, parse_resolution
from wanexport.runtime.load import RUNNABLE_DTYPES, WEIGHTS_FILE
from wanexport.runtime.manifest import (
    EngineRecord,
    FileRecord,
    Manifest,
    SamplingDefaults,
    TensorSpec,
    WeightsRecord,
    file_record,
    write_durably,
)
from wanexport.runtime.tensorfile import TensorEntry, header_sha256

_GRAPH_CODE = (graph_config, model, rope, lint, attention, trace, to_onnx)
_GRAPH_LIBRARIES = ("torch", "onnx", "onnx-ir", "onnxscript")

Progress = Callable[[str, int, int], None]  # stage, done, total (0 when the length is unknown)


@dataclass(frozen=True)
class Request:
    """One engine to build."""

    config: WanConfig
    geometry: Geometry
    backend: str
    dtype: str
    verify: str

    @property
    def label(self) -> str:
        """Folder name, and prefix of progress messages."""
        return f"{self.backend}-{self.dtype}"

    def key(self) -> str:
        """Hash of all that decides the engine's bytes; the weights are not among it."""
        code = [inspect.getsource(module) for module in _GRAPH_CODE]
        libraries = {name: version(name) for name in _GRAPH_LIBRARIES}
        return _hash(asdict(self), code, libraries)


def build(
    model: str | None = None,
    *,
    resolution: str,
    frames: int,
    output: str | Path | None = None,
    backends: Sequence[str] = ("onnx",),
    dtype: str = "fp32",
    random_weights: int | None = None,
    verify: str = "ends",
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Build a bundle, or add to one, and return the record of what was done.

    model is a folder, a hub id, or with random_weights (a seed) a preset; resolution is `480x832`
    or `832*480`; dtype is fp32, bf16 or fp16; output defaults to ./<model>; verify is `ends` (the
    proof runs the first and last block) or `full` (all of them).
    Raises WanExportError for whatever the caller can put right.
    """
    started = time.monotonic()
    height, width = parse_resolution(resolution)
    progress("checkpoint", 0, 0)
    source = resolve(model, random_weights)
    geometry = Geometry(height, width, frames, source.config.spatial_stride)
    bundle = Path(output) if output is not None else Path(source.name)
    reused: list[str] = []
    with open_bundle(bundle, _empty_manifest(source)) as writer:
        for expert in source.weights:
            reused += add_weights(writer, source, expert, dtype, progress)
        for backend in backends:
            request = Request(source.config, geometry, backend, dtype, verify)
            reused += add_engine(writer, source, request, progress)
        writer.commit()
    engines = [e for e in writer.manifest.engines if e.geometry == geometry and e.dtype == dtype]
    weights = {name: w for name, w in writer.manifest.weights.items() if w.dtype == dtype}
    return {
        "bundle": str(bundle),
        "model": source.name,
        "tokens": geometry.num_tokens,
        "weights": {name: asdict(record.file) for name, record in weights.items()},
        "engines": [{"name": engine.name, **asdict(engine)} for engine in engines],
        "reused": reused,
        "seconds": round(time.monotonic() - started, 2),
        "peak_rss_bytes": peak_rss(),
    }


def peak_rss() -> int:
    """Largest resident memory of this process and of any finished child, in bytes."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(w).ru_maxrss for w in who) * 1024


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _empty_manifest(source: ModelSource) -> Manifest:
    return Manifest(
        model=source.name,
        config=asdict(source.config),
        experts=source.experts,
        weights={},
        engines=(),
        wanexport=version("wanexport"),
    )


def add_weights(
    writer: BundleWriter, source: ModelSource, expert: str, dtype: str, progress: Progress
) -> list[str]:
    """Convert one expert's checkpoint, or return what is reused because the bundle holds it."""
    name = f"{expert}-{dtype}" if expert else dtype
    weights = source.weights[expert]

    def matches(record: WeightsRecord) -> bool:
        if record.source == source.record:  # the same files, untouched since
            return True
        progress(f"weights {name}: reading the checkpoint to compare", 0, 0)
        return record.key == _hash(weights.digest(), dtype, asdict(source.config))

    record = writer.find_weights(name, matches)
    if record:
        writer.put_weights(name, record)
        return [f"weights {name}"]
    path = writer.free_folder(Path("weights") / name) / WEIGHTS_FILE
    digest = write_weights(
        path,
        source.config,
        dtype,
        weights,
        lambda done, total: progress(f"weights {name}", done, total),
    )
    relative = path.relative_to(writer.path).as_posix()
    record = WeightsRecord(
        dtype=dtype,
        expert=expert,
        file=FileRecord(relative, path.stat().st_size, digest),
        header_sha256=header_sha256(path),
        key=_hash(weights.digest(), dtype, asdict(source.config)),
        source=source.record,
    )
    writer.put_weights(name, record)
    return []


def add_engine(
    writer: BundleWriter, source: ModelSource, request: Request, progress: Progress
) -> list[str]:
    """Compile and prove one engine, or return what is reused because the bundle holds it."""
    key = request.key()
    sets = {n: w for n, w in writer.manifest.weights.items() if w.dtype == request.dtype}
    proven = {name: record.key for name, record in sets.items()}
    engine = writer.find_engine(key, proven)
    if engine:
        writer.put_engine(engine)
        return [f"engine {engine.name}"]
    started = time.monotonic()
    progress(f"{request.label}: tracing and lowering", 0, 0)
    folder = writer.free_folder(Path("engines") / request.geometry.name / request.label)
    path = folder / "denoiser.onnx"
    header, entries = weights_layout(request.config, request.dtype)
    graph, counts = to_onnx.lower(request.config, request.geometry, request.dtype, entries)
    write_durably(path, to_onnx.serialize(graph))
    compiled = time.monotonic()
    progress(f"{request.label}: proving in a fresh process", 0, 0)
    files = {record.expert: writer.path / record.file.path for record in sets.values()}
    proof = prove(request, path, files, entries)
    build_record = {
        "seconds": round(compiled - started, 2),
        "proof_seconds": round(time.monotonic() - compiled, 2),
        "nodes": dict(sorted(to_onnx.node_counts(graph).items())),
        "flops_per_forward": model.forward_flops(request.config, request.geometry),
        **{library: version(library) for library in _GRAPH_LIBRARIES},
    }
    shapes = model.input_shapes(request.config, request.geometry)
    engine = EngineRecord(
        backend=request.backend,
        dtype=request.dtype,
        geometry=request.geometry,
        inputs={name: TensorSpec(shape) for name, shape in shapes.items()},
        output=TensorSpec(shapes["latent"]),
        sampling=_sampling(source, request.geometry),
        files={"denoiser": file_record(writer.path, path)},
        weights_header_sha256=hashlib.sha256(header).hexdigest(),
        key=key,
        target=onnx_engine.versions(),
        build=build_record,
        lint=counts,
        proof={**proof, "weights": proven},
    )
    writer.put_engine(engine)
    return []


def _sampling(source: ModelSource, geometry: Geometry) -> SamplingDefaults:
    """The official defaults, with the expert boundary that the checkpoint states, if it does."""
    defaults = sampling_defaults(source.config, source.experts, geometry)
    return defaults if source.boundary is None else replace(defaults, boundary=source.boundary)


def prove(
    request: Request, engine: Path, weights: dict[str, Path], entries: dict[str, TensorEntry]
) -> dict[str, Any]:
    """Lower the cut of the graph and hand it to a fresh process, with each expert's weights.

    Raises WanExportError when the proof fails.
    """
    config, dtype = request.config, request.dtype
    cut = cut_to_ends(config) if request.verify == "ends" else config
    small = request.geometry.reduced(MAX_TOKENS)
    tensors = tensors_of_cut(list(model.parameter_shapes(cut)), config)
    runs_here = dtype in RUNNABLE_DTYPES
    with tempfile.TemporaryDirectory(prefix="wanexport-proof-") as name:
        folder = Path(name)
        if runs_here:
            layout = {parameter: entries[tensor] for parameter, tensor in tensors.items()}
        else:
            dtype, layout = "fp32", weights_layout(cut, "fp32")[1]
            for expert, file in weights.items():
                twin = {n: SourceTensor(file, entries[t]) for n, t in tensors.items()}
                (folder / f"twin-{expert}").mkdir()
                path = folder / f"twin-{expert}" / WEIGHTS_FILE
                write_weights(path, cut, "fp32", CheckpointWeights(twin))
        graph, _ = to_onnx.lower(cut, small, dtype, layout)
        (folder / "cut.onnx").write_bytes(to_onnx.serialize(graph))
        job = Job(
            engine=str(engine.resolve()),
            engine_runs_here=runs_here,
            cut=str(folder / "cut.onnx"),
            dtype=request.dtype,
            config=asdict(cut),
            geometry=asdict(small),
            weights={expert: str(file.resolve().parent) for expert, file in weights.items()},
            tensors=tensors,
        )
        return run_in_fresh_process(job, folder)
