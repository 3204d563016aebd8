"""Which engine of a bundle runs here, and runs best."""

import importlib.util
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from wanexport.runtime.bundle.manifest import DENOISER, DEVICES, VAE, EngineRecord, Manifest
from wanexport.runtime.bundle.usable import unread_name, why_unread, why_unusable
from wanexport.runtime.engines.device_name import check_device, device_kind
from wanexport.runtime.engines.engine import EngineOptions
from wanexport.runtime.engines.onnx_providers import PROVIDERS
from wanexport.runtime.engines.table import BACKENDS, ENGINES
from wanexport.runtime.errors import (
    BadRequest,
    BundleError,
    WanExportError,
    WanExportWarning,
    installing,
    needing_package,
)
from wanexport.runtime.family import FAMILIES
from wanexport.runtime.geometry import Geometry, parse_resolution

_FREE = EngineOptions()


class Choice(NamedTuple):
    """An engine, and the device to open it on: `cpu`, `cuda` or `cuda:1`."""

    record: EngineRecord
    device: str


def choose_engine(bundle: Path, manifest: Manifest, options: EngineOptions) -> Choice:
    """The engine that fits and runs here.

    What options leave open, backend, device and dtype decide, the fastest on a GPU first. A shape
    is never guessed: its resolution, frames, chunk and cache.
    Warns when one that would come first cannot run here. Raises BadRequest when none fits and when
    engines of several shapes fit, whether they can run here or not, BundleError when none can run.
    """
    options = _with_provider(options)
    _check(options)
    _check_chunks(bundle, manifest, options)
    fitting = [choice for choice in _candidates(manifest, options) if _fits(choice, options)]
    held = ", ".join(_held(manifest)) or "none"
    if not fitting:
        raise BadRequest(
            f"{bundle} has no such engine; it holds {held}: choose one, or add yours with "
            f"wanexport build{''.join(f'; {why}' for why in _of_others(bundle, manifest))}"
        )
    if open_names := _differing([choice.record.geometry for choice in fitting]):
        raise BadRequest(f"{bundle} holds several shapes ({held}): name {' and '.join(open_names)}")
    refusals = [
        why_unusable(bundle, manifest, choice.record) or _refusal(bundle, choice, options)
        for choice in fitting
    ]
    runnable = [choice for choice, refusal in zip(fitting, refusals) if not refusal]
    if not runnable:
        raise BundleError("; ".join(dict.fromkeys(refusals)))
    chosen = min(runnable, key=_preference)
    better = _better(chosen, dict(zip(refusals, fitting)))
    if better := [*better, *_unread_better(bundle, manifest, options, chosen)]:
        warnings.warn(
            f"{'; '.join(better)}: engine {chosen.record.name} runs on {chosen.device} instead",
            WanExportWarning,
            stacklevel=2,
        )
    return chosen


def _differing(shapes: Sequence[Geometry]) -> list[str]:
    """The options by which shapes differ; none of one shape."""
    values: dict[str, set[Any]] = {
        "resolution": {(shape.height, shape.width) for shape in shapes},
        "frames": {shape.frames for shape in shapes},
        "chunk": {shape.chunk for shape in shapes},
        "cache": {shape.cache for shape in shapes},
    }
    return [name for name, found in values.items() if len(found) > 1]


def _held(manifest: Manifest) -> list[str]:
    """What a bundle's engines are called, those that cannot be read too; not those of its VAE."""
    own = [engine.name for engine in manifest.engines if engine.role != VAE]
    return [*own, *map(unread_name, manifest.unread)]


def _of_others(bundle: Path, manifest: Manifest) -> Iterator[str]:
    """Why the engines that no options choose cannot be used."""
    yield from (why_unread(bundle, manifest, data) for data in manifest.unread)
    for engine in manifest.engines:
        if not _is_known(engine) and engine.role != VAE:
            yield why_unusable(bundle, manifest, engine)


def _is_known(engine: EngineRecord) -> bool:
    """Whether an engine does what engines do here: others neither run nor compete."""
    return engine.role == DENOISER and engine.backend in BACKENDS


def _check(options: EngineOptions) -> None:
    if options.backend not in (None, *BACKENDS):
        raise BadRequest(
            f"unknown backend {options.backend!r}: expected one of {', '.join(BACKENDS)}"
        )
    if options.device is not None:
        check_device(options.device)


def _check_chunks(bundle: Path, manifest: Manifest, options: EngineOptions) -> None:
    """Raise BadRequest for a chunk or cache that is no number, or of a model without."""
    given = {"chunk": options.chunk, "cache": options.cache}
    asked = {name: value for name, value in given.items() if value is not None}
    for name, value in asked.items():
        if type(value) is not int or value < 1:
            raise BadRequest(f"{name} {value!r:.40}: expected latent frames, a number from 1")
    family = FAMILIES.get(manifest.config.family)
    if asked and family is not None and not family.is_causal:
        raise BadRequest(
            f"{' and '.join(asked)}: only engines of a causal model have this, and {bundle} is of "
            f"family {manifest.config.family}: leave it out"
        )


