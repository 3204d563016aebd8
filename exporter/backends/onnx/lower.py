"""Lower an exported program to a weightless ONNX graph, opset 23.

The parameters become initializers whose data lies in the bundle's safetensors file: the graph names
the file, byte offset and length, and holds no weight itself.
"""

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    IdentityEliminationPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)
from onnxscript import opset23 as op
from onnxscript import optimizer
from torch.export import ExportedProgram

from wanexport.exporter.backends.onnx.passes import (
    keep_wide,
    plain_linear,
    use_multi_head_attention,
    wide_gelu,
    wide_linear,
)
from wanexport.exporter.backends.onnx.trace import trace
from wanexport.exporter.child.quiet import quiet
from wanexport.exporter.lint.onnx import lint_onnx
from wanexport.exporter.lint.program import count, lint_program
from wanexport.graphs.graph import NEXT, empty_graph
from wanexport.graphs.regions import written_inputs
from wanexport.graphs.signature import attention_count
from wanexport.graphs.weights import DTYPES
from wanexport.runtime.bundle.path import WEIGHTS_FILE
from wanexport.runtime.bundle.tensorfile import TensorEntry
from wanexport.runtime.dtypes import STORED
from wanexport.runtime.family import family_of
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.program import Program
from wanexport.runtime.wan_config import WanConfig

OPSET = 23
_LARGEST_FOLDED = 8192  # elements: folded further, the RoPE tables would grow to the whole grid
_CLEANUPS = (
    partial(optimizer.fold_constants, output_size_limit=_LARGEST_FOLDED),
    IdentityEliminationPass(),
    DeduplicateInitializersPass(),
    CommonSubexpressionEliminationPass(),
    RemoveUnusedNodesPass(),
    RemoveUnusedOpsetsPass(),
    ClearMetadataAndDocStringPass(),
)


def to_onnx(
    exported: ExportedProgram,
    program: Program,
    weights: Mapping[str, TensorEntry],
    *,
    attention: str = "native",
    as_inputs: bool = False,
    wide_bias: bool = False,
) -> ir.Model:
    """Translate a whole graph; `weights` says where in the weights file each parameter lies.

    Inputs and outputs have their names in the Program; after the inputs comes its state, and after
    the outputs what the state becomes, named with NEXT.
    A parameter stored in another dtype than the program's is cast where it is first used. With
    as_inputs the parameters are inputs of the graph after its own, under their official names.
    attention is `native`, one operator; `mha`, one of ONNX Runtime's own operators; or
    `decomposed`, products and a softmax. With wide_bias what follows a bf16 or fp16 product is
    fp32: ONNX Runtime on CUDA rounds before it adds a bias, and GELU at each of its steps.
    """
    model = _translate(exported, attention, wide_bias)
    num_inputs = _name_ends(model.graph, program)
    # As inputs the parameters keep their names and are out of the constant folder's reach.
    names = exported.graph_signature.parameters
    parameters = {name: model.graph.initializers.pop(name) for name in names}
    for value in parameters.values():
        value.const_value = None
        model.graph.inputs.append(value)
    for cleanup in _CLEANUPS:
        cleanup(model)
    if wide_bias:
        keep_wide(model)
    model.graph.name = "wan_denoiser"
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    if attention == "mha":  # after the checker, which knows only ONNX's own operators
        use_multi_head_attention(model)
    if not as_inputs:
        del model.graph.inputs[num_inputs:]
        _store(model.graph, parameters, weights)
    return model


def _translate(exported: ExportedProgram, attention: str, wide_bias: bool) -> ir.Model:
    """The program in ONNX's operators, as PyTorch's exporter has it."""
    linear, gelu = (wide_linear, wide_gelu) if wide_bias else (plain_linear, None)
    with quiet("torch.onnx"):
        translated = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,  # with weights that hold no memory the exporter's own optimizer fails
            verbose=False,
            custom_translation_table={
                torch.ops.aten.linear.default: linear,
                torch.ops.wanexport.attention.kind: _ATTENTION[attention],
                **({torch.ops.aten.gelu.default: gelu} if gelu else {}),
            },
        )
    assert translated is not None
    return translated.model


def _store(
    graph: ir.Graph, parameters: Mapping[str, ir.Value], weights: Mapping[str, TensorEntry]
) -> None:
    """Make the parameters initializers that lie in the weights file."""
    for name, value in parameters.items():
        stored = _ir_dtype(weights[name])
        if value.dtype != stored:
            value = _cast_at_first_use(graph, value, stored)
        _read_from_weights_file(value, name, weights[name])
        graph.initializers.add(value)


def _name_ends(graph: ir.Graph, program: Program) -> int:
    """Give inputs and outputs their names in the Program; return how many inputs there are."""
    states = tuple(program.states())
    inputs = (*program.inputs, *states)
    outputs = (*program.outputs, *(name + NEXT for name in states))
    for values, names in ((graph.inputs, inputs), (graph.outputs, outputs)):
        for value, name in zip(values, names, strict=True):
            value.name = name
    return len(inputs)


