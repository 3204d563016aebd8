"""Wan's VAEs, 2.1 and 2.2, as one graph: decoding and encoding, a first latent frame and chunks.

The layers are those that `runtime/wan_vae.py` lists, run in that order; parameters have the names
of diffusers' AutoencoderKLWan, which has both VAEs in one class.
"""

import torch
from torch import Tensor, nn

from wanexport.graphs.graph import Graph
from wanexport.graphs.vae_layers import LAYERS, Kernel, Norm, Place, averaged, repeated
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.program import Program
from wanexport.runtime.vae_config import VaeConfig
from wanexport.runtime.wan_vae import (
    STATISTICS,
    Stage,
    computes_fp32,
    decoder_stages,
    encoder_stages,
    parameter_shapes,
    vae_program,
)


class WanVae(Graph):
    """A VAE at one resolution; it decodes in `dtype`, and encodes in fp32."""

    sizes = VaeConfig
    config: VaeConfig
    latents_mean: Tensor
    latents_scale: Tensor

    def __init__(
        self, config: VaeConfig, geometry: Geometry, dtype: torch.dtype, fused: bool = False
    ) -> None:
        super().__init__(config, geometry, dtype, fused)
        self.decoder_stages, self.encoder_stages = decoder_stages(config), encoder_stages(config)
        for name, shape in parameter_shapes(config).items():
            owner, _, leaf = name.rpartition(".")
            if name in STATISTICS:
                setattr(self, name, nn.Parameter(torch.empty(shape)))
            elif leaf == "gamma":
                _put(self, owner, Norm(shape[0]))
            elif leaf == "weight":
                _put(self, owner, Kernel(shape, tf32=config.tf32))
        self.freeze()

    @staticmethod
    def describe(config: VaeConfig, geometry: Geometry) -> Program:
        """The Program of these calls."""
        return vae_program(config, geometry)

    @staticmethod
    def dtype_of(parameter: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype of a parameter in a graph that decodes in this one."""
        return torch.float32 if computes_fp32(parameter) else dtype

    def decode_first(self, **given: Tensor) -> dict[str, Tensor]:
        """The first frame of a latent [1, h, w, C]."""
        return self._decode("first", given)

    def decode_next(self, **given: Tensor) -> dict[str, Tensor]:
        """Four frames for each of a latent [k, h, w, C], after those that were decoded."""
        return self._decode("next", given)

    def encode_first(self, **given: Tensor) -> dict[str, Tensor]:
        """The first latent frame, of the first frame [1, H, W, 3] in [-1, 1]."""
        return self._encode("first", given)

    def encode_next(self, **given: Tensor) -> dict[str, Tensor]:
        """A latent frame for each four of a video [4k, H, W, 3], after what was encoded."""
        return self._encode("next", given)

    def _decode(self, when: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
        x = given.pop(f"latent.{when}")
        # In this form, as in the official code, for the last bit.
        x = x / self.latents_scale + self.latents_mean
        edge = self.get_submodule("post_quant_conv")
        assert isinstance(edge, Kernel)
        x = (edge.product(x) + edge.bias).to(self.dtype)
        for stage in self.decoder_stages:
            x = self._stage(stage, x, given, when == "first")
        pixels = _without_patches(x, self.config.patch).clamp(-1, 1)
        frames = ((pixels + 1) / 2 * 255).to(torch.uint8)
        return {f"pixels.{when}": pixels, f"frames.{when}": frames}

    def _encode(self, when: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
        x = _in_patches(given.pop(f"video.{when}"), self.config.patch)
        for stage in self.encoder_stages:
            x = self._stage(stage, x, given, when == "first")
        edge = self.get_submodule("quant_conv")
        assert isinstance(edge, Kernel)
        channels = self.config.channels  # the other half is the distribution's width
        mean = torch.nn.functional.linear(x, edge.weight[:channels]) + edge.bias[:channels]
        mean = (mean - self.latents_mean) * self.latents_scale
        return {f"mean.{when}": mean}

    def _stage(self, stage: Stage, x: Tensor, states: dict[str, Tensor], is_first: bool) -> Tensor:
        given = x
        for layer in stage.layers:
            place = Place(layer, self.get_submodule, states, is_first)
            x = LAYERS[layer.kind](place, x)
        if stage.shortcut is None:
            return x
        time, space = stage.shortcut
        if stage.layers[-1].kind == "up":
            beside = repeated(given, time, space, x.shape[-1], is_first=is_first)
        else:
            beside = averaged(given, time, space, x.shape[-1])
        return (x.float() + beside.float()).to(x.dtype)


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    """Make a module one of root's by its dotted name, with what must be between them."""
    *above, last = name.split(".")
    for part in above:
        if part not in dict(root.named_children()):
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, module)


def _in_patches(x: Tensor, patch: int) -> Tensor:
    """Pixels of patches as channels in the order colour, column, row."""
    frames, height, width, colours = x.shape
    x = x.view(frames, height // patch, patch, width // patch, patch, colours)
    x = x.permute(0, 1, 3, 5, 4, 2)
    return x.reshape(frames, height // patch, width // patch, colours * patch**2)


def _without_patches(x: Tensor, patch: int) -> Tensor:
    """Channels in the order colour, column, row as the pixels of patches."""
    frames, height, width, channels = x.shape
    x = x.reshape(frames, height, width, channels // patch**2, patch, patch)
    x = x.permute(0, 1, 5, 2, 4, 3)
    return x.reshape(frames, height * patch, width * patch, channels // patch**2)
