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
from importlib.util import find_spec, resolve_name
from pathlib import Path

from wanexport.exporter.backends.backend import Request
from wanexport.exporter.backends.table import find_backend
from wanexport.runtime.decode import encode

_OF_PACKAGE = "__init__.py"
# What says, keeps, runs or measures, and decides no byte of what is lowered or compiled. A family's
# Program is in the key as data.
_UNDECIDING = (
    "wanexport.graphs",
    "wanexport.runtime",  # the package's names, not what lies in it
    "wanexport.runtime.errors",
    "wanexport.runtime.family",
    "wanexport.runtime.machine.*",
    "wanexport.runtime.bundle.durable",
    "wanexport.runtime.bundle.*_file",
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
    asked = {**asdict(replace(request, target=bound)), "geometry": encode(request.geometry)}
    files = sources((*backend.SOURCES, request.graph.partition(":")[0]))
    parts = [
        {name: value for name, value in asked.items() if name not in _LEFT_OUT},
        encode(request.program),
        request.layout,
        [hashlib.sha256(path.read_bytes()).hexdigest() for _, path in sorted(files.items())],
        backend.libraries(request),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def sources(roots: Iterable[str]) -> dict[str, Path]:
    """The modules that these reach by import in their own packages, with their files."""
    found: dict[str, Path] = {}
    waiting = list(roots)
    packages = {_package(root) for root in waiting}
    while waiting:
        name = waiting.pop()
        path = _file(name)
        if name in found or path is None or any(fnmatch(name, u) for u in _UNDECIDING):
            continue
        found[name] = path
        waiting += [other for other in _imported(name, path) if _package(other) in packages]
    return found


def _package(module: str) -> str:
    """The outermost package of a module."""
    return module.partition(".")[0]


@cache
def _file(module: str) -> Path | None:
    """The file of a module, which is not run; None where the name is of something in one."""
    parent = _file(module.rpartition(".")[0]) if "." in module else None
    if parent is not None and parent.name != _OF_PACKAGE:
        return None
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:  # its parent is no package
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin)


def _imported(module: str, path: Path) -> Iterator[str]:
    """Every name that a file imports, in functions too; some are of no module."""
    package = module if path.name == _OF_PACKAGE else module.rpartition(".")[0]
    for origin, names in _imports(path.read_bytes()):
        if origin is None:
            yield from names
        else:
            source = resolve_name(origin, package)
            yield from (source, *(f"{source}.{name}" for name in names))


@cache
def _imports(code: bytes) -> list[tuple[str | None, tuple[str, ...]]]:
    """Each import: what it is from, with its dots, if it is from something, and the names.

    The same code is parsed once: the key of each engine of a build reads the same hundred files.
    """
    return [
        (
            None if isinstance(node, ast.Import) else "." * node.level + (node.module or ""),
            tuple(alias.name for alias in node.names),
        )
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
