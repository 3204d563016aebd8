"""The key of an engine: a hash of all that decides its files and record."""

import hashlib
import inspect
import json
from dataclasses import asdict, replace

from wanexport.exporter.backends.backend import Request
from wanexport.exporter.backends.table import BACKENDS
from wanexport.exporter.lint import program as lint
from wanexport.graphs import config as graph_config
from wanexport.graphs import rope
from wanexport.graphs import wan as model
from wanexport.runtime import geometry as geometry_module
from wanexport.runtime import wan_config
from wanexport.runtime.bundle import signature
from wanexport.runtime.engines import operators

_GRAPH_CODE = (
    graph_config,
    wan_config,
    model,
    rope,
    signature,
    lint,
    operators,
    geometry_module,
)


def engine_key(request: Request) -> str:
    """Hash of all that decides an engine's files and record; the weights are not among it."""
    backend = BACKENDS[request.backend]
    code = [inspect.getsource(module) for module in (*_GRAPH_CODE, *backend.code(request.device))]
    bound = {name: request.target[name] for name in backend.BINDING if name in request.target}
    parts = [
        asdict(replace(request, target=bound)),
        request.weights_header,
        code,
        backend.libraries(request),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
