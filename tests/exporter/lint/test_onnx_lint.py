"""`lint` on files: what torch's exporter makes of forbidden programs, ONNX by hand, bundles."""

from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from tests.exporter.lint.test_lint import FOUR, ROPE, TABLE, attention_by_hand, exported
from tests.graphs.test_rope import strided
from wanexport.exporter.lint.onnx import lint
from wanexport.runtime.errors import WanExportError


def counts_of(path: Path) -> dict[str, int]:
    (graph,) = lint(path)["graphs"].values()
    return graph["counts"]


def save(
    path: Path, nodes: list[onnx.NodeProto], domains: Sequence[str] = (), **types: int
) -> Path:
    """A model of these nodes from x [4] to y; types names the element types that are not float."""
    x, y = (
        helper.make_tensor_value_info(name, types.get(name, TensorProto.FLOAT), shape)
        for name, shape in (("x", [4]), ("y", None))
    )
    graph = helper.make_graph(nodes, "by hand", [x], [y])
    opsets = [helper.make_opsetid("", 23), *(helper.make_opsetid(name, 1) for name in domains)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), path)
    return path


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize(
    ("kind", "function", "args"),
    [
        ("strided_write", lambda _, x, c: strided(x, c, c), (ROPE, TABLE)),
        ("fp64", lambda _, x: x.double() * 2, (FOUR,)),
        ("unfused_attention", attention_by_hand, (ROPE,)),
        ("einsum", lambda _, x: torch.einsum("i,j->ij", x, x), (FOUR,)),
        ("host_sync", lambda _, x: x.nonzero(), (FOUR,)),
    ],
)
def test_what_the_exporter_makes_of_it_is_caught(
    kind: str,
    function: Callable[..., Tensor],
    args: tuple[Tensor, ...],
    optimize: bool,
    tmp_path: Path,
) -> None:
    program = torch.onnx.export(
        exported(function, *args), dynamo=True, opset_version=23, optimize=optimize, verbose=False
    )
    assert program is not None
    program.save(tmp_path / "graph.onnx")
    assert counts_of(tmp_path / "graph.onnx")[kind] > 0


def test_sequences_are_caught(tmp_path: Path) -> None:
    program = torch.onnx.export(
        exported(lambda _, x: x.chunk(2)[1] * 2, FOUR), dynamo=True, optimize=False, verbose=False
    )
    assert program is not None
    program.save(tmp_path / "graph.onnx")
    assert counts_of(tmp_path / "graph.onnx")["sequence"] >= 2


def test_complex_values_are_caught(tmp_path: Path) -> None:
    path = save(tmp_path / "graph.onnx", [helper.make_node("Identity", ["x"], ["y"])], x=14, y=14)
    assert counts_of(path)["complex"] == 2


def test_control_flow_and_what_it_contains_are_caught(tmp_path: Path) -> None:
    out = helper.make_tensor_value_info("z", TensorProto.DOUBLE, None)
    cast = helper.make_node("Cast", ["x"], ["z"], to=TensorProto.DOUBLE)
    body = helper.make_graph([cast], "body", [], [out])
    true = helper.make_node("Constant", [], ["c"], value=helper.make_tensor("c", 9, [], [True]))
    node = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
    counts = counts_of(save(tmp_path / "graph.onnx", [true, node], y=TensorProto.DOUBLE))
    assert counts["if"] == 1
    assert counts["fp64"] >= 2


def test_what_a_function_contains_is_caught(tmp_path: Path) -> None:
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("ours", 1)]
    body = [
        helper.make_node("Cast", ["a"], ["b"], to=TensorProto.DOUBLE),
        helper.make_node("Cast", ["b"], ["c"], to=TensorProto.FLOAT),
    ]
    function = helper.make_function("ours", "Twice", ["a"], ["c"], body, opsets[:1])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy")
    graph = helper.make_graph(
        [helper.make_node("Twice", ["x"], ["y"], domain="ours")], "g", [x], [y]
    )
    onnx.save(
        helper.make_model(graph, opset_imports=opsets, functions=[function]), tmp_path / "g.onnx"
    )
    assert counts_of(tmp_path / "g.onnx")["fp64"] == 1


def test_softmax_of_another_domain_is_caught(tmp_path: Path) -> None:
    node = helper.make_node("BiasSoftmax", ["x", "x"], ["y"], domain="com.microsoft")
    path = save(tmp_path / "graph.onnx", [node], domains=["com.microsoft"])
    assert counts_of(path)["unfused_attention"] == 1


def test_symbolic_and_missing_sizes_are_caught(tmp_path: Path) -> None:
    program = torch.onnx.export(
        torch.nn.Linear(4, 4),
        (torch.ones(3, 4),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("n")},),
        verbose=False,
    )
    assert program is not None
    program.save(tmp_path / "graph.onnx")
    assert counts_of(tmp_path / "graph.onnx")["dynamic_size"] >= 2


def test_shapes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Constant", [], ["w"], value_floats=[1.0, 2.0]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    with pytest.raises(WanExportError, match="can be read"):
        lint(save(tmp_path / "graph.onnx", nodes))


def test_a_saved_program_is_linted(tmp_path: Path) -> None:
    torch.export.save(exported(lambda _, x: x.double(), FOUR), tmp_path / "program.pt2")
    assert counts_of(tmp_path / "program.pt2")["fp64"] == 1


def test_every_engine_of_a_bundle_is_linted(bundle: Path) -> None:
    result = lint(bundle)
    assert result["clean"]
    assert set(result["graphs"]) == {f"64x96x9/onnx-{dtype}" for dtype in ("fp32", "fp16", "bf16")}


def test_attention_that_is_missing_is_caught(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanexport.exporter.lint.onnx.attention_count", lambda config: 9)
    result = lint(bundle)
    assert not result["clean"]
    finding = result["graphs"]["64x96x9/onnx-fp32"]["findings"][0]
    assert finding["kind"] == "unfused_attention"
    assert finding["detail"] == "8 attention nodes, the model has 9"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.onnx", None, "does not exist"),
        ("bad.onnx", b"\x00garbage", "is no ONNX file that can be read"),
        ("empty.onnx", b"", "is no ONNX file that can be read: it has no graph"),
        ("bad.pt2", b"garbage", "is no exported program"),
        ("graph.txt", b"text", "name a bundle, an .onnx or a .pt2 file"),
    ],
)
def test_what_is_no_graph_is_refused(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WanExportError, match=message) as caught:
        lint(tmp_path / name)
    assert "\n" not in str(caught.value)
