"""Each call of a graph translated to ONNX once a session, as `lower` does it.

What is traced is compared whole, so a fault that a test plants in a graph is translated; one that
it plants in the lowering itself is seen by the names of its modules that differ.
"""

import builtins
import hashlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch.export import ExportedProgram

from tests.locked import locked
from wanexport.exporter.backends.onnx import cached, lower, passes
from wanexport.exporter.backends.onnx.lower import Lowering
from wanexport.runtime.program import Call, of_layer


def translate_once(shared: Path) -> None:
    """Keep translations in a folder that every process of the session sees."""
    folder, translate = shared / "translations", lower._translate
    folder.mkdir(exist_ok=True)
    modules = (lower, passes, cached)
    known = [name for module in modules for name in _names(module)]

    def translated(exported: ExportedProgram, call: Call, how: Lowering) -> ir.Model:
        if [name for module in modules for name in _names(module)] != known:
            return translate(exported, call, how)
        path = folder / f"{_key(exported, call, how)}.onnx"
        with locked(path.with_suffix(".lock")):
            if not path.exists():
                path.write_bytes(lower.serialize(translate(exported, call, how)))
        return ir.from_proto(onnx.load_model_from_string(path.read_bytes()))

    lower._translate = translated


def _names(module: ModuleType) -> Iterator[tuple[str, int]]:
    """What each name of a module stands for, and each key of its tables; not what is replaced."""
    own = {name: value for name, value in vars(module).items() if name != "_translate"}
    yield from ((name, id(value)) for name, value in own.items())
    for table in own.values():
        if isinstance(table, dict) and table is not vars(builtins):
            yield from ((str(key), id(value)) for key, value in table.items())


def _key(exported: ExportedProgram, call: Call, how: Lowering) -> str:
    """A hash of all that decides a translation."""
    names = (call.reads, call.writes, of_layer(call.parameters, 0), of_layer(call.state, 0))
    parts = (names, how, exported.graph_signature, *_nodes(exported))
    digest = hashlib.sha256("\n".join(map(str, parts)).encode())
    for name, value in sorted(exported.constants.items()):
        digest.update(name.encode())
        digest.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _nodes(exported: ExportedProgram) -> Iterator[str]:
    """Each node with the type of what it makes."""
    for node in exported.graph.nodes:
        yield f"{node.format_node()} {node.args} {node.kwargs} {_type(node.meta.get('val'))}"


def _type(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.device
    return tuple(map(_type, value)) if isinstance(value, tuple | list) else value
