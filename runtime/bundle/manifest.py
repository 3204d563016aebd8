"""The bundle's manifest: its schema, and reading it.

The manifest is the commit point: a reader sees a whole old bundle, a whole new one, or none.
Whoever wrote it, what is read is within bounds; `usable.py` says whether an engine fits its model.
"""

import errno
import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from packaging.version import InvalidVersion, Version

from wanexport.runtime.bundle.decode import (
    Count,
    Figure,
    Known,
    Line,
    Name,
    Range,
    Sha256,
    Size,
    Text,
    decode,
    parse_json,
)
from wanexport.runtime.bundle.path import check_path
from wanexport.runtime.bundle.regular_file import read_regular
from wanexport.runtime.bundle.signature import REGIONS, SAFETENSORS_DTYPES
from wanexport.runtime.errors import WanExportError, printable
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.solvers import MAX_SHIFT, MAX_STEPS
from wanexport.runtime.wan_config import EXPERTS, WanConfig

SCHEMA = 1
MANIFEST = "manifest.json"
# An engine takes up to 7 kB. A thousand of them fit, and parsing so much takes under 0.5 GB.
MAX_BYTES = 8_000_000
MAX_GUIDANCE = 1000
DEVICES = ("cpu", "cuda")
_EXPERT_ROLES = frozenset(f"denoiser-{expert}" for expert in EXPERTS)
_TENSORRT = ("tensorrt", "tensorrt-rtx")  # the flavours, which are backends each
_PLAN_ROLES = {"denoiser", "layers", *_EXPERT_ROLES}
# backend -> what the files of its engines are
ROLES: Mapping[str, set[str]] = {
    "onnx": {"denoiser"},
    "aoti": {*REGIONS, "flash_attention"},
    **dict.fromkeys(_TENSORRT, _PLAN_ROLES),
}
_REMEDY = "restore it, or build again into another folder with -o; the weights stay good"


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one engine input or output."""

    shape: tuple[Size, ...]
    dtype: Name = "fp32"


@dataclass(frozen=True)
class SamplingDefaults:
    """What `sample` uses unless told; guidance is Wan's pair (low noise, high noise)."""

    steps: Annotated[int, Range(1, MAX_STEPS)]
    shift: Annotated[float, Range(1 / MAX_SHIFT, MAX_SHIFT)]
    guidance: tuple[
        Annotated[float, Range(-MAX_GUIDANCE, MAX_GUIDANCE)],
        Annotated[float, Range(-MAX_GUIDANCE, MAX_GUIDANCE)],
    ]
    boundary: float | None  # timesteps >= 1000 * boundary go to the high-noise expert
    fps: Annotated[int, Range(1, 1000)]
    solver: Name = "unipc"


@dataclass(frozen=True)
class FileRecord:
    """A file of the bundle; `path` is relative to it, with forward slashes."""

    path: str
    size: Size
    sha256: Sha256


@dataclass(frozen=True)
class WeightsRecord:
    """One converted checkpoint in one dtype. `expert` is empty where there is only one."""

    dtype: Name
    expert: Annotated[str, Text(r"[A-Za-z0-9._+-]*", 64)]
    file: FileRecord
    header_sha256: Sha256
    content: Line  # hash of the source's tensors, whatever their files
    source: Annotated[
        dict[str, Any],
        Known({"hub": str, "revision": str | None, "path": str, "preset": str}),
    ]
    unknown: dict[str, Any] = field(default_factory=dict)  # what a later version wrote


# What is read of an engine's free fields.
_BUILD = {
    "seconds": Figure,
    "flops_per_forward": Count,
    "attention_score_bytes": Count,
    "attention_expected": Count,
    "attention_layers": Count | None,
    "attention_kernels": Count | None,
    "activation_bytes": Count | None,
    "plan_seconds": Figure,
    "plan_peak_rss_bytes": Count,
    "hardware_compatible": bool,
    "version_compatible": bool,
}
_PROOF = {
    "method": str,
    "blocks": Count,
    "tokens": Count,
    "error": float | None,
    "gate": float | None,
    "verify": str,
}
_PARITY = {"passed": bool, "reference": str, "error": float | None}


