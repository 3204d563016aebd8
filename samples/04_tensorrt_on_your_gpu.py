"""Build a TensorRT engine for your GPU, compare and measure it, and print a report for an issue.

    python samples/04_tensorrt_on_your_gpu.py FOLDER
    python samples/04_tensorrt_on_your_gpu.py FOLDER --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers \\
        --resolution 480x832 --frames 81

Without a model it is a tiny one with random weights. The exit code is 0 when the engine passed, 1
when it did not, and 2 when something is missing or refused, which one line then says.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from wanexport.exporter.bench.bench import bench
from wanexport.exporter.build import build
from wanexport.exporter.compare.compare import compare
from wanexport.runtime import WanExportError, load
from wanexport.runtime.engines.tensorrt import TensorRtEngine
from wanexport.runtime.engines.tensorrt_library import FLAVOURS
from wanexport.runtime.engines.tensorrt_target import versions


def choose_backend(named: str | None) -> str:
    """The flavour named, or the first that can run here.

    Raises WanExportError with what is missing, for each where none is named.
    """
    missing = []
    for backend in [named] if named else FLAVOURS:
        try:
            versions(backend)
        except WanExportError as error:
            missing.append(str(error))
        else:
            return backend
    raise WanExportError("; ".join(missing))


def report(bundle: Path, backend: str, options: dict[str, Any]) -> bool:
    """Build, compare and measure; print a line of Markdown for each finding."""
    record = build(output=bundle, backends=[backend], device="cuda", dtype="bf16", **options)
    # The folder may hold engines of other shapes and GPUs already.
    chosen: dict[str, Any] = {name: options[name] for name in ("resolution", "frames")}
    chosen["dtype"] = "bf16"
    denoiser = load(bundle, backend=backend, **chosen)
    engine = denoiser.record
    print(f"* engine: {engine.name}, {engine.target}, built in {record['seconds']} s")
    print(f"* plan: {engine.files['denoiser'].size / 1e6:.1f} MB; {engine.build}")
    print(f"* proof: {engine.proof}")

    opened = next(iter(denoiser.engines.values()))
    assert isinstance(opened, TensorRtEngine)
    graph = "replayed from a CUDA graph" if opened.graph else "launched"
    print(f"* device memory: {opened.device_memory} bytes; {graph}")
    del denoiser, opened  # free the GPU for what follows

    compared = compare(bundle, backend=backend, **chosen)
    for step in compared["steps"]:
        print(f"* step {step['step']}: error {step['error']:.1e}, gate {step['gate']:.1e}")
    print(f"* comparison: {'passed' if compared['passed'] else 'FAILED'}")

    measured = bench(bundle, arms=[backend, "graph"], **chosen)
    print(f"* machine: {measured['machine']}, {measured['peak'] / 1e12:.0f} TFLOP/s at most")
    for arm in measured["arms"]:
        times = ", ".join(f"{name} {1e3 * arm[name]:.4g} ms" for name in ("median", "min", "max"))
        name = "eager PyTorch" if arm["arm"] == "graph" else arm["arm"]
        print(f"* {name}: {times}, {arm['percent_of_floor']:.3g} % of the peak")
    for arm, reason in measured["failed"].items():
        print(f"* {arm}: not measured, {reason}")
    return bool(compared["passed"])


def main() -> int:
    """Read the command line, print the report, and return the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backend", choices=FLAVOURS)
    parser.add_argument("--model")
    parser.add_argument("--resolution", default="64x96")
    parser.add_argument("--frames", type=int, default=9)
    given = parser.parse_args()
    options = {"model": given.model, "resolution": given.resolution, "frames": given.frames}
    if given.model is None:
        options |= {"model": "tiny", "random_weights": 0}
    try:
        backend = choose_backend(given.backend)
        return 0 if report(given.folder / "bundle", backend, options) else 1
    except WanExportError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
