"""Archives that would run something, take a machine's memory, or are no archives, by name.

    python -m tests.exporter.lint.hostile_archives FOLDER

lints all of FOLDER and prints what was run.

A pickle in one of them makes the file `canary` beside it, if anything unpickles it.
"""

import io
import json
import os
import pickle
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onnx import TensorProto, helper

FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.",
    "pickle.find_class",
)


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def archive(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """A zip of these entries."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in entries.items():
            file.writestr(name, content)


def program(nodes: list[Any] | None = None, **graph: Any) -> dict[str, Any]:
    """The JSON of a program with these nodes, and nothing else but what is stated."""
    inner = {"inputs": [], "outputs": [], "nodes": nodes or [], "tensor_values": {}, **graph}
    return {"graph_module": {"graph": inner, "signature": {"output_specs": []}}}


def call(target: str, *inputs: Any, outputs: Any = (), **more: Any) -> dict[str, Any]:
    """The JSON of one node."""
    given = [{"name": "", "arg": argument} for argument in inputs]
    return {"target": target, "inputs": given, "outputs": list(outputs), "metadata": {}, **more}


def with_graph(content: Any, canary: Path) -> dict[str, bytes]:
    """An archive's entries: this graph, and everywhere else a pickle that runs a command."""
    trap = pickle.dumps(Command(f"touch {canary}"))
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return {
        "p/models/model.json": text,
        "p/data/sample_inputs/model.pt": trap,
        "p/data/weights/model_weights_config.json": b'{"config": {"w": {"use_pickle": true}}}',
        "p/data/weights/weight_0": trap,
        "p/data/constants/constant_0": trap,
        "p/extra/code.py": f"import os; os.system('touch {canary}')".encode(),
        "p/byteorder": b"little",
        "p/archive_format": b"pt2",
        "p/archive_version": b"0",
    }


def torch_save(canary: Path) -> bytes:
    """What torch.load would unpickle."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Command(f"touch {canary}")))
        file.writestr("archive/version", "3")
    return stream.getvalue()


def trapped(path: Path, canary: Path) -> None:
    """A file of torch.export.save whose weights and sample inputs are pickles that run a command.

    `torch.export.load` runs it.
    """
    import torch

    module = torch.nn.Linear(2, 2)
    torch.export.save(torch.export.export(module, (torch.ones(2, 2),)), path)
    trap = io.BytesIO()
    torch.save(Command(f"touch {canary}"), trap)
    with zipfile.ZipFile(path) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    for name, content in entries.items():
        if "/weight_" in name or "sample_inputs" in name:
            entries[name] = trap.getvalue()
        elif name.endswith("weights_config.json"):
            entries[name] = content.replace(b'"use_pickle": false', b'"use_pickle": true')
    with zipfile.ZipFile(path, "w") as file:
        for name, content in entries.items():
            file.writestr(name, content)


def write(folder: Path) -> None:
    """Write every archive into the folder."""
    canary, tensor = folder / "canary", {"as_tensor": {"name": "t"}}
    loop = call("torch.ops.aten.add_.Tensor", tensor, outputs=[tensor])
    deep: Any = program([loop])
    for _ in range(60):
        graph = deep["graph_module"]["graph"]
        deep = program([call("torch.ops.higher_order.cond", {"as_graph": {"graph": graph}})])
    graphs = {
        "clean": program(),
        "import": program([call("wanexport_hostile.module.function", tensor)]),
        "system": program([call("os.system", {"as_string": f"touch {canary}"})]),
        "eval": program([call("builtins.eval", {"as_string": f"open({str(canary)!r}, 'w')"})]),
        "loop": program([loop]),
        "branches": deep,
        "symbols": program(
            [call("torch.ops.aten.add.Tensor", outputs=[tensor])],
            tensor_values={"t": {"dtype": 7, "device": {"type": "cpu"}, "sizes": [{"as_expr": {
                "expr_str": f"__import__('os').system('touch {canary}')", "hint": None}}]}},
        ),
        "number": 7,
        "empty-object": {},
        "wrong-types": program([3]),
        "huge-number": program([call("x" * 10**6, {"as_int": 10**400})]),
        "no-json": b"{",
        "nested-500000-deep": b"[" * 500_000,
        "not-a-text": b"\xff\xfe\x00",
    }  # fmt: skip
    for name, content in graphs.items():
        archive(folder / f"{name}.pt2", with_graph(content, canary))
    own: dict[str, Callable[[Path], Any]] = {
        "trapped": lambda path: trapped(path, canary),
        "pickle": lambda path: path.write_bytes(pickle.dumps(Command(f"touch {canary}"))),
        "torch-save": lambda path: path.write_bytes(torch_save(canary)),
        "truncated": lambda path: path.write_bytes((folder / "clean.pt2").read_bytes()[:-9]),
        "bomb": lambda path: archive(
            path, with_graph(b" " * (1 << 28), canary), zipfile.ZIP_DEFLATED
        ),
        "machine-code": lambda path: archive(path, {"m/data/aotinductor/model/x.so": b"\x7fELF"}),
        "many-entries": many_entries,
        "lying-directory": lying_directory,
        "empty": lambda path: path.touch(),
        "pipe": os.mkfifo,
        "device": lambda path: path.symlink_to("/dev/zero"),
    }
    for name, make in own.items():
        make(folder / f"{name}.pt2")
    laughs(folder / "laughs.onnx")
    outside(folder / "outside.onnx", canary)


def many_entries(path: Path) -> None:
    """An archive that lists half a million empty files."""
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0)
    names = (entry + b"a") * 500_000
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, len(names), 0, 0)
    path.write_bytes(names + end)


def lying_directory(path: Path) -> None:
    """An archive whose list of files is said to have 2^60 bytes."""
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, 1 << 60, 0)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, 0, 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 46, 0, 0)
    path.write_bytes(record + locator + end)


def laughs(path: Path, depth: int = 40) -> None:
    """An ONNX model whose functions, written out, have 2^40 nodes."""
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("ours", 1)]
    functions = []
    for level in range(depth):
        name, domain = (f"f{level - 1}", "ours") if level else ("Identity", "")
        nodes = [
            helper.make_node(name, ["a"], ["b"], domain=domain),
            helper.make_node(name, ["b"], ["c"], domain=domain),
        ]
        functions.append(helper.make_function("ours", f"f{level}", ["a"], ["c"], nodes, opsets))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy")
    node = helper.make_node(f"f{depth - 1}", ["x"], ["y"], domain="ours")
    graph = helper.make_graph([node], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=opsets, functions=functions)
    path.write_bytes(model.SerializeToString())


def outside(path: Path, canary: Path) -> None:
    """An ONNX model whose weights lie in a pipe that would wait for ever."""
    pipe = canary.with_name("weights")
    os.mkfifo(pipe)
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=str(pipe))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy")
    node = helper.make_node("Add", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "g", [x], [y], initializer=[weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    path.write_bytes(model.SerializeToString())


def main(folder: Path) -> None:
    """Lint all, and print as JSON what each said and every event that would run something."""
    from wanexport.exporter.lint.onnx import lint

    lint(folder / "clean.pt2")  # what libraries import and compile at first is theirs
    events: list[str] = []
    opened: list[str] = []

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(FORBIDDEN) or event in ("compile", "import"):
            events.append(f"{event} {arguments!r:.200}")
        elif event == "open":
            opened.append(str(arguments[0]))

    sys.addaudithook(hear)
    said, seconds = {}, 0.0
    for path in sorted([*folder.glob("*.pt2"), *folder.glob("*.onnx")]):
        started = time.monotonic()
        try:
            said[path.name] = f"clean {lint(path)['clean']}"
        except ValueError as error:
            said[path.name] = str(error)
        seconds = max(seconds, time.monotonic() - started)
    print(json.dumps({"said": said, "events": events, "opened": opened, "seconds": seconds}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
