"""What a file of `torch.export.save` must not contain, read as the data that it is.

`torch.export.load` unpickles the sample inputs that every such archive holds, and so would run what
a stranger put there. The graph lies beside them in JSON; nothing else of the archive is read.
"""

import json
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import torch

from wanexport.exporter.lint.program import Finding, kinds_of_operator, place
from wanexport.runtime.bundle.regular_file import open_regular
from wanexport.runtime.errors import WanExportError

_MODEL = re.compile(r"(.*/)?(models/[^/]+|serialized_exported_program)\.json")
_MOST_JSON = 96 << 20  # bytes; a program of 40 blocks has a quarter of it
_MOST_VALUES = 8_000_000  # lists and objects of a graph
_MOST_NAMES = 16 << 20  # bytes of an archive's directory
_TAIL = (1 << 16) + 128  # bytes in which an archive's directory is announced, with its comment
_DTYPES = {8: "fp64", 9: "complex", 10: "complex", 11: "complex"}  # of PyTorch's serialized types
_UNBACKED = re.compile(r"\b(u|zuf)\d+\b")  # a symbol whose value only the tensors know
_MUTATIONS = {
    "buffer_mutation": "buffer_name",
    "parameter_mutation": "parameter_name",
    "user_input_mutation": "user_input_name",
}


@dataclass(frozen=True)
class _Node:
    """A call or an input: its target as PyTorch prints it, and names of tensors in and out."""

    name: str
    target: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    returns_list: bool = False
    is_input: bool = False
    trace: str = ""


def lint_program_file(path: Path) -> list[Finding]:
    """Everything in the program, branches of control flow included, that is one of lint's kinds.

    Nothing of the file is run, imported or unpickled. Raises WanExportError when it is no file of
    `torch.export.save`, or larger than such a file is.
    """
    try:
        with open(open_regular(path), "rb") as file:
            programs = list(_read(file, path))
            return [finding for program in programs for finding in _lint_program(program)]
    except WanExportError:
        raise
    except Exception as error:  # of zip or json, or whatever a damaged graph leads to
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise WanExportError(
            f"{path} is no exported program ({reason}): expected a file of torch.export.save"
        ) from error


def _read(file: IO[bytes], path: Path) -> Iterator[Any]:
    """The graphs of an archive, parsed."""
    if _directory_size(file) > _MOST_NAMES:
        raise WanExportError(f"{path} holds more files than an exported program does")
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        models = [name for name in names if _MODEL.fullmatch(name)]
        if not models and any(name.endswith(".so") for name in names):
            raise WanExportError(
                f"{path} is a package of machine code, whose graph its build has linted: lint the "
                f"bundle that it is of, or a file of torch.export.save"
            )
        if not models:
            raise ValueError("no graph is in it")
        left = _MOST_JSON
        for name in models:
            with archive.open(name) as entry:
                content = entry.read(left + 1)
            left -= len(content)
            # Each of them takes many times its bytes when it is parsed.
            if left < 0 or content.count(b"[") + content.count(b"{") > _MOST_VALUES:
                raise WanExportError(f"{path} holds a larger graph than a model has: {name}")
            yield json.loads(content)


def _directory_size(file: IO[bytes]) -> int:
    """Bytes of an archive's list of files, as it states them, before they are parsed."""
    end = file.seek(0, 2)
    file.seek(max(0, end - _TAIL))
    tail = file.read(_TAIL)
    file.seek(0)
    stated = [0]
    for mark, offset, form in ((b"PK\5\6", 12, "<L"), (b"PK\6\6", 40, "<Q")):
        at = tail.rfind(mark)
        field = tail[at + offset :][: struct.calcsize(form)]
        if at >= 0 and len(field) == struct.calcsize(form):
            stated.append(struct.unpack(form, field)[0])
    return max(size for size in stated if size != 0xFFFFFFFF)


def _lint_program(program: Any) -> list[Finding]:
    module = program["graph_module"]
    findings = list(_lint_graph(module["graph"]))
    for spec in module["signature"]["output_specs"]:
        for kind, field in _MUTATIONS.items():
            if kind in spec:
                written = spec[kind]
                findings.append(
                    Finding("mutation", written["arg"]["name"], f"writes {written[field]}")
                )
    return findings


def _lint_graph(graph: Mapping[str, Any]) -> Iterator[Finding]:
    """The findings of a graph and of the graphs that its calls take."""
    tensors, nodes = graph["tensor_values"], list(_nodes(graph))
    makers = {name: node for node in nodes for name in node.outputs}
    known: dict[str, bool] = {}
    for node in nodes:
        for kind in sorted(set(_kinds(node, tensors, makers, known))):
            yield Finding(kind, node.name, f"{node.target}{place(node.trace)}")
    for inner in _graphs(graph["nodes"]):
        yield from _lint_graph(inner)


