"""The bundle's manifest: its schema, and reading it.

The manifest is the commit point: a reader sees a whole old bundle, a whole new one, or none.
Whoever wrote it, what is read is within bounds; `usable.py` says whether an engine fits its model.
Fields that a later version wrote, at whatever depth, are ignored and kept. An engine whose record
cannot be read cannot be used, and is kept as it is; the bundle and its other engines serve on.
"""

import errno
import os
import reprlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from wanexport.runtime.bundle.details import KINDS, VAE_KINDS, Details, Kind, unknown_file
from wanexport.runtime.bundle.path import check_path
from wanexport.runtime.bundle.regular_file import read_regular
from wanexport.runtime.bundle.schema1 import upgrade
from wanexport.runtime.decode import (
    Count,
    Figure,
    Known,
    Line,
    Name,
    Sha256,
    Size,
    Text,
    decode,
    encode,
    keeping_unknown,
    parse_json,
)
from wanexport.runtime.dtypes import PRECISIONS
from wanexport.runtime.errors import BundleError, WanExportError, printable
from wanexport.runtime.family import SamplingDefaults, family_named
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.program import Input, Program, TensorSpec
from wanexport.runtime.wan_config import WanConfig

SCHEMA = 2
MANIFEST = "manifest.json"
# An engine takes up to 7 kB. A thousand of them fit, and parsing so much takes under 0.5 GB.
MAX_BYTES = 8_000_000
DEVICES = ("cpu", "cuda")
DENOISER, VAE = "denoiser", "vae"  # the roles of weights and engines
TEXT_ENCODER, IMAGE_ENCODER = "text_encoder", "image_encoder"  # of weights that have no engine
ENCODERS = (TEXT_ENCODER, IMAGE_ENCODER)
ROLES = {DENOISER: KINDS, VAE: VAE_KINDS}
BASE = "base"  # the weights set that a build makes
_MOST = 1000  # engines: ten times what any bundle has
_REMEDY = "restore it, or build again into another folder with -o; the weights stay good"


@dataclass(frozen=True)
class FileRecord:
    """A file of the bundle; `path` is relative to it, with forward slashes."""

    path: str
    size: Size
    sha256: Sha256


@dataclass(frozen=True)
class WeightsRecord:
    """One converted checkpoint in one dtype: the part of the weights set `name` for one expert.

    `layout` is the hash of the file's header, by which engines know what they can read. `expert`
    is empty where there is only one.
    """

    name: Name
    role: Name
    expert: Annotated[str, Text(r"[A-Za-z0-9._+-]*", 64)]
    dtype: Name
    layout: Sha256
    file: FileRecord
    content: Line  # hash of the source's tensors, whatever their files
    source: Annotated[
        dict[str, Any],
        Known({"hub": str, "revision": str | None, "path": str, "preset": str}),
    ]
    # How a run with this set samples (`recipes.RECIPES`), where its maker said so.
    recipe: Annotated[str, Text(r"[A-Za-z0-9._+-]*", 64)] = ""
    unknown: dict[str, Any] = field(default_factory=dict)  # what a later version wrote


def weights_label(name: str, expert: str, dtype: str, role: str = DENOISER) -> str:
    """How the manifest, messages and folders call one file of a weights set.

    That of the base set is called by expert and dtype alone: `high_noise-bf16`; that of the VAE
    `vae-bf16`.
    """
    parts = ("" if role == DENOISER else role, "" if name == BASE else name, expert, dtype)
    return "-".join(part for part in parts if part)


# What is read of an engine's free fields.
_BUILD = {
    "seconds": Figure,
    "flops_per_forward": Count,
    "attention_expected": Count,
    "attention_layers": Count | None,
    "attention_kernels": Count | None,
    "activation_bytes": Count | None,
    "plan_seconds": Figure,
    "plan_peak_rss_bytes": Count,
}
_PROOF = {
    "method": str,
    "blocks": Count,
    "tokens": Count,
    "error": float | None,
    "gate": float | None,
    "verify": str,
    "peak_bytes": Count,
    "decode_peak_bytes": Count,
}
_PARITY = {"passed": bool, "reference": str, "error": float | None}