def _ir_dtype(entry: TensorEntry) -> ir.DataType:
    """What onnx_ir calls the dtype of a tensor in the weights file."""
    dtype: ir.DataType = getattr(ir.DataType, STORED[entry.dtype].onnx)
    return dtype


def _cast_at_first_use(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Return a value of `dtype` that takes the parameter's place, cast to the parameter's own.

    Left alone, ONNX Runtime would cast every weight before the first product. So the cast waits
    for the activation that the weight is multiplied with: it reads the weight through a Reshape
    whose shape adds 0 times that activation's length.
    """
    assert value.shape is not None
    users = {use.node for use in value.uses()}
    first = next(node for node in graph if node in users)
    stored, activation = ir.Value(), first.inputs[0]
    nodes, source = [], stored
    if activation is not value:
        shape = ir.node("Constant", [], attributes={"value_ints": value.shape.numpy()})
        zero = ir.node("Constant", [], attributes={"value_ints": [0]})
        length = ir.node("Shape", [activation], attributes={"start": 0, "end": 1})
        nothing = ir.node("Mul", [length.outputs[0], zero.outputs[0]])
        same = ir.node("Add", [shape.outputs[0], nothing.outputs[0]])
        view = ir.node("Reshape", [stored, same.outputs[0]])
        source = view.outputs[0]
        source.shape, source.dtype = value.shape, dtype  # no shape inference would find it
        nodes = [shape, zero, length, nothing, same, view]
    cast = ir.node("Cast", [source], attributes={"to": value.dtype})
    value.replace_all_uses_with(cast.outputs[0])
    graph.insert_before(first, [*nodes, cast])
    return stored


def _read_from_weights_file(value: ir.Value, name: str, entry: TensorEntry) -> None:
    value.name, value.shape, value.dtype = name, ir.Shape(entry.shape), _ir_dtype(entry)
    value.const_value = ir.ExternalTensor(
        WEIGHTS_FILE,
        entry.offset,
        entry.size,
        _ir_dtype(entry),
        shape=ir.Shape(entry.shape),
        name=name,
    )


def lower(
    config: WanConfig,
    geometry: Geometry,
    dtype: str,
    weights: Mapping[str, TensorEntry],
    *,
    attention: str = "native",
    as_inputs: bool = False,
    wide_bias: bool = False,
) -> tuple[ir.Model, dict[str, int]]:
    """Trace and translate the model, and lint both; return the graph and its lint counts.

    The options are those of `to_onnx`. Raises RuntimeError when either is not clean: a fault of
    ours.
    """
    graph = empty_graph(family_of(config).graph, config, geometry, DTYPES[dtype])
    program, expected = graph.program, attention_count(graph.program)
    exported = trace(graph)
    model = to_onnx(
        exported, program, weights, attention=attention, as_inputs=as_inputs, wide_bias=wide_bias
    )
    written = written_inputs(exported, len(program.states()))
    findings = lint_program(exported, expected, written)
    if attention in ("native", "mha"):
        findings += lint_onnx(ir.to_proto(model), expected)
    else:  # what was asked for is no finding
        unasked = lint_onnx(ir.to_proto(model), 0)
        findings += [f for f in unasked if (f.kind, f.detail) != ("unfused_attention", "Softmax")]
    if findings:
        raise RuntimeError(f"unclean graph: {findings[0]}, and {len(findings) - 1} more")
    return model, count(findings)


def serialize(model: ir.Model) -> bytes:
    """The graph as ONNX bytes; the weights are named in it, not contained."""
    content: bytes = ir.to_proto(model).SerializeToString()
    return content


def node_counts(model: ir.Model) -> Counter[str]:
    """How many nodes of each operator the graph has."""
    return Counter(node.op_type for node in model.graph)


def _attention(q: Any, k: Any, v: Any, kind: str) -> Any:
    """[B, S, H, D] to ONNX's [B, H, S, D] and back; its default scale is ours, 1 / sqrt(D)."""
    q, k, v = (op.Transpose(x, perm=[0, 2, 1, 3]) for x in (q, k, v))
    out, *_ = op.Attention(q, k, v)  # the operator has optional outputs: take the first
    return op.Transpose(out, perm=[0, 2, 1, 3])


def _decomposed_attention(q: Any, k: Any, v: Any, kind: str) -> Any:
    """The same in products and a softmax, with the scale on q, as TensorRT fuses it."""
    scale = op.CastLike(op.Constant(value_float=float(q.shape[-1]) ** -0.5), q)
    scaled = op.Mul(op.Transpose(q, perm=[0, 2, 1, 3]), scale)
    scores = op.MatMul(scaled, op.Transpose(k, perm=[0, 2, 3, 1]))
    out = op.MatMul(op.Softmax(scores, axis=-1), op.Transpose(v, perm=[0, 2, 1, 3]))
    return op.Transpose(out, perm=[0, 2, 1, 3])


_ATTENTION = {
    "native": _attention,
    "mha": _attention,
    "decomposed": _decomposed_attention,
}
