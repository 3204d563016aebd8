"""Lower each call of a graph to ONNX: a function of its parameters, reads and state."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    CommonSubexpressionEliminationPass,
    IdentityEliminationPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)
from onnxscript import optimizer
from torch.export import ExportedProgram

from wanexport.exporter.backends.onnx.attention import ATTENTION_FORMS
from wanexport.exporter.backends.onnx.cached import (
    ATTEND,
    Becomes,
    rows_of,
    use_lengths,
    what_becomes,
    write_rows,
)
from wanexport.exporter.backends.onnx.passes import (
    clamp,
    keep_wide,
    plain_linear,
    separate_queries,
    use_multi_head_attention,
    wide_gelu,
    wide_linear,
)
from wanexport.exporter.child.quiet import quiet
from wanexport.exporter.lint.onnx_graph import ATTENTION, lint_onnx
from wanexport.exporter.lint.program import Finding, attention_operators, count, lint_program
from wanexport.graphs.graph import Graph, empty_graph, torch_dtype
from wanexport.graphs.regions import trace_calls, written_inputs
from wanexport.graphs.signature import attention_count
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.program import NEXT, ROWS, Call, Program, of_layer
from wanexport.runtime.wan_config import WanConfig

OPSET = 23


@dataclass(frozen=True)
class Lowering:
    """How graphs are lowered: the one thing that says so, to an engine's build and to its proof.

    attention is `native`, one operator; `mha`, one of ONNX Runtime's own; or `decomposed`, products
    and a softmax. With wide_bias what follows a bf16 or fp16 product is fp32: ONNX Runtime on CUDA
    rounds before it adds a bias, and GELU at each of its steps. With separate_queries no two
    attentions have the same query and scale, which TensorRT for RTX 1.7 does not survive. cached is
    how a cache is attended to: its `prefix`, all of it by `lengths`, or with a `mask`, which may be
    `decomposed` too. With rows a state that is written by rows gives only these, for a runtime that
    writes nothing in place.
    """

    dtype: str
    attention: str = "native"
    wide_bias: bool = False
    separate_queries: bool = False
    cached: str = "prefix"
    rows: bool = False


def for_onnx_runtime(dtype: str, attention: str) -> Lowering:
    """How an engine of ONNX Runtime's is lowered; its own operator is that of a GPU."""
    cached = "lengths" if attention == "mha" else "prefix"
    return Lowering(dtype, attention, wide_bias=dtype != "fp32", cached=cached)


def for_tensorrt(dtype: str, attention: str) -> Lowering:
    """How what TensorRT builds a plan of is lowered."""
    cached = "decomposed" if attention == "decomposed" else "mask"
    return Lowering(dtype, attention, separate_queries=True, cached=cached, rows=True)


@dataclass(frozen=True)
class Lowered:
    """The functions of a graph's calls in ONNX by name, without weights, and what lint counted.

    A function's inputs are its parameters, reads and the state that it reads, in this order; its
    outputs are its writes and what the state becomes that it changes. `becomes` says that of each
    state; dtype is the precision of what is the engine's.
    """

    program: Program
    calls: Mapping[str, ir.Model]
    becomes: Mapping[str, tuple[Becomes, ...]]
    lint: Mapping[str, int]
    dtype: str

    def keeps(self, call: Call) -> tuple[str, ...]:
        """The names in `call.state` of what a call reads, in order."""
        known = zip(call.state, self.becomes[call.function], strict=True)
        return tuple(name for name, becomes in known if becomes.is_read)

    def changes(self, call: Call) -> tuple[str, ...]:
        """The names in `call.state` of what a call changes, in order."""
        known = zip(call.state, self.becomes[call.function], strict=True)
        return tuple(name for name, becomes in known if becomes is not Becomes.ITSELF)


def lower(graph: str, config: WanConfig, geometry: Geometry, how: Lowering) -> Lowered:
    """Trace and translate each call of a graph, a `module:Class`, once.

    Raises RuntimeError when one is not clean: a fault of ours.
    """
    empty = empty_graph(graph, config, geometry, torch_dtype(how.dtype))
    program = empty.program
    traced = trace_calls(empty, "cpu", functional=True)
    own = [call for call in program.calls if not call.code]
    calls, becomes = {}, {}
    for call in own:
        model = _translate(traced[call.name], call, how)
        calls[call.name], becomes[call.name] = model, _fit_state(model.graph, call, how)
    findings = [f for call in own for f in _lint_traced(empty, call, traced)]
    findings += [f for model in calls.values() for f in _lint_translated(model, how)]
    findings += _missing_attention(program, traced, calls, how)
    if findings:
        raise RuntimeError(f"unclean graph: {findings[0]}, and {len(findings) - 1} more")
    return Lowered(program, calls, becomes, count(findings), how.dtype)


def _fit_state(graph: ir.Graph, call: Call, how: Lowering) -> tuple[Becomes, ...]:
    """What becomes of each state of a call; what is not read is no input, what stays no output."""
    first, number = len(call.writes), len(graph.inputs) - len(call.state)
    states, results = graph.inputs[number:], graph.outputs[first:]
    becomes = tuple(what_becomes(*pair, rows=how.rows) for pair in zip(states, results))
    graph.inputs[number:] = [s for s, what in zip(states, becomes) if what.is_read]
    graph.outputs[first:] = [
        rows_of(result) if what.ending == ROWS else result
        for result, what in zip(results, becomes)
        if what is not Becomes.ITSELF
    ]
    RemoveUnusedNodesPass()(ir.Model(graph, ir_version=11))
    return becomes