@dataclass(frozen=True)
class EngineRecord:
    """One compiled Program at one geometry; it reads any weights of the layout that it names.

    `details` are of the backend's own type, one of `details.KINDS`, where that is known and they
    have its form, and else what was read. `build` is a log of how the engine came about.
    """

    backend: Name
    role: Name
    family: Name
    dtype: Name
    geometry: Geometry
    program: Program
    details: Any
    sampling: SamplingDefaults
    files: dict[Name, FileRecord]
    layout: Sha256
    key: Annotated[str, Text(r"[A-Za-z0-9]*", 128)]
    target: Annotated[dict[Name, Line], Known({"device": Name, "arch": Name})]
    build: Annotated[dict[str, Any], Known(_BUILD)] = field(default_factory=dict)
    lint: dict[Line, Count] = field(default_factory=dict)
    proof: Annotated[dict[str, Any], Known(_PROOF)] = field(default_factory=dict)
    parity: Annotated[dict[str, Any], Known(_PARITY)] = field(default_factory=dict)
    unknown: dict[str, Any] = field(default_factory=dict)  # what a later version wrote

    @property
    def name(self) -> str:
        """How messages and folders call this engine: 480x832x81/aoti-bf16-sm90."""
        label = engine_label(self.backend, self.dtype, self.target, self.role)
        return f"{self.geometry.name}/{label}"

    @property
    def inputs(self) -> dict[str, Input]:
        """The Program's inputs."""
        return self.program.inputs

    @property
    def output(self) -> TensorSpec:
        """The velocity's shape and dtype."""
        return self.program.output

    @property
    def kind(self) -> Kind | None:
        """What the manifest holds of engines of this role and backend; None of unknown ones."""
        return ROLES.get(self.role, {}).get(self.backend)

    @property
    def unfamiliar(self) -> str:
        """What of the engine this version does not know, in words; empty when it knows all."""
        if self.role not in ROLES:
            return f"role {self.role}"
        if self.kind is None:
            return f"backend {self.backend}"
        if self.dtype not in PRECISIONS:
            return f"dtype {self.dtype}"
        if self.target.get("device", "cpu") not in DEVICES:
            return f"device {self.target['device']}"
        if not isinstance(self.details, self.kind.details):
            return "details of another form"
        if self.program.unfamiliar:
            return self.program.unfamiliar
        role = unknown_file(self.kind, self.program, self.files)
        return f"file {role}" if role else ""

    @property
    def fault(self) -> str:
        """What the record of a familiar engine lacks or has wrong; empty when nothing."""
        if "device" not in self.target:
            return "it is for no device"
        details: Details = self.details
        calls = self.program.functions
        return details.fault(self.backend, self.target, calls, self.files) or self.program.fault()


def engine_label(backend: str, dtype: str, target: Mapping[str, str], role: str = DENOISER) -> str:
    """Backend and precision, and for compiled code the processor that it is for.

    That of another role than the denoiser's begins with it: `vae-aoti-bf16-sm90`.
    """
    prefix = "" if role == DENOISER else f"{role}-"
    return f"{prefix}{backend}-{dtype}" + (f"-{target['arch']}" if "arch" in target else "")


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds. `model` is a preset's name or, for other sizes, the family's.

    `unread` are the records of engines that cannot be read, as they are in the file.
    """

    model: Line
    config: WanConfig
    experts: tuple[Name, ...]
    weights: dict[Name, WeightsRecord]
    engines: tuple[EngineRecord, ...]
    wanexport: Line
    schema: int = SCHEMA
    unread: tuple[dict[str, Any], ...] = ()
    unknown: dict[str, Any] = field(default_factory=dict)  # what a later version wrote

    def sets(self, layout: str, role: str = DENOISER) -> dict[str, dict[str, WeightsRecord]]:
        """The weights sets of a role and layout by name, each with its records by expert."""
        found: dict[str, dict[str, WeightsRecord]] = {}
        for record in self.weights.values():
            if record.role == role and record.layout == layout:
                found.setdefault(record.name, {})[record.expert] = record
        return found

    def weights_of(
        self, layout: str, name: str = BASE, role: str = DENOISER
    ) -> list[WeightsRecord]:
        """The weights set of a name in the layout that an engine reads, in the experts' order."""
        found = self.sets(layout, role).get(name, {})
        experts = self.experts if role == DENOISER else ()
        return [found[expert] for expert in experts or ("",) if expert in found]

    def sets_named(self, name: str) -> list[WeightsRecord]:
        """The records of a weights set of the denoiser, in every layout."""
        return [w for w in self.weights.values() if (w.name, w.role) == (name, DENOISER)]

    def files(self) -> list[FileRecord]:
        """Every file the bundle needs besides its manifest."""
        records = [record.file for record in self.weights.values()]
        records += [file for engine in self.engines for file in engine.files.values()]
        return records + [file for engine in self.unread for file in _files_of(engine)]


