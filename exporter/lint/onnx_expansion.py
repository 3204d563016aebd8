"""How large an ONNX model is once its functions are written out, told before they are."""

from collections.abc import Iterable, Iterator, Mapping

import onnx

from wanexport.runtime.errors import WanExportError

_MOST_NODES = 1_000_000  # a model of 40 blocks has 10,000
_Key = tuple[str, str]  # domain and name


def check_expansion(model: onnx.ModelProto) -> None:
    """Raise WanExportError when functions that call functions make more nodes than a model has."""
    functions = {(f.domain, f.name): f for f in model.functions}
    sizes: dict[_Key, int] = {}
    calls = {key: [_key(node) for node in _nodes(f.node)] for key, f in functions.items()}
    for key in functions:
        _measure(key, calls, sizes)
    total = sum(sizes.get(_key(node), 1) for node in _nodes(model.graph.node))
    if total > _MOST_NODES:
        raise WanExportError("its functions call one another to more nodes than a model has")


def _measure(first: _Key, calls: Mapping[_Key, list[_Key]], sizes: dict[_Key, int]) -> None:
    """Add the nodes of a function, and of those that it calls, to sizes."""
    if first in sizes:
        return
    open_calls, stack = {first}, [(first, iter(calls[first]))]
    while stack:
        key, left = stack[-1]  # each call is looked at once
        missing = next((c for c in left if c in calls and c not in sizes), None)
        if missing in open_calls:
            raise WanExportError(f"its function {missing[1]} calls itself")
        if missing is not None:
            open_calls.add(missing)
            stack.append((missing, iter(calls[missing])))
        else:
            sizes[key] = min(_MOST_NODES + 1, sum(sizes.get(c, 1) for c in calls[key]))
            open_calls.discard(key)
            stack.pop()


def _key(node: onnx.NodeProto) -> _Key:
    return node.domain, node.op_type


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes, and those of the graphs inside them."""
    pending = [nodes]
    while pending:
        for node in pending.pop():
            yield node
            for attribute in node.attribute:
                pending += [graph.node for graph in (attribute.g, *attribute.graphs)]
