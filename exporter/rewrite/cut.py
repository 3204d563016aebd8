"""The part of an axis that a slice, a select or their scatters name."""

from typing import Any

import torch
from torch.fx import Node

from wanexport.exporter.rewrite.partition import Part, part_of

aten = torch.ops.aten
_FIRST = {  # the position of an operator's dim; its bounds follow
    aten.slice.Tensor: 1,
    aten.select.int: 1,
    aten.narrow.default: 1,
    aten.slice_scatter.default: 2,
    aten.select_scatter.default: 2,
}
CUTS = (aten.slice.Tensor, aten.select.int, aten.narrow.default)
SCATTERS = (aten.slice_scatter.default, aten.select_scatter.default)
SELECTS = (aten.select.int, aten.select_scatter.default)


def argument(node: Node, index: int, name: str, default: Any) -> Any:
    """An argument of a call by its position or name."""
    return node.args[index] if index < len(node.args) else node.kwargs.get(name, default)


def cut_axis(node: Node, rank: int) -> int:
    """The axis that is cut, counted from the front."""
    return int(argument(node, _FIRST[node.target], "dim", 0)) % rank  # type: ignore[index]


def cut_part(node: Node, size: Any) -> Part | None:
    """The indices that are cut out of an axis of this size; None where they are no numbers."""
    first = _FIRST[node.target]  # type: ignore[index]
    if node.target in SELECTS:
        start = argument(node, first + 1, "index", None)
        end, step = (None if start == -1 else start + 1, 1) if isinstance(start, int) else (0, 1)
    elif node.target is aten.narrow.default:
        start, length = argument(node, 2, "start", 0), argument(node, 3, "length", 0)
        if not all(isinstance(n, int) for n in (size, start, length)):
            return None
        start %= size or 1
        end, step = start + length, 1
    else:
        start = argument(node, first + 1, "start", None)
        end, step = argument(node, first + 2, "end", None), argument(node, first + 3, "step", 1)
    if not all(isinstance(n, int) for n in (size, step, start or 0, end or 0)):
        return None
    return part_of(size, start, end, step)