@dataclass(frozen=True)
class EngineRecord:
    """One compiled graph at one geometry; it reads any weights whose header hash it names."""

    backend: Name
    dtype: Name
    geometry: Geometry
    inputs: dict[Name, TensorSpec]
    output: TensorSpec
    sampling: SamplingDefaults
    files: dict[Name, FileRecord]
    weights_header_sha256: Sha256
    key: Annotated[str, Text(r"[A-Za-z0-9]*", 128)]
    target: Annotated[dict[Name, Line], Known({"device": Name, "arch": Name})]
    parameters: dict[Name, tuple[Line, ...]] = field(default_factory=dict)  # in a region's order
    attention: dict[Name, Name] = field(default_factory=dict)  # number of keys -> kernel
    build: Annotated[dict[str, Any], Known(_BUILD)] = field(default_factory=dict)
    lint: dict[Line, Count] = field(default_factory=dict)
    proof: Annotated[dict[str, Any], Known(_PROOF)] = field(default_factory=dict)
    parity: Annotated[dict[str, Any], Known(_PARITY)] = field(default_factory=dict)
    unknown: dict[str, Any] = field(default_factory=dict)  # what a later version wrote

    @property
    def name(self) -> str:
        """How messages and folders call this engine: 480x832x81/aoti-bf16-sm90."""
        return f"{self.geometry.name}/{engine_label(self.backend, self.dtype, self.target)}"

    @property
    def unfamiliar(self) -> str:
        """What of the engine this version does not know, in words; empty when it knows all."""
        if self.backend not in ROLES:
            return f"backend {self.backend}"
        if self.dtype not in SAFETENSORS_DTYPES:
            return f"dtype {self.dtype}"
        if self.target.get("device", "cpu") not in DEVICES:
            return f"device {self.target['device']}"
        roles = [role for role in self.files if role not in ROLES[self.backend]]
        return f"file {roles[0]}" if roles else ""


