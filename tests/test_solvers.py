"""Solvers against closed-form fp64 code written from the papers, and Wan's official timesteps."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from wanexport.runtime.errors import WanExportError
from wanexport.runtime.sample import sample
from wanexport.runtime.solvers import make_schedule

Velocity = Callable[[np.ndarray, float], np.ndarray]
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


def grid(start: float, steps: int, shift: float) -> list[float]:
    """Wan's shifted sigmas, held in fp32 as the official schedulers hold them, with the final 0."""
    u = [start * (1 - i / steps) for i in range(steps)]
    return [float(np.float32(shift * v / (1 + (shift - 1) * v))) for v in u] + [0.0]


def lam(sigma: float) -> float:
    return math.inf if sigma == 0 else -math.inf if sigma == 1 else math.log((1 - sigma) / sigma)


def unipc_fp64(x: np.ndarray, sigmas: list[float]) -> np.ndarray:
    """UniPC-2 with B(h) = e^h - 1, data prediction; the linear systems are solved by numpy."""
    n = len(sigmas) - 1
    x0s: list[np.ndarray] = []
    last, order = x, 0
    for i in range(n):
        x0s.append(x - sigmas[i] * velocity(x, sigmas[i]))
        if i:
            x = unipc_update(last, sigmas, i - 1, order, x0s)
        last, order = x, min(2, n - i, i + 1)
        x = unipc_update(x, sigmas, i, order, x0s)
    return x


def unipc_update(
    x: np.ndarray, sigmas: list[float], s: int, order: int, x0s: list[np.ndarray]
) -> np.ndarray:
    """From sigmas[s] to the next; corrects where x0s reaches one step beyond s."""
    t = s + 1
    corrects = len(x0s) > t
    alpha = 1 - sigmas[t]
    if sigmas[t] == 0:
        return x0s[s]
    h = lam(sigmas[t]) - lam(sigmas[s])
    hh = -h
    b_h = math.expm1(hh)
    ratios, differences = [], []
    if order == 2:
        ratios.append((lam(sigmas[s - 1]) - lam(sigmas[s])) / h)
        differences.append((x0s[s - 1] - x0s[s]) / ratios[0])
    result = sigmas[t] / sigmas[s] * x - alpha * b_h * x0s[s]
    if corrects:
        ratios.append(1.0)
        differences.append(x0s[t] - x0s[s])
    if not differences:
        return result
    if len(differences) == 1:
        return result - alpha * b_h * 0.5 * differences[0]
    matrix = np.array([[r**k for r in ratios] for k in range(len(ratios))])
    phi, right, factorial = b_h / hh - 1, [], 1.0
    for k in range(1, len(ratios) + 1):
        right.append(phi * factorial / b_h)
        factorial *= k + 1
        phi = phi / hh - 1 / factorial
    rhos = np.linalg.solve(matrix, np.array(right))
    return result - alpha * b_h * sum(rho * d for rho, d in zip(rhos, differences))


def dpmpp_fp64(x: np.ndarray, sigmas: list[float]) -> np.ndarray:
    """DPM-Solver++(2M) midpoint, first order at both ends."""
    n, previous = len(sigmas) - 1, None
    for i in range(n):
        s, t = sigmas[i], sigmas[i + 1]
        x0 = x - s * velocity(x, s)
        h = lam(t) - lam(s)
        blend = x0
        if 0 < i < n - 1:
            assert previous is not None
            r0 = (lam(s) - lam(sigmas[i - 1])) / h
            blend = x0 + (x0 - previous) / (2 * r0)
        x = t / s * x + (1 - t) * (1 - math.exp(-h)) * blend
        previous = x0
    return x


def euler_fp64(x: np.ndarray, sigmas: list[float]) -> np.ndarray:
    for s, t in pairwise(sigmas):
        x = x + (t - s) * velocity(x, s)
    return x


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    ("solver", "oracle", "start"),
    [("unipc", unipc_fp64, 0.999), ("dpm++", dpmpp_fp64, 1.0), ("euler", euler_fp64, 1.0)],
)
def test_solver_follows_its_closed_form(
    solver: str,
    oracle: Callable[[np.ndarray, list[float]], np.ndarray],
    start: float,
    steps: int,
    shift: float,
    rng: np.random.Generator,
) -> None:
    noise = rng.standard_normal((1, 16, 3, 8, 8)).astype(np.float32)
    ours = run(solver, noise, steps, shift)
    exact = oracle(noise.astype(np.float64), grid(start, steps, shift))
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


def test_unknown_solver_and_empty_runs_are_refused() -> None:
    with pytest.raises(WanExportError, match=r"unipc, dpm\+\+, euler"):
        make_schedule("heun", steps=4, shift=5.0)
    with pytest.raises(WanExportError, match="steps must be at least 1"):
        make_schedule("unipc", steps=0, shift=5.0)
    for shift in (0.0, math.inf, math.nan):
        with pytest.raises(WanExportError, match="shift above 0"):
            make_schedule("unipc", steps=4, shift=shift)
    with pytest.raises(WanExportError, match="timesteps must fall"):
        make_schedule("unipc", steps=4, shift=1e9)
