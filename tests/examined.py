"""Each library that `doctor` examines imported once a session: it takes seconds of many."""

import hashlib
import os
from pathlib import Path

from tests.locked import locked
from wanexport.exporter import doctor


def examine_once(shared: Path) -> None:
    """Keep what an import came to in a folder that every process of the session sees.

    Where a test puts a library of its own before the others, it is imported.
    """
    folder, examine, path = shared / "examined", doctor._problem, os.environ.get("PYTHONPATH")
    folder.mkdir(exist_ok=True)

    def examined(command: list[str]) -> str:
        if os.environ.get("PYTHONPATH") != path:
            return examine(command)
        known = folder / hashlib.sha256("\n".join(command).encode()).hexdigest()
        with locked(known.with_suffix(".lock")):
            if not known.exists():
                known.write_text(examine(command))
        return known.read_text()

    doctor._problem = examined
