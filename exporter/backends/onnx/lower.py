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

from wanexport.exporter.backends.onnx.trace import trace
from wanexport.exporter.child.quiet import quiet
from wanexport.exporter.lint.onnx import lint_onnx
from wanexport.exporter.lint.program import count, lint_program
from wanexport.graphs.signature import attention_count
from wanexport.graphs.weights import DTYPES
from wanexport.runtime.bundle.tensorfile import TensorEntry
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.load import WEIGHTS_FILE
from wanexport.runtime.wan_config import WanConfig

OPSET = 23
_IR_DTYPES = {
    "F32": ir.DataType.FLOAT,
    "BF16": ir.DataType.BFLOAT16,
    "F16": ir.DataType.FLOAT16,
}
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
    program: ExportedProgram,
    weights: Mapping[str, TensorEntry],
    *,
    attention: str = "native",
    as_inputs: bool = False,
    wide_bias: bool = False,
) -> ir.Model:
    """Translate the program; `weights` says where in the weights file each parameter lies.

    A parameter stored in another dtype than the program's is cast where it is first used. With
    as_inputs the parameters are inputs of the graph after its own, under their official names.
    attention is `native`, one operator; `mha`, one of ONNX Runtime's own operators; or
    `decomposed`, products and a softmax. With wide_bias what follows a bf16 or fp16 product is
    fp32: ONNX Runtime on CUDA rounds before it adds a bias, and GELU at each of its steps.
    """
    linear, gelu = (_wide_linear, _wide_gelu) if wide_bias else (_linear, None)
    with quiet("torch.onnx"):
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,  # with weights that hold no memory the exporter's own optimizer fails
            verbose=False,
            custom_translation_table={
                torch.ops.aten.linear.default: linear,
                torch.ops.wanexport.attention.default: _ATTENTION[attention],
                **({torch.ops.aten.gelu.default: gelu} if gelu else {}),
            },
        )
    assert exported is not None
    model = exported.model
    # As inputs the parameters keep their names and are out of the constant folder's reach.
    names = program.graph_signature.parameters
    parameters = {name: model.graph.initializers.pop(name) for name in names}
    num_inputs = len(model.graph.inputs)
    for value in parameters.values():
        value.const_value = None
        model.graph.inputs.append(value)
    for cleanup in _CLEANUPS:
        cleanup(model)
    if wide_bias:
        _keep_wide(model)
    model.graph.outputs[0].name = "velocity"
    model.graph.name = "wan_denoiser"
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    if attention == "mha":  # after the checker, which knows only ONNX's own operators
        _use_multi_head_attention(model)
    if as_inputs:
        return model
    del model.graph.inputs[num_inputs:]
    for name, value in parameters.items():
        stored = _IR_DTYPES[weights[name].dtype]
        if value.dtype != stored:
            value = _cast_at_first_use(model.graph, value, stored)
        _read_from_weights_file(value, name, weights[name])
        model.graph.initializers.add(value)
    return model


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
    value.name, value.shape, value.dtype = name, ir.Shape(entry.shape), _IR_DTYPES[entry.dtype]
    value.const_value = ir.ExternalTensor(
        WEIGHTS_FILE,
        entry.offset,
        entry.size,
        _IR_DTYPES[entry.dtype],
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
    program = trace(config, geometry, DTYPES[dtype])
    graph = to_onnx(program, weights, attention=attention, as_inputs=as_inputs, wide_bias=wide_bias)
    expected = attention_count(config)
    findings = lint_program(program, expected)
    if attention in ("native", "mha"):
        findings += lint_onnx(ir.to_proto(graph), expected)
    else:  # what was asked for is no finding
        unasked = lint_onnx(ir.to_proto(graph), 0)
        findings += [f for f in unasked if (f.kind, f.detail) != ("unfused_attention", "Softmax")]
    if findings:
        raise RuntimeError(f"unclean graph: {findings[0]}, and {len(findings) - 1} more")
    return graph, count(findings)


def serialize(model: ir.Model) -> bytes:
    """The graph as ONNX bytes; the weights are named in it, not contained."""
    content: bytes = ir.to_proto(model).SerializeToString()
    return content


def node_counts(model: ir.Model) -> Counter[str]:
    """How many nodes of each operator the graph has."""
    return Counter(node.op_type for node in model.graph)


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """One Gemm that reads the weight as stored: a MatMul would need a transposed copy of it."""
    shape = [int(n) for n in x.shape]
    if len(shape) == 2:
        return op.Gemm(x, weight, bias, transB=1)
    rows = op.Reshape(x, op.Constant(value_ints=[-1, shape[-1]]))
    product = op.Gemm(rows, weight, bias, transB=1)
    return op.Reshape(product, op.Constant(value_ints=[*shape[:-1], int(weight.shape[0])]))


def _wide_linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """The product as `_linear`'s, rounded once, and the bias added in fp32."""
    if bias is None or weight.dtype == ir.DataType.FLOAT:
        return _linear(x, weight, bias)
    product = op.Cast(_linear(x, weight), to=ir.DataType.FLOAT)
    return op.Cast(op.Add(product, op.Cast(bias, to=ir.DataType.FLOAT)), to=weight.dtype)


def _wide_gelu(x: Any, approximate: str = "none") -> Any:
    """GELU in fp32, with one rounding at its end."""
    wide = op.Gelu(op.Cast(x, to=ir.DataType.FLOAT), approximate=approximate)
    return op.Cast(wide, to=x.dtype)


def _keep_wide(model: ir.Model) -> None:
    """Where the sum of a bias is rounded and cast back at once, take it as it was."""
    for node in model.graph:
        if _widens(node) and (rounding := _producer(node)) and rounding.op_type == "Cast":
            adding = _producer(rounding)
            if adding and adding.op_type == "Add":
                sides = [value.producer() for value in adding.inputs if value is not None]
                if all(side is not None and _widens(side) for side in sides):
                    node.outputs[0].replace_all_uses_with(adding.outputs[0])
    RemoveUnusedNodesPass()(model)


def _producer(node: ir.Node) -> ir.Node | None:
    """What computes the node's first input; None for an input of the graph."""
    return node.inputs[0].producer() if node.inputs[0] is not None else None


def _widens(node: ir.Node) -> bool:
    """Whether it is a cast to fp32."""
    to = node.attributes.get("to")
    return node.op_type == "Cast" and to is not None and to.as_int() == ir.DataType.FLOAT


def _attention(q: Any, k: Any, v: Any) -> Any:
    """[B, S, H, D] to ONNX's [B, H, S, D] and back; its default scale is ours, 1 / sqrt(D)."""
    q, k, v = (op.Transpose(x, perm=[0, 2, 1, 3]) for x in (q, k, v))
    out, *_ = op.Attention(q, k, v)  # the operator has optional outputs: take the first
    return op.Transpose(out, perm=[0, 2, 1, 3])


def _decomposed_attention(q: Any, k: Any, v: Any) -> Any:
    """The same in products and a softmax, with the scale on q, as TensorRT fuses it."""
    scale = op.CastLike(op.Constant(value_float=float(q.shape[-1]) ** -0.5), q)
    scaled = op.Mul(op.Transpose(q, perm=[0, 2, 1, 3]), scale)
    scores = op.MatMul(scaled, op.Transpose(k, perm=[0, 2, 3, 1]))
    out = op.MatMul(op.Softmax(scores, axis=-1), op.Transpose(v, perm=[0, 2, 1, 3]))
    return op.Transpose(out, perm=[0, 2, 1, 3])


def _use_multi_head_attention(model: ir.Model) -> int:
    """Put `com.microsoft` MultiHeadAttention, on [B, S, H * D], for each Attention; say how many.

    The transposes around an Attention go with it.
    """
    nodes = [node for node in model.graph if node.op_type == "Attention"]
    for node in nodes:
        (transposed_back,) = (use.node for use in node.outputs[0].uses())
        q, k, v = (_before_transpose(value) for value in node.inputs)
        new: list[ir.Node] = []
        flat = [_reshape(x, _flat_shape(x), new) for x in (q, k, v)]
        heads = _static_shape(q)[2]
        attention = ir.node(
            "MultiHeadAttention", flat, attributes={"num_heads": heads}, domain="com.microsoft"
        )
        new.append(attention)
        out = attention.outputs[0]
        out.type, out.shape = q.type, ir.Shape(_flat_shape(q))
        result = _reshape(out, _static_shape(q), new)
        transposed_back.outputs[0].replace_all_uses_with(result)
        model.graph.insert_before(transposed_back, new)
    model.graph.opset_imports["com.microsoft"] = 1
    RemoveUnusedNodesPass()(model)
    return len(nodes)


def _before_transpose(value: ir.Value | None) -> ir.Value:
    """What the transpose that gives this value was given."""
    transpose = value.producer() if value is not None else None
    assert transpose is not None and transpose.op_type == "Transpose"
    source = transpose.inputs[0]
    assert source is not None
    return source


def _static_shape(value: ir.Value) -> list[int]:
    assert value.shape is not None
    return [int(size) for size in value.shape.numpy()]


def _flat_shape(value: ir.Value) -> list[int]:
    """[B, S, H * D] of a value of [B, S, H, D]."""
    batch, length, heads, width = _static_shape(value)
    return [batch, length, heads * width]


def _reshape(value: ir.Value, shape: list[int], nodes: list[ir.Node]) -> ir.Value:
    """The value in another shape; what computes it is appended to the nodes."""
    constant = ir.node("Constant", [], attributes={"value_ints": shape})
    reshape = ir.node("Reshape", [value, constant.outputs[0]])
    nodes += [constant, reshape]
    result = reshape.outputs[0]
    result.type, result.shape = value.type, ir.Shape(shape)
    return result


_ATTENTION = {
    "native": _attention,
    "mha": _attention,
    "decomposed": _decomposed_attention,
}
