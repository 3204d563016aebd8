"""The speed of one engine as two checkouts of this repository build, load and run it on a GPU.

    python -m tests.tables.two_commits FOLDER CHECKOUT CHECKOUT [BACKEND PRESET RESOLUTION FRAMES]

FOLDER gets a bundle of each; random weights, bf16, AOTInductor unless another is named. Every
figure is of a fresh process, the checkouts taking turns: seconds from the start to the first step,
of `load` alone, and the median of a forward in ms; beside them the matrix product of the same
moment in TFLOP/s.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_ROUNDS = 4
_MEASURE = """
import json, statistics, sys, time
started = time.perf_counter()
import numpy as np
from wanexport.runtime import load
opening = time.perf_counter()
options = {"attention": "cudnn"} if sys.argv[2] == "aoti" else {}
denoiser = load(sys.argv[1], device="cuda", **options)
loaded = time.perf_counter()
import torch
rng = np.random.default_rng(0)
inputs = {n: torch.from_numpy(rng.standard_normal(s.shape, np.float32)).cuda()
          for n, s in denoiser.inputs.items() if n != "timestep"}
first = denoiser(timestep=500.0, **inputs)
torch.cuda.synchronize()
figures = {"to first step": time.perf_counter() - started, "load": loaded - opening}
def median(call, rounds):
    times = []
    for _ in range(rounds):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        a.record(); call(); b.record(); b.synchronize()
        times.append(a.elapsed_time(b))
    return statistics.median(times[2:])
figures["forward ms"] = median(lambda: denoiser(timestep=500.0, **inputs), 11)
m = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
figures["product TFLOP/s"] = 2 * 8192**3 / median(lambda: m @ m, 22) / 1e9
figures["card"] = torch.cuda.get_device_name()
import hashlib
figures["md5"] = hashlib.md5(first.cpu().numpy().tobytes()).hexdigest()
print(json.dumps(figures))
"""


def run(checkout: Path, arguments: Sequence[str]) -> str:
    """What a process that imports this checkout prints."""
    environment = {**os.environ, "PYTHONPATH": str(checkout / ".typing")}
    (checkout / ".typing").mkdir(exist_ok=True)
    link = checkout / ".typing" / "wanexport"
    if not link.exists():
        link.symlink_to(checkout, target_is_directory=True)
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{checkout}: {done.stderr[-2000:]}")
    return done.stdout


def main(
    folder: str,
    first: str,
    second: str,
    backend: str = "aoti",
    preset: str = "t2v-1.3b",
    resolution: str = "480x832",
    frames: str = "81",
) -> None:
    """Print a line for each process."""
    checkouts = [Path(first).resolve(), Path(second).resolve()]
    bundles = [Path(folder).resolve() / f"bundle{number}" for number in range(2)]
    for checkout, bundle in zip(checkouts, bundles):
        options = ["--random-weights", "0", "--resolution", resolution, "--frames", frames]
        options += ["--device", "cuda"]
        build = ["-m", "wanexport.exporter.cli.main", "build", "-m", preset, *options]
        run(checkout, [*build, "--backend", backend, "--dtype", "bf16", "-o", str(bundle)])
    for _ in range(_ROUNDS):
        for checkout, bundle in zip(checkouts, bundles):
            figures = json.loads(
                run(checkout, ["-c", _MEASURE, str(bundle), backend]).splitlines()[-1]
            )
            print(checkout.name, figures, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
