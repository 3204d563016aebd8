"""Seeded inputs of a model, for proofs and comparisons."""

from typing import Any

import numpy as np

from wanexport.runtime.bundle.signature import input_shapes
from wanexport.runtime.denoiser import pad_text
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.sample import seeded_noise
from wanexport.runtime.wan_config import WanConfig


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
