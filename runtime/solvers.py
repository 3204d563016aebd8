"""Wan's solvers and sigma grids, as linear combinations with scalars computed on the host.

A solver steps numpy arrays and torch tensors alike. Flow matching: x = (1 - sigma) * x0 + sigma *
noise, and the model predicts the velocity noise - x0. With alpha = 1 - sigma and
lambda = ln(alpha / sigma), the formulas are those of UniPC (Zhao et al. 2023, B2(h) = e^h - 1, data
prediction) and DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), in the form of Wan's
`fm_solvers_unipc.py` and `fm_solvers.py`.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from math import expm1, inf, isinf, log
from numbers import Integral, Real
from operator import add
from typing import Protocol

import numpy as np

from wanexport.runtime.arrays import Array, to_fp32_like
from wanexport.runtime.errors import BadRequest, WanExportWarning
from wanexport.runtime.host_copy import HostCopy

NUM_TRAIN_TIMESTEPS = 1000
MAX_STEPS = 10_000
MAX_SHIFT = 1000
_SEEDING = 8  # values of a latent that seed a generator
_MOST_SHOWN = 50  # numbers of a list that an error repeats
# Wan's UniPC starts at the last training sigma, rounded to fp32, where DPM++ starts at 1.
_UNIPC_SIGMA_MAX = float(np.float32(1 - 1 / NUM_TRAIN_TIMESTEPS))


@dataclass(frozen=True)
class Schedule:
    """Noise levels of a run, the final 0 included, and the timestep the model is given at each."""

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]


class Solver(Protocol):
    """Turns the velocity at step i into the latent of step i + 1; one object serves one run."""

    def begin(self, latent: Array) -> None:
        """Take what it needs of the first latent, before the model's work is launched."""

    def step(self, latent: Array, velocity: Array) -> Array:
        """Return the next latent."""
        ...


def official_schedule(steps: int, shift: float, sigma_max: float) -> Schedule:
    """Wan's grid: linear from sigma_max to 0, shifted; the model sees truncated integer timesteps.

    Raises BadRequest when steps or shift are out of range.
    """
    # bool is a number to Python alone.
    if isinstance(steps, bool) or not isinstance(steps, Integral) or not 1 <= steps <= MAX_STEPS:
        raise BadRequest(f"steps must be from 1 to {MAX_STEPS}, got {steps}")
    is_number = isinstance(shift, Real) and not isinstance(shift, bool)
    if not is_number or not 1 / MAX_SHIFT <= shift <= MAX_SHIFT:
        raise BadRequest(f"shift must be from {1 / MAX_SHIFT:g} to {MAX_SHIFT}, got {shift}")
    grid = np.linspace(sigma_max, 0, steps + 1)[:-1]
    sigmas = shift * grid / (1 + (shift - 1) * grid)
    timesteps = (sigmas * NUM_TRAIN_TIMESTEPS).astype(np.int64)
    return Schedule(_fp32(sigmas), tuple(float(t) for t in timesteps))


def explicit_schedule(timesteps: Sequence[float]) -> Schedule:
    """The schedule of a distilled model: the given float timesteps, sigma = t / 1000.

    Raises BadRequest unless they fall strictly and lie in (0, 1000]; for sigmas from 0 to 1 and
    for a final 0, which are not timesteps, it says what to pass in their place. A schedule that
    begins in the lower half, as one for pure noise does not, is a WanExportWarning.
    """
    times = [float(t) for t in timesteps]
    if any(times) and all(0 <= t <= 1 for t in times):
        meant = sorted({NUM_TRAIN_TIMESTEPS * t for t in times if t}, reverse=True)
        raise BadRequest(
            f"timesteps {_listed(times)}: these are sigmas from 0 to 1; as timesteps: "
            f"{_listed(meant)}"
        )
    legal = f"timesteps must fall from at most {NUM_TRAIN_TIMESTEPS} to above 0"
    if not 1 <= len(times) <= MAX_STEPS:
        raise BadRequest(f"{legal}, got {len(times)} of them: expected 1 to {MAX_STEPS}")
    if times[-1] == 0 < times[0]:
        raise BadRequest(
            f"{legal}, got {_listed(times)}: leave out the final 0, where every run ends"
        )
    if not all(0 < t <= NUM_TRAIN_TIMESTEPS for t in times):
        raise BadRequest(f"{legal}, got {_listed(times)}")
    if not all(now > after for now, after in pairwise(times)):
        raise BadRequest(f"timesteps must fall from step to step, got {_listed(times)}")
    schedule = Schedule(_fp32(np.array(times) / NUM_TRAIN_TIMESTEPS), tuple(times))
    if times[0] < NUM_TRAIN_TIMESTEPS / 2:
        warnings.warn(
            f"timesteps begin at {times[0]:g} of {NUM_TRAIN_TIMESTEPS}: that is for a latent which "
            f"shows something already, pure noise begins near {NUM_TRAIN_TIMESTEPS}",
            WanExportWarning,
            stacklevel=2,
        )
    return schedule


