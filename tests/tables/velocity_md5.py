"""The MD5 of one velocity of every family and CPU backend: two commits compute the same bits.

python -m tests.tables.velocity_md5 FOLDER [BACKEND ...]

Checkpoints of small models are made in FOLDER/checkpoints unless they are there, each is built with
the command line that is installed, and the engine is called at two timesteps on seeded inputs. To
compare two commits, run this file by its path with each commit's `wanexport`, on one FOLDER.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

BACKENDS = ("onnx", "aoti")
TIMESTEPS = (957.0, 250.0)  # of both experts


def make_checkpoints(folder: Path) -> None:
    """One official checkpoint of two blocks for each family."""
    from tests.oracles.wan_reference import (
        VARIANTS,
        diffusers_model,
        official_state,
        small_config,
        write_official,
    )

    for preset in VARIANTS:
        config = small_config(preset)
        for seed, name in enumerate(("high_noise_model", "low_noise_model")):
            if not preset.endswith("a14b"):
                name = ""
            state = official_state(diffusers_model(config, seed=seed))
            write_official(folder / preset / name, state, config)


def velocity_md5(checkpoint: Path, backend: str) -> str:
    """Build an engine of 64x96x9 (128x192 for the 5B) with a backend, and run it."""
    from wanexport.runtime import load

    size = "128x192" if checkpoint.name == "ti2v-5b" else "64x96"
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "bundle"
        command = [shutil.which("wanexport") or "wanexport", "build", "-m", str(checkpoint)]
        command += ["--resolution", size, "--frames", "9", "--backend", backend]
        command += ["--dtype", "fp32", "--device", "cpu", "-o", str(bundle)]
        subprocess.run(command, check=True, capture_output=True)
        denoiser = load(bundle)
        rng = np.random.default_rng(0)
        inputs = {
            name: rng.standard_normal(spec.shape, np.float32)
            for name, spec in sorted(denoiser.inputs.items())
            if name != "timestep"
        }
        digest = hashlib.md5()
        for timestep in TIMESTEPS:
            digest.update(np.asarray(denoiser(timestep=timestep, **inputs)).tobytes())
        return digest.hexdigest()


def main(folder: str, *backends: str) -> None:
    """Print a line for each family and backend."""
    checkpoints = Path(folder) / "checkpoints"
    if not checkpoints.is_dir():
        make_checkpoints(checkpoints)
    for backend in backends or BACKENDS:
        for checkpoint in sorted(checkpoints.iterdir()):
            print(backend, checkpoint.name, velocity_md5(checkpoint, backend), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
