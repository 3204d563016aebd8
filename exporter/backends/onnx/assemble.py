"""Put the lowered calls of a Program together: an ONNX graph that calls each as a function.

The block is one function, called once a layer with that layer's parameters under their official
names. The graph names the weights file, byte offset and length of each parameter, or takes the
parameters as inputs, and holds no weight itself.
"""

from collections.abc import Iterator, Mapping

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
    inputs, names = [*values.values(), *state.values()], list(state)
    parameters: dict[str, ir.Value] = {}
    nodes = []
    for call in program.calls:
        for index, (own, kept) in enumerate(call.layers()):
            given = [parameters.setdefault(n, _parameter(n, weights[n])) for n in own]
            given += [values[name] for name in call.reads] + [state[name] for name in kept]
            results = dict(_results(call, index))
            nodes.append(ir.Node(_DOMAIN, call.name, given, outputs=list(results.values())))
            values |= {name: results[name] for name in call.writes}
            state |= {name: results[name + NEXT] for name in kept}
    outputs = {name: (values[name], spec) for name, spec in program.outputs.items()}
    outputs |= {name + NEXT: (state[name], program.states()[name]) for name in names}
    graph = ir.Graph(
        inputs + (list(parameters.values()) if as_inputs else []),
        [_named(value, name, spec) for name, (value, spec) in outputs.items()],
        nodes=nodes,
        initializers=[] if as_inputs else [_stored(p, weights) for p in parameters.values()],
        opset_imports={"": OPSET, _DOMAIN: 1},
        name="wan_denoiser",
    )
    functions = [_function(name, model) for name, model in lowered.calls.items()]
    return ir.Model(graph, ir_version=_IR_VERSION, functions=functions)


def _results(call: Call, index: int) -> Iterator[tuple[str, ir.Value]]:
    """What one layer of a call gives: its writes, then what its state becomes."""
    suffix = f".{index}" if call.repeat > 1 else ""
    for name in call.writes:
        yield name, ir.Value(name=f"{call.name}{suffix}.{name}")
    for name in of_layer(call.state, index):
        yield name + NEXT, ir.Value(name=name + NEXT)


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
