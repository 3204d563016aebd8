"""Build a small bundle, open it, and sample: the whole of the Python API in one file.

    python samples/02_build_and_sample.py FOLDER

Sampling needs no PyTorch; building does.
"""

import sys
from pathlib import Path

import numpy as np

from wanexport.exporter.build import build
from wanexport.runtime import load, sample


def main(folder: Path) -> None:
    """Build into folder/bundle and print how the latent settles."""
    bundle = folder / "bundle"
    record = build("tiny", random_weights=0, resolution="64x96", frames=9, output=bundle)
    proof = record["engines"][0]["proof"]
    print(f"built {record['bundle']}: error {proof['error']:.1e}, gate {proof['gate']:.0e}")

    denoiser = load(bundle)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(denoiser.inputs["latent"].shape, np.float32)
    text, negative = rng.standard_normal((2, 77, 4096), np.float32)
    for step in sample(denoiser, noise=noise, text=text, negative=negative, steps=4):
        print(f"step {step.index}: timestep {step.timestep:g}, latent std {step.latent.std():.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
