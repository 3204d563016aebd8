"""Wan's solvers written a second time, in fp64 and straight from the papers, to check the first.

`compare` cannot: a wrong coefficient in `runtime/solvers.py` moves reference and engine alike.
UniPC: Zhao et al. 2023, algorithms 5 to 8 with B(h) = e^h - 1, whose linear systems numpy solves.
DPM-Solver++(2M): Lu et al. 2022, algorithm 2.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

Velocity = Callable[[np.ndarray, int], np.ndarray]  # of a latent at a step
Hold = Callable[[np.ndarray], np.ndarray]  # what the loop does to a latent after every step


def shifted_grid(solver: str, steps: int, shift: float) -> list[float]:
    """Wan's noise levels, in fp32 as the official schedulers hold them, with the final 0."""
    start = 0.999 if solver == "unipc" else 1.0
    u = [start * (1 - i / steps) for i in range(steps)]
    return [float(np.float32(shift * v / (1 + (shift - 1) * v))) for v in u] + [0.0]


def exact_latents(
    solver: str,
    noise: np.ndarray,
    sigmas: Sequence[float],
    velocity: Velocity,
    hold: Hold = lambda latent: latent,
) -> list[np.ndarray]:
    """The fp64 latent after every step from noise, for as many steps as sigmas has intervals."""
    return list(_SOLVERS[solver](noise.astype(np.float64), sigmas, velocity, hold))


def _lambda(sigma: float) -> float:
    return math.inf if sigma == 0 else -math.inf if sigma == 1 else math.log((1 - sigma) / sigma)


def _euler(
    x: np.ndarray, sigmas: Sequence[float], velocity: Velocity, hold: Hold
) -> Iterator[np.ndarray]:
    x = hold(x)
    for i in range(len(sigmas) - 1):
        x = hold(x + (sigmas[i + 1] - sigmas[i]) * velocity(x, i))
        yield x


def _dpmpp(
    x: np.ndarray, sigmas: Sequence[float], velocity: Velocity, hold: Hold
) -> Iterator[np.ndarray]:
    """2M, midpoint; first order at both ends."""
    n, previous = len(sigmas) - 1, None
    x = hold(x)
    for i in range(n):
        s, t = sigmas[i], sigmas[i + 1]
        x0 = x - s * velocity(x, i)
        h = _lambda(t) - _lambda(s)
        blend = x0
        if 0 < i < n - 1:
            assert previous is not None
            r0 = (_lambda(s) - _lambda(sigmas[i - 1])) / h
            blend = x0 + (x0 - previous) / (2 * r0)
        x, previous = hold(t / s * x + (1 - t) * (1 - math.exp(-h)) * blend), x0
        yield x


def _unipc(
    x: np.ndarray, sigmas: Sequence[float], velocity: Velocity, hold: Hold
) -> Iterator[np.ndarray]:
    """Order 2: every step but the first corrects its latent before it predicts the next."""
    n = len(sigmas) - 1
    x0s: list[np.ndarray] = []
    x = hold(x)
    last, order = x, 0
    for i in range(n):
        x0s.append(x - sigmas[i] * velocity(x, i))
        if i:
            x = _unipc_update(last, sigmas, i - 1, order, x0s)
        last, order = x, min(2, n - i, i + 1)
        x = hold(_unipc_update(x, sigmas, i, order, x0s))
        yield x


def _unipc_update(
    x: np.ndarray, sigmas: Sequence[float], s: int, order: int, x0s: Sequence[np.ndarray]
) -> np.ndarray:
    """From sigmas[s] to the next; corrects where x0s reaches one step beyond s."""
    t = s + 1
    corrects = len(x0s) > t
    alpha = 1 - sigmas[t]
    if sigmas[t] == 0:
        return x0s[s]
    h = _lambda(sigmas[t]) - _lambda(sigmas[s])
    hh = -h
    b_h = math.expm1(hh)
    ratios, differences = [], []
    if order == 2:
        ratios.append((_lambda(sigmas[s - 1]) - _lambda(sigmas[s])) / h)
        differences.append((x0s[s - 1] - x0s[s]) / ratios[0])
    result: np.ndarray = sigmas[t] / sigmas[s] * x - alpha * b_h * x0s[s]
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


_SOLVERS = {"unipc": _unipc, "dpm++": _dpmpp, "euler": _euler}
