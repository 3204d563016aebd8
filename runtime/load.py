"""Open a bundle: choose the engine, check its files, attach the weights."""

import importlib.util
import os
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.errors import WanExportError, WanExportWarning
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
BACKENDS = ("onnx", "aoti")
DEVICES = ("cpu", "cuda")
KERNELS = ("fa4", "cudnn", "sdpa")  # of attention in AOTInductor engines
RUNNABLE_DTYPES = ("fp16", "fp32")  # what ONNX Runtime executes on a CPU
# The fastest on a GPU, on a CPU the exact one, and of two exact ones the one that maps its weights.
_PREFERENCE = [
    *(("aoti", "cuda", dtype) for dtype in ("bf16", "fp16", "fp32")),
    *(("onnx", "cpu", dtype) for dtype in ("fp32", "fp16")),
    *(("aoti", "cpu", dtype) for dtype in ("fp32", "bf16", "fp16")),
]


def load(
    bundle: str | Path,
    *,
    backend: str | None = None,
    device: str | None = None,
    resolution: str | None = None,
    frames: int | None = None,
    dtype: str | None = None,
    weights: str | Path | None = None,
    attention: str | None = None,
    offload: bool = False,
    cuda_graph: bool | None = None,
) -> Denoiser:
    """Open the engine of a bundle that fits; what is None is free.

    resolution is `480x832` or `832*480`; device is `cpu` or `cuda`; weights is a folder with other
    weights of the same layout (a fine-tune or merged LoRA): `denoiser.safetensors`, or one in each
    of `high_noise/` and `low_noise/` where the model has two experts.

    For AOTInductor engines: attention is the kernel of self-attention (`fa4`, `cudnn` or `sdpa`) in
    place of the recorded one; offload keeps one of two experts on the device and replaces its
    weights at the switch; cuda_graph is whether to replay a captured graph, by default where
    launching takes as long as running. Weights already on the device are shared.
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
            return open_engine(
                bundle,
                manifest,
                engine,
                weights,
                attention=attention,
                offload=offload,
                cuda_graph=cuda_graph,
            )
        except WanExportError:
            if read_manifest(bundle) == manifest:
                raise
            # A build replaced the bundle between the two: what it removed is not missing.


def open_engine(
    bundle: Path,
    manifest: Manifest,
    engine: EngineRecord,
    weights: str | Path | None = None,
    *,
    attention: str | None = None,
    offload: bool = False,
    cuda_graph: bool | None = None,
) -> Denoiser:
    """Open one engine of a manifest, with the bundle's weights or those of a folder.

    Raises WanExportError when a file is missing or was altered, or the backend refuses it.
    """
    # Engines are code: their whole content is checked at every load.
    files = {role: check_content(bundle, file) for role, file in engine.files.items()}
    folders = weights_folders(bundle, manifest, engine, weights)
    if engine.backend == "aoti":
        paths = {expert: folder / WEIGHTS_FILE for expert, folder in folders.items()}
        layers = int(manifest.config["num_layers"])
        return _open_aoti(
            engine,
            files,
            paths,
            layers,
            attention=attention,
            offload=offload,
            cuda_graph=cuda_graph,
        )
    if attention or offload or cuda_graph is not None:
        raise WanExportError(
            f"engine {engine.name} chooses no attention kernel, offloads nothing and has no CUDA "
            f"graph: these are options of --backend aoti"
        )
    graph = files["denoiser"]
    return Denoiser(engine, {expert: OnnxEngine(graph, f) for expert, f in folders.items()})


def _open_aoti(
    engine: EngineRecord,
    files: Mapping[str, Path],
    weights: Mapping[str, Path],
    num_layers: int,
    *,
    attention: str | None,
    offload: bool,
    cuda_graph: bool | None,
) -> Denoiser:
    import torch

    from wanexport.runtime import aoti_engine
    from wanexport.runtime.device_weights import device_weights

    if offload and len(weights) < 2:
        raise WanExportError("offload swaps two experts, this model has one: leave it out")
    if attention not in (None, *KERNELS):
        raise WanExportError(f"unknown kernel {attention!r}: expected one of {', '.join(KERNELS)}")
    device = torch.device("cpu")
    if engine.target["device"] == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    kernels = _attention_kernels(engine, files, attention)
    regions = aoti_engine.Regions(files, engine.parameters, num_layers, kernels, device)
    shapes = {name: spec.shape for name, spec in engine.inputs.items()}
    first, engines = None, {}
    for expert, path in weights.items():
        held = first if first and offload else device_weights(path, device, private=offload)
        first = first or held
        engines[expert] = aoti_engine.AotiEngine(regions, held, path, shapes, cuda_graph=cuda_graph)
    return Denoiser(engine, engines, partial(aoti_engine.to_device, device=device))


def _attention_kernels(
    engine: EngineRecord, files: Mapping[str, Path], chosen: str | None
) -> dict[int, Any]:
    """The kernel for each number of keys; one that cannot be had here is replaced aloud."""
    from wanexport.runtime.operators import open_kernel

    library = files.get("flash_attention")
    fallback = "cudnn" if engine.target["device"] == "cuda" else "sdpa"
    kernels = {}
    for keys, recorded in engine.attention.items():
        is_self = int(keys) == engine.geometry.num_tokens
        if chosen and is_self:
            kernels[int(keys)] = open_kernel(chosen, library)
            continue
        try:
            kernels[int(keys)] = open_kernel(recorded, library)
        except WanExportError as error:
            warnings.warn(
                f"attention runs on {fallback} instead of {recorded}, which is slower: {error}",
                WanExportWarning,
                stacklevel=2,
            )
            kernels[int(keys)] = open_kernel(fallback, library)
    return kernels


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
    for what, value, known in (("device", device, DEVICES), ("backend", backend, BACKENDS)):
        if value not in (None, *known):
            raise WanExportError(f"unknown {what} {value!r}: expected one of {', '.join(known)}")
    size = None if resolution is None else parse_resolution(resolution)
    fitting = [
        engine
        for engine in manifest.engines
        if engine.backend in BACKENDS
        and backend in (None, engine.backend)
        and device in (None, engine.target.get("device"))
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
    refusals = {engine.name: _refusal(bundle, engine) for engine in fitting}
    runnable = [engine for engine in fitting if not refusals[engine.name]]
    if not runnable:
        raise WanExportError(refusals[fitting[0].name])
    if len({engine.geometry for engine in runnable}) > 1:
        raise WanExportError(f"{bundle} holds several shapes ({held}): name resolution and frames")
    return min(runnable, key=_preference)


def _preference(engine: EngineRecord) -> int:
    return _PREFERENCE.index((engine.backend, engine.target["device"], engine.dtype))


def _refusal(bundle: Path, engine: EngineRecord) -> str:
    """Why this machine cannot execute the engine; empty when it can."""
    if engine.backend == "onnx":
        if engine.dtype in RUNNABLE_DTYPES:
            return ""
        return (
            f"engine {engine.name} is {engine.dtype}, which ONNX Runtime cannot execute "
            f"on a CPU: add an engine with wanexport build --dtype fp32"
        )
    if importlib.util.find_spec("torch") is None:
        wanted = engine.target["torch"].partition("+")[0]
        return f"engine {engine.name} needs PyTorch: pip install torch=={wanted}"
    from wanexport.runtime import aoti_engine

    try:
        here = aoti_engine.versions(engine.target["device"])
    except WanExportError as error:
        return f"engine {engine.name} is for a GPU: {error}"
    differing = [name for name in aoti_engine.BINDING if here.get(name) != engine.target.get(name)]
    if not differing:
        return ""
    found = "; ".join(f"{n} {engine.target.get(n)}, here {here.get(n)}" for n in differing)
    size = f"{engine.geometry.height}x{engine.geometry.width}"
    return (
        f"engine {engine.name} was compiled for {found}: build it here with wanexport build "
        f"--backend aoti --resolution {size} --frames {engine.geometry.frames} -o {bundle}"
    )


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
