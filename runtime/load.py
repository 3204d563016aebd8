"""Open an engine of a bundle: check its files, attach the weights."""

import os
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from wanexport.runtime.bundle.check import check_content, check_weights
from wanexport.runtime.bundle.manifest import EngineRecord, Manifest, WeightsRecord, read_manifest
from wanexport.runtime.bundle.pinned_file import PinnedFile, pin
from wanexport.runtime.bundle.tensorfile import header_sha256, read_header
from wanexport.runtime.bundle.usable import check_usable
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.engines.cache_folder import cache_folder
from wanexport.runtime.engines.choose import choose_engine
from wanexport.runtime.engines.kernels import check_kernel
from wanexport.runtime.engines.onnx import OnnxEngine
from wanexport.runtime.engines.tensorrt_library import FLAVOURS
from wanexport.runtime.errors import WanExportError, WanExportWarning, refuse_empty

WEIGHTS_FILE = "denoiser.safetensors"


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
    provider: str | None = None,
    provider_options: Mapping[str, str] | None = None,
) -> Denoiser:
    """Open the engine of a bundle that fits; what is None is free.

    resolution is `480x832` or `832*480`; device is `cpu` or `cuda`; weights is other weights of the
    same layout (a fine-tune or merged LoRA): a file, or a folder with `denoiser.safetensors`, or
    with one in each of `high_noise/` and `low_noise/` where the model has two experts.

    For AOTInductor and TensorRT engines: offload keeps one of two experts on the device and
    replaces its weights at the switch; cuda_graph is whether to replay a captured graph, by default
    where launching takes as long as running. Weights already on the device are shared. For
    AOTInductor engines, attention is the kernel of self-attention (`fa4`, `cudnn` or `sdpa`) in
    place of the recorded one.

    An engine is native code, and its hash is the bundle's own: open bundles of people you trust.
    Nothing else that a bundle names is opened or downloaded.

    An ONNX engine runs on either device: provider is ONNX Runtime's, `cpu`, `cuda`, `tensorrt` or
    `tensorrt-rtx`, and provider_options are that provider's own. On a GPU it can offload too.
    Raises WanExportError when nothing or more than one shape fits, when a file is missing or was
    altered, or when this machine cannot execute the engine.
    """
    refuse_empty(bundle=bundle, weights=weights)
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
            provider=provider,
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
                provider=provider,
                provider_options=provider_options,
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
    provider: str | None = None,
    provider_options: Mapping[str, str] | None = None,
) -> Denoiser:
    """Open one engine of a manifest, with the bundle's weights or those of a folder.

    An ONNX engine runs on the device that its target names, as `choose_engine` sets it.
    Raises WanExportError when a file is missing or was altered, or the backend refuses it.
    """
    check_usable(bundle, manifest, engine)
    # Engines are code: their whole content is checked at every load.
    files = {role: check_content(bundle, file) for role, file in engine.files.items()}
    experts = [record.expert for record in manifest.weights_of(engine.dtype)]
    if engine.backend != "onnx" and (provider or provider_options):
        raise WanExportError(
            f"engine {engine.name} has no provider of ONNX Runtime: choose one with --backend onnx"
        )
    chosen = partial(weights_files, bundle, manifest, engine, weights)
    on_gpu = engine.target["device"] == "cuda"
    if offload and len(experts) < 2 and (on_gpu or engine.backend != "onnx"):
        raise WanExportError("offload swaps two experts, this model has one: leave it out")
    if engine.backend == "aoti":
        layers = manifest.config.num_layers
        return _open_aoti(
            engine,
            files,
            chosen(),
            layers,
            attention=attention,
            offload=offload,
            cuda_graph=cuda_graph,
        )
    if engine.backend in FLAVOURS:
        if attention:
            raise WanExportError(
                f"engine {engine.name} has the attention it was built with: leave {attention} out, "
                f"or build one with --attention"
            )
        from wanexport.runtime.engines import aoti as aoti_engine
        from wanexport.runtime.engines import tensorrt as tensorrt_engine

        plans = tensorrt_engine.open_engines(
            engine,
            files,
            experts,
            chosen,
            own_weights=weights is None,
            offload=offload,
            cuda_graph=cuda_graph,
        )
        to_device = partial(aoti_engine.to_device, device=tensorrt_engine.gpu())
        return Denoiser(engine, plans, to_device)
    if attention or cuda_graph is not None:
        raise WanExportError(
            f"engine {engine.name} chooses no attention kernel and has no CUDA graph: leave these "
            f"options out, or choose an engine of another --backend"
        )
    graph = files["denoiser"]
    if on_gpu:
        return _open_onnx_on_gpu(
            engine,
            graph,
            chosen(),
            provider=provider or "cuda",
            options=provider_options or {},
            offload=offload,
        )
    if offload or provider_options:
        raise WanExportError(
            f"engine {engine.name} on a CPU offloads nothing and has no provider options: these "
            f"are for --device cuda"
        )
    return Denoiser(engine, {e: OnnxEngine(graph, file) for e, file in chosen().items()})