def engine_label(backend: str, dtype: str, target: Mapping[str, str]) -> str:
    """Backend and precision, and for compiled code the processor that it is for."""
    return f"{backend}-{dtype}" + (f"-{target['arch']}" if "arch" in target else "")


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds. `model` is a preset's name or, for other sizes, the family's."""

    model: Line
    config: WanConfig
    experts: tuple[Name, ...]
    weights: dict[Name, WeightsRecord]
    engines: tuple[EngineRecord, ...]
    wanexport: Line
    schema: int = SCHEMA
    unknown: dict[str, Any] = field(default_factory=dict)  # what a later version wrote

    def weights_of(self, dtype: str) -> list[WeightsRecord]:
        """The weights sets of one dtype, one for each expert."""
        return [record for record in self.weights.values() if record.dtype == dtype]

    def files(self) -> list[FileRecord]:
        """Every file the bundle needs besides its manifest."""
        records = [record.file for record in self.weights.values()]
        return records + [file for engine in self.engines for file in engine.files.values()]


def to_json(manifest: Manifest) -> dict[str, Any]:
    """What `from_json` reads, with what a later version wrote in its place."""
    data = asdict(manifest)
    for record in (data, *data["weights"].values(), *data["engines"]):
        record |= record.pop("unknown")
    return data


def from_json(data: Any) -> Manifest:
    """A Manifest from parsed JSON. Raises TypeError or ValueError when it is none."""
    manifest: Manifest = decode(Manifest, data, "manifest")
    _check_files(manifest.files())
    served: dict[str, set[str]] = {}
    for weights in manifest.weights.values():
        served.setdefault(weights.dtype, set()).add(weights.expert)
    for engine in manifest.engines:
        if not engine.unfamiliar:
            _check_engine(engine, manifest.experts, served.get(engine.dtype, set()))
    return manifest


def _check_files(files: Sequence[FileRecord]) -> None:
    """Raise ValueError for a path that is not one of an artefact, or has two contents."""
    contents: dict[str, FileRecord] = {}
    for file in files:
        check_path(file.path)
        if contents.setdefault(file.path, file) != file:
            raise ValueError(f"{file.path} has two sizes or hashes")


def _check_engine(engine: EngineRecord, experts: tuple[str, ...], served: set[str]) -> None:
    """Raise ValueError when an engine lacks what running it takes."""
    if served != set(experts or ("",)):
        raise ValueError(f"engine {engine.name} lacks weights of an expert")
    boundary = engine.sampling.boundary
    if (boundary is not None) != bool(experts) or (boundary is not None and not 0 < boundary < 1):
        raise ValueError(f"boundary {boundary} does not fit {len(served)} weights sets")
    missing = {"latent", "timestep", "text"} - set(engine.inputs)
    if missing:
        raise ValueError(f"engine {engine.name} has no input {', '.join(sorted(missing))}")
    if "device" not in engine.target:
        raise ValueError(f"engine {engine.name} is for no device")
    if engine.backend == "onnx" and "denoiser" not in engine.files:
        raise ValueError(f"engine {engine.name} has no graph")
    if engine.backend == "aoti":
        if not set(REGIONS) <= engine.files.keys() & engine.parameters.keys():
            raise ValueError(f"engine {engine.name} lacks one of {', '.join(REGIONS)}")
        if not all(keys.isdecimal() for keys in engine.attention):
            raise ValueError(f"engine {engine.name} has attention to what is no number of keys")
    if engine.backend in _TENSORRT:
        _check_plan(engine)


def _is_version(text: str) -> bool:
    """Whether a text is a version of a package, as 10.16.1.11 or 10.14.1.48.post1."""
    try:
        return len(text) <= 100 and bool(Version(text).release)
    except InvalidVersion:
        return False


def _check_plan(engine: EngineRecord) -> None:
    """Raise ValueError when a TensorRT engine does not say what its plan is for."""
    if not {"arch", engine.backend} <= engine.target.keys():
        raise ValueError(f"engine {engine.name} is for no architecture or no version")
    if not re.fullmatch(r"sm[0-9]{1,4}", engine.target["arch"]):
        raise ValueError(f"engine {engine.name} is for no GPU's architecture")
    if not _is_version(engine.target[engine.backend]):
        raise ValueError(f"engine {engine.name} is for no version of TensorRT")
    if engine.target["device"] != "cuda":
        raise ValueError(f"engine {engine.name} is for device {engine.target['device']}")
    if "denoiser" not in engine.files and not engine.files.keys() >= _EXPERT_ROLES:
        raise ValueError(f"engine {engine.name} has no plan for an expert")


def read_manifest(bundle: Path, name: str = MANIFEST) -> Manifest:
    """Read a bundle's manifest.

    Raises WanExportError when the folder is no bundle, the manifest is damaged, or its schema is
    another than this version reads.
    """
    path = bundle / name
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        content = read_regular(path, at_most=MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise WanExportError(
            f"{bundle} is no bundle: it has no {MANIFEST}; "
            f"make one with: wanexport build -o {bundle}"
        ) from error
    except OSError as error:
        raise WanExportError(f"cannot read {path}: {error.strerror}") from error
    except WanExportError as error:
        raise WanExportError(f"{error}; {_REMEDY}") from error
    try:
        data = parse_json(content)
        schema = data["schema"]
        if type(schema) is int and schema != SCHEMA:
            raise WanExportError(
                f"{path} has schema {reprlib.repr(schema)}, this wanexport reads {SCHEMA}: install "
                f"the wanexport that wrote it, or build again into another folder with -o"
            )
        return from_json(data)
    except WanExportError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise WanExportError(f"{path} is damaged ({printable(error, 300)}): {_REMEDY}") from error
