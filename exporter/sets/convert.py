"""The weights sets of a bundle: each converted once from its source, and reused after that."""

import shutil
from dataclasses import replace
from pathlib import Path

from wanexport.exporter.backends.backend import Progress
from wanexport.exporter.bundle.writer import BundleWriter
from wanexport.exporter.model_source import ModelSource
from wanexport.graphs.weights import write_weights
from wanexport.runtime.bundle.manifest import (
    BASE,
    DENOISER,
    FileRecord,
    WeightsRecord,
    weights_label,
)
from wanexport.runtime.bundle.path import WEIGHTS_FILE
from wanexport.runtime.bundle.signature import layout_sha256, weights_layout
from wanexport.runtime.bundle.tensorfile import header_sha256
from wanexport.runtime.errors import BadRequest, EngineFailure
from wanexport.runtime.wan_config import WanConfig

_HOLDS_OTHER = {  # by whether it is the base set
    True: "{0} holds other weights, of {2}: name another folder with -o",
    False: "{0} holds other weights named {1}, of {2}: choose another name",
}


def add_weights(
    writer: BundleWriter,
    source: ModelSource,
    expert: str,
    dtype: str,
    progress: Progress,
    *,
    name: str = BASE,
    recipe: str = "",
) -> list[str]:
    """Convert one expert's checkpoint, or return what is reused because the bundle holds it.

    name is that of the weights set that it is part of, for engines of its layout, and recipe says
    how a run with the set samples.
    Raises BadRequest when the set has other weights: it is of one source.
    """
    label = weights_label(name, expert, dtype)
    _check_source(writer, source, expert, name, label, progress)
    record = writer.find_weights(label, layout_sha256(source.config, dtype))
    reused = [f"weights {label}"] if record else []
    record = record or convert_weights(writer, source, expert, dtype, progress, name=name)
    writer.put_weights(label, replace(record, recipe=recipe))
    return reused


def _check_source(
    writer: BundleWriter,
    source: ModelSource,
    expert: str,
    name: str,
    label: str,
    progress: Progress,
) -> None:
    """Raise BadRequest when the set of this name holds other weights of the expert."""
    record = source.record_of(expert)
    for known_label, known in writer.known_weights().items():
        own = (known.role, known.name, known.expert)
        if own != (DENOISER, name, expert) or known.source == record:
            continue
        progress(f"weights {label}: reading the checkpoint to compare", 0, 0)
        if known.content == source.weights[expert].digest():
            continue
        if known_label not in writer.committed.weights:
            writer.forget_weights(known_label)
            continue
        raise BadRequest(_HOLDS_OTHER[name == BASE].format(writer.path, name, _origin(known)))


def _origin(known: WeightsRecord) -> str:
    """Where weights come from, in few words."""
    source = known.source
    origin = next((source[k] for k in ("hub", "path", "preset") if k in source), "another source")
    return f"{source['generator']} of {origin}" if "generator" in source else str(origin)


def convert_weights(
    writer: BundleWriter,
    source: ModelSource,
    expert: str,
    dtype: str,
    progress: Progress,
    *,
    name: str = BASE,
) -> WeightsRecord:
    """Write one expert's part of a weights set and return its record."""
    label = weights_label(name, expert, dtype)
    path = writer.free_folder(Path("weights") / label) / WEIGHTS_FILE
    _check_disk(path.parent, source.config, dtype)
    weights = source.weights[expert]

    def show(done: int, total: int) -> None:
        progress(f"weights {label}", done, total)

    sha256 = write_weights(path, source.config, dtype, weights, show)
    relative = path.relative_to(writer.path).as_posix()
    return WeightsRecord(
        name=name,
        role=DENOISER,
        expert=expert,
        dtype=dtype,
        layout=header_sha256(path),
        file=FileRecord(relative, path.stat().st_size, sha256),
        content=weights.digest(),
        source=source.record_of(expert),
    )


def _check_disk(folder: Path, config: WanConfig, dtype: str) -> None:
    """Refuse a conversion that would end in a full disk after minutes."""
    _, entries = weights_layout(config, dtype)
    needed, free = sum(e.size for e in entries.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise EngineFailure(
            f"{folder} needs {needed / 1e9:.2f} GB for weights, its disk has {free / 1e9:.2f} GB "
            f"free: name a folder elsewhere with -o"
        )
