"""Bundles for `tests.tables.offload`: of random weights that are drawn once and repeated.

    python -m tests.tables.offload_models FOLDER MODEL FRAMES

A weights file of 29 GB is written in seconds: the tensors are pieces of one random piece, scaled as
random weights are, and nobody computes the file's hash, for which `load` does not ask. The A14B is
made of the 14B, whose graph, engine and layout it has: that file is its high-noise expert, and
another one, of other values, the low-noise expert.
"""

import hashlib
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from wanexport.exporter.build import build
from wanexport.exporter.bundle.writer import write_manifest
from wanexport.exporter.sets import convert
from wanexport.graphs.config import PRESETS, sampling_defaults
from wanexport.graphs.source_tensor import torch_dtype
from wanexport.graphs.weights import RandomWeights, _distribution
from wanexport.runtime.bundle.manifest import FileRecord, WeightsRecord, read_manifest
from wanexport.runtime.bundle.path import WEIGHTS_FILE
from wanexport.runtime.bundle.signature import parameter_shapes, weights_layout
from wanexport.runtime.wan_config import EXPERTS, WanConfig

RESOLUTION = "480x832"
PIECE = 1 << 24  # values
# The model whose bundle another's is made of.
SINGLE = {"t2v-a14b": "t2v-14b"}


def bundle_of(folder: Path, model: str) -> Path:
    """Where a model's bundle is, or will be."""
    return folder / f"{model}-bundle"


def mark_of(folder: Path, model: str, frames: int) -> Path:
    """A file that is there when a model's engine for so many frames is built."""
    return folder / f"{model}-{frames}.built"


def write_repeated(
    path: Path, config: WanConfig, dtype: str, source: RandomWeights, _progress: Any = None
) -> str:
    """Write a weights file; the result stands for its hash, and says whose it is."""
    header, entries = weights_layout(config, dtype)
    shapes = parameter_shapes(config)
    seed = int.from_bytes(hashlib.sha256(source.identity.encode()).digest()[:4], "little")
    piece = torch.rand(PIECE, generator=torch.Generator().manual_seed(seed)).sub_(0.5)
    with path.open("wb") as file:
        file.write(header)
        for number, (name, entry) in enumerate(entries.items()):
            centre, deviation = _distribution(name, shapes[name])
            stored, begin = torch_dtype(entry.dtype), 7919 * number % (PIECE // 64)
            own = piece[begin : begin + entry.size // stored.itemsize]  # each begins elsewhere
            scaled = own.mul(deviation * 12**0.5).add_(centre).to(stored)
            raw, left = scaled.view(torch.uint8).numpy().data, entry.size
            while left:
                file.write(raw[:left])
                left -= min(left, len(raw))
    return hashlib.sha256(header + source.identity.encode()).hexdigest()


def build_single(folder: Path, model: str, frames: int, **options: Any) -> None:
    """Build, or add to, the bundle of a model without experts."""
    convert.write_weights = write_repeated  # type: ignore[assignment, attr-defined]
    given = {"resolution": RESOLUTION, "backends": ["aoti"], "dtype": "bf16", "attention": "cudnn"}
    build(
        model, random_weights=0, frames=frames, output=bundle_of(folder, model),
        **{**given, **options},
    )  # fmt: skip


def build_pair(folder: Path, model: str, single: str, frames: int) -> None:
    """Make the bundle of a model with two experts of the built one of a single model."""
    source, bundle = bundle_of(folder, single), bundle_of(folder, model)
    manifest, config = read_manifest(source), PRESETS[model].config
    assert replace(config, family=manifest.config.family) == manifest.config
    (engine,) = (e for e in manifest.engines if e.geometry.frames == frames)
    (known,) = manifest.weights.values()
    shutil.rmtree(bundle, ignore_errors=True)
    shutil.copytree(source / "engines", bundle / "engines", copy_function=os.link)
    weights: dict[str, WeightsRecord] = {}
    for expert in EXPERTS:
        label = f"{expert}-{known.dtype}"
        path = bundle / "weights" / label / WEIGHTS_FILE
        path.parent.mkdir(parents=True)
        record, sha256 = known.file, known.file.sha256
        if expert == EXPERTS[0]:
            os.link(source / record.path, path)
        else:
            drawn = RandomWeights(config, 0, expert)
            sha256 = write_repeated(path, config, known.dtype, drawn)
        file = FileRecord(str(path.relative_to(bundle)), record.size, sha256)
        weights[label] = replace(known, expert=expert, file=file)
    sampling = sampling_defaults(config, EXPERTS, engine.geometry)
    own = replace(engine, family=config.family, sampling=sampling)
    write_manifest(
        bundle,
        replace(
            manifest, model=model, config=config, experts=EXPERTS, weights=weights, engines=(own,)
        ),
    )


def main(folder: Path, model: str, frames: int) -> None:
    """Build what is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    single = SINGLE.get(model)
    if single is None:
        build_single(folder, model, frames)
    else:
        build_pair(folder, model, single, frames)
    mark_of(folder, model, frames).touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
