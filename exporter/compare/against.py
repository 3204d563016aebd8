"""`compare --against`: another engine of the bundle, of the same size, as the reference."""

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

from wanexport.exporter.compare.peers import (
    EXACT,
    Key,
    Other,
    Peers,
    Placed,
    open_peers,
    tensors_of_bundle,
)
from wanexport.runtime.bundle.manifest import EngineRecord, Manifest
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.engines.choose import Choice, choose_engine
from wanexport.runtime.engines.engine import EngineOptions
from wanexport.runtime.errors import BadRequest, WanExportError
from wanexport.runtime.load import find_weights, open_engine


def open_against(
    bundle: Path,
    manifest: Manifest,
    choice: Choice,
    backend: str,
    options: EngineOptions,
    *,
    exact: bool,
) -> Peers:
    """Another engine as the reference, and the eager denoisers that tell what both precisions do.

    With exact there is one in fp32 in any case. Raises what `choose_other` and `load` raise.
    """
    other, asked = choose_other(bundle, manifest, choice, backend, options)

    def eager(record: EngineRecord, keys: Collection[Key]) -> dict[Key, Denoiser]:
        tensors = tensors_of_bundle(bundle, manifest, record, options.weights)
        placed = Placed(manifest, record, choice.device, tensors)
        return open_peers(placed, keys, unrounded=None).eager

    own, there = ({("graph", engine.record.dtype), EXACT} for engine in (choice, other))
    is_exact = own == there == {EXACT}  # two engines in fp32 have the gate of fp32
    return Peers(
        {} if is_exact and not exact else eager(choice.record, own),
        None,
        Other(
            open_engine(bundle, manifest, other, asked),
            find_weights(bundle, other.record, options.weights, manifest).files,
            {} if own == there else eager(other.record, there),
        ),
    )


def choose_other(
    bundle: Path, manifest: Manifest, choice: Choice, backend: str, options: EngineOptions
) -> tuple[Choice, EngineOptions]:
    """The engine of a backend to compare with, and the options that open it.

    It has the engine's precision where there is one of it that runs here. Raises BadRequest when
    the bundle has no other of this backend and size, BundleError when none of them runs here.
    """
    record = choice.record
    others = tuple(engine for engine in manifest.engines if engine != record)
    rest = replace(manifest, engines=others, unread=())
    size = record.geometry
    if not any((e.backend, e.geometry) == (backend, size) for e in others):
        raise BadRequest(
            f"{bundle} has no other {backend} engine than {record.name} at this size: choose "
            f"another --against, or add one with wanexport build --backend {backend} "
            f"{size.options} -o {bundle}"
        )
    wanted = EngineOptions(
        backend=backend,
        device=options.device,
        resolution=(size.height, size.width),
        frames=size.frames,
        chunk=size.chunk or None,
        cache=size.cache or None,
        weights=options.weights,
    )
    problems: list[WanExportError] = []
    for asked in _from_the_nearest(wanted, record.dtype):
        try:
            return choose_engine(bundle, rest, asked), asked
        except WanExportError as error:
            problems.append(error)
    raise problems[-1]


def _from_the_nearest(options: EngineOptions, dtype: str) -> Iterator[EngineOptions]:
    """The engine's own precision and device first, then any."""
    yield replace(options, dtype=dtype)
    yield options
    if options.device is not None:
        yield replace(options, device=None)


def note_on(record: EngineRecord, other: EngineRecord) -> str | None:
    """What is to be known of two engines of different precisions."""
    if record.dtype == other.dtype:
        return None
    return (
        f"{record.name} computes in {record.dtype} and {other.name} in {other.dtype}: the gate "
        f"allows what both precisions do, to weights too"
    )
