"""Bundles made by hand whose ONNX engine runs: a graph of a few nodes over the weights' file."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.runtime.bundle.small_bundle import CONFIG, small_bundle, weights_record
from wanexport.exporter.bundle.writer import file_record, write_manifest
from wanexport.runtime.bundle.manifest import WeightsRecord, read_manifest, weights_label
from wanexport.runtime.bundle.path import WEIGHTS_FILE
from wanexport.runtime.bundle.signature import weights_layout
from wanexport.runtime.bundle.tensorfile import load_arrays
from wanexport.runtime.family import SamplingDefaults

SCALE, SHIFT = "blocks.1.ffn.0.weight", "head.head.bias"  # far apart in the file
INPUTS = {"latent": (1, 16, 3, 8, 12), "timestep": (1,), "text": (1, 8, 32)}
STATE = "memory.0"  # what a graph with state keeps: what was added to the velocity, and 1 more


def write_graph(path: Path, *, with_state: bool = False) -> Path:
    """velocity = latent * sum(SCALE) + sum(SHIFT) + mean(text) + timestep, and the state if any."""
    entries = weights_layout(CONFIG, "fp32")[1]
    parameters = []
    for name in (SCALE, SHIFT):
        entry = entries[name]
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=entry.shape)
        tensor.data_location = TensorProto.EXTERNAL
        where = {"location": WEIGHTS_FILE, "offset": entry.offset, "length": entry.size}
        for key, value in where.items():
            tensor.external_data.add(key=key, value=str(value))
        parameters.append(tensor)
    nodes = [
        helper.make_node("ReduceSum", [SCALE], ["scale"], keepdims=0),
        helper.make_node("ReduceSum", [SHIFT], ["shift"], keepdims=0),
        helper.make_node("ReduceMean", ["text"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["latent", "scale"], ["scaled"]),
        helper.make_node("Sum", ["shift", "mean", "timestep"], ["added"]),
        helper.make_node("Add", ["scaled", "added"], ["plain" if with_state else "velocity"]),
    ]
    inputs, outputs = dict(INPUTS), {"velocity": INPUTS["latent"]}
    if with_state:
        inputs[STATE] = outputs[f"{STATE}.next"] = (1,)
        one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
        parameters.append(one)
        nodes += [
            helper.make_node("Add", ["plain", STATE], ["velocity"]),
            helper.make_node("Add", [STATE, "one"], [f"{STATE}.next"]),
        ]
    given, got = (
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in shapes.items()]
        for shapes in (inputs, outputs)
    )
    graph = helper.make_graph(nodes, "small", given, got, initializer=parameters)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.save(model, path)
    return path


def expected(given: Mapping[str, np.ndarray], weights: Path) -> np.ndarray:
    """What the graph computes, in fp64."""
    tensors = load_arrays(weights)
    scale, shift = (tensors[name].astype(np.float64).sum() for name in (SCALE, SHIFT))
    return given["latent"] * scale + shift + given["text"].mean() + given["timestep"]


def inputs(seed: int = 0) -> dict[str, np.ndarray]:
    """Seeded inputs at timestep 500."""
    rng = np.random.default_rng(seed)
    drawn = {name: rng.standard_normal(shape, np.float32) for name, shape in INPUTS.items()}
    return {**drawn, "timestep": np.full(1, 500, np.float32)}


def running_bundle(folder: Path, *sets: str, experts: tuple[str, ...] = ()) -> Path:
    """A bundle whose engine runs, with a weights set of each name, each of other values."""
    small_bundle(folder)
    manifest = read_manifest(folder)
    (engine,) = manifest.engines
    graph = write_graph(folder / engine.files["denoiser"].path)
    weights: dict[str, WeightsRecord] = {}
    seeds = iter(range(100))
    (folder / manifest.weights["fp32"].file.path).unlink()
    (folder / "weights/fp32").rmdir()
    for name in sets:
        for expert in experts or ("",):
            record = weights_record(folder, name, expert, seed=next(seeds))
            weights[weights_label(name, expert, "fp32")] = record
    boundary = 0.9 if experts else None
    engine = replace(
        engine,
        files={"denoiser": file_record(folder, graph)},
        sampling=SamplingDefaults(4, 5.0, (5.0, 5.0), boundary, 16),
    )
    write_manifest(folder, replace(manifest, weights=weights, engines=(engine,), experts=experts))
    return folder


def weights_file(bundle: Path, name: str, expert: str = "") -> Path:
    """The file of a weights set."""
    return bundle / read_manifest(bundle).weights[weights_label(name, expert, "fp32")].file.path
