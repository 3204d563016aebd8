"""What `bench` measures: one engine of one expert, with all said that the options leave open."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from wanexport.exporter.bench.arms import (
    ARMS,
    MACHINE,
    Arm,
    Job,
    options_of,
    options_taken,
)
from wanexport.exporter.bench.expert import with_measured_expert
from wanexport.runtime.bundle.check import check_size
from wanexport.runtime.bundle.manifest import EngineRecord, Manifest, read_manifest
from wanexport.runtime.bundle.pinned_file import PinnedFile
from wanexport.runtime.engines.choose import choose_engine
from wanexport.runtime.engines.engine import EngineOptions
from wanexport.runtime.errors import BadRequest, WanExportError
from wanexport.runtime.load import find_weights
from wanexport.runtime.solvers import NUM_TRAIN_TIMESTEPS

_TIMESTEP = 812.0
_HIGH_NOISE_TIMESTEP = 950.0
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Subject:
    """What is measured: a model of one expert, an engine of it, opened how, its weights' file."""

    bundle: Path
    manifest: Manifest
    record: EngineRecord
    options: EngineOptions
    weights: PinnedFile
    expert: str | None
    timestep: float


def choose_subject(bundle: Path, asked: EngineOptions, arms: Sequence[Arm]) -> Subject:
    """The engine of the first arm that has one, by default the best one, with all said of it."""
    whole = read_manifest(bundle)
    manifest = with_measured_expert(whole)
    engines = [options_of(arm, asked) for arm in arms if arm.backend is not None]
    choice = choose_engine(bundle, manifest, engines[0] if engines else asked)
    record, geometry = choice.record, choice.record.geometry
    options = replace(
        asked,
        device=choice.device,
        dtype=record.dtype,
        resolution=f"{geometry.height}x{geometry.width}",
        frames=geometry.frames,
        chunk=geometry.chunk or None,
        cache=geometry.cache or None,
        weights=_weights_of_expert(asked.weights, whole),
    )
    (weights,) = find_weights(bundle, record, options.weights, manifest).files.values()
    boundaries = [e.sampling.boundary for e in whole.engines if e.key == record.key]
    expert = whole.experts[0] if whole.experts else None
    timestep = _timestep(boundaries[0])
    return Subject(bundle, manifest, record, options, weights, expert, timestep)


def _weights_of_expert(weights: str | Path | None, whole: Manifest) -> str | None:
    """The name of a weights set, or the absolute path of what the measured expert reads."""
    if weights is None:
        return None
    is_set = weights in {record.name for record in whole.weights.values()}
    if is_set or not os.path.lexists(weights):  # of which `find_weights` says that it is not there
        return str(weights)
    path = Path(weights).resolve()
    return str(path / whole.experts[0] if whole.experts and path.is_dir() else path)


def _timestep(boundary: float | None) -> float:
    """A timestep that the measured expert serves."""
    if boundary is None:
        return _TIMESTEP
    return max(_HIGH_NOISE_TIMESTEP, boundary * NUM_TRAIN_TIMESTEPS)


def engine_of(arm: Arm, subject: Subject) -> EngineRecord | None:
    """The engine that an arm runs, None of a peer. Raises WanExportError when there is none."""
    if arm.backend is None:
        return None
    options = options_of(arm, subject.options)
    return choose_engine(subject.bundle, subject.manifest, options).record


def arms_that_apply(subject: Subject) -> list[Arm]:
    """The arms that can run; on a CPU, where compiling takes minutes, without those that do."""
    arms = (arm for arm in ARMS.values() if arm.compiles is None or subject.options.device != "cpu")
    return [arm for arm in arms if not _obstacle(arm, subject)]


def check_arms(arms: Sequence[Arm], subject: Subject) -> None:
    """Raise BadRequest for an arm that cannot run here, and for an option that no arm takes."""
    for arm in arms:
        if reason := _obstacle(arm, subject):
            raise BadRequest(f"arm {arm.name} cannot run here: {reason}")
    if unused := subject.options.given().keys() - frozenset().union(*map(options_taken, arms)):
        names, words = ", ".join(arm.name for arm in arms), " and ".join(sorted(unused))
        raise BadRequest(f"no arm of {names} takes {words.replace('_', ' ')}: leave it out")


def _obstacle(arm: Arm, subject: Subject) -> str:
    """Why an arm cannot run here; empty when it can."""
    try:
        engine_of(arm, subject)
        if arm.peer is not None:
            from wanexport.exporter.compare.peers import check_implementation

            check_implementation(arm.peer)
    except WanExportError as error:
        return str(error)
    return ""


def first_job(subject: Subject, folder: Path, rounds: int, profile: bool) -> Job:
    """What every process is told but for its arm: here it is to measure the machine."""
    return Job(
        arm=MACHINE,
        bundle=str(subject.bundle),
        options=asdict(subject.options),
        geometry=asdict(subject.record.geometry),
        weights=str(subject.weights.path),
        inputs=str(folder / "inputs.safetensors"),
        velocity=str(folder / "velocity.safetensors"),
        rounds=rounds,
        profile=profile,
        spawned=0.0,
    )


def read_files(subject: Subject) -> None:
    """Have the page cache hold what the arms read, lest the first of them pay for the disk."""
    engine = [check_size(subject.bundle, file) for file in subject.record.files.values()]
    buffer = bytearray(_CHUNK)
    for file in (subject.weights, *engine):
        with file.path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
