"""The bundle's manifest: its schema, and reading it.

The manifest is the commit point: a reader sees a whole old bundle, a whole new one, or none.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from math import isfinite
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from wanexport.runtime.errors import WanExportError
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.signature import REGIONS
from wanexport.runtime.tensorrt_library import FLAVOURS

SCHEMA = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one engine input or output."""

    shape: tuple[int, ...]
    dtype: str = "fp32"


@dataclass(frozen=True)
class SamplingDefaults:
    """What `sample` uses unless told; guidance is Wan's pair (low noise, high noise)."""

    steps: int
    shift: float
    guidance: tuple[float, float]
    boundary: float | None  # timesteps >= 1000 * boundary go to the high-noise expert
    fps: int
    solver: str = "unipc"


@dataclass(frozen=True)
class FileRecord:
    """A file of the bundle; `path` is relative to it, with forward slashes."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class WeightsRecord:
    """One converted checkpoint in one dtype. `expert` is empty where there is only one."""

    dtype: str
    expert: str
    file: FileRecord
    header_sha256: str
    content: str  # hash of the source's tensors, whatever their files
    source: dict[str, Any]


@dataclass(frozen=True)
class EngineRecord:
    """One compiled graph at one geometry; it reads any weights whose header hash it names."""

    backend: str
    dtype: str
    geometry: Geometry
    inputs: dict[str, TensorSpec]
    output: TensorSpec
    sampling: SamplingDefaults
    files: dict[str, FileRecord]
    weights_header_sha256: str
    key: str
    target: dict[str, str]
    parameters: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of each region, in order
    attention: dict[str, str] = field(default_factory=dict)  # number of keys -> kernel
    build: dict[str, Any] = field(default_factory=dict)
    lint: dict[str, int] = field(default_factory=dict)
    proof: dict[str, Any] = field(default_factory=dict)
    parity: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """How messages and folders call this engine: 480x832x81/aoti-bf16-sm90."""
        return f"{self.geometry.name}/{engine_label(self.backend, self.dtype, self.target)}"


def engine_label(backend: str, dtype: str, target: Mapping[str, str]) -> str:
    """Backend and precision, and for compiled code the processor that it is for."""
    return f"{backend}-{dtype}" + (f"-{target['arch']}" if "arch" in target else "")


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds. `model` is a preset's name or, for other sizes, the family's."""

    model: str
    config: dict[str, Any]
    experts: tuple[str, ...]
    weights: dict[str, WeightsRecord]
    engines: tuple[EngineRecord, ...]
    wanexport: str
    schema: int = SCHEMA

    def weights_of(self, dtype: str) -> list[WeightsRecord]:
        """The weights sets of one dtype, one for each expert."""
        return [record for record in self.weights.values() if record.dtype == dtype]

    def files(self) -> list[FileRecord]:
        """Every file the bundle needs besides its manifest."""
        records = [record.file for record in self.weights.values()]
        return records + [file for engine in self.engines for file in engine.files.values()]


def from_json(data: Mapping[str, Any]) -> Manifest:
    """A Manifest from parsed JSON. Raises KeyError, TypeError or ValueError when it is none."""
    manifest: Manifest = _decode(Manifest, data, "manifest")
    for file in manifest.files():
        path = PurePosixPath(file.path)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{file.path} lies outside the bundle")
    for engine in manifest.engines:
        experts = {weights.expert for weights in manifest.weights_of(engine.dtype)}
        if experts != set(manifest.experts or ("",)):
            raise ValueError(f"engine {engine.name} lacks weights of an expert")
        boundary, needed = engine.sampling.boundary, bool(manifest.experts)
        if (boundary is not None) != needed or (boundary is not None and not 0 < boundary < 1):
            raise ValueError(f"boundary {boundary} does not fit {len(experts)} weights sets")
        missing = {"latent", "timestep", "text"} - set(engine.inputs)
        if missing:
            raise ValueError(f"engine {engine.name} has no input {', '.join(sorted(missing))}")
        _check_regions(engine, manifest.config)
    return manifest


