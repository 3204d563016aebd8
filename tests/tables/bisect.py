"""Faults planted in one block of an engine, and the call that `compare --bisect` names.

    python -m tests.tables.bisect [cpu|cuda]        prints the table

Twenty seeds draw the engine, the block, the fault and its details; a clean engine of each kind
follows. The model has random weights, eight blocks and three latent frames of 4 x 6 tokens.
"""

import os
import platform
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
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
from wanexport.graphs.rope import axis_dims
from wanexport.runtime.bundle.manifest import EngineRecord, read_manifest
from wanexport.runtime.bundle.tensorfile import read_header
from wanexport.runtime.engines.aoti_regions import BoundCall, BoundRegions

LAYERS, HEAD_DIM, SEEDS = 8, 128, 20
SHAPE: dict[str, Any] = {"resolution": "64x96", "frames": 9}
ENGINES = {
    "cpu": (("onnx", "fp32"), ("onnx", "fp16"), ("aoti", "fp32"), ("aoti", "bf16")),
    "cuda": (("onnx", "fp32"), ("onnx", "bf16"), ("onnx", "fp16"), ("aoti", "bf16")),
}
KINDS = ("weight", "gate", "RoPE axis", "precision")
GATES = {"self-attention": 2, "feed-forward": 5}  # the rows of a block's modulation
LINEAR = ("self_attn.v", "self_attn.o", "cross_attn.v", "cross_attn.o", "ffn.0", "ffn.2")
Result = dict[str, Any]
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Fault:
    """A fault in one block of one engine; `detail` says where in the block."""

    backend: str
    dtype: str
    kind: str
    layer: int
    detail: str

    @property
    def words(self) -> str:
        """What it is, in words."""
        return {
            "weight": f"one row of {self.detail}.weight times 1.5",
            "gate": f"gate of {self.detail} times 1.01",
            "RoPE axis": f"no rotation along {self.detail}",
            "precision": f"{self.detail} rounded to bf16",
        }[self.kind]


def draw(seed: int, engines: tuple[tuple[str, str], ...]) -> Fault:
    """The fault of a seed."""
    rng = random.Random(seed)
    kind, (backend, dtype) = KINDS[seed % len(KINDS)], rng.choice(engines)
    details = {
        "weight": LINEAR,
        "gate": tuple(GATES),
        "RoPE axis": ("frames", "rows", "columns"),
        "precision": ("the modulation", "the block's input"),
    }
    return Fault(backend, dtype, kind, rng.randrange(LAYERS), rng.choice(details[kind]))


def make_bundle(
    folder: Path, engines: tuple[tuple[str, str], ...], device: str = "cpu", layers: int = LAYERS
) -> Path:
    """A small T2V checkpoint in folder/model, and its bundle of these engines."""
    config = small_config("t2v-1.3b", num_layers=layers)
    model = write_official(folder / "model", official_state(diffusers_model(config)), config)
    for backend, dtype in engines:
        build(
            str(model), **SHAPE, backends=[backend], dtype=dtype, device=device,
            output=folder / "bundle",
        )  # fmt: skip
    return folder / "bundle"


def bisected(bundle: Path, fault: Fault, **options: Any) -> Result:
    """Plant a fault in an engine of the bundle, and compare it."""
    kind: dict[str, Any] = {"backend": fault.backend, "dtype": fault.dtype, **options}
    if fault.kind == "weight":
        scale_row(bundle, fault)
        kind["model"] = str(bundle.parent / "model")  # it has the right weights
    elif fault.backend == "onnx":
        alter_block(bundle, fault)
    is_opened_faulty = fault.backend == "aoti" and fault.kind != "weight"
    with in_layer(fault) if is_opened_faulty else nullcontext():
        return compare(bundle, steps=1, bisect=True, **kind)


