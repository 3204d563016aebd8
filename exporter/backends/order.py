"""What a build is asked for, and what of that is refused before any model is looked for."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple, Required, TypedDict

from wanexport.exporter.backends.backend import Backend, Options, Progress, TensorRtOptions
from wanexport.exporter.backends.table import BACKENDS, default_backend, find_backend
from wanexport.runtime.dtypes import PRECISIONS
from wanexport.runtime.engines.device_name import check_device
from wanexport.runtime.engines.kernels import KERNELS
from wanexport.runtime.errors import BadRequest
from wanexport.runtime.family import FAMILIES, family_of
from wanexport.runtime.geometry import Geometry, Resolution, parse_resolution
from wanexport.runtime.lora.given import Given
from wanexport.runtime.machine.temporary import check_temporary_folder
from wanexport.runtime.wan_config import WanConfig

PROOFS = ("ends", "full")
_CHUNK = 3  # latent frames of a call of a causal model, as Self-Forcing was trained


def _untold(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


class BuildKeywords(TypedDict, total=False):
    """The fields of BuildOptions, as `build` takes them."""

    resolution: Required[Resolution]
    frames: Required[int]
    family: str | None
    chunk: int | None
    cache: int | None
    output: str | Path | None
    backends: Sequence[str] | None
    dtype: str | None
    device: str | None
    attention: str | None
    attention_operator: str | None
    tensorrt: TensorRtOptions | None
    random_weights: int | None
    low_noise: str | Path | None
    expert_alone: bool
    ema: bool | None
    lora: Sequence[Given]
    lora_high: Sequence[Given]
    lora_low: Sequence[Given]
    lora_partial: bool
    parts: bool
    vae: str | Path | None
    vae_dtype: str | None
    vae_chunk: int | None
    vae_tf32: bool
    proof: str
    progress: Progress


@dataclass(frozen=True)
class BuildOptions:
    """What to build, where and how; `build` says what each means, and None is its default."""

    resolution: Resolution
    frames: int
    family: str | None = None
    chunk: int | None = None
    cache: int | None = None
    output: str | Path | None = None
    backends: Sequence[str] | None = None
    dtype: str | None = None
    device: str | None = None
    attention: str | None = None
    attention_operator: str | None = None
    tensorrt: TensorRtOptions | None = None
    random_weights: int | None = None
    low_noise: str | Path | None = None
    expert_alone: bool = False
    ema: bool | None = None
    lora: Sequence[Given] = ()
    lora_high: Sequence[Given] = ()
    lora_low: Sequence[Given] = ()
    lora_partial: bool = False
    parts: bool = False
    vae: str | Path | None = None
    vae_dtype: str | None = None
    vae_chunk: int | None = None
    vae_tf32: bool = False
    proof: str = "ends"
    progress: Progress = _untold


class Ordered(NamedTuple):
    """One engine to build, of a model that is not known yet."""

    backend: str
    device: str
    target: dict[str, str]


@dataclass(frozen=True)
class Order:
    """What a build makes: engines of one size and precision."""

    height: int
    width: int
    frames: int
    dtype: str
    engines: tuple[Ordered, ...]


def make_order(asked: BuildOptions) -> Order:
    """The engines that are asked for, once each, with the defaults of this machine.

    Raises BadRequest for what cannot be, and WanExportError for what this machine cannot make.
    """
    device = None if asked.device is None else check_device(asked.device)
    names = [default_backend(device)] if asked.backends is None else dict.fromkeys(asked.backends)
    if not names:
        raise BadRequest(f"no backends: expected of {', '.join(BACKENDS)}")
    kinds = {name: find_backend(name) for name in names}
    devices = {name: device or kind.default_device() for name, kind in kinds.items()}
    dtype = asked.dtype or _default_dtype(kinds, devices)
    _check_among("dtype", dtype, PRECISIONS)
    _check_among("proof", asked.proof, PROOFS)
    _check_attention(kinds, asked)
    _check_taken(kinds, asked.tensorrt)
    height, width = parse_resolution(asked.resolution)
    Geometry(height, width, asked.frames)  # refuses what no Wan takes
    if asked.family is not None:
        _check_among("family", asked.family, list(FAMILIES))
    check_temporary_folder(compiles=any(kind.COMPILES for kind in kinds.values()))
    engines = tuple(
        Ordered(name, devices[name], target)
        for name, kind in kinds.items()
        for target in kind.targets(devices[name], options_for(kind, asked))
    )
    for name, _, target in engines:
        kinds[name].check_attention(attention_for(kinds[name], asked), dtype, target)
    return Order(height, width, asked.frames, dtype, engines)


def geometry_for(config: WanConfig, order: Order, asked: BuildOptions) -> Geometry:
    """The size of the engines, in chunks where the model is causal.

    Raises BadRequest for chunks of a model that is not, and when the VAE takes no such size.
    """
    family = family_of(config)
    stride = family.vae.spatial_stride
    whole = Geometry(order.height, order.width, order.frames, stride)
    if family.is_causal:
        chunk = min(_CHUNK, whole.clip_frames) if asked.chunk is None else asked.chunk
        cache = max(whole.clip_frames, chunk) if asked.cache is None else asked.cache
        if chunk < 1:
            raise BadRequest(f"--chunk {chunk}: expected latent frames from 1")
        return replace(whole, chunk=chunk, cache=cache)
    given = {"--chunk": asked.chunk, "--cache": asked.cache}
    if named := [option for option, value in given.items() if value is not None]:
        causal = ", ".join(name for name, row in FAMILIES.items() if row.is_causal)
        raise BadRequest(
            f"{' and '.join(named)}: only a causal model takes this, and {config.family} is none; "
            f"leave it out, or if the checkpoint is of one add --family {causal}"
        )
    return whole


def options_for(kind: Backend, asked: BuildOptions) -> Options:
    """A backend's own options, None where it takes none or none were given."""
    return asked.tensorrt if kind.OPTIONS is TensorRtOptions else None


