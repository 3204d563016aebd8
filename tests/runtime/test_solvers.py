"""Solvers against the fp64 code of `solver_oracle`, and Wan's official timesteps."""

import math

import numpy as np
import pytest

from wanexport.exporter.compare.solver_oracle import exact_latents, shifted_grid
from wanexport.runtime.errors import WanExportError, WanExportWarning
from wanexport.runtime.sample import sample
from wanexport.runtime.solvers import make_schedule

STEPS = (4, 8, 40, 50)
SHIFTS = (3.0, 5.0, 12.0)


def velocity(x: np.ndarray, sigma: float) -> np.ndarray:
    """A smooth non-linear field."""
    return np.tanh(1.3 * x + sigma) - 0.4 * x


def run(solver: str, noise: np.ndarray, steps: int, shift: float) -> np.ndarray:
    sigmas = iter(make_schedule(solver, steps=steps, shift=shift).sigmas)

    def denoiser(latent: np.ndarray, **_: object) -> np.ndarray:
        return velocity(latent, next(sigmas)).astype(np.float32)

    settings = {"solver": solver, "steps": steps, "shift": shift, "guidance": 1.0}
    return list(sample(denoiser, noise=noise, text=None, **settings))[-1].latent  # type: ignore[arg-type]


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_solver_follows_its_closed_form(
    solver: str, steps: int, shift: float, rng: np.random.Generator
) -> None:
    noise = rng.standard_normal((1, 16, 3, 8, 8)).astype(np.float32)
    ours = run(solver, noise, steps, shift)
    sigmas = shifted_grid(solver, steps, shift)
    exact = exact_latents(solver, noise, sigmas, lambda x, i: velocity(x, sigmas[i]))[-1]
    assert ours.dtype == np.float32
    assert np.linalg.norm(ours - exact) / np.linalg.norm(exact) <= 2e-6


@pytest.mark.parametrize(
    ("steps", "shift", "first", "last"),
    [
        (50, 5.0, [999, 995, 991, 987, 982, 978], [302, 241, 172, 92]),
        (40, 12.0, [999, 997, 995, 993, 990, 988], [571, 492, 386, 235]),
        (40, 5.0, [999, 994, 989, 983, 978, 972], [356, 288, 208, 113]),
        (50, 3.0, [999, 992, 985, 978, 971, 963], [206, 160, 111, 57]),
        (4, 5.0, [999, 937, 833, 624], [999, 937, 833, 624]),
    ],
)
def test_unipc_timesteps_are_the_official_integers(
    steps: int, shift: float, first: list[int], last: list[int]
) -> None:
    timesteps = list(make_schedule("unipc", steps=steps, shift=shift).timesteps)
    assert len(timesteps) == steps
    assert timesteps[: len(first)] == first
    assert timesteps[-len(last) :] == last


@pytest.mark.parametrize("solver", ["dpm++", "euler"])
def test_the_other_grids_start_at_pure_noise(solver: str) -> None:
    schedule = make_schedule(solver, steps=4, shift=5.0)
    assert schedule.timesteps == (1000, 937, 833, 625)
    assert schedule.sigmas == pytest.approx((1.0, 0.9375, 5 / 6, 0.625, 0.0))


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_a_distilled_schedule_runs_from_pure_noise(solver: str, rng: np.random.Generator) -> None:
    noise = rng.standard_normal((1, 16, 1, 4, 4)).astype(np.float32)
    target = rng.standard_normal(noise.shape).astype(np.float32)

    def denoiser(latent: np.ndarray, timestep: float, **_: object) -> np.ndarray:
        return (latent - target) / (timestep / 1000)  # always points from the target

    times = [1000, 937.5, 833.333, 625]
    steps = list(sample(denoiser, noise=noise, text=None, solver=solver, timesteps=times))
    assert [step.timestep for step in steps] == times
    np.testing.assert_allclose(steps[-1].latent, target, atol=1e-5)


@pytest.mark.parametrize(
    "times",
    [
        [],
        [500, 750],
        [750, 750],
        [1000, 999.99999, 500],
        [1001, 500],
        [500, 0],
        [500, -1],
        [float("nan")],
    ],
)
def test_unusable_timesteps_are_refused(times: list[float]) -> None:
    with pytest.raises(WanExportError, match="timesteps must fall"):
        make_schedule("euler", steps=1, shift=1.0, timesteps=times)


@pytest.mark.parametrize(
    ("sigmas", "timesteps"),
    [
        ([1.0, 0.9375, 0.8333, 0.625], "1000,937.5,833.3,625"),
        ([1.0, 0.75, 0.5, 0.25, 0.0], "1000,750,500,250"),
        ([0.25, 0.5, 1], "1000,500,250"),
        ([1], "1000"),
    ],
)
def test_sigmas_are_named_and_given_back_as_timesteps(sigmas: list[float], timesteps: str) -> None:
    with pytest.raises(WanExportError, match=f"sigmas from 0 to 1; as timesteps: {timesteps}$"):
        make_schedule("euler", steps=1, shift=1.0, timesteps=sigmas)


def test_a_list_that_begins_high_may_end_below_one() -> None:
    times = (1000.0, 500.0, 0.5)
    assert make_schedule("euler", steps=1, shift=1.0, timesteps=times).timesteps == times


@pytest.mark.parametrize(
    ("times", "said"),
    [
        ([1000, 750, 500, 0], "got 1000,750,500,0: leave out the final 0, where every run ends"),
        ([500, 750], "timesteps must fall from step to step, got 500,750"),
        ([1000] * 60, "must fall from step to step, got " + "1000," * 50 + r"\.\.\."),
        ([], "got 0 of them: expected 1 to 10000"),
    ],
)
def test_a_list_that_is_no_schedule_is_shown_as_it_was_given(times: list[float], said: str) -> None:
    with pytest.raises(WanExportError, match=f"{said}$"):
        make_schedule("euler", steps=1, shift=1.0, timesteps=times)


def test_a_schedule_that_leaves_the_noise_is_remarked_on() -> None:
    with pytest.warns(WanExportWarning, match="begin at 100 of 1000: .* pure noise begins near"):
        make_schedule("euler", steps=1, shift=1.0, timesteps=[100, 93.75, 83.33, 62.5])


def test_unknown_solver_and_empty_runs_are_refused() -> None:
    with pytest.raises(WanExportError, match=r"unipc, dpm\+\+, euler"):
        make_schedule("heun", steps=4, shift=5.0)
    for steps in (0, 10_001, 2.5, "4", True):
        with pytest.raises(WanExportError, match="steps must be from 1 to 10000"):
            make_schedule("unipc", steps=steps, shift=5.0)  # type: ignore[arg-type]
    for shift in (0.0, 1e-20, 1e9, math.inf, math.nan, "5", True):
        with pytest.raises(WanExportError, match=r"shift must be from 0.001 to 1000"):
            make_schedule("unipc", steps=4, shift=shift)  # type: ignore[arg-type]
