"""What fits on a GPU: a table of cards, worked out by hand."""

from dataclasses import replace

import pytest

from wanexport.graphs.config import PRESETS
from wanexport.runtime.bundle.signature import program_of, weights_layout
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.gpu_fit import (
    Needs,
    activation_bytes,
    fit,
    fit_blocks,
    state_bytes,
    streamed_seconds,
)

# 4 + 40 x 1 of weights, 6 to run them, 12 or 3 to decode, 11 for the text encoder.
MODEL = Needs(rest=4, layer=1, layers=40, activations=6, vae=12, tiles=3, text=11)
TWO = Needs(rest=4, layer=1, layers=40, activations=6, experts=2, vae=12, tiles=3, text=11)


@pytest.mark.parametrize(
    ("needs", "room", "offload", "resident", "vae", "text", "taken"),
    [
        (MODEL, 100, None, None, "whole", "gpu", 67),
        (MODEL, 67, None, None, "whole", "gpu", 67),
        (MODEL, 66, None, None, "whole", "cpu", 56),
        (MODEL, 55, None, None, "tiles", "cpu", 50),
        (MODEL, 50, None, None, "tiles", "cpu", 50),
        (MODEL, 49, "blocks", 31, "whole", "cpu", 49),  # 6 in buffers and rest, 31, 12
        (MODEL, 20, "blocks", 2, "whole", "cpu", 20),
        (MODEL, 17, "blocks", 5, "tiles", "cpu", 17),  # 6, 5, and 6 to run
        (MODEL, 12, "blocks", 0, "tiles", "cpu", 12),
        (TWO, 94, None, None, "tiles", "cpu", 94),
        (TWO, 93, "experts", None, "whole", "gpu", 67),
        (TWO, 50, "experts", None, "tiles", "cpu", 50),
        (TWO, 49, "blocks", 31, "whole", "cpu", 49),
    ],
)
def test_the_best_that_fits(
    needs: Needs, room: int, offload: str, resident: int, vae: str, text: str, taken: int
) -> None:
    found = fit(needs, room)
    assert found is not None
    assert (found.offload, found.resident_blocks, found.vae, found.text, found.taken) == (
        offload, resident, vae, text, taken,
    )  # fmt: skip
    assert found.taken <= room
    assert found.streamed == (0 if resident is None else 40 - resident)


@pytest.mark.parametrize("room", [11, 12, 17, 49, 50, 55, 66, 67, 93, 94])
@pytest.mark.parametrize("needs", [MODEL, TWO])
def test_what_a_session_keeps_takes_its_room_from_all_else(needs: Needs, room: int) -> None:
    without = fit(needs, room)
    expected = without and without._replace(taken=without.taken + 7)
    assert fit(replace(needs, state=7), room + 7) == expected


def test_a_causal_session_keeps_its_cache_and_the_prompt() -> None:
    config = PRESETS["self-forcing-1.3b"].config
    program = program_of(config, Geometry(480, 832, 81, chunk=3, cache=21))
    # Keys and values of 30 layers: 22 slots of 1560 tokens, and 512 of the text, 1536 wide.
    assert state_bytes(program, "bf16") == 2 * 30 * (22 * 1560 + 512) * 1536 * 2
    assert state_bytes(program, "fp32") == 2 * state_bytes(program, "fp16")
    assert state_bytes(program_of(PRESETS["tiny"].config, Geometry(64, 96, 9)), "bf16") == 0


def test_less_than_two_layers_and_a_forward_fits_nowhere() -> None:
    assert fit(MODEL, 11) is None and fit_blocks(MODEL, 11) is None
    assert fit_blocks(Needs(4, 0, 0, 6), 100) is None  # it has no layers


def test_layers_are_streamed_rather_than_the_vae_be_on_the_cpu() -> None:
    needs = Needs(rest=4, layer=1, layers=10, activations=2, vae=12, tiles=5)
    found = fit(needs, 16)  # all of it and a forward take 16, with a tile 19
    assert found is not None and (found.offload, found.vae) == ("blocks", "tiles")
    none = Needs(rest=4, layer=1, layers=10, activations=2, vae=50, tiles=40)
    found = fit(none, 16)
    assert found is not None and (found.offload, found.vae) == (None, "cpu")


@pytest.mark.parametrize(
    ("model", "geometry", "measured"),
    [  # docs/measurements.md: GPU memory less the weights, GB
        ("t2v-14b", Geometry(480, 832, 81), 31.8 - 28.95),
        ("t2v-14b", Geometry(720, 1280, 81), 35.3 - 28.95),
        ("t2v-1.3b", Geometry(480, 832, 81), 4.04 - 2.87),
        ("t2v-1.3b", Geometry(720, 1280, 81), 5.5 - 2.87),
        ("ti2v-5b", Geometry(704, 1280, 121, 16), 11.8 - 10.14),
    ],
)
def test_activations_are_estimated_a_little_above_what_was_measured(
    model: str, geometry: Geometry, measured: float
) -> None:
    config = PRESETS[model].config
    shapes = {name: entry.shape for name, entry in weights_layout(config, "bf16")[1].items()}
    estimate = activation_bytes(program_of(config, geometry), shapes, "bf16")
    assert measured <= estimate / 1e9 <= 1.15 * measured


def test_copies_hide_behind_a_longer_forward() -> None:
    assert streamed_seconds(2.5, 28_000_000_000, 25e9) == 2.5
    assert streamed_seconds(0.5, 28_000_000_000, 25e9) == pytest.approx(1.12)
