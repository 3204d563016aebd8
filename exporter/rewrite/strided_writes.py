"""Slices written in place to a buffer -> a stack or a cat of what was written.

`out = empty_like(x)`, `out[..., 0::2] = a`, `out[..., 1::2] = b` become `stack([a, b], -1)` and
`flatten(-2)`.
"""

from collections.abc import Iterator

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from wanexport.exporter.lint.program import place
from wanexport.exporter.rewrite.aliases import (
    is_plain_view,
    may_be_view_of,
    reads_values,
    roots,
    written,
)
from wanexport.exporter.rewrite.assemble import Write, arrange_writes, assemble
from wanexport.exporter.rewrite.cut import CUTS, SELECTS, cut_axis, cut_part
from wanexport.exporter.rewrite.partition import Arrangement, part_of
from wanexport.exporter.rewrite.record import STRIDED_WRITES, Left, Rewriting
from wanexport.exporter.rewrite.writer import Writer, erase_unused, specs_of, value_of

aten = torch.ops.aten
_COPIES = (aten.copy_.default, aten.fill_.Tensor)


def rewrite_strided_writes(program: ExportedProgram) -> Rewriting:
    """Rewrite every buffer that is written by slices which make up all of it, in place."""
    fired, left = 0, []
    for buffer in _buffers(program.graph):
        writes = [_write(node, buffer) for node in _writers(program.graph, buffer)]
        reason = _rewrite(program, buffer, [write for write in writes if write is not None])
        if reason is None:
            fired += 1
        else:
            origin = place(buffer.meta.get("stack_trace") or "")
            left.append(Left(STRIDED_WRITES, buffer.name, reason, origin.removeprefix(" at ")))
    return Rewriting({STRIDED_WRITES: fired}, tuple(left))


def _buffers(graph: Graph) -> list[Node]:
    """What is written by slices, in the order of the first writes."""
    found: dict[Node, None] = {}
    for node in graph.nodes:
        for target in written(node):
            if target.target in CUTS:
                found[_sliced(target)] = None
    return list(found)


def _sliced(view: Node) -> Node:
    """What a slice of a slice is of."""
    while view.target in CUTS:
        view = view.all_input_nodes[0]
    return view


def _writers(graph: Graph, buffer: Node) -> list[Node]:
    """The nodes that write slices of a buffer, in their order."""
    return [
        node
        for node in graph.nodes
        if any(t is not buffer and _sliced(t) is buffer for t in written(node))
    ]


def _rewrite(program: ExportedProgram, buffer: Node, writes: list[Write]) -> str | None:
    """Rewrite one buffer; the reason why it is left."""
    arrangement = _arrangement(program, buffer, writes)
    if isinstance(arrangement, str):
        return arrangement
    value = value_of(buffer)
    assert value is not None
    last = writes[-1].node
    made = assemble(Writer(last, buffer), value, writes, arrangement)
    position = _positions(program.graph)
    later = [user for user in buffer.users if position[user] > position[last]]
    for user in later:
        user.replace_input_with(buffer, made)
    targets = [write.node.all_input_nodes[0] for write in writes]
    erase_unused([write.node for write in reversed(writes)])
    for target in dict.fromkeys(targets):
        while target is not buffer and not target.users:
            source = target.all_input_nodes[0]
            erase_unused([target])
            target = source
    erase_unused([buffer])
    return None


def _arrangement(program: ExportedProgram, buffer: Node, writes: list[Write]) -> Arrangement | str:
    """How the writes make up the buffer, or why the rule does not hold."""
    graph = program.graph
    value = value_of(buffer)
    if buffer.op == "placeholder":
        kind = specs_of(program)[buffer.name].kind.name.lower().replace("_", " ")
        return f"it is a {kind} of the program, and the caller sees what is written to it"
    if value is None or buffer.op != "call_function":
        return "it is no tensor that the program makes"
    if sources := may_be_view_of(buffer):
        return f"it may be a view of {sources[0].name}, by {buffer.target}"
    writers = _writers(graph, buffer)
    if len(writers) > len(writes):
        known = {write.node for write in writes}
        other = next(node for node in writers if node not in known)
        return _not_a_copy(other, buffer)
    found = arrange_writes(value, writes)
    if isinstance(found, str):
        return found
    return _read_between(graph, buffer, writes) or changed_between(graph, writes) or found