def _listed(numbers: Sequence[float]) -> str:
    """Numbers as a user writes them, the first of a long list."""
    shown = ",".join(f"{number:.7g}" for number in numbers[:_MOST_SHOWN])
    return f"{shown},..." if len(numbers) > _MOST_SHOWN else shown


def _fp32(sigmas: np.ndarray) -> tuple[float, ...]:
    """Round as the official solvers do, which hold their sigmas in fp32, and append the final 0.

    Raises BadRequest when two levels are one after rounding: every solver divides by their gap.
    """
    rounded = (*(float(s) for s in sigmas.astype(np.float32)), 0.0)
    if not all(now > after for now, after in pairwise(rounded)):
        raise BadRequest(
            f"timesteps must fall from step to step, got noise levels {_listed(rounded)}"
        )
    return rounded


def _log_snr(sigma: float) -> float:
    """lambda = ln((1 - sigma) / sigma); infinite at both ends, where the formulas have limits."""
    if sigma == 0:
        return inf
    return -inf if sigma == 1 else log(1 - sigma) - log(sigma)


def combine(*terms: tuple[float, Array]) -> Array:
    """Sum of weight * array; arrays of weight zero, which may be None, are left out."""
    return reduce(add, (weight * array for weight, array in terms if weight != 0))


class _Steps:
    """Where a solver stands; most need nothing of the first latent."""

    def __init__(self, sigmas: Sequence[float]) -> None:
        self.sigmas, self.index = sigmas, 0

    def begin(self, latent: Array) -> None:
        """Take nothing of it."""


class Euler(_Steps):
    """First-order flow matching: x <- x + (sigma_next - sigma) * v."""

    def step(self, latent: Array, velocity: Array) -> Array:
        """Return the next latent."""
        change = self.sigmas[self.index + 1] - self.sigmas[self.index]
        self.index += 1
        return combine((1.0, latent), (change, velocity))


class DPMSolverPP(_Steps):
    """DPM-Solver++(2M), midpoint; first order on the first and the last step."""

    def __init__(self, sigmas: Sequence[float]) -> None:
        super().__init__(sigmas)
        self.last_x0: Array = None

    def step(self, latent: Array, velocity: Array) -> Array:
        """Return the next latent."""
        i = self.index
        now, after = self.sigmas[i], self.sigmas[i + 1]
        h = _log_snr(after) - _log_snr(now)
        x0 = combine((1.0, latent), (-now, velocity))
        gain = -(1 - after) * expm1(-h)
        slope = 0.0  # of the extrapolation through the last two x0
        if i > 0 and i + 1 < len(self.sigmas) - 1:
            slope = 0.5 * h / (_log_snr(now) - _log_snr(self.sigmas[i - 1]))
        result = combine(
            (after / now, latent), (gain * (1 + slope), x0), (-gain * slope, self.last_x0)
        )
        self.index, self.last_x0 = i + 1, x0
        return result


