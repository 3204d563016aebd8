"""`lint --parser tensorrt` against the real parser of TensorRT for RTX."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from tests.oracles.wan_reference import VARIANTS, small_config, small_geometry
from tests.quick import slow_but
from wanexport.exporter.backends.onnx.assemble import assemble
from wanexport.exporter.backends.onnx.lower import for_tensorrt, lower, serialize
from wanexport.exporter.cli.main import cli
from wanexport.exporter.lint.onnx import lint
from wanexport.exporter.lint.tensorrt import _is_constant, lint_tensorrt
from wanexport.runtime.bundle.signature import weights_layout
from wanexport.runtime.engines.tensorrt_library import import_tensorrt, message_log
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.family import family_of

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
HEADS = [1, 2, 8, 64]
Value = tuple[str, int, Sequence[int] | None]


def parser_takes(content: bytes, folder: Path | None = None) -> bool:
    """The real parser's verdict."""
    trt = import_tensorrt("tensorrt-rtx")
    log = message_log(trt)
    where = {"path": f"{folder}/"} if folder else {}
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    return bool(trt.OnnxParser(network, log).parse(content, **where))


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[Value],
    output: Value,
    constants: Sequence[onnx.TensorProto] = (),
    opset: int = 24,
    domains: Sequence[str] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "by hand",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*output)],
        list(constants),
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(name, 1) for name in domains)]
    return helper.make_model(graph, opset_imports=opsets)


def constant(name: str, value: Any) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(value), name)


def unary(operator: str, dtype: int = FLOAT, **options: Any) -> onnx.ModelProto:
    """One operator from x [4] to y."""
    keywords = {k: options.pop(k) for k in ("opset", "domains") if k in options}
    node = helper.make_node(operator, ["x"], ["y"], **options)
    return model_of([node], [("x", dtype, [4])], ("y", dtype, None), **keywords)


def attention(
    outputs: Sequence[str] = ("y",),
    extra: Sequence[Value | None] = (),
    shape: Sequence[int] = HEADS,
    **attributes: Any,
) -> onnx.ModelProto:
    """Attention of q, k and v with more inputs; None is one left out."""
    names = [value[0] if value else "" for value in extra]
    node = helper.make_node("Attention", ["q", "k", "v", *names], outputs, **attributes)
    given = [*((name, FLOAT, shape) for name in "qkv"), *(value for value in extra if value)]
    return model_of([node], given, ("y", FLOAT, None))


def with_axes(operator: str, *, as_constant: bool) -> onnx.ModelProto:
    node = helper.make_node(operator, ["x", "axes"], ["y"])
    axes = [constant("axes", [0])] if as_constant else []
    given: list[Value] = [("x", FLOAT, [1, 4])]
    given += [] if as_constant else [("axes", INT64, [1])]
    return model_of([node], given, ("y", FLOAT, None), axes)


def sequence() -> onnx.ModelProto:
    nodes = [
        helper.make_node("SplitToSequence", ["x"], ["parts"], axis=0),
        helper.make_node("SequenceAt", ["parts", "index"], ["y"]),
    ]
    return model_of(nodes, [("x", FLOAT, [4, 2])], ("y", FLOAT, None), [constant("index", 0)])


def layer_norm_with_mean() -> onnx.ModelProto:
    node = helper.make_node("LayerNormalization", ["x", "w"], ["y", "mean"], axis=-1)
    return model_of([node], [("x", FLOAT, [2, 4]), ("w", FLOAT, [4])], ("y", FLOAT, [2, 4]))


def scatter(reduction: str) -> onnx.ModelProto:
    node = helper.make_node("ScatterND", ["x", "index", "u"], ["y"], reduction=reduction)
    given: list[Value] = [("x", FLOAT, [4]), ("u", FLOAT, [1])]
    return model_of([node], given, ("y", FLOAT, [4]), [constant("index", [[1]])])


