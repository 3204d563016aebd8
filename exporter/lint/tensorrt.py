"""What TensorRT's ONNX parser would refuse in a graph, told without TensorRT."""

from collections.abc import Iterator
from pathlib import PurePosixPath, PureWindowsPath

import onnx
import onnx.inliner
import onnx_ir as ir

from wanexport.exporter.lint.program import Finding
from wanexport.exporter.lint.tensorrt_operators import (
    ATTRIBUTES,
    CONSTANTS,
    MOST_INPUTS,
    MOST_OUTPUTS,
    NEWEST_OPSET,
    OLDEST_OPSET,
    RANKS,
    TYPES,
)

KIND = "tensorrt"
_DOMAINS = ("", "ai.onnx")
_KNOWN_TYPES = frozenset[str]().union(*TYPES.values())


def lint_tensorrt(model: onnx.ModelProto) -> list[Finding]:
    """Every operator, element type, shape and file place that TensorRT does not take.

    Raises onnx's own exceptions when types and shapes cannot be inferred.
    """
    flat = onnx.inliner.inline_local_functions(model)  # values in functions have no types
    inferred = ir.from_proto(onnx.shape_inference.infer_shapes(flat, strict_mode=True))
    graph = inferred.graph
    findings = [_finding("", detail) for detail in _opset_faults(inferred)]
    for value in (*graph.inputs, *graph.initializers.values()):
        findings += [_finding(value.name, detail) for detail in _value_faults(value)]
    for node in ir.traversal.RecursiveGraphIterator(graph):
        faults = [*_node_faults(node), *(f for v in node.outputs for f in _value_faults(v))]
        findings += [_finding(node.name, f"{node.op_type}: {fault}") for fault in faults]
    return findings


def _finding(name: str | None, detail: str) -> Finding:
    return Finding(KIND, name or "", detail)


def _opset_faults(model: ir.Model) -> Iterator[str]:
    opset = model.opset_imports.get("")
    if opset is not None and not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        yield f"opset {opset} is not of {OLDEST_OPSET} to {NEWEST_OPSET}"


def _value_faults(value: ir.Value) -> Iterator[str]:
    """What is wrong with a tensor, wherever it is used."""
    if value.dtype == ir.DataType.DOUBLE:
        yield "fp64 would be narrowed to fp32"
    elif value.dtype is not None and value.dtype.name not in _KNOWN_TYPES:
        yield f"type {value.dtype.name}"
    if value.shape is not None and 0 in value.shape:
        yield "a size of 0"
    if isinstance(value.const_value, ir.ExternalTensor):
        place = str(value.const_value.location)
        if _leaves_its_folder(place):
            yield f"its data lies in {place}, outside the graph's own folder"


def _leaves_its_folder(place: str) -> bool:
    paths = PurePosixPath(place), PureWindowsPath(place)
    return any(path.is_absolute() or ".." in path.parts for path in paths)


def _node_faults(node: ir.Node) -> Iterator[str]:
    name = node.op_type
    if node.domain not in _DOMAINS:
        yield f"of domain {node.domain}, which needs a plugin"
        return
    if name not in TYPES:
        yield "no operator of TensorRT's"
        return
    first = node.inputs[0] if node.inputs else None
    if first is not None and first.dtype is not None:
        if first.dtype != ir.DataType.DOUBLE and first.dtype.name not in TYPES[name]:
            yield f"of {first.dtype.name}"
    yield from _form_faults(node)
    yield from _attribute_faults(node)


def _form_faults(node: ir.Node) -> Iterator[str]:
    """Faults of an operator's inputs and outputs."""
    name = node.op_type
    beyond = node.inputs[MOST_INPUTS.get(name, len(node.inputs)) :]
    if any(value is not None for value in beyond):
        yield f"inputs after the first {MOST_INPUTS[name]}"
    used = sum(bool(value.name) for value in node.outputs)
    if used > MOST_OUTPUTS.get(name, used):
        yield f"{used} outputs, {MOST_OUTPUTS[name]} is taken"
    if name in RANKS:
        for value in node.inputs[: MOST_INPUTS.get(name)]:
            if value is not None and value.shape is not None and len(value.shape) != RANKS[name]:
                yield f"an input of {len(value.shape)} dimensions, {RANKS[name]} are taken"
    for index in CONSTANTS.get(name, ()):
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is not None and not _is_constant(value):
            yield f"input {index} is no constant"


def _is_constant(value: ir.Value) -> bool:
    """Whether the value is known when the engine is built: an initializer, or made of those."""
    seen, pending = {value}, [value]  # a value has often several ways to it
    while pending:
        source = pending.pop()
        if source.is_initializer() and not source.is_graph_input():
            continue
        node = source.producer()
        if source.is_initializer() or node is None:
            return False
        unseen = {used for used in node.inputs if used is not None} - seen
        seen |= unseen
        pending += unseen
    return True


def _attribute_faults(node: ir.Node) -> Iterator[str]:
    for name, taken in ATTRIBUTES.get(node.op_type, {}).items():
        if name in node.attributes:
            value = node.attributes[name].value
            if taken is None:
                yield f"attribute {name}"
            elif value not in taken:
                expected = " or ".join(str(choice) for choice in taken)
                yield f"{name} is {value}, expected {expected}"
