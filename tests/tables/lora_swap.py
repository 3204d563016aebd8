"""Print what LoRAs and weights sets of a model of full size cost: on disk, in memory, at a forward.

    python -m tests.tables.lora_swap FOLDER [PRESET RESOLUTION FRAMES]

FOLDER gets a bundle of random weights in bf16 and a LoRA set beside it: 58 GB for `t2v-14b`, the
default. The LoRAs have rank 64 and change every linear layer and bias of the blocks. On a machine
without a GPU the engine is ONNX's, which cannot run bf16 there: `add` alone is measured.
"""

import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.oracles.lora_files import write_lora
from wanexport.graphs.config import PRESETS
from wanexport.runtime import Denoiser, load
from wanexport.runtime.bundle.signature import parameter_shapes, weights_layout
from wanexport.runtime.lora.merge import LoraStack

RANK, ROUNDS = 64, 7
GPU = torch.cuda.is_available()


def command(*words: object) -> tuple[dict[str, Any], float]:
    """What a command of wanexport prints as JSON, and its seconds."""
    line = [sys.executable, "-m", "wanexport.exporter.cli.main", *map(str, words), "--json"]
    started = time.perf_counter()
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout), time.perf_counter() - started


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call and of what it left on the GPU."""
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - started


class Forward:
    """Forwards of one denoiser on the same inputs."""

    def __init__(self, denoiser: Denoiser) -> None:
        rng = np.random.default_rng(0)
        self.denoiser = denoiser
        self.inputs = {
            name: torch.from_numpy(rng.standard_normal(spec.shape, np.float32)).cuda()
            for name, spec in denoiser.inputs.items()
            if name != "timestep"
        }

    def __call__(self) -> torch.Tensor:
        velocity: torch.Tensor = self.denoiser(timestep=500.0, **self.inputs)
        return velocity

    def median(self) -> float:
        """Seconds, after two that are not counted."""
        return statistics.median([timed(self) for _ in range(ROUNDS + 2)][2:])

    def md5(self) -> str:
        return hashlib.md5(self().cpu().numpy().tobytes()).hexdigest()[:12]


def product_rate() -> float:
    """TFLOP/s of a bf16 matrix product of 8192."""
    m = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    seconds = [timed(lambda: m @ m) for _ in range(22)][2:]
    return 2 * 8192**3 / statistics.median(seconds) / 1e12


def measure_swaps(bundle: Path, loras: list[Path]) -> None:
    """Print how long a resident model takes to change, and its forward with each set."""
    started = time.perf_counter()
    forward = Forward(load(bundle))
    print(f"load {time.perf_counter() - started:.2f} s")
    use = forward.denoiser.use
    forward.md5()
    rows: list[tuple[str, Callable[[], object]]] = [
        ("base", lambda: None),
        ("set from disk cache", lambda: use("style")),
        ("base from disk cache", lambda: use("base")),
        ("LoRA in memory, on base", lambda: use(lora=[loras[0]])),
        ("another, in its place", lambda: use(lora=[loras[1]])),
        ("base, in its place", lambda: use("base")),
        ("two LoRAs, on base", lambda: use(lora=[(loras[0], 0.5), (loras[1], -0.5)])),
    ]
    for what, change in rows:
        seconds = timed(change)
        print(f"{what:26} {seconds:6.2f} s; forward {forward.median():.4f} s, md5 {forward.md5()}")
    peak = torch.cuda.max_memory_allocated() / 1e9
    print(f"peak GPU memory of PyTorch {peak:.1f} GB; product {product_rate():.0f} TFLOP/s")
    print(torch.cuda.get_device_name())


def main(folder: Path, preset: str, resolution: str, frames: str) -> None:
    """Print one line for each thing that is measured."""
    config = PRESETS[preset].config
    entries = weights_layout(config, "bf16")[1]
    size = sum(entry.size for entry in entries.values())
    if (free := shutil.disk_usage(folder).free) < 2.1 * size:
        sys.exit(f"skipped: {folder} has {free / 1e9:.0f} GB free, this takes {2.1e-9 * size:.0f}")
    shapes, bundle = parameter_shapes(config), folder / "bundle"
    loras = [
        write_lora(folder / f"{n}.safetensors", shapes, n, rank=RANK, dtype=torch.bfloat16)
        for n in range(2)
    ]
    stack = LoraStack([(loras[0], 1.0)], shapes)
    share = sum(entry.size for name, entry in entries.items() if stack.changes(name)) / size
    megabytes = loras[0].stat().st_size / 1e6
    print(f"LoRA of rank {RANK}: {megabytes:.0f} MB, changes {share:.0%} of the set's bytes")
    target = ["--backend", "aoti"] if GPU else ["--backend", "onnx", "--device", "cpu"]
    built, seconds = command(
        "build", "-m", preset, "--random-weights", 0, "--resolution", resolution,
        "--frames", frames, "--dtype", "bf16", *target, "-o", bundle,
    )  # fmt: skip
    print(f"build {seconds:.0f} s, peak {built['peak_rss_bytes'] / 1e9:.2f} GB")
    added, seconds = command("add", bundle, "style", "--lora", loras[0])
    peak = added["peak_rss_bytes"] / 1e9
    print(f"add {seconds:.0f} s, peak {peak:.2f} GB, for a set of {size / 1e9:.1f} GB")
    if GPU:
        measure_swaps(bundle, loras)


if __name__ == "__main__":
    given = sys.argv[2:] or ["t2v-14b", "480x832", "81"]
    main(Path(sys.argv[1]), *given)