def external(place: str) -> onnx.ModelProto:
    tensor = constant("w", np.ones(4, np.float32))
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", place), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    node = helper.make_node("Add", ["x", "w"], ["y"])
    return model_of([node], [("x", FLOAT, [4])], ("y", FLOAT, [4]), [tensor])


GRAPH = "wanexport.graphs.wan:WanModel"


@pytest.mark.parametrize("preset", slow_but(VARIANTS, "ti2v-5b"))
def test_lint_and_parser_take_every_variant_decomposed(preset: str) -> None:
    config = small_config(preset, num_layers=1)
    _, layout = weights_layout(config, "bf16")
    geometry = small_geometry(config)
    how = for_tensorrt("bf16", "decomposed")
    lowered = lower(family_of(config).graph, config, geometry, how)
    content = serialize(assemble(lowered, layout, as_inputs=True))
    assert lint_tensorrt(onnx.load_from_string(content)) == []
    assert parser_takes(content)


@pytest.mark.parametrize(
    "model",
    [
        attention(),
        attention(extra=[("mask", FLOAT, [1, 1, 8, 8])]),
        model_of(
            [helper.make_node("Einsum", ["x", "x"], ["y"], equation="ij,kj->ik")],
            [("x", FLOAT, [4, 2])],
            ("y", FLOAT, None),
        ),
        with_axes("Unsqueeze", as_constant=True),
        with_axes("ReduceSum", as_constant=True),
        scatter("none"),
        unary("Swish"),
        unary("Neg", opset=25),
    ],
    ids=lambda model: model.graph.node[0].op_type,
)
def test_lint_and_parser_take(model: onnx.ModelProto) -> None:
    assert lint_tensorrt(model) == []
    assert parser_takes(model.SerializeToString())


