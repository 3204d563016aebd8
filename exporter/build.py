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
from wanexport.graphs import lint, model, rope, signature
from wanexport.graphs.checkpoint import SourceTensor
from wanexport.graphs.config import WanConfig, sampling_defaults
from wanexport.graphs.weights import CheckpointWeights, weights_layout, write_weights
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
from wanexport.runtime.tensorfile import header_sha256

_GRAPH_CODE = (graph_config, model, rope, signature, lint, attention, trace, to_onnx)
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
    return {
        **_summary(writer, geometry, dtype),
        "reused": reused,
        "seconds": round(time.monotonic() - started, 2),
        "peak_rss_bytes": peak_rss(),
    }


def _summary(writer: BundleWriter, geometry: Geometry, dtype: str) -> dict[str, Any]:
    """The part of the record that says what the bundle holds for this request."""
    manifest = writer.manifest
    weights = {name: asdict(w.file) for name, w in manifest.weights.items() if w.dtype == dtype}
    engines = [e for e in manifest.engines if e.geometry == geometry and e.dtype == dtype]
    return {
        "bundle": str(writer.path),
        "model": manifest.model,
        "tokens": geometry.num_tokens,
        "weights": weights,
        "engines": [{"name": engine.name, **asdict(engine)} for engine in engines],
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
    sets = {n: w for n, w in writer.manifest.weights.items() if w.dtype == request.dtype}
    proven_with = {name: record.key for name, record in sets.items()}
    engine = writer.find_engine(request.key(), proven_with)
    if engine:
        writer.put_engine(engine)
        return [f"engine {engine.name}"]
    progress(f"{request.label}: tracing and lowering", 0, 0)
    engine = compile_engine(writer, source, request)
    progress(f"{request.label}: proving in a fresh process", 0, 0)
    started = time.monotonic()
    files = {record.expert: writer.path / record.file.path for record in sets.values()}
    proof = prove(request, writer.path / engine.files["denoiser"].path, files)
    seconds = round(time.monotonic() - started, 2)
    proof |= {"weights": proven_with, "seconds": seconds}
    writer.put_engine(replace(engine, proof=proof))
    return []


def compile_engine(writer: BundleWriter, source: ModelSource, request: Request) -> EngineRecord:
    """Write the engine's file and return its record, which has no proof yet."""
    started = time.monotonic()
    config, geometry = request.config, request.geometry
    folder = writer.free_folder(Path("engines") / geometry.name / request.label)
    path = folder / "denoiser.onnx"
    header, entries = weights_layout(config, request.dtype)
    graph, counts = to_onnx.lower(config, geometry, request.dtype, entries)
    write_durably(path, to_onnx.serialize(graph))
    shapes = signature.input_shapes(config, geometry)
    return EngineRecord(
        backend=request.backend,
        dtype=request.dtype,
        geometry=geometry,
        inputs={name: TensorSpec(shape) for name, shape in shapes.items()},
        output=TensorSpec(shapes["latent"]),
        sampling=_sampling(source, geometry),
        files={"denoiser": file_record(writer.path, path)},
        weights_header_sha256=hashlib.sha256(header).hexdigest(),
        key=request.key(),
        target=onnx_engine.versions(),
        build={
            "seconds": round(time.monotonic() - started, 2),
            "nodes": dict(sorted(to_onnx.node_counts(graph).items())),
            "flops_per_forward": signature.forward_flops(config, geometry),
            **{library: version(library) for library in _GRAPH_LIBRARIES},
        },
        lint=counts,
    )


def _sampling(source: ModelSource, geometry: Geometry) -> SamplingDefaults:
    """The official defaults, with the expert boundary that the checkpoint states, if it does."""
    defaults = sampling_defaults(source.config, source.experts, geometry)
    return defaults if source.boundary is None else replace(defaults, boundary=source.boundary)


def prove(request: Request, engine: Path, weights: dict[str, Path]) -> dict[str, Any]:
    """Lower the cut of the graph and hand it to a fresh process, with each expert's weights.

    Raises WanExportError when the proof fails.
    """
    config, dtype = request.config, request.dtype
    cut = cut_to_ends(config) if request.verify == "ends" else config
    small = request.geometry.reduced(MAX_TOKENS)
    tensors = tensors_of_cut(list(signature.parameter_shapes(cut)), config)
    entries = weights_layout(config, dtype)[1]
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
