"""One layer of one call, cut out of an engine's graph: a graph of its own, whose ends are fp32.

The values between calls have names in the main graph. What computes one call's results from what it
reads is cut out by these names, be the calls functions there or inlined. Weights stay where they
are: the cut names the same file.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx
import onnx.inliner
from onnx import TensorProto, helper

from wanexport.exporter.backends.onnx.assemble import name_results
from wanexport.runtime.dtypes import DTYPES
from wanexport.runtime.errors import BundleError
from wanexport.runtime.program import ENGINE_DTYPE, NEXT, Call, Program, TensorSpec, of_layer

_WIDE = ".fp32"  # after the name of a value that an end of the cut has in fp32
_COPY = re.compile(r"__\d+$")  # what onnx adds to the names inside a function that it inlines


@dataclass(frozen=True)
class Cut:
    """The graph of one call, and the names of its ends: of what it reads and keeps, by the
    Program's names, and of what it writes and the state becomes that it changes, which `written`
    has by the Program's names, and each value that is tapped."""

    model: onnx.ModelProto
    inputs: dict[str, str]
    outputs: tuple[str, ...]
    parameters: tuple[str, ...]
    written: tuple[str, ...]
    taps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inside:
    """The nodes of a call, functions inlined, and what its values are called where it was traced.

    `called` has the graph's name of each value by that of the trace.
    """

    cut: Cut
    called: dict[str, str] = field(default_factory=dict)

    def between(self, value: str, known: Iterable[str]) -> list[onnx.NodeProto]:
        """The nodes that compute a value from known ones, in order, but for constants."""
        nodes = self.cut.model.graph.node
        ends = (name.removesuffix(_WIDE) for name in self.cut.inputs.values())
        needed = _needed(nodes, [value], {*known, *ends} - {value})
        return [node for node in needed if node.input]


def cut_call(model: onnx.ModelProto, program: Program, call: Call, index: int, dtype: str) -> Cut:
    """The graph of one layer of a call out of that of its moment; dtype is the engine's.

    Raises BundleError when the graph has no such values between calls, or computes the results
    from others.
    """
    graph, where = model.graph, f"{call.name} {index}" if call.repeat > 1 else call.name
    made = {name for node in graph.node for name in node.output}
    reads, results = _ends(program, call, index, made)
    kept = _needed(graph.node, results.values(), set(reads.values()))
    used = {name for node in kept for name in node.input}
    inner = {name for node in kept for name in node.output}
    stored = [tensor for tensor in graph.initializer if tensor.name in used]
    known = {*reads.values(), *inner, *(tensor.name for tensor in stored), ""}
    if foreign := sorted(used - known) or sorted(set(results.values()) - inner):
        raise BundleError(
            f"the engine computes {where} from {foreign[0]}, and not from "
            f"{', '.join(reads.values())} alone: it is wired wrong, or no engine of this version"
        )
    specs = {**program.inputs, **program.values, **program.outputs, **program.states()}
    given = [(name, specs[name]) for name in (*call.reads, *of_layer(call.state, index))]
    inputs = [_narrowing(reads[name], spec, dtype) for name, spec in given]
    written = tuple(results)
    outputs = [_widening(results[name], specs[name].shape) for name in written]
    return Cut(
        _model(model, [*(n for n, _ in inputs), *kept, *(n for n, _ in outputs)],
               [value for _, value in inputs], [value for _, value in outputs], stored),
        {name: reads[name] + _WIDE for name, _ in given},
        tuple(results[name] + _WIDE for name in written),
        tuple(tensor.name for tensor in stored),
        written,
    )  # fmt: skip


def look_inside(cut: Cut) -> Inside:
    """The same call with its functions inlined, and what its values were called when traced."""
    flat = onnx.inliner.inline_local_functions(cut.model)
    called: dict[str, str] = {}
    for node in flat.graph.node:
        for name in node.output:
            called.setdefault(_COPY.sub("", name), name)
    return Inside(replace(cut, model=flat), called)


def with_taps(cut: Cut, taps: Mapping[str, Sequence[int]]) -> Cut:
    """The cut with more outputs: values of it by name, of these shapes."""
    model = onnx.ModelProto()
    model.CopyFrom(cut.model)
    for name, shape in taps.items():
        node, value = _widening(name, shape)
        model.graph.node.append(node)
        model.graph.output.append(value)
    names = tuple(name + _WIDE for name in taps)
    return replace(cut, model=model, taps=names)


def _ends(
    program: Program, call: Call, index: int, made: set[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """What the graph calls the values that a call reads and writes, state among both: of the state
    that it writes only what it changes."""
    whole = program.whole().at(call.when)
    known = {name: name for name in (*whole.reads, *whole.state)}
    for own in (own for own in program.calls if own.when == call.when):
        for layer in own.numbers:
            state = of_layer(own.state, layer)
            ends = [*own.writes, *(name + NEXT for name in state)]
            names = zip((*own.writes, *state), name_results(own, layer, ends), ends, strict=True)
            results = {
                name: inner if inner in made else end
                for name, inner, end in names
                if inner in made or end in made
            }
            if (own, layer) == (call, index):
                return {name: known[name] for name in (*own.reads, *state)}, results
            known |= results
    raise AssertionError(f"no call {call.name} {index}")


def _needed(
    nodes: Sequence[onnx.NodeProto], results: Iterable[str], stops: set[str]
) -> list[onnx.NodeProto]:
    """The nodes that compute the results from the stops, in order."""
    needed, kept = set(results), []
    for node in reversed(nodes):
        if needed.intersection(node.output) - stops:
            kept.append(node)
            needed |= set(node.input)
    return kept[::-1]


def _narrowing(
    name: str, spec: TensorSpec, dtype: str
) -> tuple[onnx.NodeProto, onnx.ValueInfoProto]:
    """The cast of an fp32 input to what the call reads, and the input."""
    own = DTYPES[dtype if spec.dtype == ENGINE_DTYPE else spec.dtype].onnx
    node = helper.make_node("Cast", [name + _WIDE], [name], to=getattr(TensorProto, own))
    return node, helper.make_tensor_value_info(name + _WIDE, TensorProto.FLOAT, spec.shape)


def _widening(name: str, shape: Sequence[int]) -> tuple[onnx.NodeProto, onnx.ValueInfoProto]:
    node = helper.make_node("Cast", [name], [name + _WIDE], to=TensorProto.FLOAT)
    return node, helper.make_tensor_value_info(name + _WIDE, TensorProto.FLOAT, shape)


def _model(
    whole: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    stored: Sequence[onnx.TensorProto],
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "call", inputs, outputs, stored)
    return helper.make_model(
        graph,
        functions=whole.functions,
        opset_imports=whole.opset_import,
        ir_version=whole.ir_version,
    )
