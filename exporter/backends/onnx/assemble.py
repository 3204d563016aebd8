"""Put the lowered calls of a Program together: an ONNX graph that calls each as a function.

The block is one function, called once a layer with that layer's parameters under their official
names. The graph names the weights file, byte offset and length of each parameter, or takes the
parameters as inputs, and holds no weight itself.
"""

from collections.abc import Mapping, Sequence

import onnx
import onnx_ir as ir

from wanexport.exporter.backends.onnx.lower import OPSET, Lowered
from wanexport.graphs.graph import NEXT
from wanexport.runtime.bundle.path import WEIGHTS_FILE
from wanexport.runtime.bundle.tensorfile import TensorEntry
from wanexport.runtime.dtypes import DTYPES, STORED
from wanexport.runtime.program import Call, TensorSpec, of_layer

_DOMAIN = "wanexport"  # of the functions
_IR_VERSION = 11  # of opset 23


def assemble(
    lowered: Lowered, weights: Mapping[str, TensorEntry], *, as_inputs: bool = False
) -> ir.Model:
    """The whole graph of lowered calls.

    `weights` says where in the weights file each parameter lies. With as_inputs the parameters are
    inputs of the graph after its own.
    """
    program = lowered.program
    values = {name: _value(name, spec) for name, spec in program.inputs.items()}
    state = {name: _value(name, spec) for name, spec in program.states().items()}
    inputs = [*values.values(), *state.values()]
    parameters: dict[str, ir.Value] = {}
    nodes = []
    for call in program.calls:
        for index, (own, kept) in enumerate(call.layers()):
            given = [parameters.setdefault(n, _parameter(n, weights[n])) for n in own]
            given += [values[name] for name in call.reads] + [state[name] for name in kept]
            results = _results(call, index)
            nodes.append(ir.Node(_DOMAIN, call.name, given, outputs=results))
            values |= dict(zip(call.writes, results))
            state |= dict(zip(kept, results[len(call.writes) :], strict=True))
    outputs = [_named(values[name], name, spec) for name, spec in program.outputs.items()]
    outputs += [_named(state[n], n + NEXT, spec) for n, spec in program.states().items()]
    model = _model([*inputs, *parameters.values()], outputs, nodes, lowered)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    if not as_inputs:
        del model.graph.inputs[len(inputs) :]
        for value in parameters.values():
            model.graph.initializers.add(_stored(value, weights))
    return model


def _model(
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    nodes: Sequence[ir.Node],
    lowered: Lowered,
) -> ir.Model:
    """A graph of nodes that call functions."""
    functions = [_function(name, model) for name, model in lowered.calls.items()]
    # What inlines a function wants its operators' domains here.
    domains = {name: number for own in functions for name, number in own.opset_imports.items()}
    opsets = {**domains, "": OPSET, _DOMAIN: 1}
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports=opsets, name="wan_denoiser")
    return ir.Model(graph, ir_version=_IR_VERSION, functions=functions)


def result_names(call: Call, index: int) -> list[str]:
    """What the main graph calls the results of one layer of a call: its writes, then what its
    state becomes. What leaves the graph has its name there instead."""
    layer = f".{index}" if call.repeat > 1 else ""
    names = (*call.writes, *(name + NEXT for name in of_layer(call.state, index)))
    return [f"{call.name}{layer}.{name}" for name in names]


def _results(call: Call, index: int) -> list[ir.Value]:
    return [ir.Value(name=name) for name in result_names(call, index)]


def _value(name: str, spec: TensorSpec) -> ir.Value:
    return _named(ir.Value(), name, spec)


def _named(value: ir.Value, name: str, spec: TensorSpec) -> ir.Value:
    """An end of the graph, which has a name, shape and type."""
    dtype = getattr(ir.DataType, DTYPES[spec.dtype].onnx)
    value.name, value.shape, value.type = name, ir.Shape(spec.shape), ir.TensorType(dtype)
    return value


def _parameter(name: str, entry: TensorEntry) -> ir.Value:
    dtype = getattr(ir.DataType, STORED[entry.dtype].onnx)
    return ir.Value(name=name, shape=ir.Shape(entry.shape), type=ir.TensorType(dtype))


def _stored(value: ir.Value, weights: Mapping[str, TensorEntry]) -> ir.Value:
    """The parameter, whose data lies in the weights file."""
    assert value.name is not None and value.dtype is not None
    entry = weights[value.name]
    value.const_value = ir.ExternalTensor(
        WEIGHTS_FILE,
        entry.offset,
        entry.size,
        value.dtype,
        shape=ir.Shape(entry.shape),
        name=value.name,
    )
    value.shape = value.type = None  # which the tensor has: stated twice, they double the graph
    return value


def _function(name: str, model: ir.Model) -> ir.Function:
    """A call's graph as a function, which has no initializers: its tables become constants."""
    graph, constants = ir.from_proto(ir.to_proto(model)).graph, []
    for table, value in list(graph.initializers.items()):
        constant = ir.node("Constant", [], attributes={"value": value.const_value})
        result = constant.outputs[0]
        result.name, result.shape, result.type = value.name, value.shape, value.type
        del graph.initializers[table]
        value.replace_all_uses_with(result)
        constants.append(constant)
    if constants:
        graph.insert_before(graph[0], constants)
    return ir.Function(_DOMAIN, name, "", graph=graph, attributes=[])