def scale_row(bundle: Path, fault: Fault) -> None:
    """Scale the first row of a weight of one block, in the file that engines read."""
    manifest = read_manifest(bundle)
    engine = engine_of(bundle, fault)
    key, record = next((k, w) for k, w in manifest.weights.items() if w.layout == engine.layout)
    path = bundle / record.file.path
    entry = read_header(path)[f"blocks.{fault.layer}.{fault.detail}.weight"]
    with path.open("r+b") as file:
        file.seek(entry.offset)
        row = torch.frombuffer(
            bytearray(file.read(entry.size // entry.shape[0])), dtype=_DTYPES[entry.dtype]
        )
        file.seek(entry.offset)
        file.write((1.5 * row).view(torch.uint8).numpy().tobytes())
    altered = replace(record, file=file_record(bundle, path))
    write_manifest(bundle, replace(manifest, weights={**manifest.weights, key: altered}))


def engine_of(bundle: Path, fault: Fault) -> EngineRecord:
    """The engine that a fault is in."""
    wanted = (fault.backend, fault.dtype)
    return next(e for e in read_manifest(bundle).engines if (e.backend, e.dtype) == wanted)


def alter_block(bundle: Path, fault: Fault) -> None:
    """Have one layer of an ONNX graph call a faulty copy of the block."""
    engine = engine_of(bundle, fault)
    path = bundle / engine.files["denoiser"].path
    model = onnx.load(path, load_external_data=False)
    faulty = model.functions.add()
    faulty.CopyFrom(next(f for f in model.functions if f.name == "block"))
    faulty.name = "faulty_block"
    plant(faulty, fault)
    calls = [node for node in model.graph.node if node.op_type == "block"]
    calls[fault.layer].op_type = faulty.name
    path.write_bytes(model.SerializeToString())
    manifest = read_manifest(bundle)
    altered = replace(engine, files={"denoiser": file_record(bundle, path)})
    engines = tuple(altered if e == engine else e for e in manifest.engines)
    write_manifest(bundle, replace(manifest, engines=engines))


def plant(block: onnx.FunctionProto, fault: Fault) -> None:
    """Change the nodes of a block."""
    if fault.kind == "gate":
        slices = [node for node in block.node if node.op_type == "Slice"]
        change(block, slices[GATES[fault.detail]].output[0], [("Mul", np.float32(1.01))])
    elif fault.kind == "RoPE axis":
        kept = rotated(fault).numpy()
        change(block, "cos", [("Mul", kept), ("Add", 1 - kept)])
        change(block, "sin", [("Mul", kept)])
    else:
        name = "modulation" if fault.detail == "the modulation" else "x"
        change(block, name, [("Cast", TensorProto.BFLOAT16), ("Cast", TensorProto.FLOAT)])


def change(block: onnx.FunctionProto, name: str, steps: list[tuple[str, Any]]) -> None:
    """Have all that reads a value read what some nodes make of it."""
    nodes, last = [], name
    for number, (operator, value) in enumerate(steps):
        new = f"{name}_faulty_{number}"
        if operator == "Cast":
            nodes.append(helper.make_node("Cast", [last], [new], to=value))
        else:
            constant = numpy_helper.from_array(np.asarray(value, np.float32))
            nodes.append(helper.make_node("Constant", [], [f"{new}_by"], value=constant))
            nodes.append(helper.make_node(operator, [last, f"{new}_by"], [new]))
        last = new
    for node in block.node:
        node.input[:] = [last if own == name else own for own in node.input]
    made = [i for i, node in enumerate(block.node) if name in node.output]
    for offset, node in enumerate(nodes):
        block.node.insert((made[0] + 1 if made else 0) + offset, node)


def rotated(fault: Fault) -> Tensor:
    """1 for each pair that is turned, 0 for those of the axis that is not: [1, 1, 1, pairs]."""
    axes = ("frames", "rows", "columns")
    pairs = [size // 2 for size in axis_dims(HEAD_DIM)]
    kept = [float(axis != fault.detail) for axis, n in zip(axes, pairs) for _ in range(n)]
    return torch.tensor(kept).reshape(1, 1, 1, -1)


@contextmanager
def in_layer(fault: Fault) -> Iterator[None]:
    """Open AOTInductor engines so that one layer of their block is given something else."""
    opened = BoundRegions.__init__

    def open_faulty(self: BoundRegions, *arguments: Any) -> None:
        opened(self, *arguments)
        calls = self.regions.program.calls
        number = [call.name for call in calls].index("block")
        call, bound = calls[number], self.layers()[number][fault.layer]
        own, first = self.calls[call.when], len(call.parameters)
        place = next(i for i, layer in enumerate(own) if layer is bound)
        reads = {name: first + i for i, name in enumerate(call.reads)}
        own[place] = bound._replace(run=faulty(bound, fault, reads))

    with patch.object(BoundRegions, "__init__", open_faulty):
        yield


def faulty(layer: BoundCall, fault: Fault, reads: dict[str, int]) -> Callable[..., Any]:
    """A layer's function, given other arguments; reads has the place of each of them."""

    def altered(arguments: list[Tensor]) -> list[Tensor]:
        own, kept = list(arguments), rotated(fault).to(arguments[0].device)
        if fault.kind == "gate":
            row = GATES[fault.detail]
            gate = own[0][:, row] + own[reads["modulation"]][:, row]
            own[0] = own[0].clone()
            own[0][:, row] += 0.01 * gate
        elif fault.kind == "RoPE axis":
            own[reads["cos"]] = own[reads["cos"]] * kept + (1 - kept)
            own[reads["sin"]] = own[reads["sin"]] * kept
        elif fault.kind == "precision":
            name = "modulation" if fault.detail == "the modulation" else "x"
            own[reads[name]] = own[reads[name]].bfloat16().float()
        return own

    return lambda arguments: layer.run(altered(arguments))


def row(fault: Fault, result: Result) -> str:
    """A line of the table."""
    bisect = result["bisect"]
    call = next(c for c in bisect["calls"] if c["call"] == f"block {fault.layer}")
    inside = (bisect["nodes"] or {}).get("first")
    node = f"{inside['value']} ({', '.join(inside['operators'])})" if inside else "-"
    verdict = "fails" if not result["passed"] else "passes"
    return (
        f"| {fault.backend} {fault.dtype} | {fault.words} | {fault.layer} | "
        f"{call['error'] / call['gate']:.3g} | {verdict} | {bisect['first']} | {node} |"
    )


def main(device: str) -> None:
    """Print the table in Markdown, and how many faults were located."""
    cpu = f"{os.cpu_count()} cores, {platform.machine()}"
    machine = torch.cuda.get_device_name() if device == "cuda" else cpu
    print(f"{machine}, PyTorch {torch.__version__}\n")
    print("| engine | fault | block | its error / gate | the step | named | first node |")
    print("|---|---|---|---|---|---|---|")
    located = 0
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        make_bundle(base, ENGINES[device], device)
        for seed in range(SEEDS):
            fault = draw(seed, ENGINES[device])
            copy = Path(shutil.copytree(base, Path(name) / "copy"))
            result = bisected(copy / "bundle", fault, device=device)
            shutil.rmtree(copy)
            located += result["bisect"]["first"] == f"block {fault.layer}"
            print(row(fault, result), flush=True)
        for backend, dtype in ENGINES[device]:
            clean = compare(
                base / "bundle", backend=backend, dtype=dtype, device=device, steps=1, bisect=True
            )
            print(f"| {backend} {dtype} | none | - | - | passes | {clean['bisect']['first']} | - |")
    print(f"\n{located} of {SEEDS} located")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cpu")
