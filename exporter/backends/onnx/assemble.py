"""Put the lowered calls of a Program together: an ONNX graph that calls each as a function.

The block is one function, called once a layer with that layer's parameters under their official
names. The graph names the weights file, byte offset and length of each parameter, or takes the
parameters as inputs, and holds no weight itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import onnx
import onnx_ir as ir

from wanexport.exporter.backends.onnx.cached import Becomes
from wanexport.exporter.backends.onnx.lower import Lowered
from wanexport.runtime.bundle.path import WEIGHTS_FILE
from wanexport.runtime.bundle.tensorfile import TensorEntry
from wanexport.runtime.dtypes import DTYPES, STORED
from wanexport.runtime.engines.onnx_moments import WRITTEN
from wanexport.runtime.program import ENGINE_DTYPE, ROWS, Call, TensorSpec, of_layer

_DOMAIN = "wanexport"  # of the functions
_IR_VERSION = 11  # of opset 23; of 24 ONNX Runtime asks for no later one


def assemble(
    lowered: Lowered,
    weights: Mapping[str, TensorEntry],
    moment: str = "step",
    *,
    as_inputs: bool = False,
) -> ir.Model:
    """The whole graph of the lowered calls of one moment.

    `weights` says where in the weights file each parameter lies. With as_inputs the parameters are
    inputs of the graph after its own. Its metadata names the state that a runtime may have written
    where it lies.
    """
    ends, wiring = lowered.program.whole().at(moment), _Wiring(lowered, weights, moment)
    for call in (call for call in lowered.program.calls if call.when == moment):
        for index in call.numbers:
            wiring.add(call, index)
    inputs, specs = wiring.inputs, wiring.specs
    outputs = [_named(wiring.values[name], name, specs[name], lowered) for name in ends.writes]
    outputs += [
        _named(wiring.state[name], name + what.ending, specs[name], lowered)
        for name, what in wiring.becomes.items()
        if what is not Becomes.ITSELF
    ]
    parameters = wiring.parameters.values()
    model = _model([*inputs, *parameters], outputs, wiring.nodes, lowered)
    if written := [name for name, what in wiring.becomes.items() if what is Becomes.WRITTEN]:
        model.metadata_props[WRITTEN] = " ".join(written)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    if not as_inputs:
        del model.graph.inputs[len(inputs) :]
        for value in parameters:
            model.graph.initializers.add(_stored(value, weights))
    return model


class _Wiring:
    """The graph of one moment, to which its calls are added in order.

    values and state are what they are by then, of a state that is written by rows these; specs are
    the shapes, and becomes what has become of the state.
    """

    def __init__(self, lowered: Lowered, weights: Mapping[str, TensorEntry], moment: str) -> None:
        self.lowered, self.weights, program = lowered, weights, lowered.program
        self.specs: dict[str, TensorSpec] = {
            **program.inputs, **program.values, **program.outputs, **program.states()
        }  # fmt: skip
        ends = program.whole().at(moment)
        self.values = {name: _value(name, self.specs[name], lowered) for name in ends.reads}
        self.state = {name: _value(name, self.specs[name], lowered) for name in ends.state}
        self._given = [*self.values.values()], [*self.state.values()]
        self.becomes = dict.fromkeys(ends.state, Becomes.ITSELF)
        self.parameters: dict[str, ir.Value] = {}
        self.nodes: list[ir.Node] = []

    @property
    def inputs(self) -> list[ir.Value]:
        """What the graph takes beside parameters: of the state what a call reads."""
        values, state = self._given
        return [*values, *(value for value in state if value.uses())]

    def add(self, call: Call, index: int) -> None:
        """Call a function for one layer."""
        own, lowered = of_layer(call.parameters, index), self.lowered
        given = [self.parameters.setdefault(n, _parameter(n, self.weights[n])) for n in own]
        given += [self.values[name] for name in call.reads]
        given += [self.state[name] for name in of_layer(lowered.keeps(call), index)]
        results = [ir.Value(name=name) for name in result_names(lowered, call, index)]
        self.nodes.append(ir.Node(_DOMAIN, call.function, given, outputs=results))
        self.values |= dict(zip(call.writes, results))
        kept = of_layer(call.state, index)
        self._keep(call, dict(zip(kept, lowered.becomes[call.function], strict=True)))
        changed = of_layer(lowered.changes(call), index)
        self.state |= dict(zip(changed, results[len(call.writes) :], strict=True))

    def _keep(self, call: Call, becomes: Mapping[str, Becomes]) -> None:
        """Note what becomes of the state by one layer of a call."""
        shapes = [value.shape for value in self.lowered.calls[call.function].graph.outputs]
        made = iter(shapes[len(call.writes) :])
        for name, what in becomes.items():
            if self.becomes[name].ending == ROWS:
                raise RuntimeError(f"{call.name} takes {name}, of which its moment gives rows only")
            if what is Becomes.ITSELF:
                continue
            is_first = self.becomes[name] is Becomes.ITSELF
            # Twice written, it would be read in between.
            self.becomes[name] = what if is_first else Becomes.ANOTHER
            shape = next(made)
            if what.ending == ROWS:
                assert shape is not None
                self.specs[name] = replace(self.specs[name], shape=shape.numpy())


def _model(
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    nodes: Sequence[ir.Node],
    lowered: Lowered,
) -> ir.Model:
    """A graph of nodes that call functions."""
    called = dict.fromkeys(node.op_type for node in nodes)
    functions = [_function(name, lowered.calls[name]) for name in called]
    opsets = {_DOMAIN: 1}
    for own in functions:  # what inlines a function wants its operators' domains here
        opsets |= {name: max(n, opsets.get(name, 0)) for name, n in own.opset_imports.items()}
    for own in functions:
        own.opset_imports[""] = opsets[""]
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports=opsets, name="wan_denoiser")
    return ir.Model(graph, ir_version=_IR_VERSION, functions=functions)


def result_names(lowered: Lowered, call: Call, index: int) -> list[str]:
    """What the main graph calls the results of one layer of a call: its writes, then what the state
    becomes that it changes. What leaves the graph has its name there instead."""
    becomes = zip(of_layer(call.state, index), lowered.becomes[call.function], strict=True)
    changed = (name + what.ending for name, what in becomes if what is not Becomes.ITSELF)
    return name_results(call, index, (*call.writes, *changed))


def name_results(call: Call, index: int, names: Sequence[str]) -> list[str]:
    """The main graph's names of what one layer of a call makes."""
    layer = f".{index}" if call.repeat > 1 else ""
    return [f"{call.name}{layer}.{name}" for name in names]


def _value(name: str, spec: TensorSpec, lowered: Lowered) -> ir.Value:
    return _named(ir.Value(), name, spec, lowered)


def _named(value: ir.Value, name: str, spec: TensorSpec, lowered: Lowered) -> ir.Value:
    """An end of the graph, which has a name, shape and type."""
    own = lowered.dtype if spec.dtype == ENGINE_DTYPE else spec.dtype
    dtype = getattr(ir.DataType, DTYPES[own].onnx)
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