def to_json(manifest: Manifest) -> dict[str, Any]:
    """What `from_json` reads, with what a later version wrote in its place."""
    data = encode(manifest)
    data["engines"] += data.pop("unread")
    return {"family": data["config"].pop("family"), **data}


def from_json(data: Any) -> Manifest:
    """A Manifest from parsed JSON.

    Raises TypeError or ValueError when it is none, BundleError when it is of a model of another
    form than this version knows.
    """
    config, engines = data["config"], data["engines"]
    if not isinstance(config, dict) or not isinstance(engines, list) or len(engines) > _MOST:
        raise TypeError(f"config is no object, or engines are no list of at most {_MOST}")
    family = decode(Name, data["family"], "family")
    known = {key: value for key, value in data.items() if key not in ("family", "unread")}
    known |= {"config": {**config, "family": family}, "engines": []}
    try:
        manifest: Manifest = decode(Manifest, known, "manifest")
    except (TypeError, ValueError):
        family_named(family)  # whose sizes may be others
        raise
    rows = [_read_engine(engine, f"engines[{i}]") for i, engine in enumerate(engines)]
    manifest = replace(
        manifest,
        engines=tuple(row for row in rows if isinstance(row, EngineRecord)),
        unread=tuple(row for row in rows if not isinstance(row, EngineRecord)),
    )
    _check_files(manifest.files())
    return manifest


def _read_engine(data: Any, where: str) -> EngineRecord | dict[str, Any]:
    """An engine's record, or what stands in its place. Raises TypeError when that is no object."""
    try:
        return decode_engine(data, where)
    except (TypeError, ValueError):
        if isinstance(data, dict):
            return data
        raise


def decode_engine(data: Any, where: str) -> EngineRecord:
    """An engine's record from parsed JSON, with details of its backend's type where they have it.

    Raises TypeError or ValueError when it is none.
    """
    engine: EngineRecord = decode(EngineRecord, data, where)
    kind = engine.kind
    if kind is None:
        return engine
    try:
        details = decode(kind.details, engine.details, f"{where}.details")
    except (TypeError, ValueError):
        return engine
    typed: EngineRecord = keeping_unknown(replace(engine, details=details), data)
    return typed


def _files_of(engine: Mapping[str, Any]) -> list[FileRecord]:
    """The files that a record lists which cannot be read, where it lists them as others do."""
    files, found = engine.get("files"), []
    for value in files.values() if isinstance(files, dict) else ():
        with suppress(TypeError, ValueError):
            found.append(decode(FileRecord, value, "file"))
    return found


def _check_files(files: Sequence[FileRecord]) -> None:
    """Raise ValueError for a path that is not one of an artefact, or has two contents."""
    contents: dict[str, FileRecord] = {}
    for file in files:
        check_path(file.path)
        if contents.setdefault(file.path, file) != file:
            raise ValueError(f"{file.path} has two sizes or hashes")


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
        raise BundleError(
            f"{bundle} is no bundle: it has no {MANIFEST}; "
            f"make one with: wanexport build -o {bundle}"
        ) from error
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error
    except WanExportError as error:
        raise BundleError(f"{error}; {_REMEDY}") from error
    try:
        data = parse_json(content)
        schema = data["schema"]
        if type(schema) is int and schema not in (1, SCHEMA):
            raise BundleError(
                f"{path} has schema {reprlib.repr(schema)}, this wanexport reads 1 and {SCHEMA}: "
                f"install the wanexport that wrote it, or build again into another folder with -o"
            )
        return from_json(upgrade(data) if type(schema) is int and schema == 1 else data)
    except BundleError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{path} is damaged ({printable(error, 300)}): {_REMEDY}") from error
