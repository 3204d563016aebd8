"""The ONNX graph: opset 23, a function a call, weights by name in the safetensors file."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnx.parser
import onnx_ir as ir
import pytest
from onnx.external_data_helper import uses_external_data
from onnxruntime import InferenceSession

from tests.exporter.families import memory
from tests.oracles.wan_reference import VARIANTS, small_config, small_geometry
from tests.quick import QUICK_PRESETS, slow_but
from wanexport.exporter.backends.onnx import lower as to_onnx
from wanexport.exporter.backends.onnx.assemble import assemble
from wanexport.exporter.backends.onnx.attention import ATTENTION_FORMS
from wanexport.exporter.backends.onnx.cached import Becomes
from wanexport.exporter.backends.onnx.lower import (
    Lowered,
    for_onnx_runtime,
    for_tensorrt,
    lower,
    node_counts,
    serialize,
)
from wanexport.exporter.reference.inputs import forward_inputs
from wanexport.graphs.signature import attention_count
from wanexport.graphs.weights import RandomWeights, write_weights
from wanexport.runtime.bundle.signature import program_of, weights_layout
from wanexport.runtime.engines.onnx import OnnxSession
from wanexport.runtime.family import FAMILIES, family_of
from wanexport.runtime.program import Call, Input, Program, TensorSpec
from wanexport.runtime.wan_config import WanConfig


def lowered_of(config: WanConfig, dtype: str, attention: str = "native") -> Lowered:
    how = for_onnx_runtime(dtype, attention)
    return lower(family_of(config).graph, config, small_geometry(config), how)


@cache
def assembled(preset: str, dtype: str, num_layers: int = 2) -> onnx.ModelProto:
    config = small_config(preset, num_layers)
    graph = assemble(lowered_of(config, dtype), weights_layout(config, dtype)[1])
    return onnx.load_from_string(serialize(graph))


def flat(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph without functions."""
    inlined = onnx.inliner.inline_local_functions(model)
    assert not inlined.functions
    return inlined


@pytest.mark.parametrize(
    ("preset", "dtype"),
    slow_but(
        [*((preset, "bf16") for preset in VARIANTS), ("t2v-1.3b", "fp32")],
        *QUICK_PRESETS,
        ("t2v-1.3b", "fp32"),
    ),
)
def test_the_graph_is_weightless_and_native(preset: str, dtype: str) -> None:
    config = small_config(preset)
    model = assembled(preset, dtype)
    layout = weights_layout(config, dtype)[1]
    external = {t.name: t for t in model.graph.initializer if uses_external_data(t)}
    assert set(external) == set(layout) == {t.name for t in model.graph.initializer}
    for name, tensor in external.items():
        place = {entry.key: entry.value for entry in tensor.external_data}
        assert place["location"] == "denoiser.safetensors"
        assert int(place["offset"]) == layout[name].offset
        assert int(place["length"]) == layout[name].size
        assert tuple(tensor.dims) == layout[name].shape
        assert not tensor.raw_data
    operators = [node.op_type for node in flat(model).graph.node]
    program = program_of(config, small_geometry(config))
    assert operators.count("Attention") == attention_count(program)
    forbidden = {"ScatterND", "ScatterElements", "Einsum", "If", "Loop", "SplitToSequence"}
    assert not forbidden & set(operators)
    assert [(o.domain, o.version) for f in model.functions for o in f.opset_import] == [
        ("", 23)
    ] * len(program.calls)
    assert {(o.domain, o.version) for o in model.opset_import} == {("", 23), ("wanexport", 1)}


@pytest.mark.parametrize("preset", slow_but(["t2v-1.3b", "ti2v-5b"], "t2v-1.3b"))
def test_the_block_is_one_function_called_once_a_layer(preset: str) -> None:
    config = small_config(preset, 3)
    model = assembled(preset, "fp32", 3)
    assert [function.name for function in model.functions] == ["embed", "block", "head"]
    names = ["embed", "block", "block", "block", "head"]
    assert [(node.domain, node.op_type) for node in model.graph.node] == [
        ("wanexport", name) for name in names
    ]
    embed, block, head = program_of(config, small_geometry(config)).calls
    layout = weights_layout(config, "fp32")[1]
    read = [[name for name in node.input if name in layout] for node in model.graph.node]
    for index, own in enumerate(read[1:4]):
        assert own == [name.replace("{i}", str(index)) for name in block.parameters]
    assert (read[0], read[-1]) == (list(embed.parameters), list(head.parameters))
    assert sorted(name for own in read for name in own) == sorted(layout)
    makers = {name: node for node in model.graph.node for name in node.output}
    chain = list(model.graph.node)
    for before, after in pairwise(chain):
        (x,) = {name for name in after.input if name.endswith(".x") and name in before.output}
        assert makers[x] is before
    assert chain[-1].output == ["velocity"]


