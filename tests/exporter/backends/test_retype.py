"""A graph retyped to fp32 computes all in fp32, of parameters that keep their stored dtype."""

from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import uses_external_data
from onnxruntime import InferenceSession

from tests.oracles.wan_reference import small_config, small_geometry
from tests.quick import slow_but
from wanexport.exporter.backends.onnx import retype as retyping
from wanexport.exporter.backends.onnx.assemble import assemble
from wanexport.exporter.backends.onnx.lower import (
    Lowered,
    Lowering,
    for_onnx_runtime,
    for_tensorrt,
    lower,
)
from wanexport.exporter.backends.onnx.retype import retype
from wanexport.runtime.bundle.signature import weights_layout
from wanexport.runtime.family import family_of
from wanexport.runtime.program import ENGINE_DTYPE, Call, Input, Program, TensorSpec

LOW = {
    "fp16": (TensorProto.FLOAT16, np.float16),
    "bf16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
}
FLOAT = TensorProto.FLOAT
Make = Callable[[str], list[onnx.NodeProto]]  # the nodes of a call in a precision
FIVE = np.array([70000.0, 3.0, -1.0, 2.0**-9 + 1, 0.1], np.float32)  # 70000 is no fp16
WEIGHT = np.array([0.5, 2.0, -3.0, 0.25, 1.5], np.float32)  # all of them exact in any precision


def lowered_of(dtype: str, nodes: Sequence[onnx.NodeProto], reads: str = "fp32") -> Lowered:
    """A call of w, a parameter of the precision, and x; the nodes compute y in fp32."""
    low, kind = LOW[dtype]
    of_reads = low if reads == ENGINE_DTYPE else FLOAT
    table = numpy_helper.from_array(np.array(1.5, kind), "table")
    given = [("w", low), ("x", of_reads)]
    graph = helper.make_graph(
        nodes,
        "call",
        [helper.make_tensor_value_info(name, of, [5]) for name, of in given],
        [helper.make_tensor_value_info("y", FLOAT, [5])],
        [table],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    program = Program(
        inputs={"x": Input((5,))},
        outputs={"y": TensorSpec((5,))},
        calls=(Call("call", ("x",), ("y",), ("w",)),),
    )
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    return Lowered(program, {"call": ir.from_proto(inferred)}, {"call": ()}, {}, "bf16")


def dtypes_of(lowered: Lowered, call: str = "call") -> dict[str, int]:
    """What ONNX infers of each value from the graph's ends and attributes alone."""
    model = ir.to_proto(lowered.calls[call])
    del model.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, check_type=True).graph
    values = (*inferred.input, *inferred.value_info, *inferred.output)
    return {value.name: value.type.tensor_type.elem_type for value in values}


def run(lowered: Lowered, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    model = ir.to_proto(lowered.calls["call"])
    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"w": w, "x": x})[0]


def cast(source: str, result: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [result], to=to)


def rounding(dtype: str) -> list[onnx.NodeProto]:
    """y = (x + w) * table, each of them rounded to the precision."""
    low = LOW[dtype][0]
    return [
        cast("x", "narrow", low),
        helper.make_node("Add", ["narrow", "w"], ["sum"]),
        helper.make_node("Mul", ["sum", "table"], ["product"]),
        cast("product", "y", FLOAT),
    ]


def like_the_parameter(dtype: str) -> list[onnx.NodeProto]:
    """y = (x cast like w) * (1 / 3 cast like w) * w."""
    return [
        helper.make_node("Constant", [], ["third"], value_float=1 / 3),
        helper.make_node("CastLike", ["third", "w"], ["narrow_third"]),
        helper.make_node("CastLike", ["x", "w"], ["narrow"]),
        helper.make_node("Mul", ["narrow", "narrow_third"], ["part"]),
        helper.make_node("Mul", ["part", "w"], ["product"]),
        cast("product", "y", FLOAT),
    ]


def of_a_shape(dtype: str) -> list[onnx.NodeProto]:
    """y = x * w + 1.5, and that number in a tensor of the attribute."""
    low, kind = LOW[dtype]
    value = numpy_helper.from_array(np.array([1.5], kind))
    number = numpy_helper.from_array(np.array(1.0, kind))
    return [
        helper.make_node("Constant", [], ["five"], value_ints=[5]),
        helper.make_node("ConstantOfShape", ["five"], ["halves"], value=value),
        helper.make_node("Constant", [], ["one"], value=number),
        cast("x", "narrow", low),
        helper.make_node("Mul", ["narrow", "w"], ["product"]),
        helper.make_node("Mul", ["product", "one"], ["same"]),
        helper.make_node("Add", ["same", "halves"], ["sum"]),
        cast("sum", "y", FLOAT),
    ]