def _with_provider(options: EngineOptions) -> EngineOptions:
    """The options with what a provider of ONNX Runtime implies.

    Raises BadRequest when another backend or device was chosen.
    """
    provider = options.provider
    if provider is None:
        return options
    if provider not in PROVIDERS:
        raise BadRequest(f"unknown provider {provider!r}: expected one of {', '.join(PROVIDERS)}")
    kind = "cpu" if provider == "cpu" else "cuda"
    wanted = {"backend": "onnx", "device": kind}
    for name, own in wanted.items():
        given = getattr(options, name)
        if given is not None and device_kind(given) != own:
            raise BadRequest(f"provider {provider} is of {own}, not of {given}: leave one out")
    return replace(options, backend="onnx", device=options.device or kind)


def _candidates(manifest: Manifest, options: EngineOptions) -> list[Choice]:
    """Every engine on each device that it could run on."""
    return [
        Choice(record, _numbered(device, options))
        for record in manifest.engines
        for device in _devices(record)
    ]


def _devices(record: EngineRecord) -> Sequence[str]:
    kind = ENGINES.get(record.backend)
    if kind is not None and kind.portable:
        return DEVICES
    return (record.target.get("device", ""),)


def _numbered(device: str, options: EngineOptions) -> str:
    """The device with the number that was asked for, where it is of that kind."""
    asked = options.device or ""
    return asked if device_kind(asked) == device else device


def _fits(choice: Choice, options: EngineOptions) -> bool:
    record, size = choice.record, options.resolution
    geometry = record.geometry
    return (
        _is_known(record)
        and options.backend in (None, record.backend)
        and options.dtype in (None, record.dtype)
        and options.device in (None, choice.device)
        and options.frames in (None, geometry.frames)
        and options.chunk in (None, geometry.chunk)
        and options.cache in (None, geometry.cache)
        and (size is None or parse_resolution(size) == (geometry.height, geometry.width))
    )


def _better(chosen: Choice, refused: Mapping[str, Choice]) -> list[str]:
    """Why engines that would run in the chosen one's place cannot; refused has each by its why."""
    return [
        reason
        for reason, choice in refused.items()
        if reason and _place(choice) < _place(chosen) and (_is_bound(choice) or _has_gpu())
    ]


def _unread_better(
    bundle: Path, manifest: Manifest, options: EngineOptions, chosen: Choice
) -> Iterator[str]:
    """The same of engines whose records cannot be read, by what they say of themselves."""
    for data in manifest.unread:
        target = data.get("target")
        device = target.get("device") if isinstance(target, dict) else None
        kind = (data.get("backend"), device, data.get("dtype"))
        wanted = (options.backend, device_kind(options.device or "") or None, options.dtype)
        is_asked = all(own in (None, given) for own, given in zip(wanted, kind))
        is_asked &= data.get("role", DENOISER) == DENOISER
        if is_asked and kind in _PREFERENCE and _PREFERENCE.index(kind) < _place(chosen):
            yield why_unread(bundle, manifest, data)


def _is_bound(choice: Choice) -> bool:
    """Whether the engine is for its target's device alone."""
    return not ENGINES[choice.record.backend].portable


def _has_gpu() -> bool:
    """Whether this machine has a GPU that the user has not hidden: without one, a CPU is what an
    engine that is bound to no device is meant to run on."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and any(map(os.path.exists, ("/dev/nvidiactl", "/dev/dxg")))


def _preference(choice: Choice) -> tuple[int, bool]:
    """What sorts first runs best; a plan that serves more GPUs or versions is slower."""
    names = ("hardware_compatible", "version_compatible")
    return _place(choice), any(getattr(choice.record.details, name, False) for name in names)


def _place(choice: Choice) -> int:
    """The fastest on a GPU first; on a CPU the exact one, and of two the one that maps weights."""
    kind = (choice.record.backend, device_kind(choice.device), choice.record.dtype)
    return _PREFERENCE.index(kind) if kind in _PREFERENCE else len(_PREFERENCE)


def _order() -> list[tuple[str, str, str]]:
    ordered = [
        (name, device, dtype)
        for name, kind in ENGINES.items()
        for device, dtype in kind.preferred
        if device != "cpu"
    ]
    portable_first = sorted(ENGINES.items(), key=lambda item: not item[1].portable)
    return ordered + [
        (name, device, dtype)
        for name, kind in portable_first
        for device, dtype in kind.preferred
        if device == "cpu"
    ]


_PREFERENCE = _order()


def machine_refusal(
    record: EngineRecord, device: str, rebuild: str, options: EngineOptions = _FREE
) -> str:
    """Why this machine cannot execute an engine on a device; empty when it can.

    rebuild is the command that makes an engine for it.
    """
    kind = ENGINES[record.backend]
    if kind.needs_torch and (reason := _torch_obstacle(record)):
        return reason
    return kind.backend().refusal(record, device, options, rebuild)


def _refusal(bundle: Path, choice: Choice, options: EngineOptions) -> str:
    record = choice.record
    rebuild = f"wanexport build --backend {record.backend} {record.geometry.options} -o {bundle}"
    return machine_refusal(record, choice.device, rebuild, options)


def _torch_obstacle(record: EngineRecord) -> str:
    """Why PyTorch cannot be had for an engine; empty when it can."""
    if importlib.util.find_spec("torch") is None:
        bound = "torch" in record.target
        wanted = "==" + record.target["torch"].partition("+")[0] if bound else ""
        return f"engine {record.name} needs PyTorch: {installing(f'torch{wanted}')}"
    try:
        with needing_package("torch", f"engine {record.name}"):
            import torch  # noqa: F401
    except WanExportError as error:  # installed, and broken
        return str(error)
    return ""
