"""The bytes that an operator must move, from the shapes that a profiler recorded.

Every element that is read or written counts once; what a stride of 0 repeats is read once.
"""

from math import prod

from wanexport.exporter.trace.event import NODE, Event, Tensor
from wanexport.exporter.trace.kinds import COPIES, ELEMENTWISE, is_pointwise, kind_of

_BYTES = {
    **dict.fromkeys(("double", "long", "long int", "int64", "complex<float>"), 8),
    **dict.fromkeys(("float", "int", "int32", "float32"), 4),
    **dict.fromkeys(("c10::BFloat16", "c10::Half", "short", "short int", "bfloat16", "float16"), 2),
    **dict.fromkeys(("bool", "unsigned char", "signed char", "char", "int8", "uint8"), 1),
    **dict.fromkeys(("c10::Float8_e4m3fn", "c10::Float8_e5m2"), 1),
    "c10::complex<float>": 8,
    "c10::complex<double>": 16,
}
_LIKE_FIRST = {  # whose result is as large as their first tensor
    *("native_layer_norm", "native_group_norm", "_fused_rms_norm", "_softmax", "cumsum"),
}
_BY_OTHERS = {  # which have copy_, fill_ or cat move what they make
    *("to", "_to_copy", "contiguous", "lift_fresh", "zeros", "ones", "full", "zeros_like"),
    *("ones_like", "full_like", "stack", "repeat"),
}
_COMPARING = {"eq", "ne", "lt", "le", "gt", "ge", "isnan", "isinf", "isfinite", "logical_not"}
_REDUCING = {"sum", "mean", "amax", "amin", "var", "prod", "any", "all", "argmax", "argmin"}


def traffic(event: Event) -> int | None:
    """The bytes of an elementwise operator or a copy; None of any other, or where unknown."""
    try:
        if event.name.startswith(NODE):
            return _of_node(event)
        if event.name.startswith("aten::"):
            return _of_operator(event.name.removeprefix("aten::"), event)
    except KeyError:  # a dtype that has no fixed size
        return None
    return None


def _of_node(event: Event) -> int | None:
    if kind_of(event.name) not in (ELEMENTWISE, COPIES) or not event.made:
        return None
    made = sum(map(_size, event.made))
    if event.name in (f"{NODE}Slice", f"{NODE}Gather", f"{NODE}Split", f"{NODE}Expand"):
        return 2 * made  # of what it was given it reads no more than it makes
    return made + sum(_size(tensor) for tensor in event.given if tensor is not None)


def _of_operator(name: str, event: Event) -> int | None:
    given = [tensor for tensor in event.given if tensor is not None and all(tensor.sizes)]
    if name in _BY_OTHERS:
        return 0
    if not given:
        return None
    read = sum(map(_size, given))
    if name == "copy_" and len(given) == 2:
        return read
    if name in ("fill_", "zero_"):
        return _size(given[0])
    if name in ("clone", *_LIKE_FIRST):
        return read + _whole(given[0].sizes, given[0].dtype)
    if name in _REDUCING:
        return read
    if is_pointwise(name) and name not in _REDUCING:
        return read + _pointwise_result(name, given)
    return None


def _pointwise_result(name: str, given: list[Tensor]) -> int:
    """Bytes of the result of tensors that broadcast; in place, it has the first one's dtype."""
    rank = max(len(tensor.sizes) for tensor in given)
    padded = [(1,) * (rank - len(tensor.sizes)) + tensor.sizes for tensor in given]
    sizes = tuple(max(own) for own in zip(*padded))
    if name.rstrip("_") in _COMPARING:
        return prod(sizes)
    wide = [tensor for tensor in given if prod(tensor.sizes) > 1] or given
    dtype = given[0].dtype if name.endswith("_") else max((t.dtype for t in wide), key=_itemsize)
    return _whole(sizes, dtype)


def _itemsize(dtype: str) -> int:
    return _BYTES[dtype]


def _whole(sizes: tuple[int, ...], dtype: str) -> int:
    return prod(sizes) * _itemsize(dtype)


def _size(tensor: Tensor) -> int:
    """Bytes of the elements that a tensor has in memory."""
    strides = tensor.strides or (1,) * len(tensor.sizes)
    own = (size for size, stride in zip(tensor.sizes, strides) if stride or size == 0)
    return prod(own) * _itemsize(tensor.dtype)
