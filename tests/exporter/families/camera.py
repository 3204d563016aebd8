"""A family of the tests: plain Wan with one more input, the camera, which is added to the video."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from wanexport.graphs.wan import Linear, WanModel
from wanexport.runtime import plain_wan
from wanexport.runtime.family import FAMILIES
from wanexport.runtime.geometry import PATCH, Geometry
from wanexport.runtime.program import Input, Program
from wanexport.runtime.wan_config import WanConfig

CHANNELS = 6  # of Pluecker coordinates
PARAMETERS = ("camera_embedding.weight", "camera_embedding.bias")


def program(config: WanConfig, geometry: Geometry) -> Program:
    """Plain Wan's, whose embedding reads the camera too."""
    plain = plain_wan.program(config, geometry, per_frame=False)
    embed, *rest = plain.calls
    embed = replace(
        embed, reads=(*embed.reads, "camera"), parameters=(*embed.parameters, *PARAMETERS)
    )
    inputs = {**plain.inputs, "camera": Input((1, CHANNELS, *geometry.latent))}
    return replace(plain, inputs=inputs, calls=(embed, *rest))


def parameters(config: WanConfig) -> Mapping[str, tuple[int, ...]]:
    """Plain Wan's, and a matrix for the camera's patches."""
    weight, bias = PARAMETERS
    own = {weight: (config.dim, CHANNELS * PATCH * PATCH), bias: (config.dim,)}
    return {**plain_wan.parameter_shapes(config), **own}


class CameraWan(WanModel):
    """Plain Wan with a projection of the camera's patches beside that of the latent's."""

    describe = staticmethod(program)

    def __init__(
        self, config: WanConfig, geometry: Geometry, dtype: torch.dtype, fused: bool = False
    ) -> None:
        super().__init__(config, geometry, dtype, fused)
        self.camera_embedding = Linear(CHANNELS * PATCH * PATCH, config.dim)
        self.freeze()

    def embed(self, *, camera: Tensor, **inputs: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """What plain Wan's embedding writes, the camera added to x."""
        written = super().embed(**inputs)
        patches = self.camera_embedding(self.patchify(camera)).float()
        return {**written, "x": written["x"] + patches.reshape(written["x"].shape)}


FAMILY = replace(
    FAMILIES["t2v"],
    program=program,
    parameters=parameters,
    graph=f"{__name__}:{CameraWan.__name__}",
)
