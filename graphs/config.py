"""The published Wan models as presets, and what a model is run with unless told."""

from dataclasses import dataclass, replace

from wanexport.runtime.family import SamplingDefaults, family_of
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.wan_config import EXPERTS, WanConfig

_1_3B = WanConfig("t2v", 1536, 8960, 12, 30, 16, 16, 0)
_14B = WanConfig("t2v", 5120, 13824, 40, 40, 16, 16, 0)
_5B = WanConfig("ti2v", 3072, 14336, 24, 30, 48, 48, 0)


@dataclass(frozen=True)
class Preset:
    """A published model: its config and whether it has two experts."""

    config: WanConfig
    experts: tuple[str, ...] = ()


PRESETS = {
    "tiny": Preset(WanConfig("t2v", 256, 1024, 2, 4, 16, 16, 0)),
    "causal-tiny": Preset(WanConfig("self-forcing", 256, 1024, 2, 2, 16, 16, 0)),
    "t2v-1.3b": Preset(_1_3B),
    "self-forcing-1.3b": Preset(replace(_1_3B, family="self-forcing")),
    "t2v-14b": Preset(_14B),
    "i2v-14b": Preset(replace(_14B, family="i2v", in_channels=36, image_tokens=257)),
    "flf2v-14b": Preset(replace(_14B, family="flf2v", in_channels=36, image_tokens=514)),
    "t2v-a14b": Preset(replace(_14B, family="t2v-a14b"), EXPERTS),
    "i2v-a14b": Preset(replace(_14B, family="i2v-a14b", in_channels=36), EXPERTS),
    "ti2v-5b": Preset(_5B),
}


def variant(config: WanConfig, experts: tuple[str, ...]) -> str:
    """The preset that has exactly this config, else the family."""
    for name, preset in PRESETS.items():
        if preset == Preset(config, experts):
            return name
    return config.family


def sampling_defaults(
    config: WanConfig, experts: tuple[str, ...], geometry: Geometry
) -> SamplingDefaults:
    """The family's official defaults at a geometry; a model of one expert has no boundary."""
    defaults = family_of(config).sampling_at(geometry)
    return defaults if experts else replace(defaults, boundary=None)
