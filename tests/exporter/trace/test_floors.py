"""FLOPs and bytes of operators: PyTorch's own counter and plain arithmetic are the oracles."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.exporter.trace.traces import floats, op
from wanexport.exporter.trace.capture import capture
from wanexport.exporter.trace.chrome import events_of
from wanexport.exporter.trace.event import Tensor
from wanexport.exporter.trace.flops import dtype_of_products, flops
from wanexport.exporter.trace.steps import steps_of
from wanexport.exporter.trace.traffic import traffic
from wanexport.exporter.trace.work import work_of

X = torch.randn(3, 5, 8)
VIDEO, KERNEL = torch.randn(2, 4, 5, 6, 7), torch.randn(8, 2, 1, 2, 3)
QUERY, KEY = torch.randn(2, 3, 5, 16), torch.randn(2, 3, 7, 16)
PRODUCTS: dict[str, Callable[[], object]] = {
    "matmul": lambda: X[0] @ X[0].T,
    "batches": lambda: X @ X.mT,
    "linear": lambda: F.linear(X, torch.randn(9, 8), torch.randn(9)),
    "addmm": lambda: torch.addmm(torch.randn(9), X[0], torch.randn(8, 9)),
    "baddbmm": lambda: torch.baddbmm(torch.randn(3, 5, 5), X, X.mT),
    "convolution": lambda: F.conv3d(
        VIDEO, KERNEL, stride=(1, 2, 3), padding=(0, 1, 2), dilation=(1, 2, 1), groups=2
    ),
    "several": lambda: (F.linear(X, torch.randn(4, 8)) @ torch.randn(4, 6), X @ X.mT),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_flops_of_products_are_those_of_pytorchs_counter(name: str) -> None:
    run = PRODUCTS[name]
    with FlopCounterMode(display=False) as counter:
        run()
    work = work_of(steps_of(events_of(capture(run, 1, on_gpu=False))))
    assert sum(item.flops or 0 for item in work) == counter.get_total_flops() > 0
    assert all(item.flops is not None for item in work if item.kind == "products")


def test_flops_of_attention_are_those_of_its_two_products() -> None:
    def found(is_causal: bool) -> int:
        run = lambda: F.scaled_dot_product_attention(  # noqa: E731
            QUERY, QUERY if is_causal else KEY, QUERY if is_causal else KEY, is_causal=is_causal
        )
        work = work_of(steps_of(events_of(capture(run, 1, on_gpu=False))))
        return sum(item.flops or 0 for item in work if item.kind == "attention")

    assert found(is_causal=False) == 2 * 2 * (2 * 3) * 5 * 7 * 16
    assert found(is_causal=True) == 2 * (2 * 3) * 5 * 5 * 16  # half of it is masked


def test_flops_of_nodes() -> None:
    made = (floats(2, 5, 4),)
    matmul = op("onnx::MatMul", 0, 1, given=(floats(2, 5, 8), floats(8, 4)), made=made)
    assert flops(matmul) == 2 * 2 * 5 * 8 * 4
    gemm = op("onnx::Gemm", 0, 1, given=(floats(8, 5), floats(8, 4)), made=(floats(5, 4),))
    assert flops(gemm) == 2 * 5 * 8 * 4  # transposed: 8 is what is summed over
    heads = tuple(floats(1, 3, tokens, 16) for tokens in (5, 7, 7))
    joined = tuple(floats(1, tokens, 48) for tokens in (5, 7, 7))
    for given in (heads, joined):
        attention = op("onnx::Attention", 0, 1, given=given, made=(floats(1, 5, 48),))
        assert flops(attention) == 4 * 3 * 5 * 7 * 16


@pytest.mark.parametrize(
    "event",
    [
        op("aten::add", 0, 1, given=(floats(4), floats(4))),
        op("aten::mm", 0, 1),
        op("aten::mm", 0, 1, given=(floats(4, 5), floats(4, 5))),
        op("aten::mm", 0, 1, given=(None, floats(4, 5))),
        op("aten::convolution", 0, 1, given=(floats(1, 2, 3), floats(4, 2, 3))),
        op("onnx::MatMul", 0, 1, given=(floats(4, 5), floats(5, 4))),
        op("my::product", 0, 1, given=(floats(4, 5), floats(5, 4))),
    ],
)
def test_where_shapes_do_not_tell_flops_are_unknown(event: object) -> None:
    assert flops(event) is None  # type: ignore[arg-type]


def test_the_rate_is_that_of_the_fastest_precision_of_products() -> None:
    def found(*dtypes: str) -> str | None:
        events = [op("aten::mm", 0, 1, given=(Tensor(dtype, (2, 2)),)) for dtype in dtypes]
        return dtype_of_products([*events, op("aten::add", 0, 1, given=(Tensor("double", (1,)),))])

    assert found("float") == "fp32"
    assert found("float", "c10::BFloat16") == "bf16"
    assert found("c10::Half") == "fp16"
    assert found("float", "c10::Float8_e4m3fn") is None
    assert found("double") is None
    assert found() is None


BF16 = "c10::BFloat16"
BYTES = {
    "add": (op("aten::add", 0, 1, given=(floats(4, 8), floats(8))), 4 * (32 + 8 + 32)),
    "mixed": (op("aten::mul", 0, 1, given=(Tensor(BF16, (32,)), floats(32))), 32 * (2 + 4 + 4)),
    "in place": (op("aten::add_", 0, 1, given=(Tensor(BF16, (32,)), floats(32))), 32 * (2 + 4 + 2)),
    "scalar": (
        op("aten::mul", 0, 1, given=(Tensor(BF16, (32,)), Tensor("double", ()))),
        32 * 4 + 8,
    ),
    "unary": (op("aten::gelu", 0, 1, given=(floats(4, 8), None)), 2 * 4 * 32),
    "compare": (op("aten::gt", 0, 1, given=(floats(32), None)), 32 * 5),
    "expanded": (
        op("aten::mul", 0, 1, given=(floats(4, 8, strides=(8, 1)), floats(4, 8, strides=(0, 1)))),
        4 * (32 + 8 + 32),
    ),
    "norm": (
        op("aten::native_layer_norm", 0, 1, given=(floats(4, 8), None, floats(8), floats(8))),
        4 * (32 + 8 + 8 + 32),
    ),
    "sum": (op("aten::sum", 0, 1, given=(floats(4, 8), None)), 4 * 32),
    "copy": (op("aten::copy_", 0, 1, given=(Tensor(BF16, (32,)), floats(32), None)), 32 * 6),
    "fill": (op("aten::fill_", 0, 1, given=(floats(32), None)), 32 * 4),
    "to": (op("aten::to", 0, 1, given=(floats(32), None)), 0),
    "list": (op("aten::cat", 0, 1, given=(Tensor("", (32,)), Tensor("", (32,)))), None),
    "unknown": (op("aten::topk", 0, 1, given=(floats(32),)), None),
    "strange": (op("aten::add", 0, 1, given=(Tensor("c10::Strange", (32,)),)), None),
    "foreign": (op("my::add", 0, 1, given=(floats(32),)), None),
    "node": (op("onnx::Add", 0, 1, given=(floats(4, 8), floats(8)), made=(floats(4, 8),)), 4 * 72),
    "slice": (op("onnx::Slice", 0, 1, given=(floats(400),), made=(floats(4),)), 2 * 16),
    "product": (op("onnx::Gemm", 0, 1, given=(floats(4, 4),) * 2, made=(floats(4, 4),)), None),
    "no shapes": (op("onnx::Add", 0, 1, given=(floats(4),)), None),
}


@pytest.mark.parametrize("name", BYTES)
def test_every_element_that_is_read_or_written_counts_once(name: str) -> None:
    event, expected = BYTES[name]
    assert traffic(event) == expected
