"""The families of Wan, one row each: what a model takes, and what it is run with.

A manifest states the family of its model; nothing infers it from shapes. Figures and texts:
Wan-Video/Wan2.1 and Wan2.2, `wan/configs`, `generate.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

from wanexport.runtime import causal_wan, plain_wan
from wanexport.runtime.decode import Name, Range
from wanexport.runtime.errors import BundleError
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.program import Program
from wanexport.runtime.solvers import MAX_SHIFT, MAX_STEPS, NUM_TRAIN_TIMESTEPS
from wanexport.runtime.wan_config import WanConfig

MAX_GUIDANCE = 1000
_AREA_480P = 480 * 832  # pixels


@dataclass(frozen=True)
class SamplingDefaults:
    """What `sample` uses unless told; guidance is Wan's pair (low noise, high noise).

    timesteps are the explicit ones of a distilled model, in place of steps and shift.
    """

    steps: Annotated[int, Range(1, MAX_STEPS)]
    shift: Annotated[float, Range(1 / MAX_SHIFT, MAX_SHIFT)]
    guidance: tuple[
        Annotated[float, Range(-MAX_GUIDANCE, MAX_GUIDANCE)],
        Annotated[float, Range(-MAX_GUIDANCE, MAX_GUIDANCE)],
    ]
    boundary: float | None  # timesteps >= 1000 * boundary go to the high-noise expert
    fps: Annotated[int, Range(1, 1000)]
    solver: Name = "unipc"
    timesteps: tuple[Annotated[float, Range(0, NUM_TRAIN_TIMESTEPS)], ...] | None = None


@dataclass(frozen=True)
class VaeKind:
    """A VAE of Wan: its latent channels, pixels per latent pixel, and official file."""

    channels: int
    spatial_stride: int
    file: str


@dataclass(frozen=True)
class Family:
    """What all models of one kind have in common.

    `needs` are the pictures that a model cannot do without, of `first` and `last`, and `takes`
    those that it can be given. Where `blends_first_frame`, each latent frame has its timestep, and
    the first picture is no input but replaces frame 0, whose timestep is 0. A video of one that
    `is_causal` is made chunk by chunk, and its geometry says of which. `shift_480p` is the
    shift of small videos, where it is another. `like` is the family whose tensors it has.
    `graph` is the module and class of the graph, which only a build imports.
    """

    vae: VaeKind
    hub: str
    negative: str
    sampling: SamplingDefaults
    program: Callable[[WanConfig, Geometry], Program]
    parameters: Callable[[WanConfig], Mapping[str, tuple[int, ...]]]
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    clip_tokens: int = 0
    blends_first_frame: bool = False
    is_causal: bool = False
    like: str = ""
    shift_480p: float | None = None
    graph: str = "wanexport.graphs.wan:WanModel"

    def sampling_at(self, geometry: Geometry) -> SamplingDefaults:
        """The official defaults for a video of this size."""
        if self.shift_480p is None or geometry.height * geometry.width > _AREA_480P:
            return self.sampling
        return replace(self.sampling, shift=self.shift_480p)


_COMMA = "\uff0c"  # the full-width one of Chinese text
_NEGATIVE = (  # of every family: garish colours, overexposure, stills, subtitles, bad hands...
    "色调艳丽", "过曝", "静态", "细节模糊不清", "字幕", "风格", "作品", "画作", "画面", "静止",
    "整体发灰", "最差质量", "低质量", "JPEG压缩残留", "丑陋的", "残缺的", "多余的手指",
    "画得不好的手部", "画得不好的脸部", "畸形的", "毁容的", "形态畸形的肢体", "手指融合",
    "静止不动的画面", "杂乱的背景", "三条腿", "背景人很多", "倒着走",
)  # fmt: skip
_SHAKING, _CUTS = "镜头晃动", "镜头切换"  # of the camera; between shots
_VAE_21 = VaeKind(16, 8, "Wan2.1_VAE.pth")
_VAE_22 = VaeKind(48, 16, "Wan2.2_VAE.pth")
_one_timestep = partial(plain_wan.program, per_frame=False)


def _negative(*first: str) -> str:
    return _COMMA.join((*first, *_NEGATIVE))


def _plain(
    steps: int,
    shift: float,
    guidance: tuple[float, float],
    boundary: float | None = None,
    *,
    hub: str = "Wan-AI/Wan2.1-T2V-1.3B",
    negative: str = _negative(),
    needs: tuple[str, ...] = (),
    clip_tokens: int = 0,
    shift_480p: float | None = None,
) -> Family:
    """A family of Wan2.1's VAE at 16 frames a second, with one timestep for the whole video."""
    return Family(
        vae=_VAE_21,
        hub=hub,
        negative=negative,
        sampling=SamplingDefaults(steps, shift, guidance, boundary, fps=16),
        program=_one_timestep,
        parameters=plain_wan.parameter_shapes,
        needs=needs,
        takes=needs,
        clip_tokens=clip_tokens,
        shift_480p=shift_480p,
    )


_I2V_HUB = "Wan-AI/Wan2.1-I2V-14B-480P"
FAMILIES = {
    "t2v": _plain(50, 5.0, (5.0, 5.0)),
    "i2v": _plain(
        40, 5.0, (5.0, 5.0), hub=_I2V_HUB, negative=_negative(_SHAKING), needs=("first",),
        clip_tokens=257, shift_480p=3.0,
    ),
    "flf2v": _plain(
        50, 16.0, (5.0, 5.0), hub=_I2V_HUB, negative=_negative(_CUTS, _SHAKING),
        needs=("first", "last"), clip_tokens=514,
    ),
    "t2v-a14b": _plain(40, 12.0, (3.0, 4.0), 0.875),
    "i2v-a14b": _plain(40, 5.0, (3.5, 3.5), 0.9, needs=("first",)),
    "ti2v": Family(
        vae=_VAE_22,
        hub="Wan-AI/Wan2.2-TI2V-5B",
        negative=_negative(),
        sampling=SamplingDefaults(50, 5.0, (5.0, 5.0), None, fps=24),
        program=partial(plain_wan.program, per_frame=True),
        parameters=plain_wan.parameter_shapes,
        takes=("first",),
        blends_first_frame=True,
    ),
    # configs/self_forcing_dmd.yaml: 1000, 750, 500 and 250 of 1000, moved by a shift of 5.
    "self-forcing": Family(
        vae=_VAE_21,
        hub="Wan-AI/Wan2.1-T2V-1.3B",
        negative=_negative(),
        sampling=SamplingDefaults(
            4, 5.0, (1.0, 1.0), None, fps=16, solver="renoise",
            timesteps=(1000.0, 937.5, 2500 / 3, 625.0),
        ),
        program=causal_wan.program,
        parameters=plain_wan.parameter_shapes,
        is_causal=True,
        like="t2v",
        graph="wanexport.graphs.causal:CausalWan",
    ),
}  # fmt: skip


def are_alike(one: str, other: str) -> bool:
    """Whether models of two known families have the same tensors."""
    return one == other or FAMILIES[one].like == other or FAMILIES[other].like == one


def family_of(config: WanConfig) -> Family:
    """The row of a model's family. Raises BundleError when this version does not know it."""
    return family_named(config.family)


def family_named(name: str) -> Family:
    """The row of a family. Raises BundleError when this version does not know it."""
    if name not in FAMILIES:
        raise BundleError(
            f"family {name!r} is not known to this wanexport, which knows "
            f"{', '.join(FAMILIES)}: install the one that wrote it"
        )
    return FAMILIES[name]
