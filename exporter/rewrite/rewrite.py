"""Rewrite an exported program in place, and say what was done."""

from collections.abc import Callable

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from wanexport.exporter.lint.program import kinds_of_operator, operator_name, place
from wanexport.exporter.rewrite.complex_products import rewrite_complex_products
from wanexport.exporter.rewrite.cut import CUTS, SCATTERS
from wanexport.exporter.rewrite.equal_rows import rewrite_equal_rows
from wanexport.exporter.rewrite.record import (
    COMPLEX_PRODUCTS,
    EQUAL_ROWS,
    STRIDED_WRITES,
    Left,
    Rewriting,
    total,
)
from wanexport.exporter.rewrite.scatters import rewrite_scatters
from wanexport.exporter.rewrite.strided_writes import rewrite_strided_writes
from wanexport.exporter.rewrite.writer import finish

_Rule = Callable[[ExportedProgram], Rewriting]
_PASSES: dict[str, tuple[_Rule, ...]] = {
    STRIDED_WRITES: (rewrite_strided_writes, rewrite_scatters),
    COMPLEX_PRODUCTS: (rewrite_complex_products,),
    EQUAL_ROWS: (rewrite_equal_rows,),
}


def rewrite(program: ExportedProgram) -> Rewriting:
    """Apply every rule to the program, in place; the counts, and the reasons of what was left.

    The program may be as `torch.export.export` makes it, or decomposed. Parameters and buffers are
    shared with what it was exported from. Branches and bodies of control flow are left.
    """
    return total([apply(program, rule) for rule in _PASSES] + [unknown_writes(program)])


def apply(program: ExportedProgram, rule: str) -> Rewriting:
    """Apply one rule of RULES to the program, in place."""
    with torch.no_grad():
        done = total([run(program) for run in _PASSES[rule]], _PASSES)
        if done.counts[rule]:
            finish(program)
    return done


def unknown_writes(program: ExportedProgram) -> Rewriting:
    """What is written in ways that no rule knows, and what control flow holds."""
    left = []
    for name, module in program.graph_module.named_modules():
        if not isinstance(module, GraphModule):
            continue
        for node in module.graph.nodes:
            operator = operator_name(node)
            if "strided_write" not in kinds_of_operator(operator):
                continue
            origin = place(node.meta.get("stack_trace") or "").removeprefix(" at ")
            if name:
                reason = f"it is inside control flow ({name}), which is left alone"
                left.append(Left(STRIDED_WRITES, node.name, reason, origin))
            elif not _is_known(node, operator):
                reason = f"{operator} writes it: slices and indices of one axis are rewritten"
                left.append(Left(STRIDED_WRITES, node.name, reason, origin))
    return Rewriting({}, tuple(left))


def _is_known(node: Node, operator: str) -> bool:
    """Whether a rule saw the write: a scatter, or a copy to a slice."""
    if operator == "aten.copy_":
        return node.all_input_nodes[0].target in CUTS
    if operator == "aten.copy":
        return any(user.target in SCATTERS for user in node.users)
    return node.target in SCATTERS
