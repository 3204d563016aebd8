"""`wanexport build`: the weights, then each engine with its proof, then the manifest."""

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Unpack

from wanexport.exporter.backends.backend import Progress, Request
from wanexport.exporter.backends.order import (
    BuildKeywords,
    BuildOptions,
    Order,
    attention_for,
    geometry_for,
    make_order,
    options_for,
)
from wanexport.exporter.backends.table import find_backend
from wanexport.exporter.bundle.place import check_place
from wanexport.exporter.bundle.writer import BundleWriter, file_record, open_bundle
from wanexport.exporter.child.process import missing_name
from wanexport.exporter.key import engine_key
from wanexport.exporter.model_source import ModelSource, resolve
from wanexport.exporter.sets.convert import add_weights
from wanexport.exporter.sets.encoders import add_encoders, order_encoders
from wanexport.exporter.sets.loras import LoraOptions, merged, opened
from wanexport.exporter.sets.vae import add_vae_weights, order_vae
from wanexport.graphs.config import sampling_defaults
from wanexport.runtime.bundle.manifest import (
    BASE,
    EngineRecord,
    Manifest,
)
from wanexport.runtime.errors import BadRequest, refuse_empty
from wanexport.runtime.family import SamplingDefaults
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.machine.memory import peak_rss

_NO_KEY = "0" * 64  # of an engine that no later build may take for its own


def build(model: str | Path | None = None, **options: Unpack[BuildKeywords]) -> dict[str, Any]:
    """Build a bundle, or add to one, and return the record of what was done.

    model is a folder, a file, a hub id, a file there (`ID:FILE`), or with random_weights (a seed) a
    preset; with low_noise it is the high-noise expert of an A14B, and low_noise the other. lora are
    to be merged, each `FILE`, `FILE:STRENGTH` or a pair: into the model, or both experts; lora_high
    and lora_low into one. What of them has no place in the model is refused, unless lora_partial,
    when a warning lists it. resolution is `480x832`,
    `832*480` or (480, 832); dtype is fp32, bf16 or fp16; output defaults to ./<model>; proof is
    `ends` (the proof runs the first and last block) or `full` (all of them). On a machine with a
    GPU the defaults are the aoti backend, device cuda and bf16, elsewhere onnx, cpu and fp32;
    TensorRT's engines are bf16 everywhere. device is `cpu`, `cuda` or `cuda:1`, where attention is
    measured and the engine proven; of onnx by default a GPU where ONNX Runtime can use one.
    family is that of a checkpoint which does not say it, `self-forcing` of a causal Wan's: chunk
    is then how many latent frames a call makes, 3 by default, and cache how many it can attend to,
    its own among them, by default those of the video.
    attention names the kernel of self-attention in aoti engines (`fa4`, `cudnn` or `sdpa`), by
    default the fastest measured; attention_operator is how the graphs of the others write it, in
    one operator (`native`, or ONNX Runtime's own `mha`, onnx's default on a GPU) or for TensorRT in
    several (`decomposed`). tensorrt has TensorRT's own options. expert_alone builds one expert of
    an A14B as a model by itself, which is refused without. ema is which of the two models of a
    training's file is read, `generator_ema` or `generator`; by default the first that is there.
    parts builds an engine of the VAE too, which the checkpoint has beside the model, and copies the
    encoders that it has there: such a bundle serves prompts by itself. vae, a file or folder, is
    the VAE of such an engine, with parts or without: vae_dtype is the precision that it decodes in
    (bf16, by default on a GPU, or fp32; it encodes in fp32), vae_chunk the latent frames of a call,
    by default as memory allows, and vae_tf32 lets its fp32 convolutions take TF32.
    Raises WanExportError for whatever the caller can put right.
    """
    asked, started = BuildOptions(**options), time.monotonic()
    os.environ.update(missing_name())
    order = _order(model, asked)
    source = _find_model(model, asked)
    requests = _requests(source, order, asked)
    encoders = order_encoders(requests[0], source.record, asked)
    vae = order_vae(requests[0], source.record, asked)
    path = Path(source.name) if asked.output is None else Path(asked.output)
    reused: list[str] = []
    with open_bundle(path, _empty_manifest(source)) as writer:
        for expert in source.weights:
            reused += add_weights(writer, source, expert, order.dtype, asked.progress)
        reused += add_encoders(writer, encoders, asked.progress)
        for request in requests:
            reused += add_engine(writer, request, asked.proof, asked.progress)
        if vae is not None:
            reused += add_vae_weights(writer, vae, asked.progress)
            reused += add_engine(writer, vae.request, asked.proof, asked.progress)
            requests.append(vae.request)
        writer.commit()
    return {
        **_summary(writer, requests, [encoder.label for encoder in encoders]),
        "reused": reused,
        "seconds": round(time.monotonic() - started, 2),
        "peak_rss_bytes": peak_rss(),
    }


def _order(model: str | Path | None, asked: BuildOptions) -> Order:
    """What is asked for, refused before a checkpoint is downloaded for it when it cannot be."""
    refuse_empty(model=model, output=asked.output)
    if isinstance(asked.resolution, str):
        refuse_empty(resolution=asked.resolution)
    order = make_order(asked)
    if asked.output is not None:
        check_place(Path(asked.output))
    return order


