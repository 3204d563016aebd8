"""The floating-point operations of an operator, from the shapes that a profiler recorded.

A multiply-add counts two. Shapes that do not say are no number, and never a guess.
"""

import json
from collections.abc import Callable, Sequence
from math import prod

from wanexport.exporter.trace.event import NODE, Event

_CAUSAL = {  # where in the arguments of PyTorch's attention it says that half of it is masked
    "aten::scaled_dot_product_attention": 5,
    "aten::_scaled_dot_product_flash_attention": 4,
    "aten::_scaled_dot_product_flash_attention_for_cpu": 4,
    "aten::_scaled_dot_product_efficient_attention": 6,
    "aten::_scaled_dot_product_cudnn_attention": 6,
}


def flops(event: Event) -> int | None:
    """The FLOPs of a product or of attention; None of any other operator, or where unknown."""
    formula = _FORMULAS.get(event.name)
    try:
        return None if formula is None else formula(event)
    except (IndexError, ValueError, TypeError, ZeroDivisionError):  # shapes of another signature
        return None


def _tensor(event: Event, index: int) -> tuple[int, ...]:
    """The sizes of an argument. Raises IndexError when it is no tensor."""
    given = event.given[index]
    if given is None:
        raise IndexError(index)
    return given.sizes


def _product(first: int) -> Callable[[Event], int]:
    """Of two matrices, or batches of them, of which the argument at first is the left one."""

    def count(event: Event) -> int:
        left, right = _tensor(event, first), _tensor(event, first + 1)
        if len(left) < 2 or len(right) < 2 or left[-1] != right[-2]:
            raise ValueError("no matrices")
        batch = max(left[:-2], right[:-2], key=prod)
        return 2 * prod(batch) * left[-2] * left[-1] * right[-1]

    return count


def _linear(event: Event) -> int:
    x, weight = _tensor(event, 0), _tensor(event, 1)
    return 2 * prod(x) * weight[0]


def _scaled_product(event: Event) -> int:
    q, k, v = (_tensor(event, index) for index in range(3))
    count = 2 * prod(q) * k[-2] + 2 * prod(q[:-1]) * k[-2] * v[-1]
    at = _CAUSAL[event.name]
    is_causal = len(event.values) > at and event.values[at] == "True"
    return count // 2 if is_causal else count


def _convolution(event: Event) -> int:
    """Of aten::convolution(x, weight, bias, stride, padding, dilation, transposed, ...)."""
    x, weight = _tensor(event, 0), _tensor(event, 1)
    if event.values[6] not in ("False", "0"):
        raise ValueError("transposed")
    places = len(weight) - 2
    stride, padding, dilation = (_numbers(event.values[index], places) for index in (3, 4, 5))
    sizes = zip(x[2:], weight[2:], stride, padding, dilation)
    made = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
    return 2 * x[0] * prod(made) * prod(weight)


def _numbers(text: str, count: int) -> Sequence[int]:
    numbers: list[int] = json.loads(text)
    return numbers * count if len(numbers) == 1 else numbers


def _node_product(event: Event) -> int:
    """Of ONNX's MatMul and Gemm, whichever way round their matrices are stored."""
    (out,), left = event.made[:1], _tensor(event, 0)
    return 2 * prod(out.sizes) * (prod(left) // prod(out.sizes[:-1]))


def _node_attention(event: Event) -> int:
    """Of [B, H, S, D], or of [B, S, H x D]: the same number."""
    q, k, v = (_tensor(event, index) for index in range(3))
    return 2 * prod(q) * k[-2] + 2 * prod(q[:-1]) * k[-2] * v[-1]


_FORMULAS: dict[str, Callable[[Event], int]] = {
    "aten::mm": _product(0),
    "aten::bmm": _product(0),
    "aten::addmm": _product(1),
    "aten::baddbmm": _product(1),
    "aten::_scaled_mm": _product(0),
    "aten::linear": _linear,
    "aten::convolution": _convolution,
    **{name: _scaled_product for name in _CAUSAL},
    f"{NODE}MatMul": _node_product,
    f"{NODE}Gemm": _node_product,
    f"{NODE}Attention": _node_attention,
    f"{NODE}MultiHeadAttention": _node_attention,
}


def dtype_of_products(events: Sequence[Event]) -> str | None:
    """The fastest precision that products have, as the rate of a machine is measured: `bf16`.

    None of no product, and where one has a precision whose rate is not measured.
    """
    counted = (event for event in events if event.name in _FORMULAS)
    tensors = {tensor.dtype for event in counted for tensor in event.given if tensor is not None}
    found = {_PRECISIONS.get(dtype) for dtype in tensors}
    if None in found:
        return None
    return next((dtype for dtype in ("bf16", "fp16", "fp32") if dtype in found), None)


_PRECISIONS = {"c10::BFloat16": "bf16", "c10::Half": "fp16", "float": "fp32"}
