"""`wanexport build`: the weights, then each engine with its proof, then the manifest."""

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from wanexport.exporter.backends.backend import Progress, Request, TensorRtOptions
from wanexport.exporter.backends.table import BACKENDS
from wanexport.exporter.bundle.place import check_place
from wanexport.exporter.bundle.writer import BundleWriter, file_record, open_bundle
from wanexport.exporter.child.process import missing_name
from wanexport.exporter.key import engine_key
from wanexport.exporter.model_source import ModelSource, resolve
from wanexport.graphs.config import sampling_defaults
from wanexport.graphs.signature import forward_flops
from wanexport.graphs.weights import DTYPES, write_weights
from wanexport.runtime.bundle import signature
from wanexport.runtime.bundle.manifest import (
    EngineRecord,
    FileRecord,
    Manifest,
    SamplingDefaults,
    TensorSpec,
    WeightsRecord,
)
from wanexport.runtime.bundle.signature import weights_header_sha256, weights_layout
from wanexport.runtime.bundle.tensorfile import header_sha256
from wanexport.runtime.engines.choose import DEVICES
from wanexport.runtime.engines.onnx_providers import gpu_obstacle
from wanexport.runtime.engines.tensorrt_library import FLAVOURS
from wanexport.runtime.errors import WanExportError, refuse_empty
from wanexport.runtime.geometry import Geometry, parse_resolution
from wanexport.runtime.load import WEIGHTS_FILE
from wanexport.runtime.machine.memory import peak_rss
from wanexport.runtime.machine.temporary import check_temporary_folder
from wanexport.runtime.wan_config import WanConfig

_NO_KEY = "0" * 64  # of an engine that no later build may take for its own
CHOICES = {
    "backends": tuple(BACKENDS),
    "dtype": tuple(DTYPES),
    "device": DEVICES,
    "verify": ("ends", "full"),
}


