"""A cache of keys and values in ONNX: how a chunk is written into it, and how it is attended to.

ONNX writes nothing in place. A state that is only written by one ScatterND can have its new content
where the old was: a runtime that is given one address for both copies the chunk and nothing else.
TensorRT takes no such address: it is given a graph that gives the new rows alone.
"""

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript import opset23 as op

from wanexport.exporter.backends.onnx.attention import in_products
from wanexport.runtime.program import NEXT, ROWS

SCATTER = "ScatterND"
_HEADS = "q_num_heads"  # an attribute of an Attention to a cache, and of no other
_OPSET_OF_LENGTHS = 24  # whose Attention is told how many keys count


class Becomes(Enum):
    """What a call makes of a state: leaves it, writes it where it lies, gives another tensor, or
    one that it did not even read the state for; or gives only the rows that are new, and reads the
    state or does not."""

    ITSELF = "itself"
    WRITTEN = "written"
    ANOTHER = "another"
    UNREAD = "unread"
    ROWS = "rows"
    ROWS_UNREAD = "rows, unread"

    @property
    def is_read(self) -> bool:
        """Whether the call reads the state."""
        return self not in (Becomes.UNREAD, Becomes.ROWS_UNREAD)

    @property
    def ending(self) -> str:
        """What stands after the state's name in that of the call's result."""
        return ROWS if self in (Becomes.ROWS, Becomes.ROWS_UNREAD) else NEXT


def write_rows(cache: Any, dim: int, index: Any, source: Any) -> Any:
    """index_copy of source [1, R, H, D] into rows of a cache [1, T, H, D], as one ScatterND.

    It reads the cache itself, not a view: only so does a runtime write in place.
    """
    if dim != 1 or int(cache.shape[0]) != 1:
        raise ValueError(f"a cache is [1, T, H, D] and written along axis 1, not {dim}")
    rows = op.Reshape(index, op.Constant(value_ints=[1, -1, 1]))
    firsts = op.Mul(rows, op.Constant(value_ints=[0]))  # of the one entry of the batch
    return op.ScatterND(cache, op.Concat(firsts, rows, axis=-1), source)


def attend_prefix(q: Any, k: Any, v: Any, keys: Any, kind: str) -> Any:
    """Attention to a slice of the cache, copied: ONNX Runtime on a CPU computes the scores of all
    keys that it is given, whatever `nonpad_kv_seqlen` says of them."""
    first, axis = op.Constant(value_ints=[0]), op.Constant(value_ints=[1])
    k, v = (op.Slice(x, first, keys, axis) for x in (k, v))
    out, *_ = op.Attention(*(_flat(x, q) for x in (q, k, v)), **_heads(q))
    return op.Reshape(out, op.Constant(value_ints=_shape(q)))


def attend_masked(q: Any, k: Any, v: Any, keys: Any, kind: str) -> Any:
    """Attention to the whole cache with a mask of its rows: TensorRT's parser takes the lengths of
    opset 24 and drops them. ONNX Runtime, which proves the graph, wants the mask of every query."""
    every = op.Constant(value_ints=[1, 1, int(q.shape[1]), 1])
    mask = op.Expand(_counting(k, keys), every)
    q, k, v = (op.Transpose(x, perm=[0, 2, 1, 3]) for x in (q, k, v))
    out, *_ = op.Attention(q, k, v, mask)
    return op.Transpose(out, perm=[0, 2, 1, 3])


def attend_decomposed(q: Any, k: Any, v: Any, keys: Any, kind: str) -> Any:
    """The same in products and a softmax."""
    return in_products(q, k, v, _counting(k, keys))


def _counting(k: Any, keys: Any) -> Any:
    """Which rows of a cache count: the first `keys`."""
    numbers = op.Range(
        op.Constant(value_int=0), op.Constant(value_int=int(k.shape[1])), op.Constant(value_int=1)
    )
    return op.Less(numbers, keys)


ATTEND: Mapping[str, Any] = MappingProxyType(
    {
        "prefix": attend_prefix,
        "lengths": attend_prefix,
        "mask": attend_masked,
        "decomposed": attend_decomposed,
    }
)


def use_lengths(model: ir.Model) -> int:
    """Give each Attention to a prefix the whole cache, and the number of keys as opset 24 takes it;
    say how many. On a GPU the number stays there, where a slice has the host wait for it."""
    nodes = [n for n in model.graph if n.op_type == "Attention" and _HEADS in n.attributes]
    for node in nodes:
        query, *views = node.inputs
        for view in views:
            assert view is not None
            (reshape, cut) = (view.producer(), _cut_of(view))
            assert reshape is not None
            reshape.replace_input_with(0, cut.inputs[0])
        told = ir.Node(
            "", "Attention", [query, *views, None, None, None, cut.inputs[2]],
            [*node.attributes.values()], num_outputs=1,
        )  # fmt: skip
        out, new = node.outputs[0], told.outputs[0]
        new.type, new.shape, new.name = out.type, out.shape, out.name
        model.graph.insert_after(node, told)
        out.replace_all_uses_with(new)
        model.graph.remove(node, safe=True)
    if nodes:
        model.graph.opset_imports[""] = _OPSET_OF_LENGTHS  # the other operators are the same there
        RemoveUnusedNodesPass()(model)
    return len(nodes)


def _cut_of(view: ir.Value) -> ir.Node:
    """The slice of a cache that a view of it is made of."""
    reshape = view.producer()
    source = reshape.inputs[0] if reshape is not None else None
    cut = source.producer() if source is not None else None
    assert cut is not None and cut.op_type == "Slice"
    return cut


def _flat(x: Any, q: Any) -> Any:
    """[1, S, H, D], with the heads of q, as [1, S, H * D]: a view, where a transpose is a copy."""
    _, _, heads, width = _shape(q)
    return op.Reshape(x, op.Constant(value_ints=[1, -1, heads * width]))


def _heads(q: Any) -> dict[str, int]:
    return {_HEADS: _shape(q)[2], "kv_num_heads": _shape(q)[2]}


def _shape(q: Any) -> list[int]:
    return [int(size) for size in q.shape]


def what_becomes(state: ir.Value, result: ir.Value, *, rows: bool) -> Becomes:
    """What a graph makes of a state that it is given, and gives back as result; with rows only the
    new ones of a state that is written by rows."""
    if _source(result) is state:
        return Becomes.ITSELF
    maker = result.producer()
    uses = list(state.uses())
    if not uses:
        return Becomes.UNREAD
    is_scattered = maker is not None and maker.op_type == SCATTER
    if is_scattered and [(use.node, use.idx) for use in uses] == [(maker, 0)]:
        if not rows:
            return Becomes.WRITTEN
        return Becomes.ROWS if result.uses() else Becomes.ROWS_UNREAD
    return Becomes.ANOTHER


def rows_of(result: ir.Value) -> ir.Value:
    """The new rows in what a state becomes that is written by one ScatterND."""
    maker = result.producer()
    assert maker is not None and maker.op_type == SCATTER
    rows = maker.inputs[2]
    assert rows is not None
    return rows


def _source(value: ir.Value) -> ir.Value:
    """Where a value comes from, through nodes that only name it."""
    while (maker := value.producer()) is not None and maker.op_type == "Identity":
        source = maker.inputs[0]
        assert source is not None
        value = source
    return value