def attention_for(kind: Backend, asked: BuildOptions) -> str | None:
    """What was asked of a backend's attention: of its kernels, or of how its graph writes it."""
    return asked.attention if _has_kernels(kind) else asked.attention_operator


def _has_kernels(kind: Backend) -> bool:
    """Whether a backend chooses among kernels; the others choose among operators of a graph."""
    return set(kind.ATTENTION) <= set(KERNELS)


def _default_dtype(kinds: dict[str, Backend], devices: dict[str, str]) -> str:
    """One precision for all, which is that of a GPU where one of them is for a GPU."""
    wanted = {kind.default_dtype(devices[name]) for name, kind in kinds.items()}
    return "fp32" if wanted == {"fp32"} else "bf16"


def _check_among(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise BadRequest(f"unknown {name} {value!r}: expected of {', '.join(known)}")


def _check_attention(kinds: dict[str, Backend], asked: BuildOptions) -> None:
    """Refuse an attention that no backend of the build takes, or that one of them has not."""
    for what, value, of_kernels in (
        ("attention", asked.attention, True),
        ("attention operator", asked.attention_operator, False),
    ):
        takers = [name for name, kind in BACKENDS.items() if _has_kernels(kind) is of_kernels]
        taking = {name: kind for name, kind in kinds.items() if name in takers}
        if value is not None and not taking:
            raise BadRequest(
                f"{what} {value}: only engines of {', '.join(takers)} take this; leave it out, or "
                f"add --backend {' or '.join(takers)}"
            )
        for name, kind in taking.items():
            if value not in (None, *kind.ATTENTION):
                expected = ", ".join(kind.ATTENTION)
                raise BadRequest(f"backend {name} has no {what} {value!r}: expected of {expected}")


def _check_taken(kinds: dict[str, Backend], options: Options) -> None:
    """Refuse options that nothing in the build would take."""
    if options is None or any(kind.OPTIONS is type(options) for kind in kinds.values()):
        return
    given = [f.name for f in fields(options) if getattr(options, f.name) != f.default]
    takers = [name for name, kind in BACKENDS.items() if kind.OPTIONS is type(options)]
    if given:
        raise BadRequest(
            f"{', '.join(given).replace('_', ' ')}: only TensorRT takes this; leave it out, or add "
            f"--backend {' or '.join(takers)}"
        )
