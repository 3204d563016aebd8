"""`wanexport build`: the weights, then each engine with its proof, then the manifest."""

import hashlib
import inspect
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from wanexport.exporter import onnx_lint, to_onnx, trace
from wanexport.exporter.bundle import BundleWriter, open_bundle
from wanexport.exporter.model_source import ModelSource, resolve
from wanexport.exporter.proof import prove
from wanexport.graphs import config as graph_config
from wanexport.graphs import lint, model, rope, signature
from wanexport.graphs.config import WanConfig, sampling_defaults
from wanexport.graphs.weights import DTYPES, weights_layout, write_weights
from wanexport.runtime import attention, onnx_engine
from wanexport.runtime import geometry as geometry_module
from wanexport.runtime.durable import write_durably
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.geometry import Geometry, parse_resolution
from wanexport.runtime.load import WEIGHTS_FILE
from wanexport.runtime.manifest import (
    EngineRecord,
    FileRecord,
    Manifest,
    SamplingDefaults,
    TensorSpec,
    WeightsRecord,
    file_record,
)
from wanexport.runtime.memory import peak_rss
from wanexport.runtime.tensorfile import header_sha256

_GRAPH_CODE = (
    graph_config,
    model,
    rope,
    signature,
    lint,
    onnx_lint,
    attention,
    geometry_module,
    trace,
    to_onnx,
)
_GRAPH_LIBRARIES = ("torch", "onnx", "onnx-ir", "onnxscript")

CHOICES = {"backends": ("onnx",), "dtype": tuple(DTYPES), "verify": ("ends", "full")}

Progress = Callable[[str, int, int], None]  # stage, done, total (0 when the length is unknown)


