"""A bundle made by hand in milliseconds: a whole manifest, and files that have its hashes.

Its engines are text, so nothing opens them; its weights are zeros under a true header.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from wanexport.exporter.bundle.writer import file_record, write_manifest
from wanexport.runtime.bundle.details import AotiDetails, Details, OnnxDetails, TensorRtDetails
from wanexport.runtime.bundle.manifest import (
    BASE,
    DENOISER,
    EngineRecord,
    Manifest,
    WeightsRecord,
    weights_label,
)
from wanexport.runtime.bundle.signature import layout_sha256, program_of, weights_layout
from wanexport.runtime.family import SamplingDefaults
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.wan_config import WanConfig

CONFIG = WanConfig("t2v", 64, 128, 2, 2, 16, 16, 0, text_dim=32, text_len=8, freq_dim=16)
GEOMETRY = Geometry(64, 96, 9)
CAUSAL = replace(CONFIG, family="self-forcing")
_TARGETS = {
    "onnx": {"device": "cpu", "onnxruntime": "1.27.0"},
    "aoti": {"device": "cpu", "arch": "x86_64", "instructions": "AVX2", "torch": "2.13.0"},
    "tensorrt": {"device": "cuda", "arch": "sm89", "tensorrt": "10.16.1"},
}
_DETAILS: dict[str, Details] = {
    "onnx": OnnxDetails(attention_score_bytes=10**6),
    "tensorrt": TensorRtDetails(),
}


def small_bundle(
    folder: Path,
    *backends: str,
    config: WanConfig = CONFIG,
    geometries: Sequence[Geometry] = (GEOMETRY,),
) -> Path:
    """A bundle with one fp32 engine of each geometry and backend, by default onnx alone."""
    record = weights_record(folder, config=config)
    engines = tuple(
        _engine(folder, backend, config, geometry)
        for geometry in geometries
        for backend in backends or ("onnx",)
    )
    write_manifest(folder, Manifest("small", config, (), {"fp32": record}, engines, "0.1.0"))
    return folder


def weights_record(
    folder: Path,
    name: str = BASE,
    expert: str = "",
    *,
    config: WanConfig = CONFIG,
    seed: int | None = None,
) -> WeightsRecord:
    """A part of a weights set in fp32, whose file is written: zeros, or normal values by a seed."""
    weights = folder / "weights" / weights_label(name, expert, "fp32") / "denoiser.safetensors"
    weights.parent.mkdir(parents=True)
    header, entries = weights_layout(config, "fp32")
    with weights.open("wb") as file:
        file.write(header)
        end = max(entry.offset + entry.size for entry in entries.values())
        if seed is not None:
            rng = np.random.default_rng(seed)
            file.write(rng.standard_normal((end - len(header)) // 4, np.float32).tobytes())
        file.truncate(end)
    return WeightsRecord(
        name=name,
        role=DENOISER,
        expert=expert,
        dtype="fp32",
        layout=layout_sha256(config, "fp32"),
        file=file_record(folder, weights),
        content=sha256(b"").hexdigest(),
        source={"path": "/models/small", "layout": "official", "files": {"a": [1, 2]}},
    )


def _engine(folder: Path, backend: str, config: WanConfig, geometry: Geometry) -> EngineRecord:
    program, files = program_of(config, geometry), {}
    program = program if backend == "aoti" else program.whole()
    for role in (*program.functions, *(("layers",) if backend == "tensorrt" else ())):
        path = folder / f"engines/{geometry.name}/{backend}-fp32/{role}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"the {role} of an engine")
        files[role] = file_record(folder, path)
    return EngineRecord(
        backend=backend,
        role=DENOISER,
        family=config.family,
        dtype="fp32",
        geometry=geometry,
        program=program,
        details=_DETAILS.get(backend) or AotiDetails(dict.fromkeys(program.attention, "sdpa")),
        sampling=SamplingDefaults(4, 5.0, (5.0, 5.0), None, 16),
        files=files,
        layout=layout_sha256(config, "fp32"),
        key="0123abcd",
        target=_TARGETS[backend],
        build={"seconds": 1.5, "flops_per_forward": 10**9},
        lint={"host_sync": 0},
        proof={"method": "x", "blocks": 2, "tokens": 72, "error": 1e-6, "gate": 1e-5},
        parity={"passed": True, "reference": "graph", "error": 1e-6},
    )


def manifest_of(bundle: Path) -> Any:
    """The manifest's JSON."""
    return json.loads((bundle / "manifest.json").read_text())


def put(bundle: Path, data: Any) -> Path:
    """Replace the manifest's JSON."""
    (bundle / "manifest.json").write_text(json.dumps(data))
    return bundle


def change(bundle: Path, place: str, value: object) -> Path:
    """Set one value of the manifest; place is as `engines.0.sampling.steps`."""
    data = record = manifest_of(bundle)
    *parents, last = place.split(".")
    for name in parents:
        record = record[int(name)] if isinstance(record, list) else record[name]
    record[int(last) if isinstance(record, list) else last] = value
    return put(bundle, data)
