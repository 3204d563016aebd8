"""Measure the peak memory of diffusers' VAE at the published sizes, beside our estimate of it.

    python -m tests.tables.vae_memory VERSION TASK LATENT_FRAMES HEIGHT WIDTH

VERSION is Wan2.1 or Wan2.2, TASK is encode or decode; the weights are random. Linux only. Minutes.
"""

import json
import sys
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from tests.oracles.official_vae import GOLDEN, STRIDES
from wanexport.runtime.parts.vae import needed_bytes
from wanexport.runtime.parts.vae_keys import config_of


def status_bytes(field: str) -> int:
    """A field of /proc/self/status: VmRSS is the resident memory, VmHWM its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field))) * 1024


def main() -> None:
    """Print one line."""
    version, task = sys.argv[1:3]
    frames, height, width = (int(value) for value in sys.argv[3:6])
    shapes = json.loads(GOLDEN.read_text())[version]["full"]
    model = AutoencoderKLWan(**config_of(shapes, GOLDEN)).eval().requires_grad_(False)
    stride = STRIDES[version]
    latent = torch.randn(1, model.config.z_dim, frames, height // stride, width // stride)
    video = torch.zeros(1, 3, 4 * frames - 3, height, width)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, started = status_bytes("VmRSS"), time.perf_counter()
    if task == "encode":
        model.encode(video)
    else:
        model.decode(latent)
    seconds, peak = time.perf_counter() - started, status_bytes("VmHWM") - before
    estimate = needed_bytes(model.config, task, frames, height, width)
    print(
        f"{version} {task} {frames} latent frames {height}x{width}: {peak / 1e9:.2f} GB, "
        f"estimate {estimate / 1e9:.2f} GB, {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
