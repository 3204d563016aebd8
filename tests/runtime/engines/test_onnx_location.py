"""Renaming the file of a graph's weights, with the onnx package as the oracle."""

import random
import time
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from wanexport.runtime.engines.onnx_location import with_location

NAMES = ["w", "weights.bin", "f" * 64, "x" * 200, "with space", "ä" * 70]  # of 1 and 2 byte lengths


def external(name: str, location: str = "denoiser.safetensors") -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2, 3])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "64"), ("length", "24")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def inline(name: str) -> TensorProto:
    return helper.make_tensor(name, TensorProto.FLOAT, [2, 3], range(6))


def model() -> onnx.ModelProto:
    """External and other tensors in every place that may hold one."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])
    constant = helper.make_node("Constant", [], ["c"], value=external("c"))
    branch = helper.make_graph([constant], "branch", [], [x], initializer=[external("inner")])
    sparse = helper.make_sparse_tensor(external("values"), external("indices"), [9])
    several = helper.make_node(
        "F", ["x"], ["z"], domain="own", tensors=[external("t"), inline("u")]
    )
    nodes = [
        helper.make_node("Add", ["x", "a"], ["y"]),
        helper.make_node("If", ["x"], ["z"], then_branch=branch, else_branch=branch),
        helper.make_node("Constant", [], ["s"], sparse_value=sparse),
        several,
    ]
    graph = helper.make_graph(
        nodes, "graph", [x], [x], initializer=[external("a"), inline("b")],
        sparse_initializer=[sparse],
    )  # fmt: skip
    function = helper.make_function(
        "own", "F", ["x"], ["c"], [constant], [helper.make_opsetid("", 23)]
    )
    made = helper.make_model(graph, functions=[function])
    helper.set_model_props(made, {"location": "denoiser.safetensors"})  # of the model: no tensor's
    return made


def tensors(message: object) -> list[TensorProto]:
    """Every tensor within a message."""
    if isinstance(message, TensorProto):
        return [message]
    found: list[TensorProto] = []
    for field, value in message.ListFields():  # type: ignore[attr-defined]
        if field.message_type is not None:
            for item in value if field.is_repeated else [value]:
                found += tensors(item)
    return found


def renamed(made: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """What the onnx package makes of it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(made)
    for tensor in tensors(copy):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    return copy


@pytest.mark.parametrize("name", NAMES)
def test_every_external_tensor_is_renamed_and_nothing_else(name: str) -> None:
    made = model()
    assert sum(tensor.data_location == TensorProto.EXTERNAL for tensor in tensors(made)) >= 10
    found = onnx.ModelProto.FromString(with_location(made.SerializeToString(), name))
    assert found == renamed(made, name) != made


def test_a_graph_that_has_the_name_stays_as_it_is(tiny_bundle: Path) -> None:
    for made in (
        model().SerializeToString(),
        (tiny_bundle / "engines/64x96x9/onnx-fp32/denoiser.onnx").read_bytes(),
    ):
        assert with_location(made, "denoiser.safetensors") == made
        there = with_location(made, "elsewhere")
        assert there != made == with_location(there, "denoiser.safetensors")


def test_weights_in_several_files_are_refused() -> None:
    made = model()
    made.graph.initializer.append(external("more", "another.bin"))
    with pytest.raises(ValueError, match=r"lie in 2 files \('another.bin', 'denoiser"):
        with_location(made.SerializeToString(), "w")


def test_a_graph_without_external_data_is_taken() -> None:
    made = onnx.ModelProto(ir_version=10).SerializeToString()
    assert with_location(made, "w") == made
    assert with_location(b"", "w") == b""


@pytest.mark.parametrize(
    "damaged",
    [
        b"no graph",
        b"\x3a",  # a graph without its length
        b"\x3a\x05\x00",  # one that ends before its length
        b"\x3a" + b"\xff" * 20,  # a length without end
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",  # one beyond any file
        b"\x02\x00",  # field number 0
        b"\x0b\x0c",  # a group, which no graph has
        b"\x09\x00",  # 8 bytes of which there is 1
    ],
)
def test_what_is_no_graph_is_refused(damaged: bytes) -> None:
    with pytest.raises(ValueError, match="it is no ONNX graph"):
        with_location(damaged, "w")


def test_graphs_that_are_nested_without_end_are_refused() -> None:
    content = b""
    for _ in range(2000):  # attribute.g of node.attribute of graph.node
        for tag in (b"\x32", b"\x2a", b"\x0a"):
            content = tag + varint(len(content)) + content
    with pytest.raises(ValueError, match="nested too deep"):
        with_location(b"\x3a" + varint(len(content)) + content, "w")


def test_damaged_graphs_are_refused_or_renamed_and_take_no_time() -> None:
    made, rng, started = model().SerializeToString(), random.Random(0), time.process_time()
    for _ in range(500):
        damaged = bytearray(made)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            found = with_location(bytes(damaged), "w")
        except ValueError:
            continue
        assert with_location(found, "w") == found
    assert time.process_time() - started < 10


def varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