@dataclass(frozen=True)
class Request:
    """One engine to build."""

    config: WanConfig
    geometry: Geometry
    sampling: SamplingDefaults
    backend: str
    dtype: str

    @property
    def label(self) -> str:
        """Folder name, and prefix of progress messages."""
        return f"{self.backend}-{self.dtype}"

    @property
    def weights_header(self) -> str:
        """Hash of the header of the weights file that the engine reads."""
        return hashlib.sha256(weights_layout(self.config, self.dtype)[0]).hexdigest()

    def key(self) -> str:
        """Hash of all that decides the engine's bytes and record; the weights are not among it."""
        code = [inspect.getsource(module) for module in _GRAPH_CODE]
        libraries = {name: version(name) for name in _GRAPH_LIBRARIES}
        parts = [asdict(self), self.weights_header, code, libraries]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def build(
    model: str | Path | None = None,
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
    _check_choices(backends=backends, dtype=[dtype], verify=[verify])
    height, width = parse_resolution(resolution)
    onnx_engine.versions()  # fail before the work when the proof could not run
    progress("checkpoint", 0, 0)
    source = resolve(None if model is None else str(model), random_weights)
    geometry = Geometry(height, width, frames, source.config.spatial_stride)
    bundle = Path(output) if output is not None else Path(source.name)
    reused: list[str] = []
    with open_bundle(bundle, _empty_manifest(source)) as writer:
        for expert in source.weights:
            reused += add_weights(writer, source, expert, dtype, progress)
        for backend in dict.fromkeys(backends):
            sampling = _sampling(source, geometry)
            request = Request(source.config, geometry, sampling, backend, dtype)
            reused += add_engine(writer, request, verify, progress)
        writer.commit()
    return {
        **_summary(writer, geometry, dtype),
        "reused": reused,
        "seconds": round(time.monotonic() - started, 2),
        "peak_rss_bytes": peak_rss(),
    }


def _check_choices(**chosen: Sequence[str]) -> None:
    for name, values in chosen.items():
        if not values:
            raise WanExportError(f"no {name}: expected of {', '.join(CHOICES[name])}")
        for value in values:
            if value not in CHOICES[name]:
                expected = ", ".join(CHOICES[name])
                raise WanExportError(f"unknown {name} {value!r}: expected of {expected}")


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
    """Convert one expert's checkpoint, or return what is reused because the bundle holds it.

    Raises WanExportError when the bundle holds other weights: it is of one model.
    """
    name = f"{expert}-{dtype}" if expert else dtype
    weights = source.weights[expert]
    for known_name, known in writer.known_weights().items():
        if known.expert == expert and known.source != source.record:
            progress(f"weights {name}: reading the checkpoint to compare", 0, 0)
            if known.content != weights.digest():
                if known_name not in writer.committed.weights:
                    writer.forget_weights(known_name)
                    continue
                origins = [known.source[k] for k in ("hub", "path", "preset") if k in known.source]
                origin = origins[0] if origins else "another source"
                raise WanExportError(
                    f"{writer.path} holds other weights, of {origin}: "
                    f"name another folder with -o, or delete it"
                )
    header, _ = weights_layout(source.config, dtype)
    record = writer.find_weights(name, hashlib.sha256(header).hexdigest())
    reused = [f"weights {name}"] if record else []
    record = record or convert_weights(writer, source, expert, name, dtype, progress)
    writer.put_weights(name, record)
    return reused


def convert_weights(
    writer: BundleWriter,
    source: ModelSource,
    expert: str,
    name: str,
    dtype: str,
    progress: Progress,
) -> WeightsRecord:
    """Write the weights set `name` and return its record."""
    path = writer.free_folder(Path("weights") / name) / WEIGHTS_FILE
    _check_disk(path.parent, source.config, dtype)
    weights = source.weights[expert]

    def show(done: int, total: int) -> None:
        progress(f"weights {name}", done, total)

    sha256 = write_weights(path, source.config, dtype, weights, show)
    relative = path.relative_to(writer.path).as_posix()
    return WeightsRecord(
        dtype=dtype,
        expert=expert,
        file=FileRecord(relative, path.stat().st_size, sha256),
        header_sha256=header_sha256(path),
        content=weights.digest(),
        source=source.record,
    )


def _check_disk(folder: Path, config: WanConfig, dtype: str) -> None:
    """Refuse a conversion that would end in a full disk after minutes."""
    _, entries = weights_layout(config, dtype)
    needed, free = sum(e.size for e in entries.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise WanExportError(
            f"{folder} needs {needed / 1e9:.2f} GB for weights, its disk has {free / 1e9:.2f} GB "
            f"free: name a folder elsewhere with -o"
        )


def add_engine(
    writer: BundleWriter, request: Request, verify: str, progress: Progress
) -> list[str]:
    """Compile and prove one engine, or return what is reused because the bundle holds it."""
    engine = writer.find_engine(request.key())
    if engine and engine.proof.get("verify") in (verify, "full"):
        if engine.target == onnx_engine.versions():
            writer.put_engine(engine)
            return [f"engine {engine.name}"]
    if engine is None:
        progress(f"{request.label}: tracing and lowering", 0, 0)
        engine = compile_engine(writer, request)
    progress(f"{request.label}: proving in a fresh process", 0, 0)
    proof = prove(
        request.config,
        request.geometry,
        request.dtype,
        verify=verify,
        engine=writer.path / engine.files["denoiser"].path,
        weights=[writer.path / w.file.path for w in writer.manifest.weights_of(request.dtype)],
    )
    writer.put_engine(replace(engine, proof=proof, target=onnx_engine.versions()))
    return []


def compile_engine(writer: BundleWriter, request: Request) -> EngineRecord:
    """Write the engine's file and return its record, which has no proof yet."""
    started = time.monotonic()
    config, geometry = request.config, request.geometry
    folder = writer.free_folder(Path("engines") / geometry.name / request.label)
    path = folder / "denoiser.onnx"
    _, entries = weights_layout(config, request.dtype)
    graph, counts = to_onnx.lower(config, geometry, request.dtype, entries)
    write_durably(path, to_onnx.serialize(graph))
    shapes = signature.input_shapes(config, geometry)
    return EngineRecord(
        backend=request.backend,
        dtype=request.dtype,
        geometry=geometry,
        inputs={name: TensorSpec(shape) for name, shape in shapes.items()},
        output=TensorSpec(shapes["latent"]),
        sampling=request.sampling,
        files={"denoiser": file_record(writer.path, path)},
        weights_header_sha256=request.weights_header,
        key=request.key(),
        target={},
        build={
            "seconds": round(time.monotonic() - started, 2),
            "nodes": dict(sorted(to_onnx.node_counts(graph).items())),
            "flops_per_forward": signature.forward_flops(config, geometry),
            "attention_score_bytes": signature.attention_score_bytes(config, geometry),
            **{library: version(library) for library in _GRAPH_LIBRARIES},
        },
        lint=counts,
    )


def _sampling(source: ModelSource, geometry: Geometry) -> SamplingDefaults:
    """The official defaults, with the expert boundary that the checkpoint states, if it does."""
    defaults = sampling_defaults(source.config, source.experts, geometry)
    return defaults if source.boundary is None else replace(defaults, boundary=source.boundary)
