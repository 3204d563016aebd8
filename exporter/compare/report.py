"""What `compare` leaves: a report, and in the bundle's manifest what the worst step came to."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wanexport.exporter.bundle.lock import bundle_lock
from wanexport.exporter.bundle.place import REPORTS, check_place
from wanexport.exporter.bundle.writer import write_manifest
from wanexport.exporter.compare.recorded import Calls, Loop
from wanexport.exporter.compare.rows import badness
from wanexport.runtime.bundle.durable import own_folder, remove_partials, write_durably
from wanexport.runtime.bundle.manifest import EngineRecord, read_manifest
from wanexport.runtime.bundle.tensorfile import save_arrays
from wanexport.runtime.errors import WanExportError, explain


@dataclass(frozen=True)
class Outcome:
    """What was compared on which inputs, and what came of it."""

    engine: EngineRecord
    given: Loop | Calls
    result: dict[str, Any]


def keep(bundle: Path, outcome: Outcome, report: Path | None) -> str | None:
    """Write the report, and beside the bundle's own one the note in the manifest.

    The verdict stands without either; what could not be written is returned, in one line.
    """
    lost = "the report was not saved"
    try:
        if report is None:
            lost = f"{lost}, nor the parity noted in the manifest"
            check_place(bundle)
            _save(own_folder(bundle, REPORTS), outcome)
            lost = "the report is saved, but the parity was not noted in the manifest"
            _note_parity(bundle, outcome.engine, outcome.result)
        else:
            report.mkdir(parents=True, exist_ok=True)
            _save(report, outcome)
    except (OSError, WanExportError) as error:
        return f"{lost}: {explain(error)}"
    return None


def _save(folder: Path, outcome: Outcome) -> None:
    """Write the report, and the inputs of a loop that can be repeated with them."""
    remove_partials(folder)
    result, name = outcome.result, f"compare-{outcome.engine.name.replace('/', '-')}"
    if result["weights"]:
        name += f"-{Path(result['weights']).name}"
    if result["reference"] != "graph":
        name += f"-{result['reference'].split()[0].replace('/', '-')}"
    if isinstance(outcome.given, Loop):
        save_arrays(folder / f"{name}-inputs.safetensors", outcome.given.inputs)
    write_durably(folder / f"{name}.json", (json.dumps(result, indent=1) + "\n").encode())


def _note_parity(bundle: Path, engine: EngineRecord, result: Mapping[str, Any]) -> None:
    """Keep the worst step in the manifest, unless the engine was rebuilt meanwhile."""
    worst = max(result["steps"], key=badness)
    names = ("error", "floor", "gate", "drift", "passed")
    parity = {name: worst[name] for name in names}
    parity |= {name: result[name] for name in ("reference", "model", "weights", "inputs")}
    with bundle_lock(bundle, waits=True):
        manifest = read_manifest(bundle)
        engines = tuple(
            replace(e, parity=parity) if (e.key, e.files) == (engine.key, engine.files) else e
            for e in manifest.engines
        )
        write_manifest(bundle, replace(manifest, engines=engines))
