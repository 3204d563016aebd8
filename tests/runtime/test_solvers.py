"""Solvers against the fp64 code of `solver_oracle`, and Wan's official timesteps."""

import math

import numpy as np
import pytest

from tests.oracles.solver_oracle import exact_latents, shifted_grid
from wanexport.runtime import solvers
from wanexport.runtime.errors import WanExportError, WanExportWarning
from wanexport.runtime.family import SamplingDefaults
from wanexport.runtime.sample import sample
from wanexport.runtime.solvers import UniPC, make_schedule

STEPS = (1, 2, 3, 4, 8, 40, 50)
SHIFTS = (1.0, 3.0, 5.0, 12.0)


def velocity(x: np.ndarray, sigma: float) -> np.ndarray:
    """A smooth non-linear field."""
    return np.tanh(1.3 * x + sigma) - 0.4 * x


def latents(solver: str, noise: np.ndarray, steps: int, shift: float) -> list[np.ndarray]:
    """The latent after every step of our loop in that field."""
    sigmas = iter(make_schedule(solver, steps=steps, shift=shift).sigmas)

    def denoiser(latent: np.ndarray, **_: object) -> np.ndarray:
        return velocity(latent, next(sigmas)).astype(np.float32)

    settings = {"solver": solver, "steps": steps, "shift": shift, "guidance": 1.0}
    return [step.latent for step in sample(denoiser, noise=noise, text=None, **settings)]  # type: ignore[arg-type]


def largest_error(ours: list[np.ndarray], exact: list[np.ndarray]) -> float:
    """Of the relative L2 errors after each step."""
    errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(ours, exact, strict=True)]
    return float(max(errors))


def error_in_field(solver: str, steps: int, shift: float, noise: np.ndarray) -> float:
    ours = latents(solver, noise, steps, shift)
    assert {latent.dtype for latent in ours} == {np.dtype(np.float32)}
    sigmas = shifted_grid(solver, steps, shift)
    exact = exact_latents(solver, noise, sigmas, lambda x, i: velocity(x, sigmas[i]))
    return largest_error(ours, exact)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_every_step_follows_its_closed_form(
    solver: str, steps: int, shift: float, rng: np.random.Generator
) -> None:
    noise = rng.standard_normal((1, 16, 3, 8, 8)).astype(np.float32)
    assert error_in_field(solver, steps, shift, noise) <= 2e-6


class Guided:
    """A denoiser of two experts with a text and a negative one; it keeps its velocities."""

    def __init__(self, solver: str, steps: int, shift: float) -> None:
        self.sampling = SamplingDefaults(steps, shift, (3.0, 4.0), 0.875, 16, solver)
        self.velocities: list[np.ndarray] = []

    def __call__(self, latent: np.ndarray, timestep: object, text: np.ndarray) -> np.ndarray:
        level = float(np.max(np.asarray(timestep, np.float64))) / 1000
        self.velocities.append(velocity(latent + text.sum(), level).astype(np.float32))
        return self.velocities[-1]


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
@pytest.mark.parametrize("holds", [False, True], ids=["free", "first frame held"])
def test_a_guided_loop_follows_the_closed_form_on_its_own_velocities(
    solver: str, steps: int, shift: float, holds: bool, rng: np.random.Generator
) -> None:
    noise = rng.standard_normal((1, 16, 3, 8, 8)).astype(np.float32)
    first = rng.standard_normal((1, 16, 1, 8, 8)).astype(np.float32) if holds else None
    denoiser = Guided(solver, steps, shift)
    text, negative = np.full((1, 1), 0.5), np.full((1, 1), -0.5)
    run = [*sample(denoiser, noise=noise, text=text, negative=negative, first_frame=first)]
    pairs = np.array(denoiser.velocities, np.float64).reshape(steps, 2, *noise.shape)
    scales = [4.0 if step.timestep >= 875 else 3.0 for step in run]
    guided = [no + scale * (yes - no) for (yes, no), scale in zip(pairs, scales, strict=True)]

    def hold(latent: np.ndarray) -> np.ndarray:
        return latent if first is None else np.concatenate([first, latent[:, :, 1:]], axis=2)

    sigmas = shifted_grid(solver, steps, shift)
    exact = exact_latents(solver, noise, sigmas, lambda _, i: guided[i], hold)
    assert largest_error([step.latent for step in run], exact) <= 2e-6


def test_a_coefficient_that_is_wrong_by_a_hundredth_is_seen(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = rng.standard_normal((1, 16, 3, 8, 8)).astype(np.float32)
    ratio = UniPC._previous_ratio
    with monkeypatch.context() as patch:
        patch.setattr(UniPC, "_previous_ratio", lambda *given: 1.01 * ratio(*given))
        assert error_in_field("unipc", 4, 5.0, noise) > 2e-5  # ten times what passes
    with monkeypatch.context() as patch:
        patch.setattr(solvers, "expm1", lambda x: 1.01 * math.expm1(x))
        assert error_in_field("dpm++", 4, 5.0, noise) > 2e-5  # ten times what passes


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
