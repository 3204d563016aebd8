"""The key of an engine: a hash of all that decides its files and record."""

import hashlib
import inspect
import json
import sys
from dataclasses import asdict, replace
from types import ModuleType

from wanexport.exporter.backends.backend import Request
from wanexport.exporter.backends.table import find_backend
from wanexport.exporter.lint import program as lint
from wanexport.graphs import graph as graphs
from wanexport.graphs import rope
from wanexport.runtime import dtypes
from wanexport.runtime.bundle import signature
from wanexport.runtime.engines import operators

_CODE = (lint, rope, signature, dtypes, operators)
# What a request has that decides no byte: how the engine is run by default, and which of this
# machine's devices it is made on.
_UNDECIDING = ("sampling", "device")


def engine_key(request: Request) -> str:
    """Hash of all that decides an engine's files and record; the weights are not among it."""
    backend = find_backend(request.backend)
    modules = (*_CODE, *_graph_code(request.graph), *backend.code(request.target["device"]))
    bound = {name: request.target[name] for name in backend.BINDING if name in request.target}
    asked = asdict(replace(request, target=bound))
    parts = [
        {name: value for name, value in asked.items() if name not in _UNDECIDING},
        asdict(request.program),
        request.layout,
        [inspect.getsource(module) for module in modules],
        backend.libraries(request),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _graph_code(reference: str) -> list[ModuleType]:
    """The modules that define a graph: its class's, and those of the graphs that it builds on."""
    kinds = [k for k in graphs.load_graph(reference).__mro__ if issubclass(k, graphs.Graph)]
    return [sys.modules[name] for name in dict.fromkeys(kind.__module__ for kind in kinds)]