def _nodes(graph: Mapping[str, Any]) -> Iterator[_Node]:
    """The graph's inputs, its calls, and each of several results of a call."""
    for argument in graph["inputs"]:
        for name in _names(argument):
            yield _Node(name, name, (), (name,), is_input=True)
    for call in graph["nodes"]:
        inputs = [name for given in call["inputs"] for name in _names(given["arg"])]
        outputs = [name for made in call["outputs"] for name in _names(made)]
        node = _Node(
            name=call.get("name") or (outputs or ["?"])[0],
            target=call["target"].removeprefix("torch.ops.").removeprefix("higher_order."),
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            returns_list=any("as_tensors" in made for made in call["outputs"]),
            trace=call["metadata"].get("stack_trace") or "",
        )
        yield node
        if (
            len(outputs) > 1
            or node.returns_list
            or call.get("is_hop_single_tensor_return") is False
        ):
            for name in outputs:
                yield replace(
                    node, name=name, target="getitem", inputs=node.outputs, outputs=(),
                    returns_list=False,
                )  # fmt: skip


def _names(argument: Any) -> Iterator[str]:
    """The tensors that an argument names, in order."""
    for kind, value in argument.items():
        if kind == "as_tensor":
            yield value["name"]
        elif kind == "as_tensors":
            yield from (tensor["name"] for tensor in value)
        elif kind in ("as_optional_tensor", "as_nested_tensors", "as_optional_tensors"):
            for inner in value if isinstance(value, list) else [value]:
                yield from _names(inner)


def _graphs(calls: Iterable[Any]) -> Iterator[Mapping[str, Any]]:
    """The branches and bodies that calls of control flow take."""
    for call in calls:
        for given in call["inputs"]:
            if "as_graph" in given["arg"]:
                yield given["arg"]["as_graph"]["graph"]


def _kinds(
    node: _Node,
    tensors: Mapping[str, Any],
    makers: Mapping[str, _Node],
    known: dict[str, bool],
) -> Iterator[str]:
    """The kinds of one node; a node may be of several."""
    name, schema = node.target.rpartition(".")[0] or node.target, _schema(node)
    yield from kinds_of_operator(name)
    if node.returns_list:
        yield "sequence"
    if schema is not None and schema.is_mutable and _is_of_caller(node, makers, known):
        yield "mutation"
    shown = (node.name,) if node.target == "getitem" else node.outputs
    made = [tensors[name] for name in shown if name in tensors]
    yield from (_DTYPES[tensor["dtype"]] for tensor in made if tensor["dtype"] in _DTYPES)
    sizes = [str(size["as_expr"]) for t in made for size in t["sizes"] if "as_expr" in size]
    if sizes:
        yield "dynamic_size"
    if any(_UNBACKED.search(size) for size in sizes):  # a size read from a tensor's values
        yield "host_sync"
    given = {tensors[name]["device"]["type"] for name in node.inputs if name in tensors}
    if given - {"cpu"} and any(tensor["device"]["type"] == "cpu" for tensor in made):
        yield "host_sync"


def _schema(node: _Node) -> Any:
    """The operator's schema if PyTorch has it: looked up by name, and nothing is imported."""
    return None if node.is_input else _schema_of(node.target)


@lru_cache(maxsize=4096)
def _schema_of(target: str) -> Any:
    space, name, overload = (*target.split("."), "", "")[:3]
    if not name:
        return None
    schemas = torch._C._jit_get_schemas_for_operator(f"{space}::{name}")
    wanted = "" if overload == "default" else overload
    return next((schema for schema in schemas if schema.overload_name == wanted), None)


def _is_of_caller(node: _Node, makers: Mapping[str, _Node], known: dict[str, bool]) -> bool:
    """Whether an in-place operator writes a view of an input or a buffer, not of a temporary.

    known has the answer for each tensor that was asked for, and takes those met on the way: the
    whole graph is walked once.
    """
    met: list[str] = []
    answer = True
    while not node.is_input:
        schema = _schema(node)
        is_view = schema is None or any(r.alias_info for r in schema.returns)
        if not is_view or not node.inputs:
            answer = False
            break
        first = node.inputs[0]
        if first in known:
            answer = known[first]
            break
        met.append(first)
        known[first] = False  # where the graph leads back to it
        if first not in makers:
            break
        node = makers[first]
    known.update(dict.fromkeys(met, answer))
    return answer
