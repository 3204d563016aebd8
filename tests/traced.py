"""What is traced: told apart by all of it, and traced once a process as `lower` does it.

Of a family's graph, that is, while the code that it is made of is the product's own: a fault that a
test plants there is traced.
"""

import builtins
import hashlib
from collections.abc import Collection, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch.export import ExportedProgram

from wanexport.exporter.backends.onnx import lower
from wanexport.graphs import causal, graph, regions, rope, signature, vae, vae_layers, wan
from wanexport.runtime import causal_wan, dtypes, family, geometry, program, wan_config
from wanexport.runtime.bundle import signature as layouts

_GRAPHS = (causal, graph, regions, rope, signature, vae, vae_layers, wan)
_READ = (causal_wan, dtypes, family, geometry, layouts, program, wan_config)


def trace_once() -> None:
    """Keep what `lower` traces."""
    traces: dict[tuple[object, ...], dict[str, ExportedProgram]] = {}
    trace = regions.trace_calls
    own = {module.__name__ for module in _GRAPHS}
    known = [*_code()]

    def traced(
        graph: graph.Graph,
        device: str,
        names: Collection[str] | None = None,
        *,
        functional: bool = False,
    ) -> dict[str, ExportedProgram]:
        if type(graph).__module__ not in own or [*_code()] != known:
            return trace(graph, device, names, functional=functional)
        size = (repr(_of_one_layer(graph)), graph.geometry, graph.dtype)
        key = (type(graph), *size, device, names and tuple(names), functional)
        if key not in traces:
            traces[key] = trace(graph, device, names, functional=functional)
        return traces[key]

    lower.trace_calls = traced  # type: ignore[attr-defined]


def _of_one_layer(graph: graph.Graph) -> object:
    """The config; of plain Wan without the number of layers, as a call is traced for the first."""
    plain = type(graph) is wan.WanModel
    return replace(graph.config, num_layers=1) if plain else graph.config


def _code() -> Iterator[tuple[str, int]]:
    """What each name stands for in the modules of graphs, and in their classes."""
    for module in (*_GRAPHS, *_READ):
        yield from named(module)
        for value in [*vars(module).values()]:
            if isinstance(value, type) and value.__module__ == module.__name__:
                yield from ((name, id(member)) for name, member in vars(value).items())


def named(module: ModuleType) -> Iterator[tuple[str, int]]:
    """What each name of a module stands for, and each key of its tables."""
    yield from ((name, id(value)) for name, value in vars(module).items())
    for table in [*vars(module).values()]:
        if isinstance(table, dict) and table is not vars(builtins):
            yield from ((str(key), id(value)) for key, value in table.items())


def digest(exported: ExportedProgram, *others: object) -> str:
    """A hash of a traced call, whole, and of what else decides what is made of it."""
    parts = (*others, exported.graph_signature, *_nodes(exported))
    found = hashlib.sha256("\n".join(map(str, parts)).encode())
    for name, value in sorted(exported.constants.items()):
        found.update(name.encode())
        found.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _nodes(exported: ExportedProgram) -> Iterator[str]:
    """Each node with the type of what it makes."""
    for node in exported.graph.nodes:
        yield f"{node.format_node()} {node.args} {node.kwargs} {_type(node.meta.get('val'))}"


def _type(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), tuple(value.stride()), value.device
    return tuple(map(_type, value)) if isinstance(value, tuple | list) else value
