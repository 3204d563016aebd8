"""Two ONNX graphs of two sizes are one, or the first difference is named."""

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import helper, numpy_helper

from tests.oracles.wan_reference import small_config
from tests.quick import slow_but
from wanexport.exporter.backends.onnx.assemble import assemble
from wanexport.exporter.backends.onnx.lower import (
    Lowering,
    for_onnx_runtime,
    for_tensorrt,
    lower,
    serialize,
)
from wanexport.exporter.backends.onnx.same import compare_graphs
from wanexport.exporter.reference.eager import cut_to_ends
from wanexport.runtime.bundle.signature import weights_layout
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.family import family_of
from wanexport.runtime.geometry import Geometry

FULL, SMALL = Geometry(256, 256, 17), Geometry(128, 256, 17)  # grids (5, 16, 16) and (5, 8, 16)
TEXT = """
<ir_version: 11, opset_import: ["" : 23, "wanexport" : 1]>
graph (float[1280,4] latent) => (float[1280,4] velocity) {
  x, cos = wanexport.embed(latent)
  y = wanexport.block(x, cos)
  velocity = wanexport.block(y, cos)
}
<domain: "wanexport", opset_import: ["" : 23]>
embed (latent) => (x, cos) {
  table = Constant <value = float[3,2] {0.0, 0.0, 0.0, 0.0, 0.0, 0.0}> ()
  cos = Cast <to = 1> (table)
  x = Softmax <axis = -1> (latent)
}
<domain: "wanexport", opset_import: ["" : 23]>
block (x, cos) => (y) {
  shape = Constant <value_ints = [1280, 4]> ()
  sides = Constant <value_ints = [5, 16, 4]> ()
  third = Constant <value_float = 0.333> ()
  pair = Constant <value = int64[1,2] {3, 7}> ()
  both = Cast <to = 1> (pair)
  flat = Reshape <allowzero = 0> (x, shape)
  grid = Reshape <allowzero = 0> (flat, sides)
  less = Sub (x, third)
  y = Mul (less, flat)
}
"""
SMALLER = {"1280": "640", "5, 16": "5, 8"}


def table(rows: int, dtype: type = np.float32) -> np.ndarray:
    return np.arange(2 * rows, dtype=dtype).reshape(rows, 2)


def model_of(text: str, rows: np.ndarray | None = None) -> onnx.ModelProto:
    """The graph of the text with a table, and a value's type stated in each function."""
    model = onnx.parser.parse_model(text)
    for node in model.functions[0].node:
        if rows is not None and node.op_type == "Constant":
            node.attribute[0].t.CopyFrom(numpy_helper.from_array(rows))
    for function in model.functions:
        for name in (*function.input, function.node[-1].output[0]):
            value = helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, 4])
            function.value_info.append(value)
    return model


def smaller(text: str) -> str:
    for old, new in SMALLER.items():
        text = text.replace(old, new)
    return text


def compare(full: onnx.ModelProto, small: onnx.ModelProto) -> dict[str, int]:
    return compare_graphs(full.SerializeToString(), small.SerializeToString(), (FULL, SMALL))


def test_integers_of_the_grid_and_rows_of_tables_may_differ() -> None:
    small = model_of(smaller(TEXT), table(8))
    assert compare(model_of(TEXT, table(16)), small) == {"block Reshape": 2}
    assert compare(small, small) == {}


def test_a_graph_of_more_layers_is_the_same() -> None:
    fewer = TEXT.replace("  y = wanexport.block(x, cos)\n", "").replace("(y, cos)", "(x, cos)")
    assert compare(model_of(TEXT), model_of(smaller(fewer))) == {"block Reshape": 2}