def _open_onnx_on_gpu(
    engine: EngineRecord,
    graph: PinnedFile,
    weights: Mapping[str, PinnedFile],
    *,
    provider: str,
    options: Mapping[str, str],
    offload: bool,
) -> Denoiser:
    import torch

    from wanexport.runtime.engines import aoti as aoti_engine
    from wanexport.runtime.engines import onnx_gpu as onnx_cuda_engine
    from wanexport.runtime.engines.onnx_providers import Provider

    device = torch.device("cuda", torch.cuda.current_device())
    # Of this very graph: what another left there would be code of unknown origin.
    cache = cache_folder() if provider.startswith("tensorrt") else None
    engines = onnx_cuda_engine.open_engines(
        graph,
        weights,
        device,
        Provider(provider, options, cache and cache / graph.sha256),
        offload=offload,
    )
    return Denoiser(engine, engines, partial(aoti_engine.to_device, device=device))


def _open_aoti(
    engine: EngineRecord,
    files: Mapping[str, PinnedFile],
    weights: Mapping[str, PinnedFile],
    num_layers: int,
    *,
    attention: str | None,
    offload: bool,
    cuda_graph: bool | None,
) -> Denoiser:
    import torch

    from wanexport.runtime.engines import aoti as aoti_engine
    from wanexport.runtime.engines.device_weights import device_weights

    check_kernel(attention, engine.target, engine.dtype)
    device = torch.device("cpu")
    if engine.target["device"] == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    kernels = _attention_kernels(engine, files, attention)
    regions = aoti_engine.Regions(files, engine.parameters, num_layers, kernels, device)
    shapes = {name: spec.shape for name, spec in engine.inputs.items()}
    first, engines = None, {}
    for expert, file in weights.items():
        held = first if first and offload else device_weights(file, device, private=offload)
        first = first or held
        engines[expert] = aoti_engine.AotiEngine(regions, held, file, shapes, cuda_graph=cuda_graph)
    return Denoiser(engine, engines, partial(aoti_engine.to_device, device=device))


def _attention_kernels(
    engine: EngineRecord, files: Mapping[str, PinnedFile], chosen: str | None
) -> dict[int, Any]:
    """The kernel for each number of keys; one that cannot be had here is replaced aloud."""
    from wanexport.runtime.engines.operators import open_kernel

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


def weights_files(
    bundle: Path, manifest: Manifest, engine: EngineRecord, weights: str | Path | None
) -> dict[str, PinnedFile]:
    """File of the weights for each expert, checked against the engine: the bundle's, or others.

    Raises WanExportError when they are missing or laid out for another engine.
    """
    sets = manifest.weights_of(engine.dtype)
    if weights is None:
        return {record.expert: _own(bundle, record, engine) for record in sets}
    paths = _named(Path(weights), [record.expert for record in sets])
    return {expert: _other(path, engine) for expert, path in paths.items()}


def _named(weights: Path, experts: Sequence[str]) -> dict[str, Path]:
    """The file for each expert that a user's file or folder holds."""
    if os.path.isfile(weights):  # unlike Path's, it is False for a name that is too long
        if len(experts) > 1:
            raise WanExportError(
                f"{weights} is one file, the model has two experts: name a folder with "
                f"{WEIGHTS_FILE} in each of {', '.join(f'{expert}/' for expert in experts)}"
            )
        return {experts[0]: weights}
    paths = {expert: weights / expert / WEIGHTS_FILE for expert in experts}
    for path in paths.values():
        if not os.path.isfile(path):
            raise WanExportError(
                f"weights folder {path.parent} has no {WEIGHTS_FILE}: name one that has"
            )
    return paths


def _other(path: Path, engine: EngineRecord) -> PinnedFile:
    file = pin(path)
    with file.opened():
        read_header(path)  # refuses a file that was cut short
        found = header_sha256(path)
    _check_header(path, found, engine)
    return file


def _own(bundle: Path, record: WeightsRecord, engine: EngineRecord) -> PinnedFile:
    file = check_weights(bundle, record)
    _check_header(file.path, record.header_sha256, engine)
    return file


def _check_header(path: Path, found: str, engine: EngineRecord) -> None:
    if found != engine.weights_header_sha256:
        raise WanExportError(
            f"{path} is laid out for another engine: its header hash is {found[:12]}, engine "
            f"{engine.name} needs {engine.weights_header_sha256[:12]}; run wanexport build again"
        )
