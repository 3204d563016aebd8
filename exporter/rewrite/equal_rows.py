"""A product of many equal rows -> a product of a few of them, and copies of its first row.

Wan2.2 and lingbot repeat one timestep for every token before the time MLP. How a row is rounded
depends on how many there are; so as few are kept as are found to be rounded the same.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from wanexport.exporter.lint.program import place
from wanexport.exporter.rewrite.record import EQUAL_ROWS, Left, Rewriting
from wanexport.exporter.rewrite.uniform_axes import rows_of, uniform_axes
from wanexport.exporter.rewrite.writer import Writer, value_of

aten = torch.ops.aten
_KEPT = (1, 8, 64)
_MOST = 1024  # rows of a trial


def rewrite_equal_rows(program: ExportedProgram) -> Rewriting:
    """Rewrite every product whose rows are an expanded one's."""
    axes = uniform_axes(program)
    fired, left = 0, []
    for node in list(program.graph.nodes):
        rows = rows_of(node)
        if rows is None or not axes[node] or not isinstance(rows, Node):
            continue
        reason = _rewrite(node, rows, max(axes[node], key=lambda axis: _size(node, axis)))
        if reason is None:
            fired += 1
        elif reason:
            origin = place(node.meta.get("stack_trace") or "").removeprefix(" at ")
            left.append(Left(EQUAL_ROWS, node.name, reason, origin))
    return Rewriting({EQUAL_ROWS: fired}, tuple(left))


def _size(node: Node, axis: int) -> int:
    value = value_of(node)
    size = value.shape[axis] if value is not None else 0
    return size if isinstance(size, int) else -1


def _rewrite(node: Node, rows: Node, axis: int) -> str | None:
    """Rewrite one product; the reason why it is left, empty where there is nothing to gain."""
    made, count = value_of(node), _size(node, axis)
    few = [kept for kept in _KEPT if kept < count]
    if made is None or node.kwargs or 0 <= count <= _KEPT[0]:
        return ""
    if made.device.type == "meta":
        return "its tensors have no data, so its rounding cannot be tried"
    if count < 0 or not _is_static(node):
        return "its shape is not of numbers"
    if not made.is_contiguous():
        return "its result is not contiguous"
    kept = _fewest(node, rows, axis, count)
    if kept is None:
        shown = ", ".join(map(str, few))
        where = f"on this {made.device.type}"
        return f"products of {shown} rows round otherwise than one of {count}, {where}"
    _replace(node, rows, axis, kept, made)
    return None


def _is_static(node: Node) -> bool:
    values = [value_of(one) for one in (node, *node.all_input_nodes)]
    return all(v is not None and all(isinstance(n, int) for n in v.shape) for v in values)


def _replace(node: Node, rows: Node, axis: int, kept: int, made: Tensor) -> None:
    """Put copies of the first of a few rows in the place of the product."""
    call = Writer(node, node).call
    some = call(aten.slice.Tensor, rows, axis, 0, kept)
    some = call(aten.clone.default, some, memory_format=torch.contiguous_format)
    assert isinstance(node.target, torch._ops.OpOverload)
    product = call(node.target, *(some if one is rows else one for one in node.args))
    row = call(aten.slice.Tensor, product, axis, 0, 1)
    copies = call(aten.expand.default, row, list(made.shape))
    dense = call(aten.clone.default, copies, memory_format=torch.contiguous_format)
    node.replace_all_uses_with(dense)
    node.graph.erase_node(node)


def _fewest(node: Node, rows: Node, axis: int, count: int) -> int | None:
    """As few rows as are rounded like all of them; None where no few are."""
    operands = [value_of(one) if isinstance(one, Node) else None for one in node.args]
    layouts = tuple(
        None if v is None else (v.dtype, tuple(v.shape), tuple(v.stride())) for v in operands
    )
    device = next(v.device for v in operands if v is not None)
    assert isinstance(node.target, torch._ops.OpOverload)
    return _try(node.target, layouts, node.args.index(rows), axis, count, device)


@lru_cache(maxsize=64)
def _try(
    target: torch._ops.OpOverload,
    layouts: tuple[tuple[torch.dtype, tuple[int, ...], tuple[int, ...]] | None, ...],
    place: int,
    axis: int,
    count: int,
    device: torch.device,
) -> int | None:
    generator = torch.Generator(device).manual_seed(0)
    operands = [None if one is None else _random(*one, generator, device) for one in layouts]
    source = operands[place]
    assert source is not None
    row = source.narrow(axis, 0, 1)

    def product(rows: int) -> Tensor:
        shape = list(row.shape)
        shape[axis] = rows
        some = row.expand(shape).contiguous()
        found: Tensor = target(*(some if i == place else one for i, one in enumerate(operands)))
        return found

    every = product(min(count, _MOST))
    first = every.narrow(axis, 0, 1)
    if not torch.equal(every, first.expand_as(every)):
        return None
    few = (n for n in _KEPT if n < count)
    return next((n for n in few if torch.equal(product(n).narrow(axis, 0, 1), first)), None)


def _random(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    generator: torch.Generator,
    device: torch.device,
) -> Tensor:
    length = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides))
    values = torch.randn(length, generator=generator, device=device).to(dtype)
    return values.as_strided(shape, strides)
