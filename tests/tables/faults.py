"""Faults that `compare` must catch, planted in a bundle or in the graph's code.

    python -m tests.tables.faults        prints the table

Each fault takes a bundle of its own, built from a checkpoint, and returns compare's result.
"""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import onnx.inliner
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from tests.oracles.wan_reference import (
    diffusers_model,
    official_state,
    small_config,
    write_official,
)
from wanexport.exporter.build import build
from wanexport.exporter.bundle.writer import file_record, write_manifest
from wanexport.exporter.compare.compare import compare
from wanexport.graphs import wan as graph
from wanexport.graphs.rope import apply_rope
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.bundle.tensorfile import read_array, read_header

Result = dict[str, Any]
Fault = Callable[[Path], Result]  # plants it in a bundle and compares
SHAPE = {"resolution": "64x96", "frames": 9}


def make_bundle(folder: Path) -> Path:
    """A small T2V checkpoint in folder/model, and its bundle in fp32 and fp16."""
    config = small_config("t2v-1.3b")
    model = write_official(folder / "model", official_state(diffusers_model(config)), config)
    for dtype in ("fp32", "fp16"):
        build(str(model), **SHAPE, dtype=dtype, output=folder / "bundle")  # type: ignore[arg-type]
    return folder / "bundle"


def alter_graph(bundle: Path, change: Callable[[onnx.ModelProto], None], dtype: str) -> None:
    """Alter an engine, without functions, and make the manifest agree, as a faulty build would."""
    manifest = read_manifest(bundle)
    engine = next(e for e in manifest.engines if e.dtype == dtype)
    path = bundle / engine.files["denoiser"].path
    model = onnx.inliner.inline_local_functions(onnx.load(path, load_external_data=False))
    change(model)
    path.write_bytes(model.SerializeToString())
    altered = replace(engine, files={"denoiser": file_record(bundle, path)})
    engines = tuple(altered if e == engine else e for e in manifest.engines)
    write_manifest(bundle, replace(manifest, engines=engines))


def alter_weight(bundle: Path, name: str, change: Callable[[np.ndarray], None]) -> None:
    """Alter one fp32 tensor and make the manifest agree, as a faulty conversion would."""
    manifest = read_manifest(bundle)
    record = manifest.weights["fp32"]
    path = bundle / record.file.path
    entry = read_header(path)[name]
    array = read_array(path, entry).copy()
    change(array)
    with path.open("r+b") as file:
        file.seek(entry.offset)
        file.write(array.tobytes())
    altered = replace(record, file=file_record(bundle, path))
    write_manifest(bundle, replace(manifest, weights={**manifest.weights, "fp32": altered}))


def scale_tensor(array: np.ndarray) -> None:
    array *= 1.01


def scale_largest(array: np.ndarray) -> None:
    array.flat[np.abs(array).argmax()] *= 1.01


def drop_row_rope(model: onnx.ModelProto) -> None:
    """No rotation along the 4 rows: cos of their 21 pairs becomes 1 and sin 0."""
    constants = [node for node in model.graph.node if node.op_type == "Constant"]
    tensors = [node.attribute[0].t for node in constants]
    (tensor,) = (t for t in tensors if list(t.dims) == [2, 4, 21])
    table = numpy_helper.to_array(tensor).copy()
    table[0], table[1] = 1, 0
    tensor.CopyFrom(numpy_helper.from_array(table, tensor.name))


def swap_gate_and_shift(model: onnx.ModelProto) -> None:
    """Exchange the first and the third slice of the first block's modulation."""
    slices = [node for node in model.graph.node if node.op_type == "Slice"]
    first = [node for node in slices if node.input[0] == slices[0].input[0]]
    first[0].input[1], first[2].input[1] = first[2].input[1], first[0].input[1]
    first[0].input[2], first[2].input[2] = first[2].input[2], first[0].input[2]