def _check_regions(engine: EngineRecord, config: Mapping[str, Any]) -> None:
    """Raise ValueError when an engine lacks what running it takes."""
    if "device" not in engine.target:
        raise ValueError(f"engine {engine.name} is for no device")
    if engine.backend == "aoti":
        if not set(REGIONS) <= engine.files.keys() & engine.parameters.keys():
            raise ValueError(f"engine {engine.name} lacks one of {', '.join(REGIONS)}")
        if not all(keys.isdecimal() for keys in engine.attention):
            raise ValueError(f"engine {engine.name} has attention to what is no number of keys")
        if type(config.get("num_layers")) is not int:
            raise ValueError("num_layers is no number")
    if engine.backend in FLAVOURS:
        if not {"arch", engine.backend} <= engine.target.keys():
            raise ValueError(f"engine {engine.name} is for no architecture or no version")
        if not re.fullmatch(r"sm\d+", engine.target["arch"]):
            raise ValueError(f"engine {engine.name} is for no GPU's architecture")
        if engine.target["device"] != "cuda":
            raise ValueError(f"engine {engine.name} is for device {engine.target['device']}")
        baked = {f"denoiser-{expert}" for expert in ("high_noise", "low_noise")}
        if "denoiser" not in engine.files and not baked <= engine.files.keys():
            raise ValueError(f"engine {engine.name} has no plan for an expert")


def _decode(hint: Any, data: Any, where: str) -> Any:
    """Build what a type hint of this module's dataclasses says. Raises TypeError or ValueError."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return data
    if origin is UnionType:  # X | None
        return None if data is None else _decode(arguments[0], data, where)
    if is_dataclass(hint) and isinstance(hint, type):
        hints = get_type_hints(hint)
        if not isinstance(data, dict) or not data.keys() <= hints.keys():
            raise TypeError(f"{where} is not of the form that {hint.__name__} has")
        return hint(**{key: _decode(hints[key], data[key], f"{where}.{key}") for key in data})
    if origin is dict and isinstance(data, dict):
        return {key: _decode(arguments[1], value, f"{where}.{key}") for key, value in data.items()}
    if origin is tuple and isinstance(data, list):
        hints_of = arguments[:1] * len(data) if arguments[1:] == (...,) else arguments
        items = zip(hints_of, data, strict=True)
        return tuple(_decode(h, value, f"{where}[{i}]") for i, (h, value) in enumerate(items))
    if hint is float and type(data) in (int, float) and isfinite(data):
        return float(data)
    if hint in (int, str) and type(data) is hint and (hint is str or data >= 0):
        return data
    raise TypeError(f"{where} is {data!r:.40}: not a {getattr(hint, '__name__', hint)}")


def read_manifest(bundle: Path, name: str = MANIFEST) -> Manifest:
    """Read a bundle's manifest.

    Raises WanExportError when the folder is no bundle, the manifest is damaged, or its schema is
    another than this version reads.
    """
    path = bundle / name
    try:
        data = json.loads(path.read_text())
        schema = data["schema"]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise WanExportError(
            f"{bundle} is no bundle: it has no {MANIFEST}; "
            f"make one with: wanexport build -o {bundle}"
        ) from error
    except OSError as error:
        raise WanExportError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WanExportError(
            f"{path} is damaged ({error}): delete {bundle} and build again"
        ) from error
    if schema != SCHEMA:
        raise WanExportError(
            f"{path} has schema {schema}, this wanexport reads {SCHEMA}: "
            f"delete {bundle} and build again, or install the wanexport that wrote it"
        )
    try:
        return from_json(data)
    except (KeyError, TypeError, ValueError) as error:
        raise WanExportError(
            f"{path} is damaged ({error}): delete {bundle} and build again"
        ) from error
