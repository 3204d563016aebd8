"""The ONNX graphs that plans are built of, and proven by where no GPU runs them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import onnx_ir

from wanexport.exporter.backends.backend import Request
from wanexport.exporter.backends.onnx.assemble import assemble
from wanexport.exporter.backends.onnx.lower import (
    Lowered,
    Lowering,
    for_tensorrt,
    lower,
    serialize,
)
from wanexport.exporter.lint import tensorrt as tensorrt_lint
from wanexport.exporter.lint.onnx_graph import ATTENTION
from wanexport.runtime.bundle.signature import weights_layout
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.wan_config import WanConfig

_OF_ATTENTION = (*ATTENTION, "Softmax")


@dataclass(frozen=True)
class Graphs:
    """ONNX graphs by the calls of the whole Program, how many attentions each has, and lint."""

    content: Mapping[str, bytes]
    attentions: Mapping[str, int]
    lint: dict[str, int]


def lowering(request: Request) -> Lowering:
    """How the graphs of a request are lowered."""
    assert request.attention is not None
    return for_tensorrt(request.dtype, request.attention)


def what_is_lowered(request: Request) -> tuple[str, WanConfig, Geometry, Lowering, bool]:
    """What decides the graphs of plans, which are the same for all targets."""
    return request.graph, request.config, request.geometry, lowering(request), not request.bakes


@lru_cache(maxsize=2)  # one as inputs for every target's plan, one with initializers to bake
def lowered_graphs(
    graph: str, config: WanConfig, geometry: Geometry, how: Lowering, as_inputs: bool
) -> Graphs:
    """The graphs of these. Raises RuntimeError when one is not clean."""
    _, entries = weights_layout(config, how.dtype)
    lowered = lower(graph, config, geometry, how)
    content, attentions = {}, {}
    for call in lowered.program.whole().calls:
        whole = assemble(lowered, entries, call.when, as_inputs=as_inputs)
        findings = tensorrt_lint.lint_tensorrt(onnx_ir.to_proto(whole))
        if findings:
            raise RuntimeError(f"TensorRT takes no such graph: {findings[0]}")
        content[call.name] = serialize(whole)
        attentions[call.name] = _attentions(lowered, call.when)
    return Graphs(content, attentions, {**lowered.lint, tensorrt_lint.KIND: 0})


def _attentions(lowered: Lowered, moment: str) -> int:
    """How many attentions the graph of a moment has, be they products and a softmax."""
    return sum(
        call.repeat * sum(n.op_type in _OF_ATTENTION for n in lowered.calls[call.function].graph)
        for call in lowered.program.calls
        if call.when == moment
    )
