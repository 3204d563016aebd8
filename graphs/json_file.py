"""Read the JSON files of a checkpoint, which anyone may have written: bounded, and objects only."""

import json
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wanexport.runtime.bundle.regular_file import read_regular
from wanexport.runtime.errors import BadRequest, WanExportError, printable

_MAX_JSON = 8 << 20  # bytes: the index of a published 14B takes 0.1 MB


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object, empty when there is no such file.

    Raises WanExportError when the file is no regular one, over 8 MiB, damaged or no object.
    """
    try:
        data = json.loads(
            read_regular(path, at_most=_MAX_JSON), object_pairs_hook=_without_duplicates
        )
    except FileNotFoundError:
        return {}
    except WanExportError:
        raise
    except OSError as error:
        raise BadRequest(f"cannot read {printable(path)}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadRequest(
            f"cannot read {printable(path)} ({printable(error)}): download it again"
        ) from error
    if not isinstance(data, dict):
        raise BadRequest(
            f"cannot read {printable(path)}: it is {_kind(data)}, expected an object: download it "
            "again"
        )
    return data


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it has a name twice")
    return found


def _kind(value: object) -> str:
    return {list: "a list", str: "a text", type(None): "null"}.get(type(value), "a number")


def brief(value: object) -> str:
    """A value of a JSON file, short and on one line."""
    return printable(reprlib.repr(value), 60)