@pytest.mark.parametrize("dtype", slow_but(["fp32", "bf16"], "bf16"))
def test_more_layers_are_more_calls_of_the_same_functions(dtype: str) -> None:
    few, many = (assembled("i2v-14b", dtype, layers) for layers in (2, 5))
    content = [[f.SerializeToString(deterministic=True) for f in m.functions] for m in (few, many)]
    assert content[0] == content[1]
    assert len(many.graph.node) == len(few.graph.node) + 3


@pytest.mark.parametrize("attention", slow_but(["native", "mha"], "native"))
def test_nodes_are_counted_as_a_forward_has_them(attention: str) -> None:
    config = small_config("i2v-14b", 3)
    lowered = lowered_of(config, "bf16", attention)
    graph = assemble(lowered, weights_layout(config, "bf16")[1])
    nodes = Counter(node.op_type for node in flat(ir.to_proto(graph)).graph.node)
    counted = node_counts(lowered)
    for counts in (nodes, counted):
        del counts["Constant"]  # a call's tables are constants in a function, no nodes before
    assert counted == nodes


class Weights:
    """A small model's graph and random weights in a folder."""

    def __init__(self, folder: Path, config: WanConfig) -> None:
        self.folder, self.config = folder, config
        write_weights(self.file, config, "fp32", RandomWeights(config, 0, ""))
        self.model = ir.to_proto(
            assemble(lowered_of(config, "fp32"), weights_layout(config, "fp32")[1])
        )

    @property
    def file(self) -> Path:
        return self.folder / "denoiser.safetensors"

    def run(self, model: onnx.ModelProto, state: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        path = self.folder / "graph.onnx"
        path.write_bytes(model.SerializeToString())
        given = forward_inputs(self.config, small_geometry(self.config), 812.0, 0)
        return OnnxSession(path, self.file)({**given, **state})


@pytest.mark.parametrize(
    "family", slow_but(["t2v-1.3b", "flf2v-14b", "ti2v-5b", "memory"], "ti2v-5b")
)
def test_onnx_runtime_gives_the_same_bits_without_functions(
    family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(FAMILIES, "memory", memory.FAMILY)
    config = small_config("t2v-1.3b" if family == "memory" else family)
    config = replace(config, family="memory") if family == "memory" else config
    own = Weights(tmp_path, config)
    rng = np.random.default_rng(0)
    program = program_of(config, small_geometry(config)).whole()
    kept = {**program.states(), **program.values}  # beside the state what the prompt's calls wrote
    given = {name: rng.standard_normal(s.shape, np.float32) for name, s in kept.items()}
    called, inlined = own.run(own.model, given), own.run(flat(own.model), given)
    assert len(called) == 1 + len(program.states())
    for one, other in zip(called, inlined, strict=True):
        assert np.isfinite(one).all() and one.any()
        np.testing.assert_array_equal(one, other)


def test_inputs_and_output_have_our_names_and_static_shapes() -> None:
    config = small_config("flf2v-14b")
    graph = assembled("flf2v-14b", "fp32").graph
    shapes = {i.name: tuple(d.dim_value for d in i.type.tensor_type.shape.dim) for i in graph.input}
    program = program_of(config, small_geometry(config))
    assert shapes == {name: spec.shape for name, spec in program.inputs.items()}
    assert [output.name for output in graph.output] == ["velocity"]


def test_state_is_an_input_and_what_it_becomes_an_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "memory", memory.FAMILY)
    config = replace(small_config("t2v-1.3b"), family="memory")
    lowered = lowered_of(config, "fp32")
    model = assemble(lowered, weights_layout(config, "fp32")[1])
    graph = onnx.load_from_string(serialize(model)).graph
    states = ["memory.0", "memory.1"]
    assert [value.name for value in graph.input][-2:] == states
    assert [value.name for value in graph.output] == ["velocity", *(f"{n}.next" for n in states)]
    shapes = [tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in graph.output]
    assert shapes[1:] == [(1, config.dim)] * 2
    blocks = [node for node in graph.node if node.op_type == "block"]
    assert [node.input[-1] for node in blocks] == states
    assert [node.output[-1] for node in blocks] == [f"{name}.next" for name in states]
    assert set(lowered.lint.values()) == {0}


ADDING = """
<ir_version: 11, opset_import: ["" : 23]>
adding (float[4] {reads}, float[4] sum) => (float[4] {writes}, float[4] sum_next)
{{ {writes} = Identity({reads})  sum_next = Add(sum, {reads}) }}
"""


def adding(*becomes: Becomes) -> Lowered:
    """Calls that keep one sum: the first adds x, then both layers of the second what it wrote."""
    spec = TensorSpec((4,))
    program = Program(
        inputs={"x": Input((4,))},
        outputs={"y": spec},
        calls=(
            Call("first", ("x",), ("y",), state=("sum",)),
            Call("second", ("y",), ("y",), state=("sum",), repeat=2),
        ),
        values={"y": spec},
        state={"sum": spec},
    )
    texts = {
        "first": ADDING.format(reads="x", writes="y"),
        "second": ADDING.format(reads="y", writes="z"),
    }
    calls = {name: ir.from_proto(onnx.parser.parse_model(text)) for name, text in texts.items()}
    made = {name: (own,) for name, own in zip(calls, becomes, strict=True)}
    return Lowered(program, calls, made, {}, "fp32")


def test_a_state_that_several_calls_and_layers_keep_is_handed_on() -> None:
    """It has one name."""
    model = ir.to_proto(assemble(adding(Becomes.ANOTHER, Becomes.ANOTHER), {}))
    assert not model.metadata_props  # what two calls write one after the other is read in between
    assert [value.name for value in model.graph.output] == ["y", "sum.next"]
    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x, kept = np.arange(4, dtype=np.float32), np.full(4, 10, np.float32)
    y, after = session.run(None, {"x": x, "sum": kept})
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(after, kept + 3 * x)


def test_a_state_of_which_there_are_rows_alone_is_handed_to_no_other_call() -> None:
    with pytest.raises(RuntimeError, match="second takes sum, of which its moment gives rows only"):
        assemble(adding(Becomes.ROWS, Becomes.ANOTHER), {})


def test_a_graph_whose_parts_do_not_fit_is_refused() -> None:
    """The functions say bf16, the weights fp32."""
    config = small_config("t2v-1.3b")
    with pytest.raises(onnx.shape_inference.InferenceError):
        assemble(lowered_of(config, "bf16"), weights_layout(config, "fp32")[1])


def test_attention_nodes_have_one_output_and_no_mask() -> None:
    graph = flat(assembled("t2v-1.3b", "fp32")).graph
    nodes = [n for n in graph.node if n.op_type == "Attention"]
    assert {(len(node.input), len(node.output)) for node in nodes} == {(3, 1)}


@pytest.mark.parametrize("attention", slow_but(["native", "mha", "decomposed"], "native"))
def test_fewer_attentions_than_the_model_has_are_refused(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config("t2v-1.3b")
    monkeypatch.setattr(to_onnx, "attention_count", lambda program: attention_count(program) + 1)
    with pytest.raises(RuntimeError, match="4 attention operators, expected 5"):
        lower(
            family_of(config).graph,
            config,
            small_geometry(config),
            for_tensorrt("bf16", attention),
        )


@pytest.mark.parametrize(
    ("asked", "planted", "message"),
    [
        ("native", "decomposed", "Softmax"),
        ("decomposed", "native", "4 attention nodes, expected 0"),
    ],
)
def test_attention_is_lowered_as_it_was_asked_for(
    asked: str, planted: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ATTENTION_FORMS, asked, ATTENTION_FORMS[planted])
    with pytest.raises(RuntimeError, match=message):
        lowered_of(small_config("t2v-1.3b"), "fp32", asked)


def test_a_low_precision_product_is_rounded_once_before_fp32() -> None:
    """ONNX Runtime's Gemm on CUDA rounds before it adds its bias, and its GELU at each step."""
    graph = onnx.shape_inference.infer_shapes(flat(assembled("i2v-14b", "bf16"))).graph
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
    assembled.cache_clear()
    one = assembled("t2v-1.3b", "fp32").SerializeToString()
    assembled.cache_clear()
    other = assembled("t2v-1.3b", "fp32").SerializeToString()
    assert hashlib.sha256(one).digest() == hashlib.sha256(other).digest()
