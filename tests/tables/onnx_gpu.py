"""Print the table of ONNX Runtime on a GPU: which attention it runs, time and memory.

    python -m tests.tables.onnx_gpu BUNDLE

One forward of the graph of the bundle's ONNX engine in bf16, with the weights of its first expert,
for each variant in a process of its own: with ONNX's attention operator, and ONNX Runtime's own.
A variant that fails says why, and the others go on.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wanexport.exporter.backends.onnx.assemble import assemble
from wanexport.exporter.backends.onnx.lower import for_onnx_runtime, lower, serialize
from wanexport.exporter.reference.inputs import forward_inputs
from wanexport.exporter.reference.parity import relative_l2
from wanexport.runtime.bundle.manifest import EngineRecord, read_manifest
from wanexport.runtime.bundle.signature import weights_layout
from wanexport.runtime.engines.device import to_device
from wanexport.runtime.engines.device_weights import device_weights
from wanexport.runtime.engines.onnx_gpu import OnnxGpuSession
from wanexport.runtime.engines.onnx_providers import Provider
from wanexport.runtime.family import family_of

ROUNDS, TIMEOUT = 5, 60
VARIANTS = {  # attention of the graph, and ONNX Runtime's switches
    "Attention": ("native", {}),
    "MultiHeadAttention": ("mha", {}),
    "MultiHeadAttention, cuDNN": ("mha", {"ORT_ENABLE_CUDNN_FLASH_ATTENTION": "1"}),
    "Attention, no flash": ("native", {"ORT_DISABLE_FLASH_ATTENTION": "1"}),
}
TITLES = (
    "attention | session, s | first call, s | forward, ms | GPU memory, GB | of it weights | "
    "nodes on CUDA | difference from the first"
)


def engine_of(bundle: Path) -> EngineRecord:
    """The bundle's ONNX engine in bf16."""
    engines = read_manifest(bundle).engines
    return next(e for e in engines if (e.backend, e.dtype) == ("onnx", "bf16"))


def write_graphs(bundle: Path, folder: Path) -> dict[str, Path]:
    """The engine's graph with each attention, as a build lowers it."""
    engine = engine_of(bundle)
    config = read_manifest(bundle).config
    layout = weights_layout(config, "bf16")[1]
    paths = {attention: folder / f"{attention}.onnx" for attention in ("native", "mha")}
    for attention, path in paths.items():
        how = for_onnx_runtime("bf16", attention)
        lowered = lower(family_of(config).graph, config, engine.geometry, how)
        path.write_bytes(serialize(assemble(lowered, layout)))
    return paths


def used_bytes() -> int:
    """GPU memory in use by all that runs there."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def timed(session: OnnxGpuSession, inputs: dict[str, torch.Tensor]) -> float:
    """Milliseconds of one forward, on the GPU's clock."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    session(inputs)
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after)


def measure(bundle: Path, graph: Path, velocity: Path) -> dict[str, Any]:
    """One variant's figures; its velocity goes to a file."""
    engine, manifest = engine_of(bundle), read_manifest(bundle)
    device = torch.device("cuda", 0)
    torch.zeros(1, device=device)
    idle = used_bytes()
    file = bundle / manifest.weights_of(engine.layout)[0].file.path
    weights = device_weights(file, device)
    started = time.perf_counter()
    session = OnnxGpuSession(graph, file, weights.tensors, device, Provider())
    opened = time.perf_counter()
    arrays = forward_inputs(manifest.config, engine.geometry, 812.0, 0)
    inputs = {name: to_device(array, device) for name, array in arrays.items()}
    (first,) = session(inputs)
    torch.cuda.synchronize()
    called = time.perf_counter()
    np.save(velocity, first.cpu().numpy())
    session(inputs)
    times = [timed(session, inputs) for _ in range(ROUNDS)]
    on_cuda = sum(n for (provider, _), n in session.assigned.items() if provider[:4] == "CUDA")
    return {
        "opened": opened - started,
        "first": called - opened,
        "times": times,
        "bytes": used_bytes() - idle,
        "weights": weights.buffer.numel(),
        "nodes": f"{on_cuda} of {session.assigned.total()}",
        "on_host": {op: n for (p, op), n in session.assigned.items() if p[:3] == "CPU"},
    }


def run(bundle: Path, graph: Path, velocity: Path, switches: dict[str, str]) -> dict[str, Any]:
    """The figures of one variant. Raises RuntimeError with the last words of one that failed."""
    command = [sys.executable, "-m", "tests.tables.onnx_gpu", *map(str, (bundle, graph, velocity))]
    try:
        child = subprocess.run(
            command,
            env={**os.environ, **switches},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"it took over {TIMEOUT} s") from error
    if child.returncode:
        raise RuntimeError(" / ".join(child.stderr.strip().splitlines()[-2:]))
    result: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return result


def row(name: str, figures: dict[str, Any], difference: float) -> str:
    """One variant's line of the table."""
    times = figures["times"]
    cells = (
        name,
        f"{figures['opened']:.1f}",
        f"{figures['first']:.2f}",
        f"{statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f})",
        f"{figures['bytes'] / 1e9:.2f}",
        f"{figures['weights'] / 1e9:.2f}",
        figures["nodes"] + (f"; CPU: {figures['on_host']}" if figures["on_host"] else ""),
        f"{difference:.1e}",
    )
    return f"| {' | '.join(cells)} |"


def main(bundle: Path) -> None:
    """Print the table in Markdown."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        graphs = write_graphs(bundle, folder)
        print(f"{engine_of(bundle).name} on {torch.cuda.get_device_name()}\n")
        print(f"| {TITLES} |\n{'|---' * 8}|", flush=True)
        reference = None
        for number, (variant, (attention, switches)) in enumerate(VARIANTS.items()):
            velocity = folder / f"{number}.npy"
            try:
                figures = run(bundle, graphs[attention], velocity, switches)
            except RuntimeError as error:
                print(f"| {variant} | failed: {error} |", flush=True)
                continue
            array = np.load(velocity)
            reference = array if reference is None else reference
            print(row(variant, figures, relative_l2(array, reference)), flush=True)


if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[1:]]
    if len(paths) == 1:
        main(*paths)
    else:
        print(json.dumps(measure(*paths)))
