"""What `compare` saves for NVIDIA's polygraphy: inputs, outputs, and the command that repeats it.

The formats are polygraphy's own and written by itself, imported where it is needed.
"""

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from wanexport.exporter.backends.polygraphy import RUNNERS
from wanexport.exporter.compare.output import check_output
from wanexport.exporter.compare.rows import ComparedCall
from wanexport.runtime.arrays import to_numpy
from wanexport.runtime.bundle.durable import write_durably
from wanexport.runtime.bundle.manifest import EngineRecord
from wanexport.runtime.bundle.path import WEIGHTS_FILE
from wanexport.runtime.bundle.pinned_file import PinnedFile
from wanexport.runtime.denoiser import Denoiser, pad_rows
from wanexport.runtime.engines.tensorrt import plan_role
from wanexport.runtime.errors import needing_package
from wanexport.runtime.program import Input


@dataclass(frozen=True)
class SavedFiles:
    """Where inputs and outputs go, None for what is not saved.

    A model of two experts has files for each, as its calls are those of two sets of weights: the
    expert's name is added to the file's. overwrite: whether what is there may be replaced.
    """

    inputs: Path | None
    outputs: Path | None
    overwrite: bool = False

    def of(self, expert: str) -> "SavedFiles":
        """The files of one expert, "" for a model without any."""
        return SavedFiles(
            _of_expert(self.inputs, expert), _of_expert(self.outputs, expert), self.overwrite
        )

    def paths(self) -> list[Path]:
        """The files that there are to be."""
        return [path for path in (self.inputs, self.outputs) if path is not None]


def _of_expert(path: Path | None, expert: str) -> Path | None:
    return path.with_stem(f"{path.stem}-{expert}") if path and expert else path


def check_files(files: SavedFiles, experts: Collection[str] = ("",)) -> None:
    """Refuse before the work what could not be saved after it, of these experts.

    Raises BadRequest.
    """
    reads = "polygraphy reads JSON"
    for own in map(files.of, experts):
        for path, option in ((own.inputs, "--save-inputs"), (own.outputs, "--save-outputs")):
            if path is not None:
                check_output(path, option, ".json", reads, overwrite=files.overwrite)
    if files.paths():
        with needing_package("polygraphy", "saving for polygraphy"):
            import polygraphy.comparator
            import polygraphy.json  # noqa: F401


def save_calls(
    files: SavedFiles,
    calls: Sequence[ComparedCall],
    bundle: Path,
    denoiser: Denoiser,
    weights: Mapping[str, PinnedFile],
    reference: str,
) -> dict[str, Any]:
    """Save the calls as polygraphy reads them; returns the files, its commands, or why none.

    denoiser is the engine's, weights are its files by expert, and reference is the runner's name
    for the reference's velocities.
    """
    record = denoiser.record
    saved, commands = [], []
    note = _obstacle(denoiser, weights) or (
        "" if files.inputs else "it needs the inputs: add --save-inputs"
    )
    for expert, own in _by_expert(denoiser, calls).items():
        written = files.of(expert)
        _write(written, own, record, reference)
        saved += [str(path) for path in written.paths()]
        if not note:
            engine = bundle / record.files[plan_role(record.files, expert)].path
            run = RUNNERS[record.backend].command(record, engine, weights[expert].path)
            commands.append(f"{run} {_loads(written, own)}")
    return {"files": saved, "commands": commands, "note": note or None}


def _by_expert(denoiser: Denoiser, calls: Sequence[ComparedCall]) -> dict[str, list[ComparedCall]]:
    """The calls that each expert served, in their order."""
    grouped: dict[str, list[ComparedCall]] = {}
    for call in calls:
        expert = denoiser.expert(float(to_numpy(call.inputs["timestep"]).max()))
        grouped.setdefault(expert, []).append(call)
    return grouped


def _write(
    files: SavedFiles, calls: Sequence[ComparedCall], record: EngineRecord, reference: str
) -> None:
    from polygraphy.comparator import RunResults
    from polygraphy.json import to_json
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):  # it logs to standard output, where JSON may go
        if files.inputs:
            fed = [feed(call.inputs, record.inputs) for call in calls]
            write_durably(files.inputs, to_json(fed).encode())
        if files.outputs:
            # It compares each runner with the next, and the one that it runs comes first.
            results = RunResults()
            (name,) = record.program.outputs
            results.add([{name: call.reference} for call in calls], runner_name=reference)
            results.add([{name: call.velocity} for call in calls], runner_name=record.name)
            write_durably(files.outputs, to_json(results).encode())


def feed(inputs: Mapping[str, Any], specs: Mapping[str, Input]) -> dict[str, np.ndarray]:
    """A denoiser's inputs as its graph takes them: fp32, rows padded, numbers for each frame."""
    fed = {}
    for name, spec in specs.items():
        array = to_numpy(inputs[name])
        array = pad_rows(array, spec.shape, name=name) if spec.draw == "rows" else array
        fed[name] = np.ascontiguousarray(np.broadcast_to(array, spec.shape))
    return fed


def _obstacle(denoiser: Denoiser, weights: Mapping[str, PinnedFile]) -> str:
    """Why polygraphy cannot run the engine; empty when it can."""
    record = denoiser.record
    runner = RUNNERS.get(record.backend)
    if runner is None:
        return f"polygraphy runs no {record.backend} engine"
    if not record.program.is_plain:
        return "the engine keeps a state between calls, which polygraphy does not"
    names = {file.path.name for file in weights.values()}
    if runner.names_weights and names != {WEIGHTS_FILE}:
        return f"the graph names its weights {WEIGHTS_FILE}, these are {', '.join(sorted(names))}"
    held = [getattr(engine, "weights", None) for engine in denoiser.engines.values()]
    if not runner.names_weights and any(file is not None for file in held):
        return "the plan takes its weights as inputs: polygraphy runs one built with --bake-weights"
    return ""


def _loads(files: SavedFiles, calls: Sequence[ComparedCall]) -> str:
    """The part of the command that reads what was saved, with the widest gate of the calls."""
    options = ["--load-inputs", str(files.inputs)]
    if files.outputs:
        gate = max((c.distance_gate for c in calls if isfinite(c.distance_gate)), default=0.0)
        options += ["--load-outputs", str(files.outputs)]
        options += ["--compare", "l2", "--l2-threshold", f"{gate:.6g}"]
    return shlex.join(options)
