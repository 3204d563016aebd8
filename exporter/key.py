"""The key of an engine: a hash of all that decides its files.

Which source decides them is computed: the files that the backend's own are reached by import from,
and those of the model's graph, but for a few that cannot change a byte.
"""

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from fnmatch import fnmatch
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from wanexport.exporter.backends.backend import Request
from wanexport.exporter.backends.table import find_backend

_PACKAGE = "wanexport"
# What says, keeps, runs or measures, and decides no byte of what is lowered or compiled. A family's
# Program is in the key as data.
_UNDECIDING = (
    "wanexport.runtime",
    "wanexport.graphs",
    "wanexport.runtime.errors",
    "wanexport.runtime.family",
    "wanexport.runtime.settings",
    "wanexport.runtime.machine.*",
    "wanexport.runtime.bundle.manifest",
    "wanexport.runtime.bundle.details",
    "wanexport.runtime.bundle.durable",
    "wanexport.runtime.bundle.*_file",
    "wanexport.runtime.bundle.path",
    "wanexport.exporter.child.*",
    "wanexport.exporter.backends.backend",
)
# What a request has beside: how the engine is run by default, and which of this machine's devices
# it is made on.
_LEFT_OUT = ("sampling", "device")


def engine_key(request: Request) -> str:
    """Hash of all that decides an engine's files; the weights are not among it."""
    backend = find_backend(request.backend)
    bound = {name: request.target[name] for name in backend.BINDING if name in request.target}
    asked = asdict(replace(request, target=bound))
    files = sources((*backend.SOURCES, request.graph.partition(":")[0]))
    parts = [
        {name: value for name, value in asked.items() if name not in _LEFT_OUT},
        asdict(request.program),
        request.layout,
        [hashlib.sha256(path.read_bytes()).hexdigest() for _, path in sorted(files.items())],
        backend.libraries(request),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def sources(roots: Iterable[str]) -> dict[str, Path]:
    """The modules of wanexport that these reach by import, themselves first, with their files."""
    found: dict[str, Path] = {}
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        path = _file(name)
        if name in found or path is None or any(fnmatch(name, u) for u in _UNDECIDING):
            continue
        found[name] = path
        waiting += _imported(path)
    return found


@cache
def _file(module: str) -> Path | None:
    """The file of a module, None where the name is of something in one."""
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:  # its parent is no package
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin)


def _imported(path: Path) -> Iterator[str]:
    """Every name of wanexport that a file imports, in functions too; some are of no module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in names if name.startswith(f"{_PACKAGE}."))
