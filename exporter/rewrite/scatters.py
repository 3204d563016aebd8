"""Slices scattered into a tensor, one after the other -> a stack or a cat of what was scattered.

This is what strided writes become in a program without mutation (`run_decompositions`).
"""

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from wanexport.exporter.lint.program import place
from wanexport.exporter.rewrite.assemble import Write, arrange_writes, assemble
from wanexport.exporter.rewrite.cut import SCATTERS, SELECTS, argument, cut_axis, cut_part
from wanexport.exporter.rewrite.partition import Arrangement
from wanexport.exporter.rewrite.record import STRIDED_WRITES, Left, Rewriting
from wanexport.exporter.rewrite.strided_writes import changed_between
from wanexport.exporter.rewrite.writer import Writer, erase_unused, value_of

aten = torch.ops.aten


def rewrite_scatters(program: ExportedProgram) -> Rewriting:
    """Rewrite every chain of scatters that make up all of a tensor."""
    fired, left, seen = 0, [], set[Node]()
    scatters = [node for node in program.graph.nodes if node.target in SCATTERS]
    for last in reversed(scatters):
        if last in seen or last._erased:
            continue
        chain = _chain(last)
        seen.update(chain)
        reason = _rewrite(program, chain)
        if reason is None:
            fired += 1
        else:
            origin = place(last.meta.get("stack_trace") or "").removeprefix(" at ")
            left.append(Left(STRIDED_WRITES, last.name, reason, origin))
    return Rewriting({STRIDED_WRITES: fired}, tuple(reversed(left)))


def _chain(last: Node) -> list[Node]:
    """The scatters that end in this one, in order, back to where its writes cover the tensor."""
    found, covered = [last], _indices(last)
    while (base := found[0].args[0]) and isinstance(base, Node) and base.target in SCATTERS:
        size = value_of(last)
        if size is not None and len(covered) >= size.shape[cut_axis(last, size.dim())]:
            break
        found.insert(0, base)
        covered |= _indices(base)
    return found


def _indices(scatter: Node) -> set[int]:
    write = _write(scatter)
    return set() if write is None else set(write.part.indices)


def _rewrite(program: ExportedProgram, chain: list[Node]) -> str | None:
    """Put the assembled tensor in the place of a chain; the reason why it is left."""
    arrangement = _arrangement(program, chain)
    if isinstance(arrangement, str):
        return arrangement
    last, writes = chain[-1], [_write(node) for node in chain]
    value = value_of(last)
    assert value is not None
    known = [write for write in writes if write is not None]
    made = assemble(Writer(last, last), value, known, arrangement)
    last.replace_all_uses_with(made)
    _erase(chain)
    return None


def _arrangement(program: ExportedProgram, chain: list[Node]) -> Arrangement | str:
    """How the scatters make up their tensor, or why the rule does not hold."""
    last = chain[-1]
    signature, value = program.graph_signature, value_of(last)
    mutated = {
        **signature.buffers_to_mutate,
        **signature.parameters_to_mutate,
        **signature.user_inputs_to_mutate,
    }
    if last.name in mutated:
        return f"it becomes {mutated[last.name]}, and the caller sees what is written to it"
    if value is None:
        return "it has no type"
    writes = [write for node in chain if (write := _write(node)) is not None]
    if len(writes) < len(chain):
        return "the size of the axis, or a bound of the slice, is not a number"
    for node in chain[:-1]:
        for user in node.users:
            if user not in chain and not _is_target_of_copy(user):
                return f"{user.name} reads it between its writes"
    return changed_between(last.graph, writes) or arrange_writes(value, writes)


def _write(scatter: Node) -> Write | None:
    value = value_of(scatter)
    source = scatter.args[1]
    if value is None or not isinstance(source, Node):
        return None
    axis = cut_axis(scatter, value.dim())
    part = cut_part(scatter, value.shape[axis])
    if part is None:
        return None
    if source.target is aten.copy.default:
        source = argument(source, 1, "src", None)
    return Write(scatter, source, axis, part, scatter.target in SELECTS)


def _is_target_of_copy(node: Node) -> bool:
    """Whether a node is a slice that only says what type and shape a copy has."""
    is_view = node.target in (aten.slice.Tensor, aten.select.int)
    return is_view and all(_copies_to(user, node) for user in node.users)


def _copies_to(user: Node, view: Node) -> bool:
    return user.target is aten.copy.default and user.args[0] is view and user.args[1] is not view


def _erase(chain: list[Node]) -> None:
    """Erase the scatters of a chain, and what only they used of the slices that they copied to."""
    base: Any = chain[0].args[0]
    for node in reversed(chain):
        for user in list(node.users):
            erase_unused([user])  # a slice that nothing uses any more
        source: Any = node.args[1]
        erase_unused([node])
        if source.target is aten.copy.default and not source.users:
            view = source.args[0]
            erase_unused([source])
            erase_unused([view])
    if base.op == "call_function":
        erase_unused([base])