DIFFERENCES = {
    "operator": ("Sub (", "Add ("),
    "domain": ("Sub (", "com.microsoft.Sub ("),
    "another node": ("y = Mul (less, flat)", "more = Mul (less, flat) y = Identity (more)"),
    "order": (
        "less = Sub (x, third)\n",
        "",
        "flat = Reshape <allowzero = 0> (x, shape)",
        "less = Sub (x, third)\n  flat = Reshape <allowzero = 0> (x, shape)",
    ),
    "connection": ("Mul (less, flat)", "Mul (flat, less)"),
    "connection to an input": ("Sub (x, third)", "Sub (cos, third)"),
    "a constant for a value": ("Mul (less, flat)", "Mul (less, third)"),
    "attribute": ("axis = -1", "axis = 0"),
    "attribute that is missing": (" <axis = -1>", ""),
    "attribute of a dtype": ("to = 1>", "to = 10>"),
    "float": ("0.333", "0.334"),
    "dtype of a constant": ("value_float = 0.333", "value = double {0.333}"),
    "integer of no grid": ("5, 16, 4", "5, 16, 12"),
    "integer of the ratio alone": ("[1280, 4]", "[1280, 8]"),
    "more integers": ("[1280, 4]", "[1280, 4, 1]"),
    "shape of integers": ("int64[1,2]", "int64[2,1]"),
    "integer of another dtype": ("int64[1,2]", "int32[1,2]"),
    "outputs": ("block (x, cos) => (y)", "block (x, cos) => (less)"),
    "inputs": ("block (x, cos)", "block (cos, x)"),
    "another input": ("block (x, cos)", "block (x, cos, time)"),
    "another output": ("block (x, cos) => (y)", "block (x, cos) => (y, less)"),
    "opset": ('opset_import: ["" : 23]>\nblock', 'opset_import: ["" : 22]>\nblock'),
    "order of calls": (
        "y = wanexport.block(x, cos)\n",
        "",
        "(y, cos)",
        "(latent, cos)",
        "  velocity = wanexport.block(latent, cos)",
        "  velocity = wanexport.block(latent, cos)\n  z, w = wanexport.embed(latent)",
    ),
    "another operator among the calls": (
        "velocity = wanexport.block(y, cos)",
        "z = wanexport.block(y, cos)  velocity = Neg(z)",
    ),
    "another function": (
        '<domain: "wanexport", opset_import: ["" : 23]>\nblock',
        '<domain: "wanexport", opset_import: ["" : 23]>\nhead (x) => (y) { y = Neg(x) }\n'
        '<domain: "wanexport", opset_import: ["" : 23]>\nblock',
    ),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
@pytest.mark.parametrize("which", ["full", "small"])
def test_each_other_difference_is_refused(difference: str, which: str) -> None:
    changes, text = DIFFERENCES[difference], TEXT
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert old in text
        text = text.replace(old, new)
    sizes = (text, TEXT) if which == "full" else (TEXT, text)
    with pytest.raises(WanExportError, match="what the proof runs is not this engine") as caught:
        compare(model_of(sizes[0]), model_of(smaller(sizes[1])))
    assert str(caught.value).startswith(("embed has", "block has", "the graph has"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "rows",
    [
        table(8) + np.float32(1e-6),
        table(7),
        table(8, np.float64),
        table(16)[:8, :1],
        table(8).reshape(8, 1, 2),
    ],
    ids=["numbers", "length", "dtype", "width", "rank"],
)
def test_another_table_is_refused(rows: np.ndarray) -> None:
    with pytest.raises(WanExportError, match="embed has"):
        compare(model_of(TEXT, table(16)), model_of(smaller(TEXT), rows))


@pytest.mark.parametrize("kind", ["input", "result"])
def test_the_dtype_of_a_value_is_compared(kind: str) -> None:
    full, small = model_of(TEXT), model_of(smaller(TEXT))
    name = "cos" if kind == "input" else "y"
    (value,) = (info for info in small.functions[1].value_info if info.name == name)
    value.type.tensor_type.elem_type = onnx.TensorProto.BFLOAT16
    with pytest.raises(WanExportError, match="block has"):
        compare(full, small)


def test_a_constant_that_a_function_gives_is_compared() -> None:
    text = TEXT.replace("cos = Cast <to = 1> (table)", "").replace(
        "(x, cos) {\n  t", "(x, table) {\n  t"
    )
    full = model_of(text, table(16))
    assert compare(full, model_of(smaller(text), table(8))) == {"block Reshape": 2}
    with pytest.raises(WanExportError, match="embed has a constant of"):
        compare(full, model_of(smaller(text), table(8) + 1))


LOWERED = {
    "t2v-1.3b": for_onnx_runtime("fp32", "native"),
    "i2v-14b": for_onnx_runtime("bf16", "mha"),
    "flf2v-14b": for_tensorrt("bf16", "native"),
    "i2v-a14b": for_tensorrt("fp16", "decomposed"),
    "ti2v-5b": for_onnx_runtime("bf16", "native"),
}


def lowered_bytes(preset: str, geometry: Geometry, how: Lowering, *, ends: bool) -> bytes:
    config = small_config(preset, 3)
    config = cut_to_ends(config) if ends else config
    lowered = lower(family_of(config).graph, config, geometry, how)
    return serialize(assemble(lowered, weights_layout(config, how.dtype)[1]))


@pytest.mark.parametrize("preset", slow_but(list(LOWERED), "i2v-a14b"))
def test_what_is_lowered_differs_by_the_grid_alone(preset: str) -> None:
    how = LOWERED[preset]
    stride = family_of(small_config(preset)).vae.spatial_stride
    full = Geometry(32 * stride, 48 * stride, 17, stride)
    small = full.reduced(1000)
    assert full.num_tokens > 1000 >= small.num_tokens
    whole = lowered_bytes(preset, full, how, ends=False)
    cut = lowered_bytes(preset, small, how, ends=True)
    differing = compare_graphs(whole, cut, (full, small))
    assert {name.partition(" ")[0] for name in differing} <= {"embed", "block", "head"}
    assert "block Reshape" in differing and "head Reshape" in differing
    with pytest.raises(WanExportError):  # the sizes are said the other way round
        compare_graphs(whole, cut, (small, full))