class UniPC(_Steps):
    """UniPC of order 2 (bh2): every step but the first corrects its latent before predicting."""

    def __init__(self, sigmas: Sequence[float]) -> None:
        super().__init__(sigmas)
        self.x0: list[Array] = []  # of the last two steps, the newest last
        self.corrected: Array = None

    def step(self, latent: Array, velocity: Array) -> Array:
        """Return the next latent."""
        x0 = combine((1.0, latent), (-self.sigmas[self.index], velocity))
        if self.index > 0:
            latent = self._correct(x0)
        self.x0 = [*self.x0[-1:], x0]
        self.corrected = latent
        result = self._predict(latent)
        self.index += 1
        return result

    def _order(self, index: int) -> int:
        return min(2, index + 1, len(self.sigmas) - 1 - index)

    def _interval(self, index: int) -> tuple[float, float, float]:
        """Step from sigmas[index]: (h, sigma ratio, -alpha * expm1(-h))."""
        now, after = self.sigmas[index], self.sigmas[index + 1]
        h = _log_snr(after) - _log_snr(now)
        return h, after / now, -(1 - after) * expm1(-h)

    def _previous_ratio(self, index: int, h: float) -> float:
        """r = (lambda[index - 1] - lambda[index]) / h, negative."""
        return (_log_snr(self.sigmas[index - 1]) - _log_snr(self.sigmas[index])) / h

    def _correct(self, x0: Array) -> Array:
        index = self.index - 1
        h, ratio, gain = self._interval(index)
        if self._order(index) == 1:
            terms = [(gain * 0.5, self.x0[-1]), (gain * 0.5, x0)]
        else:
            r = self._previous_ratio(index, h)
            weight = expm1(-h)
            phi1 = weight / -h - 1
            phi2 = phi1 / -h - 0.5
            b1, b2 = phi1 / weight, 2 * phi2 / weight
            older = (b2 - b1) / (r - 1)  # solves older + newer = b1, r * older + newer = b2
            newer = b1 - older
            older = 0.0 if isinf(r) else older / r
            terms = [
                (gain * (1 - older - newer), self.x0[-1]),
                (gain * older, self.x0[-2]),
                (gain * newer, x0),
            ]
        return combine((ratio, self.corrected), *terms)

    def _predict(self, latent: Array) -> Array:
        h, ratio, gain = self._interval(self.index)
        if self._order(self.index) == 1:
            return combine((ratio, latent), (gain, self.x0[-1]))
        half = 0.5 / self._previous_ratio(self.index, h)
        return combine(
            (ratio, latent), (gain * (1 - half), self.x0[-1]), (gain * half, self.x0[-2])
        )


class Renoise(_Steps):
    """The sampler of DMD: x0 = x - sigma * v, x <- (1 - sigma_next) * x0 + sigma_next * noise.

    (FastVideo, `pipelines/stages/denoising.py`, DmdDenoisingStage; CausVid,
    `bidirectional_inference.py`.) The noise comes from PCG64, seeded by the end of the first
    latent: so one initial noise gives one video.
    """

    def __init__(self, sigmas: Sequence[float]) -> None:
        super().__init__(sigmas)
        self.seeding: HostCopy | None = None
        self.generator: np.random.Generator | None = None

    def begin(self, latent: Array) -> None:
        """Have the values that make the seed on the host before a GPU has other work."""
        self.seeding = _seeding(latent)

    def step(self, latent: Array, velocity: Array) -> Array:
        """Return the next latent."""
        if self.generator is None:
            seeding = self.seeding or _seeding(latent)
            self.generator = np.random.default_rng(_seed_of(seeding))
        now, after = self.sigmas[self.index], self.sigmas[self.index + 1]
        self.index += 1
        x0 = combine((1.0, latent), (-now, velocity))
        if after == 0:
            return x0
        noise = self.generator.standard_normal(tuple(latent.shape), np.float32)
        return combine((1 - after, x0), (after, to_fp32_like(noise, latent)))


def _seeding(latent: Array) -> HostCopy:
    """The last values of a latent, on their way to the host."""
    return HostCopy(latent.reshape(-1)[-_SEEDING:])


def _seed_of(seeding: HostCopy) -> list[int]:
    """A seed that these values make, as whole numbers."""
    values = seeding.array()
    return [int(bits) for bits in values.astype(np.float32).view(np.uint32)]


SOLVERS: dict[str, Callable[[Sequence[float]], Solver]] = {
    "unipc": UniPC,
    "dpm++": DPMSolverPP,
    "euler": Euler,
    "renoise": Renoise,
}


def make_schedule(
    solver: str, *, steps: int, shift: float, timesteps: Sequence[float] | None = None
) -> Schedule:
    """The official grid of a solver, or the given timesteps.

    Raises BadRequest for an unknown solver or values outside the grid's domain.
    """
    if solver not in SOLVERS:
        raise BadRequest(f"unknown solver {solver!r}: expected one of {', '.join(SOLVERS)}")
    if timesteps is not None:
        return explicit_schedule(timesteps)
    return official_schedule(steps, shift, _UNIPC_SIGMA_MAX if solver == "unipc" else 1.0)
