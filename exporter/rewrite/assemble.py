"""A tensor put together from the slices that were written to it: stack and flatten, or cat."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from wanexport.exporter.rewrite.partition import Arrangement, Part, arrange
from wanexport.exporter.rewrite.writer import Writer, value_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Write:
    """A value written to a part of one axis; with is_select that axis is not in the value."""

    node: Node
    value: Node
    axis: int
    part: Part
    is_select: bool = False


def arrange_writes(buffer: Tensor, writes: Sequence[Write]) -> Arrangement | str:
    """How the writes make up the buffer, or why they do not."""
    axes = sorted({write.axis for write in writes})
    if len(axes) > 1:
        return f"parts of axes {', '.join(map(str, axes))} are written, not of one"
    if _memory_order(buffer) is None:
        return "its memory has gaps or overlaps, as no new tensor's has"
    for write in writes:
        value = value_of(write.value)
        if value is None:
            return "what is written has no type"
        if value.device != buffer.device:
            return f"a tensor on {value.device} is written to one on {buffer.device}"
        shape = _shape(buffer, write)
        is_dynamic = any(isinstance(size, torch.SymInt) for size in shape)
        if is_dynamic and not _is_shape(value, shape):
            return "a value is broadcast to a size that is not a number"
    return arrange(int(buffer.shape[axes[0]]), [write.part for write in writes])


def assemble(
    writer: Writer, buffer: Tensor, writes: Sequence[Write], arrangement: Arrangement
) -> Node:
    """What the buffer holds after the writes, in its type and with its strides."""
    order = _memory_order(buffer)
    assert order is not None  # `arrange_writes` has seen to it
    axis = order.index(writes[0].axis)
    is_permuted = order != sorted(order)
    pieces = [_piece(writer, buffer, writes[i]) for i in arrangement.order]
    if is_permuted:
        pieces = [writer.call(aten.permute.default, piece, order) for piece in pieces]
    if arrangement.is_stack:
        made = writer.call(aten.stack.default, pieces, axis + 1)
        made = writer.call(aten.flatten.using_ints, _dense(writer, made), axis, axis + 1)
    else:
        made = _dense(writer, writer.call(aten.cat.default, pieces, axis))
    if is_permuted:
        back = [order.index(i) for i in range(len(order))]
        made = writer.call(aten.permute.default, made, back)
    return made


def _piece(writer: Writer, buffer: Tensor, write: Write) -> Node:
    """The value as the buffer takes it: rounded to its type, and broadcast."""
    value = write.value
    given = value_of(value)
    assert given is not None
    if given.dtype != buffer.dtype:
        value = writer.call(aten._to_copy.default, value, dtype=buffer.dtype)
    shape = _shape(buffer, write)
    if not _is_shape(given, shape):
        value = writer.call(aten.expand.default, value, shape)
    if write.is_select:
        value = writer.call(aten.unsqueeze.default, value, write.axis)
    return value


def _shape(buffer: Tensor, write: Write) -> list[int | torch.SymInt]:
    """The shape of the part that is written."""
    shape: list[int | torch.SymInt] = list(buffer.shape)
    shape[write.axis : write.axis + 1] = [] if write.is_select else [len(write.part.indices)]
    return shape


def _is_shape(value: Tensor, shape: Sequence[int | torch.SymInt]) -> bool:
    """Whether the value needs no broadcast; sizes that are not numbers are compared as written."""
    return list(map(str, value.shape)) == list(map(str, shape))


def _dense(writer: Writer, node: Node) -> Node:
    """The node, contiguous: `cat` keeps a layout that its pieces share."""
    value = value_of(node)
    assert value is not None
    if value.is_contiguous():
        return node
    return writer.call(aten.clone.default, node, memory_format=torch.contiguous_format)


def _memory_order(value: Tensor) -> list[int] | None:
    """The axes from the slowest to the fastest in memory; None when memory has gaps."""
    sizes, strides = [_hint(n) for n in value.shape], [_hint(n) for n in value.stride()]
    order = sorted(range(value.dim()), key=lambda i: -strides[i])
    # An axis of one element may have any stride: it stays where it is among the others.
    long = [i for i in order if sizes[i] != 1]
    step = 1
    for i in reversed(long):
        if strides[i] != step:
            return None
        step *= sizes[i]
    turns = iter(long)
    return [i if sizes[i] == 1 else next(turns) for i in range(value.dim())]


def _hint(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else int(size.node.hint)
