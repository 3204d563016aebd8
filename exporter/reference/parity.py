"""How far an engine is from the reference, the gate it must pass, and the inputs both are given."""

from dataclasses import dataclass
from math import hypot, inf, isfinite, nan
from typing import Any

import numpy as np

from wanexport.runtime.bundle.signature import input_shapes
from wanexport.runtime.denoiser import pad_text
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.sample import seeded_noise
from wanexport.runtime.wan_config import WanConfig

FP32_GATE = 1e-5
FLOOR_FACTOR = 1.25


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


def seeded_inputs(config: WanConfig, geometry: Geometry, seed: int) -> dict[str, Any]:
    """A full set of `sample` inputs that stands in for encoders: only `noise` is what it says.

    Text and negative have 77 and 126 rows; condition marks the first latent frame as given, as in
    image-to-video; first_frame is there where the timestep is per frame.
    """
    if seed < 0:
        raise WanExportError(f"seed must be 0 or more, got {seed}")
    rng = np.random.default_rng([seed, 1])
    shapes = input_shapes(config, geometry)
    latent = shapes["latent"]
    inputs: dict[str, Any] = {
        "noise": seeded_noise(latent, seed),
        "text": rng.standard_normal((77, config.text_dim), np.float32),
        "negative": rng.standard_normal((126, config.text_dim), np.float32),
    }
    if "condition" in shapes:
        condition = rng.standard_normal(shapes["condition"], np.float32)
        condition[:, :4] = 0
        condition[:, :4, 0] = 1
        inputs["condition"] = condition
    if "image" in shapes:
        inputs["image"] = rng.standard_normal(shapes["image"], np.float32)
    if config.per_frame_timestep:
        inputs["first_frame"] = rng.standard_normal((*latent[:2], 1, *latent[3:]), np.float32)
    return inputs


def forward_inputs(
    config: WanConfig, geometry: Geometry, timestep: float, seed: int
) -> dict[str, np.ndarray]:
    """The same inputs for one forward of the graph, where frame 0 of TI2V is at timestep 0."""
    inputs = seeded_inputs(config, geometry, seed)
    shapes = input_shapes(config, geometry)
    times = np.full(shapes["timestep"], timestep, np.float32)
    if config.per_frame_timestep:
        times[0] = 0
    feed = {"latent": inputs["noise"], "timestep": times}
    feed["text"] = pad_text(inputs["text"], shapes["text"])
    return feed | {name: inputs[name] for name in ("condition", "image") if name in shapes}
