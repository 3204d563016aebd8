"""The files of a profile: its digest as JSON, and its trace for a viewer."""

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wanexport.exporter.trace.chrome import Trace
from wanexport.runtime.bundle.durable import own_folder, remove_partials, write_durably
from wanexport.runtime.errors import WanExportError, explain


def save(
    result: dict[str, Any], trace: Trace | None, name: str, folder: Path, *, is_own: bool
) -> None:
    """Write NAME.json and NAME.trace.json.gz, and note in the result what they are.

    What could not be written is its `warning`, in one line. is_own says that the folder is the
    bundle's, which may be no link.
    """
    content: Mapping[str, Any] = {key: value for key, value in result.items() if key != "warning"}
    digest, recorded = folder / f"{name}.json", folder / f"{name}.trace.json.gz"
    result["files"] = []
    try:
        if is_own:
            own_folder(folder.parent, folder.name)
        folder.mkdir(parents=True, exist_ok=True)
        remove_partials(folder)
        write_durably(digest, (json.dumps(content, indent=1) + "\n").encode())
        result["files"].append(str(digest))
        if trace is not None:
            write_durably(recorded, gzip.compress(json.dumps(trace).encode(), 6, mtime=0))
            result["files"].append(str(recorded))
    except (OSError, WanExportError) as error:  # the figures stand without their files
        result["warning"] = f"the profile was not saved: {explain(error)}"
