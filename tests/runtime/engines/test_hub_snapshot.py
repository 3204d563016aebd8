"""A bundle that travelled: out of the hub's cache, moved, linked and read-only, it is the same."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from tests.quick import slow_but
from tests.runtime.engines.hub_layout import as_snapshot
from tests.runtime.test_load import inputs
from wanexport.exporter.inspection import inspect
from wanexport.graphs.config import PRESETS
from wanexport.runtime import Geometry, load
from wanexport.runtime.bundle.signature import program_of
from wanexport.runtime.engines.onnx_gpu import open_engines
from wanexport.runtime.engines.onnx_providers import Provider
from wanexport.runtime.program import WHOLE

CPU = torch.device("cpu")
PROGRAM = program_of(PRESETS["tiny"].config, Geometry(64, 96, 9)).whole()
GRAPH, WEIGHTS = "engines/64x96x9/onnx-fp32/denoiser.onnx", "weights/fp32/denoiser.safetensors"
MEMORY = """
import json, sys
from pathlib import Path
from wanexport.runtime.engines.onnx import OnnxSession
def anonymous():
    (line,) = [l for l in open("/proc/self/status") if l.startswith("RssAnon")]
    return int(line.split()[1]) * 1024
session = OnnxSession(Path(sys.argv[1]), Path(sys.argv[2]))
import numpy as np
(y,) = session({"x": np.ones((1, 2), np.float32)})
print(json.dumps({"anonymous": anonymous(), "sum": float(y.sum())}))
"""


@pytest.fixture(scope="module")
def velocity(tiny_bundle: Path) -> dict[str, np.ndarray]:
    return {dtype: load(tiny_bundle, dtype=dtype)(**inputs()) for dtype in ("fp32", "fp16")}


@pytest.mark.parametrize("dtype", slow_but(["fp32", "fp16"], "fp32"))
@pytest.mark.parametrize("how", ["cached", "moved", "linked", "read-only", "weights linked"])
def test_a_bundle_that_travelled_gives_the_same(
    how: str, dtype: str, tiny_bundle: Path, velocity: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """Root may write where nobody may: for root, read-only shows that modes are no obstacle."""
    snapshot = as_snapshot(tiny_bundle, tmp_path / "cache")
    if how == "moved":
        parts = snapshot.relative_to(tmp_path / "cache")
        snapshot = (tmp_path / "cache").rename(tmp_path / "elsewhere") / parts
    elif how == "linked":
        (tmp_path / "link").symlink_to(snapshot)
        snapshot = tmp_path / "link"
    elif how == "read-only":
        for path in (tmp_path / "cache").rglob("*"):
            if not path.is_symlink():
                path.chmod(0o555 if path.is_dir() else 0o444)
    elif how == "weights linked":  # as one does whose disk is small
        snapshot = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
        (snapshot / "weights").rename(tmp_path / "big disk")
        (snapshot / "weights").symlink_to(tmp_path / "big disk")
    np.testing.assert_array_equal(load(snapshot, dtype=dtype)(**inputs()), velocity[dtype])
    assert inspect(snapshot, verify=True)["problems"] == []


def test_the_engine_of_a_gpu_reads_it_too(
    tiny_bundle: Path, velocity: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """With ONNX Runtime's provider for a CPU in the place of that for a GPU."""
    snapshot = as_snapshot(tiny_bundle, tmp_path)
    files = {"": snapshot / WEIGHTS}
    engines = open_engines({WHOLE: snapshot / GRAPH}, files, CPU, Provider("cpu"), PROGRAM)
    given = {name: torch.from_numpy(array) for name, array in inputs().items()}
    np.testing.assert_array_equal(engines[""](given).numpy(), velocity["fp32"])


def test_weights_in_the_hubs_cache_are_mapped(tmp_path: Path) -> None:
    """A matrix of 256 MiB, of which the last element is 5: the session holds none of it."""
    rows, columns = 2, 1 << 25
    with (tmp_path / "blob").open("wb") as file:
        file.truncate(4 * rows * columns)
        file.seek(-4, 2)
        file.write(np.float32(5).tobytes())
    (tmp_path / "snapshot").mkdir()
    weights = tmp_path / "snapshot" / "denoiser.safetensors"
    weights.symlink_to("../blob")
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[rows, columns])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", weights.name), ("offset", "0"), ("length", str(1 << 28))):
        tensor.external_data.add(key=key, value=value)
    last = helper.make_tensor("last", TensorProto.INT64, [1], [columns - 1])
    nodes = [
        helper.make_node("Gather", ["w", "last"], ["column"], axis=1),
        helper.make_node("MatMul", ["x", "column"], ["y"]),
    ]
    shapes = {"x": [1, 2], "y": [1, 1]}
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items())
    graph = helper.make_graph(nodes, "g", [x], [y], initializer=[tensor, last])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.save(model, tmp_path / "graph.onnx")
    child = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "graph.onnx"), str(weights)],
        capture_output=True,
        text=True,
        check=True,
    )
    figures = json.loads(child.stdout)
    assert figures["sum"] == 5
    assert figures["anonymous"] <= 100e6
