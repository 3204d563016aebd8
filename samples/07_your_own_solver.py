"""Denoise in a loop of your own, with a solver that wanexport does not have.

    python samples/07_your_own_solver.py FOLDER

The denoiser gives the velocity dx/dsigma of a latent x at noise level sigma; a solver follows it
from sigma 1 to 0. The second-order Adams-Bashforth method below calls the model once a step, as
UniPC does. With more and more steps all solvers meet in one latent.

The model is small and random, but smooth in time, as a trained one is: its time embedding lacks the
high frequencies.
"""

import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import WanTransformer3DModel

from wanexport.exporter.build import build
from wanexport.runtime import Denoiser, load, sample
from wanexport.runtime.solvers import NUM_TRAIN_TIMESTEPS, make_schedule

SHIFT, MANY = 5.0, 80


def write_model(folder: Path) -> None:
    """A checkpoint in diffusers' layout."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(num_attention_heads=2, ffn_dim=512, num_layers=2)
    with torch.no_grad():  # a timestep's 128 cosines, then its 128 sines, the fastest first
        model.condition_embedder.time_embedder.linear_1.weight.view(-1, 2, 128)[:, :, :64] = 0
    model.save_pretrained(folder / "transformer")


def adams_bashforth(
    denoiser: Denoiser, sigmas: Sequence[float], latent: np.ndarray, text: np.ndarray
) -> np.ndarray:
    """Follow the velocity along sigmas, the final 0 included; steps may differ in length.

    Each step integrates the line through the last two velocities; the first has only one.
    """
    session = denoiser.session(text=text)  # what stays the same is checked and moved once
    last_velocity, last_change = None, 1.0
    for sigma, next_sigma in pairwise(sigmas):
        velocity = session(latent=latent, timestep=sigma * NUM_TRAIN_TIMESTEPS)
        change = next_sigma - sigma
        slope = 0.0 if last_velocity is None else (velocity - last_velocity) / last_change
        latent = latent + change * (velocity + change / 2 * slope)
        last_velocity, last_change = velocity, change
    return latent


def built_in(
    denoiser: Denoiser, sigmas: Sequence[float], latent: np.ndarray, text: np.ndarray, solver: str
) -> np.ndarray:
    """The same run with a solver of wanexport's, without guidance."""
    times = [sigma * NUM_TRAIN_TIMESTEPS for sigma in sigmas[:-1]]
    run = sample(denoiser, noise=latent, text=text, solver=solver, timesteps=times)
    return list(run)[-1].latent


def main(folder: Path) -> None:
    """Build into folder/bundle, and compare the solvers with the built-in one at many steps."""
    model, bundle = folder / "model", folder / "bundle"
    write_model(model)
    build(model, resolution="32x48", frames=5, dtype="fp32", output=bundle)
    denoiser = load(bundle)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(denoiser.inputs["latent"].shape, np.float32)
    text = rng.standard_normal((77, 4096), np.float32)

    def grid(steps: int) -> tuple[float, ...]:
        return make_schedule("euler", steps=steps, shift=SHIFT).sigmas

    limit = built_in(denoiser, grid(MANY), noise, text, "unipc")
    for steps in (10, 20, 40):
        own = adams_bashforth(denoiser, grid(steps), noise, text)
        euler = built_in(denoiser, grid(steps), noise, text, "euler")
        error, of_euler = (np.linalg.norm(x - limit) / np.linalg.norm(limit) for x in (own, euler))
        print(f"{steps} steps: Adams-Bashforth {error:.1e} from the limit, Euler {of_euler:.1e}")
    print(f"{'same' if error < 2e-3 else 'another'} latent as UniPC's of {MANY} steps")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
