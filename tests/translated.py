"""Each call of a graph translated to ONNX once a session, as `lower` does it.

What is traced is compared whole, so a fault that a test plants in a graph is translated; one that
it plants in the lowering itself is seen by the names of its modules that differ.
"""

from pathlib import Path

import onnx
import onnx_ir as ir
from torch.export import ExportedProgram

from tests.locked import locked
from tests.traced import digest, named
from wanexport.exporter.backends.onnx import cached, lower, passes
from wanexport.exporter.backends.onnx.lower import Lowering
from wanexport.runtime.program import Call, of_layer


def translate_once(shared: Path) -> None:
    """Keep translations in a folder that every process of the session sees."""
    folder, translate = shared / "translations", lower._translate
    folder.mkdir(exist_ok=True)
    known = _own_names()

    def translated(exported: ExportedProgram, call: Call, how: Lowering) -> ir.Model:
        if _own_names() != known:
            return translate(exported, call, how)
        names = (call.reads, call.writes, of_layer(call.parameters, 0), of_layer(call.state, 0))
        path = folder / f"{digest(exported, names, how)}.onnx"
        with locked(path.with_suffix(".lock")):
            if not path.exists():
                path.write_bytes(lower.serialize(translate(exported, call, how)))
        return ir.from_proto(onnx.load_model_from_string(path.read_bytes()))

    lower._translate = translated


def _own_names() -> list[tuple[str, int]]:
    """What the lowering's names stand for, but for what is replaced here."""
    names = (*named(lower), *named(passes), *named(cached))
    return [(name, value) for name, value in names if name != "_translate"]
