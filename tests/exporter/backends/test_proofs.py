"""The proof that ends a build runs what was lowered: each of these faults is refused by it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from onnxscript import opset23 as op

from tests.oracles.wan_reference import small_config
from tests.quick import slow_but
from wanexport.exporter.backends.backend import TensorRtOptions
from wanexport.exporter.backends.onnx import lower, passes, retype
from wanexport.exporter.backends.tensorrt.graphs import lowered_graphs
from wanexport.exporter.build import build
from wanexport.graphs.config import PRESETS, Preset
from wanexport.runtime.errors import WanExportError

Plant = Callable[[pytest.MonkeyPatch], None]
SMALL, LARGE = ("64x96", 9), ("256x256", 17)  # 72 and 1280 tokens: over 1000, a proof runs fewer


def build_planted(
    plant: Plant | None,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    preset: str = "t2v-1.3b",
    size: tuple[str, int] = SMALL,
    **options: Any,
) -> dict[str, Any]:
    """Build a small model of a family with a fault planted; return the record."""
    monkeypatch.setitem(PRESETS, "planted", Preset(small_config(preset)))
    if plant is not None:
        plant(monkeypatch)
    resolution, frames = size
    return build(
        "planted", random_weights=0, resolution=resolution, frames=frames, device="cpu",
        output=folder / "bundle", **{"backends": ["onnx"], "dtype": "bf16", **options},
    )  # fmt: skip


def triple_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the bf16 lowering alone."""

    def wrong(x: Any, approximate: str = "none") -> Any:
        return op.Mul(
            passes.wide_gelu(x, approximate), op.CastLike(op.Constant(value_float=3.0), x)
        )

    monkeypatch.setattr(lower, "wide_gelu", wrong)


def twice_the_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """In what adds a bias in fp32 alone."""

    def wrong(x: Any, weight: Any, bias: Any = None) -> Any:
        if bias is None or weight.dtype == ir.DataType.FLOAT:
            return passes.plain_linear(x, weight, bias)
        return passes.wide_linear(x, weight, op.Add(bias, bias))

    monkeypatch.setattr(lower, "wide_linear", wrong)


def wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every attention that TensorRT's rewrite gives another query."""
    right = passes.separate_queries

    def wrong(model: ir.Model) -> int:
        changed = right(model)
        for node in model.graph:
            if node.op_type == "Attention" and "scale" in node.attributes:
                node.attributes.add(ir.AttrFloat32("scale", 3.0))
        return changed

    monkeypatch.setattr(lower, "separate_queries", wrong)


def only_in_large_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    """In products of more rows than a proof runs."""

    def wrong(x: Any, weight: Any, bias: Any = None) -> Any:
        product = passes.plain_linear(x, weight, bias)
        tokens = max(int(size) for size in x.shape[:-1])
        return (
            op.Mul(product, op.CastLike(op.Constant(value_float=3.0), x))
            if tokens > 1000
            else product
        )

    monkeypatch.setattr(lower, "plain_linear", wrong)


def constant_only_in_large_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same number of nodes, with another number in one of them."""

    def wrong(x: Any, weight: Any, bias: Any = None) -> Any:
        tokens = max(int(size) for size in x.shape[:-1])
        factor = op.Constant(value_float=1.5 if tokens > 1000 else 1.0)
        return op.Mul(passes.plain_linear(x, weight, bias), op.CastLike(factor, x))

    monkeypatch.setattr(lower, "plain_linear", wrong)


def wrong_retyping(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the cast of a stored parameter, which only the proof's graph has."""
    right = retype._store

    def wrong(graph: ir.Graph, value: ir.Value, low: ir.DataType) -> None:
        right(graph, value, low)
        for node in list(graph):
            if node.op_type == "Cast" and node.inputs[0] is not None:
                source = node.inputs[0].producer()
                if source is not None and source.op_type == "Reshape" and value in source.inputs:
                    double = ir.node("Add", [node.outputs[0], node.outputs[0]])
                    uses = list(node.outputs[0].uses())
                    for use in uses:
                        if use.node is not double:
                            use.node.replace_input_with(use.idx, double.outputs[0])
                    graph.insert_after(node, [double])

    monkeypatch.setattr(retype, "_store", wrong)


@pytest.mark.parametrize(
    ("plant", "options"),
    slow_but(
        [
            (triple_gelu, {}),
            (twice_the_bias, {}),
            (wrong_retyping, {}),
            (only_in_large_videos, {"size": LARGE, "dtype": "fp32"}),
            (constant_only_in_large_videos, {"size": LARGE, "dtype": "fp32"}),
        ],
        "triple_gelu",
        "wrong_retyping",
    ),
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fault_in_the_lowering_is_refused(
    plant: Plant, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(WanExportError, match=r"failed its proof|not this engine"):
        build_planted(plant, monkeypatch, tmp_path, **options)
    assert not (tmp_path / "bundle" / "manifest.json").exists()


@pytest.mark.parametrize("dtype", slow_but(["bf16", "fp32"], "fp32"))
def test_a_fault_in_what_tensorrt_is_given_is_refused(
    dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"backends": ["tensorrt-rtx"], "dtype": dtype}
    targets = TensorRtOptions(targets=("sm89",))
    with pytest.raises(WanExportError, match="failed its proof"):
        build_planted(wrong_scale, monkeypatch, tmp_path, "flf2v-14b", tensorrt=targets, **options)
    lowered_graphs.cache_clear()  # the fault is in what it keeps for other targets


@pytest.mark.parametrize(
    ("preset", "options"),
    slow_but(
        [
            ("i2v-14b", {}),
            ("t2v-1.3b", {"size": LARGE}),
            ("ti2v-5b", {"dtype": "fp32", "size": ("128x192", 9)}),
        ],
        "ti2v-5b",
    ),
)
def test_without_a_fault_the_same_builds_are_proven(
    preset: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    record = build_planted(None, monkeypatch, tmp_path, preset, **options)
    (engine,) = record["engines"]
    proof = engine["proof"]
    assert proof["error"] <= proof["gate"]
    reduced = options.get("size") == LARGE
    assert bool(proof["integers_of_the_grid"]) == reduced
    assert ("retyped" in proof["method"]) == (engine["dtype"] == "bf16")