@pytest.mark.parametrize(
    ("model", "detail"),
    [
        (sequence(), "SplitToSequence: no operator of TensorRT's"),
        (attention(["y", "key", "value"]), "Attention: 3 outputs, 1 is taken"),
        (attention(["y", "", "", "scores"]), "Attention: 2 outputs, 1 is taken"),
        (attention(softcap=5.0), "Attention: softcap is 5.0, expected 0.0"),
        (with_axes("Unsqueeze", as_constant=False), "Unsqueeze: input 1 is no constant"),
        (with_axes("Squeeze", as_constant=False), "Squeeze: input 1 is no constant"),
        (with_axes("ReduceSum", as_constant=False), "ReduceSum: input 1 is no constant"),
        (layer_norm_with_mean(), "LayerNormalization: 2 outputs, 1 is taken"),
        (scatter("add"), "ScatterND: reduction is add, expected none"),
        (unary("Identity", TensorProto.COMPLEX64), "type COMPLEX64"),
        (unary("Identity", TensorProto.INT16), "type INT16"),
        (unary("Softmax", TensorProto.INT32), "Softmax: of INT32"),
        (unary("Rotate", domain="ours", domains=["ours"]), "Rotate: of domain ours, which needs"),
        (unary("Unique"), "Unique: no operator of TensorRT's"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_lint_and_parser_refuse(model: onnx.ModelProto, detail: str) -> None:
    assert any(finding.detail.startswith(detail) for finding in lint_tensorrt(model))
    assert not parser_takes(model.SerializeToString())


@pytest.mark.parametrize(
    ("model", "detail"),
    [
        # The parser narrows it to fp32 and says so only in its log.
        (unary("Neg", TensorProto.DOUBLE), "fp64 would be narrowed to fp32"),
        # Documented as refused; TensorRT for RTX 1.7 takes them all the same.
        (
            attention(shape=[1, 8, 128], q_num_heads=2, kv_num_heads=2),
            "Attention: an input of 3 dimensions, 4 are taken",
        ),
        (attention(extra=[("mask", FLOAT, [8, 8])]), "Attention: an input of 2 dimensions"),
        (
            attention(extra=[None, None, None, ("lengths", INT64, [1])]),
            "Attention: inputs after the first 4",
        ),
        (attention(qk_matmul_output_mode=1), "Attention: qk_matmul_output_mode is 1, expected 0"),
        # It builds, and would run on nothing: no Wan has such a tensor.
        (
            model_of(
                [helper.make_node("Neg", ["x"], ["y"])], [("x", FLOAT, [0])], ("y", FLOAT, None)
            ),
            "a size of 0",
        ),
        # Older and newer than what any documented version takes.
        (unary("Neg", opset=8), "opset 8 is not of 9 to 25"),
        (unary("Neg", opset=26), "opset 26 is not of 9 to 25"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_lint_is_stricter_than_this_parser(model: onnx.ModelProto, detail: str) -> None:
    assert any(finding.detail.startswith(detail) for finding in lint_tensorrt(model))
    assert parser_takes(model.SerializeToString())


def test_what_lint_leaves_to_its_general_rules(tmp_path: Path) -> None:
    # Documented as taken, by a plugin that TensorRT for RTX has not; lint calls it a host's wait.
    model = unary("NonZero")
    model.graph.output[0].type.tensor_type.elem_type = INT64
    assert not parser_takes(model.SerializeToString())
    assert lint_tensorrt(model) == []
    onnx.save(model, tmp_path / "g.onnx")
    assert lint(tmp_path / "g.onnx", "tensorrt")["graphs"]["g.onnx"]["counts"]["host_sync"] == 1


@pytest.mark.parametrize("place", ["../w.bin", "/{folder}/w.bin", "sub/../../w.bin", "C:/w.bin"])
def test_data_outside_the_graphs_folder_is_refused(place: str, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    (folder / "sub").mkdir(parents=True)
    for file in (folder / "w.bin", tmp_path / "w.bin"):
        file.write_bytes(bytes(16))
    model = external(place.format(folder=str(tmp_path).strip("/")))
    assert any("outside the graph's own folder" in f.detail for f in lint_tensorrt(model))
    assert not parser_takes(model.SerializeToString(), folder)
    beside = external("w.bin")
    assert lint_tensorrt(beside) == []
    assert parser_takes(beside.SerializeToString(), folder)


def test_the_command_lints_for_tensorrt_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "g.onnx"
    onnx.save(attention(["y", "key", "value"]), path)
    assert CliRunner().invoke(cli, ["lint", str(path)]).exit_code == 0
    result = CliRunner().invoke(cli, ["lint", str(path), "--parser", "tensorrt"])
    assert result.exit_code == 1
    assert "tensorrt 1:  (Attention: 3 outputs, 1 is taken)" in result.output


def test_the_onnx_engines_of_a_bundle_are_taken(tiny_bundle: Path) -> None:
    result = lint(tiny_bundle, "tensorrt")
    assert result["clean"]
    assert [graph["counts"]["tensorrt"] for graph in result["graphs"].values()] == [0, 0, 0]


def test_a_saved_program_has_no_target(tmp_path: Path) -> None:
    (tmp_path / "program.pt2").touch()
    with pytest.raises(WanExportError, match=r"--parser tensorrt is for \.onnx files"):
        lint(tmp_path / "program.pt2", "tensorrt")


def test_a_chain_of_constants_takes_no_longer_than_its_length() -> None:
    """Each of 60 sums takes the one before twice: 2^60 ways lead to the first."""
    nodes = [helper.make_node("Constant", [], ["c0"], value_ints=[4])]
    nodes += [helper.make_node("Add", [f"c{i}", f"c{i}"], [f"c{i + 1}"]) for i in range(60)]
    nodes += [helper.make_node("Expand", ["x", "c60"], ["y"])]
    nodes += [helper.make_node("Reshape", ["x", "c60"], ["z"])]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
    graph = ir.from_proto(
        helper.make_model(
            helper.make_graph(nodes, "g", [x], [y]), opset_imports=[helper.make_opsetid("", 23)]
        )
    ).graph
    started, last = time.monotonic(), graph.node(61).inputs[1]
    assert last is not None and _is_constant(last) and not _is_constant(graph.inputs[0])
    assert time.monotonic() - started < 1
