"""What an ONNX graph must not contain, and where it does."""

from collections.abc import Iterator

import onnx
import onnx.inliner
import onnx_ir as ir

from wanexport.exporter.lint.program import Finding

_OPERATORS = {
    "host_sync": "NonZero Unique Compress",
    "strided_write": "ScatterND ScatterElements Scatter TensorScatter",
    "sequence": "SequenceConstruct SequenceEmpty SequenceAt SequenceInsert SequenceErase "
    "SequenceLength SequenceMap SplitToSequence ConcatFromSequence",
    "if": "If",
    "loop": "Loop Scan",
    "einsum": "Einsum",
    "unfused_attention": "Softmax LogSoftmax BiasSoftmax QLinearSoftmax",
}
ATTENTION = ("Attention", "MultiHeadAttention")
_KIND_OF = {name: kind for kind, names in _OPERATORS.items() for name in names.split()}
_DTYPES = {
    ir.DataType.DOUBLE: "fp64",
    ir.DataType.COMPLEX64: "complex",
    ir.DataType.COMPLEX128: "complex",
}


def lint_onnx(model: onnx.ModelProto, attentions: int | None = None) -> list[Finding]:
    """Everything in the model, subgraphs and functions included, that is one of lint's kinds.

    attentions is how many Attention nodes the model must have. A mutation leaves no trace in ONNX.
    Raises onnx's own exceptions when types and shapes cannot be inferred.
    """
    flat = onnx.inliner.inline_local_functions(model)  # values in functions have no types
    graph = ir.from_proto(onnx.shape_inference.infer_shapes(flat, strict_mode=True)).graph
    nodes = list(ir.traversal.RecursiveGraphIterator(graph))
    findings = []
    owners = (node.graph for node in nodes)
    for part in dict.fromkeys([graph, *(g for g in owners if isinstance(g, ir.Graph))]):
        for value in (*part.inputs, *part.initializers.values()):
            findings += [Finding(kind, value.name or "", "input") for kind in _kinds(value)]
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is None:
            findings.append(Finding("dynamic_size", value.name or "", "no shape is stated"))
    prefixes = _prefixes(graph)
    for node in nodes:
        kinds = {kind for value in node.outputs for kind in _kinds(value) if value not in prefixes}
        if node.op_type in _KIND_OF and not _writes_state(graph, node):
            kinds.add(_KIND_OF[node.op_type])
        findings += [Finding(kind, node.name or "", node.op_type) for kind in sorted(kinds)]
    found = sum(node.op_type in ATTENTION for node in nodes)
    if attentions is not None and found != attentions:
        detail = f"{found} attention nodes, the model has {attentions}"
        findings.append(Finding("unfused_attention", graph.name or "", detail))
    return findings


def _writes_state(graph: ir.Graph, node: ir.Node) -> bool:
    """Whether it makes an output of a graph's input: a state that a runtime can write in place; or
    the graph gives the rows that it writes, which the runtime writes then."""
    is_scatter = node.op_type == "ScatterND" and node.inputs[0] in graph.inputs
    return is_scatter and any(v in graph.outputs for v in (node.outputs[0], node.inputs[2]))


def _prefixes(graph: ir.Graph) -> set[ir.Value]:
    """The part of a state that an input of the graph says the length of, and views of it: what is
    attended to of a cache. No other size may depend on data."""
    found = set[ir.Value]()
    for node in graph:
        source = node.inputs[0] if node.inputs else None
        maker = source.producer() if source is not None else None
        is_cut = node.op_type == "Slice" and maker is not None and _writes_state(graph, maker)
        if (is_cut and node.inputs[2] in graph.inputs) or (
            node.op_type == "Reshape" and source in found
        ):
            found.add(node.outputs[0])
    return found


def _kinds(value: ir.Value) -> Iterator[str]:
    if value.dtype in _DTYPES:
        yield _DTYPES[value.dtype]
    if value.shape is not None and not all(isinstance(size, int) for size in value.shape):
        yield "dynamic_size"
