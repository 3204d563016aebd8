"""Families follow from channels and branches; their defaults are the official ones."""

from dataclasses import replace

import pytest

from tests.oracles.wan_reference import small_config
from wanexport.graphs.config import PRESETS, sampling_defaults, variant
from wanexport.runtime.errors import BadRequest, WanExportError
from wanexport.runtime.family import family_of
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.plain_wan import family_name
from wanexport.runtime.wan_config import EXPERTS


def test_presets_are_known_by_their_config() -> None:
    for name, preset in PRESETS.items():
        assert variant(preset.config, preset.experts) == name
    assert variant(small_config("flf2v-14b"), ()) == "flf2v"


@pytest.mark.parametrize(
    ("preset", "steps", "shift", "guidance", "boundary", "fps"),
    [
        ("t2v-1.3b", 50, 5.0, (5.0, 5.0), None, 16),
        ("t2v-14b", 50, 5.0, (5.0, 5.0), None, 16),
        ("i2v-14b", 40, 5.0, (5.0, 5.0), None, 16),
        ("flf2v-14b", 50, 16.0, (5.0, 5.0), None, 16),
        ("t2v-a14b", 40, 12.0, (3.0, 4.0), 0.875, 16),
        ("i2v-a14b", 40, 5.0, (3.5, 3.5), 0.9, 16),
        ("ti2v-5b", 50, 5.0, (5.0, 5.0), None, 24),
    ],
)
def test_sampling_defaults_at_720p_are_the_official_ones(
    preset: str,
    steps: int,
    shift: float,
    guidance: tuple[float, float],
    boundary: float | None,
    fps: int,
) -> None:
    chosen = PRESETS[preset]
    geometry = Geometry(704, 1280, 81, family_of(chosen.config).vae.spatial_stride)
    defaults = sampling_defaults(chosen.config, chosen.experts, geometry)
    assert (defaults.steps, defaults.shift, defaults.guidance) == (steps, shift, guidance)
    assert (defaults.boundary, defaults.fps, defaults.solver) == (boundary, fps, "unipc")


def test_i2v_at_480p_has_its_own_shift() -> None:
    config = PRESETS["i2v-14b"].config
    assert sampling_defaults(config, (), Geometry(480, 832, 81)).shift == 3.0
    assert sampling_defaults(config, (), Geometry(832, 480, 81)).shift == 3.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "does not split into 5 heads"),
        ({"in_channels": 17}, "no Wan has 17 input"),
        ({"image_tokens": 100}, "100 image tokens"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(WanExportError, match=message):
        replace(small_config("t2v-1.3b"), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_presets_family_is_the_one_its_tensors_tell(preset: str) -> None:
    config, experts = PRESETS[preset].config, PRESETS[preset].experts
    sizes = config.condition_channels, config.out_channels, config.image_tokens
    told = family_of(config).like or config.family  # a causal Wan's tensors are a plain one's
    assert family_name(*sizes, len(experts)) == told


def test_one_expert_alone_has_no_boundary() -> None:
    config, geometry = PRESETS["i2v-a14b"].config, Geometry(480, 832, 81)
    assert sampling_defaults(config, EXPERTS, geometry).boundary == 0.9
    assert sampling_defaults(config, (), geometry).boundary is None


def test_two_experts_of_a_one_expert_family_are_refused() -> None:
    with pytest.raises(BadRequest, match="two experts"):
        family_name(0, 48, 0, len(EXPERTS))
