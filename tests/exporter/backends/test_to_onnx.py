"""The ONNX graph: opset 23, one Attention node a call, weights by name in the safetensors file."""

import hashlib
from dataclasses import replace

import onnx
import pytest
from onnx.external_data_helper import uses_external_data

from tests.exporter.families import memory
from tests.oracles.wan_reference import VARIANTS, small_config, small_geometry
from wanexport.exporter.backends.onnx.lower import lower, serialize
from wanexport.graphs.signature import attention_count
from wanexport.runtime.bundle.signature import program_of, weights_layout
from wanexport.runtime.family import FAMILIES


def lowered(preset: str, dtype: str) -> onnx.ModelProto:
    config = small_config(preset)
    layout = weights_layout(config, dtype)[1]
    graph, _ = lower(config, small_geometry(config), dtype, layout, wide_bias=dtype != "fp32")
    return onnx.load_from_string(serialize(graph))


@pytest.mark.parametrize(
    ("preset", "dtype"), [*((preset, "bf16") for preset in VARIANTS), ("t2v-1.3b", "fp32")]
)
def test_the_graph_is_weightless_and_native(preset: str, dtype: str) -> None:
    config = small_config(preset)
    model = lowered(preset, dtype)
    layout = weights_layout(config, dtype)[1]
    external = {t.name: t for t in model.graph.initializer if uses_external_data(t)}
    assert set(external) == set(layout)
    for name, tensor in external.items():
        place = {entry.key: entry.value for entry in tensor.external_data}
        assert place["location"] == "denoiser.safetensors"
        assert int(place["offset"]) == layout[name].offset
        assert int(place["length"]) == layout[name].size
        assert tuple(tensor.dims) == layout[name].shape
        assert not tensor.raw_data
    operators = [node.op_type for node in model.graph.node]
    program = program_of(config, small_geometry(config))
    assert operators.count("Attention") == attention_count(program)
    forbidden = {"ScatterND", "ScatterElements", "Einsum", "If", "Loop", "SplitToSequence"}
    assert not forbidden & set(operators)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 23)]


def test_inputs_and_output_have_our_names_and_static_shapes() -> None:
    config = small_config("flf2v-14b")
    graph = lowered("flf2v-14b", "fp32").graph
    shapes = {i.name: tuple(d.dim_value for d in i.type.tensor_type.shape.dim) for i in graph.input}
    program = program_of(config, small_geometry(config))
    assert shapes == {name: spec.shape for name, spec in program.inputs.items()}
    assert [output.name for output in graph.output] == ["velocity"]


def test_state_is_an_input_and_what_it_becomes_an_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "memory", memory.FAMILY)
    config = replace(small_config("t2v-1.3b"), family="memory")
    layout = weights_layout(config, "fp32")[1]
    lowered_graph, counts = lower(config, small_geometry(config), "fp32", layout)
    graph = onnx.load_from_string(serialize(lowered_graph)).graph
    states = ["memory.0", "memory.1"]
    assert [value.name for value in graph.input][-2:] == states
    assert [value.name for value in graph.output] == ["velocity", *(f"{n}.next" for n in states)]
    shapes = [tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in graph.output]
    assert shapes[1:] == [(1, config.dim)] * 2
    assert set(counts.values()) == {0}


def test_attention_nodes_have_one_output_and_no_mask() -> None:
    nodes = [n for n in lowered("t2v-1.3b", "fp32").graph.node if n.op_type == "Attention"]
    assert {(len(node.input), len(node.output)) for node in nodes} == {(3, 1)}


def test_a_low_precision_product_is_rounded_once_before_fp32() -> None:
    """ONNX Runtime's Gemm on CUDA rounds before it adds its bias, and its GELU at each step."""
    graph = onnx.shape_inference.infer_shapes(lowered("i2v-14b", "bf16")).graph
    dtypes = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    dtypes |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    products = [node for node in graph.node if node.op_type == "Gemm"]
    low = [node for node in products if dtypes[node.input[1]] == onnx.TensorProto.BFLOAT16]
    assert low and len(low) < len(products)
    assert {len(node.input) for node in low} == {2}
    assert {len(node.input) for node in products if node not in low} == {3}
    gelus = [node for node in graph.node if node.op_type == "Gelu"]
    assert {dtypes[node.input[0]] for node in gelus} == {onnx.TensorProto.FLOAT}
    norms = [node for node in graph.node if node.op_type == "RMSNormalization"]
    assert norms and {makers[node.input[0]].op_type for node in norms} == {"Add"}


def test_the_same_graph_twice_has_the_same_bytes() -> None:
    one, other = (lowered("t2v-1.3b", "fp32").SerializeToString() for _ in range(2))
    assert hashlib.sha256(one).digest() == hashlib.sha256(other).digest()


def test_weights_of_another_dtype_are_cast_where_they_are_used() -> None:
    config = small_config("i2v-14b")
    layout = weights_layout(config, "bf16")[1]
    graph, _ = lower(config, small_geometry(config), "fp32", layout)
    model = onnx.load_from_string(serialize(graph))
    stored = {t.name: t.data_type for t in model.graph.initializer if uses_external_data(t)}
    narrow = {name for name, dtype in stored.items() if dtype == onnx.TensorProto.BFLOAT16}
    assert narrow == {name for name, entry in layout.items() if entry.dtype == "BF16"}
    readers = {name: node for node in model.graph.node for name in narrow & set(node.input)}
    assert {node.op_type for node in readers.values()} == {"Cast", "Reshape"}
    # Through a Reshape the cast waits for an activation; the patches' weight is reshaped itself.
    alone = [name for name, node in readers.items() if node.op_type == "Cast"]
    assert alone == ["patch_embedding.weight"]