def build(
    model: str | Path | None = None,
    *,
    resolution: str,
    frames: int,
    output: str | Path | None = None,
    backends: Sequence[str] | None = None,
    dtype: str | None = None,
    device: str | None = None,
    attention: str | None = None,
    tensorrt: TensorRtOptions | None = None,
    random_weights: int | None = None,
    expert_alone: bool = False,
    verify: str = "ends",
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Build a bundle, or add to one, and return the record of what was done.

    model is a folder, a hub id, or with random_weights (a seed) a preset; resolution is `480x832`
    or `832*480`; dtype is fp32, bf16 or fp16; output defaults to ./<model>; verify is `ends` (the
    proof runs the first and last block) or `full` (all of them). On a machine with a GPU the
    defaults are the aoti backend, device cuda and bf16, elsewhere onnx, cpu and fp32; TensorRT's
    engines are bf16 everywhere. The device of an onnx engine is what proves it: by default a GPU
    where ONNX Runtime can use one. attention names the kernel of self-attention in an aoti engine,
    by default the fastest measured, and in the others whether it stays one operator, in onnx also
    which (`native`, or on a GPU by default `mha`). expert_alone builds one expert of an A14B as a
    model by itself, which is refused without.
    Raises WanExportError for whatever the caller can put right.
    """
    refuse_empty(model=model, output=output, resolution=resolution)
    started = time.monotonic()
    os.environ.update(missing_name())
    if backends is None:
        on_gpu = device == "cuda" or (device is None and _has_gpu())
        backends = ("aoti" if on_gpu else "onnx",)
    devices = {name: device or _default_device(name) for name in backends}
    dtype = dtype or _default_dtype(devices)
    chosen = sorted(set(devices.values()))
    _check_choices(backends=backends, dtype=[dtype], device=chosen, verify=[verify])
    for name in backends:
        _check_attention(name, attention)
    options = tensorrt or TensorRtOptions()
    _check_has_tensorrt(backends, options)
    height, width = parse_resolution(resolution)
    Geometry(height, width, frames)  # refuses what no Wan takes, before a checkpoint is downloaded
    check_temporary_folder(compiles="aoti" in backends)
    if output is not None:  # before a checkpoint is downloaded for it
        check_place(Path(output))
    # Fail before the work when an engine could not be made or proven here.
    targets = [
        (name, target)
        for name in dict.fromkeys(backends)
        for target in BACKENDS[name].targets(devices[name], options)
    ]
    for name, target in targets:
        BACKENDS[name].check_attention(attention, dtype, target)
    progress("checkpoint", 0, 0)
    named = None if model is None else str(model)
    source = resolve(named, random_weights, expert_alone=expert_alone)
    if expert_alone and source.experts:
        raise WanExportError(
            f"{named} has both experts: leave out --expert-alone, or pass -m the folder of one"
        )
    geometry = Geometry(height, width, frames, source.config.spatial_stride)
    bundle = Path(output) if output is not None else Path(source.name)
    sampling = _sampling(source, geometry)
    reused: list[str] = []
    names = []
    with open_bundle(bundle, _empty_manifest(source)) as writer:
        for expert in source.weights:
            reused += add_weights(writer, source, expert, dtype, progress)
        for name, target in targets:
            request = Request(source.config, geometry, sampling, name, dtype, target, attention)
            if name in FLAVOURS:
                own = replace(options, targets=())  # a plan is for one, whatever else is built
                request = replace(request, tensorrt=own, baked=_baked(writer, dtype, options))
            reused += add_engine(writer, request, verify, progress)
            names.append(f"{geometry.name}/{request.label}")
        writer.commit()
    return {
        **_summary(writer, geometry, dtype, names),
        "reused": reused,
        "seconds": round(time.monotonic() - started, 2),
        "peak_rss_bytes": peak_rss(),
    }


def _has_gpu() -> bool:
    if find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def _default_device(backend: str) -> str:
    """A GPU where the backend can use one."""
    if backend == "onnx":  # which this machine may have for a CPU only
        return "cpu" if gpu_obstacle() else "cuda"
    return "cuda" if _has_gpu() else "cpu"


def _default_dtype(devices: Mapping[str, str]) -> str:
    """The precision for the devices of these backends."""
    if FLAVOURS.keys() & devices.keys():
        return "bf16"
    return "bf16" if "cuda" in devices.values() else "fp32"


def _check_attention(backend: str, attention: str | None) -> None:
    choices = BACKENDS[backend].ATTENTION
    if attention is not None and attention not in choices:
        expected = f"expected of {', '.join(choices)}" if choices else "leave it out"
        raise WanExportError(f"backend {backend} has no attention {attention!r}: {expected}")


def _check_has_tensorrt(backends: Sequence[str], options: TensorRtOptions) -> None:
    """Refuse options that nothing in the build would take."""
    given = [f.name for f in fields(options) if getattr(options, f.name) != f.default]
    if given and not FLAVOURS.keys() & set(backends):
        raise WanExportError(
            f"{', '.join(given).replace('_', ' ')}: only TensorRT takes this; leave it out, or add "
            f"--backend tensorrt-rtx or tensorrt"
        )


def _baked(writer: BundleWriter, dtype: str, options: TensorRtOptions) -> dict[str, str]:
    """The hash of each expert's weights where they go into the engine."""
    sets = writer.manifest.weights_of(dtype) if options.bake_weights else []
    return {record.expert: record.file.sha256 for record in sets}


def _check_choices(**chosen: Sequence[str]) -> None:
    for name, values in chosen.items():
        if not values:
            raise WanExportError(f"no {name}: expected of {', '.join(CHOICES[name])}")
        for value in values:
            if value not in CHOICES[name]:
                expected = ", ".join(CHOICES[name])
                raise WanExportError(f"unknown {name} {value!r}: expected of {expected}")


def _summary(
    writer: BundleWriter, geometry: Geometry, dtype: str, names: Sequence[str]
) -> dict[str, Any]:
    """The part of the record that says what the bundle holds of what was asked: these engines."""
    manifest = writer.manifest
    weights = {name: asdict(w.file) for name, w in manifest.weights.items() if w.dtype == dtype}
    engines = [engine for engine in manifest.engines if engine.name in names]
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
        config=source.config,
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
                    f"{writer.path} holds other weights, of {origin}: name another folder with -o"
                )
    record = writer.find_weights(name, weights_header_sha256(source.config, dtype))
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
    engine = writer.find_engine(engine_key(request))
    if engine and engine.proof.get("verify") in (verify, "full"):
        if engine.target == request.target:
            writer.put_engine(engine)
            return [f"engine {engine.name}"]
    backend = BACKENDS[request.backend]
    if engine is None:
        engine = compile_engine(writer, request, progress)
    progress(f"{request.label}: proving in a fresh process", 0, 0)
    weights = list(_weights_files(writer, request.dtype).values())
    proof = backend.prove(request, engine, writer.path, weights, verify)
    writer.put_engine(replace(engine, proof=proof, target=request.target))
    return []


def _weights_files(writer: BundleWriter, dtype: str) -> dict[str, Path]:
    return {w.expert: writer.path / w.file.path for w in writer.manifest.weights_of(dtype)}


def compile_engine(writer: BundleWriter, request: Request, progress: Progress) -> EngineRecord:
    """Write the engine's files and return its record, which has no proof yet."""
    started = time.monotonic()
    config, geometry, backend = request.config, request.geometry, BACKENDS[request.backend]
    folder = writer.free_folder(Path("engines") / geometry.name / request.label)
    weights = _weights_files(writer, request.dtype)
    compiled = backend.compile_engine(folder, request, weights, progress)
    shapes = signature.input_shapes(config, geometry)
    return EngineRecord(
        backend=request.backend,
        dtype=request.dtype,
        geometry=geometry,
        inputs={name: TensorSpec(shape) for name, shape in shapes.items()},
        output=TensorSpec(shapes["latent"]),
        sampling=request.sampling,
        files={role: file_record(writer.path, path) for role, path in compiled.files.items()},
        weights_header_sha256=request.weights_header,
        key=engine_key(request) if compiled.is_whole else _NO_KEY,
        target=request.target,
        parameters=compiled.parameters,
        attention=compiled.attention,
        build={
            "seconds": round(time.monotonic() - started, 2),
            "flops_per_forward": forward_flops(config, geometry),
            **compiled.build,
            **backend.libraries(request),
        },
        lint=compiled.lint,
    )


def _sampling(source: ModelSource, geometry: Geometry) -> SamplingDefaults:
    """The official defaults, with the expert boundary that the checkpoint states, if it does."""
    defaults = sampling_defaults(source.config, source.experts, geometry)
    return defaults if source.boundary is None else replace(defaults, boundary=source.boundary)
