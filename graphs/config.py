"""The published Wan models: presets, and each family's official sampling defaults.

Figures: Wan-Video/Wan2.1 and Wan2.2, `wan/configs` and `generate.py`.
"""

from dataclasses import dataclass, replace

from wanexport.runtime.bundle.manifest import SamplingDefaults
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.wan_config import EXPERTS, WanConfig

_1_3B = WanConfig(1536, 8960, 12, 30, 16, 16, 0)
_14B = WanConfig(5120, 13824, 40, 40, 16, 16, 0)
_5B = WanConfig(3072, 14336, 24, 30, 48, 48, 0)


@dataclass(frozen=True)
class Preset:
    """A published model: its config and whether it has two experts."""

    config: WanConfig
    experts: tuple[str, ...] = ()


PRESETS = {
    "tiny": Preset(WanConfig(256, 1024, 2, 4, 16, 16, 0)),
    "t2v-1.3b": Preset(_1_3B),
    "t2v-14b": Preset(_14B),
    "i2v-14b": Preset(replace(_14B, in_channels=36, image_tokens=257)),
    "flf2v-14b": Preset(replace(_14B, in_channels=36, image_tokens=514)),
    "t2v-a14b": Preset(_14B, EXPERTS),
    "i2v-a14b": Preset(replace(_14B, in_channels=36), EXPERTS),
    "ti2v-5b": Preset(_5B),
}

_SAMPLING = {
    "t2v": SamplingDefaults(steps=50, shift=5.0, guidance=(5.0, 5.0), boundary=None, fps=16),
    "i2v": SamplingDefaults(steps=40, shift=5.0, guidance=(5.0, 5.0), boundary=None, fps=16),
    "flf2v": SamplingDefaults(steps=50, shift=16.0, guidance=(5.0, 5.0), boundary=None, fps=16),
    "t2v-a14b": SamplingDefaults(steps=40, shift=12.0, guidance=(3.0, 4.0), boundary=0.875, fps=16),
    "i2v-a14b": SamplingDefaults(steps=40, shift=5.0, guidance=(3.5, 3.5), boundary=0.9, fps=16),
    "ti2v": SamplingDefaults(steps=50, shift=5.0, guidance=(5.0, 5.0), boundary=None, fps=24),
}
_AREA_480P = 480 * 832


def family(config: WanConfig, experts: tuple[str, ...]) -> str:
    """The family whose sampling defaults apply; it follows from channels and branches alone.

    One expert of the A14B by itself has the tensors of Wan2.1's T2V and is taken for it.
    Raises WanExportError for two experts of a model that has one.
    """
    if experts and (config.per_frame_timestep or config.image_tokens):
        raise WanExportError("two experts with an image branch or 48 channels are no known Wan")
    if config.per_frame_timestep:
        return "ti2v"
    if config.condition_channels == 0:
        return "t2v-a14b" if experts else "t2v"
    return {0: "i2v-a14b", 257: "i2v", 514: "flf2v"}[config.image_tokens]


def variant(config: WanConfig, experts: tuple[str, ...]) -> str:
    """The preset that has exactly this config, else the family."""
    for name, preset in PRESETS.items():
        if preset == Preset(config, experts):
            return name
    return family(config, experts)


def sampling_defaults(
    config: WanConfig, experts: tuple[str, ...], geometry: Geometry
) -> SamplingDefaults:
    """The official steps, shift, guidance, boundary and frame rate for this model and geometry."""
    kind = family(config, experts)
    defaults = _SAMPLING[kind]
    if kind == "i2v" and geometry.height * geometry.width <= _AREA_480P:
        defaults = replace(defaults, shift=3.0)
    return defaults if experts else replace(defaults, boundary=None)
