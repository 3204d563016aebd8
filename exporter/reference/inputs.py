"""Seeded inputs of a model, for proofs and comparisons."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from wanexport.runtime.bundle.signature import program_of
from wanexport.runtime.denoiser import pad_rows
from wanexport.runtime.errors import BadRequest
from wanexport.runtime.family import family_of
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.program import Input
from wanexport.runtime.sample import seeded_noise
from wanexport.runtime.wan_config import WanConfig

_OF_THE_LOOP = ("latent", "timestep")  # which a sampling loop makes itself
_ROWS, _NEGATIVE_ROWS = 77, 126
_GIVEN = 4  # channels of a condition that say which latent frames are given


def seeded_inputs(config: WanConfig, geometry: Geometry, seed: int) -> dict[str, Any]:
    """A full set of `sample` inputs that stands in for encoders: only `noise` is what it says.

    Each is drawn as its `draw` in the Program says; text and negative have 77 and 126 rows.
    first_frame is there where the family blends one in. Raises BadRequest for a negative seed.
    """
    if seed < 0:
        raise BadRequest(f"seed must be 0 or more, got {seed}")
    rng = np.random.default_rng([seed, 1])
    specs = program_of(config, geometry).inputs
    latent = specs["latent"].shape
    inputs: dict[str, Any] = {"noise": seeded_noise(latent, seed)}
    for name, spec in specs.items():
        if name not in _OF_THE_LOOP and spec.draw != "place":
            inputs[name] = _drawn(rng, spec, _ROWS)
        if name == "text":
            inputs["negative"] = _drawn(rng, spec, _NEGATIVE_ROWS)
    if family_of(config).blends_first_frame:
        inputs["first_frame"] = rng.standard_normal((*latent[:2], 1, *latent[3:]), np.float32)
    return inputs


def _drawn(rng: np.random.Generator, spec: Input, rows: int) -> np.ndarray:
    if spec.draw == "rows":
        *_, most, width = spec.shape
        return rng.standard_normal((min(rows, most), width), np.float32)
    values = rng.standard_normal(spec.shape, np.float32)
    if spec.draw == "masked":
        values[:, :_GIVEN] = 0
        values[:, :_GIVEN, 0] = 1
    return values


def forward_inputs(
    config: WanConfig, geometry: Geometry, timestep: float, seed: int
) -> dict[str, np.ndarray]:
    """The same inputs for one forward of the graph; a blended first frame is at timestep 0."""
    drawn = seeded_inputs(config, geometry, seed)
    specs = program_of(config, geometry).inputs
    times = np.full(specs["timestep"].shape, timestep, np.float32)
    if family_of(config).blends_first_frame:
        times[0] = 0
    given = {**drawn, "latent": drawn["noise"], "timestep": times}
    given |= whole_inputs(geometry)
    return {
        name: pad_rows(given[name], spec.shape) if spec.draw == "rows" else given[name]
        for name, spec in specs.items()
    }


def commit_inputs(
    geometry: Geometry, inputs: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray] | None:
    """Those of `forward_inputs` as the clean chunk before, which a causal model keeps; None of a
    model that keeps none."""
    if not geometry.chunk:
        return None
    times = np.zeros_like(inputs["timestep"])
    return {**inputs, "latent": -inputs["latent"], "timestep": times, **_place(geometry, 0)}


def whole_inputs(geometry: Geometry) -> dict[str, np.ndarray]:
    """The whole numbers among those of `forward_inputs`: the place of a second chunk."""
    return _place(geometry, 1) if geometry.chunk else {}


def _place(geometry: Geometry, number: int) -> dict[str, np.ndarray]:
    """Where the first or the second chunk of a causal video is: the latest slots that it may have,
    so that of a small cache the first chunk's frames go."""
    chunk = geometry.chunk
    end = min((number + 1) * chunk, geometry.cache)
    numbers = {
        "position": [number * chunk],
        "slots": list(range(end - chunk, end)),
        "keys": [end * geometry.frame_tokens],
    }
    return {name: np.array(values, np.int64) for name, values in numbers.items()}
