"""How far an engine is from the reference, the gate it must pass, and the inputs both are given."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from wanexport.graphs.config import WanConfig
from wanexport.graphs.signature import input_shapes
from wanexport.runtime.denoiser import pad_text
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.sample import seeded_noise

FP32_GATE = 1e-5
FLOOR_FACTOR = 1.25


@dataclass(frozen=True)
class Parity:
    """Relative L2 errors against the fp32 reference; in fp32 there is no floor."""

    error: float
    floor: float | None

    @property
    def gate(self) -> float:
        """The largest error that passes."""
        return FP32_GATE if self.floor is None else FLOOR_FACTOR * self.floor

    @property
    def passed(self) -> bool:
        """Whether the error is a number and within the gate."""
        return bool(self.error <= self.gate)


def relative_l2(value: np.ndarray, reference: np.ndarray) -> float:
    """|value - reference| / |reference| in fp64; NaN when value has NaN or Inf."""
    exact = reference.astype(np.float64)
    if not np.isfinite(value).all():
        return float("nan")
    return float(np.linalg.norm(value.astype(np.float64) - exact) / np.linalg.norm(exact))


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