def of_a_dtype(dtype: str) -> list[onnx.NodeProto]:
    """y = x * w + 0 * the first of [1, 0, 0, 0, 0], which is made in the precision."""
    low, kind = LOW[dtype]
    return [
        helper.make_node("Constant", [], ["shape"], value_ints=[1, 5]),
        helper.make_node("ConstantOfShape", ["shape"], ["square"]),
        helper.make_node("EyeLike", ["square"], ["eye"], dtype=low),
        helper.make_node("Squeeze", ["eye"], ["first"]),
        helper.make_node(
            "Constant", [], ["none"], value=numpy_helper.from_array(np.array(0, kind))
        ),
        helper.make_node("Mul", ["first", "none"], ["zeros"]),
        cast("x", "narrow", low),
        helper.make_node("Mul", ["narrow", "w"], ["product"]),
        helper.make_node("Add", ["product", "zeros"], ["sum"]),
        cast("sum", "y", FLOAT),
    ]


CASES: dict[Make, np.ndarray] = {
    rounding: (FIVE + WEIGHT) * np.float32(1.5),
    like_the_parameter: FIVE * np.float32(1 / 3) * WEIGHT,
    of_a_shape: FIVE * WEIGHT + np.float32(1.5),
}


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("make", [*CASES, of_a_dtype], ids=lambda make: make.__name__)
def test_every_value_but_the_parameter_is_fp32(make: Make, dtype: str) -> None:
    lowered = lowered_of(dtype, make(dtype))
    before = dtypes_of(lowered)
    assert list(before.values()).count(LOW[dtype][0]) > 1
    retyped = retype(lowered, dtype)
    assert retyped.calls is lowered.calls and retyped.dtype == "fp32"
    after = dtypes_of(lowered)
    low = {name for name, of in after.items() if of == LOW[dtype][0]}
    views = {
        node.outputs[0].name for node in lowered.calls["call"].graph if node.op_type == "Reshape"
    }
    assert "w" in low and low <= {"w", *views}
    kept = {name: of for name, of in before.items() if of not in (FLOAT, LOW[dtype][0])}
    assert {name: after[name] for name in kept} == kept


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_what_it_computes_is_rounded_nowhere(make: Make) -> None:
    result = run(retype(lowered_of("fp16", make("fp16")), "fp16"), FIVE, WEIGHT.astype(np.float16))
    np.testing.assert_array_equal(result, CASES[make])


def test_a_read_of_the_precision_becomes_fp32() -> None:
    nodes = [
        helper.make_node("Mul", ["x", "w"], ["product"]),
        cast("product", "y", FLOAT),
    ]
    lowered = retype(lowered_of("fp16", nodes, ENGINE_DTYPE), "fp16")
    assert dtypes_of(lowered)["x"] == FLOAT
    result = run(lowered, FIVE, WEIGHT.astype(np.float16))
    np.testing.assert_array_equal(result, FIVE * WEIGHT)


def test_a_parameter_that_nothing_reads_stays_as_it_is() -> None:
    lowered = lowered_of("bf16", [helper.make_node("Identity", ["x"], ["y"])])
    assert dtypes_of(retype(lowered, "bf16")) == {"w": LOW["bf16"][0], "x": FLOAT, "y": FLOAT}


def test_what_stays_in_the_precision_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retyping, "_OF_TYPES", ("dtype",))
    with pytest.raises(onnx.shape_inference.InferenceError):
        retype(lowered_of("bf16", rounding("bf16")), "bf16")


HOWS = [
    for_onnx_runtime("bf16", "native"),
    for_onnx_runtime("bf16", "mha"),
    for_tensorrt("bf16", "native"),
    for_tensorrt("fp16", "decomposed"),
]


@pytest.mark.parametrize("how", slow_but(HOWS, HOWS[0]), ids=str)
def test_stored_parameters_are_cast_where_they_are_first_used(how: Lowering) -> None:
    config = small_config("i2v-14b")
    layout = weights_layout(config, how.dtype)[1]
    lowered = lower(family_of(config).graph, config, small_geometry(config), how)
    model = onnx.inliner.inline_local_functions(
        ir.to_proto(assemble(retype(lowered, how.dtype), layout))
    )
    stored = {t.name: t.data_type for t in model.graph.initializer if uses_external_data(t)}
    narrow = {name for name, dtype in stored.items() if dtype == LOW[how.dtype][0]}
    low = "BF16" if how.dtype == "bf16" else "F16"
    assert narrow == {name for name, entry in layout.items() if entry.dtype == low}
    readers = [(name, node) for node in model.graph.node for name in narrow & set(node.input)]
    assert len(readers) == len(narrow)  # each is read once
    assert {node.op_type for _, node in readers} == {"Cast", "Reshape"}
    # Through a Reshape the cast waits for an activation; the patches' weight is reshaped itself,
    # and what a bias is added to is cast with it.
    alone = {name for name, node in readers if node.op_type == "Cast"}
    biases = {name for name in narrow if name.endswith(".bias")} if how.wide_bias else set()
    assert alone == {"patch_embedding.weight"} | biases
