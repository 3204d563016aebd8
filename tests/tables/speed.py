"""Print the table of step times: ONNX Runtime against eager PyTorch on this CPU.

    python -m tests.tables.speed FOLDER

One run: fp32, random weights, each arm warmed up. Medians of 9 with minimum and maximum; the matrix
product that bounds them all is timed beside them.
"""

import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import onnxruntime
import torch

from wanexport.exporter.build import build
from wanexport.exporter.reference.diffusers import DiffusersEngine
from wanexport.exporter.reference.eager import EagerEngine
from wanexport.exporter.reference.inputs import forward_inputs
from wanexport.graphs.config import PRESETS, Preset
from wanexport.graphs.signature import forward_flops
from wanexport.graphs.weights import bundle_tensors
from wanexport.runtime import load
from wanexport.runtime.bundle.signature import parameter_shapes
from wanexport.runtime.wan_config import WanConfig

Call = Callable[[], object]

ROUNDS = 9
PAUSE = 0.5  # seconds, for the threads of the arm before
MODELS = {  # name -> config, resolution, frames
    "tiny": (PRESETS["tiny"].config, "64x96", 9),
    "tiny, larger video": (PRESETS["tiny"].config, "128x192", 17),
    "dim 1536, 4 layers": (WanConfig("t2v", 1536, 8960, 12, 4, 16, 16, 0), "256x256", 13),
}


def prepacked(graph: Path, weights: Path) -> onnxruntime.InferenceSession:
    """A session as ONNX Runtime makes it by default: weights copied and repacked."""
    options = onnxruntime.SessionOptions()
    folder = "session.model_external_initializers_file_folder_path"
    options.add_session_config_entry(folder, str(weights.parent))
    return onnxruntime.InferenceSession(
        graph.read_bytes(), options, providers=["CPUExecutionProvider"]
    )


def arms(config: WanConfig, resolution: str, frames: int, bundle: Path) -> dict[str, Call]:
    """One forward of each arm on the same inputs and weights."""
    with patch.dict(PRESETS, {"measured": Preset(config)}):
        build("measured", random_weights=0, resolution=resolution, frames=frames, output=bundle)
    denoiser = load(bundle)
    inputs = forward_inputs(config, denoiser.geometry, 812.0, 0)
    (weights,) = bundle.glob("weights/*/*")
    (graph,) = bundle.glob("engines/*/*/*.onnx")
    tensors = bundle_tensors(weights, {name: name for name in parameter_shapes(config)})
    eager = EagerEngine(config, denoiser.geometry, "fp32", tensors)
    diffusers = DiffusersEngine(config, denoiser.geometry, "fp32", tensors)
    session = prepacked(graph, weights)
    return {
        "mapped": lambda: denoiser(**inputs),
        "prepacked": lambda: session.run(None, inputs),
        "eager": lambda: eager(inputs),
        "diffusers": lambda: diffusers(inputs),
    }


def measure(calls: dict[str, Call]) -> dict[str, list[float]]:
    """Seconds of every call, one arm after the other.

    Not in turns: ONNX Runtime's threads spin for a while after a call, and would slow PyTorch's.
    """
    seconds: dict[str, list[float]] = {}
    for name, call in calls.items():
        time.sleep(PAUSE)
        call(), call()
        seconds[name] = [timed(call) for _ in range(ROUNDS)]
    return seconds


def timed(call: Call) -> float:
    """Seconds that one call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def row(name: str, config: WanConfig, resolution: str, frames: int, bundle: Path) -> str:
    """One model's line of the table."""
    seconds = measure(arms(config, resolution, frames, bundle))
    geometry = load(bundle).geometry
    medians = {arm: statistics.median(times) for arm, times in seconds.items()}
    cells = [
        f"{medians[arm] * 1e3:.4g} ({min(times) * 1e3:.4g} to {max(times) * 1e3:.4g})"
        for arm, times in seconds.items()
    ]
    rates = [forward_flops(config, geometry) / medians[arm] / 1e9 for arm in ("eager", "mapped")]
    return (
        f"| {name} | {geometry.num_tokens} | {' | '.join(cells)} | "
        f"{medians['eager'] / medians['mapped']:.2f} | {rates[0]:.0f}, {rates[1]:.0f} |"
    )


def products() -> str:
    """How fast this machine multiplies fp32 matrices, in two libraries: best of the rounds."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    x, y = a.numpy(), b.numpy()
    seconds = measure({"PyTorch": lambda: a @ b, "numpy": lambda: x @ y})
    return ", ".join(f"{n} {2 * 2048**3 / min(t) / 1e9:.0f}" for n, t in seconds.items())


def main(folder: Path) -> None:
    """Print the table in Markdown, milliseconds a forward."""
    titles = "model | tokens | mapped weights | prepacked | our graph, eager | diffusers, eager"
    print(f"| {titles} | eager / mapped | blocks, GFLOP/s: eager, mapped |\n{'|---' * 8}|")
    for name, model in MODELS.items():
        print(row(name, *model, folder / "bundle"), flush=True)
        shutil.rmtree(folder / "bundle")
    print(f"\n2048 x 2048 matrix product, GFLOP/s: {products()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