def modulate_in_bf16(model: onnx.ModelProto) -> None:
    """Round every block's modulation, time included, to bf16."""
    for node in [n for n in model.graph.node if n.op_type == "Add"]:
        if any(name.endswith("modulation") for name in node.input):
            (out,) = node.output
            node.output[0] = f"{out}_fp32"
            index = list(model.graph.node).index(node)
            down = helper.make_node(
                "Cast", [f"{out}_fp32"], [f"{out}_bf16"], to=TensorProto.BFLOAT16
            )
            up = helper.make_node("Cast", [f"{out}_bf16"], [out], to=TensorProto.FLOAT)
            model.graph.node.insert(index + 1, down)
            model.graph.node.insert(index + 2, up)


def coarser_epsilon(model: onnx.ModelProto) -> None:
    """LayerNorm with eps 1e-3 in place of 1e-6."""
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "LayerNormalization" and attribute.name == "epsilon":
                attribute.f = 1e-3


_apply_rope, _Modulation = apply_rope, graph.Modulation


def rope_without_rows(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rows = slice(22, 43)
    still = [
        torch.cat([t[..., :22], full(t[..., rows]), t[..., 43:]], -1)
        for t, full in ((cos, torch.ones_like), (sin, torch.zeros_like))
    ]
    return _apply_rope(x, *still)


def swapped_modulation(shift: Tensor, scale: Tensor, gate: Tensor) -> graph.Modulation:
    return _Modulation(shift=gate, scale=scale, gate=shift)


def unharmed(bundle: Path) -> Result:
    return compare(bundle, dtype="fp32")


def in_graph(change: Callable[[onnx.ModelProto], None], dtype: str = "fp32") -> Fault:
    def plant(bundle: Path) -> Result:
        alter_graph(bundle, change, dtype)
        return compare(bundle, dtype=dtype)

    return plant


def in_weights(name: str, change: Callable[[np.ndarray], None]) -> Fault:
    def plant(bundle: Path) -> Result:
        alter_weight(bundle, name, change)
        return compare(bundle, dtype="fp32", model=str(bundle.parent / "model"))

    return plant


def in_code(name: str, fault: object, dtype: str = "fp32") -> Fault:
    """Build with the graph's code patched, the proof left out, and compare under the same patch."""

    def plant(bundle: Path) -> Result:
        proof = {"method": "none", "blocks": 0, "tokens": 0, "error": 0.0, "gate": 0.0}
        source, faulty = bundle.parent / "model", bundle.parent / "faulty"
        with (
            patch.object(graph, name, fault),
            patch("wanexport.exporter.backends.onnx.backend.prove") as prove,
        ):
            prove.return_value = proof
            build(str(source), **SHAPE, dtype=dtype, output=faulty)  # type: ignore[arg-type]
            return compare(faulty, reference="diffusers")

    return plant


QUERY = "blocks.1.self_attn.q.weight"
FAULTS: dict[str, Fault] = {
    "one weight tensor times 1.01, against the checkpoint": in_weights(QUERY, scale_tensor),
    "one element of it times 1.01, against the checkpoint": in_weights(QUERY, scale_largest),
    "gate and shift swapped in the ONNX graph": in_graph(swap_gate_and_shift),
    "gate and shift swapped in our code, against diffusers": in_code(
        "Modulation", swapped_modulation
    ),
    "RoPE of the rows dropped in the ONNX graph": in_graph(drop_row_rope),
    "RoPE of the rows dropped in our code, against diffusers": in_code(
        "apply_rope", rope_without_rows
    ),
    "modulation rounded to bf16, fp32 engine": in_graph(modulate_in_bf16),
    "modulation rounded to bf16, fp16 engine": in_graph(modulate_in_bf16, "fp16"),
    "LayerNorm with eps 1e-3, fp32 engine": in_graph(coarser_epsilon),
}


def error_over_gate(result: Result) -> float:
    """The largest error of a step over its gate."""
    return max(row["error"] / row["gate"] for row in result["steps"])


def main() -> None:
    """Print the table in Markdown, the unharmed bundle first."""
    print("| fault | error / gate | compare |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        make_bundle(base)
        for title, plant in {"none": unharmed, **FAULTS}.items():
            copy = Path(shutil.copytree(base, Path(name) / "copy"))
            result = plant(copy / "bundle")
            shutil.rmtree(copy)
            verdict = "passes" if result["passed"] else "fails"
            print(f"| {title} | {error_over_gate(result):.3g} | {verdict} |", flush=True)


if __name__ == "__main__":
    main()