def _find_model(model: str | Path | None, asked: BuildOptions) -> ModelSource:
    asked.progress("checkpoint", 0, 0)
    named = None if model is None else str(model)
    low_noise = None if asked.low_noise is None else str(asked.low_noise)
    source = resolve(
        named,
        asked.random_weights,
        low_noise=low_noise,
        expert_alone=asked.expert_alone,
        family=asked.family,
        ema=asked.ema,
    )
    if asked.expert_alone and source.experts:
        raise BadRequest(
            f"{named} has both experts: leave out --expert-alone, or pass -m the folder of one"
        )
    loras = LoraOptions(asked.lora, asked.lora_high, asked.lora_low, asked.lora_partial)
    return merged(source, opened(loras, source.config, source.experts))


def _requests(source: ModelSource, order: Order, asked: BuildOptions) -> list[Request]:
    """Every engine of the order for this model. Raises BadRequest when one cannot be made."""
    geometry = geometry_for(source.config, order, asked)
    requests = []
    for name, device, target in order.engines:
        backend = find_backend(name)
        request = Request(
            config=source.config,
            geometry=geometry,
            sampling=_sampling(source, geometry),
            backend=name,
            dtype=order.dtype,
            device=device,
            target=target,
            attention=attention_for(backend, asked),
            options=options_for(backend, asked),
        )
        requests.append(backend.resolve(request))
    return requests


def _sampling(source: ModelSource, geometry: Geometry) -> SamplingDefaults:
    """The official defaults, with the expert boundary that the checkpoint states, if it does."""
    defaults = sampling_defaults(source.config, source.experts, geometry)
    return defaults if source.boundary is None else replace(defaults, boundary=source.boundary)


def _empty_manifest(source: ModelSource) -> Manifest:
    return Manifest(
        model=source.name,
        config=source.config,
        experts=source.experts,
        weights={},
        engines=(),
        wanexport=version("wanexport"),
    )


def _summary(
    writer: BundleWriter, requests: Sequence[Request], encoders: Sequence[str]
) -> dict[str, Any]:
    """The part of the record that says what the bundle holds of what was asked: these engines,
    their weights, and the encoders of these labels."""
    manifest, (first, *_) = writer.manifest, requests
    names = {f"{request.geometry.name}/{request.label}" for request in requests}
    layouts = {request.layout for request in requests}
    weights = manifest.weights.items()
    sets = {label: w for label, w in weights if w.layout in layouts or label in encoders}
    engines = [engine for engine in manifest.engines if engine.name in names]
    return {
        "bundle": str(writer.path),
        "model": manifest.model,
        "tokens": first.geometry.num_tokens,
        "weights": {label: asdict(w.file) for label, w in sets.items() if w.name == BASE},
        "sources": {label: w.source for label, w in sets.items() if w.name == BASE},
        "engines": [{"name": engine.name, **asdict(engine)} for engine in engines],
    }


def add_engine(
    writer: BundleWriter, request: Request, verify: str, progress: Progress
) -> list[str]:
    """Compile and prove one engine, or return what is reused because the bundle holds it."""
    weights = writer.manifest.weights_of(request.layout, role=request.role)
    if request.bakes:
        request = replace(request, baked={w.expert: w.file.sha256 for w in weights})
    engine = writer.find_engine(engine_key(request))
    if engine and engine.proof.get("verify") in (verify, "full"):
        if engine.target == request.target:
            writer.put_engine(replace(engine, sampling=request.sampling))
            return [f"engine {engine.name}"]
    if engine is None:
        engine = compile_engine(writer, request, progress)
    progress(f"{request.label}: proving in a fresh process", 0, 0)
    files = [writer.path / w.file.path for w in weights]
    proof = find_backend(request.backend).prove(request, engine, writer.path, files, verify)
    proven = replace(engine, proof=proof, target=request.target, sampling=request.sampling)
    writer.put_engine(proven)
    return []


def compile_engine(writer: BundleWriter, request: Request, progress: Progress) -> EngineRecord:
    """Write the engine's files and return its record, which has no proof yet."""
    started = time.monotonic()
    geometry, backend = request.geometry, find_backend(request.backend)
    folder = writer.free_folder(Path("engines") / geometry.name / request.label)
    sets = writer.manifest.weights_of(request.layout, role=request.role)
    weights = {w.expert: writer.path / w.file.path for w in sets}
    compiled = backend.compile_engine(folder, request, weights, progress)
    return EngineRecord(
        backend=request.backend,
        role=request.role,
        family=request.config.family,
        dtype=request.dtype,
        geometry=geometry,
        program=compiled.program,
        details=compiled.details,
        sampling=request.sampling,
        files={role: file_record(writer.path, path) for role, path in compiled.files.items()},
        layout=request.layout,
        key=engine_key(request) if compiled.is_whole else _NO_KEY,
        target=request.target,
        build={
            "seconds": round(time.monotonic() - started, 2),
            "flops_per_forward": request.flops,
            **compiled.build,
            **backend.libraries(request),
        },
        lint=compiled.lint,
    )
