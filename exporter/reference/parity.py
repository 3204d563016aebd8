"""How far an engine is from the reference, the gate it must pass, and the inputs both are given."""

from dataclasses import dataclass
from math import hypot, inf, isfinite, nan

import numpy as np

FP32_GATE = 1e-5
FLOOR_FACTOR = 1.25
FP32_NOISE = FP32_GATE / FLOOR_FACTOR  # among `others`: a reference is off as far as fp32 may be


@dataclass(frozen=True)
class Parity:
    """Relative L2 error against the reference, and what of it is none of the engine's fault.

    `floor` is the error of eager PyTorch in the engine's precision, None in fp32; `others` are
    those of a reference that is itself rounded.
    """

    error: float
    floor: float | None
    others: tuple[float, ...] = ()

    @property
    def gate(self) -> float:
        """The largest error that passes; independent roundings add in quadrature."""
        own = max(FP32_GATE, FLOOR_FACTOR * (self.floor or 0.0))
        return hypot(own, *(FLOOR_FACTOR * error for error in self.others))

    @property
    def over_gate(self) -> float:
        """error / gate; infinite when either is not a number."""
        ratio = self.error / self.gate
        return ratio if isfinite(ratio) and isfinite(self.gate) else inf

    @property
    def passed(self) -> bool:
        """Whether the error is a number and within the gate."""
        return self.over_gate <= 1


@dataclass(frozen=True)
class Difference:
    """How an array differs from a reference; NaN where either is not finite.

    `error` is the relative L2 error, `max` and `p99` the largest absolute difference and its 99th
    percentile; `nan` and `inf` count such values of the array.
    """

    error: float
    cosine: float
    max: float
    p99: float
    nan: int
    inf: int


def difference(value: np.ndarray, reference: np.ndarray) -> Difference:
    """Compare two arrays of one shape in fp64."""
    counts = {"nan": int(np.isnan(value).sum()), "inf": int(np.isinf(value).sum())}
    if not (np.isfinite(value).all() and np.isfinite(reference).all()):
        return Difference(nan, nan, nan, nan, **counts)
    a, b = (array.astype(np.float64).ravel() for array in (value, reference))
    distance, norms = np.abs(a - b), (np.linalg.norm(a), np.linalg.norm(b))
    if not norms[1]:  # no direction and no scale to measure by
        return Difference(inf if norms[0] else 0.0, nan, distance.max(), nan, **counts)
    return Difference(
        error=float(np.linalg.norm(distance) / norms[1]),
        cosine=float(a @ b / (norms[0] * norms[1])) if norms[0] else 0.0,
        max=float(distance.max()),
        p99=float(np.percentile(distance, 99)),
        **counts,
    )


def relative_l2(value: np.ndarray, reference: np.ndarray) -> float:
    """|value - reference| / |reference| in fp64; NaN when either has NaN or Inf."""
    return difference(value, reference).error


def measure(engine: np.ndarray, reference: np.ndarray, floor: np.ndarray | None) -> Parity:
    """Parity of one velocity; floor is eager in the engine's own precision."""
    return Parity(
        error=relative_l2(engine, reference),
        floor=None if floor is None else relative_l2(floor, reference),
    )