def _not_a_copy(node: Node, buffer: Node) -> str:
    if node.target not in _COPIES:
        return f"{node.target} changes a slice of it, which is no copy"
    if len(_cuts(node.all_input_nodes[0], buffer)) > 1:
        return "a slice of a slice of it is written"
    return "the size of the axis, or a bound of the slice, is not a number"


def _cuts(view: Node, buffer: Node) -> list[Node]:
    """The slices that lead from a view to the buffer, without those that cut nothing off."""
    found = []
    while view is not buffer:
        source = view.all_input_nodes[0]
        made, whole = value_of(view), value_of(source)
        if (
            made is None
            or whole is None
            or list(map(str, made.shape)) != list(map(str, whole.shape))
        ):
            found.append(view)
        view = source
    return found


def _write(node: Node, buffer: Node) -> Write | None:
    """The write of a slice or an index of one axis; None for any other."""
    value = value_of(buffer)
    if node.target not in _COPIES or value is None:
        return None
    cuts, source = _cuts(node.all_input_nodes[0], buffer), node.args[1]
    if not isinstance(source, Node):
        return None
    if len(cuts) != 1:
        is_whole = not cuts and value.dim() and isinstance(value.shape[0], int)
        return Write(node, source, 0, part_of(value.shape[0], 0, None, 1)) if is_whole else None
    axis = cut_axis(cuts[0], value.dim())
    part = cut_part(cuts[0], value.shape[axis])
    if part is None:
        return None
    return Write(node, source, axis, part, cuts[0].target in SELECTS)


def _positions(graph: Graph) -> dict[Node, int]:
    return {node: i for i, node in enumerate(graph.nodes)}


def _read_between(graph: Graph, buffer: Node, writes: list[Write]) -> str | None:
    """Why the buffer cannot be made at the last write: what sees it half written, or a view."""
    position = _positions(graph)
    first, last = position[writes[0].node], position[writes[-1].node]
    own = {write.node for write in writes}
    stale: dict[Node, bool] = {buffer: False}  # each view of it: was it taken before the end
    for node in graph.nodes:
        if node.op == "placeholder" or position[node] <= position[buffer]:
            continue
        used = [source for source in node.all_input_nodes if source in stale]
        if not used:
            continue
        if node in own:  # its first argument is the slice; the value that it reads is the second
            if writes[0].node is not node and any(s in stale for s in node.all_input_nodes[1:]):
                return f"{node.name} reads it between its writes"
            stale[node] = True
            continue
        is_view = any(source in stale for source in may_be_view_of(node))
        if is_view:
            stale[node] = position[node] < last or any(stale[source] for source in used)
        if (is_view and is_plain_view(node)) or not reads_values(node):
            continue
        if first < position[node] < last:
            return f"{node.name} reads it between its writes"
        if position[node] > last and any(stale[source] for source in used if source is not buffer):
            return f"{node.name} reads a view of it that was taken before its last write"
    return None


def changed_between(graph: Graph, writes: list[Write]) -> str | None:
    """Why a value that was written is another one at the last write."""
    position = _positions(graph)
    own = {write.node for write in writes}
    for node in _between(graph, position[writes[0].node], position[writes[-1].node]):
        if node in own:
            continue
        changed = {root for target in written(node) for root in roots(target)}
        for write in writes:
            if position[write.node] < position[node] and changed & roots(write.value):
                return f"{node.name} changes {write.value.name} after it is written"
    return None


def _between(graph: Graph, first: int, last: int) -> Iterator[Node]:
    return (node for i, node in enumerate(graph.nodes) if first < i < last)