def _lint_traced(empty: Graph, call: Call, traced: Mapping[str, ExportedProgram]) -> list[Finding]:
    """What lint finds in a call as it is written: with state, that writes it in place."""
    if not call.state:
        return lint_program(traced[call.name])
    exported = trace_calls(empty, "cpu", [call.name])[call.name]
    return lint_program(exported, None, written_inputs(exported, len(call.state)))


def _lint_translated(model: ir.Model, how: Lowering) -> list[Finding]:
    """What lint finds in a call in ONNX, but for what was asked for."""
    found = lint_onnx(ir.to_proto(model))
    if how.attention != "decomposed":
        return found
    return [f for f in found if (f.kind, f.detail) != ("unfused_attention", "Softmax")]


def _missing_attention(
    program: Program,
    traced: Mapping[str, ExportedProgram],
    calls: Mapping[str, ir.Model],
    how: Lowering,
) -> list[Finding]:
    """Where a forward has not the attentions that the model has: as it is traced, and in ONNX."""
    expected = attention_count(program)
    operators = nodes = 0
    for call in _forward(program):
        graph = calls[call.function].graph
        operators += call.repeat * attention_operators(traced[call.function])
        nodes += call.repeat * sum(node.op_type in ATTENTION for node in graph)
    counted = (
        (operators, expected, "attention operators"),
        (nodes, 0 if how.attention == "decomposed" else expected, "attention nodes"),
    )
    return [
        Finding("unfused_attention", "", f"{number} {what}, expected {right}")
        for number, right, what in counted
        if number != right
    ]


def _forward(program: Program) -> list[Call]:
    """The calls of a forward; a commit runs some of them again."""
    return [call for call in program.calls if call.when != "commit"]


def decomposed(exported: ExportedProgram, how: Lowering) -> ExportedProgram:
    """A traced call as PyTorch decomposes it before it translates each node: its values have the
    names that they have in ONNX, where a pass did not remove them."""
    program = _export(exported, how).exported_program
    assert program is not None
    return program


def _export(exported: ExportedProgram, how: Lowering) -> torch.onnx.ONNXProgram:
    linear, gelu = (wide_linear, wide_gelu) if how.wide_bias else (plain_linear, None)
    with quiet("torch.onnx"):
        translated = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,  # with weights that hold no memory the exporter's own optimizer fails
            verbose=False,
            custom_translation_table={
                torch.ops.aten.linear.default: linear,
                torch.ops.wanexport.attention.kind: ATTENTION_FORMS[how.attention],
                torch.ops.wanexport.cached_attention.default: ATTEND[how.cached],
                torch.ops.aten.index_copy.default: write_rows,
                torch.ops.aten.clamp.default: clamp,
                **({torch.ops.aten.gelu.default: gelu} if gelu else {}),
            },
        )
    assert translated is not None
    return translated


def _translate(exported: ExportedProgram, call: Call, how: Lowering) -> ir.Model:
    model = _export(exported, how).model
    _name_ends(model.graph, call)
    for cleanup in _CLEANUPS:
        cleanup(model)
    if how.wide_bias:
        keep_wide(model)
    if how.cached == "lengths":
        use_lengths(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    if how.attention == "mha":  # after the checker, which knows only ONNX's own operators
        use_multi_head_attention(model)
    if how.separate_queries:
        separate_queries(model)
    return model


def _name_ends(graph: ir.Graph, call: Call) -> None:
    """Give inputs and outputs the names that the Program has for them, the first layer's."""
    state = of_layer(call.state, 0)
    inputs = (*of_layer(call.parameters, 0), *call.reads, *state)
    outputs = (*call.writes, *(name + NEXT for name in state))
    for values, names in ((graph.inputs, inputs), (graph.outputs, outputs)):
        for value, name in zip(values, names, strict=True):
            value.name = name


def _folds(node: ir.Node) -> bool | None:
    """Leave tables of the token grid, and the numbers of its tokens, as they are: folded, they
    would grow to the whole grid, and how far would depend on its size. Leave the rounding of a
    number to a low precision: folded, it would be no cast, which retyping to fp32 takes back. None
    leaves the rest to the folder."""
    given = [v.const_value for v in node.inputs if v is not None and v.const_value is not None]
    floats = [value for value in given if value.dtype.is_floating_point()]
    rounds = node.op_type in ("Cast", "CastLike") and bool(floats)
    is_kept = rounds or node.op_type == "Range" or any(len(value.shape) > 1 for value in floats)
    return False if is_kept else None


# Equal tables of two axes stay two: which are equal depends on the size.
_CLEANUPS = (
    partial(optimizer.fold_constants, should_fold=_folds),
    IdentityEliminationPass(),
    CommonSubexpressionEliminationPass(),
    RemoveUnusedNodesPass(),
    RemoveUnusedOpsetsPass(),
    ClearMetadataAndDocStringPass(),
)


def serialize(model: ir.Model) -> bytes:
    """The graph as ONNX bytes; the weights are named in it, not contained."""
    content: bytes = ir.to_proto(model).SerializeToString()
    return content


def node_counts(lowered: Lowered) -> Counter[str]:
    """How many nodes of each operator a forward has."""
    counts: Counter[str] = Counter()
    for call in _forward(lowered.program):
        own = Counter(node.op_type for node in lowered.calls[call.function].graph)
        counts.update({name: number * call.repeat for name, number in own.items()})
    return counts
