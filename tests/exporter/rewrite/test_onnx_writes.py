"""ScatterND that make up a tensor become Concat and Reshape, in what the exporter makes of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from tests.exporter.rewrite.programs import exported
from tests.exporter.rewrite.test_strided_writes import FITTING, LOOK_ALIKES
from tests.graphs.test_rope import strided
from tests.quick import slow_but
from wanexport.exporter.child.quiet import quiet
from wanexport.exporter.rewrite.fix_onnx import fix_onnx
from wanexport.exporter.rewrite.record import STRIDED_WRITES, Rewriting
from wanexport.runtime.errors import WanExportError

EXPORTED = (
    "empty_like", "halves", "three by three", "the axis of tokens", "heads before tokens",
    "two at once", "uneven pieces",
)  # fmt: skip
UNFIT = ("the even ones twice", "another stride", "strides that miss some", "half of it",
         "read between")  # fmt: skip
X = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def to_onnx(path: Path, function: Callable[..., Any], *args: Tensor, optimize: bool) -> Path:
    with quiet("torch"):
        program = torch.onnx.export(
            exported(function, *args), dynamo=True, opset_version=20, optimize=optimize,
            verbose=False,
        )  # fmt: skip
    assert program is not None
    program.save(path)
    return path


@pytest.mark.parametrize("optimize", slow_but([False, True], True))
def test_writes_that_make_up_a_tensor_are_assembled(optimize: bool, tmp_path: Path) -> None:
    """All in one graph, for its export takes the time."""

    def every(module: Any, x: Tensor) -> list[Tensor]:
        return [FITTING[name](module, x + i) for i, name in enumerate(EXPORTED)]

    path = to_onnx(tmp_path / "a.onnx", every, X, optimize=optimize)
    assert "ScatterND" in operators(path)
    found, uncompared = fix_onnx(path, tmp_path / "b.onnx")
    assert found.counts[STRIDED_WRITES] == len(EXPORTED) + 1
    assert not found.left
    assert uncompared is None
    assert not {"ScatterND", "CastLike"} & {*operators(tmp_path / "b.onnx")}


def test_rope_leaves_no_transposes(tmp_path: Path) -> None:
    q, table = torch.randn(1, 8, 2, 12).half(), torch.randn(1, 8, 1, 6)
    path = to_onnx(tmp_path / "a.onnx", lambda _, x, c: strided(x, c, c), q, table, optimize=True)
    found, uncompared = fix_onnx(path, tmp_path / "b.onnx")
    assert (found.counts[STRIDED_WRITES], uncompared) == (1, None)
    assert not {"ScatterND", "Transpose"} & {*operators(tmp_path / "b.onnx")}


def test_look_alikes_are_left_with_the_reason(tmp_path: Path) -> None:
    chosen = [pair for name, pair in LOOK_ALIKES.items() if name in UNFIT]

    def every(module: Any, x: Tensor) -> list[Tensor]:
        return [function(module, x + i) for i, (function, _) in enumerate(chosen)]

    path = to_onnx(tmp_path / "a.onnx", every, X, optimize=True)
    found, _ = fix_onnx(path, tmp_path / "b.onnx")
    assert found.counts[STRIDED_WRITES] == 0
    said = "; ".join(left.reason for left in found.left)
    assert len(found.left) == len(chosen)
    assert all(reason in said for _, reason in chosen)
    assert operators(tmp_path / "b.onnx") == operators(path)


def scattered(path: Path, *indices: Any, sizes: Any = (4, 3), **attributes: Any) -> Path:
    """Writes of parts u0, u1, ... of x along its first axis, at indices [n, 1]."""
    nodes, initializers, value = [], [], "x"
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(sizes))]
    for i, places in enumerate(indices):
        places = np.asarray(places, np.int64)
        initializers.append(numpy_helper.from_array(places, f"i{i}"))
        shape = [len(places), *sizes[1:]]
        inputs.append(helper.make_tensor_value_info(f"u{i}", TensorProto.FLOAT, shape))
        nodes.append(
            helper.make_node("ScatterND", [value, f"i{i}", f"u{i}"], [f"y{i}"], **attributes)
        )
        value = f"y{i}"
    y = helper.make_tensor_value_info(value, TensorProto.FLOAT, list(sizes))
    graph = helper.make_graph(nodes, "by hand", inputs, [y], initializer=initializers)
    onnx.save(model_of(graph), path)
    return path


def model_of(graph: onnx.GraphProto) -> onnx.ModelProto:
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize(
    "indices",
    [
        ([[0], [2]], [[1], [3]]),
        ([[1], [3]], [[-4], [-2]]),
        ([[2], [3]], [[0], [1]]),
        ([[3]], [[0], [1], [2]]),
        ([[0], [1], [2], [3]],),
        ([[0], [2]], [[0], [2]], [[1], [3]]),
    ],
)
def test_writes_by_hand_are_assembled(indices: Any, tmp_path: Path) -> None:
    path = scattered(tmp_path / "a.onnx", *indices)
    found, uncompared = fix_onnx(path, tmp_path / "b.onnx")
    assert (found.counts[STRIDED_WRITES], uncompared, found.left) == (1, None, ())
    assert "ScatterND" not in operators(tmp_path / "b.onnx")


@pytest.mark.parametrize(
    ("indices", "attributes", "sizes", "reason"),
    [
        (([[0], [2]], [[1], [3]]), {"reduction": "add"}, (4, 3), "reduction add"),
        (([[0], [1], [3]], [[2]]), {}, (4, 3), "not evenly spaced"),
        (([[0], [2]], [[1], [3]]), {}, (4, "tokens"), "not of numbers"),
        (([[0], [2]], [[3], [1]]), {}, (4, 3), "not evenly spaced"),
        (([[0], [0]], [[1], [3]]), {}, (4, 3), "not evenly spaced"),
    ],
)
def test_writes_by_hand_that_do_not_fit_are_left(
    indices: Any, attributes: Any, sizes: Any, reason: str, tmp_path: Path
) -> None:
    path = scattered(tmp_path / "a.onnx", *indices, sizes=sizes, **attributes)
    found, _ = fix_onnx(path, tmp_path / "b.onnx")
    assert found.counts[STRIDED_WRITES] == 0
    assert reason in found.left[0].reason


def test_indices_that_are_an_input_are_left(tmp_path: Path) -> None:
    path = scattered(tmp_path / "a.onnx", [[0], [2]], [[1], [3]])
    model = onnx.load(path)
    index = model.graph.initializer.pop()
    model.graph.input.append(helper.make_tensor_value_info(index.name, TensorProto.INT64, [2, 1]))
    onnx.save(model, path)
    assert "no constants" in fix_onnx(path, tmp_path / "b.onnx")[0].left[0].reason


def with_branches(path: Path) -> Path:
    """The writes inside both branches of an If."""
    inner = onnx.load(scattered(path, [[0], [2]], [[1], [3]])).graph
    inputs = list(inner.input)
    del inner.input[:]
    condition = helper.make_tensor_value_info("condition", TensorProto.BOOL, [])
    node = helper.make_node("If", ["condition"], ["y"], then_branch=inner, else_branch=inner)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 3])
    graph = helper.make_graph([node], "outer", [condition, *inputs], [y])
    onnx.save(model_of(graph), path)
    return path


def test_control_flow_is_left_alone_and_named(tmp_path: Path) -> None:
    found, _ = fix_onnx(with_branches(tmp_path / "a.onnx"), tmp_path / "b.onnx")
    assert found.counts[STRIDED_WRITES] == 0
    assert {left.reason for left in found.left} == {
        "it is inside a function or control flow, which is left alone"
    }


def with_weights(folder: Path) -> tuple[Path, bytes]:
    """A model whose base and one more weight lie in a file beside it."""
    folder.mkdir()
    path = scattered(folder / "a.onnx", [[0], [2]], [[1], [3]], sizes=(4, 300))
    model = ir.load(path)
    weight = ir.tensor(np.arange(1200, dtype=np.float32).reshape(4, 300), name="w")
    value = ir.Value(name="w", shape=ir.Shape([4, 300]), type=ir.TensorType(ir.DataType.FLOAT),
                     const_value=weight)  # fmt: skip
    model.graph.register_initializer(value)
    last = model.graph.outputs[0]
    added = ir.node("Add", [last, value], name="add")
    added.outputs[0].name, added.outputs[0].shape, added.outputs[0].type = (
        "z",
        last.shape,
        last.type,
    )
    model.graph.append(added)
    model.graph.outputs[0] = added.outputs[0]
    ir.save(model, path, external_data="weights.bin")
    assert (folder / "weights.bin").stat().st_size >= 4800
    return path, (folder / "weights.bin").read_bytes()


@pytest.mark.parametrize("place", ["same", "other"])
def test_weights_stay_in_a_file_and_the_original_stays(place: str, tmp_path: Path) -> None:
    path, weights = with_weights(tmp_path / "model")
    original = path.read_bytes()
    other = tmp_path / "other"
    other.mkdir()
    output = (path.parent if place == "same" else other) / "clean.onnx"
    found, uncompared = fix_onnx(path, output)
    assert (found.counts[STRIDED_WRITES], uncompared) == (1, None)
    assert path.read_bytes() == original
    assert (path.parent / "weights.bin").read_bytes() == weights
    assert output.stat().st_size < 4800
    expected = {"same": ["a.onnx", "clean.onnx", "weights.bin"],
                "other": ["clean.onnx", "clean.onnx.data"]}[place]  # fmt: skip
    assert sorted(p.name for p in output.parent.iterdir()) == expected
    onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname", "gone.bin"])
def test_weights_that_are_not_beside_the_model_are_refused(location: str, tmp_path: Path) -> None:
    path, _ = with_weights(tmp_path / "model")
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())
    with pytest.raises(WanExportError, match="its weights"):
        fix_onnx(path, tmp_path / "model" / "b.onnx")
    assert not (tmp_path / "model" / "b.onnx").exists()


def test_a_difference_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def swap(model: ir.Model, _: onnx.ModelProto) -> Rewriting:
        first, second = (node for node in model.graph if node.op_type == "ScatterND")
        for a, b in ((first, second),):
            one, other = a.inputs[2], b.inputs[2]
            a.replace_input_with(2, other)
            b.replace_input_with(2, one)
        return Rewriting({STRIDED_WRITES: 1})

    monkeypatch.setattr("wanexport.exporter.rewrite.fix_onnx.rewrite_onnx", swap)
    path = scattered(tmp_path / "a.onnx", [[0], [2]], [[1], [3]])
    with pytest.raises(
        WanExportError, match=r"the rule strided_writes changes .*nothing is written"
    ):
        fix_onnx(path, tmp_path / "b.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]
