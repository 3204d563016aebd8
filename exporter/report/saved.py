"""The figures that `compare`, `bench` and `profile` have saved, read as the data that they are."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanexport.runtime.bundle.regular_file import read_regular
from wanexport.runtime.errors import BadRequest, first_line

KINDS = ("compare", "bench", "profile")
_MOST_BYTES = 64 << 20  # of a file of figures; a large one has 1 MB


@dataclass(frozen=True)
class Saved:
    """What one command saved: which command it was, where, and its result."""

    kind: str
    path: Path
    result: dict[str, Any]

    @property
    def engine(self) -> str | None:
        """The engine that it is of; None where PyTorch alone was profiled."""
        name = self.result.get("engine")
        return name if isinstance(name, str) else None

    def unreadable(self, error: Exception) -> BadRequest:
        """Why a page cannot be made of it."""
        return BadRequest(
            f"{self.path} is not what wanexport {self.kind} saves ({first_line(error)}): run it "
            f"again, or remove the file"
        )


def read_saved(folder: Path) -> list[Saved]:
    """The saved figures of a folder by name, without traces; none where there is no folder.

    Raises BadRequest for a file that holds no JSON object.
    """
    return list(_read(folder)) if folder.is_dir() else []


def _read(folder: Path) -> Iterator[Saved]:
    for path in sorted(folder.glob("*.json")):
        kind = path.name.partition("-")[0]
        if kind not in KINDS or path.name.endswith(".trace.json"):
            continue
        try:
            result = json.loads(read_regular(path, at_most=_MOST_BYTES))
            if not isinstance(result, dict):
                raise ValueError("it holds no object")
        except (ValueError, RecursionError) as error:
            raise Saved(kind, path, {}).unreadable(error) from error
        yield Saved(kind, path, result)
