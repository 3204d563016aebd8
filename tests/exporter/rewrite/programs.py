"""Functions as exported programs, and what a rewriting makes of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from wanexport.exporter.rewrite.bits import differing
from wanexport.exporter.rewrite.record import Rewriting
from wanexport.exporter.rewrite.rewrite import rewrite

FORMS = ("exported", "decomposed")
Function = Callable[..., Any]


class Wrapped(nn.Module):
    """A function as a module, with a buffer and a table that is none."""

    def __init__(self, function: Function, table: Tensor | None = None) -> None:
        super().__init__()
        self.function = function
        self.table = table
        self.register_buffer("state", torch.zeros(2, 4, 6))

    def forward(self, *args: Tensor) -> Any:
        return self.function(self, *args)


def exported(
    function: Function, *args: Tensor, form: str = "exported", table: Tensor | None = None
) -> ExportedProgram:
    """The program of `function(module, *args)`, as exported or without mutation."""
    with torch.no_grad():
        program = torch.export.export(Wrapped(function, table), args)
        return program if form == "exported" else program.run_decompositions()


def rewritten(
    function: Function, *args: Tensor, form: str = "exported", table: Tensor | None = None
) -> tuple[Rewriting, ExportedProgram]:
    """Rewrite the program, and require that each result has the same bits and strides."""
    program = exported(function, *args, form=form, table=table)
    before = run(program, *args)
    found = rewrite(program)
    after = run(program, *args)
    assert differing(before, after) is None
    one, other = (pytree.tree_leaves(result) for result in (before, after))
    assert [value.stride() for value in one] == [value.stride() for value in other]
    return found, program


def run(program: ExportedProgram, *args: Tensor) -> Any:
    """The result; inputs and buffers stay as they are."""
    stored = {name: value.clone() for name, value in program.named_buffers()}
    result = program.module()(*(one.clone() for one in args))
    for name, value in program.named_buffers():
        value.copy_(stored[name])
    return result


def reasons(found: Rewriting) -> str:
    """All reasons in one text."""
    return "; ".join(left.reason for left in found.left)


def operators(program: ExportedProgram) -> list[str]:
    """The names of the operators that the program calls."""
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
