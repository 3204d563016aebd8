"""Open a bundle: choose the engine, check its files, attach the weights."""

import os
from collections.abc import Callable
from pathlib import Path

from wanexport.runtime.denoiser import Denoiser, Engine
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.geometry import parse_resolution
from wanexport.runtime.manifest import (
    EngineRecord,
    Manifest,
    WeightsRecord,
    check_content,
    check_weights,
    read_manifest,
)
from wanexport.runtime.onnx_engine import OnnxEngine
from wanexport.runtime.tensorfile import header_sha256, read_header

WEIGHTS_FILE = "denoiser.safetensors"


def _open_onnx(files: dict[str, Path], weights_folder: Path) -> Engine:
    return OnnxEngine(files["denoiser"], weights_folder)


ENGINES: dict[str, Callable[[dict[str, Path], Path], Engine]] = {"onnx": _open_onnx}
RUNNABLE_DTYPES = ("fp16", "fp32")  # what ONNX Runtime executes on a CPU, the exact one last


def load(
    bundle: str | Path,
    *,
    backend: str | None = None,
    device: str | None = None,
    resolution: str | None = None,
    frames: int | None = None,
    dtype: str | None = None,
    weights: str | Path | None = None,
) -> Denoiser:
    """Open the engine of a bundle that fits; what is None is free.

    resolution is `480x832` or `832*480`; device is `cpu`; weights is a folder with other weights of
    the same layout (a fine-tune or merged LoRA): `denoiser.safetensors`, or one in each of
    `high_noise/` and `low_noise/` where the model has two experts.
    Raises WanExportError when nothing or more than one shape fits, when a file is missing or was
    altered, or when this machine cannot execute the engine.
    """
    bundle = Path(bundle)
    while True:
        manifest = read_manifest(bundle)
        engine = choose_engine(
            bundle,
            manifest,
            backend=backend,
            device=device,
            resolution=resolution,
            frames=frames,
            dtype=dtype,
        )
        try:
            return open_engine(bundle, manifest, engine, weights)
        except WanExportError:
            if read_manifest(bundle) == manifest:
                raise
            # A build replaced the bundle between the two: what it removed is not missing.


def open_engine(
    bundle: Path, manifest: Manifest, engine: EngineRecord, weights: str | Path | None = None
) -> Denoiser:
    """Open one engine of a manifest, with the bundle's weights or those of a folder.

    Raises WanExportError when a file is missing or was altered, or the backend refuses it.
    """
    # Engines are code: their whole content is checked at every load.
    files = {role: check_content(bundle, file) for role, file in engine.files.items()}
    folders = weights_folders(bundle, manifest, engine, weights)
    return Denoiser(
        engine, {expert: ENGINES[engine.backend](files, f) for expert, f in folders.items()}
    )


def choose_engine(
    bundle: Path,
    manifest: Manifest,
    *,
    backend: str | None = None,
    device: str | None = None,
    resolution: str | None = None,
    frames: int | None = None,
    dtype: str | None = None,
) -> EngineRecord:
    """The engine that fits and runs here.

    Raises WanExportError when there is none, or when engines of several shapes fit.
    """
    if device not in (None, "cpu"):
        raise WanExportError(f"device {device!r} is not served: the onnx backend runs on cpu")
    if backend not in (None, *ENGINES):
        raise WanExportError(f"unknown backend {backend!r}: expected one of {', '.join(ENGINES)}")
    size = None if resolution is None else parse_resolution(resolution)
    fitting = [
        engine
        for engine in manifest.engines
        if engine.backend in ENGINES
        and backend in (None, engine.backend)
        and dtype in (None, engine.dtype)
        and frames in (None, engine.geometry.frames)
        and size in (None, (engine.geometry.height, engine.geometry.width))
    ]
    held = ", ".join(engine.name for engine in manifest.engines)
    if not fitting:
        raise WanExportError(
            f"{bundle} has no such engine; it holds {held}: "
            f"choose one, or add yours with wanexport build"
        )
    runnable = [engine for engine in fitting if engine.dtype in RUNNABLE_DTYPES]
    if not runnable:
        raise WanExportError(
            f"engine {fitting[0].name} is {fitting[0].dtype}, which ONNX Runtime cannot execute "
            f"on a CPU: add an engine with wanexport build --dtype fp32"
        )
    if len({engine.geometry for engine in runnable}) > 1:
        raise WanExportError(f"{bundle} holds several shapes ({held}): name resolution and frames")
    return max(runnable, key=lambda engine: RUNNABLE_DTYPES.index(engine.dtype))


def weights_folders(
    bundle: Path, manifest: Manifest, engine: EngineRecord, weights: str | Path | None
) -> dict[str, Path]:
    """Folder of the weights for each expert, checked against the engine.

    Raises WanExportError when they are missing or laid out for another engine.
    """
    sets = manifest.weights_of(engine.dtype)
    if weights is None:
        return {record.expert: _folder(bundle, record, engine) for record in sets}
    folders = {record.expert: Path(weights) / record.expert for record in sets}
    for folder in folders.values():
        path = folder / WEIGHTS_FILE
        if not os.path.isfile(path):  # unlike Path's, it is False for a name that is too long
            raise WanExportError(
                f"weights folder {folder} has no {WEIGHTS_FILE}: name one that has"
            )
        read_header(path)  # refuses a file that was cut short
        _check_header(path, header_sha256(path), engine)
    return folders


def _folder(bundle: Path, record: WeightsRecord, engine: EngineRecord) -> Path:
    path = check_weights(bundle, record)
    _check_header(path, record.header_sha256, engine)
    return path.parent


def _check_header(path: Path, found: str, engine: EngineRecord) -> None:
    if found != engine.weights_header_sha256:
        raise WanExportError(
            f"{path} is laid out for another engine: its header hash is {found[:12]}, engine "
            f"{engine.name} needs {engine.weights_header_sha256[:12]}; run wanexport build again"
        )
